//! The reading side: one pass over a tree.

mod content;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::path::{Path, PathBuf};

use bytes::Bytes;

use crate::delta::{self, Known, Step};
use crate::entry::{Entry, Kind, Snapshot};
use crate::error::FilesError;
use crate::path::RelPath;
use crate::scan::scan;
use crate::tree::Tree;
use crate::wire::{Begin, FrameWriter, PassId, Record, RootId, Totals, VERSION};
pub use content::Block;
use content::{Against, BlockSums, Content};

/// Which entries of a directory are the tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Everything, the directory's own metadata included.
    Tree,
    /// The files in it whose names begin with `from`, which is replaced by `to` in the target's names. Directories
    /// and the directory's own metadata are left alone on both sides, and so are all other names.
    Named {
        /// On the source.
        from: Vec<u8>,
        /// On the target.
        to: Vec<u8>,
    },
}

/// Who takes the frames of a pass, in order; it may block.
pub trait FrameSink {
    /// Takes a frame, of 320 KiB at most, or of little more than a MiB where a file has that many attributes.
    ///
    /// # Errors
    /// [`SinkClosed`] ends the pass.
    fn send(&mut self, frame: Bytes) -> Result<(), SinkClosed>;
}

/// Frames are not taken any more; who closed the sink knows why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SinkClosed;

impl<F: FnMut(Bytes) -> Result<(), SinkClosed>> FrameSink for F {
    fn send(&mut self, frame: Bytes) -> Result<(), SinkClosed> {
        self(frame)
    }
}

/// A tree to be copied.
#[derive(Debug)]
pub struct Source {
    id: RootId,
    path: PathBuf,
    scope: Scope,
    block: Block,
}

/// What the target holds after a pass, and what the next one builds upon. Worth nothing once the target has
/// failed to take that pass.
#[derive(Clone, Debug)]
pub struct Base {
    snapshot: Snapshot,
    suspect: BTreeSet<RelPath>,
    /// By inode: what the target's file holds.
    sums: HashMap<u64, BlockSums>,
}

/// A pass that was sent.
#[derive(Debug)]
pub struct Pass {
    /// For the next one.
    pub base: Base,
    /// Which one it was, as the target will answer.
    pub id: PassId,
    /// What was sent, as the target will count.
    pub totals: Totals,
    /// Files that vanished or changed their length while they were read: the next pass takes them again. In a tree
    /// that nobody writes to there are none.
    pub unsettled: u64,
    /// Directories that are mount points: what is mounted there was not copied.
    pub mounts: Vec<RelPath>,
}

impl Base {
    /// How many entries there are.
    pub fn entries(&self) -> usize {
        self.snapshot.entries.len()
    }

    /// All files in it: to be forced in a tree whose files may all have been written to without a trace.
    pub fn files(&self) -> BTreeSet<RelPath> {
        let files = self.snapshot.entries.iter().filter(|(_, entry)| file_size(entry).is_some());
        files.map(|(path, _)| path.clone()).collect()
    }
}

impl Scope {
    /// What an entry of the directory is called on the target, if it belongs to the tree.
    pub(crate) fn target_name(&self, name: &[u8]) -> Option<Vec<u8>> {
        match self {
            Self::Tree => Some(name.to_vec()),
            Self::Named { from, to } => name.strip_prefix(from.as_slice()).map(|rest| [to, rest].concat()),
        }
    }

    /// What the target's `path` is called on the source.
    fn source_path(&self, path: &RelPath) -> Result<RelPath, FilesError> {
        match self {
            Self::Tree => Ok(path.clone()),
            Self::Named { from, to } => match path.as_bytes().strip_prefix(to.as_slice()) {
                Some(rest) => RelPath::new([from, rest].concat()),
                None => Ok(path.clone()),
            },
        }
    }
}

impl Source {
    /// The tree at `path`, which need not exist before the first pass. `id` is what the target calls it.
    pub fn new(id: RootId, path: &Path, scope: Scope) -> Self {
        Self { id, path: path.to_owned(), scope, block: Block::Coarse }
    }

    /// The same tree, whose files are compared in blocks of this size; every pass of a tree has to use the same.
    #[must_use]
    pub fn in_blocks(self, block: Block) -> Self {
        Self { block, ..self }
    }

    /// Sends what the target lacks: everything without `base`, else what has changed since the pass which left it.
    /// `forced` are files that may be written to without a trace, being mapped shared and writable by some process.
    /// Blocks; takes as long as the sink does.
    ///
    /// # Errors
    /// [`FilesError`]; the target then has part of the pass, and `base` is gone: the next pass is a first one.
    pub fn pass(
        &self,
        base: Option<Base>,
        forced: &BTreeSet<RelPath>,
        sink: &mut dyn FrameSink,
    ) -> Result<Pass, FilesError> {
        let tree = Tree::open(&self.path)?;
        let snapshot = scan(&tree, &self.scope, base.as_ref().map(|base| &base.snapshot))?;
        let known = base.as_ref().map(|base| Known { snapshot: &base.snapshot, suspect: &base.suspect });
        let steps = delta::plan(known, &snapshot, forced);
        let id = PassId::from(snapshot.started);
        let mut sending = Sending {
            tree: &tree,
            scope: &self.scope,
            snapshot: &snapshot,
            content: Content::new(self.block),
            old_sums: base.as_ref().map(|base| &base.sums),
            sums: HashMap::new(),
            suspect: BTreeSet::new(),
            stand_in: BTreeMap::new(),
            unsettled: 0,
            out: Out { writer: FrameWriter::default(), sink, totals: Totals::default() },
        };
        sending.out.put(&Record::Begin(Begin {
            version: VERSION,
            root: self.id.clone(),
            pass: id,
            base: base.as_ref().map(|base| PassId::from(base.snapshot.started)),
            only: match &self.scope {
                Scope::Tree => None,
                Scope::Named { to, .. } => Some(to.clone()),
            },
        }))?;
        for step in steps {
            sending.carry_out(step)?;
        }
        let Sending { sums, suspect, unsettled, out, .. } = sending;
        let totals = out.finish()?;
        let old_sums = base.map(|base| base.sums).unwrap_or_default();
        let sums = merge_sums(sums, old_sums, &snapshot);
        let mounts = snapshot.mounts.clone();
        Ok(Pass { base: Base { snapshot, suspect, sums }, id, totals, unsettled, mounts })
    }
}

