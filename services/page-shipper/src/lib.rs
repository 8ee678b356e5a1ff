//! The page-shipper: on the source it tracks, reads and sends memory; on the target it receives into the page
//! store. It does not decide when to stop: the coordinator asks for each round.

mod failure;
mod source;
mod target;
mod wire;

use std::collections::HashMap;
use std::error::Error;
use std::sync::{Arc, Mutex, PoisonError};

use haulage_protocol::fault::Fault;
use haulage_protocol::id::MigrationId;
use haulage_protocol::page_shipper::{
    ClosePages, FinalRound, OpenPages, PagesClosed, RunRound, StartTracking,
};
use haulage_service::Shell;
use haulage_service::config::HostConfig;
use haulage_transport::stream::BulkListener;

use crate::failure::{STORE, fault};

/// A tracker that is killed while it injects takes the container with it: the kernel shall choose others.
const LAST_TO_DIE: i16 = -1000;

/// What every verb works with.
pub(crate) struct PageShipper {
    config: HostConfig,
    listener: BulkListener,
    /// Where other hosts find it.
    advertised: std::net::SocketAddr,
    sources: Mutex<HashMap<MigrationId, source::Session>>,
    targets: Mutex<HashMap<MigrationId, target::Session>>,
}

/// Registers the verbs.
///
/// # Errors
/// When the bulk address cannot be listened on.
pub async fn serve(shell: &mut Shell) -> Result<(), Box<dyn Error + Send + Sync>> {
    if let Err(error) = haulage_sys::process::set_oom_score_adj(LAST_TO_DIE) {
        tracing::warn!(%error, "this process is not protected from the out-of-memory killer");
    }
    let listener = BulkListener::bind(shell.config.bulk_listen).await?;
    let advertised = shell.config.advertised(listener.local_addr())?;
    shell.facts.insert("pages".to_owned(), advertised.to_string());
    let service = Arc::new(PageShipper {
        config: shell.config.clone(),
        listener,
        advertised,
        sources: Mutex::default(),
        targets: Mutex::default(),
    });
    let server = &mut shell.server;
    let s = service.clone();
    server.answer::<OpenPages, _, _>(move |at, ask| target::open(s.clone(), at.migration, ask)).await?;
    let s = service.clone();
    server.answer::<StartTracking, _, _>(move |at, ask| source::start(s.clone(), at.migration, ask)).await?;
    let s = service.clone();
    server.answer::<RunRound, _, _>(move |at, ask| source::round(s.clone(), at.migration, ask)).await?;
    let s = service.clone();
    server.answer::<FinalRound, _, _>(move |at, _| source::final_round(s.clone(), at.migration)).await?;
    server.answer::<ClosePages, _, _>(move |at, _| close(service.clone(), at.migration)).await?;
    Ok(())
}

/// Ends whatever this host has of the migration's memory.
async fn close(service: Arc<PageShipper>, migration: MigrationId) -> Result<PagesClosed, Fault> {
    let source = service.sources.lock().unwrap_or_else(PoisonError::into_inner).remove(&migration);
    // Closing the trackers' descriptors makes the kernel walk the page tables.
    let dropped = tokio::task::spawn_blocking(move || drop(source)).await;
    dropped.map_err(fault(STORE))?;
    let target = service.targets.lock().unwrap_or_else(PoisonError::into_inner).remove(&migration);
    if let Some(target) = target {
        target.end().await;
    }
    target::remove_store(&service.config, &migration).map_err(fault(STORE))?;
    Ok(PagesClosed {})
}
