//! The pages of a container on the target's disk, each in its place as it comes.
//!
//! A directory with one sparse data file for all processes. Every 2 MiB of a process's address space that holds data
//! gets a slot of 2 MiB in the file when it is first written, and a page lies in its slot where it lies in its 2 MiB.
//! Shared memory lies in no such file but in memory of its own, which the restored processes will map: what comes is
//! where it belongs, and is not copied again. It is there as long as somebody holds it ([`Objects`]). System V segments are in
//! an IPC namespace besides ([`crate::segments`]).
//!
//! Which pages are stored is known in memory until [`PageStore::seal`] writes it to an index beside the file; then
//! another process can read the pages ([`crate::sealed::SealedStore`]).

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use haulage_sys::{PAGE_BYTES, PAGE_SIZE};
use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, memfd_create};

use crate::chunk::{CHUNK_PAGES, Chunk, Piece};
use crate::frame::{PART_BYTES, Parts};
use crate::index::{Index, IndexError, Stored};
use crate::named::Owner;
use crate::object::{Label, Place};
use crate::process::{Generation, Vpid};
use crate::range::{PageNo, PageRange, RangeSet};
use crate::segments::Segments;

pub(crate) const DATA_FILE: &str = "pages.dat";
pub(crate) const INDEX_FILE: &str = "pages.idx";
/// Bytes of one slot.
pub(crate) const SLOT_BYTES: u64 = CHUNK_PAGES * PAGE_SIZE;

/// How much a peer may make us keep.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoreLimits {
    /// Pieces of 2 MiB of address space, of all processes together; about 150 bytes of memory each.
    pub chunks: usize,
    /// Processes.
    pub processes: usize,
}

impl Default for StoreLimits {
    /// 2 TiB of address space and 65,536 processes.
    fn default() -> Self {
        Self { chunks: 1 << 20, processes: 1 << 16 }
    }
}

