//! Changes to a tree, none of which leaves it.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::{
    AtFlags, FallocateFlags, FileType, Gid, Mode, OFlags, Timespec, Timestamps, UTIME_OMIT, Uid, chmodat,
    chownat, fallocate, ftruncate, linkat, makedev, mkdirat, mknodat, openat, statat, symlinkat, unlinkat,
    utimensat,
};
use rustix::io::Errno;

use crate::entry::{Kind, Meta};
use crate::error::FilesError;
use crate::path::RelPath;
use crate::tree::{SELF, Tree, names};
use crate::xattrs;

/// What a file or directory is made with, until its metadata is set.
const PRIVATE_FILE: Mode = Mode::from_raw_mode(0o600);
const PRIVATE_DIR: Mode = Mode::from_raw_mode(0o700);

/// Zeros are written in pieces of this size where holes cannot be made.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// The tree being written.
#[derive(Debug)]
pub(super) struct TargetRoot {
    tree: Tree,
    /// The directory that was used last: the next record is often about the same one.
    last_dir: Option<(RelPath, OwnedFd)>,
}

impl TargetRoot {
    pub(super) fn open(path: &Path) -> Result<Self, FilesError> {
        Ok(Self { tree: Tree::open(path)?, last_dir: None })
    }

    /// Removes everything in the root, or everything whose name begins with `only`. What is mounted in it is an
    /// error, and stays.
    pub(super) fn clear(&mut self, only: Option<&[u8]>) -> Result<(), FilesError> {
        let root = RelPath::root();
        let all = names(self.tree.root()).map_err(FilesError::io("list", &root))?;
        let of_interest = |name: &&CString| only.is_none_or(|prefix| name.to_bytes().starts_with(prefix));
        for name in all.iter().filter(of_interest) {
            self.clear_entry(&root, name)?;
        }
        Ok(())
    }

    fn clear_entry(&self, parent: &RelPath, name: &CStr) -> Result<(), FilesError> {
        let path = parent.join(name.to_bytes())?;
        let failed = FilesError::io("remove", &path);
        let opened = if parent.is_root() {
            None
        } else {
            Some(self.tree.open_dir(parent).map_err(FilesError::io("open the directory", parent))?)
        };
        let dir = opened.as_ref().map_or_else(|| self.tree.root(), |dir| dir.as_fd());
        match unlinkat(dir, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => return Ok(()),
            Err(Errno::ISDIR) => {}
            Err(error) => return Err(failed(error.into())),
        }
        let inner = self.tree.open_dir(&path).map_err(&failed)?;
        let inner_names = names(inner.as_fd()).map_err(&failed)?;
        drop(inner);
        for inner_name in inner_names {
            self.clear_entry(&path, &inner_name)?;
        }
        unlinkat(dir, name, AtFlags::REMOVEDIR).map_err(|error| failed(error.into()))
    }

