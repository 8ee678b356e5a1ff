//! The source role: a pass over each root, and the target's word that it has it.
//!
//! ```text
//! source                        target
//!   | FILES*  ------------------> |   applied as they come
//!   | <------------------ REPORT  |   a pass is in its place
//!   | <------------------ FAILED  |   instead of any report, and nothing after it
//! ```

use std::collections::{BTreeSet, HashMap};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use haulage_files::source::Scope;
use haulage_files::{Base, FilesError, FrameSink, Pass, PassReport, RelPath, RootId, SinkClosed, Source};
use haulage_protocol::checkpointer::MappedFile;
use haulage_protocol::fault::{Fault, code};
use haulage_protocol::id::MigrationId;
use haulage_protocol::syncer::{FilesSynced, SyncFiles, SyncRoot};
use haulage_protocol::unit::{Bytes as Size, Micros};
use haulage_transport::stream::{BulkConnection, FrameKind, Hello, SessionKey, StreamError};
use tokio::sync::mpsc;

use crate::Syncer;
use crate::failure::{MOUNTED, fault, files, no_answer, stream};

/// The session's role on the bulk listener.
pub(crate) const ROLE: &str = "files";
/// Records of a pass.
pub(crate) const FILES: FrameKind = FrameKind(FrameKind::FIRST_OWN.0);
/// The target has a pass: a [`PassReport`].
pub(crate) const REPORT: FrameKind = FrameKind(FrameKind::FIRST_OWN.0 + 1);
/// The target gives up: a `Fault`.
pub(crate) const FAILED: FrameKind = FrameKind(FrameKind::FIRST_OWN.0 + 2);

/// Frames (some MiB each) that wait for the connection.
const FRAMES_AHEAD: usize = 2;
/// How long the target may take to finish what it was sent.
const ANSWER_WITHIN: Duration = Duration::from_secs(120);

/// A migration's files, where they leave.
pub(crate) struct Session {
    connection: BulkConnection,
    /// What the target has of each root.
    bases: HashMap<String, Base>,
}

pub(crate) async fn sync(
    service: Arc<Syncer>,
    migration: MigrationId,
    ask: SyncFiles,
) -> Result<FilesSynced, Fault> {
    let began = Instant::now();
    let known = service.sources.lock().unwrap_or_else(PoisonError::into_inner).remove(&migration);
    let mut session = match known {
        Some(session) => session,
        None => connect(&migration, &ask).await?,
    };
    let before = traffic(&session.connection);
    let mut synced = FilesSynced { entries: 0, sent: 0, deleted: 0, wire: Size(0), took: Micros(0) };
    for root in &ask.roots {
        let forced = forced(&ask.forced, &root.root);
        let base = session.bases.remove(&root.root);
        let pass = pass(&mut session.connection, root, base, forced).await?;
        if ask.frozen && pass.unsettled > 0 {
            let message = format!("{} files of {} changed while nothing runs", pass.unsettled, root.root);
            return Err(
                Fault::new(code::INTERNAL, message).remedy("see what else writes to the container's files")
            );
        }
        if let Some(mount) = pass.mounts.first() {
            let message = format!("something is mounted in {} at {mount:?}, which was not copied", root.root);
            return Err(Fault::new(MOUNTED, message).remedy("unmount it, or keep the container where it is"));
        }
        let totals = pass.totals;
        synced.entries += u64::try_from(pass.base.entries()).unwrap_or(u64::MAX);
        synced.sent += totals.directories
            + totals.files
            + totals.patched
            + totals.specials
            + totals.links
            + totals.metas;
        synced.deleted += totals.removed;
        session.bases.insert(root.root.clone(), pass.base);
    }
    synced.wire = Size(traffic(&session.connection) - before);
    synced.took = Micros::from_duration(began.elapsed());
    // A session whose pass failed is not put back: the target has dropped what it had.
    service.sources.lock().unwrap_or_else(PoisonError::into_inner).insert(migration, session);
    Ok(synced)
}

