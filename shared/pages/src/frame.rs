//! Batches of pages and parts of the final manifest, as bytes.
//!
//! The connection that carries them adds lengths and checksums. All numbers are little-endian.
//!
//! ```text
//! batch      magic "HPB4", codec u8, 0 u8 x3, vpid u32, round u32, generation u64, runs u24, label length u8, data
//!            length u32, data, then one u64 for each run, then label
//! manifest   magic "HPM3", 0 u32, vpid u32, last u32, generation u64, runs u24, label length u8, 0 u32, then one u64 for
//!            each run, then label
//! run        bits 0-35 first page, bits 36-55 number of pages, bits 56-63 which parts of each page the data has
//! ```
//! Bit 56 stands for the first part of a page. With no part of them in the data, pages are zeros; so a run of zero pages
//! costs 8 bytes whatever its length. With some, the target has the others already. In a manifest no part is set. The
//! label is the name of shared memory, which it gets when it is made; a process has none.

use std::borrow::Cow;
use std::ops::Range;

use haulage_sys::PAGE_BYTES;

use crate::codec::{Codec, CodecError};
use crate::object::Label;
use crate::process::{Generation, Vpid};
use crate::range::{PageNo, PageRange};

/// Pages with data in one batch, at most: 256 KiB unpacked, so that a batch stays in a processor's own cache between
/// being read and being sent.
pub const MAX_DATA_PAGES: usize = 64;
/// Runs in one batch or one part of a manifest, at most.
pub const MAX_RUNS: usize = 64 * 1024;
/// Bytes of an encoded batch or manifest part, at most. What is longer is refused before it is looked at.
pub const MAX_FRAME: usize = HEADER + MAX_DATA_PAGES * PAGE_BYTES + MAX_RUNS * RUN + u8::MAX as usize;

pub(crate) const HEADER: usize = 32;
pub(crate) const RUN: usize = 8;
const BATCH_MAGIC: [u8; 4] = *b"HPB4";
const MANIFEST_MAGIC: [u8; 4] = *b"HPM3";

pub(crate) const PAGE_BITS: u32 = 36;
const COUNT_BITS: u32 = 20;
/// In the word that says how many runs there are, and in its last byte how long the label is.
const RUNS_BITS: u32 = 24;
/// Pages in one run on the wire, at most; longer runs are split.
pub const MAX_RUN_PAGES: u64 = (1 << COUNT_BITS) - 1;

const _: () = assert!(PageNo::END.0 <= 1 << PAGE_BITS);
const _: () = assert!(PAGE_BITS + COUNT_BITS + u8::BITS == u64::BITS);
const _: () = assert!(MAX_RUNS < 1 << RUNS_BITS);

/// Parts of a page, which go one without the other.
pub const PARTS: usize = 4;
/// Bytes of a part.
pub const PART_BYTES: usize = PAGE_BYTES / PARTS;

/// Bytes that are not a batch or a part of a manifest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Longer than [`MAX_FRAME`].
    #[error("{0} bytes are more than a frame may have")]
    TooLong(usize),
    /// It ends before its header or its runs do, or goes on after them.
    #[error("a frame of {found} bytes has {expected}")]
    Length {
        /// What its header says, or needs.
        expected: usize,
        /// What there is.
        found: usize,
    },
    /// It does not start as a frame of this version does.
    #[error("not a frame of this version")]
    Magic,
    /// A field that must be zero is not.
    #[error("a reserved field is set")]
    Reserved,
    /// More runs than [`MAX_RUNS`], or more pages with data than [`MAX_DATA_PAGES`].
    #[error("more runs or pages than a frame may have")]
    TooMany,
    /// A run that is empty, beyond the end of memory, or not after the run before it.
    #[error("run {index} is not after the one before it in memory")]
    Run {
        /// Which.
        index: usize,
    },
    /// The data could not be unpacked.
    #[error("data cannot be unpacked")]
    Codec(#[from] CodecError),
}

