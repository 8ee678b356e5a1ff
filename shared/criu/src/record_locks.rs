//! The locks that processes have on ranges of files (`F_SETLK`), in a file beside the images.
//!
//! The images have them too, of which CRIU loses some. Of processes that have an open file in common it dumps only the locks
//! of the first one (`discard_dup_locks_tail` in `criu/file-lock.c`). And it takes them before it maps files
//! (`prepare_file_locks`, `open_vmas`): the descriptors by which it maps are closed afterwards, with which the kernel gives
//! up all locks that the process has on such a file. So who restores looks after them:
//!
//! ```text
//!   /proc/locks at the freeze ── record-locks.json ──▶ (with the images) ──▶ what CRIU has not taken is taken again
//! ```

use std::fs::{self, File};
use std::io::{self, ErrorKind, Read};
use std::path::Path;

use haulage_sys::record_lock::RecordLock;
use serde::{Deserialize, Serialize};

/// The name of the file, which is not there when there are no locks.
const NAME: &str = "record-locks.json";
/// The version of its format; another one is refused, not guessed at.
const FORMAT: u32 = 1;
/// The longest file that is read, in bytes.
const MAX_SIZE: u64 = 64 << 20;

/// Beside the images.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct RecordLocks {
    format: u32,
    locks: Vec<OwnedLock>,
}

/// A lock, and whose it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwnedLock {
    /// The process, by its id in its innermost pid namespace.
    pub pid: u32,
    /// A descriptor of the file in the process.
    pub descriptor: i32,
    /// Nobody else may have one on any of it.
    pub for_writing: bool,
    /// Where it begins, in bytes.
    pub start: i64,
    /// Its length in bytes, 0 for all that there will ever be.
    pub length: i64,
}

impl OwnedLock {
    /// That of the process `pid`.
    pub fn new(pid: u32, lock: RecordLock) -> Self {
        let RecordLock { descriptor, for_writing, start, length } = lock;
        Self { pid, descriptor, for_writing, start, length }
    }

    /// Whosever it is.
    pub fn lock(self) -> RecordLock {
        let Self { descriptor, for_writing, start, length, .. } = self;
        RecordLock { descriptor, for_writing, start, length }
    }
}

/// Writes them beside the images in `images`.
///
/// # Errors
/// Of the file system.
pub fn write(images: &Path, locks: Vec<OwnedLock>) -> io::Result<()> {
    if locks.is_empty() {
        return Ok(());
    }
    fs::write(images.join(NAME), serde_json::to_vec(&RecordLocks { format: FORMAT, locks })?)
}

/// Those beside the images in `images`.
///
/// # Errors
/// `InvalidData` when they are of another format or not understood.
pub fn read(images: &Path) -> io::Result<Vec<OwnedLock>> {
    let file = match File::open(images.join(NAME)) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        file => file?,
    };
    let mut bytes = Vec::new();
    file.take(MAX_SIZE).read_to_end(&mut bytes)?;
    let RecordLocks { format, locks } = serde_json::from_slice(&bytes)?;
    if format != FORMAT {
        let message = format!("{NAME} has format {format}, and {FORMAT} is understood");
        return Err(io::Error::new(ErrorKind::InvalidData, message));
    }
    Ok(locks)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_read_and_another_format_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), Vec::new()).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        assert_eq!(read(dir.path()).unwrap(), []);
        let lock = RecordLock { descriptor: 4, for_writing: true, start: 120, length: 8 };
        let locks = vec![OwnedLock::new(7, lock), OwnedLock::new(9, RecordLock { length: 0, ..lock })];
        write(dir.path(), locks.clone()).unwrap();
        assert_eq!(read(dir.path()).unwrap(), locks);
        assert_eq!(locks[0].lock(), lock);
        let other = RecordLocks { format: FORMAT + 1, locks };
        fs::write(dir.path().join(NAME), serde_json::to_vec(&other).unwrap()).unwrap();
        assert_eq!(read(dir.path()).unwrap_err().kind(), ErrorKind::InvalidData);
        fs::write(dir.path().join(NAME), "{").unwrap();
        assert!(read(dir.path()).is_err());
    }
}
