//! The source role: a pass over each root, and the target's word that it has it.
//!
//! ```text
//! source                        target
//!   | FILES*  ------------------> |   applied as they come; PACKED while the container stands still
//!   | <------------------ REPORT  |   a pass is in its place
//!   | <------------------ FAILED  |   instead of any report, and nothing after it
//! ```

use std::collections::{BTreeSet, HashMap};
use std::path::Path;
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use bytes::Bytes;
use haulage_files::source::{Block, Scope};
use haulage_files::{Base, FilesError, FrameSink, Pass, PassReport, RelPath, RootId, SinkClosed, Source};
use haulage_protocol::checkpointer::MappedFile;
use haulage_protocol::fault::{Fault, code};
use haulage_protocol::id::MigrationId;
use haulage_protocol::syncer::{FilesSynced, SyncFiles, SyncRoot};
use haulage_protocol::unit::{Bytes as Size, Micros};
use haulage_service::bulk::{Cargo, Departure, pace};
use haulage_transport::stream::FrameKind;
use tokio::sync::mpsc;

use crate::Syncer;
use crate::failure::{MOUNTED, blocking, fault, files};
use crate::{packed, tmpfs};

/// What the sessions are for.
pub(crate) const CARGO: Cargo = Cargo { role: "files", failed: FrameKind(FrameKind::FIRST_OWN.0 + 2) };
/// Records of a pass.
pub(crate) const FILES: FrameKind = FrameKind(FrameKind::FIRST_OWN.0);
/// The same, in the form of [`packed`].
pub(crate) const PACKED: FrameKind = FrameKind(FrameKind::FIRST_OWN.0 + 3);
/// The target has a pass: a [`PassReport`].
pub(crate) const REPORT: FrameKind = FrameKind(FrameKind::FIRST_OWN.0 + 1);

/// Frames (some 64 to 320 KiB each) that wait for the connection.
const FRAMES_AHEAD: usize = 4;

/// A migration's files, where they leave.
pub(crate) struct Session {
    target: Departure,
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
        None => {
            let mut target = Departure::connect(&ask.address, &migration, &ask.token, CARGO).await?;
            if let Some(pace) = pace(&service.config, &migration, ask.bandwidth).await? {
                target.connection.keep_pace(pace);
            }
            Session { target, bases: HashMap::new() }
        }
    };
    let before = session.target.traffic();
    let mut synced = FilesSynced { entries: 0, sent: 0, deleted: 0, wire: Size(0), took: Micros(0) };
    for root in &ask.roots {
        let base = session.bases.remove(&root.root);
        let forced = match (&root.tmpfs, &base) {
            // No file of a tmpfs tells that it was written to through a mapping, nor that it was mapped.
            (Some(_), Some(base)) => base.files(),
            _ => forced(&ask.forced, &root.root),
        };
        let pass = pass(&mut session.target, root, base, forced, ask.frozen).await?;
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
    synced.wire = Size(session.target.traffic() - before);
    synced.took = Micros::from_duration(began.elapsed());
    // A session whose pass failed is not put back: the target has dropped what it had.
    service.sources.lock().unwrap_or_else(PoisonError::into_inner).insert(migration, session);
    Ok(synced)
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

/// A pass from a thread of its own into the connection, packed where the container is `frozen`.
async fn pass(
    target: &mut Departure,
    root: &SyncRoot,
    base: Option<Base>,
    forced: BTreeSet<RelPath>,
    frozen: bool,
) -> Result<Pass, Fault> {
    // A tmpfs is read by a descriptor, which has to stay open.
    let (source, _open) = match &root.tmpfs {
        Some(tmpfs) => {
            let tmpfs = tmpfs.clone();
            let open = blocking(move || tmpfs::open(&tmpfs)).await?;
            let id = RootId::new(root.root.clone()).map_err(|error| files(&error))?;
            let source = Source::new(id, &tmpfs::path(&open), Scope::Tree).in_blocks(Block::Fine);
            (source, Some(open))
        }
        None => (tree(root)?, None),
    };
    let (frames, ready) = mpsc::channel(FRAMES_AHEAD);
    let mut channel = Channel { frames, packs: frozen };
    let reading = tokio::task::spawn_blocking(move || source.pass(base, &forced, &mut channel));
    let sent = target.send_all(if frozen { PACKED } else { FILES }, ready).await;
    let pass: Result<Pass, FilesError> = reading.await.map_err(fault(code::INTERNAL))?;
    sent?;
    let pass = pass.map_err(|error| files(&error))?;
    let report = target.answer(REPORT, &root.root).await?;
    let report = PassReport::decode(&report).map_err(|error| files(&error))?;
    if report.pass != pass.id || report.totals != pass.totals {
        let message = format!("the target's count of {} differs from what was sent", root.root);
        return Err(Fault::new(code::INTERNAL, message));
    }
    Ok(pass)
}

struct Channel {
    frames: mpsc::Sender<Bytes>,
    packs: bool,
}

impl FrameSink for Channel {
    fn send(&mut self, frame: Bytes) -> Result<(), SinkClosed> {
        let frame = if self.packs { packed::pack(&frame) } else { frame };
        self.frames.blocking_send(frame).map_err(|_| SinkClosed)
    }
}