/// Some of the [`PARTS`] of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parts(u8);

impl Parts {
    /// None.
    pub const NONE: Self = Self(0);
    /// The whole page.
    pub const ALL: Self = Self(u8::MAX >> (u8::BITS as usize - PARTS));

    /// Those with the numbers, from 0 to [`PARTS`], for which `is_one` holds.
    pub fn which(is_one: impl Fn(usize) -> bool) -> Self {
        Self((0..PARTS).filter(|part| is_one(*part)).fold(0, |all, part| all | 1 << part))
    }

    /// How many.
    pub fn count(self) -> usize {
        self.0.count_ones() as usize
    }

    /// Their bytes in a page, adjacent parts together, ascending.
    pub fn ranges(self) -> impl Iterator<Item = Range<usize>> {
        let mut rest = u32::from(self.0);
        let mut at = 0;
        std::iter::from_fn(move || {
            let start = at + rest.trailing_zeros() as usize;
            rest = rest.checked_shr(rest.trailing_zeros()).filter(|rest| *rest > 0)?;
            at = start + rest.trailing_ones() as usize;
            rest >>= rest.trailing_ones();
            Some(start * PART_BYTES..at * PART_BYTES)
        })
    }
}

/// Adjacent pages of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Which.
    pub range: PageRange,
    /// What of each is in the batch: nothing if all of their bytes are zero, and not everything if the target has the
    /// rest.
    pub parts: Parts,
}

impl Run {
    /// Whether its pages are zeros.
    pub fn is_zero(&self) -> bool {
        self.parts == Parts::NONE
    }

    /// Bytes that it has in the batch.
    fn bytes(&self) -> usize {
        // At most MAX_DATA_PAGES of them with any.
        if self.is_zero() { 0 } else { self.range.count() as usize * self.parts.count() * PART_BYTES }
    }
}

/// Pages of one process, decoded and checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch<'a> {
    /// Whose.
    pub vpid: Vpid,
    /// Which process of that id.
    pub generation: Generation,
    /// What it is called, if it is shared memory.
    pub label: Label,
    /// The round they were read in. A page of a later round replaces one of an earlier, never the other way round.
    pub round: u32,
    /// Which pages, ascending.
    pub runs: Vec<Run>,
    /// What is there of the bytes of the runs, one after the other.
    pub data: Cow<'a, [u8]>,
}

impl<'a> Batch<'a> {
    /// Decodes and checks a batch. Whatever is accepted can be stored: runs ascend, stay within user memory, and have
    /// as much data as they say.
    ///
    /// # Errors
    /// See [`FrameError`].
    pub fn decode(bytes: &'a [u8]) -> Result<Self, FrameError> {
        let header = Header::decode(bytes, BATCH_MAGIC)?;
        let [codec, reserved @ ..] = header.first.to_le_bytes();
        if reserved != [0; 3] {
            return Err(FrameError::Reserved);
        }
        let codec = Codec::from_id(codec)?;
        let Body { data, runs, label } = header.body(bytes)?;
        let runs = decode_runs(runs)?;
        let with_data: u64 = runs.iter().filter(|run| !run.is_zero()).map(|run| run.range.count()).sum();
        if with_data > MAX_DATA_PAGES as u64 {
            return Err(FrameError::TooMany);
        }
        let data = codec.unpack(data, runs.iter().map(Run::bytes).sum())?;
        let Header { vpid, generation, third: round, .. } = header;
        Ok(Self { vpid, generation, label, round, runs, data })
    }

    /// The runs with the bytes of their pages' parts, page by page; zero runs have none.
    pub fn pieces(&self) -> impl Iterator<Item = (Run, &[u8])> {
        let mut rest: &[u8] = &self.data;
        self.runs.iter().map(move |run| {
            let (bytes, after) = rest.split_at_checked(run.bytes()).unwrap_or((rest, &[]));
            rest = after;
            (*run, bytes)
        })
    }
}

