//! The target role: what comes is written below the roots that were named, and nowhere else.

use std::borrow::Cow;
use std::fs::File;
use std::io::ErrorKind;
use std::path::Path;
use std::sync::{Arc, PoisonError};

use haulage_files::{Applier, RootId, Targets};
use haulage_protocol::fault::{Fault, code};
use haulage_protocol::id::MigrationId;
use haulage_protocol::syncer::{FilesOpened, FilesPersisted, OpenFiles, PersistFiles, TargetRoot};
use haulage_service::bulk::{Receive, send_now, stream};
use haulage_transport::stream::BulkConnection;

use crate::Syncer;
use crate::failure::{NOT_PERSISTED, fault, files, joined};
use crate::packed;
use crate::source::{FILES, PACKED, REPORT};
use crate::tmpfs;

pub(crate) async fn open(
    service: Arc<Syncer>,
    migration: MigrationId,
    ask: OpenFiles,
) -> Result<FilesOpened, Fault> {
    service.arrivals.close(&migration).await;
    let targets = Targets::default();
    let (made, tmpfs) = tmpfs::make(&ask.tmpfs)?;
    for root in ask.roots.iter().chain(&tmpfs) {
        let id = RootId::new(root.root.clone()).map_err(|error| files(&error))?;
        let dir = directory(root).ok_or_else(|| Fault::new(code::MALFORMED, "a root has no directory"))?;
        targets.add(id, dir);
    }
    service.arrivals.open(migration.clone(), &ask.token, Roots(targets))?;
    service.tmpfs.lock().unwrap_or_else(PoisonError::into_inner).insert(migration, made);
    Ok(FilesOpened { address: service.arrivals.address().to_string(), tmpfs })
}

/// Waits until the file systems of the roots have everything on disk. What is no root any more, such as the images
/// of a container that was adopted, needs no disk.
pub(crate) async fn persist(ask: PersistFiles) -> Result<FilesPersisted, Fault> {
    let work = move || {
        for root in &ask.roots {
            let Some(dir) = directory(root) else { continue };
            match File::open(dir) {
                Ok(dir) => rustix::fs::syncfs(dir).map_err(|errno| fault(NOT_PERSISTED)(errno))?,
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(fault(NOT_PERSISTED)(error)),
            }
        }
        Ok(FilesPersisted {})
    };
    joined(tokio::task::spawn_blocking(work).await)
}

/// A log is a file among others of the engine's; every other root is a directory.
fn directory(TargetRoot { root, path }: &TargetRoot) -> Option<&Path> {
    let path = Path::new(path);
    if root == "log" { path.parent() } else { Some(path) }
}

/// Where what comes is put.
struct Roots(Targets);

impl Receive for Roots {
    async fn receive(self, connection: &mut BulkConnection) -> Result<(), Fault> {
        let mut applier = Applier::new(self.0);
        while let Some(frame) = connection.recv().await.map_err(|error| stream(&error))? {
            let report = tokio::task::block_in_place(|| {
                let records = match frame.kind {
                    FILES => Cow::Borrowed(&frame.payload[..]),
                    PACKED => packed::unpack(&frame.payload)?,
                    other => {
                        let message = format!("a frame of kind {} does not belong here", other.0);
                        return Err(Fault::new(code::MALFORMED, message));
                    }
                };
                applier.feed(&records).map_err(|error| files(&error))
            });
            if let Some(report) = report? {
                send_now(connection, REPORT, report.encode()).await?;
            }
        }
        Ok(())
    }
}