/// What was sent now counts; files which did not have to be sent still have what an earlier pass sent.
fn merge_sums(
    sent: HashMap<u64, Option<BlockSums>>,
    mut old: HashMap<u64, BlockSums>,
    snapshot: &Snapshot,
) -> HashMap<u64, BlockSums> {
    let files = snapshot.entries.values().filter(|entry| file_size(entry).is_some());
    let live: HashSet<u64> = files.map(|entry| entry.ino).collect();
    old.retain(|ino, _| live.contains(ino) && !sent.contains_key(ino));
    old.extend(sent.into_iter().filter_map(|(ino, sums)| Some((ino, sums?))));
    old
}

fn file_size(entry: &Entry) -> Option<u64> {
    match entry.kind {
        Kind::File { size } => Some(size),
        _ => None,
    }
}

/// Records on their way, counted.
struct Out<'a> {
    writer: FrameWriter,
    sink: &'a mut dyn FrameSink,
    totals: Totals,
}

impl Out<'_> {
    fn put(&mut self, record: &Record<'_>) -> Result<(), FilesError> {
        self.totals.count(record);
        match self.writer.push(record)? {
            Some(frame) => self.sink.send(frame).map_err(|SinkClosed| FilesError::SinkClosed),
            None => Ok(()),
        }
    }

    fn finish(mut self) -> Result<Totals, FilesError> {
        let totals = self.totals;
        self.put(&Record::End(totals))?;
        match self.writer.take() {
            rest if rest.is_empty() => Ok(totals),
            rest => self.sink.send(rest).map(|()| totals).map_err(|SinkClosed| FilesError::SinkClosed),
        }
    }
}

struct Sending<'a> {
    tree: &'a Tree,
    scope: &'a Scope,
    snapshot: &'a Snapshot,
    content: Content,
    old_sums: Option<&'a HashMap<u64, BlockSums>>,
    /// By inode, of every file sent in this pass: what the target's copy holds, if that is remembered.
    sums: HashMap<u64, Option<BlockSums>>,
    /// What did not go as the snapshot says.
    suspect: BTreeSet<RelPath>,
    /// A file's first name that vanished, and the name under which it was sent instead, if it was.
    stand_in: BTreeMap<RelPath, Option<RelPath>>,
    unsettled: u64,
    out: Out<'a>,
}

impl<'a> Sending<'a> {
    fn carry_out(&mut self, step: Step) -> Result<(), FilesError> {
        match step {
            Step::Remove(path) => self.out.put(&Record::Remove(path)),
            Step::MakeDir(path) => self.out.put(&Record::MakeDir(path)),
            Step::PutFile { path, patch } => {
                if !self.file(&path, patch)? {
                    self.stand_in.insert(path, None);
                }
                Ok(())
            }
            Step::PutSpecial(path) => {
                let Entry { kind, meta, .. } = self.entry(&path)?.clone();
                self.out.put(&Record::Special { path, kind, meta })
            }
            Step::Link { path, to } => self.link(path, to),
            Step::DirMeta(path) => {
                let meta = self.entry(&path)?.meta.clone();
                self.out.put(&Record::DirMeta { path, meta })
            }
        }
    }

    fn link(&mut self, path: RelPath, to: RelPath) -> Result<(), FilesError> {
        match self.stand_in.get(&to) {
            None => self.out.put(&Record::Link { path, to }),
            Some(Some(stand_in)) => self.out.put(&Record::Link { path, to: stand_in.clone() }),
            Some(None) => {
                if self.file(&path, false)? {
                    self.stand_in.insert(to, Some(path));
                }
                Ok(())
            }
        }
    }

    /// Sends a file; false if it has vanished.
    fn file(&mut self, path: &RelPath, patch: bool) -> Result<bool, FilesError> {
        let entry = self.entry(path)?;
        let opened = self.tree.open_file(&self.scope.source_path(path)?, entry.ino);
        let Some(file) = opened.map_err(FilesError::io("open", path))? else {
            self.suspect.insert(path.clone());
            self.unsettled += 1;
            return Ok(false);
        };
        let against = match self.old_sums.and_then(|sums| sums.get(&entry.ino)) {
            _ if !patch => Against::Nothing,
            None => Against::Unknown,
            Some(sums) => Against::Sums(sums),
        };
        let size = file_size(entry).unwrap_or(0);
        self.out.put(&Record::File { path: path.clone(), size, patch })?;
        let before = self.out.totals.data_bytes;
        let out = &mut self.out;
        let sent = self.content.send(path, &file, size, against, &mut |record| out.put(record))?;
        let data_bytes = self.out.totals.data_bytes - before;
        self.out.put(&Record::FileEnd { meta: entry.meta.clone(), data_bytes })?;
        self.unsettled += u64::from(!sent.whole);
        self.sums.insert(entry.ino, sent.sums);
        Ok(true)
    }

    /// The plan is made from the snapshot, so it has what the plan names.
    fn entry(&self, path: &RelPath) -> Result<&'a Entry, FilesError> {
        self.snapshot.entries.get(path).ok_or(FilesError::OutOfPlace { what: "a step for no entry" })
    }
}
