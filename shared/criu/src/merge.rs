//! Joining CRIU's images with memory that came another way: CRIU dumped everything but the pages that a mask hid from
//! it, the page store has those, and the restore wants both in one pagemap in address order.
//!
//! The received images stay as they are; the complete set is assembled in a directory beside them, which can be thrown
//! away and made again at any moment.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

use crate::image::{ImageError, ImageKind, ImageWriter, PAGE_SIZE, io_at};
use crate::mm::{self, Mapping};
use crate::pagemap::{Laziness, PageRun, PagemapReader, PagemapWriter, file_name};
use crate::shared::LeftOut;
use crate::{inventory, pstree, shared};

/// Memory is copied in pieces of this size, in bytes.
const PIECE: usize = 1 << 20;

/// The pages of one process that CRIU did not dump.
pub trait PageSource {
    /// The next run in ascending order, without overlap, or `None` after the last.
    fn next_run(&mut self) -> io::Result<Option<PageRun>>;
    /// Fills `buffer` with the content at `address`, within a run that `next_run` has given.
    fn read_at(&mut self, address: u64, buffer: &mut [u8]) -> io::Result<()>;
}

/// When a restored process gets the pages that CRIU did not dump.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fill {
    /// All of them from the images, before it runs.
    AtRestore,
    /// Where its mapping allows, from a server of a lazy restore, while it runs. CRIU's own pages still come from the
    /// images, since no server has them.
    Later,
}

/// The images could not be joined. The assembled directory is then unfinished and must not be restored from; begin
/// again, the received images are as they were.
#[derive(Debug, thiserror::Error)]
pub enum MergeError {
    /// An image is missing, damaged or unknown.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The source of our pages failed.
    #[error("cannot read the stored pages of process {pid}")]
    Source {
        /// Whose pages, by its id in the images.
        pid: u32,
        /// Why.
        source: io::Error,
    },
    /// The source gave runs out of order.
    #[error("the stored pages of process {pid} are out of order at {address:#x}")]
    Order {
        /// Whose pages.
        pid: u32,
        /// Where.
        address: u64,
    },
    /// CRIU dumped a page that was ours: the mask did not hold, and one of the two is stale.
    #[error("criu dumped the page at {address:#x} of process {pid}, which is in the page store too")]
    Overlap {
        /// Whose page.
        pid: u32,
        /// Where.
        address: u64,
    },
    /// CRIU left a page to a server of its own, which there is not.
    #[error("criu has not dumped the page at {address:#x} of process {pid}, but left it for a lazy restore")]
    Undumped {
        /// Whose page.
        pid: u32,
        /// Where.
        address: u64,
    },
    /// A stored page that no mapping of the images wants.
    #[error("the stored page at {address:#x} of process {pid} lies in no private mapping")]
    Unmapped {
        /// Whose page.
        pid: u32,
        /// Where.
        address: u64,
    },
    /// CRIU has dumped shared memory that was to be hidden from it, or there is a mapping of some that is not there.
    #[error("criu has dumped something of the shared memory {object}, or it is not among what was left out")]
    Shared {
        /// Its inode number on the source.
        object: u64,
    },
    /// CRIU has dumped a descriptor that was to be hidden from it, or it is of a file that is not there.
    #[error(
        "criu has dumped the descriptor {number} of process {pid}, or its file is not among what was left out"
    )]
    Descriptor {
        /// Whose.
        pid: u32,
        /// Which.
        number: u32,
    },
    /// Pages for a process that the images do not have.
    #[error("the images have no process {0}")]
    NoProcess(u32),
}

/// What was joined, in pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Merged {
    /// Pages that CRIU dumped.
    pub dumped: u64,
    /// Pages from the source.
    pub stored: u64,
    /// Those of them that were left to be served.
    pub later: u64,
}

/// A directory of images in the making.
#[derive(Debug)]
pub struct Assembly {
    received: PathBuf,
    out: PathBuf,
    processes: Vec<u32>,
}

