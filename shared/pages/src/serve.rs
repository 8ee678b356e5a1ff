//! A restored process gets its memory while it runs: what it touches at once, the rest in the background, what was
//! written last before the freeze first.
//!
//! ```text
//!   restoring process ── userfaultfd ──▶ adopt
//!   faults, forks, moves, removals   ──▶ handle ──▶ pages in place, new spaces
//!   nobody waits                     ──▶ fill   ──▶ a piece more
//!   nothing is missing               ──▶ drop: the process owns its memory like any other
//! ```
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
use haulage_sys::lazy::{Event, FileSource, Filled, MissingMemory};

use crate::absent::{Absent, Missing};
use crate::process::Vpid;
use crate::range::{PageNo, PageRange, RangeSet};
use crate::sealed::{SealedStore, Spare};
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
}

/// The address space of a process that is being filled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SpaceId(pub u64);

#[derive(Debug)]
struct Space {
    vpid: Vpid,
    memory: MissingMemory,
    absent: Absent,
    /// Pages that threads wait for and that could not be put in place yet.
    waiting: Vec<PageNo>,
    /// What is missing may be elsewhere than where it was dumped.
    moved: bool,
}

/// What is filled in the background, one after the other.
#[derive(Debug)]
struct Planned {
    id: SpaceId,
    whole: PageRange,
    /// All that is stored of it is ours to put in place.
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
}

/// Fills the memory of the processes of one container from a sealed store.
#[derive(Debug)]
pub struct PageServer {
    store: SealedStore,
    source: FileSource,
    spare: Spare,
    spaces: BTreeMap<SpaceId, Space>,
    /// What is filled next, last first.
    plan: Vec<Planned>,
    last_id: u64,
    served: Served,
}

impl PageServer {
    /// Serves from `store`.
    ///
    /// # Errors
    /// When its pages cannot be mapped, or not written to.
    pub fn new(store: SealedStore) -> Result<Self, StoreError> {
        let (source, spare) = (store.map()?, store.spare()?);
        let (spaces, plan) = (BTreeMap::new(), Vec::new());
        Ok(Self { store, source, spare, spaces, plan, last_id: 0, served: Served::default() })
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
        let mut absent = Absent::default();
        let id = self.new_id();
        let mut chunks = self.store.filled(vpid).ok_or(ServeError::Stranger(vpid))?;
        let mut data = RangeSet::new();
        for chunk in &chunks {
            chunk.data.iter().for_each(|run| data.insert(*run));
        }
        data.intersect(lazy).iter().for_each(|run| absent.insert(run));
        chunks.sort_by_key(|chunk| chunk.latest);
        self.plan.extend(chunks.into_iter().map(|chunk| {
            let ours = chunk.data.into_iter().collect::<RangeSet>().subtract(lazy).is_empty();
            Planned { id, whole: chunk.whole, ours }
        }));
        self.spaces.insert(id, Space { vpid, memory, absent, waiting: Vec::new(), moved: false });
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
        self.spaces.values().map(|space| space.absent.pages()).sum()
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
            let waiting = std::mem::take(&mut space.waiting);
            for page in waiting {
                self.serve(id, page)?;
            }
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
        let vpid = space.vpid;
        let zeroed = space.memory.zero(page.address(), PAGE_SIZE);
        match zeroed.map_err(|source| ServeError::Kernel { vpid, source })? {
            Filled::Stopped => space.waiting.push(page),
            Filled::Gone => drop(self.spaces.remove(&id)),
            Filled::Bytes(_) => self.served.faults += 1,
            Filled::Present | Filled::Unmapped => {}
        }
        Ok(())
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

/// How the background fares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// A piece more is done.
    Some,
    /// Events have to be handled first.
    Stopped,
    /// Nothing is missing.
    Complete,
}

impl Space {
    /// A child, if that is what happened.
    fn obey(&mut self, event: Event) -> Option<Space> {
        match event {
            Event::Fault { address } => self.waiting.push(PageNo::containing(address)),
            Event::Fork(memory) => {
                return Some(Self {
                    vpid: self.vpid,
                    memory,
                    absent: self.absent.clone(),
                    waiting: Vec::new(),
                    moved: self.moved,
                });
            }
            Event::Remap { from, to, len } => {
                self.moved = true;
                if let Some(range) = PageRange::of_addresses(from..from.saturating_add(len)) {
                    self.absent.relocate(range, PageNo::containing(to));
                }
            }
            Event::Remove { start, end } | Event::Unmap { start, end } => {
                if let Some(range) = PageRange::of_addresses(start..end) {
                    self.absent.remove(range);
                }
            }
        }
        None
    }
}