/// A store could not be made, filled or read.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The disk or the directory failed.
    #[error("access to {} failed", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What happened.
        #[source]
        source: io::Error,
    },
    /// The peer sends more than it may.
    #[error("store may not hold more {0}")]
    Full(&'static str),
    /// The bytes given are not those of the pages given.
    #[error("{found} bytes for {pages} pages")]
    Length {
        /// How many pages.
        pages: u64,
        /// How many bytes.
        found: usize,
    },
    /// The index cannot be used.
    #[error("index cannot be used")]
    Index(#[from] IndexError),
    /// A page that was asked for is not stored.
    #[error("pages {range} of process {vpid} are not stored")]
    Missing {
        /// Whose.
        vpid: Vpid,
        /// Which.
        range: PageRange,
    },
}

/// The shared memory of a sealed store: gone when this is dropped, unless somebody has opened it.
#[derive(Debug)]
pub struct Objects(#[expect(dead_code, reason = "held open, for others")] Vec<File>);

/// What is stored of an object.
#[derive(Debug)]
struct Memory {
    file: File,
    label: Label,
}

/// A store that takes pages in.
#[derive(Debug)]
pub struct PageStore {
    dir: PathBuf,
    data: File,
    index: Index,
    objects: BTreeMap<Vpid, Memory>,
    segments: Segments,
    /// Slots whose chunk was dropped.
    free: Vec<u32>,
    chunks: usize,
    round: u32,
    limits: StoreLimits,
}

impl PageStore {
    /// Makes an empty store in `dir`, which is made too.
    ///
    /// # Errors
    /// When `dir` holds a store already (`AlreadyExists`), or cannot be written to.
    pub fn create(dir: &Path, limits: StoreLimits) -> Result<Self, StoreError> {
        fs::create_dir_all(dir).map_err(|source| StoreError::Io { path: dir.to_owned(), source })?;
        let path = dir.join(DATA_FILE);
        let data = File::options().read(true).write(true).create_new(true).open(&path);
        let data = data.map_err(|source| StoreError::Io { path, source })?;
        Ok(Self {
            dir: dir.to_owned(),
            data,
            index: Index::default(),
            objects: BTreeMap::new(),
            segments: Segments::default(),
            free: Vec::new(),
            chunks: 0,
            round: 0,
            limits,
        })
    }

    /// What is written from now on belongs to `round`.
    pub fn enter_round(&mut self, round: u32) {
        self.round = round;
    }

    /// The generation of process `vpid` that is stored.
    pub fn generation(&self, vpid: Vpid) -> Option<Generation> {
        self.index.processes.get(&vpid).map(|stored| stored.generation)
    }

    /// Processes that anything is stored of.
    pub fn processes(&self) -> Vec<Vpid> {
        self.index.processes.keys().copied().collect()
    }

    /// Pages that are stored of process `vpid`.
    pub fn pages(&self, vpid: Vpid) -> RangeSet {
        pages_of(self.index.processes.get(&vpid))
    }

    /// Stores `bytes`, the content of the pages of `range`, replacing what was stored of them.
    ///
    /// # Errors
    /// After an error of the disk, which of the pages are stored with the old bytes and which with the new is unknown;
    /// after the others nothing has changed.
    pub fn write(
        &mut self,
        vpid: Vpid,
        generation: Generation,
        range: PageRange,
        bytes: &[u8],
    ) -> Result<(), StoreError> {
        if bytes.len() as u64 != range.count() * PAGE_SIZE {
            return Err(StoreError::Length { pages: range.count(), found: bytes.len() });
        }
        let mut rest = bytes;
        for piece in Piece::of(range) {
            let (here, after) =
                rest.split_at_checked(piece.range.count() as usize * PAGE_BYTES).unwrap_or_default();
            rest = after;
            let slot = self.slot_of(vpid, generation, piece.chunk)?;
            self.data_of(vpid)
                .write_all_at(here, offset(slot, piece.first()))
                .map_err(|source| self.failed(source))?;
            let round = self.round;
            let chunk = self.chunk(vpid, generation, piece.chunk)?;
            chunk.latest = round;
            chunk.present = chunk.present.or(piece.bits());
            chunk.data = chunk.data.or(piece.bits());
        }
        Ok(())
    }

    /// Replaces `parts` of each page of `range`, of which all is stored, by `bytes`.
    ///
    /// # Errors
    /// [`StoreError::Missing`] when a page is not stored, or as zeros. Some pages may have been changed then, as after an
    /// error of the disk.
    pub fn mend(
        &mut self,
        vpid: Vpid,
        generation: Generation,
        range: PageRange,
        parts: Parts,
        bytes: &[u8],
    ) -> Result<(), StoreError> {
        let one = parts.count() * PART_BYTES;
        if bytes.len() as u64 != range.count() * one as u64 {
            return Err(StoreError::Length { pages: range.count(), found: bytes.len() });
        }
        let round = self.round;
        let mut rest = bytes.chunks_exact(one.max(1));
        for piece in Piece::of(range) {
            let stored = self.index.processes.get_mut(&vpid).filter(|stored| stored.generation == generation);
            let chunk = stored.and_then(|stored| stored.chunks.get_mut(&piece.chunk));
            let chunk = chunk.filter(|chunk| piece.bits().and_not(chunk.data).is_empty());
            let Some(Chunk { slot: Some(slot), latest, .. }) = chunk else {
                return Err(StoreError::Missing { vpid, range: piece.range });
            };
            *latest = round;
            let slot = *slot;
            for (page, bytes) in (piece.first()..).zip(rest.by_ref().take(piece.range.count() as usize)) {
                let mut bytes = bytes;
                for part in parts.ranges() {
                    let (here, after) = bytes.split_at_checked(part.len()).unwrap_or_default();
                    let at = offset(slot, page) + part.start as u64;
                    self.data_of(vpid).write_all_at(here, at).map_err(|source| self.failed(source))?;
                    bytes = after;
                }
            }
        }
        Ok(())
    }

    /// Stores zeros for the pages of `range`. Touches no disk.
    ///
    /// # Errors
    /// [`StoreError::Full`]; part of the range may be stored then.
    pub fn zero(&mut self, vpid: Vpid, generation: Generation, range: PageRange) -> Result<(), StoreError> {
        for piece in Piece::of(range) {
            let chunk = self.chunk(vpid, generation, piece.chunk)?;
            let filled = !chunk.data.and(piece.bits()).is_empty();
            chunk.present = chunk.present.or(piece.bits());
            chunk.data = chunk.data.and_not(piece.bits());
            if filled {
                self.empty(vpid, piece.range)?;
            }
        }
        Ok(())
    }

    /// Takes pages out of an object: whoever maps it reads zeros there, without being asked to.
    fn empty(&self, vpid: Vpid, range: PageRange) -> Result<(), StoreError> {
        let Some(Memory { file, .. }) = self.objects.get(&vpid) else { return Ok(()) };
        let (start, length) = (range.start().address(), range.count() * PAGE_SIZE);
        let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(file, mode, start, length).map_err(|errno| self.failed(errno.into()))
    }

    fn data_of(&self, vpid: Vpid) -> &File {
        self.objects.get(&vpid).map_or(&self.data, |memory| &memory.file)
    }

    fn failed(&self, source: io::Error) -> StoreError {
        StoreError::Io { path: self.dir.join(DATA_FILE), source }
    }

    /// Stores for the pages of `range` what is stored of as many pages from `like` on.
    ///
    /// # Errors
    /// [`StoreError::Missing`] when those are not stored, and nothing has changed; else as [`Self::write`].
    pub(crate) fn copy(
        &mut self,
        to: Owner,
        range: PageRange,
        from: Owner,
        like: PageNo,
    ) -> Result<(), StoreError> {
        let mut bytes = vec![0; range.count() as usize * PAGE_BYTES];
        for (page, here) in (like.0..).zip(bytes.chunks_exact_mut(PAGE_BYTES)) {
            self.read(from, PageNo(page), here)?;
        }
        self.write(to.vpid, to.generation, range, &bytes)
    }

    fn read(&self, owner: Owner, page: PageNo, bytes: &mut [u8]) -> Result<(), StoreError> {
        let stored = self.index.processes.get(&owner.vpid);
        let stored = stored.filter(|stored| stored.generation == owner.generation);
        let chunk = stored.and_then(|stored| stored.chunks.get(&(page.0 / CHUNK_PAGES)));
        let bit = page.0 % CHUNK_PAGES;
        match chunk.filter(|chunk| chunk.present.contains(bit)) {
            Some(Chunk { slot: Some(slot), data, .. }) if data.contains(bit) => self
                .data_of(owner.vpid)
                .read_exact_at(bytes, offset(*slot, bit))
                .map_err(|source| self.failed(source)),
            Some(_) => {
                bytes.fill(0);
                Ok(())
            }
            None => {
                let range = PageRange::with_count(page, 1);
                let error = range.map(|range| StoreError::Missing { vpid: owner.vpid, range });
                Err(error.unwrap_or(StoreError::Full("address space")))
            }
        }
    }

    /// Notes that the pages of `pages` exist and that their bytes are still to come, whatever is stored of them. They get
    /// their places in the data file. Nothing may be written to them before the store is sealed.
    ///
    /// # Errors
    /// [`StoreError::Full`]; part of them may be noted then.
    pub(crate) fn owe(
        &mut self,
        vpid: Vpid,
        generation: Generation,
        pages: &RangeSet,
    ) -> Result<(), StoreError> {
        for piece in pages.iter().flat_map(Piece::of) {
            self.slot_of(vpid, generation, piece.chunk)?;
            let chunk = self.chunk(vpid, generation, piece.chunk)?;
            chunk.present = chunk.present.or(piece.bits());
            chunk.data = chunk.data.and_not(piece.bits());
            chunk.owed = chunk.owed.or(piece.bits());
        }
        Ok(())
    }

    /// Drops the stored pages of process `vpid` that are not in `keep`, and says how many there were.
    ///
    /// # Errors
    /// When they cannot be taken out of an object.
    pub fn retain(&mut self, vpid: Vpid, keep: &RangeSet) -> Result<u64, StoreError> {
        if self.objects.contains_key(&vpid) {
            for gone in self.pages(vpid).subtract(keep).iter() {
                self.empty(vpid, gone)?;
            }
        }
        let Some(stored) = self.index.processes.get_mut(&vpid) else { return Ok(0) };
        let mut kept = std::collections::BTreeMap::new();
        for piece in keep.iter().flat_map(Piece::of) {
            let bits: &mut crate::chunk::Bits = kept.entry(piece.chunk).or_default();
            *bits = bits.or(piece.bits());
        }
        let mut dropped = 0;
        let (free, before) = (&mut self.free, stored.chunks.len());
        stored.chunks.retain(|number, chunk| {
            let here = kept.get(number).copied().unwrap_or_default();
            dropped += chunk.present.and_not(here).count();
            chunk.present = chunk.present.and(here);
            chunk.data = chunk.data.and(here);
            chunk.owed = chunk.owed.and(here);
            let stays = !chunk.present.is_empty();
            free.extend(chunk.slot.filter(|_| !stays && !vpid.is_object()));
            stays
        });
        self.chunks -= before - stored.chunks.len();
        Ok(dropped)
    }

    /// Drops everything that is stored of process `vpid`, and says how many pages there were.
    pub fn reset(&mut self, vpid: Vpid) -> u64 {
        // An object goes as a whole.
        self.objects.remove(&vpid);
        let dropped = self.retain(vpid, &RangeSet::new()).unwrap_or(0);
        self.index.processes.remove(&vpid);
        dropped
    }

    /// Pages of `wanted` that are not stored.
    pub fn missing(&self, vpid: Vpid, wanted: &RangeSet) -> RangeSet {
        wanted.subtract(&self.pages(vpid))
    }

    /// Remembers that process `vpid` exists, though it may have no page.
    ///
    /// # Errors
    /// [`StoreError::Full`].
    pub fn admit(&mut self, vpid: Vpid, generation: Generation) -> Result<(), StoreError> {
        self.admit_as(vpid, generation, None)
    }

    /// As [`Self::admit`], of shared memory, which is called `label` and is made here.
    ///
    /// # Errors
    /// As there, and when no memory can be called that.
    pub fn introduce(&mut self, vpid: Vpid, generation: Generation, label: &Label) -> Result<(), StoreError> {
        if self.objects.get(&vpid).is_some_and(|memory| memory.label != *label) {
            self.reset(vpid);
        }
        self.admit_as(vpid, generation, Some(label))
    }

    fn admit_as(
        &mut self,
        vpid: Vpid,
        generation: Generation,
        label: Option<&Label>,
    ) -> Result<(), StoreError> {
        if self.generation(vpid).is_some_and(|stored| stored != generation) {
            self.reset(vpid);
        }
        if !self.index.processes.contains_key(&vpid) {
            if self.index.processes.len() >= self.limits.processes {
                return Err(StoreError::Full("processes"));
            }
            if vpid.is_object() {
                let label = label.cloned().unwrap_or_else(Label::anonymous);
                let file = self.memory_called(&label).map_err(|error| self.failed(error))?;
                self.objects.insert(vpid, Memory { file, label });
            }
            self.index.processes.insert(vpid, Stored { generation, chunks: Default::default() });
        }
        Ok(())
    }

    fn memory_called(&mut self, label: &Label) -> io::Result<File> {
        if let Some(segment) = label.segment() {
            return self.segments.make(segment);
        }
        let flags = match *label == Label::anonymous() {
            true => MemfdFlags::CLOEXEC,
            // It gets its seals when all is in it.
            false => MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING,
        };
        Ok(memfd_create(label.as_bytes(), flags)?.into())
    }

    /// Writes the index, after which any process can open the store, as long as the objects are held. The index appears
    /// whole or not at all.
    ///
    /// # Errors
    /// When the disk fails; the store is as good as not sealed then.
    pub fn seal(mut self) -> Result<(PathBuf, Objects), StoreError> {
        for (vpid, memory) in &self.objects {
            let at = Place::of(&memory.file).map_err(|source| self.failed(source))?;
            self.index.objects.insert(*vpid, at);
        }
        let namespace = std::mem::take(&mut self.segments).into_namespace();
        let at = namespace.as_ref().map(Place::of).transpose();
        self.index.namespace = at.map_err(|source| self.failed(source))?;
        let path = self.dir.join(DATA_FILE);
        let length = u64::from(self.index.slots) * SLOT_BYTES;
        self.data.set_len(length).map_err(|source| StoreError::Io { path, source })?;
        let (path, draft) = (self.dir.join(INDEX_FILE), self.dir.join("pages.idx.new"));
        fs::write(&draft, self.index.encode())
            .and_then(|()| fs::rename(&draft, &path))
            .map_err(|source| StoreError::Io { path, source })?;
        let memory = self.objects.into_values().map(|memory| memory.file);
        Ok((self.dir, Objects(memory.chain(namespace).collect())))
    }

    fn chunk(&mut self, vpid: Vpid, generation: Generation, number: u64) -> Result<&mut Chunk, StoreError> {
        self.admit(vpid, generation)?;
        let stored = self.index.processes.entry(vpid);
        let stored = stored.or_insert_with(|| Stored { generation, chunks: Default::default() });
        match stored.chunks.entry(number) {
            std::collections::btree_map::Entry::Occupied(chunk) => Ok(chunk.into_mut()),
            std::collections::btree_map::Entry::Vacant(_) if self.chunks >= self.limits.chunks => {
                Err(StoreError::Full("address space"))
            }
            std::collections::btree_map::Entry::Vacant(place) => {
                self.chunks += 1;
                Ok(place.insert(Chunk::default()))
            }
        }
    }

    fn slot_of(&mut self, vpid: Vpid, generation: Generation, number: u64) -> Result<u32, StoreError> {
        if let Some(slot) = self.chunk(vpid, generation, number)?.slot {
            return Ok(slot);
        }
        if vpid.is_object() {
            // Where the page belongs.
            let slot = u32::try_from(number).map_err(|_| StoreError::Full("shared memory"))?;
            self.chunk(vpid, generation, number)?.slot = Some(slot);
            return Ok(slot);
        }
        let slot = self.free.pop().unwrap_or(self.index.slots);
        self.index.slots = self.index.slots.max(slot + 1);
        self.chunk(vpid, generation, number)?.slot = Some(slot);
        Ok(slot)
    }
}

pub(crate) fn offset(slot: u32, page: u64) -> u64 {
    u64::from(slot) * SLOT_BYTES + page * PAGE_SIZE
}

pub(crate) fn pages_of(stored: Option<&Stored>) -> RangeSet {
    let mut pages = RangeSet::new();
    let chunks = stored.iter().flat_map(|stored| &stored.chunks);
    for (range, _) in chunks.flat_map(|(number, chunk)| chunk.runs(*number)) {
        pages.insert(range);
    }
    pages
}