impl Assembly {
    /// Begins the complete images in `out` from those in `received`, which are only read. Whatever files were in
    /// `out` are removed. The files are linked, not copied, where both are on one file system.
    ///
    /// # Errors
    /// When the images are of an unknown version or incomplete, or the directory cannot be made.
    pub fn begin(received: &Path, out: &Path) -> Result<Self, MergeError> {
        inventory::check(received)?;
        let processes = pstree::read(received)?.into_iter().map(|process| process.pid).collect();
        // The directory itself stays: somebody may hold it open who waits for what will be in it.
        fs::create_dir_all(out).map_err(io_at(out))?;
        for entry in fs::read_dir(out).map_err(io_at(out))? {
            let path = entry.map_err(io_at(out))?.path();
            fs::remove_file(&path).map_err(io_at(&path))?;
        }
        for entry in fs::read_dir(received).map_err(io_at(received))? {
            let entry = entry.map_err(io_at(received))?;
            let from = entry.path();
            if entry.file_type().map_err(io_at(&from))?.is_file() {
                let to = out.join(entry.file_name());
                fs::hard_link(&from, &to)
                    .or_else(|_| fs::copy(&from, &to).map(drop))
                    .map_err(io_at(&from))?;
            }
        }
        Ok(Self { received: received.to_owned(), out: out.to_owned(), processes })
    }

    /// The ids of the processes that the images have, the root first.
    pub fn processes(&self) -> &[u32] {
        &self.processes
    }

    /// Adds the mappings and descriptors that CRIU was not told of, before any pages are. Shared memory is inherited by the restore, under
    /// the keys of [`LeftOut::key`] and in the order of its objects.
    ///
    /// # Errors
    /// When CRIU has dumped something of it all the same, or something else in its place. The assembly is of no use
    /// then.
    pub fn add_shared(&self, left_out: &LeftOut) -> Result<(), MergeError> {
        shared::add(left_out, &self.received, &self.out, &self.processes)
    }

    /// Joins the pages of process `pid` from `source` with those that CRIU dumped. To be called for every process of
    /// [`Self::processes`], though nothing of it may be stored: what CRIU dumped would be left for later otherwise. A
    /// zombie has no memory and is left alone.
    ///
    /// # Errors
    /// Every page must be wanted by a private mapping of the process and must come from one side only. On error the
    /// process has no usable pagemap.
    pub fn add_pages(
        &self,
        pid: u32,
        source: &mut impl PageSource,
        fill: Fill,
    ) -> Result<Merged, MergeError> {
        if !self.processes.contains(&pid) {
            return Err(MergeError::NoProcess(pid));
        }
        let memory = mm::path(&self.received, pid);
        if !memory.try_exists().map_err(io_at(&memory))? {
            let stray = next_stored(source, pid, 0)?;
            let unmapped = |run: PageRun| Err(MergeError::Unmapped { pid, address: run.start });
            return stray.map_or(Ok(Merged::default()), unmapped);
        }
        let mut dumped = PagemapReader::open(&self.received, pid)?;
        let pages_name = format!("pages-{}.img", dumped.pages_id());
        let pages_in = self.received.join(&pages_name);
        let pages_out = self.out.join(&pages_name);
        let map_out = self.out.join(file_name(pid));
        // Both are links to the received images so far: gone first, never written through.
        remove(&pages_out)?;
        remove(&map_out)?;
        let image = ImageWriter::create(&map_out, ImageKind::Pagemap)?;
        let mut merge = Merge {
            pid,
            fill,
            map: PagemapWriter::new(image, dumped.pages_id())?,
            dumped: open_pages(&pages_in)?,
            pages_in,
            out: File::create_new(&pages_out).map_err(io_at(&pages_out))?,
            pages_out,
            piece: vec![0; PIECE],
            // With those that CRIU was not told of.
            mappings: Mappings { all: mm::read(&self.out, pid)?, at: 0 },
            done: Merged::default(),
        };
        let mut theirs = dumped.next_run()?;
        let mut ours = next_stored(source, pid, 0)?;
        loop {
            match (theirs, ours) {
                (Some((their, laziness)), our) if our.is_none_or(|our| their.start < our.start) => {
                    if let Some(our) = our.filter(|our| our.start < their.end()) {
                        return Err(MergeError::Overlap { pid, address: our.start });
                    }
                    merge.copy_dumped(their, laziness)?;
                    theirs = dumped.next_run()?;
                }
                (their, Some(our)) => {
                    if let Some((their, _)) = their.filter(|(their, _)| their.start < our.end()) {
                        return Err(MergeError::Overlap { pid, address: their.start });
                    }
                    merge.copy_stored(our, source)?;
                    ours = next_stored(source, pid, our.end())?;
                }
                (_, None) => break,
            }
        }
        merge.finish()
    }
}

