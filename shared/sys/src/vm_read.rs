//! Reading another process's memory.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use rustix::io::Errno;

use crate::Pid;
use crate::error::CallError;

/// The most ranges that one call of [`VmReader::read`] takes (`IOV_MAX`).
pub const MAX_RANGES: usize = 1024;

/// Reads the memory of one process.
///
/// `process_vm_readv` is the fast way, but honours page protections; what it cannot read because the process itself
/// may not (`PROT_NONE`) is read through `/proc/<pid>/mem`, as a debugger would.
#[derive(Debug)]
pub struct VmReader {
    pid: Pid,
    mem: File,
}

impl VmReader {
    /// Opens the memory of `pid`. It stays with the memory that the process had then, except for
    /// [`VmReader::read`], which reads what the process has now.
    ///
    /// # Errors
    /// `ENOENT` when there is no such process, `EACCES` without the right to trace it.
    pub fn open(pid: Pid) -> Result<Self, CallError> {
        let mem = File::open(format!("/proc/{pid}/mem"))
            .map_err(|error| CallError::from_io("open of a process's memory", &error))?;
        Ok(Self { pid, mem })
    }

    /// Appends the bytes of `ranges` (addresses, at most [`MAX_RANGES`] of them), one after the other, to `out`, and
    /// says how many bytes were appended.
    ///
    /// Fewer than asked for means that the next byte could not be read (unmapped meanwhile, or protected); what was
    /// appended before it is right. `out` is not reallocated beyond what the ranges need.
    ///
    /// # Errors
    /// `ESRCH` when the process is gone. An unreadable first byte is not an error but 0 bytes.
    pub fn read(&self, ranges: &[Range<u64>], out: &mut Vec<u8>) -> Result<usize, CallError> {
        let remote: Vec<libc::iovec> = ranges
            .iter()
            .take(MAX_RANGES)
            .map(|range| libc::iovec {
                iov_base: range.start as *mut libc::c_void,
                iov_len: range.end.saturating_sub(range.start) as usize,
            })
            .collect();
        let wanted = remote.iter().map(|part| part.iov_len).sum();
        out.reserve(wanted);
        let spare = out.spare_capacity_mut();
        let local = libc::iovec { iov_base: spare.as_mut_ptr().cast(), iov_len: wanted.min(spare.len()) };
        // SAFETY: the kernel writes at most `iov_len` bytes into the vector's spare capacity, which is at least as
        // long, and only reads the array of remote ranges; remote addresses are checked by the kernel.
        let count = unsafe {
            libc::process_vm_readv(
                self.pid.as_raw_pid(),
                &raw const local,
                1,
                remote.as_ptr(),
                remote.len() as libc::c_ulong,
                0,
            )
        };
        let Ok(count) = usize::try_from(count) else {
            return match CallError::last("process_vm_readv") {
                CallError { errno: Errno::FAULT, .. } => Ok(0),
                error => Err(error),
            };
        };
        // SAFETY: the kernel has just initialised `count` bytes behind the old length.
        unsafe { out.set_len(out.len() + count) };
        Ok(count)
    }

    /// Reads memory at `address` whatever its protection, and says how many bytes could be read.
    ///
    /// # Errors
    /// `EIO` or `EFAULT` when not even the first byte is mapped.
    pub fn read_protected(&self, address: u64, buffer: &mut [u8]) -> Result<usize, CallError> {
        loop {
            match self.mem.read_at(buffer, address) {
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(CallError::from_io("read of a process's memory", &error)),
                Ok(count) => return Ok(count),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abi::{PAGE_BYTES, PAGE_SIZE};

    /// Three pages, of which the middle one may not be accessed.
    struct Guarded(*mut libc::c_void);

    impl Guarded {
        fn new() -> Self {
            // SAFETY: a fresh mapping of our own, written within its bounds.
            unsafe {
                let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
                let rw = libc::PROT_READ | libc::PROT_WRITE;
                let start = libc::mmap(std::ptr::null_mut(), 3 * PAGE_BYTES, rw, flags, -1, 0);
                assert_ne!(start, libc::MAP_FAILED);
                for page in 0..3 {
                    start.cast::<u8>().add(page * PAGE_BYTES).write_bytes(page as u8 + 1, PAGE_BYTES);
                }
                libc::mprotect(start.add(PAGE_BYTES), PAGE_BYTES, libc::PROT_NONE);
                Self(start)
            }
        }
    }

    impl Drop for Guarded {
        fn drop(&mut self) {
            // SAFETY: our own mapping, no longer used.
            unsafe { libc::munmap(self.0, 3 * PAGE_BYTES) };
        }
    }

    #[test]
    fn a_protected_page_ends_the_read_and_is_read_the_other_way() {
        let memory = Guarded::new();
        let start = memory.0 as u64;
        let reader = VmReader::open(rustix::process::getpid()).unwrap();
        let mut out = vec![9];
        let ranges = [start..start + PAGE_SIZE, start + PAGE_SIZE..start + 3 * PAGE_SIZE];
        assert_eq!(reader.read(&ranges, &mut out).unwrap(), PAGE_BYTES);
        assert_eq!(out.len(), 1 + PAGE_BYTES);
        assert!(out[1..].iter().all(|byte| *byte == 1));
        assert_eq!(reader.read(&ranges[1..], &mut out).unwrap(), 0);
        let mut page = [0; PAGE_BYTES];
        assert_eq!(reader.read_protected(start + PAGE_SIZE, &mut page).unwrap(), PAGE_BYTES);
        assert!(page.iter().all(|byte| *byte == 2));
    }

    #[test]
    fn unmapped_memory_and_no_process_are_told_apart() {
        let reader = VmReader::open(rustix::process::getpid()).unwrap();
        assert_eq!(
            reader.read(std::slice::from_ref(&(PAGE_SIZE..2 * PAGE_SIZE)), &mut Vec::new()).unwrap(),
            0
        );
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let opened = VmReader::open(Pid::from_child(&child));
        child.kill().unwrap();
        child.wait().unwrap();
        let gone = opened.unwrap();
        let error =
            gone.read(std::slice::from_ref(&(PAGE_SIZE..2 * PAGE_SIZE)), &mut Vec::new()).unwrap_err();
        assert_eq!(error.errno, Errno::SRCH);
    }
}
