//! A restored process gets its memory while it runs: what it touches at once, the rest in the background, what was
//! written last before the freeze first.
//!
//! ```text
//!   restoring process ── userfaultfd ──▶ adopt
//!   faults, forks, moves, removals   ──▶ handle ──▶ pages in place, new spaces
//!   nobody waits                     ──▶ fill   ──▶ a piece more
//!   pages that the source owed       ──▶ arrive ──▶ whoever waits for them, first
//!   nothing is missing               ──▶ drop: the process owns its memory like any other
//! ```
//!
//! What the source still owes is asked for when it is touched ([`PageServer::take_asks`]), with its neighbours.
//!
//! The store gives back what it has of 2 MiB of memory once that is in place, so that a container takes little more room
//! while it is filled than afterwards. A copy whose server dies is lost anyway, and its source goes on. Only memory that
//! has moved, or that children may miss too, stays in the store to the end.
//!
//! A page that the store does not have, or has as zeros, is one of zeros; those are never filled in advance, since
//! that is what the kernel gives for them once the server has let go.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd};

use haulage_sys::CallError;
use haulage_sys::PAGE_SIZE;
use haulage_sys::lazy::{FileSource, Filled, MissingMemory};

use crate::absent::{Absent, Missing};
use crate::frame::{Batch, Parts};
use crate::owed::Ask;
use crate::process::Vpid;
use crate::range::{PageNo, PageRange, RangeSet};
use crate::sealed::{FilledChunk, SealedStore, Spare};
use crate::space::Space;
use crate::store::StoreError;

/// Pages that are put in place around one that was touched (64 KiB): large copies are 8 times as fast as single ones.
const AROUND_A_FAULT: u64 = 16;
/// Pages of one piece in the background (128 KiB, some 40 us): whoever faults waits no longer than for one.
const PIECE: u64 = 32;

/// Serving went wrong. What is missing stays missing, so the process must not go on.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The kernel refused.
    #[error("pages of process {vpid} cannot be put in place")]
    Kernel {
        /// Whose.
        vpid: Vpid,
        /// Why.
        #[source]
        source: CallError,
    },
    /// The store cannot be read.
    #[error("the page store cannot be read")]
    Store(#[from] StoreError),
    /// A process that the store does not know, or that came twice.
    #[error("process {0} is not expected")]
    Stranger(Vpid),
    /// The source has sent parts of pages of which nothing is stored.
    #[error("only parts have come of owed pages of process {0}")]
    Partial(Vpid),
}

/// The address space of a process that is being filled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SpaceId(pub u64);

/// What is filled in the background, one after the other.
#[derive(Debug)]
struct Planned {
    id: SpaceId,
    whole: PageRange,
    /// All that is stored of it is ours to put in place, and nothing is still to come.
    ours: bool,
}

/// What was done so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Served {
    /// Pages that somebody waited for.
    pub faults: u64,
    /// Pages that were put in place for those, with their neighbours.
    pub on_demand: u64,
    /// Pages that were put in place in the background.
    pub in_background: u64,
    /// Pages that the source had owed and sent because they were asked for.
    pub pulled: u64,
    /// Pages that the source had owed and sent unasked.
    pub pushed: u64,
}

/// Fills the memory of the processes of one container from a sealed store.
#[derive(Debug)]
pub struct PageServer {
    store: SealedStore,
    source: FileSource,
    spare: Spare,
    /// What is stored of processes that have not come yet, what came last at the end.
    expected: BTreeMap<Vpid, Vec<FilledChunk>>,
    spaces: BTreeMap<SpaceId, Space>,
    /// What is filled next, last first.
    plan: Vec<Planned>,
    last_id: u64,
    served: Served,
    /// What was asked of the source, by where it was when it was dumped.
    asked: BTreeMap<Vpid, RangeSet>,
    /// What is to be asked.
    asks: Vec<Ask>,
}

