//! The restorer: checks that this host can take a container, creates it again, brings it to life from its images
//! and pages, and keeps it or undoes it. It never talks to the source host.
//!
//! ```text
//!          Create             Restore            Adopt
//! (none) --------> created ------------> running ------> (an ordinary container)
//!    ^                |                     |
//!    +----- Undo -----+-------- Undo -------+
//! ```
//!
//! What is made is written down before it is made ([`notes`]), so that a restorer that was restarted still knows
//! what to undo.

mod check;
mod create;
mod failure;
mod finish;
mod join;
mod notes;
mod restore;

use std::error::Error;
use std::path::PathBuf;
use std::sync::Arc;

use haulage_criu::swrk::Criu;
use haulage_engine::armed::ArmedRoot;
use haulage_engine::{Docker, Engine, HostFacts};
use haulage_protocol::id::MigrationId;
use haulage_protocol::restorer::{Adopt, Check, Create, Restore, Undo, Verify};
use haulage_service::Shell;
use haulage_service::config::HostConfig;

/// What every verb works with.
pub(crate) struct Restorer {
    config: HostConfig,
    docker: Docker,
    criu: Criu,
    armed: ArmedRoot,
}

impl Restorer {
    fn dir(&self, migration: &MigrationId) -> PathBuf {
        self.config.migration_dir(migration)
    }
}

/// Where in a migration's directory the CRIU images arrive.
pub(crate) const IMAGES: &str = "images";
/// Where they are joined with the pages.
pub(crate) const COMPLETE: &str = "complete";
/// Where runc and CRIU leave their logs.
pub(crate) const WORK: &str = "work";

/// Registers the verbs.
///
/// # Errors
/// When the engine cannot be reached or CRIU is not installed.
pub async fn serve(shell: &mut Shell) -> Result<(), Box<dyn Error + Send + Sync>> {
    let docker = Docker::connect(shell.config.docker_socket().as_ref()).await?;
    let info = docker.info().await?;
    let engine = info.clone();
    let host = tokio::task::spawn_blocking(move || HostFacts::gather(&engine)).await??;
    shell.facts.insert("kernel".to_owned(), host.kernel);
    shell.facts.insert("cpu".to_owned(), host.cpu_model);
    shell.facts.insert("docker".to_owned(), info.server_version);
    shell.facts.insert("storage".to_owned(), info.storage_driver);
    let armed = ArmedRoot::from_env();
    create::bar_again(&shell.config, &armed)?;
    let service = Arc::new(Restorer { config: shell.config.clone(), docker, criu: Criu::find()?, armed });
    let server = &mut shell.server;
    let s = service.clone();
    server.answer::<Check, _, _>(move |at, ask| check::check(s.clone(), at.migration, ask)).await?;
    let s = service.clone();
    server.answer::<Create, _, _>(move |at, ask| create::create(s.clone(), at.migration, ask)).await?;
    let s = service.clone();
    server.answer::<Restore, _, _>(move |at, ask| restore::restore(s.clone(), at.migration, ask)).await?;
    let s = service.clone();
    server.answer::<Verify, _, _>(move |_, ask| finish::verify(s.clone(), ask)).await?;
    let s = service.clone();
    server.answer::<Adopt, _, _>(move |at, ask| finish::adopt(s.clone(), at.migration, ask)).await?;
    server.answer::<Undo, _, _>(move |at, _| finish::undo(service.clone(), at.migration)).await?;
    Ok(())
}
