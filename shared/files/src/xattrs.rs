//! Extended attributes, of any kind of entry, and which of them belong to the host.
//!
//! Entries are named by a directory's descriptor and a name in it, and reached through `/proc/self/fd`, which
//! follows nothing on the way and works for symbolic links and devices too.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::fs::{XattrFlags, lgetxattr, llistxattr, llistxattr_query, lremovexattr, lsetxattr};
use rustix::io::Errno;

use crate::entry::Xattr;

/// The most bytes of names and values together that one entry may have: 1 MiB. (ext4 takes 64 KiB at most.)
pub const MAX_TOTAL_BYTES: usize = 1 << 20;

/// What the kernel allows for a list of names and for one value.
const MAX_LIST_BYTES: usize = 64 << 10;
const MAX_VALUE_BYTES: usize = 64 << 10;

/// Whether an attribute means something on this host only, and so is neither copied nor removed.
///
/// The overlay's `origin`, `nlink`, `upper`, `uuid` and `impure` hold file handles, counts and identities of this
/// host's file system; the kernel does without them. `opaque`, `redirect`, `metacopy`, `whiteout` and the like name
/// things by path and are part of the tree. SELinux labels are given by the target's engine, and `security.evm` is
/// signed with a key of the host.
pub fn is_host_local(name: &[u8]) -> bool {
    let overlay = name.strip_prefix(b"trusted.overlay.").or_else(|| name.strip_prefix(b"user.overlay."));
    match overlay {
        Some(mark) => matches!(mark, b"origin" | b"nlink" | b"upper" | b"uuid" | b"impure"),
        None => matches!(name, b"security.selinux" | b"security.evm"),
    }
}

/// The attributes of `name` in `dir` that are copied, sorted; empty where the file system has none.
///
/// # Errors
/// The system's; [`io::ErrorKind::FileTooLarge`] over [`MAX_TOTAL_BYTES`].
pub fn read(dir: BorrowedFd<'_>, name: &CStr) -> io::Result<Vec<Xattr>> {
    let path = proc_path(dir, name)?;
    let mut xattrs = Vec::new();
    let mut total = 0;
    for name in list(&path)? {
        let Some(value) = value(&path, &name)? else { continue };
        total += name.as_bytes().len() + value.len();
        if total > MAX_TOTAL_BYTES {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        xattrs.push(Xattr { name: name.into_bytes(), value });
    }
    xattrs.sort_unstable();
    Ok(xattrs)
}

/// Removes every attribute of `name` in `dir` that is not in `wanted`, but for the host's own.
///
/// # Errors
/// The system's.
pub fn remove_others(dir: BorrowedFd<'_>, name: &CStr, wanted: &[Xattr]) -> io::Result<()> {
    let path = proc_path(dir, name)?;
    for name in list(&path)? {
        if wanted.iter().any(|x| x.name == name.as_bytes()) {
            continue;
        }
        match lremovexattr(path.as_c_str(), name.as_c_str()) {
            Ok(()) | Err(Errno::NODATA) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Sets these attributes of `name` in `dir`, in their order. Those that belong to the host are passed over.
///
/// # Errors
/// The system's, [`io::ErrorKind::InvalidInput`] for a name with a NUL.
pub fn write(dir: BorrowedFd<'_>, name: &CStr, xattrs: &[Xattr]) -> io::Result<()> {
    if xattrs.is_empty() {
        return Ok(());
    }
    let path = proc_path(dir, name)?;
    for xattr in xattrs.iter().filter(|x| !is_host_local(&x.name)) {
        let name = CString::new(xattr.name.as_slice())?;
        lsetxattr(path.as_c_str(), name.as_c_str(), &xattr.value, XattrFlags::empty())?;
    }
    Ok(())
}

fn proc_path(dir: BorrowedFd<'_>, name: &CStr) -> io::Result<CString> {
    let mut path = format!("/proc/self/fd/{}/", dir.as_raw_fd()).into_bytes();
    path.extend_from_slice(name.to_bytes());
    Ok(CString::new(path)?)
}

/// The names that are copied.
fn list(path: &CStr) -> io::Result<Vec<CString>> {
    // Most entries have none, and then one call tells.
    let names = match llistxattr_query(path) {
        Ok(0) | Err(Errno::NOTSUP) => return Ok(Vec::new()),
        Ok(_) => {
            let mut names = vec![0_u8; MAX_LIST_BYTES];
            let length = llistxattr(path, names.as_mut_slice())?;
            names.truncate(length);
            names
        }
        Err(error) => return Err(error.into()),
    };
    names
        .split(|b| *b == 0)
        .filter(|name| !name.is_empty() && !is_host_local(name))
        .map(|name| Ok(CString::new(name)?))
        .collect()
}

/// One value; `None` when the attribute vanished since it was listed.
fn value(path: &CStr, name: &CStr) -> io::Result<Option<Vec<u8>>> {
    let mut value = vec![0_u8; 256];
    loop {
        match lgetxattr(path, name, value.as_mut_slice()) {
            Ok(length) => {
                value.truncate(length);
                return Ok(Some(value));
            }
            Err(Errno::NODATA) => return Ok(None),
            Err(Errno::RANGE) if value.len() < MAX_VALUE_BYTES => value.resize(MAX_VALUE_BYTES, 0),
            Err(error) => return Err(error.into()),
        }
    }
}
