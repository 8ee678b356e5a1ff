//! The serving side of userfaultfd: a process runs with part of its memory missing, and each page is put in its place
//! when it is touched or before.
//!
//! The descriptor was made, negotiated and registered by the process whose memory it is (CRIU's restorer does so,
//! with the events of `userfaultfd(2)` for non-cooperative use). While an event waits to be read the process stands
//! still in the call that caused it, and the kernel refuses to fill (`EAGAIN`): who serves must read events first.
//!
//! Closing the last copy of the descriptor ends it all: what is missing then reads as zeros. So it must not be closed
//! before nothing is missing, or the process is dead.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;

use rustix::io::Errno;

use crate::abi;
use crate::error::CallError;

/// Events that are read in one call.
const BATCH: usize = 16;

/// What happened to the memory. Addresses are in bytes and multiples of the page size, ranges exclusive.
#[derive(Debug)]
pub enum Event {
    /// The page at this address was touched and is missing; a thread waits for it.
    Fault {
        /// Where the page begins.
        address: u64,
    },
    /// The process forked: the child misses what its parent missed when it forked.
    Fork(MissingMemory),
    /// Memory moved, with what is missing of it.
    Remap {
        /// Where it began.
        from: u64,
        /// Where it begins now.
        to: u64,
        /// How many bytes.
        len: u64,
    },
    /// The content was dropped (`madvise`): it reads as zeros from now on.
    Remove {
        /// First address.
        start: u64,
        /// One past the last.
        end: u64,
    },
    /// The mapping is gone.
    Unmap {
        /// First address.
        start: u64,
        /// One past the last.
        end: u64,
    },
}

/// How far a request to fill came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filled {
    /// This many bytes from the start are in place now, by us or by the process itself: all, or what was possible
    /// before [`Filled::Stopped`] of the rest.
    Bytes(u64),
    /// Nothing: the first page is there already.
    Present,
    /// Nothing: an event has to be read first, or the mapping has changed.
    Stopped,
    /// Nothing: the range is not mapped any more, or never was registered.
    Unmapped,
    /// Nothing: the process has ended or called `exec`.
    Gone,
}

/// A userfaultfd whose memory we fill.
#[derive(Debug)]
pub struct MissingMemory(OwnedFd);

impl MissingMemory {
    /// Takes a descriptor over that a restoring process has handed us. One that is no userfaultfd fails at its first
    /// use.
    #[must_use]
    pub fn adopt(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// Reads what has happened, without waiting; nothing when nothing has.
    ///
    /// # Errors
    /// What `read(2)` says; an event that is not known is `EPROTO`.
    pub fn read(&self) -> Result<Vec<Event>, CallError> {
        let mut messages = [abi::UffdMsg::default(); BATCH];
        // SAFETY: `messages` is plain integers, any bytes are valid in it, and the length is its own.
        let got =
            unsafe { libc::read(self.0.as_raw_fd(), messages.as_mut_ptr().cast(), size_of_val(&messages)) };
        if got < 0 {
            return match CallError::last("read of a userfaultfd") {
                CallError { errno: Errno::AGAIN, .. } => Ok(Vec::new()),
                error => Err(error),
            };
        }
        let count = got.unsigned_abs() / size_of::<abi::UffdMsg>();
        messages.iter().take(count).map(event).collect()
    }

    /// Puts `len` bytes of `source` at `offset` into the memory at `address`, and wakes who waits there. All three are
    /// multiples of the page size.
    ///
    /// # Errors
    /// What [`Filled`] does not tell, such as `ENOMEM`, or `EFAULT` when the file is shorter.
    pub fn copy(
        &self,
        address: u64,
        source: &FileSource,
        offset: u64,
        len: u64,
    ) -> Result<Filled, CallError> {
        if len == 0 || offset.checked_add(len).is_none_or(|end| end > source.len) {
            return Err(CallError::new("ioctl UFFDIO_COPY", Errno::FAULT));
        }
        let src = source.start.as_ptr() as u64 + offset;
        let mut arg = abi::UffdioCopy { dst: address, src, len, mode: 0, copy: 0 };
        // SAFETY: UFFDIO_COPY reads and writes one `struct uffdio_copy`, which `arg` is. It reads `len` bytes of our
        // memory at `src`, which lie within the mapping that `source` owns, and writes to another process's memory.
        let done = unsafe { libc::ioctl(self.0.as_raw_fd(), abi::UFFDIO_COPY, &raw mut arg) };
        self.outcome("ioctl UFFDIO_COPY", done, address, len, arg.copy)
    }

    /// Makes `len` bytes at `address` zeros, and wakes who waits there.
    ///
    /// # Errors
    /// What [`Filled`] does not tell.
    pub fn zero(&self, address: u64, len: u64) -> Result<Filled, CallError> {
        let range = abi::UffdioRange { start: address, len };
        let mut arg = abi::UffdioZeropage { range, mode: 0, zeropage: 0 };
        // SAFETY: UFFDIO_ZEROPAGE reads and writes one `struct uffdio_zeropage`, which `arg` is.
        let done = unsafe { libc::ioctl(self.0.as_raw_fd(), abi::UFFDIO_ZEROPAGE, &raw mut arg) };
        self.outcome("ioctl UFFDIO_ZEROPAGE", done, address, len, arg.zeropage)
    }

    fn outcome(
        &self,
        call: &'static str,
        done: i32,
        address: u64,
        len: u64,
        did: i64,
    ) -> Result<Filled, CallError> {
        if done != -1 {
            return Ok(Filled::Bytes(len));
        }
        let error = CallError::last(call);
        match error.errno {
            // The kernel tells a part that was done as EAGAIN with a count.
            Errno::AGAIN => match u64::try_from(did) {
                Ok(bytes) if bytes > 0 => Ok(Filled::Bytes(bytes)),
                _ => Ok(Filled::Stopped),
            },
            Errno::EXIST => {
                // Filled by another since the fault was told: whoever waits would wait for ever.
                self.wake(address, abi::PAGE_SIZE)?;
                Ok(Filled::Present)
            }
            Errno::NOENT => Ok(Filled::Unmapped),
            Errno::SRCH => Ok(Filled::Gone),
            _ => Err(error),
        }
    }

    /// Wakes who waits for a page in the `len` bytes at `start`, to look again whether it is there.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn wake(&self, start: u64, len: u64) -> Result<(), CallError> {
        let mut arg = abi::UffdioRange { start, len };
        // SAFETY: UFFDIO_WAKE reads one `struct uffdio_range`, which `arg` is.
        let done = unsafe { libc::ioctl(self.0.as_raw_fd(), abi::UFFDIO_WAKE, &raw mut arg) };
        if done == -1 { Err(CallError::last("ioctl UFFDIO_WAKE")) } else { Ok(()) }
    }
}

