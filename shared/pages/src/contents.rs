//! What was written to a memfd or to a System V segment in ways that no page table shows in the end: through a descriptor, by
//! `write(2)` and its like, and through a mapping that was made after one round and given up before the next.
//!
//! The former changes the time of change. The latter need not (who reads a page first finds it writable), but making the
//! mapping changes the time of access, which we leave alone ourselves. So does much that writes nothing: these times tell
//! when there may be something to find, and never what. That is found by comparing
//! all pages with hashes of what was sent of them, as was read for that: a page that was written and written back in
//! between is like any other. Where this errs, and how rarely, is what [`crate::known`] says.
//!
//! Comparing takes a while for much memory, and need not be done in each round: it finds all that has been written since the
//! last one, whenever that was. When frozen it is done; in the last round, if there is something to be found of late that
//! page tables do not tell, which is then not left for the freeze.
//!
//! The time is set when a call begins to write. So it counts as changed for as long as a call may take ([`CALL`], and when
//! frozen [`LONG_CALL`]), and then once more: the writes of a call that was under way at one look are found by the next one.
//! Nor does a time tell of a second change within one tick of the kernel's clock, which that covers too.
//!
//! Of a segment there are no descriptors, and whoever writes to it by a mapping may change its time of change as well. So only
//! its time of access counts, and the shorter time is for a mapping that was made while a round looked. What was given back of
//! it is not seen here ([`crate::given_back`]).
//!
//! What remains unseen: the later part of a single call that takes longer than that, and a mapping that is made by a
//! descriptor which leaves the time of access alone (`O_NOATIME`).

use std::collections::BTreeMap;
use std::fs::File;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime};

use haulage_sys::PAGE_BYTES;
use xxhash_rust::xxh64::xxh64;

use crate::frame::Parts;
use crate::gather::PageBatch;
use crate::object;
use crate::range::{PageNo, PageRange, RangeSet};

/// How long one call may take that writes. At most 2 GiB go by one call, in memory.
const CALL: Duration = Duration::from_secs(2);
/// The same for the last look of all: from a slow disk or with little of a processor, it may take long.
const LONG_CALL: Duration = Duration::from_secs(30);
/// Rounds compare for no more than one part in so many of the time.
const SHARE: u32 = 10;
/// Pages of a leaf.
const LEAF: u64 = 512;
/// Pages that are read at a time; they stay in the processor's cache.
const PIECE: u64 = 64;
/// Threads that compare; memory is no faster for more.
const THREADS: usize = 4;
/// Objects of fewer pages are not worth a second thread.
const WORTHWHILE: u64 = 4096;
/// Instead of a hash: the page was not sent.
const UNKNOWN: u64 = 0;

const ZEROS: [u8; PAGE_BYTES] = [0; PAGE_BYTES];

/// What was sent of a memfd, and when it was last looked at.
#[derive(Debug)]
pub(crate) struct Contents {
    seed: u64,
    zero: u64,
    /// How long a call may take that writes, at most.
    longest_call: Duration,
    /// The last look that was accounted for.
    last: Option<Look>,
    /// When pages were last compared, and how long that took.
    compared: Option<(Instant, Duration)>,
    /// What that found, until the next round shows what of it page tables tell too.
    found: Option<RangeSet>,
    /// It has told more than page tables do.
    is_worthwhile: bool,
    /// Of pages that are still to be sent again, nothing.
    hashes: BTreeMap<u64, Box<[u64; LEAF as usize]>>,
}

/// A look at the times of change and of access.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Look {
    /// Each in seconds and nanoseconds.
    times: [(i64, i64); 2],
    at: SystemTime,
}

impl Look {
    /// Now, before anything of the content is read.
    pub(crate) fn at(file: &File) -> io::Result<Self> {
        let at = SystemTime::now();
        let metadata = file.metadata()?;
        let times = [(metadata.ctime(), metadata.ctime_nsec()), (metadata.atime(), metadata.atime_nsec())];
        Ok(Self { times, at })
    }

    /// As [`Self::at`], of a segment.
    pub(crate) fn at_segment(file: &File) -> io::Result<Self> {
        let look = Self::at(file)?;
        let [_, accessed] = look.times;
        Ok(Self { times: [accessed; 2], ..look })
    }

    /// For a mapping that was made between the listing of mappings, which began at `listed`, and this look: it is in no list,
    /// and may be written to for long. So the times of this look count as changed for as long from then on.
    pub(crate) fn of_those_listed(self, listed: SystemTime) -> Self {
        Self { at: listed.min(self.at), ..self }
    }

