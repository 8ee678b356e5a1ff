//! What a service keeps of a migration for only as long as the host is up, such as CRIU's images: in memory where there is
//! ample room, else on disk beside its notes. Many small files are made, read and removed there while the container stands
//! still, which on a disk's file system takes several times as long.
//!
//! A tmpfs such as `/dev/shm` is open to every user of the host, and what lies there holds the memory of containers. So a
//! directory there is used only if nobody else has made it or can look into it.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use haulage_protocol::id::MigrationId;

use crate::config::HostConfig;
use crate::notes;

/// Room in memory is ample when so many copies of what comes there would fit.
const COPIES_WITH_ROOM_TO_SPARE: u64 = 4;

/// The directories of one migration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scratch {
    in_memory: PathBuf,
    on_disk: PathBuf,
    page_dir: PathBuf,
}

impl HostConfig {
    /// Where a migration's passing files are on this host.
    #[must_use]
    pub fn scratch(&self, migration: &MigrationId) -> Scratch {
        Scratch {
            in_memory: self.memory_dir(migration),
            on_disk: self.migration_dir(migration),
            page_dir: self.page_dir.clone(),
        }
    }
}

impl Scratch {
    /// The directory `name` for files of up to `bytes` together, if that is known; made unless it is there already.
    ///
    /// # Errors
    /// Of the file system.
    pub fn make(&self, name: &str, bytes: Option<u64>) -> io::Result<PathBuf> {
        let there = self.find(name);
        let has_room = || bytes.is_some_and(|bytes| has_ample_room(&self.page_dir, bytes));
        let dir = match there.exists() || !has_room() {
            true => there,
            false => self.in_memory().map_or(there, |dir| dir.join(name)),
        };
        fs::create_dir_all(&dir).map(|()| dir)
    }

    /// The migration's directory in memory, made unless it is there already; none if it cannot be had for us alone.
    #[must_use]
    pub fn in_memory(&self) -> Option<PathBuf> {
        let made = DirBuilder::new().mode(0o700).create(&self.in_memory);
        if made.is_ok() || self.is_ours() {
            return Some(self.in_memory.clone());
        }
        let dir = self.in_memory.display();
        tracing::warn!(%dir, error = ?made.err(), "a directory in memory is not to be had, it goes to disk");
        None
    }

    /// Whether the directory in memory is there, and ours alone.
    fn is_ours(&self) -> bool {
        let us = rustix::process::geteuid().as_raw();
        fs::symlink_metadata(&self.in_memory)
            .is_ok_and(|found| found.is_dir() && found.uid() == us && found.mode() & 0o077 == 0)
    }

    /// The directory `name` on the file system that the directory `other` is on; made unless it is there already.
    ///
    /// # Errors
    /// Of the file system.
    pub fn make_beside(&self, name: &str, other: &str) -> io::Result<PathBuf> {
        let dir = self.find(other).with_file_name(name);
        fs::create_dir_all(&dir).map(|()| dir)
    }

    /// Where the directory `name` is; where it would be on disk, if there is none.
    #[must_use]
    pub fn find(&self, name: &str) -> PathBuf {
        let in_memory = self.in_memory.join(name);
        if self.is_ours() && in_memory.exists() { in_memory } else { self.on_disk.join(name) }
    }

    /// Removes `names`, wherever they are, as [`notes::remove`] does.
    ///
    /// # Errors
    /// As there.
    pub fn remove(&self, names: &[&str]) -> io::Result<()> {
        if self.is_ours() {
            notes::remove(&self.in_memory, names)?;
        }
        notes::remove(&self.on_disk, names)
    }
}

/// Whether `bytes` can go to the tmpfs at `dir`: it has room for them, and the host has memory to spare. Not where that is
/// not known, which is logged.
#[must_use]
pub fn has_ample_room(dir: &Path, bytes: u64) -> bool {
    match available() {
        Ok(available) => {
            available >= bytes.saturating_mul(COPIES_WITH_ROOM_TO_SPARE) && room_in(dir) >= bytes
        }
        Err(error) => {
            tracing::warn!(%error, "the room in memory is not known, it goes to disk");
            false
        }
    }
}

