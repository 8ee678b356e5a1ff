//! What a service keeps of a migration on disk: notes that a crash leaves whole, in a directory that the host's
//! services share and the last of them removes.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::path::Path;

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
/// not there is fine.
///
/// # Errors
/// Of the file system; ask again.
pub fn remove(dir: &Path, parts: &[&str]) -> io::Result<()> {
    for part in parts {
        let path = dir.join(part);
        let removed = match fs::symlink_metadata(&path) {
            Ok(found) if found.is_dir() => fs::remove_dir_all(&path),
            Ok(_) => fs::remove_file(&path),
            Err(error) => Err(error),
        };
        expect_gone(removed)?;
    }
    match fs::remove_dir(dir) {
        Err(error) if error.kind() == ErrorKind::DirectoryNotEmpty => Ok(()),
        result => expect_gone(result),
    }
}

fn expect_gone(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn damaged_notes_are_an_error_and_not_none() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notes.json");
        fs::write(&path, b"{").unwrap();
        assert!(read::<u32>(&path).is_err());
    }
}
