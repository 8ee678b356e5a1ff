//! Reading pages of a process into batches.

use std::fs::File;
use std::ops::{ControlFlow, Range};
use std::time::{Duration, Instant};

use haulage_sys::vm_read::VmReader;
use haulage_sys::{CallError, Errno, PAGE_BYTES, PAGE_SIZE};

use crate::codec::Codec;
use crate::frame::{BatchHead, HEADER, MAX_DATA_PAGES, Parts, RUN, Run};
use crate::object::{self, Label};
use crate::process::{Generation, Process, Vpid};
use crate::range::{PageNo, PageRange, RangeSet};

const ZEROS: [u8; PAGE_BYTES] = [0; PAGE_BYTES];

/// Pages of one process, as they were read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageBatch {
    pub(crate) vpid: Vpid,
    pub(crate) generation: Generation,
    /// Of shared memory.
    pub(crate) label: Label,
    pub(crate) round: u32,
    /// Ascending.
    pub(crate) runs: Vec<Run>,
    /// Room for the header, then what is to go of the bytes of the runs.
    pub(crate) buffer: Vec<u8>,
}

impl PageBatch {
    /// Pages with data in it, at most [`MAX_DATA_PAGES`].
    pub fn data_pages(&self) -> u64 {
        self.count(|run| !run.is_zero())
    }

    /// Those of them of which only parts are in it.
    pub fn partial_pages(&self) -> u64 {
        self.count(|run| !run.is_zero() && run.parts != Parts::ALL)
    }

    /// Pages of zeros in it, which cost next to nothing.
    pub fn zero_pages(&self) -> u64 {
        self.count(Run::is_zero)
    }

    /// Whether nothing is left in it.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// What is in it of the bytes of its pages.
    pub fn data(&self) -> &[u8] {
        self.buffer.get(HEADER..).unwrap_or_default()
    }

    /// Encoded, its data as it is.
    pub fn into_frame(mut self) -> Vec<u8> {
        let mut bytes = std::mem::take(&mut self.buffer);
        self.head().complete(Codec::Raw, &mut bytes);
        bytes
    }

    /// Encoded, with its data as `codec` has packed it.
    pub(crate) fn packed_frame(&self, codec: Codec, packed: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER + packed.len() + self.runs.len() * RUN);
        bytes.resize(HEADER, 0);
        bytes.extend_from_slice(packed);
        self.head().complete(codec, &mut bytes);
        bytes
    }

    fn head(&self) -> BatchHead<'_> {
        let Self { vpid, generation, ref label, round, ref runs, .. } = *self;
        BatchHead { vpid, generation, label, round, runs }
    }

    fn count(&self, which: impl Fn(&Run) -> bool) -> u64 {
        self.runs.iter().filter(|run| which(run)).map(|run| run.range.count()).sum()
    }
}

/// Takes batches; may block. `Break` ends the round early.
pub type Sink<'a> = &'a mut dyn FnMut(PageBatch) -> ControlFlow<()>;

/// What became of the pages that were asked for.
#[derive(Debug, Clone, Default)]
pub(crate) struct Gathered {
    /// Handed to the sink.
    pub(crate) sent: RangeSet,
    /// Not readable.
    pub(crate) gone: RangeSet,
    pub(crate) data_pages: u64,
    pub(crate) zero_pages: u64,
    pub(crate) bytes: u64,
    pub(crate) reading: Duration,
    pub(crate) sink: Duration,
    /// The sink wanted no more.
    pub(crate) stopped: bool,
}

/// Where pages are read.
enum Reader<'a> {
    Process(VmReader),
    Object(&'a File),
}

