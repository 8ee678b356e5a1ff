//! A tmpfs that is mounted nowhere until somebody takes it.
//!
//! It lives as long as a descriptor of it does, in whatever process, so there is nothing to clean up. Meanwhile it is reached
//! by `/proc/<pid>/fd/<descriptor>`.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::CWD;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, FsPickFlags, MountAttrFlags, MoveMountFlags, fsconfig_create,
    fsconfig_reconfigure, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, fspick, move_mount,
};

/// The option that bounds its content.
const SIZE: &str = "size";
/// The option that bounds the number of its files.
const INODES: &str = "nr_inodes";
/// More inodes than any machine has room for. None at all could not be bounded afterwards.
const NO_BOUND: &str = "1g";
/// Options that can be set as the kernel shows them (`shmem_show_options` of `mm/shmem.c`). Others, such as a memory policy
/// or a security module's label, cannot.
const SETTABLE: [&str; 8] = [SIZE, INODES, "mode", "uid", "gid", "huge", "inode32", "inode64"];

/// Whether [`detached`] can make a tmpfs with these options, as the kernel shows them, such as `rw,size=64k`; one that
/// may not be written to is none that can be filled.
#[must_use]
pub fn is_settable(options: &str) -> bool {
    options.split(',').all(|option| {
        let name = option.split_once('=').map_or(option, |(name, _)| name);
        name == "rw" || SETTABLE.contains(&name)
    })
}

/// Makes an empty tmpfs with these options. While it is filled it is not bounded by them, since what is copied from a
/// tree in motion may be more than that has at any moment; [`attach`] sets the bounds.
///
/// # Errors
/// `InvalidInput` if the options are not settable; what the kernel says of them; for want of `CAP_SYS_ADMIN`.
pub fn detached(options: &str) -> io::Result<OwnedFd> {
    if !is_settable(options) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("cannot set all of {options}")));
    }
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&context, "source", "tmpfs")?;
    for option in options.split(',').filter(|option| *option != "rw") {
        match option.split_once('=') {
            Some((SIZE, _)) => fsconfig_set_string(&context, SIZE, "100%")?,
            Some((INODES, _)) => fsconfig_set_string(&context, INODES, NO_BOUND)?,
            Some((name, value)) => fsconfig_set_string(&context, name, value)?,
            None => fsconfig_set_flag(&context, option)?,
        }
    }
    fsconfig_create(&context)?;
    Ok(fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?)
}

/// Mounts it at `place`, a directory, and bounds it as its options say. It can be mounted once.
///
/// # Errors
/// When it holds more than that, is mounted already, or for want of `CAP_SYS_ADMIN`.
pub fn attach(tmpfs: &OwnedFd, place: &Path, options: &str) -> io::Result<()> {
    move_mount(tmpfs, "", CWD, place, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    let options = options.split(',').filter_map(|option| option.split_once('='));
    let bounds: Vec<_> = options.filter(|(name, _)| [SIZE, INODES].contains(name)).collect();
    if bounds.is_empty() {
        return Ok(());
    }
    let context = fspick(CWD, place, FsPickFlags::FSPICK_CLOEXEC)?;
    for (name, bound) in bounds {
        fsconfig_set_string(&context, name, bound)?;
    }
    Ok(fsconfig_reconfigure(&context)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::fd::AsRawFd;

    use rustix::fs::{Mode, OFlags, open};
    use rustix::mount::{UnmountFlags, unmount};

    #[test]
    fn options_that_cannot_be_set_are_known() {
        for options in ["rw", "rw,size=65536k", "rw,nosuid", "ro", "rw,mpol=bind:0,1", "rw,seclabel"] {
            assert_eq!(is_settable(options), matches!(options, "rw" | "rw,size=65536k"), "{options}");
        }
        assert_eq!(detached("rw,seclabel").unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn one_is_filled_by_its_descriptor_and_mounted_by_another() {
        let options = "rw,size=64k,mode=751,uid=7,inode64";
        let tmpfs = detached(options).unwrap();
        let inside = format!("/proc/self/fd/{}/file", tmpfs.as_raw_fd());
        // More than it may hold in the end.
        fs::write(&inside, vec![7; 100 << 10]).unwrap();
        fs::write(&inside, "content").unwrap();
        let by_path = format!("/proc/{}/fd/{}", std::process::id(), tmpfs.as_raw_fd());
        let other = open(by_path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
        let place = tempfile::tempdir().unwrap();
        attach(&other, place.path(), options).unwrap();
        let read = fs::read(place.path().join("file"));
        let full = fs::write(place.path().join("large"), vec![7; 100 << 10]);
        let again = attach(&other, place.path(), options);
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
        drop((tmpfs, other));
        let stays = fs::read(place.path().join("file"));
        unmount(place.path(), UnmountFlags::empty()).unwrap();
        assert_eq!(read.unwrap(), b"content");
        assert_eq!(stays.unwrap(), b"content");
        assert_eq!(full.unwrap_err().kind(), io::ErrorKind::StorageFull);
        assert!(again.is_err());
        let line = table.lines().find(|line| line.contains(place.path().to_str().unwrap())).unwrap();
        assert!(line.contains("size=64k") && line.contains("mode=751") && line.contains("uid=7"), "{line}");
    }

    #[test]
    fn what_does_not_fit_is_told() {
        let tmpfs = detached("rw,size=64k").unwrap();
        fs::write(format!("/proc/self/fd/{}/file", tmpfs.as_raw_fd()), vec![7; 100 << 10]).unwrap();
        let place = tempfile::tempdir().unwrap();
        let attached = attach(&tmpfs, place.path(), "rw,size=64k");
        drop(tmpfs);
        unmount(place.path(), UnmountFlags::empty()).unwrap();
        assert!(attached.is_err());
    }
}
