//! Shorter waits of the kernel's own while a container stands still.
//!
//! Packet filters, packet sockets and namespaces wait for grace periods of RCU when they change or go, some 5 to 40 ms each
//! time, and a switch has half a dozen of them. The kernel can be told to expedite them, machine-wide, at the price of
//! interrupting every processor for each (`/sys/kernel/rcu_expedited`, `Documentation/admin-guide/kernel-parameters.txt`,
//! `rcupdate.rcu_expedited`). It is told so only as long as somebody here asks for it:
//!
//! ```text
//!   who asks holds a shared lock on /run/haul-expedited; who leaves and finds nobody else turns it off again
//! ```
//!
//! The file is there only while it is on. A process that dies leaves its lock, and the next one that leaves turns it off;
//! [`turn_off_unused`] does that too.

use std::fs::{File, TryLockError};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

const SETTING: &str = "/sys/kernel/rcu_expedited";
const LOCK: &str = "/run/haul-expedited";

/// Grace periods are expedited while this exists.
#[derive(Debug)]
pub struct Expedited {
    setting: PathBuf,
    place: PathBuf,
    lock: File,
}

impl Expedited {
    /// From now on. Machines on which an administrator has turned it on for good are left as they are.
    ///
    /// # Errors
    /// When it cannot be asked for, or is on for good: waits are as long as they are then.
    pub fn begin() -> io::Result<Self> {
        Self::begin_at(Path::new(SETTING), Path::new(LOCK))
    }

    fn begin_at(setting: &Path, place: &Path) -> io::Result<Self> {
        loop {
            let there = std::fs::exists(place)?;
            if !there && std::fs::read_to_string(setting)?.trim() != "0" {
                return Err(io::Error::new(io::ErrorKind::AlreadyExists, "expedited for good"));
            }
            let lock = File::options().write(true).create(true).truncate(false).open(place)?;
            lock.lock_shared()?;
            // Whoever left last may have removed it just before.
            if is_at(&lock, place)? {
                std::fs::write(setting, "1")?;
                return Ok(Self { setting: setting.to_owned(), place: place.to_owned(), lock });
            }
        }
    }
}

impl Drop for Expedited {
    fn drop(&mut self) {
        // What is left on is turned off by whoever leaves next.
        let _ = self.lock.unlock();
        let _ = turn_off(&self.setting, &self.place, &self.lock);
    }
}

/// Turns off what a process that has died has left on.
///
/// # Errors
/// When it cannot be turned off.
pub fn turn_off_unused() -> io::Result<()> {
    match File::options().write(true).open(LOCK) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        lock => turn_off(Path::new(SETTING), Path::new(LOCK), &lock?),
    }
}

fn turn_off(setting: &Path, place: &Path, lock: &File) -> io::Result<()> {
    match lock.try_lock() {
        Ok(()) if is_at(lock, place)? => {
            std::fs::write(setting, "0")?;
            std::fs::remove_file(place)
        }
        Ok(()) | Err(TryLockError::WouldBlock) => Ok(()),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// Whether the file is still the one that has its name.
fn is_at(lock: &File, place: &Path) -> io::Result<bool> {
    match std::fs::metadata(place) {
        Ok(there) => Ok(there.ino() == lock.metadata()?.ino()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(setting: &str) -> (tempfile::TempDir, PathBuf, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let (value, lock) = (dir.path().join("setting"), dir.path().join("lock"));
        std::fs::write(&value, setting).unwrap();
        (dir, value, lock)
    }

    #[test]
    fn it_is_on_while_anybody_asks() {
        let (_dir, value, lock) = machine("0\n");
        let read = || std::fs::read_to_string(&value).unwrap().trim().to_owned();
        let first = Expedited::begin_at(&value, &lock).unwrap();
        let second = Expedited::begin_at(&value, &lock).unwrap();
        assert_eq!(read(), "1");
        drop(first);
        assert_eq!(read(), "1");
        drop(second);
        assert_eq!(read(), "0");
        assert!(!lock.exists(), "nothing is left");
    }

    #[test]
    fn what_the_dead_have_left_is_turned_off_and_what_is_for_good_is_not() {
        let (_dir, value, lock) = machine("0\n");
        let read = || std::fs::read_to_string(&value).unwrap().trim().to_owned();
        let dead = Expedited::begin_at(&value, &lock).unwrap();
        dead.lock.unlock().unwrap();
        std::mem::forget(dead);
        assert_eq!(read(), "1");
        drop(Expedited::begin_at(&value, &lock).unwrap());
        assert_eq!((read().as_str(), lock.exists()), ("0", false));
        std::fs::write(&value, "1").unwrap();
        assert!(Expedited::begin_at(&value, &lock).is_err());
        assert_eq!(read(), "1");
    }

    #[test]
    fn the_machine_has_the_setting() {
        assert!(std::fs::exists(SETTING).unwrap());
        turn_off_unused().unwrap();
    }
}
