//! Pages of shared memory that were given back to the kernel (`MADV_REMOVE`) and then read, which makes them anew, of
//! zeros.
//!
//! Page tables do not tell: to a page that was protected in them the kernel gives the new one as protected, unwritten. And
//! whoever looks at what exists before and after sees it both times. So we have the memory mapped ourselves and touch none
//! of it: what is still in our page tables is as it was when it came there ([`View`]). All else that nobody has written to
//! is read, and what is found to be zeros is sent again.
//!
//! ```text
//!  round:  all of it into a new view ── what has left the old one? ── read that ── the new one takes its place
//! ```
//! In this order, because filling page tables also brings in neighbours: a page that comes into the new view in the place of
//! one that was taken out has left the old one. A round does so only if there is something to be read, and for no more than
//! one part in [`SHARE`] of the time; the freeze reads what rounds have left.
//!
//! Memfds need none of this: their content is compared whenever that may have happened ([`crate::contents`]).

use std::fs::File;
use std::io;
use std::ops::Range;
use std::time::{Duration, Instant};

use haulage_sys::view::View;
use haulage_sys::{CallError, PAGE_BYTES};

use crate::object;
use crate::range::{PageNo, PageRange, RangeSet};

/// Rounds look for no more than one part in so many of the time.
const SHARE: u32 = 10;
/// So few pages the last round leaves for the freeze: reading them takes a millisecond.
const FEW: u64 = 1024;
/// Bytes that are brought into view at a time.
const AT_ONCE: usize = 64 << 20;
/// Pages that are read at a time; they stay in the processor's cache.
const PIECE: u64 = 64;

const ZEROS: [u8; PAGE_BYTES] = [0; PAGE_BYTES];

/// What vouches for pages of one object.
#[derive(Debug, Default)]
pub(crate) struct GivenBack {
    view: Option<View>,
    /// When a new view was last made, and how long that took, with all that was read.
    looked: Option<(Instant, Duration)>,
}

impl GivenBack {
    /// Pages of `exists` that are zeros and may have been something else when they were sent, as far as this round is to
    /// find out. Those of `dirty` are to be sent again anyway, after this, whatever they hold.
    pub(crate) fn collect(
        &mut self,
        file: &File,
        exists: &RangeSet,
        dirty: &RangeSet,
        is_last: bool,
    ) -> io::Result<RangeSet> {
        let unseen = exists.subtract(&self.in_view()?);
        let is_due = self.looked.is_none_or(|(when, took)| when.elapsed() >= took * SHARE);
        let is_time = is_due || is_last && unseen.page_count() > FEW;
        if unseen.is_empty() || !is_time {
            return Ok(RangeSet::new());
        }
        let started = Instant::now();
        let view = view_of(file, exists)?;
        let found = zeros(file, &exists.subtract(&self.in_view()?).subtract(dirty))?;
        (self.view, self.looked) = (Some(view), Some((Instant::now(), started.elapsed())));
        Ok(found)
    }

    /// The same of `pages`, which are not known to have been written to, when frozen. Changes nothing.
    pub(crate) fn scan(&self, file: &File, pages: &RangeSet) -> io::Result<RangeSet> {
        zeros(file, &pages.subtract(&self.in_view()?))
    }

    fn in_view(&self) -> io::Result<RangeSet> {
        let mut found = RangeSet::new();
        if let Some(view) = &self.view {
            let mut add =
                |bytes| PageRange::of_addresses(bytes).into_iter().for_each(|run| found.insert(run));
            view.scan(&mut add).map_err(|CallError { errno, .. }| errno)?;
        }
        Ok(found)
    }
}

/// A view with all of `pages`, of which there are some. If one is given back meanwhile, its owner has it again, of zeros.
fn view_of(file: &File, pages: &RangeSet) -> io::Result<View> {
    let length = pages.runs().last().map_or(0, |run| run.addresses().end);
    let fill = || {
        let view = View::of(file, length)?;
        for run in pages.iter() {
            let Range { start, end } = run.addresses();
            // Nothing of this process can be mapped or unmapped meanwhile.
            for at in (start..end).step_by(AT_ONCE) {
                view.populate(at..end.min(at + AT_ONCE as u64))?;
            }
        }
        Ok(view)
    };
    fill().map_err(|CallError { errno, .. }| errno.into())
}

/// The pages of `pages` that hold nothing but zeros.
fn zeros(file: &File, pages: &RangeSet) -> io::Result<RangeSet> {
    let (mut found, mut buffer) = (RangeSet::new(), vec![0; PIECE as usize * PAGE_BYTES]);
    for run in pages.iter() {
        let mut left = Some(run);
        while let Some(run) = left {
            let (piece, rest) = run.split_at(PIECE.min(run.count()));
            left = rest;
            let here = buffer.get_mut(..piece.count() as usize * PAGE_BYTES).unwrap_or_default();
            let read = object::read_pages(file, piece.start(), here)?;
            for (bytes, page) in here.chunks_exact(PAGE_BYTES).take(read as usize).zip(piece.start().0..) {
                if bytes == ZEROS {
                    PageRange::with_count(PageNo(page), 1).into_iter().for_each(|page| found.insert(page));
                }
            }
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, ftruncate, memfd_create};
    use std::os::unix::fs::FileExt;

    fn pages(start: u64, count: u64) -> RangeSet {
        PageRange::with_count(PageNo(start), count).into_iter().collect()
    }

    /// Takes pages out, and puts zeros in their place.
    fn anew(file: &File, start: u64, count: u64) {
        let (offset, length) = (start * PAGE_BYTES as u64, count * PAGE_BYTES as u64);
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(file, flags, offset, length).unwrap();
        (start..start + count).for_each(|page| file.write_all_at(&[0], page * PAGE_BYTES as u64).unwrap());
    }

    #[test]
    fn pages_that_were_made_anew_are_found_once_by_rounds_and_each_time_when_frozen() {
        let file = File::from(memfd_create("x", MemfdFlags::CLOEXEC).unwrap());
        ftruncate(&file, 5000 * PAGE_BYTES as u64).unwrap();
        (0..4000).for_each(|page| file.write_all_at(&[1], page * PAGE_BYTES as u64).unwrap());
        let (all, none) = (pages(0, 4000), RangeSet::new());
        let mut given_back = GivenBack::default();
        let busy = Some((Instant::now(), Duration::from_secs(600)));
        assert!(given_back.collect(&file, &all, &all, false).unwrap().is_empty());
        assert!(given_back.scan(&file, &all).unwrap().is_empty());

        anew(&file, 70, 200);
        file.write_all_at(&[2], 80 * PAGE_BYTES as u64).unwrap();
        let expected = pages(70, 200).subtract(&pages(80, 1));
        for _ in 0..2 {
            assert_eq!(given_back.scan(&file, &all).unwrap(), expected);
        }
        given_back.looked = busy;
        for is_last in [false, true] {
            assert!(given_back.collect(&file, &all, &none, is_last).unwrap().is_empty(), "not now");
        }
        given_back.looked = None;
        let rest = expected.subtract(&pages(100, 9));
        assert_eq!(given_back.collect(&file, &all, &pages(100, 9), false).unwrap(), rest);
        assert!(given_back.scan(&file, &all).unwrap().is_empty(), "it is known what they are");

        given_back.looked = busy;
        anew(&file, 1000, FEW + 1);
        assert!(given_back.collect(&file, &all, &none, false).unwrap().is_empty(), "not now");
        assert_eq!(given_back.collect(&file, &all, &none, true).unwrap(), pages(1000, FEW + 1));
    }
}
