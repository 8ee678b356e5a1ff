//! The target role: what comes is written below the roots that were named, and nowhere else.

use std::fs::File;
use std::io::ErrorKind;
use std::path::Path;
use std::sync::{Arc, PoisonError};

use haulage_files::{Applier, RootId, Targets};
use haulage_protocol::fault::{Fault, code};
use haulage_protocol::id::MigrationId;
use haulage_protocol::syncer::{FilesOpened, FilesPersisted, OpenFiles, PersistFiles, TargetRoot};
use haulage_transport::stream::{BulkConnection, BulkSession, SessionKey};
use tokio::task::JoinHandle;

use crate::Syncer;
use crate::failure::{NOT_PERSISTED, fault, files, joined, stream};
use crate::source::{FAILED, FILES, REPORT, ROLE};

/// A migration's files, where they arrive.
pub(crate) struct Session {
    task: JoinHandle<()>,
}

impl Session {
    /// Stops receiving; afterwards nothing writes to the roots any more.
    pub(crate) async fn end(self) {
        self.task.abort();
        if let Err(error) = self.task.await
            && error.is_panic()
        {
            tracing::error!(%error, "the receiver of files had died");
        }
    }
}

pub(crate) async fn open(
    service: Arc<Syncer>,
    migration: MigrationId,
    ask: OpenFiles,
) -> Result<FilesOpened, Fault> {
    let earlier = service.targets.lock().unwrap_or_else(PoisonError::into_inner).remove(&migration);
    if let Some(earlier) = earlier {
        earlier.end().await;
    }
    let targets = Targets::default();
    for root in &ask.roots {
        let id = RootId::new(root.root.clone()).map_err(|error| files(&error))?;
        let dir = directory(root).ok_or_else(|| Fault::new(code::MALFORMED, "a root has no directory"))?;
        targets.add(id, dir);
    }
    let token = ask.token.reveal().parse().map_err(fault(code::MALFORMED))?;
    let session = service.listener.open(SessionKey::new(migration.as_str(), ROLE), token);
    let session = session.map_err(|error| stream(&error))?;
    let address = service.advertised.to_string();
    let task = tokio::spawn(receive(session, targets, migration.clone()));
    service.targets.lock().unwrap_or_else(PoisonError::into_inner).insert(migration, Session { task });
    Ok(FilesOpened { address })
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

/// Takes one source in, until it ends or fails.
async fn receive(mut session: BulkSession, targets: Targets, migration: MigrationId) {
    let Some(mut connection) = session.accept().await else { return };
    tracing::debug!(%migration, peer = %connection.peer(), "files come");
    let Err(fault) = apply_all(&mut connection, targets).await else { return };
    tracing::warn!(%migration, %fault, "the files are refused");
    let told = async {
        connection.send(FAILED, serde_json::to_vec(&fault).unwrap_or_default().into()).await?;
        connection.flush().await
    };
    if let Err(error) = told.await {
        tracing::debug!(%migration, %error, "and the source is gone");
    }
}

async fn apply_all(connection: &mut BulkConnection, targets: Targets) -> Result<(), Fault> {
    let mut applier = Applier::new(targets);
    while let Some(frame) = connection.recv().await.map_err(|error| stream(&error))? {
        if frame.kind != FILES {
            let message = format!("a frame of kind {} does not belong here", frame.kind.0);
            return Err(Fault::new(code::MALFORMED, message));
        }
        let report = tokio::task::block_in_place(|| applier.feed(&frame.payload));
        if let Some(report) = report.map_err(|error| files(&error))? {
            connection.send(REPORT, report.encode()).await.map_err(|error| stream(&error))?;
            connection.flush().await.map_err(|error| stream(&error))?;
        }
    }
    Ok(())
}
