//! The writing side: frames into trees.

mod root;

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::error::FilesError;
use crate::path::RelPath;
use crate::wire::{Begin, PassId, PassReport, Record, RootId, Totals, VERSION, next_record};
use root::{TargetRoot, punch};

/// The roots that may be received, and which pass each of them holds. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Targets(Arc<Mutex<BTreeMap<RootId, Slot>>>);

#[derive(Debug)]
struct Slot {
    path: PathBuf,
    holds: Option<PassId>,
    busy: bool,
}

impl Targets {
    /// Receives the tree `id` into the directory at `path` from now on, which is there. The first pass **removes
    /// everything in it** (or, if it is about certain names, everything of those names). Naming a root again with
    /// the same path changes nothing; with another one, it starts anew.
    pub fn add(&self, id: RootId, path: &Path) {
        let mut slots = self.lock();
        if slots.get(&id).is_none_or(|slot| slot.path != path) {
            slots.insert(id, Slot { path: path.to_owned(), holds: None, busy: false });
        }
    }

    /// Which pass a root holds whole; `None` before the first, during one and after one that failed.
    pub fn holds(&self, id: &RootId) -> Option<PassId> {
        self.lock().get(id).and_then(|slot| slot.holds)
    }

    /// Waits until everything that a root has received is on its disk. Blocks.
    ///
    /// # Errors
    /// [`FilesError::UnknownRoot`], [`FilesError::OpenRoot`], [`FilesError::Io`].
    pub fn sync(&self, id: &RootId) -> Result<(), FilesError> {
        let path = self.lock().get(id).map(|slot| slot.path.clone());
        let path = path.ok_or_else(|| FilesError::UnknownRoot { root: id.clone() })?;
        let open = |source| FilesError::OpenRoot { path: path.clone(), source };
        rustix::fs::syncfs(File::open(&path).map_err(open)?)
            .map_err(FilesError::io("write back", &RelPath::root()))
    }

    /// Claims a root for a pass that builds upon `begin.base`. From then on it holds no pass.
    fn claim(&self, begin: &Begin) -> Result<PathBuf, FilesError> {
        let mut slots = self.lock();
        let root = || begin.root.clone();
        let slot = slots.get_mut(&begin.root).ok_or_else(|| FilesError::UnknownRoot { root: root() })?;
        if slot.busy {
            return Err(FilesError::RootBusy { root: root() });
        }
        if let Some(wants) = begin.base
            && slot.holds != Some(wants)
        {
            return Err(FilesError::WrongBase { root: root(), wants, has: slot.holds });
        }
        slot.busy = true;
        slot.holds = None;
        Ok(slot.path.clone())
    }

    fn release(&self, id: &RootId, holds: Option<PassId>) {
        if let Some(slot) = self.lock().get_mut(id) {
            slot.busy = false;
            slot.holds = holds;
        }
    }

    /// Every statement leaves the map whole, so a panic elsewhere does not spoil it.
    fn lock(&self) -> MutexGuard<'_, BTreeMap<RootId, Slot>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes the frames of one stream, pass after pass, and carries them out. Blocks while it does.
///
/// Dropped in the middle of a pass, it leaves a root that holds no pass: neither the old tree nor the new.
#[derive(Debug)]
pub struct Applier {
    targets: Targets,
    pass: Option<Receiving>,
}

/// A pass that has begun.
#[derive(Debug)]
struct Receiving {
    targets: Targets,
    id: RootId,
    pass: PassId,
    only: Option<Vec<u8>>,
    root: TargetRoot,
    open: Option<OpenFile>,
    totals: Totals,
    /// Set when the pass is whole.
    done: bool,
}

#[derive(Debug)]
struct OpenFile {
    path: RelPath,
    file: File,
    size: u64,
    data_bytes: u64,
}

impl Drop for Receiving {
    fn drop(&mut self) {
        self.targets.release(&self.id, self.done.then_some(self.pass));
    }
}

impl Applier {
    /// An applier for one stream into these roots.
    pub fn new(targets: Targets) -> Self {
        Self { targets, pass: None }
    }

    /// Carries out the records of a frame. Returns a report when it ended a pass, which then is in its place,
    /// though not necessarily on disk ([`Targets::sync`]).
    ///
    /// # Errors
    /// Any [`FilesError`] but those of the source; the pass is lost then, as if this had been dropped.
    pub fn feed(&mut self, frame: &[u8]) -> Result<Option<PassReport>, FilesError> {
        let result = self.records(frame);
        if result.is_err() {
            self.pass = None;
        }
        result
    }