    /// Removes an entry; a directory must be empty. Not being there is fine.
    pub(super) fn remove(&mut self, path: &RelPath) -> Result<(), FilesError> {
        let failed = FilesError::io("remove", path);
        let result = self.at(path, |dir, name| match unlinkat(dir, name, AtFlags::empty()) {
            Err(Errno::ISDIR) => unlinkat(dir, name, AtFlags::REMOVEDIR).map(|()| true),
            result => result.map(|()| false),
        });
        match result {
            Ok(was_dir) => {
                if was_dir {
                    self.last_dir = None;
                }
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(failed(error)),
        }
    }

    pub(super) fn make_dir(&mut self, path: &RelPath) -> Result<(), FilesError> {
        self.at(path, |dir, name| mkdirat(dir, name, PRIVATE_DIR))
            .map_err(FilesError::io("make the directory", path))
    }

    pub(super) fn link(&mut self, path: &RelPath, to: &RelPath) -> Result<(), FilesError> {
        let failed = FilesError::io("link", path);
        let Some((to_dir, to_name)) = to.split() else {
            return Err(FilesError::OutOfPlace { what: "a further name for the root" });
        };
        let to_dir = self.tree.open_dir(&to_dir).map_err(&failed)?;
        let to_name = CString::new(to_name).map_err(|error| failed(error.into()))?;
        self.at(path, |dir, name| {
            make_way(dir, name)?;
            linkat(&to_dir, to_name.as_c_str(), dir, name, AtFlags::empty())
        })
        .map_err(&failed)
    }

    /// Puts anything that is neither a file nor a directory.
    pub(super) fn put_special(&mut self, path: &RelPath, kind: &Kind, meta: &Meta) -> Result<(), FilesError> {
        let (node, device) = match kind {
            Kind::Directory | Kind::File { .. } => {
                return Err(FilesError::OutOfPlace { what: "a file or directory among the special ones" });
            }
            Kind::Symlink { target } => {
                self.at(path, |dir, name| {
                    make_way(dir, name)?;
                    symlinkat(target.as_slice(), dir, name)
                })
                .map_err(FilesError::io("make the symbolic link", path))?;
                return self.set_meta(path, meta, false);
            }
            Kind::CharDevice { major, minor } => (FileType::CharacterDevice, makedev(*major, *minor)),
            Kind::BlockDevice { major, minor } => (FileType::BlockDevice, makedev(*major, *minor)),
            Kind::Fifo => (FileType::Fifo, 0),
            Kind::Socket => (FileType::Socket, 0),
        };
        self.at(path, |dir, name| {
            make_way(dir, name)?;
            mknodat(dir, name, node, PRIVATE_FILE, device)
        })
        .map_err(FilesError::io("make the node", path))?;
        self.set_meta(path, meta, true)
    }

    /// Opens a file for writing, `size` long: a new and empty one in the place of what is there, or, for a
    /// patch, the one that is there.
    pub(super) fn open_file(&mut self, path: &RelPath, size: u64, patch: bool) -> Result<File, FilesError> {
        let flags = OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = self.at(path, |dir, name| {
            let file = if patch {
                // Opening a device may do things already.
                let stat = statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)?;
                if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
                    return Err(Errno::INVAL);
                }
                openat(dir, name, flags, Mode::empty())?
            } else {
                make_way(dir, name)?;
                openat(dir, name, flags | OFlags::CREATE | OFlags::EXCL, PRIVATE_FILE)?
            };
            ftruncate(&file, size)?;
            Ok(file)
        });
        file.map(File::from).map_err(FilesError::io("open for writing", path))
    }

    /// Gives an entry its owner, mode, attributes and times; `has_mode` is false for symbolic links. In this order:
    /// a change of owner drops set-id bits and capabilities, an access list sets the mode's group bits to what they
    /// were at the source, and all of it leaves its time.
    pub(super) fn set_meta(&mut self, path: &RelPath, meta: &Meta, has_mode: bool) -> Result<(), FilesError> {
        let times = Timestamps {
            last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
            last_modification: Timespec { tv_sec: meta.mtime.seconds, tv_nsec: meta.mtime.nanos.into() },
        };
        self.at_io(path, |dir, name| {
            // Something that was made in a directory with a default access list has inherited one.
            xattrs::remove_others(dir, name, &meta.xattrs)?;
            let owner = (Uid::from_raw(meta.uid), Gid::from_raw(meta.gid));
            chownat(dir, name, Some(owner.0), Some(owner.1), AtFlags::SYMLINK_NOFOLLOW)?;
            if has_mode {
                if FileType::from_raw_mode(statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)?.st_mode)
                    == FileType::Symlink
                {
                    return Err(Errno::LOOP.into());
                }
                chmodat(dir, name, Mode::from_raw_mode(meta.mode), AtFlags::empty())?;
            }
            xattrs::write(dir, name, &meta.xattrs)?;
            Ok(utimensat(dir, name, &times, AtFlags::SYMLINK_NOFOLLOW)?)
        })
        .map_err(FilesError::io("set the metadata of", path))
    }

    /// Does something to an entry, given its directory and its name there.
    fn at<T>(
        &mut self,
        path: &RelPath,
        act: impl FnOnce(BorrowedFd<'_>, &CStr) -> Result<T, Errno>,
    ) -> io::Result<T> {
        self.at_io(path, |dir, name| Ok(act(dir, name)?))
    }

    fn at_io<T>(
        &mut self,
        path: &RelPath,
        act: impl FnOnce(BorrowedFd<'_>, &CStr) -> io::Result<T>,
    ) -> io::Result<T> {
        let Some((parent, name)) = path.split() else {
            return act(self.tree.root(), SELF);
        };
        let name = CString::new(name)?;
        match &self.last_dir {
            Some((last, dir)) if *last == parent => act(dir.as_fd(), &name),
            _ => {
                let (_, dir) = self.last_dir.insert((parent.clone(), self.tree.open_dir(&parent)?));
                act(dir.as_fd(), &name)
            }
        }
    }
}

/// Removes what is in the place of a new entry, if it is no directory.
fn make_way(dir: BorrowedFd<'_>, name: &CStr) -> Result<(), Errno> {
    match unlinkat(dir, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Makes a part of a file read as zeros, storing nothing where the file system can do that.
pub(super) fn punch(file: &File, offset: u64, length: u64) -> io::Result<()> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    match fallocate(file, flags, offset, length) {
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => {}
        result => return Ok(result?),
    }
    let end = offset + length;
    for at in (offset..end).step_by(ZEROS.len()) {
        let piece = ZEROS.get(..(end - at).min(ZEROS.len() as u64) as usize).unwrap_or_default();
        file.write_all_at(piece, at)?;
    }
    Ok(())
}
