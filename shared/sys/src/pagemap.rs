//! `/proc/<pid>/pagemap`: the `PAGEMAP_SCAN` ioctl, and the plain 8-byte entries.

use std::fs::File;
use std::ops::{BitOr, Range};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

use crate::Pid;
use crate::abi;
use crate::error::CallError;

/// How many regions one ioctl may return; 24 bytes each.
const REGIONS_PER_CALL: usize = 4096;

/// A set of page categories, as `PAGEMAP_SCAN` knows them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Categories(u64);

impl Categories {
    /// No category.
    pub const NONE: Self = Self(0);
    /// In a mapping that is registered for asynchronous write-protection.
    pub const WP_ALLOWED: Self = Self(1 << 0);
    /// Written since it was last protected.
    pub const WRITTEN: Self = Self(1 << 1);
    /// Backed by a file or by shared memory.
    pub const FILE: Self = Self(1 << 2);
    /// In memory.
    pub const PRESENT: Self = Self(1 << 3);
    /// In swap, or being moved by the kernel.
    pub const SWAPPED: Self = Self(1 << 4);
    /// The kernel's one page of zeros.
    pub const ZERO_PAGE: Self = Self(1 << 5);
    /// Part of a huge page.
    pub const HUGE: Self = Self(1 << 6);
    /// A guard made by `MADV_GUARD_INSTALL` (Linux 6.15 and later report it).
    pub const GUARD: Self = Self(1 << 8);

    /// The categories of both; as `|`, for constants.
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether a category is in both.
    pub fn overlaps(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }

    /// Whether every category of `other` is in this set.
    pub fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

impl BitOr for Categories {
    type Output = Self;
    fn bitor(self, other: Self) -> Self {
        self.and(other)
    }
}

/// Which pages a scan returns: all categories of `all`, none of `none`, and at least one of `any` or not all of `lacks`
/// (unless both are empty). No category is in two of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Filter {
    /// Categories that a page must have.
    pub all: Categories,
    /// Categories that a page must not have.
    pub none: Categories,
    /// Categories of which a page must have at least one, or lack one of `lacks`.
    pub any: Categories,
    /// Categories of which a page must lack at least one, or have one of `any`.
    pub lacks: Categories,
}

impl Filter {
    /// Every page.
    pub const ANYTHING: Self = Self {
        all: Categories::NONE,
        none: Categories::NONE,
        any: Categories::NONE,
        lacks: Categories::NONE,
    };
}

/// Adjacent pages with the same answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    /// Address of the first page.
    pub start: u64,
    /// Address one past the last page.
    pub end: u64,
    /// Those of the asked-for categories that these pages have.
    pub categories: Categories,
}

/// Whether this kernel tells guards from pages in swap: Linux 6.15 and later do. Guards exist since 6.13.
pub fn tells_guards() -> bool {
    static TELLS: OnceLock<bool> = OnceLock::new();
    let ask = || {
        let mut own = Pagemap::open(rustix::process::getpid())?;
        own.scan(0..abi::PAGE_SIZE, GUARDS, Categories::GUARD, &mut |_| {})
    };
    *TELLS.get_or_init(|| ask().is_ok())
}

const GUARDS: Filter = Filter { all: Categories::GUARD, ..Filter::ANYTHING };

/// The open pagemap of one process.
///
/// It stays with the memory that the process had when it was opened: after the process calls `exec`, scans find
/// nothing. So it is opened anew for every scan.
#[derive(Debug)]
pub struct Pagemap {
    file: File,
    /// Where the ioctl puts its answers, kept so that many small scans need not each make it.
    regions: Vec<abi::RawPageRegion>,
}

impl Pagemap {
    /// Opens the pagemap of `pid`.
    ///
    /// # Errors
    /// `ENOENT` when there is no such process, `EACCES` without the right to trace it.
    pub fn open(pid: Pid) -> Result<Self, CallError> {
        File::open(format!("/proc/{pid}/pagemap"))
            .map(|file| Self { file, regions: vec![abi::RawPageRegion::default(); REGIONS_PER_CALL] })
            .map_err(|error| CallError::from_io("open of a pagemap", &error))
    }

    /// Calls `found` for every run of pages in `range` (addresses) that match `filter`, in ascending order, with those
    /// categories of `report` that they have.
    ///
    /// # Errors
    /// `ENOTTY` where the kernel (before 6.7) has no `PAGEMAP_SCAN`.
    pub fn scan(
        &mut self,
        range: Range<u64>,
        filter: Filter,
        report: Categories,
        found: &mut dyn FnMut(Region),
    ) -> Result<(), CallError> {
        self.walk(range, filter, report, 0, found)
    }

    /// As [`Self::scan`], and protects in the same step every page that it returns, where its mapping is registered:
    /// such a page counts as not written until it is written again.
    ///
    /// # Errors
    /// As [`Self::scan`]. Pages that were reported before the failure are protected.
    pub fn scan_and_protect(
        &mut self,
        range: Range<u64>,
        filter: Filter,
        report: Categories,
        found: &mut dyn FnMut(Region),
    ) -> Result<(), CallError> {
        self.walk(range, filter, report, abi::PM_SCAN_WP_MATCHING, found)
    }

