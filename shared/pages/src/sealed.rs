//! Reading a sealed page store, in another process than the one that filled it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use haulage_sys::PAGE_BYTES;
use haulage_sys::lazy::FileSource;
use rustix::fs::{FallocateFlags, fallocate};

use crate::chunk::{CHUNK_PAGES, Chunk, Kept, Piece};
use crate::index::Index;
use crate::object::{ObjectId, Place};
use crate::process::{Generation, Vpid};
use crate::range::{PageNo, PageRange, RangeSet};
use crate::store::{DATA_FILE, INDEX_FILE, SLOT_BYTES, StoreError, offset, pages_of};

/// A store that is complete and only read, but for the bytes of pages that the source still owes.
#[derive(Debug)]
pub struct SealedStore {
    data: File,
    path: PathBuf,
    index: Index,
    objects: BTreeMap<Vpid, File>,
    namespace: Option<File>,
}

/// A chunk of a process that holds more than zeros.
#[derive(Debug)]
pub(crate) struct FilledChunk {
    pub(crate) whole: PageRange,
    /// The round in which bytes of it came last.
    pub(crate) latest: u32,
    /// Its pages that are not zeros.
    pub(crate) data: Vec<PageRange>,
    /// Its pages whose bytes are still to come.
    pub(crate) owed: Vec<PageRange>,
}

/// Gives the memory or disk of chunks back that nobody needs any more.
#[derive(Debug)]
pub(crate) struct Spare(File);

/// Adjacent stored pages of one kind.
enum Kind {
    At(u64),
    Zero,
}

impl SealedStore {
    /// Opens the store in `dir`.
    ///
    /// # Errors
    /// `NotFound` when it is not sealed, or nobody holds its objects any more; [`StoreError::Index`] when the index is damaged or another version's, or the
    /// data file is shorter than the index says.
    pub fn open(dir: &Path) -> Result<Self, StoreError> {
        let path = dir.join(INDEX_FILE);
        let bytes = fs::read(&path).map_err(|source| StoreError::Io { path, source })?;
        let index = Index::decode(&bytes)?;
        let path = dir.join(DATA_FILE);
        let incomplete = index.chunks().any(|chunk| !chunk.owed.is_empty());
        let opened = File::options().read(true).write(incomplete).open(&path);
        let opened = opened.and_then(|data| Ok((data.metadata()?.len(), data)));
        let (length, data) = opened.map_err(|source| StoreError::Io { path: path.clone(), source })?;
        if length < u64::from(index.slots) * SLOT_BYTES {
            return Err(crate::index::IndexError::Length.into());
        }
        let opened = index.objects.iter().map(|(vpid, place)| Ok((*vpid, place.open()?)));
        let objects = opened.collect::<io::Result<_>>();
        let objects = objects.map_err(|source| StoreError::Io { path: path.clone(), source })?;
        let namespace = index.namespace.as_ref().map(Place::open_to_read).transpose();
        let namespace = namespace.map_err(|source| StoreError::Io { path: path.clone(), source })?;
        Ok(Self { data, path, index, objects, namespace })
    }

