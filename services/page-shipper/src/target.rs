//! The target role: receive into the page store.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError};

use haulage_pages::store::StoreLimits;
use haulage_pages::target::TargetEngine;
use haulage_protocol::fault::Fault;
use haulage_protocol::id::MigrationId;
use haulage_protocol::page_shipper::{OpenPages, PagesOpened};
use haulage_protocol::unit::Bytes as Size;
use haulage_service::config::HostConfig;
use haulage_service::notes;

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
    const COPIES_WITH_ROOM_TO_SPARE: u64 = 4;
    let ample = memory.0.saturating_mul(COPIES_WITH_ROOM_TO_SPARE);
    match available() {
        Ok(available) if available >= ample && room_in(&config.page_dir) >= memory.0 => {
            return Ok(config.memory_dir(migration));
        }
        Ok(_) => {}
        Err(error) => tracing::warn!(%error, "the room in memory is not known, pages go to disk"),
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

/// Free space in bytes of the file system that `dir`, or the nearest directory above it that exists, is on.
fn room_in(dir: &Path) -> u64 {
    let known = dir.ancestors().find_map(|dir| rustix::fs::statvfs(dir).ok());
    known.map_or(0, |about| about.f_bavail.saturating_mul(about.f_frsize))
}

/// `MemAvailable` of proc_meminfo(5), in bytes.
fn available() -> io::Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    let field = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib =
        field.and_then(|field| field.trim().strip_suffix(" kB")).and_then(|kib| kib.parse::<u64>().ok());
    kib.map(|kib| kib.saturating_mul(1024))
        .ok_or_else(|| io::Error::other("/proc/meminfo has no MemAvailable"))
}

/// Removes the store, wherever it is, and lets go of its shared memory.
pub(crate) async fn remove_store(service: Arc<PageShipper>, migration: MigrationId) -> Result<(), Fault> {
    let kept = service.kept.lock().unwrap_or_else(PoisonError::into_inner).remove(&migration);
    let work = move || {
        // Where no container has it, the kernel takes its time to free it.
        drop(kept);
        let config = &service.config;
        [config.memory_dir(&migration), config.migration_dir(&migration)]
            .iter()
            .try_for_each(|dir| notes::remove(dir, &[STORE_DIR]))
            .map_err(fault(STORE))
    };
    joined(tokio::task::spawn_blocking(work).await)
}
