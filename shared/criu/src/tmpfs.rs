//! A small tmpfs of a container's, such as `/dev` or a masked directory of `/proc`, carried as a list.
//!
//! CRIU has `tar` and `gzip` pack every tmpfs and unpack it again, which takes some 4 ms each way inside the freeze, and
//! a container has five, most of them empty. One that is small is therefore external to CRIU: its content goes as a
//! list, and the restore finds one that was made from it.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Component, Path, PathBuf};

use haulage_sys::Pid;
use haulage_sys::mount_ns::{all_mounted_alone, let_go};
use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, Timespec, Timestamps, Uid};
use serde::{Deserialize, Serialize};

/// Entries of one that is small.
const MAX_ENTRIES: usize = 512;
/// Bytes of files in one that is small.
const MAX_CONTENT: u64 = 16 << 10;
/// Options of the kernel's own making, or of a security module, which a mount does not take as they are shown.
const NOT_SETTABLE: [&str; 5] = ["seclabel", "context=", "fscontext=", "defcontext=", "rootcontext="];

/// What is in it, and how it is mounted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SmallTmpfs {
    /// Where it is in the container.
    pub at: PathBuf,
    /// May nothing be written to the file system, whatever its mounts say?
    read_only: bool,
    /// Its options but for that, such as `size=65536k,mode=755`.
    options: String,
    /// The root first, and each directory before what is in it.
    entries: Vec<Entry>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    /// Below the root.
    path: PathBuf,
    content: Content,
    /// The permission bits.
    mode: u32,
    owner: u32,
    group: u32,
    /// Seconds and nanoseconds of the last change of the content.
    modified: (i64, i64),
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
enum Content {
    Directory,
    File(Vec<u8>),
    Link(PathBuf),
    CharacterDevice(u64),
    BlockDevice(u64),
    Pipe,
}

impl SmallTmpfs {
    /// Reads those of the tmpfs mounts of process `pid`, which must stand still, that are small; each of `mounts` is a
    /// destination and the options. Others have what a list cannot hold, or not well: much, hard links, sockets, extended
    /// attributes.
    ///
    /// # Errors
    /// When one cannot be read.
    pub fn read(pid: Pid, mounts: &[(PathBuf, String)]) -> io::Result<Vec<Self>> {
        let settable = |options: &str| {
            !options.split(',').any(|option| NOT_SETTABLE.iter().any(|not| option.starts_with(not)))
        };
        let mounts: Vec<_> = mounts.iter().filter(|(_, options)| settable(options)).collect();
        if mounts.is_empty() {
            return Ok(Vec::new());
        }
        let roots = all_mounted_alone(pid, mounts.iter().map(|(at, _)| at.as_path()))?;
        let read = |(root, (at, options)): (&OwnedFd, &&(PathBuf, String))| {
            Ok(read_tree(root)?.map(|entries| Self::of(at, options, entries)))
        };
        let read = roots.iter().zip(&mounts).map(read).filter_map(io::Result::transpose).collect();
        let_go(roots);
        read
    }

    fn of(at: &Path, options: &str, entries: Vec<Entry>) -> Self {
        let settable: Vec<&str> =
            options.split(',').filter(|option| !matches!(*option, "rw" | "ro")).collect();
        Self {
            at: at.to_owned(),
            read_only: options.split(',').any(|option| option == "ro"),
            options: settable.join(","),
            entries,
        }
    }

    /// Mounts one like it at `place`, an empty directory.
    ///
    /// # Errors
    /// When it cannot be mounted or filled, or leads out of itself; something may be mounted then.
    pub fn make(&self, place: &Path) -> io::Result<()> {
        use rustix::mount::{MountFlags, mount, mount_remount};
        let options = std::ffi::CString::new(self.options.as_str())?;
        mount("tmpfs", place, "tmpfs", MountFlags::empty(), options.as_c_str())?;
        let mut directories = BTreeSet::new();
        for entry in &self.entries {
            // Nothing is made through a link, or outside.
            if entry.path.parent().is_some_and(|parent| !directories.contains(parent)) {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "an entry without its directory"));
            }
            entry.make(place)?;
            if entry.content == Content::Directory {
                directories.insert(entry.path.as_path());
            }
        }
        // From the inside out: what is made in a directory changes its time.
        for entry in self.entries.iter().rev() {
            entry.stamp(place)?;
        }
        if self.read_only {
            mount_remount(place, MountFlags::RDONLY, c"")?;
        }
        Ok(())
    }
}

