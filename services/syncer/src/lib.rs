//! The syncer: images through the bucket; the writable layer, volumes, logs and CRIU's images over a bulk stream,
//! in passes. Tmpfs mounts of the container are filled before it has them. It does not touch processes.

mod archive;
mod failure;
mod image;
mod packed;
mod source;
mod target;
mod tmpfs;

use std::collections::HashMap;
use std::error::Error;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use haulage_engine::Docker;
use haulage_protocol::fault::{Fault, code};
use haulage_protocol::id::MigrationId;
use haulage_protocol::syncer::{
    CloseFiles, FilesClosed, OpenFiles, PersistFiles, PullImage, PushImage, SyncFiles,
};
use haulage_service::Shell;
use haulage_service::bulk::{Arrivals, PACE};
use haulage_service::config::HostConfig;
use haulage_service::notes;
use haulage_transport::bucket::Bucket;

use crate::failure::{fault, joined};
use crate::source::CARGO;

/// What every verb works with.
pub(crate) struct Syncer {
    config: HostConfig,
    docker: Docker,
    bucket: Bucket,
    arrivals: Arrivals,
    sources: Mutex<HashMap<MigrationId, source::Session>>,
    /// Those that were made for what arrives, until the session is closed.
    tmpfs: Mutex<HashMap<MigrationId, Vec<OwnedFd>>>,
}

/// Registers the verbs.
///
/// # Errors
/// When the engine cannot be reached, the bucket cannot be opened or the bulk address cannot be listened on.
pub async fn serve(shell: &mut Shell) -> Result<(), Box<dyn Error + Send + Sync>> {
    let arrivals = Arrivals::bind(&shell.config, CARGO).await?;
    shell.facts.insert("files".to_owned(), arrivals.address().to_string());
    shell.facts.insert("bucket".to_owned(), shell.config.bucket.clone());
    let service = Arc::new(Syncer {
        docker: Docker::connect(shell.config.docker_socket().as_ref()).await?,
        bucket: Bucket::open(&shell.config.bucket)?,
        config: shell.config.clone(),
        arrivals,
        sources: Mutex::default(),
        tmpfs: Mutex::default(),
    });
    let server = &mut shell.server;
    let s = service.clone();
    server.answer::<PushImage, _, _>(move |at, ask| image::push(s.clone(), at.migration, ask)).await?;
    let s = service.clone();
    server.answer::<PullImage, _, _>(move |at, ask| image::pull(s.clone(), at.migration, ask)).await?;
    let s = service.clone();
    server.answer::<OpenFiles, _, _>(move |at, ask| target::open(s.clone(), at.migration, ask)).await?;
    let s = service.clone();
    server.answer::<SyncFiles, _, _>(move |at, ask| source::sync(s.clone(), at.migration, ask)).await?;
    server.answer::<PersistFiles, _, _>(|_, ask| target::persist(ask)).await?;
    server.answer::<CloseFiles, _, _>(move |at, _| close(service.clone(), at.migration)).await?;
    Ok(())
}

async fn close(service: Arc<Syncer>, migration: MigrationId) -> Result<FilesClosed, Fault> {
    drop(service.sources.lock().unwrap_or_else(PoisonError::into_inner).remove(&migration));
    service.arrivals.close(&migration).await;
    drop(service.tmpfs.lock().unwrap_or_else(PoisonError::into_inner).remove(&migration));
    let dir = service.config.migration_dir(&migration);
    let removed = tokio::task::spawn_blocking(move || notes::remove(&dir, &[PACE])).await;
    joined(removed.map(|removed| removed.map_err(fault(code::INTERNAL))))?;
    Ok(FilesClosed {})
}
