//! IPC namespaces: the System V objects of a container, and how they are made anew with the same ids.
//!
//! The calls on objects concern the namespace of the calling thread: they are for [`IpcNamespace::run`].

mod queue;
mod segment;
mod semaphore;

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use rustix::thread::LinkNameSpaceType;

pub use queue::{Message, Queue, make_queue, queues, remove_queue};
pub use segment::{DESTROYED, LOCKED, Segment, make_segment, remove_segment, segments, set_segment};
pub use semaphore::{Semaphores, make_semaphores, remove_semaphores, semaphores};

use crate::Pid;
use crate::netns::run_on_a_thread;

/// The most segments that a namespace may be allowed to have (`IPCMNI` of the kernel's `ipc/util.h`).
pub const MOST_SEGMENTS: u32 = 32_768;
/// A key with which an object is found by nobody (`IPC_PRIVATE`).
pub const PRIVATE: i32 = libc::IPC_PRIVATE;

/// An IPC namespace, held open: it exists at least as long as this does.
#[derive(Debug)]
pub struct IpcNamespace(File);

impl IpcNamespace {
    /// The namespace in which `pid` is.
    ///
    /// # Errors
    /// `NotFound` when there is no such process.
    pub fn of(pid: Pid) -> io::Result<Self> {
        Self::at(Path::new(&format!("/proc/{pid}/ns/ipc")))
    }

    /// The namespace that a file names: a link under `/proc/<pid>/ns`, or one to a descriptor of a namespace.
    ///
    /// # Errors
    /// When the file cannot be opened.
    pub fn at(path: &Path) -> io::Result<Self> {
        File::open(path).map(Self)
    }

    /// Makes a new namespace, in which there is nothing.
    ///
    /// # Errors
    /// When no thread can be started or no namespace made (`CAP_SYS_ADMIN`).
    pub fn create() -> io::Result<Self> {
        let leave = || {
            // SAFETY: this changes the IPC namespace of the calling thread, which is ours and does nothing else.
            match unsafe { libc::unshare(libc::CLONE_NEWIPC) } {
                -1 => Err(io::Error::last_os_error()),
                _ => Ok(()),
            }
        };
        run_on_a_thread("haul-ipcns", leave, || Self::at(Path::new("/proc/thread-self/ns/ipc")))?
    }

    /// The descriptor that holds it open.
    #[must_use]
    pub fn as_file(&self) -> &File {
        &self.0
    }

    /// The same.
    #[must_use]
    pub fn into_file(self) -> File {
        self.0
    }

    /// Moves the calling thread into the namespace, for good.
    ///
    /// # Errors
    /// When it cannot be entered (`CAP_SYS_ADMIN`), or is no IPC namespace.
    pub fn enter(&self) -> io::Result<()> {
        Ok(rustix::thread::move_into_link_name_space(
            self.0.as_fd(),
            Some(LinkNameSpaceType::InterProcessCommunication),
        )?)
    }

    /// Has the program that `command` will start run inside the namespace. An error shows when it is started.
    pub fn enter_on_start(self, command: &mut Command) {
        let enter = move || self.enter();
        // SAFETY: the closure runs in the forked child, where only async-signal-safe calls are allowed: it makes one
        // plain system call, on a descriptor that it owns.
        unsafe { command.pre_exec(enter) };
    }

    /// Runs `work` inside the namespace, on a thread made for it, and returns what it returns. `/proc/sysvipc` and the
    /// settings under `/proc/sys` are the namespace's then.
    ///
    /// # Errors
    /// When no thread can be started or the namespace cannot be entered; `work` has not run then.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> io::Result<T> {
        run_on_a_thread("haul-ipcns", || self.enter(), work)
    }
}

impl From<OwnedFd> for IpcNamespace {
    fn from(namespace: OwnedFd) -> Self {
        Self(namespace.into())
    }
}

/// Who may do what with an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Permissions {
    /// Nine bits, and flags of the kernel's above them.
    pub mode: u32,
    /// User that owns it.
    pub uid: u32,
    /// Group that owns it.
    pub gid: u32,
}

impl Permissions {
    fn put_into(self, about: &mut libc::ipc_perm) {
        (about.uid, about.gid) = (self.uid, self.gid);
        // The kernel takes these bits and leaves the others.
        about.mode = (self.mode & 0o777) as libc::c_ushort;
    }
}

/// How much there is in a namespace besides segments.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Load {
    /// Of all semaphore sets.
    pub semaphores: u64,
    /// Of all queues.
    pub messages: u64,
    /// What these say, in bytes.
    pub bytes: u64,
}

impl Load {
    /// That of the calling thread's namespace, without a look at any of it.
    ///
    /// # Errors
    /// When the kernel does not tell.
    pub fn of_this_thread() -> io::Result<Self> {
        let mut load = Self::default();
        for set in table("sem")? {
            load.semaphores = load.semaphores.saturating_add(set.number(3)?);
        }
        for queue in table("msg")? {
            load.bytes = load.bytes.saturating_add(queue.number(3)?);
            load.messages = load.messages.saturating_add(queue.number(4)?);
        }
        Ok(load)
    }
}

/// Has the next object of the kind (`shm`, `sem` or `msg`) that the calling thread makes get that id, if it is free.
fn next_id(kind: &str, id: i32) -> io::Result<()> {
    fs::write(format!("/proc/sys/kernel/{kind}_next_id"), id.to_string())
}

/// What a call returns that says -1 when it fails.
fn outcome(returned: libc::c_int) -> io::Result<libc::c_int> {
    if returned == -1 { Err(io::Error::last_os_error()) } else { Ok(returned) }
}

/// The rows of a table below `/proc/sysvipc`, of numbers in columns as the kernel's `ipc/` prints them.
fn table(name: &str) -> io::Result<Vec<Row>> {
    let text = fs::read_to_string(format!("/proc/sysvipc/{name}"))?;
    let row = |line: &str| Row(line.split_ascii_whitespace().map(ToOwned::to_owned).collect());
    Ok(text.lines().skip(1).map(row).collect())
}

struct Row(Vec<String>);

impl Row {
    /// A number in decimal.
    fn number<T: std::str::FromStr>(&self, column: usize) -> io::Result<T> {
        let number = self.0.get(column).and_then(|text| text.parse().ok());
        number.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "a table of /proc/sysvipc"))
    }

    /// Permissions, in octal digits, and owners.
    fn permissions(&self, mode: usize, uid: usize, gid: usize) -> io::Result<Permissions> {
        let bits = self.0.get(mode).and_then(|text| u32::from_str_radix(text, 8).ok());
        let mode =
            bits.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "a mode of /proc/sysvipc"))?;
        Ok(Permissions { mode, uid: self.number(uid)?, gid: self.number(gid)? })
    }
}