/// Reads the pages of `wanted` from `process`, or from the object for which it stands, and hands them to `sink` in
/// batches, ascending.
///
/// Pages that cannot be read are listed as gone, all that remain when the process ends.
pub(crate) fn gather(
    process: Process,
    object: Option<(&File, &Label)>,
    round: u32,
    wanted: &RangeSet,
    sink: Sink<'_>,
) -> Result<Gathered, CallError> {
    let mut result = Gathered::default();
    if wanted.is_empty() {
        return Ok(result);
    }
    let label = object.map(|(_, label)| label.clone()).unwrap_or_default();
    let reader = match object {
        Some((object, _)) => Reader::Object(object),
        None => match VmReader::open(process.pid) {
            Ok(reader) => Reader::Process(reader),
            Err(error) if error.is_gone() => return Ok(Gathered { gone: wanted.clone(), ..result }),
            Err(error) => return Err(error),
        },
    };
    let mut rest = wanted.iter().peekable();
    let mut cut = None;
    while let Some(group) = next_group(&mut rest, &mut cut) {
        let started = Instant::now();
        let mut buffer = Vec::with_capacity(HEADER + MAX_DATA_PAGES * (PAGE_BYTES + RUN));
        buffer.resize(HEADER, 0);
        let read = match &reader {
            Reader::Process(reader) => read_group(reader, &group, &mut buffer),
            Reader::Object(object) => read_object(object, &group, &mut buffer),
        };
        let got = match read {
            Ok(got) => got,
            Err(CallError { errno: Errno::SRCH, .. }) => RangeSet::new(),
            Err(error) => return Err(error),
        };
        let asked: RangeSet = group.into_iter().collect();
        asked.subtract(&got).iter().for_each(|range| result.gone.insert(range));
        if got.is_empty() {
            result.reading += started.elapsed();
            continue;
        }
        let runs = squeeze_zeros(&got, &mut buffer);
        let Process { vpid, generation, .. } = process;
        let batch = PageBatch { vpid, generation, label: label.clone(), round, runs, buffer };
        result.data_pages += batch.data_pages();
        result.zero_pages += batch.zero_pages();
        result.bytes += batch.data().len() as u64;
        let read = Instant::now();
        result.reading += read - started;
        let flow = sink(batch);
        result.sink += read.elapsed();
        if flow.is_break() {
            // Whether this batch has gone out is not known: it stays pending.
            result.stopped = true;
            return Ok(result);
        }
        got.iter().for_each(|range| result.sent.insert(range));
    }
    Ok(result)
}

/// The next pages that fit one batch. `cut` is what the last group left of a run.
fn next_group(
    rest: &mut std::iter::Peekable<impl Iterator<Item = PageRange>>,
    cut: &mut Option<PageRange>,
) -> Option<Vec<PageRange>> {
    let mut group = Vec::new();
    let mut room = MAX_DATA_PAGES as u64;
    while room > 0 {
        let Some(run) = cut.take().or_else(|| rest.next()) else { break };
        let (part, after) = run.split_at(room);
        room -= part.count();
        group.push(part);
        *cut = after;
    }
    (!group.is_empty()).then_some(group)
}

/// Appends the pages of `group` to `bytes` and says which could be read.
fn read_group(reader: &VmReader, group: &[PageRange], bytes: &mut Vec<u8>) -> Result<RangeSet, CallError> {
    let mut got = RangeSet::new();
    let mut rest: Vec<Range<u64>> = group.iter().map(|range| range.addresses()).collect();
    while !rest.is_empty() {
        let before = bytes.len();
        let read = reader.read(&rest, bytes)? / PAGE_BYTES;
        bytes.truncate(before + read * PAGE_BYTES);
        skip(&mut rest, read as u64, &mut got);
        // What stopped the read is a page that the process may not access itself, or that is gone.
        let Some(address) = rest.first().map(|range| range.start) else { break };
        let mut page = [0; PAGE_BYTES];
        let readable = reader.read_protected(address, &mut page).is_ok_and(|count| count == PAGE_BYTES);
        if readable {
            bytes.extend(page);
        }
        let mut unreadable = RangeSet::new();
        skip(&mut rest, 1, if readable { &mut got } else { &mut unreadable });
    }
    Ok(got)
}

/// As [`read_group`], from an object. Unlike a mapping of it, reading it leaves its holes as they are.
fn read_object(object: &File, group: &[PageRange], bytes: &mut Vec<u8>) -> Result<RangeSet, CallError> {
    let mut got = RangeSet::new();
    for range in group {
        let before = bytes.len();
        bytes.resize(before + range.count() as usize * PAGE_BYTES, 0);
        let here = bytes.get_mut(before..).unwrap_or_default();
        let read = object::read_pages(object, range.start(), here);
        let pages = read.map_err(|error| CallError::from_io("read of shared memory", &error))?;
        // It may have been cut off there.
        bytes.truncate(before + pages as usize * PAGE_BYTES);
        PageRange::with_count(range.start(), pages).into_iter().for_each(|range| got.insert(range));
    }
    Ok(got)
}

/// Moves the first `pages` pages of `rest` to `to`.
fn skip(rest: &mut Vec<Range<u64>>, mut pages: u64, to: &mut RangeSet) {
    let mut done = 0;
    for range in rest.iter_mut() {
        let end = range.end.min(range.start.saturating_add(pages * PAGE_SIZE));
        let Some(moved) = PageRange::of_addresses(range.start..end) else { break };
        to.insert(moved);
        pages -= moved.count();
        range.start = end;
        if range.start < range.end {
            break;
        }
        done += 1;
    }
    rest.drain(..done);
}

