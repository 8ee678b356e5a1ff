//! Walking a tree into a [`Snapshot`].

use std::collections::BTreeMap;
use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::{AtFlags, FileType, Stat, major, minor, readlinkat, statat};

use crate::delta::is_settled;
use crate::entry::{Entry, Kind, Meta, Snapshot, Time};
use crate::error::FilesError;
use crate::path::RelPath;
use crate::source::Scope;
use crate::tree::{SELF, Tree, is_gone, names};
use crate::xattrs;

/// The bits of a mode which are copied.
const MODE_BITS: u32 = 0o7777;

/// Walks a tree. Entries that vanish meanwhile are left out; what changes meanwhile may be seen as it was before
/// or after, and its change time tells.
///
/// `known` is an earlier snapshot of the same tree, if there is one: extended attributes of what has not been
/// touched since are taken from it.
///
/// # Errors
/// [`FilesError::Io`], [`FilesError::BadPath`] for a path that is too long, [`FilesError::XattrsTooLarge`].
pub(crate) fn scan(tree: &Tree, scope: &Scope, known: Option<&Snapshot>) -> Result<Snapshot, FilesError> {
    let mut walk = Walk { tree, known, snapshot: Snapshot::empty(Time::now()) };
    let root = RelPath::root();
    match scope {
        Scope::Tree => {
            walk.visit(tree.root(), SELF, root)?;
        }
        Scope::Named { .. } => walk.children(tree.root(), &root, scope)?,
    }
    Ok(walk.snapshot)
}

struct Walk<'a> {
    tree: &'a Tree,
    known: Option<&'a Snapshot>,
    snapshot: Snapshot,
}

impl Snapshot {
    fn empty(started: Time) -> Self {
        Self { started, entries: BTreeMap::new(), mounts: Vec::new() }
    }
}

impl Walk<'_> {
    /// Takes one entry, and all below it, depth bounded by what a path may hold: directories are opened one
    /// after the other, by path.
    fn visit(&mut self, dir: BorrowedFd<'_>, name: &CStr, path: RelPath) -> Result<(), FilesError> {
        let mut pending = Vec::new();
        self.take(dir, name, path, &mut pending)?;
        while let Some(path) = pending.pop() {
            let dir = match self.tree.open_dir(&path) {
                Ok(dir) => dir,
                Err(error) if is_gone(&error) => continue,
                Err(error) => return Err(FilesError::io("open the directory", &path)(error)),
            };
            for name in names(dir.as_fd()).map_err(FilesError::io("list", &path))? {
                self.take(dir.as_fd(), &name, path.join(name.to_bytes())?, &mut pending)?;
            }
        }
        Ok(())
    }

    /// The entries of the root that are in scope, under the names which they shall have.
    fn children(&mut self, dir: BorrowedFd<'_>, root: &RelPath, scope: &Scope) -> Result<(), FilesError> {
        for name in names(dir).map_err(FilesError::io("list", root))? {
            if let Some(path) = scope.target_name(name.to_bytes()) {
                let mut pending = Vec::new();
                self.take(dir, &name, RelPath::new(path)?, &mut pending)?;
                if let Some(path) = pending.pop() {
                    // A scope by name is for files; a directory in it is no part of what was asked for.
                    self.snapshot.entries.remove(&path);
                }
            }
        }
        Ok(())
    }

    fn take(
        &mut self,
        dir: BorrowedFd<'_>,
        name: &CStr,
        path: RelPath,
        pending: &mut Vec<RelPath>,
    ) -> Result<(), FilesError> {
        let entry = match self.entry(dir, name, &path) {
            Ok(entry) => entry,
            Err(error) if is_gone(&error) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::FileTooLarge => {
                return Err(FilesError::XattrsTooLarge { path, limit: xattrs::MAX_TOTAL_BYTES });
            }
            Err(error) => return Err(FilesError::io("look at", &path)(error)),
        };
        match entry {
            Some((entry, false)) => {
                if entry.kind == Kind::Directory {
                    pending.push(path.clone());
                }
                self.snapshot.entries.insert(path, entry);
            }
            Some((entry, true)) if entry.kind == Kind::Directory => {
                self.snapshot.mounts.push(path.clone());
                self.snapshot.entries.insert(path, entry);
            }
            Some((_, true)) => self.snapshot.mounts.push(path),
            None => {}
        }
        Ok(())
    }

    /// An entry, and whether it is on another file system; `None` for a kind of file that does not exist on Linux.
    fn entry(&self, dir: BorrowedFd<'_>, name: &CStr, path: &RelPath) -> io::Result<Option<(Entry, bool)>> {
        let stat = statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let kind = match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => Kind::Directory,
            FileType::RegularFile => Kind::File { size: u64::try_from(stat.st_size).unwrap_or(0) },
            FileType::Symlink => Kind::Symlink { target: readlinkat(dir, name, Vec::new())?.into_bytes() },
            FileType::CharacterDevice => {
                Kind::CharDevice { major: major(stat.st_rdev), minor: minor(stat.st_rdev) }
            }
            FileType::BlockDevice => {
                Kind::BlockDevice { major: major(stat.st_rdev), minor: minor(stat.st_rdev) }
            }
            FileType::Fifo => Kind::Fifo,
            FileType::Socket => Kind::Socket,
            FileType::Unknown => return Ok(None),
        };
        let ctime = Time { seconds: stat.st_ctime, nanos: stat.st_ctime_nsec as u32 };
        let foreign = self.tree.is_foreign(&stat);
        let xattrs = match self.known_entry(path, &stat, ctime) {
            Some(entry) => entry.meta.xattrs.clone(),
            None if foreign => Vec::new(),
            None => xattrs::read(dir, name)?,
        };
        let meta = Meta {
            mode: stat.st_mode & MODE_BITS,
            uid: stat.st_uid,
            gid: stat.st_gid,
            mtime: Time { seconds: stat.st_mtime, nanos: stat.st_mtime_nsec as u32 },
            xattrs,
        };
        Ok(Some((Entry { kind, meta, ino: stat.st_ino, links: stat.st_nlink, ctime }, foreign)))
    }

    /// The entry of the earlier snapshot, if nothing at all can have changed about it since.
    fn known_entry(&self, path: &RelPath, stat: &Stat, ctime: Time) -> Option<&Entry> {
        let known = self.known?;
        let entry = known.entries.get(path)?;
        let same = entry.ino == stat.st_ino && entry.ctime == ctime && is_settled(ctime, known.started);
        same.then_some(entry)
    }
}