    fn walk(
        &mut self,
        range: Range<u64>,
        filter: Filter,
        report: Categories,
        flags: u64,
        found: &mut dyn FnMut(Region),
    ) -> Result<(), CallError> {
        let regions = &mut self.regions;
        let mut start = range.start;
        while start < range.end {
            let mut arg = abi::PmScanArg {
                size: size_of::<abi::PmScanArg>() as u64,
                flags,
                start,
                end: range.end,
                walk_end: 0,
                vec: regions.as_mut_ptr() as u64,
                vec_len: regions.len() as u64,
                max_pages: 0,
                category_inverted: filter.none.0 | filter.lacks.0,
                category_mask: filter.all.0 | filter.none.0,
                category_anyof_mask: filter.any.0 | filter.lacks.0,
                return_mask: report.0,
            };
            // SAFETY: PAGEMAP_SCAN reads and writes one `struct pm_scan_arg`, which `arg` is, and writes at most
            // `vec_len` regions to `vec`, which is as long and lives until after the call.
            let count = unsafe { libc::ioctl(self.file.as_raw_fd(), abi::PAGEMAP_SCAN, &raw mut arg) };
            let Ok(count) = usize::try_from(count) else {
                match CallError::last("ioctl PAGEMAP_SCAN") {
                    // A signal came: the walk stopped where it says.
                    CallError { errno: rustix::io::Errno::INTR, .. } if arg.walk_end >= start => {
                        start = arg.walk_end;
                        continue;
                    }
                    error => return Err(error),
                }
            };
            for region in regions.iter().take(count) {
                let categories = Categories(region.categories);
                found(Region { start: region.start, end: region.end, categories });
            }
            // Only a full vector ends a walk early. `walk_end` alone does not tell: when a walk that filled the kernel's
            // own buffer (512 regions) then ends of itself, it still points to where that buffer was last full.
            let Some(last) = regions.last().filter(|_| count == regions.len()) else { break };
            start = arg.walk_end.max(last.end);
        }
        Ok(())
    }

    /// The addresses that the process has guarded (`MADV_GUARD_INSTALL`), ascending; none where the kernel does not tell
    /// them ([`tells_guards`]).
    ///
    /// # Errors
    /// What the kernel says.
    pub fn guards(&mut self) -> Result<Vec<Range<u64>>, CallError> {
        let mut found: Vec<Range<u64>> = Vec::new();
        if !tells_guards() {
            return Ok(found);
        }
        self.scan(0..abi::ADDRESS_END, GUARDS, Categories::GUARD, &mut |region| match found.last_mut() {
            Some(last) if last.end == region.start => last.end = region.end,
            _ => found.push(region.start..region.end),
        })?;
        Ok(found)
    }

    /// The plain entries of `entries.len()` pages from page number `first` on. Pages beyond the end of user memory
    /// read as 0, "not present".
    ///
    /// # Errors
    /// What the kernel says.
    pub fn read_entries(&self, first: u64, entries: &mut [Entry]) -> Result<(), CallError> {
        let mut bytes = vec![0_u8; entries.len() * size_of::<u64>()];
        let mut done = 0;
        while let Some(rest) = bytes.get_mut(done..).filter(|rest| !rest.is_empty()) {
            match self.file.read_at(rest, first * 8 + done as u64) {
                Ok(0) => break,
                Ok(count) => done += count,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(CallError::from_io("read of a pagemap", &error)),
            }
        }
        let (words, _) = bytes.as_chunks::<8>();
        for (entry, word) in entries.iter_mut().zip(words) {
            *entry = Entry(u64::from_ne_bytes(*word));
        }
        Ok(())
    }
}

/// One 8-byte entry of a pagemap, as `Documentation/admin-guide/mm/pagemap.rst` describes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Entry(pub u64);

