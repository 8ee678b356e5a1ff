//! A root directory, and ways down from it that do not lead out.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Dir, FileType, Mode, OFlags, ResolveFlags, Stat, fstat, open, openat2};
use rustix::io::Errno;

use crate::error::FilesError;
use crate::path::RelPath;

/// How often the kernel may ask to try again because something was renamed meanwhile.
const RENAME_RETRIES: usize = 100;

/// A root directory, held open.
#[derive(Debug)]
pub(crate) struct Tree {
    root: OwnedFd,
    device: u64,
}

impl Tree {
    /// Opens the directory at `path`, which is trusted.
    pub(crate) fn open(path: &Path) -> Result<Self, FilesError> {
        let failed = |e: Errno| FilesError::OpenRoot { path: path.to_owned(), source: e.into() };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = open(path, flags, Mode::empty()).map_err(failed)?;
        let device = fstat(&root).map_err(failed)?.st_dev;
        Ok(Self { root, device })
    }

    /// The root directory.
    pub(crate) fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    /// Whether something is on another file system than the root.
    pub(crate) fn is_foreign(&self, stat: &Stat) -> bool {
        stat.st_dev != self.device
    }

    /// Opens an existing directory.
    pub(crate) fn open_dir(&self, path: &RelPath) -> io::Result<OwnedFd> {
        self.open_at(path, OFlags::RDONLY | OFlags::DIRECTORY)
    }

    /// Opens an existing regular file of the given inode for reading, leaving no trace in its access time. `None`
    /// if it is not there any more. Nothing else is ever opened, for opening a device may do things already: the
    /// inode is looked at before it is opened, and no other can come in between.
    pub(crate) fn open_file(&self, path: &RelPath, ino: u64) -> io::Result<Option<File>> {
        let place = match self.open_at(path, OFlags::PATH) {
            Err(error) if is_gone(&error) => return Ok(None),
            result => result?,
        };
        let stat = fstat(&place)?;
        if stat.st_ino != ino || FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Ok(None);
        }
        let place = format!("/proc/self/fd/{}", place.as_raw_fd());
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        match open(&place, flags | OFlags::NOATIME, Mode::empty()) {
            // Some network file systems let only the owner do so, whatever the capabilities.
            Err(Errno::PERM) => Ok(Some(open(&place, flags, Mode::empty())?.into())),
            result => Ok(Some(result?.into())),
        }
    }

    fn open_at(&self, path: &RelPath, flags: OFlags) -> io::Result<OwnedFd> {
        let bytes = if path.is_root() { b"." } else { path.as_bytes() };
        let resolve = ResolveFlags::BENEATH
            | ResolveFlags::NO_SYMLINKS
            | ResolveFlags::NO_MAGICLINKS
            | ResolveFlags::NO_XDEV;
        let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut last = Errno::AGAIN;
        for _ in 0..RENAME_RETRIES {
            match openat2(&self.root, bytes, flags, Mode::empty(), resolve) {
                Err(error @ (Errno::AGAIN | Errno::INTR)) => last = error,
                result => return Ok(result?),
            }
        }
        Err(last.into())
    }
}

/// The names in an open directory, `.` and `..` left out.
pub(crate) fn names(dir: BorrowedFd<'_>) -> io::Result<Vec<CString>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(dir)? {
        let entry = entry?;
        if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
            names.push(entry.file_name().to_owned());
        }
    }
    Ok(names)
}

/// Whether an error says that an entry is not there (any more), or that something else took a place on its way.
pub(crate) fn is_gone(error: &io::Error) -> bool {
    let gone = [Errno::NOENT, Errno::NOTDIR, Errno::LOOP, Errno::XDEV, Errno::STALE];
    Errno::from_io_error(error).is_some_and(|errno| gone.contains(&errno))
}

/// The name of the root in itself.
pub(crate) const SELF: &CStr = c".";
