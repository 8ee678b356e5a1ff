//! `pagemap-<pid>.img`: which pages of a process are in its pages image, in the order in which they lie there.

use std::fs::File;
use std::io::{BufReader, Read, Write};
use std::path::Path;

use crate::image::{ImageError, ImageKind, ImageReader, ImageWriter, PAGE_SIZE};

const IN_PARENT: u32 = 1;
const LAZY: u32 = 2;
const PRESENT: u32 = 4;

/// Consecutive pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageRun {
    /// The address of the first, in bytes, a multiple of [`PAGE_SIZE`].
    pub start: u64,
    /// How many, at least 1.
    pub pages: u64,
}

impl PageRun {
    /// The run, if it is one: aligned, not empty, within the address space.
    pub fn new(start: u64, pages: u64) -> Option<Self> {
        let length = pages.checked_mul(PAGE_SIZE)?;
        start.checked_add(length)?;
        (pages > 0 && start.is_multiple_of(PAGE_SIZE)).then_some(Self { start, pages })
    }

    /// Its length in bytes.
    pub fn bytes(&self) -> u64 {
        self.pages * PAGE_SIZE
    }

    /// The address after its last byte.
    pub fn end(&self) -> u64 {
        self.start + self.bytes()
    }
}

/// Whether the restore may map a page later, on demand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Laziness {
    /// The restore needs the page at once.
    Eager,
    /// It may come later; its bytes are in the pages image all the same.
    Lazy,
    /// It comes later, from whoever serves the lazy restore; its bytes are not in the pages image.
    Elsewhere,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Head {
    #[prost(uint32, required, tag = "1")]
    pages_id: u32,
}

/// CRIU 4.1 counts in field 2, 4.2 in field 5 and, if it fits, in 2. A restore by 4.1 of an entry that has only
/// field 5 would map garbage, so both are written always.
#[derive(Clone, PartialEq, prost::Message)]
struct Entry {
    #[prost(uint64, required, tag = "1")]
    vaddr: u64,
    #[prost(uint32, required, tag = "2")]
    compat_pages: u32,
    #[prost(bool, optional, tag = "3")]
    in_parent: Option<bool>,
    #[prost(uint32, optional, tag = "4")]
    flags: Option<u32>,
    #[prost(uint64, optional, tag = "5")]
    pages: Option<u64>,
}

/// Reads a pagemap image, run by run.
pub struct PagemapReader<R> {
    image: ImageReader<R>,
    pages_id: u32,
    /// Where the last run ended: runs ascend and do not overlap.
    end: u64,
}

impl PagemapReader<BufReader<File>> {
    /// Opens the pagemap of process `pid` in `dir`.
    pub fn open(dir: &Path, pid: u32) -> Result<Self, ImageError> {
        Self::new(ImageReader::open(&dir.join(file_name(pid)), ImageKind::Pagemap)?)
    }
}

impl<R: Read> PagemapReader<R> {
    fn new(mut image: ImageReader<R>) -> Result<Self, ImageError> {
        let head: Head = image.read_known()?.ok_or_else(|| image.damaged("it has no head"))?;
        Ok(Self { image, pages_id: head.pages_id, end: 0 })
    }

    /// The number in the name of the pages image.
    pub fn pages_id(&self) -> u32 {
        self.pages_id
    }

    /// The next run, or `None` after the last.
    ///
    /// # Errors
    /// Runs out of order, pages in a parent image and flags that this version does not know are refused.
    pub fn next_run(&mut self) -> Result<Option<(PageRun, Laziness)>, ImageError> {
        let Some(entry) = self.image.read_known::<Entry>()? else { return Ok(None) };
        let flags = entry.flags.unwrap_or(PRESENT);
        if flags & IN_PARENT != 0 || entry.in_parent == Some(true) {
            return Err(self.image.unknown("pages in a parent image"));
        }
        let laziness = match flags {
            PRESENT => Laziness::Eager,
            LAZY => Laziness::Elsewhere,
            both if both == LAZY | PRESENT => Laziness::Lazy,
            _ => return Err(self.image.unknown(format!("pages with flags {flags:#x}"))),
        };
        let pages = entry.pages.unwrap_or(entry.compat_pages.into());
        let run = PageRun::new(entry.vaddr, pages)
            .filter(|run| run.start >= self.end)
            .ok_or_else(|| self.image.damaged(format!("pages at {:#x} out of order", entry.vaddr)))?;
        self.end = run.end();
        Ok(Some((run, laziness)))
    }
}

/// Writes a pagemap image. Adjacent runs of the same laziness become one entry.
pub(crate) struct PagemapWriter<W: Write> {
    image: ImageWriter<W>,
    pending: Option<(PageRun, Laziness)>,
}

/// The longest entry that is written, in pages (1 GiB): far inside the range of every field and of one `preadv`.
const MAX_PAGES: u64 = 1 << 18;

impl<W: Write> PagemapWriter<W> {
    pub(crate) fn new(mut image: ImageWriter<W>, pages_id: u32) -> Result<Self, ImageError> {
        image.append(&Head { pages_id })?;
        Ok(Self { image, pending: None })
    }

    /// Appends a run, which lies after all before it.
    pub(crate) fn append(&mut self, run: PageRun, laziness: Laziness) -> Result<(), ImageError> {
        match &mut self.pending {
            Some((pending, of)) if *of == laziness && pending.end() == run.start => {
                pending.pages += run.pages
            }
            pending => {
                if let Some((run, laziness)) = pending.replace((run, laziness)) {
                    self.write(run, laziness)?;
                }
            }
        }
        Ok(())
    }

