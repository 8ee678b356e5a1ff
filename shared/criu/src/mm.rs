//! `mm-<pid>.img`: the memory mappings of a process, as the restore will make them.

use std::path::{Path, PathBuf};

use crate::image::{ImageError, ImageKind, ImageReader};

/// `VMA_FILE_PRIVATE` and `VMA_ANON_PRIVATE` of `criu/include/image.h`: the mappings whose pages the images hold.
const PRIVATE: u32 = 1 << 6 | 1 << 9;

#[derive(Clone, PartialEq, prost::Message)]
struct MmEntry {
    #[prost(message, repeated, tag = "14")]
    mappings: Vec<Mapping>,
}

/// `MAP_PRIVATE`, `MAP_ANONYMOUS`, `MAP_LOCKED` and `MAP_HUGETLB` of `mmap(2)` on x86-64.
const MAP_PRIVATE: u32 = 0x02;
const MAP_ANONYMOUS: u32 = 0x20;
const MAP_LOCKED: u32 = 0x2000;
const MAP_HUGETLB: u32 = 0x4_0000;
/// `VMA_AREA_VSYSCALL`, `VMA_AREA_VDSO` and `VMA_AREA_VVAR` of `criu/include/image.h`: the kernel's own.
const KERNELS: u32 = 1 << 2 | 1 << 3 | 1 << 12;

/// A mapping. Addresses are in bytes, `end` exclusive.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Mapping {
    /// Its first byte.
    #[prost(uint64, required, tag = "1")]
    pub start: u64,
    /// The byte after its last.
    #[prost(uint64, required, tag = "2")]
    pub end: u64,
    /// `MAP_…` bits.
    #[prost(uint32, required, tag = "6")]
    pub flags: u32,
    /// CRIU's `VMA_…` bits.
    #[prost(uint32, required, tag = "7")]
    pub status: u32,
}

impl Mapping {
    /// Whether the images hold pages of it.
    pub fn is_private(&self) -> bool {
        self.status & PRIVATE != 0
    }

    /// Whether a lazy restore lets pages of it come later: `vma_entry_can_be_lazy` of `criu/include/vma.h`.
    pub fn can_be_lazy(&self) -> bool {
        let kind = self.flags & (MAP_PRIVATE | MAP_ANONYMOUS | MAP_LOCKED | MAP_HUGETLB);
        kind == MAP_PRIVATE | MAP_ANONYMOUS && self.status & KERNELS == 0
    }
}

/// The mappings of process `pid` in the images in `dir`, in address order.
///
/// # Errors
/// When the image is missing or damaged.
pub fn read(dir: &Path, pid: u32) -> Result<Vec<Mapping>, ImageError> {
    let mut reader = ImageReader::open(&path(dir, pid), ImageKind::Mm)?;
    let entry: MmEntry = reader.read()?.ok_or_else(|| reader.damaged("it is empty"))?;
    if entry.mappings.is_sorted_by_key(|mapping| mapping.start) {
        Ok(entry.mappings)
    } else {
        Err(reader.unknown("mappings out of order"))
    }
}

pub(crate) fn path(dir: &Path, pid: u32) -> PathBuf {
    dir.join(format!("mm-{pid}.img"))
}