    /// Whether something may still have been written after this look by whoever began before it, and took so long.
    fn is_fresh(self, call: Duration) -> bool {
        let (seconds, nanoseconds) = self.times.into_iter().max().unwrap_or_default();
        let since = Duration::new(seconds.try_into().unwrap_or(0), nanoseconds.try_into().unwrap_or(0));
        // A time that lies ahead is that of a clock that was set back.
        let age = self.at.duration_since(SystemTime::UNIX_EPOCH + since);
        !age.is_ok_and(|age| age >= call)
    }
}

impl Contents {
    /// Of a segment, to which calls do not write; nothing was sent yet.
    pub(crate) fn of_segment() -> Self {
        Self { longest_call: CALL, ..Self::new() }
    }

    /// Nothing was sent yet.
    pub(crate) fn new() -> Self {
        let seed = RandomState::new().hash_one(0);
        Self {
            seed,
            zero: hash(&ZEROS, seed),
            longest_call: LONG_CALL,
            last: None,
            compared: None,
            found: None,
            is_worthwhile: false,
            hashes: BTreeMap::new(),
        }
    }

    /// The pages of `pages` that are not as they were sent, as far as this round is to find out, beside those of `told`, of
    /// which page tables have. With `unsure`, they may not have told everything. `look` was made before anything else.
    pub(crate) fn collect(
        &mut self,
        file: &File,
        pages: &RangeSet,
        told: &RangeSet,
        look: Look,
        unsure: bool,
        is_last: bool,
    ) -> io::Result<RangeSet> {
        if unsure {
            self.last = None;
        }
        // Some was written through mappings while it was compared.
        if let Some(found) = self.found.take() {
            self.is_worthwhile = !found.subtract(told).is_empty();
        }
        self.forget(told);
        let is_due = self.compared.is_none_or(|(when, took)| when.elapsed() >= took * SHARE);
        if !self.may_differ(look, CALL) {
            self.last = Some(look);
        } else if is_due || is_last && self.is_worthwhile {
            let started = Instant::now();
            let differing = self.differing(file, pages)?;
            (self.last, self.compared) = (Some(look), Some((Instant::now(), started.elapsed())));
            self.forget(&differing);
            self.found = Some(differing.clone());
            return Ok(differing);
        }
        Ok(RangeSet::new())
    }

    /// As [`Self::collect`] in the last round, of a frozen container. Changes nothing.
    pub(crate) fn scan(
        &self,
        file: &File,
        pages: &RangeSet,
        look: Look,
        unsure: bool,
    ) -> io::Result<RangeSet> {
        match unsure || self.may_differ(look, self.longest_call) {
            true => self.differing(file, pages),
            false => Ok(RangeSet::new()),
        }
    }

    /// Whether something may have been written since the last look that was accounted for.
    fn may_differ(&self, now: Look, call: Duration) -> bool {
        self.last.is_none_or(|last| last.times != now.times || last.is_fresh(call))
    }