struct Merge<W: Write> {
    pid: u32,
    fill: Fill,
    map: PagemapWriter<W>,
    pages_in: PathBuf,
    dumped: Option<File>,
    pages_out: PathBuf,
    out: File,
    piece: Vec<u8>,
    mappings: Mappings,
    done: Merged,
}

impl<W: Write> Merge<W> {
    fn copy_dumped(&mut self, run: PageRun, laziness: Laziness) -> Result<(), MergeError> {
        if laziness == Laziness::Elsewhere {
            return Err(MergeError::Undumped { pid: self.pid, address: run.start });
        }
        let (pages_in, pages_out) = (&self.pages_in, &self.pages_out);
        let file = self.dumped.as_mut().ok_or(ErrorKind::NotFound.into()).map_err(io_at(pages_in))?;
        for (_, length) in pieces(run, self.piece.len()) {
            let piece = self.piece.get_mut(..length).unwrap_or_default();
            file.read_exact(piece).map_err(io_at(pages_in))?;
            self.out.write_all(piece).map_err(io_at(pages_out))?;
        }
        self.done.dumped += run.pages;
        // CRIU marks whatever could be lazy, also in images that hold it.
        let laziness = if self.fill == Fill::Later { Laziness::Eager } else { laziness };
        Ok(self.map.append(run, laziness)?)
    }

    fn copy_stored(&mut self, mut run: PageRun, source: &mut impl PageSource) -> Result<(), MergeError> {
        let pid = self.pid;
        while run.pages > 0 {
            let part =
                self.mappings.next_part(run).map_err(|address| MergeError::Unmapped { pid, address })?;
            let (here, lazy) = part;
            let laziness = match self.fill {
                Fill::Later if lazy => Laziness::Elsewhere,
                Fill::Later => Laziness::Eager,
                Fill::AtRestore => Laziness::Lazy,
            };
            if laziness == Laziness::Elsewhere {
                self.done.later += here.pages;
            } else {
                for (address, length) in pieces(here, self.piece.len()) {
                    let piece = self.piece.get_mut(..length).unwrap_or_default();
                    source.read_at(address, piece).map_err(|source| MergeError::Source { pid, source })?;
                    self.out.write_all(piece).map_err(io_at(&self.pages_out))?;
                }
            }
            self.done.stored += here.pages;
            self.map.append(here, laziness)?;
            run = PageRun { start: here.end(), pages: run.pages - here.pages };
        }
        Ok(())
    }

    fn finish(self) -> Result<Merged, MergeError> {
        self.map.finish()?;
        Ok(self.done)
    }
}

/// The mappings of a process, asked about in ascending order.
struct Mappings {
    all: Vec<Mapping>,
    at: usize,
}

impl Mappings {
    /// The first pages of `run` that lie in one private mapping, and whether that can be lazy; the address of the
    /// first page if none covers it.
    fn next_part(&mut self, run: PageRun) -> Result<(PageRun, bool), u64> {
        loop {
            match self.all.get(self.at) {
                Some(mapping) if mapping.end <= run.start => self.at += 1,
                Some(mapping) if mapping.start <= run.start && mapping.is_private() => {
                    let pages = run.pages.min((mapping.end - run.start).div_ceil(PAGE_SIZE));
                    return Ok((PageRun { start: run.start, pages }, mapping.can_be_lazy()));
                }
                _ => return Err(run.start),
            }
        }
    }
}

/// `run` in pieces: the address and the length of each.
fn pieces(run: PageRun, size: usize) -> impl Iterator<Item = (u64, usize)> {
    (run.start..run.end())
        .step_by(size)
        // A piece is no longer than `size`, which is a usize.
        .map(move |address| (address, (run.end() - address).min(size as u64) as usize))
}

fn next_stored(source: &mut impl PageSource, pid: u32, after: u64) -> Result<Option<PageRun>, MergeError> {
    let run = source.next_run().map_err(|source| MergeError::Source { pid, source })?;
    match run {
        Some(run) if run.start < after || PageRun::new(run.start, run.pages).is_none() => {
            Err(MergeError::Order { pid, address: run.start })
        }
        run => Ok(run),
    }
}

/// A process of which every page is ours has an empty pages image, or none.
fn open_pages(path: &Path) -> Result<Option<File>, ImageError> {
    match File::open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(io_at(path)(error)),
    }
}

fn remove(path: &Path) -> Result<(), ImageError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(io_at(path)(error)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests;
