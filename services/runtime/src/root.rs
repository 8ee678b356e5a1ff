//! The container's root file system, taken off as soon as the engine has mounted it, and put on again when all its files
//! are there: an overlay beneath which files are written may keep what it saw before
//! (`Documentation/filesystems/overlayfs.rst`, "Changes to underlying filesystems").

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, fstat, stat};
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount,
    mount_bind_recursive, mount_change, move_mount, open_tree, unmount,
};

/// An overlay, as `/proc/self/mountinfo` tells of it.
#[derive(Debug, PartialEq)]
struct Overlay {
    source: Vec<u8>,
    flags: Vec<String>,
    options: Vec<u8>,
}

/// A root that is taken off, and what it takes to put it on again.
#[derive(Debug)]
pub(crate) struct Root {
    at: PathBuf,
    /// `None` where it is no overlay, and stays as it is.
    overlay: Option<Overlay>,
    /// Where runc shows it to CRIU, a bind of it.
    bind: Option<PathBuf>,
}

impl Root {
    /// Unmounts the overlay at `at`, and its bind. That writes out the file system beneath, which may take long.
    ///
    /// # Errors
    /// When it is in use.
    pub(crate) fn take_off(at: &Path, bind: Option<PathBuf>) -> io::Result<Self> {
        let overlay = find(&fs::read("/proc/self/mountinfo")?, at);
        let bind = bind.filter(|bind| bind != at);
        if overlay.is_some() {
            if let Some(bind) = &bind {
                unmount(bind, UnmountFlags::NOFOLLOW)?;
            }
            unmount(at, UnmountFlags::NOFOLLOW)?;
        }
        Ok(Self { at: at.to_owned(), overlay, bind })
    }

    /// Mounts it as it was, with what the directories beneath have by now.
    ///
    /// # Errors
    /// When it cannot be mounted: then nothing is mounted there.
    pub(crate) fn put_on(&self) -> io::Result<()> {
        let Some(overlay) = &self.overlay else { return Ok(()) };
        let flags = overlay.flags()?;
        let options = CString::new(overlay.options.clone())?;
        // Docker gives many layers by paths relative to the directory of all layers, two above the mount.
        if overlay.is_relative()
            && let Some(layers) = self.at.parent().and_then(Path::parent)
        {
            std::env::set_current_dir(layers)?;
        }
        mount(overlay.source.as_slice(), &self.at, "overlay", flags, options.as_c_str())?;
        match &self.bind {
            Some(bind) => Ok(mount_bind_recursive(&self.at, bind)?),
            None => Ok(()),
        }
    }

    /// Copies of what is on again; none where nothing was taken off.
    ///
    /// # Errors
    /// When it is not mounted.
    pub(crate) fn copies(&self) -> io::Result<Copies> {
        let places = self.overlay.iter().flat_map(|_| std::iter::once(&self.at).chain(&self.bind));
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let copies = places.map(|place| Ok((place.clone(), open_tree(CWD, place, flags)?)));
        Ok(Copies(copies.collect::<io::Result<_>>()?))
    }
}

/// What [`Root::put_on`] has mounted, for another mount namespace: copies that are mounted nowhere yet, and their places.
#[derive(Debug)]
pub(crate) struct Copies(Vec<(PathBuf, OwnedFd)>);

impl Copies {
    /// Mounts them in the mount namespace of the calling thread, where the root is not to be seen: what the host mounts
    /// reaches it only where it is shared.
    ///
    /// # Errors
    /// When one cannot be mounted; what was before stays mounted.
    pub(crate) fn show(&self) -> io::Result<()> {
        for (place, copy) in &self.0 {
            // An overlay has a device number of its own.
            if stat(place)?.st_dev == fstat(copy)?.st_dev {
                continue;
            }
            move_mount(copy, "", CWD, place, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
            // Nothing that is mounted in it goes back to the host.
            mount_change(place, MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)?;
        }
        Ok(())
    }
}

impl Overlay {
    fn flags(&self) -> io::Result<MountFlags> {
        self.flags.iter().try_fold(MountFlags::empty(), |flags, name| {
            Ok(flags
                | match name.as_str() {
                    "rw" | "relatime" => MountFlags::empty(),
                    "ro" => MountFlags::RDONLY,
                    "nosuid" => MountFlags::NOSUID,
                    "nodev" => MountFlags::NODEV,
                    "noexec" => MountFlags::NOEXEC,
                    "noatime" => MountFlags::NOATIME,
                    "nodiratime" => MountFlags::NODIRATIME,
                    other => return Err(io::Error::other(format!("the root is mounted with {other}"))),
                })
        })
    }