    /// The pages of `pages` that were sent and are not now as they were then.
    fn differing(&self, file: &File, pages: &RangeSet) -> io::Result<RangeSet> {
        let pieces: Vec<PageRange> = pages.iter().flat_map(in_pieces).collect();
        let next = AtomicUsize::new(0);
        let compare = || -> io::Result<Vec<PageRange>> {
            let (mut found, mut buffer) = (Vec::new(), vec![0; PIECE as usize * PAGE_BYTES]);
            while let Some(piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
                self.compare(file, *piece, &mut buffer, &mut found)?;
            }
            Ok(found)
        };
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = if pages.page_count() < WORTHWHILE { 1 } else { processors.min(THREADS) };
        let found = std::thread::scope(|scope| {
            let others: Vec<_> = (1..threads).map(|_| scope.spawn(compare)).collect();
            let ours = compare();
            let join = |thread: std::thread::ScopedJoinHandle<'_, _>| {
                thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            };
            std::iter::once(ours).chain(others.into_iter().map(join)).collect::<io::Result<Vec<_>>>()
        });
        let mut found = found?.concat();
        found.sort_unstable_by_key(|range| range.start());
        Ok(found.into_iter().collect())
    }

    fn compare(
        &self,
        file: &File,
        piece: PageRange,
        buffer: &mut [u8],
        found: &mut Vec<PageRange>,
    ) -> io::Result<()> {
        // In one leaf, whose pages a piece never exceeds.
        let Some(leaf) = self.hashes.get(&(piece.start().0 / LEAF)) else { return Ok(()) };
        let here = buffer.get_mut(..piece.count() as usize * PAGE_BYTES).unwrap_or_default();
        let read = object::read_pages(file, piece.start(), here)?;
        let sent = leaf.iter().skip((piece.start().0 % LEAF) as usize);
        let pages = here.chunks_exact(PAGE_BYTES).take(read as usize);
        for ((page, bytes), sent) in (piece.start().0..).zip(pages).zip(sent) {
            if *sent != UNKNOWN && *sent != hash(bytes, self.seed) {
                found.extend(PageRange::with_count(PageNo(page), 1));
            }
        }
        Ok(())
    }

    /// Pages that are to be sent again, whatever they hold then.
    fn forget(&mut self, pages: &RangeSet) {
        for piece in pages.iter().flat_map(in_pieces) {
            let Some(leaf) = self.hashes.get_mut(&(piece.start().0 / LEAF)) else { continue };
            let first = (piece.start().0 % LEAF) as usize;
            leaf.iter_mut().skip(first).take(piece.count() as usize).for_each(|hash| *hash = UNKNOWN);
        }
    }

    /// Takes note of what was read of the memfd to be sent.
    pub(crate) fn sent(&mut self, batch: &PageBatch) {
        let mut data = batch.data().chunks_exact(PAGE_BYTES);
        for run in &batch.runs {
            // Whole pages: nothing has been taken out of them yet.
            let is_zero = run.parts == Parts::NONE;
            for page in run.range.start().0..run.range.end().0 {
                let hash = match is_zero {
                    true => self.zero,
                    false => data.next().map_or(UNKNOWN, |bytes| hash(bytes, self.seed)),
                };
                let leaf =
                    self.hashes.entry(page / LEAF).or_insert_with(|| Box::new([UNKNOWN; LEAF as usize]));
                leaf.iter_mut().skip((page % LEAF) as usize).take(1).for_each(|place| *place = hash);
            }
        }
    }
}

/// A run in pieces, none of which spans two leaves.
fn in_pieces(run: PageRange) -> impl Iterator<Item = PageRange> {
    let (start, end) = (run.start().0, run.end().0);
    (start / PIECE..end.div_ceil(PIECE)).filter_map(move |piece| {
        PageRange::new(PageNo(start.max(piece * PIECE)), PageNo(end.min((piece + 1) * PIECE)))
    })
}

fn hash(page: &[u8], seed: u64) -> u64 {
    match xxh64(page, seed) {
        UNKNOWN => 1,
        hash => hash,
    }
}