    fn records(&mut self, mut frame: &[u8]) -> Result<Option<PassReport>, FilesError> {
        while !frame.is_empty() {
            match (next_record(&mut frame)?, &mut self.pass) {
                (Record::Begin(begin), None) => self.pass = Some(Receiving::begin(&self.targets, begin)?),
                (Record::End(_), Some(_)) if !frame.is_empty() => {
                    return Err(FilesError::OutOfPlace { what: "records after the end of a pass" });
                }
                (Record::End(announced), Some(pass)) => {
                    let report = pass.end(announced)?;
                    self.pass = None;
                    return Ok(Some(report));
                }
                (Record::Begin(_), Some(_)) => {
                    return Err(FilesError::OutOfPlace { what: "the beginning of a pass inside one" });
                }
                (_, None) => return Err(FilesError::OutOfPlace { what: "a record outside a pass" }),
                (record, Some(pass)) => pass.take(record)?,
            }
        }
        Ok(None)
    }
}

impl Receiving {
    fn begin(targets: &Targets, begin: Begin) -> Result<Self, FilesError> {
        if begin.version != VERSION {
            return Err(FilesError::BadVersion { peer: begin.version, ours: VERSION });
        }
        let path = targets.claim(&begin)?;
        let root = TargetRoot::open(&path).inspect_err(|_| targets.release(&begin.root, None))?;
        let mut receiving = Self {
            targets: targets.clone(),
            id: begin.root,
            pass: begin.pass,
            only: begin.only,
            root,
            open: None,
            totals: Totals::default(),
            done: false,
        };
        if begin.base.is_none() {
            receiving.root.clear(receiving.only.as_deref())?;
        }
        Ok(receiving)
    }

    fn take(&mut self, record: Record<'_>) -> Result<(), FilesError> {
        self.totals.count(&record);
        if let Some(path) = path_of(&record) {
            self.check_scope(path)?;
        }
        match (record, self.open.take()) {
            (Record::Data { offset, bytes }, Some(mut open)) => {
                open.write(offset, bytes.0)?;
                self.open = Some(open);
            }
            (Record::Hole { offset, length }, Some(open)) => {
                open.punch(offset, length)?;
                self.open = Some(open);
            }
            (Record::FileEnd { meta, data_bytes }, Some(open)) if data_bytes == open.data_bytes => {
                drop(open.file);
                self.root.set_meta(&open.path, &meta, true)?;
            }
            (Record::FileEnd { .. }, Some(_)) => {
                return Err(FilesError::OutOfPlace { what: "the end of a file of which data is missing" });
            }
            (_, Some(_)) => return Err(FilesError::OutOfPlace { what: "another record inside a file" }),
            (Record::Data { .. } | Record::Hole { .. } | Record::FileEnd { .. }, None) => {
                return Err(FilesError::OutOfPlace { what: "content outside a file" });
            }
            (Record::Begin(_) | Record::End(_), None) => {
                return Err(FilesError::OutOfPlace { what: "a bracket inside a pass" });
            }
            (Record::Remove(path), None) => self.root.remove(&path)?,
            (Record::MakeDir(path), None) => self.root.make_dir(&path)?,
            (Record::Link { path, to }, None) => {
                self.check_scope(&to)?;
                self.root.link(&path, &to)?;
            }
            (Record::Special { path, kind, meta }, None) => self.root.put_special(&path, &kind, &meta)?,
            (Record::DirMeta { path, meta }, None) => self.root.set_meta(&path, &meta, true)?,
            (Record::File { path, size, patch }, None) => {
                let file = self.root.open_file(&path, size, patch)?;
                self.open = Some(OpenFile { path, file, size, data_bytes: 0 });
            }
        }
        Ok(())
    }

    /// A pass about certain names keeps to them.
    fn check_scope(&self, path: &RelPath) -> Result<(), FilesError> {
        match &self.only {
            Some(prefix) if !path.first_name().starts_with(prefix) || path.is_root() => {
                Err(FilesError::OutOfPlace { what: "a name that the pass is not about" })
            }
            _ => Ok(()),
        }
    }

    fn end(&mut self, announced: Totals) -> Result<PassReport, FilesError> {
        if self.open.is_some() {
            return Err(FilesError::OutOfPlace { what: "the end of a pass inside a file" });
        }
        if announced != self.totals {
            return Err(FilesError::Miscounted { announced: announced.into(), received: self.totals.into() });
        }
        self.done = true;
        Ok(PassReport { root: self.id.clone(), pass: self.pass, totals: self.totals })
    }
}

/// The entry which a record changes, if it names one.
fn path_of<'a>(record: &'a Record<'_>) -> Option<&'a RelPath> {
    match record {
        Record::Remove(path)
        | Record::MakeDir(path)
        | Record::Special { path, .. }
        | Record::Link { path, .. }
        | Record::File { path, .. }
        | Record::DirMeta { path, .. } => Some(path),
        Record::Begin(_)
        | Record::Data { .. }
        | Record::Hole { .. }
        | Record::FileEnd { .. }
        | Record::End(_) => None,
    }
}

impl OpenFile {
    fn check_range(&self, offset: u64, length: u64) -> Result<(), FilesError> {
        match offset.checked_add(length) {
            Some(end) if end <= self.size => Ok(()),
            _ => Err(FilesError::OutOfPlace { what: "content beyond the end of its file" }),
        }
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), FilesError> {
        self.check_range(offset, bytes.len() as u64)?;
        self.file.write_all_at(bytes, offset).map_err(FilesError::io("write", &self.path))?;
        self.data_bytes += bytes.len() as u64;
        Ok(())
    }

    fn punch(&self, offset: u64, length: u64) -> Result<(), FilesError> {
        self.check_range(offset, length)?;
        punch(&self.file, offset, length).map_err(FilesError::io("punch a hole into", &self.path))
    }
}
