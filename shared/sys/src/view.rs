//! A mapping that nobody reads: its page tables tell which pages of a file are still the same.
//!
//! Who takes a page out of a file, by `fallocate(2)` or `MADV_REMOVE` of `madvise(2)`, takes it out of the page tables of
//! all who have it mapped. They get it back when they touch it, and here nobody does.

use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};

use crate::abi;
use crate::error::CallError;
use crate::pagemap::{Categories, Filter, Pagemap};

const PRESENT: Filter = Filter { all: Categories::PRESENT, ..Filter::ANYTHING };

/// The beginning of a file, mapped to be looked at from outside. It takes 2 MiB of page tables a GiB.
#[derive(Debug)]
pub struct View {
    start: u64,
    length: u64,
}

impl View {
    /// Of the first `length` bytes of a file that is open for reading; whole pages. Nothing of it is in view yet.
    ///
    /// # Errors
    /// What `mmap(2)` says, `EINVAL` of no bytes.
    pub fn of(file: impl AsFd, length: u64) -> Result<Self, CallError> {
        let size = usize::try_from(length).map_err(|_| CallError::new("mmap", rustix::io::Errno::NOMEM))?;
        let (number, flags) = (file.as_fd().as_raw_fd(), libc::MAP_SHARED | libc::MAP_NORESERVE);
        // SAFETY: the kernel chooses a place that nothing is at. No reference to what is there is ever made.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), size, libc::PROT_READ, flags, number, 0) };
        match start {
            libc::MAP_FAILED => Err(CallError::last("mmap")),
            start => Ok(Self { start: start as u64, length }),
        }
    }

    /// Brings `bytes` of the file into view, whole pages. Those that it lacks it is given, as if somebody had read them.
    ///
    /// # Errors
    /// `EFAULT` beyond the end of the file, `EINVAL` beyond that of the view.
    pub fn populate(&self, bytes: Range<u64>) -> Result<(), CallError> {
        if bytes.start >= bytes.end || bytes.end > self.length {
            return Err(CallError::new("madvise", rustix::io::Errno::INVAL));
        }
        let (start, size) = (self.start + bytes.start, (bytes.end - bytes.start) as usize);
        // SAFETY: it lies within a mapping of our own, and fills page tables only.
        match unsafe { libc::madvise(start as *mut libc::c_void, size, libc::MADV_POPULATE_READ) } {
            0 => Ok(()),
            _ => Err(CallError::last("madvise")),
        }
    }

    /// Calls `found` for what is in view: bytes of the file, whole pages, in ascending order.
    ///
    /// # Errors
    /// `ENOTTY` where the kernel (before 6.7) has no `PAGEMAP_SCAN`.
    pub fn scan(&self, found: &mut dyn FnMut(Range<u64>)) -> Result<(), CallError> {
        let range = self.start..self.start + self.length.next_multiple_of(abi::PAGE_SIZE);
        Pagemap::open(rustix::process::getpid())?.scan(range, PRESENT, Categories::PRESENT, &mut |region| {
            found(region.start - self.start..region.end - self.start);
        })
    }
}

impl Drop for View {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, whole, and nobody else knows where it is.
        unsafe { libc::munmap(self.start as *mut libc::c_void, self.length as usize) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, ftruncate, memfd_create};
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    const PAGE: u64 = abi::PAGE_SIZE;

    fn pages(view: &View) -> Vec<u64> {
        let mut found = Vec::new();
        view.scan(&mut |bytes| found.extend(bytes.start / PAGE..bytes.end / PAGE)).unwrap();
        found
    }

    #[test]
    fn a_page_that_was_taken_out_is_out_of_view_though_there_is_another_in_its_place() {
        let file = File::from(memfd_create("x", MemfdFlags::CLOEXEC).unwrap());
        ftruncate(&file, 100 * PAGE).unwrap();
        (0..90).for_each(|page| file.write_all_at(&[1], page * PAGE).unwrap());
        let view = View::of(&file, 100 * PAGE).unwrap();
        assert!(pages(&view).is_empty());
        view.populate(0..90 * PAGE).unwrap();
        file.write_all_at(&[2], 50 * PAGE).unwrap();
        assert_eq!(pages(&view), (0..90).collect::<Vec<_>>());
        fallocate(&file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 40 * PAGE, 3 * PAGE)
            .unwrap();
        file.write_all_at(&[3], 41 * PAGE).unwrap();
        assert_eq!(pages(&view), (0..40).chain(43..90).collect::<Vec<_>>());
        assert!(view.populate(90 * PAGE..101 * PAGE).is_err());
    }
}