    pub(crate) fn finish(mut self) -> Result<W, ImageError> {
        if let Some((run, laziness)) = self.pending.take() {
            self.write(run, laziness)?;
        }
        self.image.finish()
    }

    fn write(&mut self, run: PageRun, laziness: Laziness) -> Result<(), ImageError> {
        let flags = match laziness {
            Laziness::Eager => PRESENT,
            Laziness::Lazy => PRESENT | LAZY,
            // What CRIU itself writes for pages that a lazy dump has left behind.
            Laziness::Elsewhere => LAZY,
        };
        let mut done = 0;
        while done < run.pages {
            let pages = (run.pages - done).min(MAX_PAGES);
            self.image.append(&Entry {
                vaddr: run.start + done * PAGE_SIZE,
                // At most MAX_PAGES.
                compat_pages: pages as u32,
                in_parent: None,
                flags: Some(flags),
                pages: Some(pages),
            })?;
            done += pages;
        }
        Ok(())
    }
}

pub(crate) fn file_name(pid: u32) -> String {
    format!("pagemap-{pid}.img")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn reader(bytes: &[u8]) -> Result<PagemapReader<&[u8]>, ImageError> {
        PagemapReader::new(ImageReader::new(Path::new("test"), ImageKind::Pagemap, bytes)?)
    }

    fn written(runs: &[(PageRun, Laziness)]) -> Vec<u8> {
        let image = ImageWriter::new(Path::new("test"), ImageKind::Pagemap, Vec::new()).unwrap();
        let mut writer = PagemapWriter::new(image, 7).unwrap();
        for (run, laziness) in runs {
            writer.append(*run, *laziness).unwrap();
        }
        writer.finish().unwrap()
    }

    fn pages(bytes: &[u8]) -> Vec<(u64, Laziness)> {
        let mut reader = reader(bytes).unwrap();
        assert_eq!(reader.pages_id(), 7);
        let mut all = Vec::new();
        while let Some((run, laziness)) = reader.next_run().unwrap() {
            all.extend((0..run.pages).map(|page| (run.start + page * PAGE_SIZE, laziness)));
        }
        all
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(gaps in prop::collection::vec((0u64..3, 1u64..4, any::<bool>()), 0..40)) {
            let mut at = 0x1000;
            let mut runs = Vec::new();
            let mut expected = Vec::new();
            for (gap, pages, lazy) in gaps {
                at += gap * PAGE_SIZE;
                let laziness = if lazy { Laziness::Lazy } else { Laziness::Eager };
                let run = PageRun::new(at, pages).unwrap();
                runs.push((run, laziness));
                expected.extend((0..pages).map(|page| (at + page * PAGE_SIZE, laziness)));
                at = run.end();
            }
            prop_assert_eq!(pages(&written(&runs)), expected);
        }

        #[test]
        fn garbage_is_an_error_and_no_more(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut image = ImageKind::Pagemap.header_for_test();
            image.extend(bytes);
            if let Ok(mut reader) = reader(&image) {
                while let Ok(Some(_)) = reader.next_run() {}
            }
        }
    }

    #[test]
    fn a_long_run_is_split_and_both_counts_are_written() {
        let bytes = written(&[(PageRun::new(0x1000, MAX_PAGES + 1).unwrap(), Laziness::Lazy)]);
        let mut image = ImageReader::new(Path::new("test"), ImageKind::Pagemap, &bytes[..]).unwrap();
        let _: Head = image.read().unwrap().unwrap();
        let first: Entry = image.read().unwrap().unwrap();
        let second: Entry = image.read().unwrap().unwrap();
        assert_eq!(
            (u64::from(first.compat_pages), first.pages, first.flags),
            (MAX_PAGES, Some(MAX_PAGES), Some(6))
        );
        assert_eq!((second.compat_pages, second.pages), (1, Some(1)));
        assert_eq!(second.vaddr, first.vaddr + MAX_PAGES * PAGE_SIZE);
    }

    #[test]
    fn what_is_not_known_is_refused() {
        let base =
            Entry { vaddr: 0x1000, compat_pages: 1, in_parent: None, flags: Some(PRESENT), pages: None };
        let bad = [
            Entry { flags: Some(PRESENT | IN_PARENT), ..base.clone() },
            Entry { flags: Some(PRESENT | 8), ..base.clone() },
            Entry { flags: Some(0), ..base.clone() },
            Entry { in_parent: Some(true), ..base.clone() },
            Entry { vaddr: 0x1001, ..base.clone() },
            Entry { compat_pages: 0, ..base.clone() },
            Entry { pages: Some(u64::MAX), ..base.clone() },
        ];
        for entry in bad {
            let mut image = ImageWriter::new(Path::new("test"), ImageKind::Pagemap, Vec::new()).unwrap();
            image.append(&Head { pages_id: 7 }).unwrap();
            image.append(&entry).unwrap();
            let bytes = image.finish().unwrap();
            assert!(reader(&bytes).unwrap().next_run().is_err(), "{entry:?}");
        }
        let mut image = ImageWriter::new(Path::new("test"), ImageKind::Pagemap, Vec::new()).unwrap();
        image.append(&Head { pages_id: 7 }).unwrap();
        image.append(&base).unwrap();
        image.append(&base).unwrap();
        let bytes = image.finish().unwrap();
        let mut twice = reader(&bytes).unwrap();
        assert!(twice.next_run().is_ok() && twice.next_run().is_err(), "the same page twice");
    }
}
