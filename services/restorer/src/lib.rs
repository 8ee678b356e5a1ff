//! The restorer: checks that this host can take a container, creates it again, brings it to life from its images
//! and pages, and keeps it or undoes it. It never talks to the source host.
//!
//! ```text
//!          Create           Prepare            Restore            Adopt
//! (none) --------> created ---------> waiting ---------> running ------> (an ordinary container)
//!    ^                |                  |                  |
//!    +----- Undo -----+------ Undo ------+------ Undo ------+
//! ```
//!
//! A restored container runs before it has its memory: a page server ([`page_server`]) gives it what it touches and
//! then the rest, and `Verify` succeeds only when nothing is missing. Until it is adopted it is watched ([`guard`]):
//! while no coordinator is heard it is mute.
//!
//! What is made is written down before it is made ([`notes`]), so that a restorer that was restarted still knows
//! what to undo.

mod check;
mod create;
mod failure;
mod finish;
mod guard;
mod join;
mod kill;
mod memory;
mod notes;
pub mod page_server;
mod prepare;
mod restore;

use std::error::Error;
use std::path::PathBuf;
use std::sync::Arc;

use haulage_criu::swrk::Criu;
use haulage_engine::armed::{ArmedError, ArmedRoot, State};
use haulage_engine::{Docker, Engine, HostFacts};
use haulage_protocol::fault::Fault;
use haulage_protocol::id::MigrationId;
use haulage_protocol::restorer::{Adopt, Check, Create, Prepare, Restore, TakePackets, Undo, Verify};
use haulage_service::Shell;
use haulage_service::config::HostConfig;

use crate::failure::{STATE, blocking, fault};
use crate::guard::Guards;

/// What every verb works with.
pub(crate) struct Restorer {
    config: HostConfig,
    docker: Docker,
    criu: Criu,
    armed: ArmedRoot,
    memories: Arc<memory::Memories>,
    starts: prepare::Starts,
    guards: Guards,
}

impl Restorer {
    fn dir(&self, migration: &MigrationId) -> PathBuf {
        self.config.migration_dir(migration)
    }

    /// Looks at or changes armed states, off the executor.
    async fn armed<T: Send + 'static>(
        &self,
        work: impl FnOnce(&ArmedRoot) -> Result<T, ArmedError> + Send + 'static,
    ) -> Result<T, Fault> {
        let armed = self.armed.clone();
        blocking(move || work(&armed).map_err(fault(STATE))).await
    }

    async fn disarm(&self, container: &str) -> Result<(), Fault> {
        let id = container.to_owned();
        self.armed(move |armed| armed.disarm(&id)).await
    }

    async fn armed_state(&self, container: &str) -> Result<State, Fault> {
        let id = container.to_owned();
        self.armed(move |armed| armed.state(&id)).await
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
    let left = {
        let (state_dir, armed) = (shell.config.state_dir.clone(), armed.clone());
        blocking(move || {
            let left = notes::Notes::all(&state_dir).map_err(fault(STATE))?;
            create::bar_again(&left, &armed).map_err(fault(STATE))?;
            Ok(left)
        })
        .await?
    };
    let service = Arc::new(Restorer {
        config: shell.config.clone(),
        docker,
        criu: Criu::find()?,
        armed,
        memories: Arc::default(),
        starts: prepare::Starts::default(),
        guards: Guards::default(),
    });
    guard::watch_again(&service, left).await;
    let server = &mut shell.server;
    let s = service.clone();
    server.answer::<Check, _, _>(move |at, ask| check::check(s.clone(), at.migration, ask)).await?;
    let s = service.clone();
    server.answer::<Create, _, _>(move |at, ask| create::create(s.clone(), at.migration, ask)).await?;
    let s = service.clone();
    server.answer::<Prepare, _, _>(move |at, ask| prepare::prepare(s.clone(), at.migration, ask)).await?;
    let s = service.clone();
    server.answer::<TakePackets, _, _>(move |at, _| prepare::take_packets(s.clone(), at.migration)).await?;
    let s = service.clone();
    server.answer::<Restore, _, _>(move |at, ask| restore::restore(s.clone(), at.migration, ask)).await?;
    let s = service.clone();
    server.answer::<Verify, _, _>(move |at, ask| finish::verify(s.clone(), at.migration, ask)).await?;
    let s = service.clone();
    server.answer::<Adopt, _, _>(move |at, ask| finish::adopt(s.clone(), at.migration, ask)).await?;
    server.answer::<Undo, _, _>(move |at, _| finish::undo(service.clone(), at.migration)).await?;
    Ok(())
}
