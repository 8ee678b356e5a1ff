//! What a service keeps of a migration on disk: notes that a crash leaves whole, in a directory that the host's
//! services share and the last of them removes.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use rustix::mount::{UnmountFlags, unmount};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Writes `notes` to `path`, making its directory, so that a crash leaves the old notes or the new ones.
///
/// # Errors
/// Of the file system; the old notes are then still there.
pub fn write<T: Serialize>(path: &Path, notes: &T) -> io::Result<()> {
    let dir = path.parent().ok_or_else(|| io::Error::other("notes without a directory"))?;
    fs::create_dir_all(dir)?;
    let new = path.with_extension("new");
    let mut file = File::create(&new)?;
    file.write_all(&serde_json::to_vec(notes)?)?;
    file.sync_all()?;
    fs::rename(new, path)?;
    // The name is as durable as the content only when its directory is.
    File::open(dir)?.sync_all()
}

/// Reads notes; `None` when there are none.
///
/// # Errors
/// Of the file system, and when they cannot be understood.
pub fn read<T: DeserializeOwned>(path: &Path) -> io::Result<Option<T>> {
    match fs::read(path) {
        Ok(raw) => Ok(Some(serde_json::from_slice(&raw)?)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Removes files and whole directories of `dir`, and `dir` itself when nothing of another service is in it. What is
/// not there is fine. What is mounted in there is unmounted: a CRIU that is killed in a restore leaves the host's control
/// groups mounted in its working directory.
///
/// # Errors
/// Of the file system; ask again.
pub fn remove(dir: &Path, parts: &[&str]) -> io::Result<()> {
    for part in parts {
        let path = dir.join(part);
        let removed = match fs::symlink_metadata(&path) {
            Ok(found) if found.is_dir() => detach_below(&path).and_then(|()| fs::remove_dir_all(&path)),
            Ok(_) => fs::remove_file(&path),
            Err(error) => Err(error),
        };
        expect_gone(&path, removed)?;
    }
    match fs::remove_dir(dir) {
        Err(error) if error.kind() == ErrorKind::DirectoryNotEmpty => Ok(()),
        result => expect_gone(dir, result),
    }
}

/// Unmounts, the last first, what is mounted below `dir`.
fn detach_below(dir: &Path) -> io::Result<()> {
    let dir = dir.canonicalize()?;
    let mounts = fs::read("/proc/self/mountinfo")?;
    let points = mounts.split(|byte| *byte == b'\n').filter_map(mount_point);
    let below: Vec<PathBuf> = points.filter(|point| *point != dir && point.starts_with(&dir)).collect();
    for point in below.iter().rev() {
        unmount(point, UnmountFlags::DETACH)?;
        tracing::warn!(point = %point.display(), "a mount was left behind, and is removed");
    }
    Ok(())
}

/// The fifth field of a line of `/proc/<pid>/mountinfo`, in which blanks and backslashes are three octal digits.
fn mount_point(line: &[u8]) -> Option<PathBuf> {
    let mut field = line.split(|byte| *byte == b' ').nth(4)?;
    let mut path = Vec::with_capacity(field.len());
    while let [first, rest @ ..] = field {
        let octal = rest.get(..3).filter(|_| *first == b'\\').and_then(|digits| str::from_utf8(digits).ok());
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                path.push(byte);
                field = rest.get(3..).unwrap_or_default();
            }
            None => {
                path.push(*first);
                field = rest;
            }
        }
    }
    Some(OsString::from_vec(path).into())
}

fn expect_gone(path: &Path, result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(io::Error::new(error.kind(), format!("cannot remove {}: {error}", path.display()))),
        Ok(()) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::mount::MountFlags;

    #[test]
    fn notes_survive_and_go_without_a_trace() {
        let parent = tempfile::tempdir().unwrap();
        let dir = parent.path().join("migrations/m");
        let path = dir.join("source.json");
        assert_eq!(read::<u32>(&path).unwrap(), None);
        write(&path, &7u32).unwrap();
        write(&path, &8u32).unwrap();
        assert_eq!(read(&path).unwrap(), Some(8u32));
        fs::create_dir_all(dir.join("dump/images")).unwrap();
        fs::create_dir(dir.join("theirs")).unwrap();
        remove(&dir, &["dump", "source.json", "never-made"]).unwrap();
        assert!(dir.join("theirs").exists(), "what belongs to another service stays");
        remove(&dir, &["theirs"]).unwrap();
        assert!(!dir.exists());
        remove(&dir, &["theirs"]).unwrap();
    }

    #[test]
    fn what_is_mounted_in_a_directory_is_not_removed_with_it() {
        let (parent, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::write(other.path().join("theirs"), "").unwrap();
        let dir = parent.path().join("m");
        // Two, one of them in the other.
        let (outer, inner) = (dir.join("work/a view"), dir.join("work/a view/of it"));
        fs::create_dir_all(&outer).unwrap();
        rustix::mount::mount("none", &outer, "tmpfs", MountFlags::empty(), None).unwrap();
        fs::create_dir(&inner).unwrap();
        rustix::mount::mount_bind(other.path(), &inner).unwrap();
        remove(&dir, &["work"]).unwrap();
        assert!(!dir.exists());
        assert!(other.path().join("theirs").exists(), "what is elsewhere was removed");
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(&*parent.path().to_string_lossy()), "{mounts}");
    }

    #[test]
    fn a_mount_point_is_read_with_its_blanks() {
        let line = br"36 35 98:0 / /a\040b\134c\01 rw,noatime master:1 - ext4 /dev/root rw";
        assert_eq!(mount_point(line), Some(PathBuf::from(r"/a b\c\01")));
        assert_eq!(mount_point(b""), None);
    }

    #[test]
    fn damaged_notes_are_an_error_and_not_none() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notes.json");
        fs::write(&path, b"{").unwrap();
        assert!(read::<u32>(&path).is_err());
    }
}
