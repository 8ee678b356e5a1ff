//! Process descriptors, and whether two processes share a thing.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use rustix::process::{ForeignRawFd, PidfdFlags, PidfdGetfdFlags};

use crate::Pid;
use crate::abi;
use crate::error::CallError;

/// Opens a descriptor that names the process `pid` for good, whatever becomes of its number.
///
/// # Errors
/// `ESRCH` when there is no such process.
pub fn open(pid: Pid) -> Result<OwnedFd, CallError> {
    rustix::process::pidfd_open(pid, PidfdFlags::empty()).map_err(|errno| CallError::new("pidfd_open", errno))
}

/// Our own copy of descriptor `number` of the process that `pidfd` names. It is close-on-exec.
///
/// # Errors
/// `EBADF` when that descriptor is not open there, `ESRCH` when the process is gone, `EPERM` without the right to
/// trace it.
pub fn get_fd(pidfd: BorrowedFd<'_>, number: RawFd) -> Result<OwnedFd, CallError> {
    rustix::process::pidfd_getfd(pidfd, number as ForeignRawFd, PidfdGetfdFlags::empty())
        .map_err(|errno| CallError::new("pidfd_getfd", errno))
}

/// Whether two processes have one and the same memory, as after `vfork` or `clone(CLONE_VM)`.
///
/// # Errors
/// `ESRCH` when one is gone, `ENOSYS` on a kernel without `kcmp`.
pub fn share_memory(one: Pid, other: Pid) -> Result<bool, CallError> {
    kcmp(one, other, abi::KCMP_VM, 0, 0)
}

/// Whether descriptor `number` of `pid` is the same open file as our `fd`.
///
/// # Errors
/// `EBADF` when it is not open there, `ESRCH` when the process is gone.
pub fn is_same_file(pid: Pid, number: RawFd, fd: impl AsFd) -> Result<bool, CallError> {
    let ours = fd.as_fd().as_raw_fd();
    kcmp(pid, rustix::process::getpid(), abi::KCMP_FILE, number as libc::c_ulong, ours as libc::c_ulong)
}

/// Whether two descriptors, each of a process and under a number, are of one open file, with one position.
///
/// # Errors
/// `EBADF` when one is not open there, `ESRCH` when a process is gone.
pub fn are_same_file(one: (Pid, RawFd), other: (Pid, RawFd)) -> Result<bool, CallError> {
    kcmp(one.0, other.0, abi::KCMP_FILE, one.1 as libc::c_ulong, other.1 as libc::c_ulong)
}

/// Whether somebody is to be told by a signal of what happens to the open file, or that signal has been chosen (`F_SETOWN`
/// and `F_SETSIG` of `fcntl(2)`).
///
/// # Errors
/// What `fcntl(2)` says.
pub fn has_owner(fd: impl AsFd) -> Result<bool, CallError> {
    let number = fd.as_fd().as_raw_fd();
    let mut owner = abi::FileOwner::default();
    // SAFETY: the call writes a `struct f_owner_ex` to the place given, which is one and lives across the call.
    if unsafe { libc::fcntl(number, abi::F_GETOWN_EX, &raw mut owner) } < 0 {
        return Err(CallError::last("fcntl"));
    }
    // SAFETY: the call takes numbers only and changes nothing.
    match unsafe { libc::fcntl(number, abi::F_GETSIG) } {
        -1 => Err(CallError::last("fcntl")),
        signal => Ok(signal != 0 || owner.pid != 0),
    }
}

fn kcmp(
    one: Pid,
    other: Pid,
    what: libc::c_int,
    first: libc::c_ulong,
    second: libc::c_ulong,
) -> Result<bool, CallError> {
    // SAFETY: the call takes numbers only and changes nothing.
    let order =
        unsafe { libc::syscall(libc::SYS_kcmp, one.as_raw_pid(), other.as_raw_pid(), what, first, second) };
    if order < 0 { Err(CallError::last("kcmp")) } else { Ok(order == 0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_has_memory_of_its_own_and_a_process_shares_with_itself() {
        let us = rustix::process::getpid();
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let shared = share_memory(us, Pid::from_child(&child));
        let file = std::fs::File::open("/dev/null").unwrap();
        let same = is_same_file(us, file.as_raw_fd(), &file);
        let (again, other) = (file.try_clone().unwrap(), std::fs::File::open("/dev/null").unwrap());
        let place = |file: &std::fs::File| (us, file.as_raw_fd());
        assert!(are_same_file(place(&file), place(&again)).unwrap());
        assert!(!are_same_file(place(&file), place(&other)).unwrap());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!shared.unwrap());
        assert!(share_memory(us, us).unwrap());
        assert!(same.unwrap());
    }

    #[test]
    fn a_file_has_an_owner_when_somebody_has_asked_for_signals() {
        let (ours, _) = std::os::unix::net::UnixStream::pair().unwrap();
        assert!(!has_owner(&ours).unwrap());
        // SAFETY: the call takes numbers only.
        unsafe { libc::fcntl(ours.as_raw_fd(), libc::F_SETOWN, libc::getpid()) };
        assert!(has_owner(&ours).unwrap());
    }
}