/// What a batch says beside its data.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BatchHead<'a> {
    pub(crate) vpid: Vpid,
    pub(crate) generation: Generation,
    pub(crate) label: &'a Label,
    pub(crate) round: u32,
    /// Ascending, at most [`MAX_RUNS`] after splitting, and exactly those of the data.
    pub(crate) runs: &'a [Run],
}

impl BatchHead<'_> {
    /// Makes a batch of `bytes`: [`HEADER`] bytes to be filled, then data that `codec` has packed.
    pub(crate) fn complete(self, codec: Codec, bytes: &mut Vec<u8>) {
        let data = bytes.len().saturating_sub(HEADER);
        let runs = append_runs(bytes, self.runs.iter().copied());
        let first = u32::from(codec.id());
        let Self { vpid, generation, round: third, label, .. } = self;
        let header = Header { first, vpid, third, generation, runs, data: data as u32, label: 0 };
        header.complete(label, bytes, BATCH_MAGIC);
    }
}

/// Part of the list of pages that one process has, decoded and checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ManifestPart {
    pub(crate) vpid: Vpid,
    pub(crate) generation: Generation,
    pub(crate) label: Label,
    /// No further part of this process follows.
    pub(crate) last: bool,
    pub(crate) ranges: Vec<PageRange>,
}

impl ManifestPart {
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, FrameError> {
        let header = Header::decode(bytes, MANIFEST_MAGIC)?;
        if header.first != 0 || header.data != 0 || header.third > 1 {
            return Err(FrameError::Reserved);
        }
        let Body { runs, label, .. } = header.body(bytes)?;
        let runs = decode_runs(runs)?;
        if !runs.iter().all(Run::is_zero) {
            return Err(FrameError::Reserved);
        }
        let ranges = runs.into_iter().map(|run| run.range).collect();
        let Header { vpid, generation, third, .. } = header;
        Ok(Self { vpid, generation, label, last: third == 1, ranges })
    }

    /// `ranges` are ascending, at most [`MAX_RUNS`], none longer than [`MAX_RUN_PAGES`].
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![0; HEADER];
        let runs = self.ranges.iter().map(|range| Run { range: *range, parts: Parts::NONE });
        let runs = append_runs(&mut bytes, runs);
        let third = u32::from(self.last);
        let (vpid, generation) = (self.vpid, self.generation);
        let header = Header { first: 0, vpid, third, generation, runs, data: 0, label: 0 };
        header.complete(&self.label, &mut bytes, MANIFEST_MAGIC);
        bytes
    }
}

/// The runs in pieces that fit the wire.
pub(crate) fn split_runs(ranges: &[PageRange]) -> impl Iterator<Item = PageRange> + '_ {
    ranges.iter().flat_map(|range| {
        let mut rest = Some(*range);
        std::iter::from_fn(move || {
            let (piece, after) = rest?.split_at(MAX_RUN_PAGES);
            rest = after;
            Some(piece)
        })
    })
}

pub(crate) struct Header {
    pub(crate) first: u32,
    pub(crate) vpid: Vpid,
    pub(crate) third: u32,
    pub(crate) generation: Generation,
    pub(crate) runs: u32,
    pub(crate) data: u32,
    /// Bytes of the label.
    pub(crate) label: u8,
}

/// What follows a header.
pub(crate) struct Body<'a> {
    pub(crate) data: &'a [u8],
    pub(crate) runs: &'a [u8],
    pub(crate) label: Label,
}

