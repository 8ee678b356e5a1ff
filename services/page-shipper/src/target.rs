//! The target role: receive into the page store.

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError};

use bytes::Bytes;
use haulage_pages::manifest::ManifestBuilder;
use haulage_pages::store::StoreLimits;
use haulage_pages::target::{FinishReport, TargetEngine};
use haulage_protocol::fault::{Fault, code};
use haulage_protocol::id::MigrationId;
use haulage_protocol::page_shipper::{OpenPages, PagesOpened};
use haulage_protocol::unit::{Bytes as Size, Pages};
use haulage_service::config::HostConfig;
use haulage_service::notes;
use haulage_transport::stream::{BulkConnection, BulkSession, SessionKey};
use tokio::task::JoinHandle;

use crate::PageShipper;
use crate::failure::{STORE, fault, stream};
use crate::wire::{BATCH, FAILED, FINISH, FINISHED, Finished, MANIFEST, OK, ROLE, ROUND_END};

/// The page store in a migration's directory.
const STORE_DIR: &str = "pages";

/// A migration's memory, where it arrives.
pub(crate) struct Session {
    task: JoinHandle<()>,
}

impl Session {
    /// Stops receiving; afterwards nothing writes to the store any more.
    pub(crate) async fn end(self) {
        self.task.abort();
        if let Err(error) = self.task.await
            && error.is_panic()
        {
            tracing::error!(%error, "the receiver of pages had died");
        }
    }
}

pub(crate) async fn open(
    service: Arc<PageShipper>,
    migration: MigrationId,
    ask: OpenPages,
) -> Result<PagesOpened, Fault> {
    let earlier = service.targets.lock().unwrap_or_else(PoisonError::into_inner).remove(&migration);
    if let Some(earlier) = earlier {
        earlier.end().await;
    }
    remove_store(&service.config, &migration).map_err(fault(STORE))?;
    let store = place(&service.config, &migration, ask.memory).join(STORE_DIR);
    std::fs::create_dir_all(&store).map_err(fault(STORE))?;
    let engine = TargetEngine::create(&store, StoreLimits::default()).map_err(fault(STORE))?;
    let token = ask.token.reveal().parse().map_err(fault(code::MALFORMED))?;
    let session = service.listener.open(SessionKey::new(migration.as_str(), ROLE), token);
    let session = session.map_err(|error| stream(&error))?;
    let address = service.advertised.to_string();
    let task = tokio::spawn(receive(session, engine, migration.clone()));
    service.targets.lock().unwrap_or_else(PoisonError::into_inner).insert(migration, Session { task });
    Ok(PagesOpened { address, store: store.to_string_lossy().into_owned() })
}

/// In memory when there is ample room, else on disk: the store and the images that it is joined to each hold the
/// container's memory once, and the restored container holds it again.
fn place(config: &HostConfig, migration: &MigrationId, memory: Size) -> PathBuf {
    const COPIES_WITH_ROOM_TO_SPARE: u64 = 4;
    let ample = memory.0.saturating_mul(COPIES_WITH_ROOM_TO_SPARE);
    match available() {
        Ok(available) if available >= ample => config.memory_dir(migration),
        Ok(_) => config.migration_dir(migration),
        Err(error) => {
            tracing::warn!(%error, "the room in memory is not known, pages go to disk");
            config.migration_dir(migration)
        }
    }
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

/// Removes the store, wherever it is.
pub(crate) fn remove_store(config: &HostConfig, migration: &MigrationId) -> io::Result<()> {
    notes::remove(&config.memory_dir(migration), &[STORE_DIR])?;
    notes::remove(&config.migration_dir(migration), &[STORE_DIR])
}

/// Takes one source in, until it ends or fails.
async fn receive(mut session: BulkSession, engine: TargetEngine, migration: MigrationId) {
    let Some(mut connection) = session.accept().await else { return };
    tracing::debug!(%migration, peer = %connection.peer(), "pages come");
    let Err(fault) = store_all(&mut connection, engine).await else { return };
    tracing::warn!(%migration, %fault, "the pages are refused");
    let told = async {
        connection.send(FAILED, serde_json::to_vec(&fault).unwrap_or_default().into()).await?;
        connection.flush().await
    };
    if let Err(error) = told.await {
        tracing::debug!(%migration, %error, "and the source is gone");
    }
}

async fn store_all(connection: &mut BulkConnection, mut engine: TargetEngine) -> Result<(), Fault> {
    let mut manifest = ManifestBuilder::default();
    while let Some(frame) = connection.recv().await.map_err(|error| stream(&error))? {
        match frame.kind {
            // Copying a MiB into the page cache is short, but it is not for the executor.
            BATCH => {
                tokio::task::block_in_place(|| engine.apply(&frame.payload)).map_err(fault(STORE))?;
            }
            ROUND_END => send(connection, OK, Bytes::new()).await?,
            MANIFEST => manifest.push(&frame.payload).map_err(fault(code::MALFORMED))?,
            FINISH => {
                let manifest = std::mem::take(&mut manifest).finish().map_err(fault(code::MALFORMED))?;
                let sealed =
                    tokio::task::block_in_place(|| engine.finish(&manifest)).map_err(fault(STORE))?;
                let FinishReport { pages, dropped_pages, .. } = sealed;
                let finished = Finished { pages: Pages(pages), dropped: Pages(dropped_pages) };
                let payload = serde_json::to_vec(&finished).map_err(fault(code::INTERNAL))?;
                return send(connection, FINISHED, payload.into()).await;
            }
            other => {
                let message = format!("a frame of kind {} does not belong here", other.0);
                return Err(Fault::new(code::MALFORMED, message));
            }
        }
    }
    Ok(())
}

async fn send(
    connection: &mut BulkConnection,
    kind: haulage_transport::stream::FrameKind,
    payload: Bytes,
) -> Result<(), Fault> {
    connection.send(kind, payload).await.map_err(|error| stream(&error))?;
    connection.flush().await.map_err(|error| stream(&error))
}
