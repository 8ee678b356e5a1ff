//! System V shared memory.

use std::fs::File;
use std::io;

use super::{Permissions, Row, next_id, outcome, table};
use crate::abi::PAGE_SIZE;

/// Of a mode: it is gone when nobody has it attached any more (`SHM_DEST`).
pub const DESTROYED: u32 = 0o1000;
/// Of a mode: it is kept in memory (`SHM_LOCKED`).
pub const LOCKED: u32 = 0o2000;

/// A segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Its id.
    pub id: i32,
    /// Its key.
    pub key: i32,
    /// Its length in bytes, which need not be one of pages.
    pub size: u64,
    /// Who may attach it, and [`DESTROYED`] and [`LOCKED`].
    pub permissions: Permissions,
    /// How many mappings there are of it.
    pub attached: u64,
}

impl Segment {
    fn of(row: &Row) -> io::Result<Self> {
        Ok(Self {
            id: row.number(1)?,
            key: row.number(0)?,
            size: row.number(3)?,
            permissions: row.permissions(2, 7, 8)?,
            attached: row.number(6)?,
        })
    }
}

/// All segments of the calling thread's namespace.
///
/// # Errors
/// When `/proc` does not tell.
pub fn segments() -> io::Result<Vec<Segment>> {
    table("shm")?.iter().map(Segment::of).collect()
}

/// Makes a segment that everybody may attach, until [`set_segment`], in the calling thread's namespace, and opens its
/// memory for reading and writing. That exists as long as this or the segment does.
///
/// # Errors
/// When there is one of that id or key, or it is larger than may be. Nothing is left then.
pub fn make_segment(id: i32, key: i32, size: u64) -> io::Result<File> {
    next_id("shm", id)?;
    let length = usize::try_from(size).map_err(io::Error::other)?;
    let flags = libc::IPC_CREAT | libc::IPC_EXCL | 0o777;
    // SAFETY: plain numbers are passed.
    let made = outcome(unsafe { libc::shmget(key, length, flags) })?;
    let opened = match made == id {
        true => memory_of(id, size),
        false => Err(io::Error::other(format!("the kernel has made segment {made} instead of {id}"))),
    };
    if opened.is_err() {
        // Nothing more can be done about it.
        let _ = remove_segment(made);
    }
    opened
}

/// The memory of a segment as a file, which attaching it shows.
fn memory_of(id: i32, size: u64) -> io::Result<File> {
    // SAFETY: the kernel chooses the address, where nothing else is.
    let at = unsafe { libc::shmat(id, std::ptr::null(), 0) };
    if at.addr() == usize::MAX {
        return Err(io::Error::last_os_error());
    }
    let (start, length) = (at.addr() as u64, size.next_multiple_of(PAGE_SIZE));
    let link = format!("/proc/self/map_files/{start:x}-{:x}", start + length);
    let opened = File::options().read(true).write(true).open(link);
    // SAFETY: it was attached there just now, and nobody else knows of it.
    outcome(unsafe { libc::shmdt(at) })?;
    opened
}

/// Sets who may attach a segment.
///
/// # Errors
/// When there is none.
pub fn set_segment(id: i32, permissions: Permissions) -> io::Result<()> {
    let mut about = std::mem::MaybeUninit::<libc::shmid_ds>::zeroed();
    // SAFETY: IPC_STAT writes one `shmid_ds`, for which there is room.
    outcome(unsafe { libc::shmctl(id, libc::IPC_STAT, about.as_mut_ptr()) })?;
    // SAFETY: it was written to, and zeros are one too.
    let mut about = unsafe { about.assume_init() };
    permissions.put_into(&mut about.shm_perm);
    // SAFETY: IPC_SET reads one `shmid_ds`.
    outcome(unsafe { libc::shmctl(id, libc::IPC_SET, &raw mut about) }).map(drop)
}

/// Has a segment be gone when nobody has it attached.
///
/// # Errors
/// When there is none.
pub fn remove_segment(id: i32) -> io::Result<()> {
    // SAFETY: IPC_RMID takes no memory.
    outcome(unsafe { libc::shmctl(id, libc::IPC_RMID, std::ptr::null_mut()) }).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ipc::{IpcNamespace, PRIVATE};
    use std::os::unix::fs::FileExt;

    #[test]
    fn a_segment_has_the_id_and_key_that_were_asked_for_and_its_memory_is_a_file() {
        let namespace = IpcNamespace::create().unwrap();
        let make =
            || Ok::<_, io::Error>((make_segment(65_539, 0x1234, 5000)?, make_segment(0, PRIVATE, 4096)?));
        let (one, other) = namespace.run(make).unwrap().unwrap();
        let permissions = Permissions { mode: 0o640, uid: 7, gid: 8 };
        let work = || {
            assert!(make_segment(65_539, 0x99, 4096).is_err());
            assert!(make_segment(3, 0x1234, 4096).is_err());
            set_segment(65_539, permissions).unwrap();
            one.write_all_at(b"x", 4999).unwrap();
            // SAFETY: the kernel chooses the address.
            let at = unsafe { libc::shmat(65_539, std::ptr::null(), libc::SHM_RDONLY) }.cast::<u8>();
            // SAFETY: 5000 bytes are attached there, until they are not.
            let found = unsafe { at.add(4999).read() };
            remove_segment(0).unwrap();
            let during = segments().unwrap();
            // SAFETY: attached above, and used no more.
            unsafe { libc::shmdt(at.cast()) };
            (found, during)
        };
        let (found, during) = namespace.run(work).unwrap();
        assert_eq!(found, b'x');
        assert_eq!(during, [Segment { id: 65_539, key: 0x1234, size: 5000, permissions, attached: 1 }]);
        drop(other);
        assert!(segments().unwrap().iter().all(|segment| segment.key != 0x1234), "it is not ours");
    }
}
