//! The target role: what comes is written below the roots that were named, and nowhere else.

use std::path::Path;
use std::sync::{Arc, PoisonError};

use haulage_files::{Applier, RootId, Targets};
use haulage_protocol::fault::{Fault, code};
use haulage_protocol::id::MigrationId;
use haulage_protocol::syncer::{FilesOpened, OpenFiles, TargetRoot};
use haulage_transport::stream::{BulkConnection, BulkSession, SessionKey};
use tokio::task::JoinHandle;

use crate::Syncer;
use crate::failure::{fault, files, stream};
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
    for TargetRoot { root, path } in &ask.roots {
        let id = RootId::new(root.clone()).map_err(|error| files(&error))?;
        let path = Path::new(path);
        // A log is a file among others of the engine's; the pass names those that it is about.
        let dir = if root == "log" { path.parent() } else { Some(path) };
        targets.add(id, dir.ok_or_else(|| Fault::new(code::MALFORMED, "a root has no directory"))?);
    }
    let token = ask.token.reveal().parse().map_err(fault(code::MALFORMED))?;
    let session = service.listener.open(SessionKey::new(migration.as_str(), ROLE), token);
    let session = session.map_err(|error| stream(&error))?;
    let address = service.config.advertised(service.listener.local_addr()).to_string();
    let task = tokio::spawn(receive(session, targets, migration.clone()));
    service.targets.lock().unwrap_or_else(PoisonError::into_inner).insert(migration, Session { task });
    Ok(FilesOpened { address })
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