impl PageServer {
    /// Serves from `store`, which is looked through before anybody waits.
    ///
    /// # Errors
    /// When its pages cannot be mapped, or not written to.
    pub fn new(store: SealedStore) -> Result<Self, StoreError> {
        let (source, spare) = (store.map()?, store.spare()?);
        let expected = store.processes().filter_map(|(vpid, _)| {
            let mut chunks = store.filled(vpid)?;
            chunks.sort_by_key(|chunk| chunk.latest);
            Some((vpid, chunks))
        });
        let expected = expected.collect();
        let (spaces, plan) = (BTreeMap::new(), Vec::new());
        let (served, asked, asks) = (Served::default(), BTreeMap::new(), Vec::new());
        Ok(Self { store, source, spare, expected, spaces, plan, last_id: 0, served, asked, asks })
    }

    /// Takes on process `vpid`, which has nothing in place of what is stored of the mappings in `lazy`, and the rest.
    ///
    /// # Errors
    /// [`ServeError::Stranger`].
    pub fn adopt(
        &mut self,
        vpid: Vpid,
        memory: MissingMemory,
        lazy: &RangeSet,
    ) -> Result<SpaceId, ServeError> {
        if self.spaces.values().any(|space| space.vpid == vpid) {
            return Err(ServeError::Stranger(vpid));
        }
        let chunks = self.expected.remove(&vpid).ok_or(ServeError::Stranger(vpid))?;
        let id = self.new_id();
        let (mut data, mut due) = (RangeSet::new(), RangeSet::new());
        for chunk in &chunks {
            chunk.data.iter().for_each(|run| data.insert(*run));
            chunk.owed.iter().for_each(|run| due.insert(*run));
        }
        let (mut absent, mut owed) = (Absent::default(), Absent::default());
        data.intersect(lazy).iter().for_each(|run| absent.insert(run));
        due.intersect(lazy).iter().for_each(|run| owed.insert(run));
        self.plan.extend(chunks.into_iter().map(|chunk| {
            let whole = chunk.data.into_iter().collect::<RangeSet>().subtract(lazy).is_empty();
            Planned { id, whole: chunk.whole, ours: whole && chunk.owed.is_empty() }
        }));
        self.spaces.insert(id, Space::new(vpid, memory, absent, owed));
        Ok(id)
    }

    fn new_id(&mut self) -> SpaceId {
        self.last_id += 1;
        SpaceId(self.last_id)
    }