fn read_tree(root: &OwnedFd) -> io::Result<Option<Vec<Entry>>> {
    let base = PathBuf::from(format!("/proc/self/fd/{}", root.as_raw_fd()));
    let mut entries = Vec::new();
    let mut room = MAX_CONTENT;
    let mut todo = vec![PathBuf::new()];
    while let Some(path) = todo.pop() {
        if entries.len() >= MAX_ENTRIES {
            return Ok(None);
        }
        // The root is a link of /proc that must be followed; what is in it must not be.
        let whole = if path.as_os_str().is_empty() { base.join(".") } else { base.join(&path) };
        let Some(entry) = Entry::read(&whole, path, &mut room)? else { return Ok(None) };
        if entry.content == Content::Directory {
            for inside in fs::read_dir(&whole)? {
                todo.push(entry.path.join(inside?.file_name()));
            }
        }
        entries.push(entry);
    }
    Ok(Some(entries))
}

impl Entry {
    fn read(whole: &Path, path: PathBuf, room: &mut u64) -> io::Result<Option<Self>> {
        let is = fs::symlink_metadata(whole)?;
        if rustix::fs::llistxattr_query(whole)? > 0 || (!is.is_dir() && is.nlink() > 1) {
            return Ok(None);
        }
        let kind = is.file_type();
        let content = if kind.is_dir() {
            Content::Directory
        } else if kind.is_symlink() {
            Content::Link(fs::read_link(whole)?)
        } else if kind.is_char_device() {
            Content::CharacterDevice(is.rdev())
        } else if kind.is_block_device() {
            Content::BlockDevice(is.rdev())
        } else if kind.is_fifo() {
            Content::Pipe
        } else if kind.is_file() && is.len() <= *room {
            *room -= is.len();
            let mut bytes = Vec::new();
            // It was looked at just before, and nobody can have put a link in its place: the process stands still.
            File::open(whole)?.take(MAX_CONTENT).read_to_end(&mut bytes)?;
            Content::File(bytes)
        } else {
            return Ok(None);
        };
        Ok(Some(Self {
            path,
            content,
            mode: is.permissions().mode() & 0o7777,
            owner: is.uid(),
            group: is.gid(),
            modified: (is.mtime(), is.mtime_nsec()),
        }))
    }

