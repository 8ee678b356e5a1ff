//! Soft-dirty marks: the kernel marks a page that is written, `/proc/<pid>/pagemap` tells the marks, and
//! `/proc/<pid>/clear_refs` takes all those of a process away. And what a pagemap without `PAGEMAP_SCAN` does not say of
//! itself: which pages are the kernel's pages of zeros.
//!
//! # References
//! `Documentation/admin-guide/mm/{soft-dirty,pagemap}.rst` of the kernel.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::ptr;

use rustix::io::Errno;

use crate::Pid;
use crate::abi::{PAGE_BYTES, PAGE_SIZE};
use crate::error::CallError;
use crate::pagemap::{Entry, Pagemap};

/// `KPF_ZERO_PAGE` of `include/uapi/linux/kernel-page-flags.h`.
const ZERO_PAGE: u64 = 1 << 24;
/// Pages of a huge page of 2 MiB.
const HUGE: u64 = 512;

/// Why soft-dirty marks cannot be used here.
#[derive(Debug, thiserror::Error)]
pub enum NoSoftDirty {
    /// Our own pagemap cannot be read.
    #[error(transparent)]
    Call(#[from] CallError),
    /// A page that was just written is not marked.
    #[error("the kernel is built without soft-dirty marks (CONFIG_MEM_SOFT_DIRTY)")]
    NotMarked,
    /// The pagemap tells no page frames.
    #[error("the pagemap does not tell page frames: CAP_SYS_ADMIN is missing")]
    FramesHidden,
}

/// Takes the soft-dirty marks of all of the process's memory away.
///
/// The walk and the marks of writes meanwhile interleave, so the process should stand still from the reading of its
/// marks to the end of this.
///
/// # Errors
/// `ENOENT` or `ESRCH` when the process is gone. Some marks may be gone then.
pub fn clear(pid: Pid) -> Result<(), CallError> {
    fs::write(format!("/proc/{pid}/clear_refs"), "4")
        .map_err(|error| CallError::from_io("write of clear_refs", &error))
}

/// Tells the kernel's pages of zeros by their frames: the one of 4 KiB, and that of 2 MiB, which comes and goes.
#[derive(Debug)]
pub struct ZeroFrames {
    small: u64,
    /// `/proc/kpageflags`; without it, huge pages of zeros count as any others.
    flags: Option<File>,
    /// The huge page that was looked at last, and whether it is of zeros.
    last: Option<(u64, bool)>,
}

impl ZeroFrames {
    /// Learns the frame of the page of zeros, and makes sure that written pages are marked.
    ///
    /// # Errors
    /// See [`NoSoftDirty`].
    pub fn find() -> Result<Self, NoSoftDirty> {
        let page = OwnPage::map()?;
        let untouched = page.read()?;
        let written = page.write()?;
        if !written.is_soft_dirty() {
            return Err(NoSoftDirty::NotMarked);
        }
        match (untouched.frame(), written.frame()) {
            (Some(small), Some(_)) => {
                let flags = File::open("/proc/kpageflags").ok();
                Ok(Self { small, flags, last: None })
            }
            _ => Err(NoSoftDirty::FramesHidden),
        }
    }

    /// Forgets what may have changed. To be called before a scan of processes that stand still.
    pub fn refresh(&mut self) {
        self.last = None;
    }

    /// Whether `entry`, of page number `page`, is a page of zeros of the kernel's.
    pub fn is_zero(&mut self, page: u64, entry: Entry) -> bool {
        match entry.frame() {
            Some(frame) if entry.is_present() => {
                frame == self.small
                    || (frame % HUGE == page % HUGE && !entry.is_exclusive() && self.is_huge_zero(frame))
            }
            _ => false,
        }
    }

    /// Whether the frame lies in the huge page of zeros.
    fn is_huge_zero(&mut self, frame: u64) -> bool {
        let head = frame - frame % HUGE;
        if let Some((_, zero)) = self.last.filter(|(last, _)| *last == head) {
            return zero;
        }
        let mut word = [0; 8];
        let zero = self.flags.as_ref().is_some_and(|flags| {
            flags.read_exact_at(&mut word, head * 8).is_ok() && u64::from_ne_bytes(word) & ZERO_PAGE != 0
        });
        self.last = Some((head, zero));
        zero
    }
}

/// A page of our own to try the kernel on.
struct OwnPage(*mut u8);

impl OwnPage {
    fn map() -> Result<Self, CallError> {
        let (access, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping anywhere, which nobody else knows.
        let at = unsafe { libc::mmap(ptr::null_mut(), PAGE_BYTES, access, kind, -1, 0) };
        if at == libc::MAP_FAILED { Err(CallError::last("mmap")) } else { Ok(Self(at.cast())) }
    }

    /// Its entry after it was read.
    fn read(&self) -> Result<Entry, CallError> {
        // SAFETY: the page is mapped readable until `self` is dropped.
        let byte = unsafe { self.0.read_volatile() };
        debug_assert_eq!(byte, 0, "a new page holds zeros");
        self.entry()
    }

    /// Its entry after it was written.
    fn write(&self) -> Result<Entry, CallError> {
        // SAFETY: the page is mapped writable until `self` is dropped, and nobody else has a reference into it.
        unsafe { self.0.write_volatile(1) };
        self.entry()
    }

    fn entry(&self) -> Result<Entry, CallError> {
        let mut entries = [Entry::default()];
        Pagemap::open(rustix::process::getpid())?.read_entries(self.0 as u64 / PAGE_SIZE, &mut entries)?;
        let [entry] = entries;
        if entry.is_present() { Ok(entry) } else { Err(CallError::new("read of a pagemap", Errno::FAULT)) }
    }
}

impl Drop for OwnPage {
    fn drop(&mut self) {
        // SAFETY: mapped by us with this length, and not used after.
        unsafe { libc::munmap(self.0.cast(), PAGE_BYTES) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_are_told_from_a_page_that_holds_something() {
        let page = OwnPage::map().unwrap();
        let number = page.0 as u64 / PAGE_SIZE;
        let untouched = page.read().unwrap();
        let found = ZeroFrames::find();
        let written = page.write().unwrap();
        match found {
            Ok(mut zeros) => {
                assert!(zeros.is_zero(number, untouched));
                assert!(!zeros.is_zero(number, written) && written.is_soft_dirty());
            }
            Err(NoSoftDirty::NotMarked) => assert!(!written.is_soft_dirty()),
            Err(error) => panic!("{error}"),
        }
    }
}