async fn connect(migration: &MigrationId, ask: &SyncFiles) -> Result<Session, Fault> {
    let address: SocketAddr = ask.address.parse().map_err(fault(code::MALFORMED))?;
    let token = ask.token.reveal().parse().map_err(fault(code::MALFORMED))?;
    let hello = Hello { session: SessionKey::new(migration.as_str(), ROLE), token };
    let connection = BulkConnection::connect(address, &hello).await.map_err(|error| stream(&error))?;
    Ok(Session { connection, bases: HashMap::new() })
}

fn traffic(connection: &BulkConnection) -> u64 {
    connection.sent_bytes() + connection.received_bytes()
}

fn forced(all: &[MappedFile], root: &str) -> BTreeSet<RelPath> {
    let ours = all.iter().filter(|file| file.root == root);
    // What is no path below the root names no file in it.
    ours.filter_map(|file| RelPath::new(file.path.as_bytes().to_vec()).ok()).collect()
}

/// A tree, or the log files that begin with a file's name, which is another one on the target.
fn tree(root: &SyncRoot) -> Result<Source, Fault> {
    let id = RootId::new(root.root.clone()).map_err(|error| files(&error))?;
    let (source, target) = (Path::new(&root.source), Path::new(&root.target));
    if root.root != "log" {
        return Ok(Source::new(id, source, Scope::Tree));
    }
    let name = |path: &Path| path.file_name().map(|name| name.as_encoded_bytes().to_vec());
    let (Some(dir), Some(from), Some(to)) = (source.parent(), name(source), name(target)) else {
        return Err(Fault::new(code::MALFORMED, "the log has no file name"));
    };
    Ok(Source::new(id, dir, Scope::Named { from, to }))
}

/// A pass from a thread of its own into the connection.
async fn pass(
    connection: &mut BulkConnection,
    root: &SyncRoot,
    base: Option<Base>,
    forced: BTreeSet<RelPath>,
) -> Result<Pass, Fault> {
    let source = tree(root)?;
    let (frames, mut ready) = mpsc::channel(FRAMES_AHEAD);
    let reading = tokio::task::spawn_blocking(move || source.pass(base, &forced, &mut Channel(frames)));
    let mut sent = Ok(());
    while let Some(frame) = ready.recv().await {
        sent = connection.send(FILES, frame).await;
        if sent.is_err() {
            break;
        }
    }
    // Lets a reader that still has something see that nobody takes it.
    drop(ready);
    let pass: Result<Pass, FilesError> = reading.await.map_err(fault(code::INTERNAL))?;
    if let Err(error) = sent {
        return Err(why_it_ended(connection, &error).await);
    }
    let pass = pass.map_err(|error| files(&error))?;
    let report = answer(connection, &root.root).await?;
    if report.pass != pass.id || report.totals != pass.totals {
        let message = format!("the target's count of {} differs from what was sent", root.root);
        return Err(Fault::new(code::INTERNAL, message));
    }
    Ok(pass)
}

async fn answer(connection: &mut BulkConnection, root: &str) -> Result<PassReport, Fault> {
    let frame = tokio::time::timeout(ANSWER_WITHIN, connection.recv()).await.map_err(|_| no_answer(root))?;
    match frame.map_err(|error| stream(&error))? {
        Some(frame) if frame.kind == REPORT => {
            PassReport::decode(&frame.payload).map_err(|error| files(&error))
        }
        Some(frame) if frame.kind == FAILED => Err(target_fault(&frame.payload)),
        Some(frame) => {
            Err(Fault::new(code::MALFORMED, format!("the target answered with a frame {}", frame.kind.0)))
        }
        None => Err(Fault::new(code::MALFORMED, "the target ended the connection")),
    }
}

/// A target that gives up says why before it closes.
async fn why_it_ended(connection: &mut BulkConnection, error: &StreamError) -> Fault {
    match connection.expect(FAILED, Duration::from_secs(1)).await {
        Ok(payload) => target_fault(&payload),
        Err(_) => stream(error),
    }
}

fn target_fault(payload: &[u8]) -> Fault {
    serde_json::from_slice(payload)
        .unwrap_or_else(|error| Fault::new(code::MALFORMED, "the target gave up, unreadably").because(&error))
}

struct Channel(mpsc::Sender<Bytes>);

impl FrameSink for Channel {
    fn send(&mut self, frame: Bytes) -> Result<(), SinkClosed> {
        self.0.blocking_send(frame).map_err(|_| SinkClosed)
    }
}