    /// The processes, ascending. One without pages is listed too.
    pub fn processes(&self) -> impl Iterator<Item = (Vpid, Generation)> + '_ {
        let all = self.index.processes.iter().filter(|(vpid, _)| !vpid.is_object());
        all.map(|(vpid, stored)| (*vpid, stored.generation))
    }

    /// The shared memory: what goes in place of a process's id, which object it was on the source, and the memory
    /// itself, for reading and writing.
    pub fn objects(&self) -> impl Iterator<Item = (Vpid, ObjectId, &File)> + '_ {
        self.objects.iter().filter_map(|(vpid, object)| {
            let id = ObjectId(self.index.processes.get(vpid)?.generation.0);
            Some((*vpid, id, object))
        })
    }

    /// The IPC namespace of those objects that are System V segments.
    pub fn namespace(&self) -> Option<&File> {
        self.namespace.as_ref()
    }

    /// The pages of one process; none of a process that is not listed.
    pub fn pages(&self, vpid: Vpid) -> RangeSet {
        pages_of(self.index.processes.get(&vpid))
    }

    /// Pages whose bytes are still to come, over all processes.
    pub fn owed(&self) -> u64 {
        self.index.chunks().map(|chunk| chunk.owed.count()).sum()
    }

    /// The generation of process `vpid`; `None` of one that is not listed.
    pub(crate) fn generation(&self, vpid: Vpid) -> Option<Generation> {
        self.index.processes.get(&vpid).map(|stored| stored.generation)
    }

    /// Those of the pages of `range` whose bytes are still to come, of process `vpid` of that generation; `None` of one
    /// that is not listed.
    pub(crate) fn still_owed(
        &self,
        vpid: Vpid,
        generation: Generation,
        range: PageRange,
    ) -> Option<Vec<PageRange>> {
        let stored = self.index.processes.get(&vpid).filter(|stored| stored.generation == generation)?;
        let mut owed = Vec::new();
        for piece in Piece::of(range) {
            let Some(chunk) = stored.chunks.get(&piece.chunk) else { continue };
            let here = Chunk { present: chunk.owed.and(piece.bits()), ..Chunk::default() };
            owed.extend(here.runs(piece.chunk).map(|(run, _)| run));
        }
        Some(owed)
    }

    /// Takes in the bytes of pages that were owed; `None` for zeros.
    ///
    /// # Errors
    /// [`StoreError::Missing`] when they were not owed; the pages before those have been taken in then.
    pub(crate) fn settle(
        &mut self,
        vpid: Vpid,
        range: PageRange,
        bytes: Option<&[u8]>,
    ) -> Result<(), StoreError> {
        let mut rest = bytes;
        for piece in Piece::of(range) {
            let chunk = self.index.processes.get_mut(&vpid);
            let chunk = chunk.and_then(|stored| stored.chunks.get_mut(&piece.chunk));
            let chunk = chunk.filter(|chunk| piece.bits().and_not(chunk.owed).is_empty());
            let Some((chunk, slot)) = chunk.and_then(|chunk| chunk.slot.map(|slot| (chunk, slot))) else {
                return Err(StoreError::Missing { vpid, range: piece.range });
            };
            if let Some(bytes) = rest {
                let length = piece.range.count() as usize * PAGE_BYTES;
                let Some((here, after)) = bytes.split_at_checked(length) else {
                    return Err(StoreError::Length { pages: range.count(), found: bytes.len() });
                };
                rest = Some(after);
                let written = self.data.write_all_at(here, offset(slot, piece.first()));
                written.map_err(|source| StoreError::Io { path: self.path.clone(), source })?;
                chunk.data = chunk.data.or(piece.bits());
            }
            chunk.owed = chunk.owed.and_not(piece.bits());
        }
        Ok(())
    }

    /// Reads the pages of `range` into `buffer`, whose length is theirs.
    ///
    /// # Errors
    /// [`StoreError::Missing`] when not all of them are stored. The buffer's content is not defined then.
    pub fn read_into(&self, vpid: Vpid, range: PageRange, buffer: &mut [u8]) -> Result<(), StoreError> {
        if buffer.len() as u64 != range.count() * PAGE_BYTES as u64 {
            return Err(StoreError::Length { pages: range.count(), found: buffer.len() });
        }
        let mut rest = buffer;
        for piece in Piece::of(range) {
            self.alike(vpid, piece, &mut |part, kind| {
                let (here, after) = std::mem::take(&mut rest)
                    .split_at_mut_checked(part.count() as usize * PAGE_BYTES)
                    .unwrap_or_default();
                rest = after;
                match kind {
                    Kind::Zero => here.fill(0),
                    Kind::At(offset) => {
                        let data = self.objects.get(&vpid).unwrap_or(&self.data);
                        data.read_exact_at(here, offset).map_err(|error| self.failed(error))?
                    }
                }
                Ok(())
            })?;
        }
        Ok(())
    }

    /// The data file, for the kernel to copy from.
    ///
    /// # Errors
    /// When it cannot be mapped.
    pub(crate) fn map(&self) -> Result<FileSource, StoreError> {
        let length = u64::from(self.index.slots) * SLOT_BYTES;
        FileSource::map(&self.data, length).map_err(|error| self.failed(error))
    }

    /// For [`Self::release`].
    ///
    /// # Errors
    /// When the data file cannot be opened for writing.
    pub(crate) fn spare(&self) -> Result<Spare, StoreError> {
        let file = File::options().write(true).open(&self.path);
        file.map(Spare).map_err(|error| self.failed(error))
    }

    /// Gives back what the chunk of process `vpid` that begins at `first` takes, and its bytes with it. That is not
    /// possible on every file system, and then nothing happens.
    pub(crate) fn release(&self, spare: &Spare, vpid: Vpid, first: PageNo) {
        let number = first.0 / CHUNK_PAGES;
        let chunk = self.index.processes.get(&vpid).and_then(|stored| stored.chunks.get(&number));
        let Some(slot) = chunk.and_then(|chunk| chunk.slot) else { return };
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        // All that depends on it is how much memory is free.
        let _ = fallocate(&spare.0, hole, offset(slot, 0), SLOT_BYTES);
    }

    /// The chunks of a process that hold more than zeros; `None` of a process that is not listed.
    pub(crate) fn filled(&self, vpid: Vpid) -> Option<Vec<FilledChunk>> {
        let chunks = &self.index.processes.get(&vpid)?.chunks;
        let filled = chunks.iter().filter(|(_, chunk)| !chunk.data.or(chunk.owed).is_empty()).filter_map(
            |(number, chunk)| {
                let whole = PageRange::with_count(PageNo(number * CHUNK_PAGES), CHUNK_PAGES)?;
                let all = |wanted| {
                    let alike = chunk.runs(*number).filter(move |(_, kept)| *kept == wanted);
                    alike.map(|(range, _)| range).collect()
                };
                let (data, owed) = (all(Kept::InFile), all(Kept::Owed));
                Some(FilledChunk { whole, latest: chunk.latest, data, owed })
            },
        );
        Some(filled.collect())
    }

    /// Where in the data file `page` lies, and how many pages from it on lie there one after the other.
    ///
    /// # Errors
    /// [`StoreError::Missing`] when the store does not have its bytes.
    pub(crate) fn place(&self, vpid: Vpid, page: PageNo) -> Result<(u64, u64), StoreError> {
        let chunk =
            self.index.processes.get(&vpid).and_then(|stored| stored.chunks.get(&(page.0 / CHUNK_PAGES)));
        let first = page.0 % CHUNK_PAGES;
        let pages = chunk.map_or(0, |chunk| {
            (first..CHUNK_PAGES).take_while(|page| chunk.data.contains(*page)).count() as u64
        });
        match (chunk.and_then(|chunk| chunk.slot), PageRange::with_count(page, 1)) {
            (Some(slot), _) if pages > 0 => Ok((offset(slot, first), pages)),
            (_, Some(range)) => Err(StoreError::Missing { vpid, range }),
            (_, None) => Err(StoreError::Index(crate::index::IndexError::Chunk(page.0 / CHUNK_PAGES))),
        }
    }

    /// Calls `with` for each run of pages of `piece` that lie together in the data file or are zero together.
    fn alike(
        &self,
        vpid: Vpid,
        piece: Piece,
        with: &mut dyn FnMut(PageRange, Kind) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let stored = self.index.processes.get(&vpid);
        let chunk = stored.and_then(|stored| stored.chunks.get(&piece.chunk)).copied().unwrap_or_default();
        let absent = piece.bits().and_not(chunk.present);
        if !absent.is_empty() {
            let missing = Chunk { present: absent, ..Chunk::default() };
            let range = missing.runs(piece.chunk).next().map_or(piece.range, |(range, _)| range);
            return Err(StoreError::Missing { vpid, range });
        }
        for (run, kept) in chunk.runs(piece.chunk) {
            let Some(part) = run.intersect(piece.range) else { continue };
            let kind = match (kept, chunk.slot) {
                (Kept::InFile, Some(slot)) => Kind::At(offset(slot, part.start().0 % CHUNK_PAGES)),
                (Kept::Owed, _) => return Err(StoreError::Missing { vpid, range: part }),
                _ => Kind::Zero,
            };
            with(part, kind)?;
        }
        Ok(())
    }

    fn failed(&self, source: io::Error) -> StoreError {
        StoreError::Io { path: self.path.clone(), source }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{PageStore, StoreLimits};
    use proptest::prelude::*;

    const ONE: Generation = Generation(1);

    /// Pages around the boundaries of the first three chunks.
    fn any_range() -> impl Strategy<Value = PageRange> {
        (500..1040_u64, 1..40_u64)
            .prop_map(|(start, count)| PageRange::with_count(PageNo(start), count).unwrap())
    }

    /// A process and an object.
    fn owner(number: u32) -> Vpid {
        if number == 1 { Vpid(1) } else { Vpid::of_object(7) }
    }

    #[derive(Debug, Clone)]
    enum Step {
        Write(u32, PageRange, u8),
        Zero(u32, PageRange),
        Retain(u32, Vec<PageRange>),
        Reset(u32),
    }

    fn any_step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (1..3_u32, any_range(), 1..=255_u8).prop_map(|(vpid, range, seed)| Step::Write(vpid, range, seed)),
            2 => (1..3_u32, any_range()).prop_map(|(vpid, range)| Step::Zero(vpid, range)),
            1 => (1..3_u32, prop::collection::vec(any_range(), 0..8)).prop_map(|(vpid, keep)| Step::Retain(vpid, keep)),
            1 => (1..3_u32).prop_map(Step::Reset),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn what_went_in_comes_out_after_sealing(steps in prop::collection::vec(any_step(), 0..24)) {
            let dir = tempfile::tempdir().unwrap();
            let mut store = PageStore::create(dir.path(), StoreLimits::default()).unwrap();
            let mut model: BTreeMap<(u32, u64), u8> = BTreeMap::new();
            for step in steps {
                match step {
                    Step::Write(vpid, range, seed) => {
                        let mut bytes = Vec::new();
                        for page in range.start().0..range.end().0 {
                            let value = seed.wrapping_add(page as u8).max(1);
                            bytes.extend([value; PAGE_BYTES]);
                            model.insert((vpid, page), value);
                        }
                        store.write(owner(vpid), ONE, range, &bytes).unwrap();
                    }
                    Step::Zero(vpid, range) => {
                        store.zero(owner(vpid), ONE, range).unwrap();
                        model.extend((range.start().0..range.end().0).map(|page| ((vpid, page), 0)));
                    }
                    Step::Retain(vpid, keep) => {
                        let keep: RangeSet = keep.into_iter().collect();
                        let before = model.len();
                        model.retain(|(owner, page), _| *owner != vpid || keep.contains(PageNo(*page)));
                        prop_assert_eq!(store.retain(owner(vpid), &keep).unwrap(), (before - model.len()) as u64);
                    }
                    Step::Reset(vpid) => {
                        store.reset(owner(vpid));
                        model.retain(|(owner, _), _| *owner != vpid);
                    }
                }
            }
            let (path, _held) = store.seal().unwrap();
            let sealed = SealedStore::open(&path).unwrap();
            for (object, _, memory) in sealed.objects() {
                prop_assert_eq!(object, owner(2));
                let mut page_there = [0; PAGE_BYTES];
                // A page beyond the end is one of zeros once the object has its length.
                for page in 0..memory.metadata().unwrap().len() / PAGE_BYTES as u64 {
                    memory.read_exact_at(&mut page_there, page * PAGE_BYTES as u64).unwrap();
                    let value = model.get(&(2, page)).copied().unwrap_or(0);
                    prop_assert!(page_there.iter().all(|byte| *byte == value), "page {}", page);
                }
            }
            for vpid in 1..3 {
                let expected: Vec<_> = model.iter().filter(|((owner, _), _)| *owner == vpid).collect();
                let pages = sealed.pages(owner(vpid));
                prop_assert_eq!(pages.pages().map(|page| page.0).collect::<Vec<_>>(),
                    expected.iter().map(|((_, page), _)| *page).collect::<Vec<_>>());
                let mut out = Vec::new();
                for range in pages.iter() {
                    let mut bytes = vec![0; range.count() as usize * PAGE_BYTES];
                    sealed.read_into(owner(vpid), range, &mut bytes).unwrap();
                    out.extend(bytes);
                }
                let all = out.chunks_exact(PAGE_BYTES).zip(expected);
                for (bytes, (_, value)) in all {
                    prop_assert!(bytes.iter().all(|byte| byte == value));
                }
            }
        }
    }

    #[test]
    fn what_is_not_stored_is_an_error_that_names_it() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = PageStore::create(dir.path(), StoreLimits::default()).unwrap();
        let range = |start, count| PageRange::with_count(PageNo(start), count).unwrap();
        store.zero(Vpid(1), ONE, range(10, 5)).unwrap();
        let wanted = [range(8, 4)].into_iter().collect();
        assert_eq!(store.missing(Vpid(1), &wanted).runs(), [range(8, 2)]);
        let sealed = SealedStore::open(&store.seal().unwrap().0).unwrap();
        let error = sealed.read_into(Vpid(1), range(12, 5), &mut vec![0; 5 * PAGE_BYTES]).unwrap_err();
        assert!(matches!(error, StoreError::Missing { range: found, .. } if found == range(15, 2)));
        assert!(matches!(PageStore::create(dir.path(), StoreLimits::default()), Err(StoreError::Io { .. })));
    }

    #[test]
    fn an_object_that_nobody_holds_cannot_be_opened() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = PageStore::create(dir.path(), StoreLimits::default()).unwrap();
        store.admit(owner(2), ONE).unwrap();
        let (path, held) = store.seal().unwrap();
        assert_eq!(SealedStore::open(&path).unwrap().objects().count(), 1);
        drop(held);
        let error = SealedStore::open(&path).unwrap_err();
        assert!(matches!(error, StoreError::Io { .. }), "{error:?}");
    }

    #[test]
    fn a_peer_cannot_fill_our_memory_with_zero_runs() {
        let dir = tempfile::tempdir().unwrap();
        let limits = StoreLimits { chunks: 10, processes: 2 };
        let mut store = PageStore::create(dir.path(), limits).unwrap();
        let all = PageRange::new(PageNo(0), PageNo::END).unwrap();
        assert!(matches!(store.zero(Vpid(1), ONE, all), Err(StoreError::Full(_))));
        store.admit(Vpid(2), ONE).unwrap();
        assert!(matches!(store.admit(Vpid(3), ONE), Err(StoreError::Full(_))));
    }

    #[test]
    fn what_is_released_takes_no_room_and_its_neighbours_stay() {
        use std::os::unix::fs::MetadataExt;
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let mut store = PageStore::create(&dir.path().join("store"), StoreLimits::default()).unwrap();
        // The end of one chunk and the beginning of the next.
        let range = PageRange::with_count(PageNo(212), 310).unwrap();
        let bytes: Vec<u8> = (0..310_u32).flat_map(|page| [(page % 250 + 1) as u8; PAGE_BYTES]).collect();
        store.write(Vpid(1), ONE, range, &bytes).unwrap();
        let (sealed, _objects) = store.seal().unwrap();
        let sealed = SealedStore::open(&sealed).unwrap();
        let taken = || sealed.data.metadata().unwrap().blocks() * 512;
        let (spare, before) = (sealed.spare().unwrap(), taken());
        sealed.release(&spare, Vpid(1), PageNo(0));
        assert_eq!(before - taken(), 300 * PAGE_BYTES as u64);
        let rest = PageRange::with_count(PageNo(512), 10).unwrap();
        let mut found = vec![0; 10 * PAGE_BYTES];
        sealed.read_into(Vpid(1), rest, &mut found).unwrap();
        assert!(found == bytes[300 * PAGE_BYTES..]);
    }

    #[test]
    fn an_unsealed_and_a_cut_store_cannot_be_opened() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = PageStore::create(dir.path(), StoreLimits::default()).unwrap();
        let page = PageRange::with_count(PageNo(3), 1).unwrap();
        store.write(Vpid(1), ONE, page, &[1; PAGE_BYTES]).unwrap();
        assert!(matches!(SealedStore::open(dir.path()), Err(StoreError::Io { .. })));
        store.seal().unwrap();
        File::options().write(true).open(dir.path().join(DATA_FILE)).unwrap().set_len(100).unwrap();
        assert!(matches!(SealedStore::open(dir.path()), Err(StoreError::Index(_))));
    }
}
