//! The pages of a process by the plain entries of its pagemap, for kernels before 6.7, which have no `PAGEMAP_SCAN`.

use haulage_sys::CallError;
use haulage_sys::pagemap::{Entry, Pagemap};
use haulage_sys::soft_dirty::ZeroFrames;

use crate::range::{PageNo, PageRange, RangeSet};

/// Entries read at a time; 8 bytes each.
const AT_A_TIME: u64 = 64 * 1024;

/// What entries tell of some pages.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Found {
    /// Present or swapped, and not a page of zeros of the kernel's.
    pub(crate) exists: RangeSet,
    /// Those of them that have a soft-dirty mark.
    pub(crate) marked: RangeSet,
}

/// Reads the entries of all pages of `within`. Where the frames of zeros are not known, these exist like any others,
/// and are sent as zeros.
pub(crate) fn read(
    pagemap: &Pagemap,
    within: &RangeSet,
    mut zeros: Option<&mut ZeroFrames>,
) -> Result<Found, CallError> {
    if let Some(zeros) = &mut zeros {
        zeros.refresh();
    }
    let (mut exists, mut marked) = (Runs::default(), Runs::default());
    let mut entries = Vec::new();
    for run in within.iter() {
        let mut rest = Some(run);
        while let Some(range) = rest {
            let (part, after) = range.split_at(AT_A_TIME);
            entries.clear();
            entries.resize(part.count() as usize, Entry::default());
            pagemap.read_entries(part.start().0, &mut entries)?;
            for (entry, page) in entries.iter().zip(part.start().0..) {
                let here = (entry.is_present() || entry.is_swapped()) && !entry.is_file();
                if here && !zeros.as_mut().is_some_and(|zeros| zeros.is_zero(page, *entry)) {
                    exists.push(page);
                    if entry.is_soft_dirty() {
                        marked.push(page);
                    }
                }
            }
            rest = after;
        }
    }
    Ok(Found { exists: exists.finish(), marked: marked.finish() })
}

/// Makes a set of ascending pages without looking at it for each of them.
#[derive(Debug, Default)]
struct Runs {
    set: RangeSet,
    /// First page, and one past the last.
    run: Option<(u64, u64)>,
}

impl Runs {
    fn push(&mut self, page: u64) {
        match &mut self.run {
            Some((_, end)) if *end == page => *end += 1,
            run => {
                let before = run.replace((page, page + 1));
                self.close(before);
            }
        }
    }

    fn close(&mut self, run: Option<(u64, u64)>) {
        if let Some(range) = run.and_then(|(start, end)| PageRange::new(PageNo(start), PageNo(end))) {
            self.set.insert(range);
        }
    }

    fn finish(mut self) -> RangeSet {
        let last = self.run.take();
        self.close(last);
        self.set
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_in_order_become_runs() {
        let mut runs = Runs::default();
        [3, 4, 5, 9, 11, 12].into_iter().for_each(|page| runs.push(page));
        let runs: Vec<_> = runs.finish().iter().map(|run| (run.start().0, run.end().0)).collect();
        assert_eq!(runs, [(3, 6), (9, 10), (11, 13)]);
        assert!(Runs::default().finish().is_empty());
    }

    #[test]
    fn our_own_memory_exists() {
        let us = rustix::process::getpid();
        let mapped = crate::maps::Maps::of(us).unwrap().tracked_pages();
        let pagemap = Pagemap::open(us).unwrap();
        let found = read(&pagemap, &mapped, None).unwrap();
        assert!(!found.exists.is_empty() && found.marked.subtract(&found.exists).is_empty());
        assert!(found.exists.subtract(&mapped).is_empty());
    }
}