    fn is_relative(&self) -> bool {
        let mut options = self.options.split(|byte| *byte == b',');
        options.any(|option| option.strip_prefix(b"lowerdir=").is_some_and(|dirs| !dirs.starts_with(b"/")))
    }
}

/// The topmost overlay that is mounted at `root`.
fn find(table: &[u8], root: &Path) -> Option<Overlay> {
    table.split(|byte| *byte == b'\n').rev().find_map(|line| overlay_at(line, root))
}

/// Fields as in proc_pid_mountinfo(5): after the mount point and its options come optional fields, then a dash, the
/// type, the source and the options of the file system.
fn overlay_at(line: &[u8], root: &Path) -> Option<Overlay> {
    let mut fields = line.split(|byte| *byte == b' ');
    if unescape(fields.nth(4)?) != root.as_os_str().as_bytes() {
        return None;
    }
    let flags = String::from_utf8(fields.next()?.to_vec()).ok()?;
    let mut rest = fields.skip_while(|field| *field != b"-").skip(1);
    if rest.next()? != b"overlay" {
        return None;
    }
    let (source, options) = (unescape(rest.next()?), unescape(rest.next()?));
    let flags = flags.split(',').map(ToOwned::to_owned).collect();
    Some(Overlay { source, flags, options: without_read_only(&options) })
}

/// `rw` and `ro` among them say what the flags say.
fn without_read_only(options: &[u8]) -> Vec<u8> {
    let kept: Vec<&[u8]> =
        options.split(|byte| *byte == b',').filter(|option| *option != b"rw" && *option != b"ro").collect();
    kept.join(&b","[..])
}

/// The kernel writes space, tab, newline and backslash as three octal digits.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((byte, after)) = rest.split_first() {
        let escaped =
            after.get(..3).filter(|_| *byte == b'\\').and_then(|digits| std::str::from_utf8(digits).ok());
        match escaped.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(value) => {
                out.push(value);
                rest = after.get(3..).unwrap_or_default();
            }
            None => {
                out.push(*byte);
                rest = after;
            }
        }
    }
    out
}

/// The root of the container whose bundle is in `bundle`.
///
/// # Errors
/// When the bundle cannot be read, or names none.
pub(crate) fn of(bundle: &Path) -> io::Result<PathBuf> {
    let config: serde_json::Value = serde_json::from_slice(&fs::read(bundle.join("config.json"))?)?;
    let path = config.get("root").and_then(|root| root.get("path")).and_then(serde_json::Value::as_str);
    let path = path.ok_or_else(|| io::Error::other("the bundle names no root"))?;
    Ok(bundle.join(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_overlay_is_found_among_other_mounts() {
        let table = b"29 1 0:25 / /run rw - tmpfs tmpfs rw\n\
            700 29 0:55 / /var/lib/my\\040docker/merged rw,relatime shared:3 - overlay overlay rw,lowerdir=l/A:l/B,upperdir=/u\\040p,workdir=/w\n\
            701 29 0:56 / /other rw - ext4 /dev/vda rw\n";
        let found = find(table, Path::new("/var/lib/my docker/merged")).unwrap();
        assert_eq!(found.options, b"lowerdir=l/A:l/B,upperdir=/u p,workdir=/w");
        assert!(found.is_relative());
        assert!(found.flags().unwrap().is_empty());
        assert_eq!(find(table, Path::new("/other")), None);
        assert_eq!(find(table, Path::new("/none")), None);
    }

    #[test]
    fn what_was_changed_beneath_is_seen_when_it_is_on_again() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let part = |name: &str| {
            let path = dir.path().join(name);
            fs::create_dir(&path).unwrap();
            path
        };
        let (lower, upper, work, merged) = (part("lower"), part("upper"), part("work"), part("merged"));
        fs::write(lower.join("kept"), "lower").unwrap();
        let options =
            format!("lowerdir={},upperdir={},workdir={}", lower.display(), upper.display(), work.display());
        let options = CString::new(options).unwrap();
        mount("overlay", &merged, "overlay", MountFlags::NOSUID, options.as_c_str()).unwrap();
        // The overlay has seen what is there and what is not.
        assert!(fs::metadata(merged.join("late")).is_err());
        assert_eq!(fs::read_dir(&merged).unwrap().count(), 1);
        let bind = part("bind");
        mount_bind_recursive(&merged, &bind).unwrap();
        let root = Root::take_off(&merged, Some(bind.clone())).unwrap();
        assert_eq!(fs::read_dir(&merged).unwrap().count() + fs::read_dir(&bind).unwrap().count(), 0);
        fs::write(upper.join("late"), "upper").unwrap();
        fs::write(upper.join("kept"), "upper").unwrap();
        root.put_on().unwrap();
        assert_eq!(fs::read_to_string(bind.join("late")).unwrap(), "upper");
        unmount(&bind, UnmountFlags::empty()).unwrap();
        let read = |name: &str| fs::read_to_string(merged.join(name)).unwrap();
        let seen = (read("late"), read("kept"), fs::read_dir(&merged).unwrap().count());
        let table = fs::read("/proc/self/mountinfo").unwrap();
        let flags = find(&table, &merged).unwrap().flags().unwrap();
        unmount(&merged, UnmountFlags::empty()).unwrap();
        assert_eq!(seen, ("upper".to_owned(), "upper".to_owned(), 2));
        assert_eq!(flags, MountFlags::NOSUID);
        let nothing = Root::take_off(&merged, Some(bind)).unwrap();
        nothing.put_on().unwrap();
    }
}