/// Free space in bytes of the file system that `dir`, or the nearest directory above it that exists, is on.
#[must_use]
pub fn room_in(dir: &Path) -> u64 {
    let known = dir.ancestors().find_map(|dir| rustix::fs::statvfs(dir).ok());
    known.map_or(0, |about| about.f_bavail.saturating_mul(about.f_frsize))
}

/// `MemAvailable` of proc_meminfo(5), in bytes.
fn available() -> io::Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let field = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib =
        field.and_then(|field| field.trim().strip_suffix(" kB")).and_then(|kib| kib.parse::<u64>().ok());
    kib.map(|kib| kib.saturating_mul(1024))
        .ok_or_else(|| io::Error::other("/proc/meminfo has no MemAvailable"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scratch(dir: &Path) -> Scratch {
        let page_dir = dir.join("memory");
        Scratch { in_memory: page_dir.join("haul-a-1"), on_disk: dir.join("disk/1"), page_dir }
    }

    #[test]
    fn what_fits_goes_to_memory_and_what_does_not_to_disk_and_both_go_without_a_trace() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("memory")).unwrap();
        fs::create_dir_all(dir.path().join("disk")).unwrap();
        let scratch = scratch(dir.path());
        assert_eq!(scratch.find("dump"), scratch.on_disk.join("dump"));
        assert_eq!(scratch.make("dump", Some(1 << 20)).unwrap(), scratch.in_memory.join("dump"));
        assert_eq!(scratch.make("large", Some(u64::MAX)).unwrap(), scratch.on_disk.join("large"));
        // Where it is, it stays.
        assert_eq!(scratch.make("dump", Some(u64::MAX)).unwrap(), scratch.in_memory.join("dump"));
        assert_eq!(scratch.make("large", Some(0)).unwrap(), scratch.on_disk.join("large"));
        assert_eq!(scratch.make_beside("more", "dump").unwrap(), scratch.in_memory.join("more"));
        assert_eq!(scratch.make_beside("again", "large").unwrap(), scratch.on_disk.join("again"));
        fs::write(scratch.find("more").join("file"), "x").unwrap();
        scratch.remove(&["dump", "more"]).unwrap();
        assert!(!scratch.in_memory.exists() && scratch.find("large").exists());
        scratch.remove(&["large", "again"]).unwrap();
        assert!(!scratch.on_disk.exists());
        scratch.remove(&["large"]).unwrap();
    }

    #[test]
    fn what_others_have_made_or_can_look_into_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let page_dir = dir.path().join("memory");
        fs::create_dir_all(&page_dir).unwrap();
        let scratch = scratch(dir.path());
        let theirs = dir.path().join("theirs");
        DirBuilder::new().mode(0o700).create(&theirs).unwrap();
        let prepared: [&dyn Fn(); 3] = [
            &|| std::os::unix::fs::symlink(&theirs, &scratch.in_memory).unwrap(),
            &|| DirBuilder::new().mode(0o755).create(&scratch.in_memory).unwrap(),
            &|| {
                DirBuilder::new().mode(0o700).create(&scratch.in_memory).unwrap();
                std::os::unix::fs::chown(&scratch.in_memory, Some(65534), None).unwrap();
            },
        ];
        for prepare in prepared {
            prepare();
            let on_disk = scratch.on_disk.join("dump");
            assert_eq!(scratch.make("dump", Some(0)).unwrap(), on_disk);
            assert_eq!((scratch.in_memory(), scratch.find("dump")), (None, on_disk));
            fs::write(scratch.in_memory.join("dump"), "theirs").unwrap();
            scratch.remove(&["dump"]).unwrap();
            assert_eq!(fs::read_to_string(scratch.in_memory.join("dump")).unwrap(), "theirs");
            let gone = fs::remove_file(&scratch.in_memory);
            gone.or_else(|_| fs::remove_dir_all(&scratch.in_memory)).unwrap();
            let _ = fs::remove_file(theirs.join("dump"));
        }
        assert_eq!(scratch.make("dump", Some(0)).unwrap(), scratch.in_memory.join("dump"));
        assert_eq!(scratch.make("more", None).unwrap(), scratch.on_disk.join("more"), "of unknown size");
    }

    #[test]
    fn room_is_found_where_nothing_is_yet() {
        assert!(room_in(Path::new("/nowhere/at/all")) > 0);
        assert!(has_ample_room(Path::new("/"), 0) && !has_ample_room(Path::new("/"), 1 << 60));
    }
}
