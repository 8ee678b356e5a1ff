//! What a restore must be told beside the images, in a file among them.
//!
//! ```text
//!   Dump::start ── haulage.json ──▶ (with the images) ──▶ Companion::configure ── lines of CRIU's configuration ──▶ CRIU
//! ```

use std::fs::{self, File};
use std::io::{self, ErrorKind, Read};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use haulage_sys::tmpfs;
use serde::{Deserialize, Serialize};

use crate::tmpfs::SmallTmpfs;

/// The name of the file.
const NAME: &str = "haulage.json";
/// The version of its format; another one is refused, not guessed at.
const FORMAT: u32 = 2;
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
    /// Those that are external too, and whose files come another way. The key of each is its place here.
    pub carried: Vec<CarriedTmpfs>,
}

/// A tmpfs whose files are not beside the images: whoever restores has to have it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CarriedTmpfs {
    /// Where it is in the container.
    pub at: PathBuf,
    /// Its options as the kernel shows them.
    pub options: String,
}

impl Companion {
    /// Of the present format.
    pub fn new(cgroups_ignored: bool, tmpfs: Vec<SmallTmpfs>, carried: Vec<CarriedTmpfs>) -> Self {
        Self { format: FORMAT, cgroups_ignored, tmpfs, carried }
    }

    /// Where each tmpfs is in the container, and what the images call it.
    pub(crate) fn keys(&self) -> impl Iterator<Item = (&Path, String)> {
        let small =
            self.tmpfs.iter().enumerate().map(|(index, tmpfs)| (tmpfs.at.as_path(), small_key(index)));
        let carried = self.carried.iter().enumerate();
        small.chain(carried.map(|(index, tmpfs)| (tmpfs.at.as_path(), carried_key(index))))
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
    /// configuration of CRIU's that say so. `carried` are the filled ones, in the order of [`Companion::carried`].
    ///
    /// # Errors
    /// When something cannot be mounted, or is not there; what was before stays mounted.
    pub fn provide(&self, dir: &Path, carried: &[OwnedFd]) -> io::Result<String> {
        if carried.len() != self.carried.len() {
            let (wanted, came) = (self.carried.len(), carried.len());
            return Err(io::Error::other(format!(
                "the images want {wanted} filled tmpfs, and there are {came}"
            )));
        }
        let mut lines = String::new();
        if self.cgroups_ignored {
            lines.push_str("manage-cgroups=ignore\n");
        }
        for (index, tmpfs) in self.tmpfs.iter().enumerate() {
            let (place, line) = place(dir, &small_key(index))?;
            tmpfs.make(&place)?;
            lines.push_str(&line);
        }
        for (index, (filled, tmpfs)) in carried.iter().zip(&self.carried).enumerate() {
            let (place, line) = place(dir, &carried_key(index))?;
            tmpfs::attach(filled, &place, &tmpfs.options)?;
            lines.push_str(&line);
        }
        Ok(lines)
    }
}

fn small_key(index: usize) -> String {
    format!("haul-tmpfs-{index}")
}

fn carried_key(index: usize) -> String {
    format!("haul-carried-{index}")
}

/// The directory in which the tmpfs called `key` is to be mounted, and the line that tells CRIU of it.
fn place(dir: &Path, key: &str) -> io::Result<(PathBuf, String)> {
    let place = dir.join(key);
    match fs::create_dir(&place) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let path = place.to_str().filter(|path| !path.contains(char::is_whitespace));
    let path = path.ok_or_else(|| io::Error::other("a directory that criu cannot be told"))?;
    let line = format!("external mnt[{key}]:{path}\n");
    Ok((place, line))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filled_ones_are_mounted_and_named() {
        use std::os::fd::AsRawFd;
        let dir = tempfile::tempdir().unwrap();
        let options = "rw,size=64k".to_owned();
        let filled = tmpfs::detached(&options).unwrap();
        fs::write(format!("/proc/self/fd/{}/file", filled.as_raw_fd()), "content").unwrap();
        let carried = vec![CarriedTmpfs { at: "/dev/shm".into(), options }];
        let companion = Companion::new(false, Vec::new(), carried);
        let key = "haul-carried-0";
        let place = dir.path().join(key);
        let lines = companion.provide(dir.path(), &[filled]);
        let read = fs::read(place.join("file"));
        rustix::mount::unmount(&place, rustix::mount::UnmountFlags::empty()).unwrap();
        assert_eq!(lines.unwrap(), format!("external mnt[{key}]:{}\n", place.display()));
        assert_eq!(read.unwrap(), b"content");
        assert_eq!(companion.keys().collect::<Vec<_>>(), [(Path::new("/dev/shm"), key.to_owned())]);
    }

    #[test]
    fn what_was_written_is_read_and_another_format_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Companion::read(dir.path()).unwrap(), None);
        let companion = Companion::new(true, Vec::new(), Vec::new());
        companion.write(dir.path()).unwrap();
        assert_eq!(Companion::read(dir.path()).unwrap().unwrap(), companion);
        assert_eq!(companion.provide(dir.path(), &[]).unwrap(), "manage-cgroups=ignore\n");
        let carried = vec![CarriedTmpfs { at: "/dev/shm".into(), options: "rw".to_owned() }];
        let wants = Companion { carried, ..companion.clone() };
        assert!(wants.provide(dir.path(), &[]).is_err(), "what the images want has not come");
        Companion { format: FORMAT + 1, ..companion }.write(dir.path()).unwrap();
        assert_eq!(Companion::read(dir.path()).unwrap_err().kind(), ErrorKind::InvalidData);
        fs::write(dir.path().join(NAME), "{").unwrap();
        assert!(Companion::read(dir.path()).is_err());
    }
}
