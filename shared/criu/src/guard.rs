//! Guard regions (`MADV_GUARD_INSTALL`): parts of mappings that fault when they are touched, as newer C libraries put
//! below the stacks of threads.
//!
//! CRIU finds them by `PAGEMAP_SCAN`, which it has not got behind the mask. So they are added to its images afterwards,
//! as CRIU 4.2 writes them itself (`collect_madv_guards` of `criu/mem.c`): behind the mappings, and marked. Older ones
//! refuse such images.

use std::fs;
use std::ops::Range;
use std::path::Path;

use prost::Message;

use crate::image::{ImageError, ImageKind, ImageReader, ImageWriter, io_at};
use crate::mm;

/// A part of the message in `mm-<pid>.img`. Messages that follow one another in protobuf are one message.
#[derive(Clone, PartialEq, prost::Message)]
struct Guards {
    #[prost(message, repeated, tag = "14")]
    all: Vec<Guard>,
}

/// `vma_entry` of CRIU's `images/vma.proto`, all of whose required fields must be there.
#[derive(Clone, PartialEq, Eq, prost::Message)]
struct Guard {
    #[prost(uint64, required, tag = "1")]
    start: u64,
    #[prost(uint64, required, tag = "2")]
    end: u64,
    #[prost(uint64, required, tag = "3")]
    file_offset: u64,
    #[prost(uint64, required, tag = "4")]
    shared_memory: u64,
    #[prost(uint32, required, tag = "5")]
    protection: u32,
    #[prost(uint32, required, tag = "6")]
    flags: u32,
    #[prost(uint32, required, tag = "7")]
    status: u32,
    #[prost(sint64, required, tag = "8")]
    descriptor: i64,
}

/// Adds guards (addresses in bytes, page-aligned) to the images of process `pid` in `dir`. A second time adds them again.
///
/// # Errors
/// When the image is missing, damaged or cannot be written; it is as it was then.
pub fn add(dir: &Path, pid: u32, guards: &[Range<u64>]) -> Result<(), ImageError> {
    if guards.is_empty() {
        return Ok(());
    }
    let path = mm::path(dir, pid);
    let mut reader = ImageReader::open(&path, ImageKind::Mm)?;
    let mut record = reader.next_bytes()?.ok_or_else(|| reader.damaged("it is empty"))?;
    let of = |range: &Range<u64>| Guard {
        start: range.start,
        end: range.end,
        status: mm::GUARD,
        descriptor: -1,
        ..Guard::default()
    };
    record.extend(Guards { all: guards.iter().map(of).collect() }.encode_to_vec());
    let draft = path.with_extension("new");
    let mut writer = ImageWriter::create(&draft, ImageKind::Mm)?;
    writer.append_bytes(&record)?;
    writer.finish()?;
    fs::rename(&draft, &path).map_err(io_at(&path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guards_are_added_behind_the_mappings_and_are_none() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = ImageWriter::create(&mm::path(dir.path(), 7), ImageKind::Mm).unwrap();
        let mapping = Guard { start: 0x1000, end: 0x9000, status: 1, ..Guard::default() };
        writer.append(&Guards { all: vec![mapping] }).unwrap();
        writer.finish().unwrap();
        add(dir.path(), 7, &[]).unwrap();
        add(dir.path(), 7, &[0x2000..0x3000, 0x5000..0x7000]).unwrap();
        let mappings = mm::read(dir.path(), 7).unwrap();
        assert_eq!(mappings.iter().map(|one| (one.start, one.end)).collect::<Vec<_>>(), [(0x1000, 0x9000)]);
        let mut reader = ImageReader::open(&mm::path(dir.path(), 7), ImageKind::Mm).unwrap();
        let all: Guards = reader.read().unwrap().unwrap();
        let guards: Vec<_> = all.all.iter().skip(1).map(|one| (one.start, one.end, one.status)).collect();
        assert_eq!(guards, [(0x2000, 0x3000, 1 << 16), (0x5000, 0x7000, 1 << 16)]);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "a draft is left");
        assert!(add(dir.path(), 8, &[0x2000..0x3000, 0x5000..0x7000]).is_err());
    }
}