    /// The descriptor of a space, readable when [`Self::handle`] has something to do.
    pub fn descriptor(&self, id: SpaceId) -> Option<BorrowedFd<'_>> {
        Some(self.spaces.get(&id)?.memory.as_fd())
    }

    /// Pages that are missing, of all processes.
    pub fn missing(&self) -> u64 {
        self.spaces.values().map(|space| space.absent.pages() + space.owed.pages()).sum()
    }

    /// Whether pages are missing that the source has not sent yet.
    pub fn is_owed(&self) -> bool {
        self.spaces.values().any(|space| space.owed.pages() > 0)
    }

    /// What is to be asked of the source, in the order in which it was touched.
    pub fn take_asks(&mut self) -> Vec<Ask> {
        std::mem::take(&mut self.asks)
    }

    /// Takes in what the source has sent; what was not owed any more is left alone.
    ///
    /// # Errors
    /// See [`ServeError`]; [`ServeError::Stranger`] when it is of a process that the store does not know.
    pub fn arrive(&mut self, batch: &Batch<'_>) -> Result<(), ServeError> {
        let vpid = batch.vpid;
        for (run, bytes) in batch.pieces() {
            if ![Parts::NONE, Parts::ALL].contains(&run.parts) {
                return Err(ServeError::Partial(vpid));
            }
            let owed = self.store.still_owed(vpid, batch.generation, run.range);
            for part in owed.ok_or(ServeError::Stranger(vpid))? {
                let from = ((part.start().0 - run.range.start().0) * PAGE_SIZE) as usize;
                let here = bytes.get(from..from + (part.count() * PAGE_SIZE) as usize).unwrap_or_default();
                self.store.settle(vpid, part, (!run.is_zero()).then_some(here))?;
                let asked = self.asked.get(&vpid).map_or(0, |asked| overlap(asked, part));
                self.served.pulled += asked;
                self.served.pushed += part.count() - asked;
                let spaces = self.spaces.values_mut().filter(|space| space.vpid == vpid);
                spaces.for_each(|space| space.receive(part, run.is_zero()));
            }
        }
        let ids: Vec<SpaceId> = self.spaces.keys().copied().collect();
        for id in ids {
            self.serve_waiting(id)?;
        }
        Ok(())
    }

    fn serve_waiting(&mut self, id: SpaceId) -> Result<(), ServeError> {
        let waiting = self.spaces.get_mut(&id).map(|space| std::mem::take(&mut space.waiting));
        waiting.unwrap_or_default().into_iter().try_for_each(|page| self.serve(id, page))
    }

    /// What is served from.
    pub fn store(&self) -> &SealedStore {
        &self.store
    }

    /// What was done so far.
    pub fn served(&self) -> Served {
        self.served
    }

    /// Reads and obeys what has happened in a space, and says which spaces came into being.
    ///
    /// # Errors
    /// See [`ServeError`].
    pub fn handle(&mut self, id: SpaceId) -> Result<Vec<SpaceId>, ServeError> {
        let mut born: Vec<Space> = Vec::new();
        while let Some(space) = self.spaces.get_mut(&id) {
            let vpid = space.vpid;
            let events = space.memory.read().map_err(|source| ServeError::Kernel { vpid, source })?;
            let nothing_new = events.is_empty();
            for event in events {
                born.extend(space.obey(event));
            }
            // In the order of the kernel: faults were read before events that may concern their pages.
            self.serve_waiting(id)?;
            if nothing_new {
                break;
            }
        }
        let born = born.into_iter().map(|child| {
            let id = self.new_id();
            self.spaces.insert(id, child);
            id
        });
        Ok(born.collect())
    }

    /// Puts the page at `page`, which somebody waits for, in place.
    fn serve(&mut self, id: SpaceId, page: PageNo) -> Result<(), ServeError> {
        let Some(space) = self.spaces.get_mut(&id) else { return Ok(()) };
        let Some(alone) = PageRange::with_count(page, 1) else { return Ok(()) };
        let wanted = space.absent.next_in(alone);
        let around = PageRange::with_count(PageNo(page.0 - page.0 % AROUND_A_FAULT), AROUND_A_FAULT);
        let near = around.and_then(|around| {
            let rest = PageRange::new(page, around.end())?;
            space.absent.next_in(rest).filter(|run| run.now.start() == page)
        });
        // With its neighbours; if those lie in another mapping, alone.
        let tries = [near, wanted];
        for run in tries.into_iter().flatten() {
            match self.put(id, run)? {
                Filled::Bytes(bytes) => {
                    self.served.faults += 1;
                    self.served.on_demand += bytes / PAGE_SIZE;
                    return Ok(());
                }
                Filled::Stopped => {
                    self.spaces.entry(id).and_modify(|space| space.waiting.push(page));
                    return Ok(());
                }
                Filled::Present | Filled::Gone => return Ok(()),
                Filled::Unmapped => {}
            }
        }
        let Some(space) = self.spaces.get_mut(&id) else { return Ok(()) };
        if space.owed.next_in(alone).is_some() {
            self.wait_for_source(id, page, around.unwrap_or(alone));
            return Ok(());
        }
        let vpid = space.vpid;
        let zeroed = space.memory.zero(page.address(), PAGE_SIZE);
        match zeroed.map_err(|source| ServeError::Kernel { vpid, source })? {
            Filled::Stopped => space.waiting.push(page),
            Filled::Gone => drop(self.spaces.remove(&id)),
            Filled::Bytes(_) => self.served.faults += 1,
            // It has moved or gone while a thread waited: that one shall look again.
            Filled::Unmapped => {
                space
                    .memory
                    .wake(page.address(), PAGE_SIZE)
                    .map_err(|source| ServeError::Kernel { vpid, source })?;
            }
            Filled::Present => {}
        }
        Ok(())
    }

    /// Somebody waits for `page`, which the source owes: it is asked for, with what is owed `around` it.
    fn wait_for_source(&mut self, id: SpaceId, page: PageNo, around: PageRange) {
        let Some(space) = self.spaces.get_mut(&id) else { return };
        space.blocked.push(page);
        let vpid = space.vpid;
        let Some(generation) = self.store.generation(vpid) else { return };
        let asked = self.asked.entry(vpid).or_default();
        let mut rest = Some(around);
        while let Some(run) = rest.and_then(|rest| space.owed.next_in(rest)) {
            rest = PageRange::new(run.now.end(), around.end());
            let Some(then) = PageRange::with_count(run.then, run.now.count()) else { continue };
            for pages in RangeSet::from_iter([then]).subtract(asked).iter() {
                asked.insert(pages);
                let ask = Ask { vpid, generation, pages };
                // What is waited for goes before its neighbours.
                let first = run.now.start() <= page && page < run.now.end();
                let place = if first { 0 } else { self.asks.len() };
                self.asks.insert(place, ask);
            }
        }
    }

    /// Fills one more piece in the background.
    ///
    /// # Errors
    /// See [`ServeError`].
    pub fn fill(&mut self) -> Result<Progress, ServeError> {
        while let Some(&Planned { id, whole, .. }) = self.plan.last() {
            if let Some(run) = self.spaces.get(&id).and_then(|space| space.absent.next_in(whole)) {
                return self.fill_some(id, run);
            }
            self.plan.pop().into_iter().for_each(|done| self.release(&done));
        }
        // What has moved since, and what children miss.
        let left = self.spaces.iter().find_map(|(id, space)| Some((*id, space.absent.next()?)));
        match left {
            Some((id, run)) => self.fill_some(id, run),
            None if self.is_owed() => Ok(Progress::Owed),
            None => Ok(Progress::Complete),
        }
    }

    /// Nothing of a chunk is missing where it was. Unless it may be missing elsewhere, nobody needs it any more.
    fn release(&self, done: &Planned) {
        let Some(space) = self.spaces.get(&done.id).filter(|space| done.ours && !space.moved) else { return };
        if self.spaces.values().filter(|other| other.vpid == space.vpid).count() == 1 {
            self.store.release(&self.spare, space.vpid, done.whole.start());
        }
    }

    fn fill_some(&mut self, id: SpaceId, run: Missing) -> Result<Progress, ServeError> {
        let run = run.first(PIECE);
        for run in [run, run.first(1)] {
            match self.put(id, run)? {
                Filled::Bytes(bytes) => {
                    self.served.in_background += bytes / PAGE_SIZE;
                    return Ok(Progress::Some);
                }
                Filled::Stopped => return Ok(Progress::Stopped),
                Filled::Present | Filled::Gone => return Ok(Progress::Some),
                Filled::Unmapped => {}
            }
        }
        // No process can read what is mapped nowhere: a child does not have everything that its parent has.
        if let Some(space) = self.spaces.get_mut(&id) {
            space.absent.remove(run.first(1).now);
        }
        Ok(Progress::Some)
    }

    /// Puts as much of `run` in place as one copy can.
    fn put(&mut self, id: SpaceId, run: Missing) -> Result<Filled, ServeError> {
        let Some(space) = self.spaces.get_mut(&id) else { return Ok(Filled::Gone) };
        let vpid = space.vpid;
        let (offset, pages) = self.store.place(vpid, run.then)?;
        let run = run.first(pages);
        let len = run.now.count() * PAGE_SIZE;
        let filled = space.memory.copy(run.now.start().address(), &self.source, offset, len);
        let filled = filled.map_err(|source| ServeError::Kernel { vpid, source })?;
        match filled {
            Filled::Bytes(bytes) => space.absent.remove(run.first(bytes / PAGE_SIZE).now),
            Filled::Present => space.absent.remove(run.first(1).now),
            Filled::Gone => drop(self.spaces.remove(&id)),
            Filled::Stopped | Filled::Unmapped => {}
        }
        Ok(filled)
    }
}

/// How many pages of `range` are in `set`.
fn overlap(set: &RangeSet, range: PageRange) -> u64 {
    match set.overlaps(range) {
        true => set.intersect(&RangeSet::from_iter([range])).page_count(),
        false => 0,
    }
}

/// How the background fares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// A piece more is done.
    Some,
    /// Events have to be handled first.
    Stopped,
    /// What is missing is still to come from the source.
    Owed,
    /// Nothing is missing.
    Complete,
}
