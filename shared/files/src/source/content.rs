//! The content of one file: what of it is to be sent.
//!
//! A file is seen as blocks. What was sent of each is remembered as a hash, so that a later pass reads the file and
//! sends only blocks that differ. The hash is of what was *sent*: a file that changes while it is read may be sent
//! torn, but never remembered wrongly.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use crate::error::FilesError;
use crate::path::RelPath;
use crate::wire::{Blob, MAX_DATA_BYTES, Record};

/// The unit of comparison, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Block {
    /// 64 KiB, of which 256 KiB are remembered for each GiB of files. Those of one block are not worth it.
    Coarse,
    /// 16 KiB, of which a MiB is remembered: for files of which little pieces change in many places. Smaller ones take
    /// longer to hash. All files are remembered, since all are compared.
    Fine,
}

impl Block {
    const fn bytes(self) -> u64 {
        match self {
            Self::Coarse => 64 << 10,
            Self::Fine => 16 << 10,
        }
    }
}

/// Where blocks are partly holes, pages of zeros are left out.
const PAGE: usize = 4 << 10;

/// The first half of a block's BLAKE3 hash; zeros stand for a hole.
type BlockSum = [u8; 16];

const HOLE: BlockSum = [0; 16];

/// What the target's copy of a file holds, block by block.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct BlockSums(Box<[BlockSum]>);

/// Takes the records of a file's content.
type Put<'a> = dyn FnMut(&Record<'_>) -> Result<(), FilesError> + 'a;

/// How much of a file is to be sent.
#[derive(Clone, Copy, Debug)]
pub(super) enum Against<'a> {
    /// The target begins with an empty file.
    Nothing,
    /// The target has a file, and no one knows what is in it.
    Unknown,
    /// The target has a file, and this is in it.
    Sums(&'a BlockSums),
}

impl Against<'_> {
    /// Whether the target's block is to be written.
    fn differs(&self, block: u64, sum: &BlockSum) -> bool {
        match self {
            Self::Nothing => sum != &HOLE,
            Self::Unknown => true,
            // Beyond its old end, the target's file is grown by a hole.
            Self::Sums(BlockSums(sums)) => sums.get(block as usize).unwrap_or(&HOLE) != sum,
        }
    }
}

/// Reads files; keeps its buffer from one to the next.
#[derive(Debug)]
pub(super) struct Content {
    buffer: Box<[u8]>,
    block: u64,
    /// Files up to so many bytes are not remembered.
    forgotten: u64,
}

/// A file that was sent.
pub(super) struct Sent {
    /// What the target's file holds now; `None` for a small one.
    pub(super) sums: Option<BlockSums>,
    /// Whether the file was as long as it should be, in the end.
    pub(super) whole: bool,
}

impl Content {
    pub(super) fn new(block: Block) -> Self {
        let forgotten = if block == Block::Coarse { block.bytes() } else { 0 };
        Self { buffer: vec![0; MAX_DATA_BYTES].into(), block: block.bytes(), forgotten }
    }

    /// Sends the first `size` bytes of a file as far as the target's differs. A file which has become shorter is
    /// filled up with zeros.
    pub(super) fn send(
        &mut self,
        path: &RelPath,
        file: &File,
        size: u64,
        against: Against<'_>,
        put: &mut Put<'_>,
    ) -> Result<Sent, FilesError> {
        let failed = FilesError::io("read", path);
        let block = self.block;
        let mut sums = (size > self.forgotten).then(Vec::new);
        let mut at = 0;
        while at < size {
            let (data, data_end) = next_data(file, at, size).map_err(&failed)?;
            // Blocks that begin before the data, as far as no data is in them.
            let hole_end = if data == size { size } else { data - data % block };
            if at < hole_end {
                skip_hole(block, (at, hole_end), against, sums.as_mut(), put)?;
                at = hole_end;
            }
            let stop = data_end.next_multiple_of(block).min(size);
            while at < stop {
                let want = (stop - at).min(self.buffer.len() as u64) as usize;
                let buffer = self.buffer.get_mut(..want).unwrap_or_default();
                read_or_zero(file, buffer, at).map_err(&failed)?;
                let blocks = Blocks { buffer, at, size: block };
                blocks.send((data, data_end), against, sums.as_mut(), put)?;
                at += want as u64;
            }
        }
        let whole = file.metadata().map_err(&failed)?.len() == size;
        Ok(Sent { sums: sums.map(|sums| BlockSums(sums.into())), whole })
    }
}

