//! What a service keeps of a migration for only as long as the host is up, such as CRIU's images: in memory where there is
//! ample room, else on disk beside its notes. Many small files are made, read and removed there while the container stands
//! still, which on a disk's file system takes several times as long.

use std::fs;
use std::io;
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
    /// The directory `name` for files of up to `bytes` together; made unless it is there already.
    ///
    /// # Errors
    /// Of the file system.
    pub fn make(&self, name: &str, bytes: u64) -> io::Result<PathBuf> {
        let is_there = self.in_memory.join(name).exists() || self.on_disk.join(name).exists();
        let dir = match !is_there && has_ample_room(&self.page_dir, bytes) {
            true => self.in_memory.join(name),
            false => self.find(name),
        };
        fs::create_dir_all(&dir).map(|()| dir)
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
        if in_memory.exists() { in_memory } else { self.on_disk.join(name) }
    }

    /// Removes `names`, wherever they are, as [`notes::remove`] does.
    ///
    /// # Errors
    /// As there.
    pub fn remove(&self, names: &[&str]) -> io::Result<()> {
        notes::remove(&self.in_memory, names)?;
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
        assert_eq!(scratch.make("dump", 1 << 20).unwrap(), scratch.in_memory.join("dump"));
        assert_eq!(scratch.make("large", u64::MAX).unwrap(), scratch.on_disk.join("large"));
        // Where it is, it stays.
        assert_eq!(scratch.make("dump", u64::MAX).unwrap(), scratch.find("dump"));
        assert_eq!(scratch.make("large", 0).unwrap(), scratch.on_disk.join("large"));
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
    fn room_is_found_where_nothing_is_yet() {
        assert_eq!(room_in(Path::new("/nowhere/at/all")), room_in(Path::new("/")));
        assert!(has_ample_room(Path::new("/"), 0) && !has_ample_room(Path::new("/"), 1 << 60));
    }
}