impl AsFd for MissingMemory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn event(message: &abi::UffdMsg) -> Result<Event, CallError> {
    let [first, second, third] = message.arg;
    match message.event {
        // `arg.pagefault`: flags, address.
        abi::UFFD_EVENT_PAGEFAULT => Ok(Event::Fault { address: second & !(abi::PAGE_SIZE - 1) }),
        abi::UFFD_EVENT_FORK => {
            // `arg.fork.ufd`, the lower half of the first word.
            let fd = (first & u64::from(u32::MAX)) as i32;
            // SAFETY: the kernel has just opened this descriptor for us with the message, and nobody else owns it.
            Ok(Event::Fork(MissingMemory(unsafe { OwnedFd::from_raw_fd(fd) })))
        }
        abi::UFFD_EVENT_REMAP => Ok(Event::Remap { from: first, to: second, len: third }),
        abi::UFFD_EVENT_REMOVE => Ok(Event::Remove { start: first, end: second }),
        abi::UFFD_EVENT_UNMAP => Ok(Event::Unmap { start: first, end: second }),
        _ => Err(CallError::new("read of a userfaultfd", Errno::PROTO)),
    }
}

/// A file whose bytes the kernel copies from. They are never readable as memory of ours, so a file that shrinks
/// beneath us makes a copy fail with `EFAULT` and does no other harm.
#[derive(Debug)]
pub struct FileSource {
    start: NonNull<u8>,
    len: u64,
}

// SAFETY: the mapping is only ever handed to the kernel as an address to read from; any thread may do that and may
// unmap it.
unsafe impl Send for FileSource {}

impl FileSource {
    /// The first `len` bytes of `file`.
    ///
    /// # Errors
    /// What `mmap(2)` says. A length of zero maps nothing and is not an error.
    pub fn map(file: &File, len: u64) -> io::Result<Self> {
        if len == 0 {
            return Ok(Self { start: NonNull::dangling(), len });
        }
        let bytes = usize::try_from(len).map_err(io::Error::other)?;
        let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice, which replaces none of ours.
        let start =
            unsafe { libc::mmap(std::ptr::null_mut(), bytes, libc::PROT_READ, flags, file.as_raw_fd(), 0) };
        match NonNull::new(start.cast::<u8>()) {
            Some(start) if start.as_ptr().cast() != libc::MAP_FAILED => Ok(Self { start, len }),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Drop for FileSource {
    fn drop(&mut self) {
        if self.len > 0 {
            // SAFETY: the mapping is ours, of this length, and no reference into it was ever made.
            // It cannot fail on a mapping that exists.
            unsafe { libc::munmap(self.start.as_ptr().cast(), self.len as usize) };
        }
    }
}

#[cfg(test)]
#[path = "lazy_tests.rs"]
mod tests;