impl Header {
    pub(crate) fn decode(bytes: &[u8], magic: [u8; 4]) -> Result<Self, FrameError> {
        if bytes.len() > MAX_FRAME {
            return Err(FrameError::TooLong(bytes.len()));
        }
        let short = FrameError::Length { expected: HEADER, found: bytes.len() };
        let header: &[u8; HEADER] = bytes.first_chunk().ok_or(short)?;
        let (words, _) = header.as_chunks::<4>();
        let &[start, first, vpid, third, low, high, runs, data] = words else { return Err(short) };
        if start != magic {
            return Err(FrameError::Magic);
        }
        let number = u32::from_le_bytes;
        let [.., label] = runs;
        let header = Self {
            first: number(first),
            vpid: Vpid(number(vpid)),
            third: number(third),
            generation: Generation(u64::from(number(low)) | u64::from(number(high)) << 32),
            runs: number(runs) & ((1 << RUNS_BITS) - 1),
            data: number(data),
            label,
        };
        match header.label > 0 && !header.vpid.is_object() {
            true => Err(FrameError::Reserved),
            false => Ok(header),
        }
    }

    /// What follows, when the frame has exactly the bytes that the header says.
    pub(crate) fn body<'a>(&self, bytes: &'a [u8]) -> Result<Body<'a>, FrameError> {
        if self.runs as usize > MAX_RUNS {
            return Err(FrameError::TooMany);
        }
        let runs = self.runs as usize * RUN;
        let expected = HEADER + self.data as usize + runs + usize::from(self.label);
        let wrong = FrameError::Length { expected, found: bytes.len() };
        if bytes.len() != expected {
            return Err(wrong);
        }
        let body = bytes.get(HEADER..).unwrap_or_default();
        let (data, rest) = body.split_at_checked(self.data as usize).ok_or(wrong)?;
        let (runs, label) = rest.split_at_checked(runs).ok_or(wrong)?;
        Ok(Body { data, runs, label: Label::new(label) })
    }

    /// Appends the label to `bytes`, which all else is in, and fills in the header before it.
    pub(crate) fn complete(mut self, label: &Label, bytes: &mut Vec<u8>, magic: [u8; 4]) {
        bytes.extend_from_slice(label.as_bytes());
        self.label = label.length();
        self.write(bytes, magic);
    }

    fn write(&self, bytes: &mut [u8], magic: [u8; 4]) {
        let runs = self.runs | u32::from(self.label) << RUNS_BITS;
        let fields = [
            &magic[..],
            &self.first.to_le_bytes(),
            &self.vpid.0.to_le_bytes(),
            &self.third.to_le_bytes(),
            &self.generation.0.to_le_bytes(),
            &runs.to_le_bytes(),
            &self.data.to_le_bytes(),
        ];
        for (to, from) in bytes.iter_mut().zip(fields.concat()) {
            *to = from;
        }
    }
}

fn append_runs(bytes: &mut Vec<u8>, runs: impl Iterator<Item = Run>) -> u32 {
    let mut count = 0;
    for run in runs {
        let parts = u64::from(run.parts.0) << (PAGE_BITS + COUNT_BITS);
        for piece in split_runs(&[run.range]) {
            bytes.extend((piece.start().0 | piece.count() << PAGE_BITS | parts).to_le_bytes());
            count += 1;
        }
    }
    count
}

fn decode_runs(bytes: &[u8]) -> Result<Vec<Run>, FrameError> {
    let (words, _) = bytes.as_chunks::<RUN>();
    let mut runs = Vec::with_capacity(words.len());
    let mut end = PageNo(0);
    for (index, word) in words.iter().enumerate() {
        let word = u64::from_le_bytes(*word);
        let start = PageNo(word & ((1 << PAGE_BITS) - 1));
        let count = word >> PAGE_BITS & MAX_RUN_PAGES;
        let [.., parts] = word.to_le_bytes();
        if parts & !Parts::ALL.0 != 0 {
            return Err(FrameError::Reserved);
        }
        let range = PageRange::with_count(start, count).filter(|range| range.start() >= end);
        let range = range.ok_or(FrameError::Run { index })?;
        end = range.end();
        runs.push(Run { range, parts: Parts(parts) });
    }
    Ok(runs)
}

#[cfg(test)]
#[path = "frame_tests.rs"]
mod tests;
