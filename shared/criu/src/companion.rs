//! What a restore must be told beside the images, in a file among them.
//!
//! ```text
//!   Dump::start ── haulage.json ──▶ (with the images) ──▶ Companion::configure ── lines of CRIU's configuration ──▶ CRIU
//! ```

use std::fs::{self, File};
use std::io::{self, ErrorKind, Read};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::tmpfs::SmallTmpfs;

/// The name of the file.
const NAME: &str = "haulage.json";
/// The version of its format; another one is refused, not guessed at.
const FORMAT: u32 = 1;
/// The longest file that is read, in bytes.
const MAX_SIZE: u64 = 4 << 20;

/// Beside the images.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Companion {
    format: u32,
    /// Cgroups are not in the images.
    pub cgroups_ignored: bool,
    /// Those that are external to the images. The key of each is its place here.
    pub tmpfs: Vec<SmallTmpfs>,
}

impl Companion {
    /// Of the present format.
    pub fn new(cgroups_ignored: bool, tmpfs: Vec<SmallTmpfs>) -> Self {
        Self { format: FORMAT, cgroups_ignored, tmpfs }
    }

    /// What the images call the tmpfs at `index`.
    pub(crate) fn key(index: usize) -> String {
        format!("haul-tmpfs-{index}")
    }

    /// # Errors
    /// Of the file system.
    pub(crate) fn write(&self, images: &Path) -> io::Result<()> {
        fs::write(images.join(NAME), serde_json::to_vec(self)?)
    }

    /// Reads that of the images in `images`; `None` where there is none.
    ///
    /// # Errors
    /// `InvalidData` when it is of another format or not understood.
    pub fn read(images: &Path) -> io::Result<Option<Self>> {
        let path = images.join(NAME);
        let file = match File::open(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            file => file?,
        };
        let mut bytes = Vec::new();
        file.take(MAX_SIZE).read_to_end(&mut bytes)?;
        let companion: Self = serde_json::from_slice(&bytes)?;
        if companion.format != FORMAT {
            let message = format!("{NAME} has format {}, and {FORMAT} is understood", companion.format);
            return Err(io::Error::new(ErrorKind::InvalidData, message));
        }
        Ok(Some(companion))
    }

    /// Mounts what the images want in `dir`, in the mount namespace of the calling thread, and returns the lines of a
    /// configuration of CRIU's that say so.
    ///
    /// # Errors
    /// When something cannot be mounted; what was before stays mounted.
    pub fn provide(&self, dir: &Path) -> io::Result<String> {
        let mut lines = String::new();
        if self.cgroups_ignored {
            lines.push_str("manage-cgroups=ignore\n");
        }
        for (index, tmpfs) in self.tmpfs.iter().enumerate() {
            let place: PathBuf = dir.join(Self::key(index));
            match fs::create_dir(&place) {
                Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(error),
                _ => tmpfs.make(&place)?,
            }
            let path = place.to_str().filter(|path| !path.contains(char::is_whitespace));
            let path = path.ok_or_else(|| io::Error::other("a directory that criu cannot be told"))?;
            lines.push_str(&format!("external mnt[{}]:{path}\n", Self::key(index)));
        }
        Ok(lines)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_read_and_another_format_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Companion::read(dir.path()).unwrap(), None);
        let companion = Companion::new(true, Vec::new());
        companion.write(dir.path()).unwrap();
        assert_eq!(Companion::read(dir.path()).unwrap().unwrap(), companion);
        assert_eq!(companion.provide(dir.path()).unwrap(), "manage-cgroups=ignore\n");
        Companion { format: FORMAT + 1, ..companion }.write(dir.path()).unwrap();
        assert_eq!(Companion::read(dir.path()).unwrap_err().kind(), ErrorKind::InvalidData);
        fs::write(dir.path().join(NAME), "{").unwrap();
        assert!(Companion::read(dir.path()).is_err());
    }
}
