//! The page-shipper: on the source it tracks, reads and sends memory; on the target it receives into the page
//! store. It does not decide when to stop: the coordinator asks for each round.

mod arrival;
mod debt;
mod failure;
mod lanes;
mod modest;
mod probe;
mod relay;
mod sample;
mod source;
mod target;
mod watched;
mod wire;

use std::collections::HashMap;
use std::error::Error;
use std::sync::{Arc, Mutex, PoisonError};

use haulage_protocol::fault::Fault;
use haulage_protocol::id::MigrationId;
use haulage_protocol::page_shipper::{
    ClosePages, FinalRound, MeasureLink, OpenPages, OpenSink, PagesClosed, RunRound, SampleWrites,
    StartTracking,
};
use haulage_service::Shell;
use haulage_service::bulk::{Arrivals, PACE};
use haulage_service::config::HostConfig;
use haulage_service::notes;

use crate::failure::{STORE, fault};
use crate::watched::Watched;
use crate::wire::CARGO;

/// A tracker that is killed while it injects takes the container with it: the kernel shall choose others.
const LAST_TO_DIE: i16 = -1000;

/// Freed memory that is kept for the next batches, in bytes: about what a migration has on its way. To be arranged for
/// when the process begins ([`haulage_sys::process::keep_freed_memory`]).
pub const KEPT: u32 = 32 << 20;

/// What every verb works with.
pub(crate) struct PageShipper {
    config: HostConfig,
    arrivals: Arrivals,
    sources: Mutex<HashMap<MigrationId, source::Session>>,
    watched: Arc<Watched>,
    /// What containers that run on their targets are still owed.
    debts: Mutex<HashMap<MigrationId, debt::Debt>>,
    /// Shared memory that has come, until the migration is over.
    kept: Mutex<HashMap<MigrationId, Arc<arrival::Kept>>>,
}

/// Registers the verbs.
///
/// # Errors
/// When the bulk address cannot be listened on.
pub async fn serve(shell: &mut Shell) -> Result<(), Box<dyn Error + Send + Sync>> {
    if let Err(error) = haulage_sys::process::set_oom_score_adj(LAST_TO_DIE) {
        tracing::warn!(%error, "this process is not protected from the out-of-memory killer");
    }
    let arrivals = Arrivals::bind(&shell.config, CARGO).await?;
    shell.facts.insert("pages".to_owned(), arrivals.address().to_string());
    let service = Arc::new(PageShipper {
        config: shell.config.clone(),
        arrivals,
        sources: Mutex::default(),
        watched: Arc::default(),
        debts: Mutex::default(),
        kept: Mutex::default(),
    });
    let server = &mut shell.server;
    let s = service.clone();
    server.answer::<OpenPages, _, _>(move |at, ask| target::open(s.clone(), at.migration, ask)).await?;
    let s = service.clone();
    server.answer::<StartTracking, _, _>(move |at, ask| source::start(s.clone(), at.migration, ask)).await?;
    let s = service.clone();
    server.answer::<SampleWrites, _, _>(move |_, ask| sample::sample(s.watched.clone(), ask)).await?;
    let s = service.clone();
    server.answer::<OpenSink, _, _>(move |at, ask| probe::open(s.clone(), at.migration, ask)).await?;
    server.answer::<MeasureLink, _, _>(move |at, ask| probe::measure(at.migration, ask)).await?;
    let s = service.clone();
    server.answer::<RunRound, _, _>(move |at, ask| source::round(s.clone(), at.migration, ask)).await?;
    let s = service.clone();
    server
        .answer::<FinalRound, _, _>(move |at, ask| source::final_round(s.clone(), at.migration, ask))
        .await?;
    server.answer::<ClosePages, _, _>(move |at, _| close(service.clone(), at.migration)).await?;
    Ok(())
}

/// Ends whatever this host has of the migration's memory.
async fn close(service: Arc<PageShipper>, migration: MigrationId) -> Result<PagesClosed, Fault> {
    let source = service.sources.lock().unwrap_or_else(PoisonError::into_inner).remove(&migration);
    let debt = service.debts.lock().unwrap_or_else(PoisonError::into_inner).remove(&migration);
    let owing = match debt {
        Some(debt) => Some(debt.call_off(&migration).await),
        None => None,
    };
    // Closing the trackers' descriptors makes the kernel walk the page tables.
    let dropped = tokio::task::spawn_blocking(move || drop((source, owing))).await;
    dropped.map_err(fault(STORE))?;
    service.arrivals.close(&migration).await;
    target::remove_store(service.clone(), migration.clone()).await?;
    let dir = service.config.migration_dir(&migration);
    let removed = tokio::task::spawn_blocking(move || notes::remove(&dir, &[PACE])).await;
    removed.map_err(fault(STORE))?.map_err(fault(STORE))?;
    // What was kept for the next batch of this migration.
    tokio::task::spawn_blocking(haulage_sys::process::give_back_freed_memory).await.map_err(fault(STORE))?;
    Ok(PagesClosed {})
}
