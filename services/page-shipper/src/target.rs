//! The target role: receive into the page store.

use std::path::PathBuf;
use std::sync::{Arc, PoisonError};

use haulage_pages::store::StoreLimits;
use haulage_pages::target::TargetEngine;
use haulage_protocol::fault::Fault;
use haulage_protocol::id::MigrationId;
use haulage_protocol::page_shipper::{OpenPages, PagesOpened};
use haulage_protocol::unit::Bytes as Size;
use haulage_service::config::HostConfig;
use haulage_service::scratch::{has_ample_room, room_in};

use crate::PageShipper;
use crate::arrival::{Arrival, Kept};
use crate::failure::{MAKE_ROOM, STORE, fault, joined};

/// The page store in a migration's directory.
const STORE_DIR: &str = "pages";

pub(crate) async fn open(
    service: Arc<PageShipper>,
    migration: MigrationId,
    ask: OpenPages,
) -> Result<PagesOpened, Fault> {
    service.arrivals.close(&migration).await;
    remove_store(service.clone(), migration.clone()).await?;
    let (worker, id) = (service.clone(), migration.clone());
    let made = tokio::task::spawn_blocking(move || {
        let store = place(&worker.config, &id, ask.memory)?.join(STORE_DIR);
        std::fs::create_dir_all(&store).map_err(fault(STORE))?;
        let engine = TargetEngine::create(&store, StoreLimits::default()).map_err(fault(STORE))?;
        Ok((store, engine))
    });
    let (store, engine) = joined(made.await)?;
    let (more, keep) = (service.arrivals.more(&migration, &ask.token)?, Arc::<Kept>::default());
    service.kept.lock().unwrap_or_else(PoisonError::into_inner).insert(migration.clone(), keep.clone());
    service.arrivals.open(migration, &ask.token, Arrival { engine, more, keep })?;
    let address = service.arrivals.address().to_string();
    Ok(PagesOpened { address, store: store.to_string_lossy().into_owned() })
}

/// In memory when there is ample room, else on disk: the store holds the container's memory once, and the restored
/// container holds it again. Refused at once where neither has room for it; what a container needs more than it did when
/// it was looked at is found out when it comes.
fn place(config: &HostConfig, migration: &MigrationId, memory: Size) -> Result<PathBuf, Fault> {
    let in_memory = || config.scratch(migration).in_memory();
    if let Some(dir) = has_ample_room(&config.page_dir, memory.0).then(in_memory).flatten() {
        return Ok(dir);
    }
    let room = room_in(&config.state_dir);
    if room >= memory.0 {
        return Ok(config.migration_dir(migration));
    }
    let message = format!(
        "there is no room for {} MiB of memory: neither in memory nor on disk, where {} MiB are free",
        memory.0 >> 20,
        room >> 20
    );
    Err(Fault::new(STORE, message).remedy(MAKE_ROOM))
}

/// Removes the store, wherever it is, and lets go of its shared memory.
pub(crate) async fn remove_store(service: Arc<PageShipper>, migration: MigrationId) -> Result<(), Fault> {
    let kept = service.kept.lock().unwrap_or_else(PoisonError::into_inner).remove(&migration);
    let work = move || {
        // Where no container has it, the kernel takes its time to free it.
        drop(kept);
        service.config.scratch(&migration).remove(&[STORE_DIR]).map_err(fault(STORE))
    };
    joined(tokio::task::spawn_blocking(work).await)
}