/// The next range of data at or after `at`, or `(size, size)`.
fn next_data(file: &File, at: u64, size: u64) -> io::Result<(u64, u64)> {
    let data = match seek(file, SeekFrom::Data(at)) {
        Ok(data) => data.min(size),
        Err(Errno::NXIO) => return Ok((size, size)),
        // A file system which knows no holes.
        Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok((at, size)),
        Err(error) => return Err(error.into()),
    };
    if data == size {
        return Ok((size, size));
    }
    match seek(file, SeekFrom::Hole(data)) {
        Ok(end) => Ok((data, end.clamp(data, size))),
        // It was cut short meanwhile.
        Err(Errno::NXIO) => Ok((data, size)),
        Err(error) => Err(error.into()),
    }
}

/// Reads all of `buffer`; what the file does not have becomes zeros.
fn read_or_zero(file: &File, buffer: &mut [u8], mut at: u64) -> io::Result<()> {
    let mut rest = buffer;
    while !rest.is_empty() {
        match file.read_at(rest, at) {
            Ok(0) => {
                rest.fill(0);
                return Ok(());
            }
            Ok(read) => {
                rest = rest.get_mut(read..).unwrap_or_default();
                at += read as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn skip_hole(
    block: u64,
    (at, end): (u64, u64),
    against: Against<'_>,
    sums: Option<&mut Vec<BlockSum>>,
    put: &mut Put<'_>,
) -> Result<(), FilesError> {
    let blocks = at / block..end.div_ceil(block);
    if blocks.clone().any(|block| against.differs(block, &HOLE)) {
        put(&Record::Hole { offset: at, length: end - at })?;
    }
    if let Some(sums) = sums {
        sums.extend(blocks.map(|_| HOLE));
    }
    Ok(())
}

/// A piece of a file, as it was read.
struct Blocks<'a> {
    buffer: &'a [u8],
    at: u64,
    /// Of each, in bytes.
    size: u64,
}

impl Blocks<'_> {
    /// Sends those that differ. `data` is the range of the file which is surely stored; blocks reach beyond it at its
    /// ends.
    fn send(
        &self,
        data: (u64, u64),
        against: Against<'_>,
        mut sums: Option<&mut Vec<BlockSum>>,
        put: &mut Put<'_>,
    ) -> Result<(), FilesError> {
        let mut run = Run { buffer: self.buffer, at: self.at, range: 0..0 };
        for (index, block) in self.buffer.chunks(self.size as usize).enumerate() {
            let begin = index * self.size as usize;
            let offset = self.at + begin as u64;
            let differs = match &mut sums {
                Some(sums) => {
                    let sum = sum_of(block);
                    sums.push(sum);
                    against.differs(offset / self.size, &sum)
                }
                None => true,
            };
            let stored = data.0 <= offset && offset + block.len() as u64 <= data.1;
            if differs && (stored || !matches!(against, Against::Nothing)) {
                run.add(begin, block.len(), put)?;
            } else if differs {
                for (page, bytes) in
                    block.chunks(PAGE).enumerate().filter(|(_, page)| page.iter().any(|b| *b != 0))
                {
                    run.add(begin + page * PAGE, bytes.len(), put)?;
                }
            }
        }
        run.flush(put)
    }
}

/// Neighbouring pieces of a buffer, to be sent as one.
struct Run<'a> {
    buffer: &'a [u8],
    at: u64,
    range: std::ops::Range<usize>,
}

impl Run<'_> {
    fn add(&mut self, begin: usize, length: usize, put: &mut Put<'_>) -> Result<(), FilesError> {
        if begin != self.range.end {
            self.flush(put)?;
            self.range.start = begin;
        }
        self.range.end = begin + length;
        Ok(())
    }

    fn flush(&mut self, put: &mut Put<'_>) -> Result<(), FilesError> {
        match self.buffer.get(self.range.clone()) {
            Some(bytes) if !bytes.is_empty() => {
                put(&Record::Data { offset: self.at + self.range.start as u64, bytes: Blob(bytes) })
            }
            _ => Ok(()),
        }
    }
}

fn sum_of(block: &[u8]) -> BlockSum {
    let hash = blake3::hash(block);
    match hash.as_bytes().first_chunk() {
        // One in 2¹²⁸ blocks; it is sent each time.
        Some(&HOLE) | None => [0xff; 16],
        Some(sum) => *sum,
    }
}