    /// Where it goes; a list that leads out of its own root is refused.
    fn place(&self, root: &Path) -> io::Result<PathBuf> {
        if self.path.components().any(|part| !matches!(part, Component::Normal(_))) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a path that leads out of the tmpfs"));
        }
        Ok(root.join(&self.path))
    }

    fn make(&self, root: &Path) -> io::Result<()> {
        let place = self.place(root)?;
        let device = |kind, number| rustix::fs::mknodat(CWD, &place, kind, Mode::from(0o600), number);
        match &self.content {
            Content::Directory if self.path.as_os_str().is_empty() => {}
            Content::Directory => fs::create_dir(&place)?,
            Content::File(bytes) => io::Write::write_all(&mut File::create_new(&place)?, bytes)?,
            Content::Link(to) => std::os::unix::fs::symlink(to, &place)?,
            Content::CharacterDevice(number) => device(FileType::CharacterDevice, *number)?,
            Content::BlockDevice(number) => device(FileType::BlockDevice, *number)?,
            Content::Pipe => device(FileType::Fifo, 0)?,
        }
        // The owner first: changing it takes away bits of the mode.
        let (owner, group) = (Uid::from_raw(self.owner), Gid::from_raw(self.group));
        rustix::fs::chownat(CWD, &place, Some(owner), Some(group), AtFlags::SYMLINK_NOFOLLOW)?;
        match self.content {
            Content::Link(_) => Ok(()),
            _ => fs::set_permissions(&place, fs::Permissions::from_mode(self.mode)),
        }
    }

    fn stamp(&self, root: &Path) -> io::Result<()> {
        let time = Timespec { tv_sec: self.modified.0, tv_nsec: self.modified.1 };
        let times = Timestamps { last_access: time, last_modification: time };
        Ok(rustix::fs::utimensat(CWD, self.place(root)?, &times, AtFlags::SYMLINK_NOFOLLOW)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use haulage_sys::mount_ns::mounted_alone;
    use std::process::{Child, Command, Stdio};

    /// A process with mounts of its own, killed on drop.
    struct Mounter(Child);

    impl Mounter {
        fn start(script: &str) -> Self {
            let script = format!("{script} && echo ready && exec sleep 60");
            let mut child = Command::new("unshare")
                .args(["-m", "sh", "-ec", &script])
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let mut ready = [0; 6];
            child.stdout.as_mut().unwrap().read_exact(&mut ready).unwrap();
            Self(child)
        }

        fn read(&self, options: &str) -> Option<SmallTmpfs> {
            let mounts = [(PathBuf::from("/mnt"), options.to_owned())];
            SmallTmpfs::read(Pid::from_child(&self.0), &mounts).unwrap().pop()
        }
    }

    impl Drop for Mounter {
        fn drop(&mut self) {
            self.0.kill().unwrap();
            self.0.wait().unwrap();
        }
    }

    #[test]
    fn what_is_made_is_what_was_read() {
        let source = Mounter::start(
            "mount -t tmpfs -o size=64k,mode=751 t /mnt && cd /mnt && mkdir -m 1777 in && mknod -m 666 null c 1 3 && \
             mkfifo pipe && ln -s in/file link && echo text > in/file && chown 7:8 in/file && chmod 4755 in/file && \
             mkdir sub && mount -t tmpfs t sub && echo hidden > sub/hidden && touch -d @1000000000 in",
        );
        let read = source.read("rw,size=64k,mode=751").unwrap();
        let place = tempfile::tempdir().unwrap();
        read.make(place.path()).unwrap();
        let again = mounted_alone(rustix::process::getpid(), place.path()).map(|root| read_tree(&root));
        let null = fs::metadata(place.path().join("null")).unwrap().rdev();
        rustix::mount::unmount(place.path(), rustix::mount::UnmountFlags::empty()).unwrap();
        let sorted = |mut entries: Vec<Entry>| {
            entries.sort_by(|a, b| a.path.cmp(&b.path));
            entries
        };
        let again = sorted(again.unwrap().unwrap().unwrap());
        assert_eq!(again, sorted(read.entries));
        let paths: Vec<_> = again.iter().map(|entry| entry.path.to_str().unwrap()).collect();
        assert_eq!(paths, ["", "in", "in/file", "link", "null", "pipe", "sub"]);
        assert_eq!(again[1].modified.0, 1_000_000_000);
        assert_eq!((again[2].mode, again[2].owner, again[2].group), (0o4755, 7, 8));
        assert_eq!(null, rustix::fs::makedev(1, 3));
    }

    #[test]
    fn one_that_may_not_be_written_is_so_again() {
        let source = Mounter::start("mount -t tmpfs -o ro t /mnt");
        let place = tempfile::tempdir().unwrap();
        source.read("ro").unwrap().make(place.path()).unwrap();
        let written = fs::write(place.path().join("file"), "").unwrap_err();
        rustix::mount::unmount(place.path(), rustix::mount::UnmountFlags::empty()).unwrap();
        assert_eq!(written.kind(), io::ErrorKind::ReadOnlyFilesystem);
    }

    #[test]
    fn what_a_list_cannot_hold_is_left_to_criu() {
        for content in [
            "echo x > /mnt/a && ln /mnt/a /mnt/b",
            "head -c 20000 /dev/zero > /mnt/large",
            "mkdir $(seq -f /mnt/%g 600)",
        ] {
            let source = Mounter::start(&format!("mount -t tmpfs t /mnt && {content}"));
            assert!(source.read("rw").is_none(), "{content}");
        }
        let labelled = Mounter::start("mount -t tmpfs t /mnt");
        assert!(labelled.read("rw,seclabel").is_none() && labelled.read("rw").is_some());
    }

    #[test]
    fn nothing_is_made_outside() {
        let entry = |path: &str, content| Entry {
            path: path.into(),
            content,
            mode: 0o755,
            owner: 0,
            group: 0,
            modified: (0, 0),
        };
        let outside = tempfile::tempdir().unwrap();
        let root = || entry("", Content::Directory);
        let link = entry("link", Content::Link(outside.path().to_owned()));
        let lists = [
            vec![root(), entry("../x", Content::Directory)],
            vec![root(), entry("/x", Content::Directory)],
            vec![root(), link, entry("link/x", Content::Directory)],
        ];
        for entries in lists {
            let place = tempfile::tempdir().unwrap();
            let list = SmallTmpfs { at: "/x".into(), read_only: false, options: String::new(), entries };
            let made = list.make(place.path());
            rustix::mount::unmount(place.path(), rustix::mount::UnmountFlags::empty()).unwrap();
            assert_eq!(made.unwrap_err().kind(), io::ErrorKind::InvalidData);
            assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
        }
    }
}
