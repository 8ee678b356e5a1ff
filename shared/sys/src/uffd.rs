//! Userfaultfd in its asynchronous write-protection mode: the kernel itself lets a write to a protected page through
//! and remembers it, and [`crate::pagemap`] reads and renews what is remembered. No fault is ever delivered to us.
//!
//! Descriptors act on the memory of the process that created them, whoever holds them. Closing the last one removes
//! every registration and protection from that process.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::io::Errno;

use crate::abi;
use crate::error::CallError;

/// Flags for the `userfaultfd` system call: not inherited over `exec`, never blocking, and faults of user mode only,
/// which is what a process without privileges may ask for.
pub(crate) const CREATE_FLAGS: u64 =
    libc::O_CLOEXEC as u64 | libc::O_NONBLOCK as u64 | abi::UFFD_USER_MODE_ONLY;

/// A userfaultfd whose features are negotiated and which can register memory for write tracking.
#[derive(Debug)]
pub struct WriteTracker(OwnedFd);

impl WriteTracker {
    /// Negotiates asynchronous write-protection on a fresh descriptor.
    ///
    /// # Errors
    /// `EINVAL` where the kernel (before 6.7) lacks a feature, or on a descriptor that has been negotiated already.
    pub fn negotiate(fd: OwnedFd) -> Result<Self, CallError> {
        Self::with_features(
            fd,
            abi::UFFD_FEATURE_WP_ASYNC
                | abi::UFFD_FEATURE_WP_UNPOPULATED
                | abi::UFFD_FEATURE_PAGEFAULT_FLAG_WP,
        )
    }

    /// Negotiates on a fresh descriptor what suffices to register memory, and to see later which mappings are still
    /// those that were registered. Nothing is ever protected, so no fault is ever delivered.
    ///
    /// # Errors
    /// `EINVAL` where the kernel (before 5.7) lacks write protection, or on a descriptor that has been negotiated already.
    pub fn negotiate_registration(fd: OwnedFd) -> Result<Self, CallError> {
        Self::with_features(fd, abi::UFFD_FEATURE_PAGEFAULT_FLAG_WP)
    }

    fn with_features(fd: OwnedFd, features: u64) -> Result<Self, CallError> {
        let mut arg = abi::UffdioApi { api: abi::UFFD_API, features, ioctls: 0 };
        // SAFETY: UFFDIO_API reads and writes one `struct uffdio_api`, which `arg` is.
        let done = unsafe { libc::ioctl(fd.as_raw_fd(), abi::UFFDIO_API, &raw mut arg) };
        if done == -1 { Err(CallError::last("ioctl UFFDIO_API")) } else { Ok(Self(fd)) }
    }

    /// A tracker of our own process, to find out whether this kernel can track at all.
    ///
    /// # Errors
    /// `ENOSYS` where the kernel has no userfaultfd; see [`Self::negotiate`].
    pub fn of_self() -> Result<Self, CallError> {
        Self::negotiate(descriptor_of_self()?)
    }

    /// As [`Self::of_self`], for registration only.
    ///
    /// # Errors
    /// `ENOSYS` where the kernel has no userfaultfd; see [`Self::negotiate_registration`].
    pub fn registration_of_self() -> Result<Self, CallError> {
        Self::negotiate_registration(descriptor_of_self()?)
    }

    /// Registers `len` bytes from `start` (both multiples of the page size) for write tracking.
    ///
    /// Registering again what this descriptor holds is allowed and changes nothing. Pages count as written until a
    /// scan protects them.
    ///
    /// # Errors
    /// `EBUSY` when another userfaultfd holds part of the range, `EINVAL` when part of it is unmapped or of a kind
    /// that cannot be tracked, `ENOMEM` when the memory is gone (the process exited or replaced it). On an error
    /// nothing of the range has changed.
    pub fn register(&self, start: u64, len: u64) -> Result<(), CallError> {
        let range = abi::UffdioRange { start, len };
        let mut arg = abi::UffdioRegister { range, mode: abi::UFFDIO_REGISTER_MODE_WP, ioctls: 0 };
        // SAFETY: UFFDIO_REGISTER reads and writes one `struct uffdio_register`, which `arg` is.
        let done = unsafe { libc::ioctl(self.0.as_raw_fd(), abi::UFFDIO_REGISTER, &raw mut arg) };
        if done == -1 { Err(CallError::last("ioctl UFFDIO_REGISTER")) } else { Ok(()) }
    }

    /// Whether the memory that this descriptor acts on is still in use by some process. It is not after that process
    /// exited or called `exec`.
    ///
    /// # Errors
    /// What the kernel says otherwise.
    pub fn is_alive(&self) -> Result<bool, CallError> {
        // The topmost page of user memory is unmapped, or the stack's, and never registered: a living process
        // answers ENOENT and nothing is changed.
        match self.is_registered(abi::ADDRESS_END - abi::PAGE_SIZE) {
            Ok(_) => Ok(true),
            Err(CallError { errno: Errno::SRCH, .. }) => Ok(false),
            Err(other) => Err(other),
        }
    }

    /// Whether the mapping at `start` (a multiple of the page size) is registered for write protection, by this
    /// descriptor or another. A mapping that was moved or made since is not.
    ///
    /// It is asked by lifting the protection of that one page, which has none where nothing is ever protected.
    ///
    /// # Errors
    /// `ESRCH` when the process exited or called `exec`.
    pub fn is_registered(&self, start: u64) -> Result<bool, CallError> {
        let range = abi::UffdioRange { start, len: abi::PAGE_SIZE };
        let mut arg = abi::UffdioWriteProtect { range, mode: 0 };
        // SAFETY: UFFDIO_WRITEPROTECT reads one `struct uffdio_writeprotect`, which `arg` is.
        let done = unsafe { libc::ioctl(self.0.as_raw_fd(), abi::UFFDIO_WRITEPROTECT, &raw mut arg) };
        match if done == -1 { CallError::last("ioctl UFFDIO_WRITEPROTECT") } else { return Ok(true) } {
            CallError { errno: Errno::NOENT, .. } => Ok(false),
            other => Err(other),
        }
    }
}

fn descriptor_of_self() -> Result<OwnedFd, CallError> {
    // SAFETY: the call takes flags only and returns a new descriptor or -1.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, CREATE_FLAGS) };
    match i32::try_from(fd) {
        // SAFETY: the descriptor is fresh from the kernel and nobody else owns it.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(CallError::last("userfaultfd")),
    }
}

impl AsFd for WriteTracker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_kernel_tracks_and_our_memory_is_alive() {
        assert!(WriteTracker::of_self().unwrap().is_alive().unwrap());
    }

    #[test]
    fn unmapped_memory_is_refused_with_einval() {
        let tracker = WriteTracker::of_self().unwrap();
        let error = tracker.register(abi::PAGE_SIZE, abi::PAGE_SIZE).unwrap_err();
        assert_eq!(error.errno, Errno::INVAL);
    }
}