impl Entry {
    /// In memory.
    pub fn is_present(self) -> bool {
        self.0 & (1 << 63) != 0
    }
    /// In swap.
    pub fn is_swapped(self) -> bool {
        self.0 & (1 << 62) != 0
    }
    /// Of a file, or of shared memory.
    pub fn is_file(self) -> bool {
        self.0 & (1 << 61) != 0
    }
    /// Mapped by this process only. The kernel's pages of zeros are not.
    pub fn is_exclusive(self) -> bool {
        self.0 & (1 << 56) != 0
    }
    /// Written since the marks were taken away, or of a mapping that is newer ([`crate::soft_dirty`]).
    pub fn is_soft_dirty(self) -> bool {
        self.0 & (1 << 55) != 0
    }
    /// Where in physical memory it is; `None` when it is not in memory, or that is hidden from who reads.
    pub fn frame(self) -> Option<u64> {
        let frame = self.0 & ((1 << 55) - 1);
        (self.is_present() && frame != 0).then_some(frame)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page_aligned(bytes: usize) -> (Vec<u8>, usize) {
        let memory = vec![1_u8; bytes + abi::PAGE_BYTES];
        let offset = memory.as_ptr().align_offset(abi::PAGE_BYTES);
        (memory, offset)
    }

    #[test]
    fn a_scan_finds_more_regions_than_one_call_returns() {
        // Alternating present and never touched pages, twice as many as the vector holds.
        let pages = REGIONS_PER_CALL * 4;
        let layout = std::alloc::Layout::from_size_align(pages * abi::PAGE_BYTES, 2 << 20).unwrap();
        // SAFETY: the layout is not empty; the memory is written within its bounds and freed with the same layout.
        let start = unsafe {
            let start = std::alloc::alloc(layout);
            assert!(!start.is_null());
            libc::madvise(start.cast(), layout.size(), libc::MADV_NOHUGEPAGE);
            for page in (0..pages).step_by(2) {
                start.add(page * abi::PAGE_BYTES).write(1);
            }
            start
        };
        let range = start as u64..start as u64 + layout.size() as u64;
        let pid = rustix::process::getpid();
        let filter = Filter { all: Categories::PRESENT, ..Filter::ANYTHING };
        let mut found = Vec::new();
        let mut map = Pagemap::open(pid).unwrap();
        map.scan(range.clone(), filter, Categories::PRESENT, &mut |region| found.push(region)).unwrap();
        assert_eq!(found.len(), pages / 2);
        for (index, region) in found.iter().enumerate() {
            assert_eq!(region.start, range.start + (2 * index * abi::PAGE_BYTES) as u64);
            assert_eq!(region.end, region.start + abi::PAGE_SIZE);
        }
        // What is asked for by what it lacks is reported by what it has.
        let filter = Filter { lacks: Categories::PRESENT, ..Filter::ANYTHING };
        let mut lacking = Vec::new();
        map.scan(range.clone(), filter, Categories::PRESENT, &mut |region| lacking.push(region)).unwrap();
        assert_eq!(lacking.len(), pages / 2);
        assert!(lacking.iter().all(|region| region.categories == Categories::NONE));
        let either = Filter { any: Categories::PRESENT, lacks: Categories::WP_ALLOWED, ..Filter::ANYTHING };
        let mut pages_of = 0;
        map.scan(range.clone(), either, Categories::PRESENT, &mut |region| {
            let has = region.categories == Categories::PRESENT;
            assert_eq!(has, found.iter().any(|found| found.start == region.start));
            pages_of += (region.end - region.start) / abi::PAGE_SIZE;
        })
        .unwrap();
        assert_eq!(pages_of, pages as u64);
        let mut entries = vec![Entry::default(); pages];
        map.read_entries(range.start / abi::PAGE_SIZE, &mut entries).unwrap();
        assert!(entries.iter().enumerate().all(|(index, entry)| entry.is_present() == (index % 2 == 0)));
        // SAFETY: allocated above with this layout, and not used after.
        unsafe { std::alloc::dealloc(start, layout) };
    }

    #[test]
    fn guards_are_found_where_the_kernel_tells_them() {
        const PAGES: usize = 64;
        // `MADV_GUARD_INSTALL` of `asm-generic/mman-common.h`.
        const GUARD_INSTALL: libc::c_int = 102;
        let (flags, rw) = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, libc::PROT_READ | libc::PROT_WRITE);
        // SAFETY: a fresh mapping of our own, used within its bounds and unmapped at the end.
        let (start, guarded) = unsafe {
            let start = libc::mmap(std::ptr::null_mut(), PAGES * abi::PAGE_BYTES, rw, flags, -1, 0);
            assert_ne!(start, libc::MAP_FAILED);
            start.cast::<u8>().write_bytes(1, PAGES * abi::PAGE_BYTES);
            let at = start.cast::<u8>().add(8 * abi::PAGE_BYTES);
            (start, libc::madvise(at.cast(), 4 * abi::PAGE_BYTES, GUARD_INSTALL) == 0)
        };
        let found = Pagemap::open(rustix::process::getpid()).unwrap().guards().unwrap();
        // SAFETY: mapped above, and not used any more.
        unsafe { libc::munmap(start, PAGES * abi::PAGE_BYTES) };
        let first = start as u64 + 8 * abi::PAGE_SIZE;
        let expected = guarded && tells_guards();
        assert_eq!(found.contains(&(first..first + 4 * abi::PAGE_SIZE)), expected, "{found:x?}");
    }

    #[test]
    fn entries_of_our_own_memory_are_present() {
        let (memory, offset) = page_aligned(abi::PAGE_BYTES);
        let page = (memory.as_ptr() as u64 + offset as u64) / abi::PAGE_SIZE;
        let mut entries = [Entry::default()];
        Pagemap::open(rustix::process::getpid()).unwrap().read_entries(page, &mut entries).unwrap();
        assert!(entries[0].is_present() && !entries[0].is_file());
    }
}