const _: () = assert!(LEAF.is_multiple_of(PIECE));

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gather::gather;
    use crate::object::Label;
    use crate::process::{Generation, Process, Vpid};
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    use std::ops::ControlFlow;
    use std::os::unix::fs::FileExt;

    /// A memfd of that many pages, each of another content, but for every third, and what was sent of all but the last.
    fn sent(pages: u64) -> (File, Contents, RangeSet) {
        let file = File::from(memfd_create("x", MemfdFlags::CLOEXEC).unwrap());
        ftruncate(&file, pages * PAGE_BYTES as u64).unwrap();
        for page in (0..pages).filter(|page| page % 3 != 0) {
            file.write_all_at(&page.to_le_bytes(), page * PAGE_BYTES as u64 + 100).unwrap();
        }
        let (vpid, generation) = (Vpid::of_object(1), Generation(1));
        let process = Process { pid: rustix::process::getpid(), vpid, generation };
        let all = RangeSet::from_iter(PageRange::with_count(PageNo(0), pages - 1));
        let mut contents = Contents::new();
        gather(process, Some((&file, &Label::anonymous())), 1, &all, &mut |batch| {
            contents.sent(&batch);
            ControlFlow::Continue(())
        })
        .unwrap();
        (file, contents, RangeSet::from_iter(PageRange::with_count(PageNo(0), pages)))
    }

    #[test]
    fn pages_that_are_not_as_they_were_sent_are_found_and_no_others() {
        for pages in [700, 3 * WORTHWHILE + 5] {
            let (file, contents, all) = sent(pages);
            assert!(contents.differing(&file, &all).unwrap().is_empty());
            for page in [0, 64, 511, 512, 600, pages - 1] {
                file.write_all_at(b"other", page * PAGE_BYTES as u64).unwrap();
            }
            file.write_all_at(&65_u64.to_le_bytes(), 65 * PAGE_BYTES as u64 + 100).unwrap();
            let found: Vec<_> = contents.differing(&file, &all).unwrap().pages().map(|page| page.0).collect();
            // The last one was not sent.
            assert_eq!(found, [0, 64, 511, 512, 600]);
        }
    }

    #[test]
    fn the_end_of_a_page_that_was_cut_off_reads_as_zeros() {
        let (file, contents, all) = sent(100);
        ftruncate(&file, 50 * PAGE_BYTES as u64 + 50).unwrap();
        let found: Vec<_> = contents.differing(&file, &all).unwrap().pages().map(|page| page.0).collect();
        assert_eq!(found, [50]);
        ftruncate(&file, 99 * PAGE_BYTES as u64).unwrap();
        let found = contents.differing(&file, &all).unwrap();
        assert_eq!(found.page_count(), (50..99).filter(|page| page % 3 != 0).count() as u64);
    }

    #[test]
    fn what_one_round_has_no_time_for_another_one_finds() {
        let (file, mut contents, all) = sent(100);
        let told = RangeSet::from_iter(PageRange::with_count(PageNo(1), 1));
        let mut round = |unsure, is_last| {
            let look = Look::at(&file).unwrap();
            let found = contents.collect(&file, &all, &told, look, unsure, is_last).unwrap();
            let frozen = contents.scan(&file, &all, look, false).unwrap();
            contents.compared = Some((Instant::now(), Duration::from_secs(60)));
            (found.page_count(), frozen.page_count())
        };
        assert_eq!(round(false, false), (0, 0));
        file.write_all_at(b"other", 7).unwrap();
        for unsure in [false, true, false] {
            assert_eq!(round(unsure, false), (0, 1), "it was compared just now");
        }
        assert_eq!(round(false, true), (0, 1), "nothing has been found so far");
        contents.compared = None;
        file.write_all_at(b"other", PAGE_BYTES as u64 + 7).unwrap();
        let mut round = |is_last| {
            let look = Look::at(&file).unwrap();
            let found = contents.collect(&file, &all, &told, look, false, is_last).unwrap();
            contents.compared = Some((Instant::now(), Duration::from_secs(60)));
            found.page_count()
        };
        assert_eq!(round(false), 1, "what page tables have told is not looked for");
        file.write_all_at(b"other", 2 * PAGE_BYTES as u64 + 7).unwrap();
        assert_eq!([round(false), round(true)], [0, 1], "what was found is not looked for again");
    }

    #[test]
    fn what_others_read_shows_and_what_we_read_does_not() {
        use std::os::fd::AsRawFd;
        let (file, ..) = sent(1);
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let times = || Look::at(&file).unwrap().times;
        let before = times();
        let untraced = object::open_untraced(path.as_ref()).unwrap();
        untraced.read_at(&mut [0; 8], 0).unwrap();
        assert_eq!(times(), before);
        // The kernel's clock for this ticks every few milliseconds.
        let began = Instant::now();
        while times() == before && began.elapsed() < Duration::from_secs(10) {
            File::open(&path).unwrap().read_at(&mut [0; 8], 0).unwrap();
        }
        assert_ne!(times(), before);
    }

    #[test]
    fn a_change_is_suspected_until_no_call_can_be_under_way_any_more() {
        let (_, mut contents, _) = sent(3);
        let at = |changed, milliseconds| Look {
            times: [(changed, 0), (0, 0)],
            at: SystemTime::UNIX_EPOCH + Duration::from_millis(milliseconds),
        };
        assert!(contents.may_differ(at(100, 200_000), CALL), "nobody has looked yet");
        contents.last = Some(at(100, 100_500));
        assert!(
            contents.may_differ(at(100, 110_000), CALL),
            "a call may have been under way at the last look"
        );
        contents.last = Some(at(100, 110_000));
        assert!(!contents.may_differ(at(100, 110_100), CALL));
        assert!(contents.may_differ(at(110, 110_200), CALL));
        assert!(contents.may_differ(at(90, 110_200), CALL), "the clock was set back");
        contents.last = Some(at(120, 110_000));
        assert!(contents.may_differ(at(120, 110_100), CALL), "and before the last look");
        contents.last = Some(at(100, 110_000));
        assert!(
            contents.may_differ(at(100, 110_100), LONG_CALL),
            "at last a call may have been under way for longer"
        );
        let used = Look { times: [(100, 0), (105, 0)], ..at(100, 110_100) };
        assert!(contents.may_differ(used, CALL), "somebody has mapped it");
        let listed = SystemTime::UNIX_EPOCH + Duration::from_secs(99);
        contents.last = Some(at(100, 110_000).of_those_listed(listed));
        assert!(
            contents.may_differ(at(100, 110_100), CALL),
            "mapped since mappings were listed, which took long"
        );
    }
}