/// Takes pages of zeros out of the data behind the header, and says which pages are what.
fn squeeze_zeros(pages: &RangeSet, bytes: &mut Vec<u8>) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    let (mut from, mut to) = (HEADER, HEADER);
    for range in pages.iter() {
        for page in range.start().0..range.end().0 {
            let zero = bytes.get(from..from + PAGE_BYTES).is_some_and(|page| *page == ZEROS);
            if !zero {
                if from != to {
                    bytes.copy_within(from..from + PAGE_BYTES, to);
                }
                to += PAGE_BYTES;
            }
            from += PAGE_BYTES;
            append(&mut runs, PageNo(page), if zero { Parts::NONE } else { Parts::ALL });
        }
    }
    bytes.truncate(to);
    runs
}

pub(crate) fn append(runs: &mut Vec<Run>, page: PageNo, parts: Parts) {
    let extended = runs
        .last()
        .filter(|last| last.parts == parts && last.range.end() == page)
        .and_then(|last| PageRange::with_count(last.range.start(), last.range.count() + 1));
    match (extended, runs.last_mut()) {
        (Some(range), Some(last)) => last.range = range,
        _ => runs.extend(PageRange::with_count(page, 1).map(|range| Run { range, parts })),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::frame::Batch;
    use crate::process;

    /// A batch of adjacent pages, as if they had been read.
    pub(crate) fn batch_of(pages: &[[u8; PAGE_BYTES]]) -> PageBatch {
        batch_at(Vpid(3), 1, PageNo(77), pages)
    }

    pub(crate) fn batch_at(vpid: Vpid, round: u32, first: PageNo, pages: &[[u8; PAGE_BYTES]]) -> PageBatch {
        let mut buffer = vec![0; HEADER];
        pages.iter().for_each(|page| buffer.extend(page));
        let all = RangeSet::from_iter(PageRange::with_count(first, pages.len() as u64));
        let runs = squeeze_zeros(&all, &mut buffer);
        PageBatch { vpid, generation: Generation(9), label: Label::default(), round, runs, buffer }
    }

    #[test]
    fn our_own_memory_arrives_in_batches_without_its_zeros() {
        let pages = 2 * MAX_DATA_PAGES + 10;
        let mut memory = vec![0_u8; (pages + 1) * PAGE_BYTES];
        let offset = memory.as_ptr().align_offset(PAGE_BYTES);
        for page in (0..pages).step_by(3) {
            memory[offset + page * PAGE_BYTES + 9] = (page % 250 + 1) as u8;
        }
        let first = PageNo::containing(memory.as_ptr() as u64 + offset as u64);
        let wanted = RangeSet::from_iter(PageRange::with_count(first, pages as u64));
        let us = process::describe(rustix::process::getpid()).unwrap().unwrap();
        let mut batches = Vec::new();
        let gathered = gather(us, None, 1, &wanted, &mut |batch| {
            batches.push(batch);
            ControlFlow::Continue(())
        })
        .unwrap();
        assert_eq!((batches.len(), &gathered.sent), (3, &wanted));
        assert_eq!(gathered.data_pages, pages.div_ceil(3) as u64);
        assert_eq!(gathered.zero_pages + gathered.data_pages, pages as u64);
        for batch in &batches {
            for (run, bytes) in Batch::decode(&batch.clone().into_frame()).unwrap().pieces() {
                let start = offset + (run.range.start().0 - first.0) as usize * PAGE_BYTES;
                let there = &memory[start..start + run.range.count() as usize * PAGE_BYTES];
                assert!(if run.is_zero() { there.iter().all(|byte| *byte == 0) } else { there == bytes });
            }
        }
    }

    #[test]
    fn a_sink_that_stops_leaves_the_rest_unsent_and_unmapped_pages_are_gone() {
        let us = process::describe(rustix::process::getpid()).unwrap().unwrap();
        let memory = vec![1_u8; 4 * MAX_DATA_PAGES * PAGE_BYTES];
        let first = PageNo(PageNo::containing(memory.as_ptr() as u64).0 + 1);
        let mut wanted = RangeSet::from_iter(PageRange::with_count(first, 3 * MAX_DATA_PAGES as u64));
        let nowhere = PageRange::with_count(PageNo(1), 2).unwrap();
        wanted.insert(nowhere);
        let mut batches = 0;
        let gathered = gather(us, None, 1, &wanted, &mut |_| {
            batches += 1;
            if batches == 2 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })
        .unwrap();
        assert!(gathered.stopped);
        assert_eq!(gathered.gone.runs(), [nowhere]);
        assert_eq!(gathered.sent.page_count(), MAX_DATA_PAGES as u64 - 2);
    }
}
