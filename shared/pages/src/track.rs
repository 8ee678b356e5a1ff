//! Which pages a process has written since we last looked: the seam between the source and the kernel.
//!
//! A tracker only claims what the kernel vouches for. Whether a page has been sent is the ledger's business
//! ([`crate::ledger`]); both together decide, when the container is frozen, what is still to be sent.

use std::error::Error;
use std::fmt;
use std::io;
use std::ops::Range;

use haulage_sys::pagemap::{Categories, Filter, Pagemap, tells_guards};
use haulage_sys::soft_dirty::ZeroFrames;
use haulage_sys::{CallError, Errno};

use crate::entries;
use crate::maps::{Maps, MapsError};
use crate::process::{Process, Vpid};
use crate::range::{PageRange, RangeSet};

/// How a tracker learns of writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// Injected userfaultfd in asynchronous write-protection mode.
    WriteProtect,
    /// Soft-dirty marks, read and taken away while the container stands still for a moment.
    SoftDirty,
    /// Not at all: everything is sent when the container is frozen.
    None,
}

/// Why a process is not tracked. Its memory is sent whole in the final round.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Untracked {
    /// The kernel lacks what tracking needs.
    KernelCannot {
        /// What it said.
        detail: String,
    },
    /// It has the memory of another process, as after `vfork`. Tried again in the next round.
    SharesMemory {
        /// The other process.
        with: Vpid,
    },
    /// No descriptor could be had of it: traced by someone else, unstoppable, 32-bit.
    Injection {
        /// Why.
        detail: String,
    },
    /// It has no memory: a zombie.
    NoMemory,
    /// Something failed that should not.
    Failed {
        /// What.
        detail: String,
    },
}

impl fmt::Display for Untracked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::KernelCannot { detail } => write!(f, "the kernel cannot track writes: {detail}"),
            Self::SharesMemory { with } => write!(f, "it has the memory of process {with}"),
            Self::Injection { detail } => write!(f, "{detail}"),
            Self::NoMemory => write!(f, "it has no memory"),
            Self::Failed { detail } => write!(f, "{detail}"),
        }
    }
}

/// A mapping that could not be registered. Its pages are sent in the final round.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// The mapping.
    pub range: PageRange,
    /// What the kernel said.
    pub reason: String,
}

/// Whether a process's writes are known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Tracking {
    /// They are, except in the mappings listed.
    Tracked {
        /// Mappings that could not be registered.
        refused: Vec<Refused>,
    },
    /// They are not.
    Untracked(Untracked),
}

/// Contents that are no longer known to be those that were read earlier, although no write was seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Forgotten {
    /// All of the process: its memory has been replaced, or is tracked anew.
    All,
    /// These pages: something else may be mapped there now.
    Pages(RangeSet),
}

/// What was found out about one process in a round.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Collected {
    /// The process.
    pub process: Process,
    /// Whether its writes are known.
    pub tracking: Tracking,
    /// All pages of its tracked mappings, whether they hold anything or not.
    pub mapped: RangeSet,
    /// Pages whose earlier copies count for nothing.
    pub forgotten: Forgotten,
    /// Pages written or newly found since the last round.
    pub dirty: RangeSet,
    /// Devices may write to its memory unseen, for a while after a page was found written.
    pub direct_io: bool,
}

/// What was found out about one process while it was frozen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FinalScan {
    /// The process.
    pub process: Process,
    /// Tracked pages that exist: in memory or swap, not of a file, not the kernel's page of zeros.
    pub exists: RangeSet,
    /// Those of them for which the kernel vouches that they have not been written since the last round.
    pub unwritten: RangeSet,
}

/// A tracker failed as a whole. What concerns one process is reported with that process instead.
#[derive(Debug, thiserror::Error)]
pub enum TrackError {
    /// The mappings of a frozen process could not be read.
    #[error("mappings of process {vpid} cannot be known")]
    Maps {
        /// The process.
        vpid: Vpid,
        /// What happened.
        #[source]
        source: MapsError,
    },
    /// The pages of a frozen process could not be listed.
    #[error("pages of process {vpid} cannot be listed")]
    Scan {
        /// The process.
        vpid: Vpid,
        /// What happened.
        #[source]
        source: CallError,
    },
    /// The shared memory of a frozen container could not be looked at.
    #[error("shared memory cannot be known")]
    Shared(#[source] io::Error),
}

/// What one process's page tables say about the shared memory that it has mapped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SharedWrites {
    /// This.
    Known(SharedScan),
    /// Nothing of its own: it has the memory of another process, which is asked too.
    Elsewhere,
    /// They cannot be followed.
    Unknown,
}

/// Pages of one process, by their places in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SharedScan {
    /// Pages of mappings that were registered before this call.
    pub registered: RangeSet,
    /// Pages that were written since the last [`SharedTracker::collect_shared`]; of use only where `registered`.
    pub written: RangeSet,
    /// As [`Collected::direct_io`].
    pub direct_io: bool,
}

/// A tracker that can also tell of shared memory, one process at a time. Which process is asked about which pages is
/// [`crate::shared`]'s business, and what follows from the answers.
pub trait SharedTracker {
    /// Looks at `pages` of a process that [`DirtyTracker::collect`] was told of, protects what it finds written, and
    /// registers the mappings that are not registered yet.
    fn collect_shared(&mut self, process: Process, pages: &RangeSet) -> SharedWrites;

    /// As [`Self::collect_shared`], and changes nothing.
    fn scan_shared(&mut self, process: Process, pages: &RangeSet) -> SharedWrites;
}

/// Finds out which pages were written.
///
/// Every implementation passes the one suite in `tests/conformance.rs`, against real processes.
pub trait DirtyTracker: Send + fmt::Debug {
    /// How it does.
    fn method(&self) -> Method;

    /// The same for shared memory, if it can. Without, shared memory is sent when the container is frozen.
    fn shared(&mut self) -> Option<&mut dyn SharedTracker>;

    /// Starts following `processes` and says of each whether that worked.
    fn begin(&mut self, processes: &[Process]) -> Vec<(Process, Tracking)>;

    /// What `processes`, which may differ from those of the last time, have written since the last call. In the first
    /// call after [`Self::begin`], and for new processes, every page that exists is dirty.
    ///
    /// Never misses a write: one that happens during the call is in this answer or in the next. A process that ended
    /// is left out of the answer.
    fn collect(&mut self, processes: &[Process]) -> Vec<Collected>;

    /// What a process, which need not be frozen, has written since the last [`Self::collect`], nearly. Changes nothing.
    ///
    /// # Errors
    /// As [`Self::final_scan`].
    fn written(&mut self, process: Process) -> Result<RangeSet, TrackError> {
        let scans = self.final_scan(&[process])?;
        Ok(scans.iter().fold(RangeSet::new(), |all, scan| all.union(&scan.exists.subtract(&scan.unwritten))))
    }

    /// The truth about `processes`, which must be frozen. Changes nothing: the processes may be thawed and tracking
    /// goes on.
    ///
    /// # Errors
    /// When anything about any process cannot be known, since what is not known would be lost.
    fn final_scan(&mut self, processes: &[Process]) -> Result<Vec<FinalScan>, TrackError>;
}

/// What makes a page of a private anonymous mapping exist: present or swapped, and neither the page of zeros nor a
/// guard, which looks like a swapped page and cannot be read. Guards are no pages: CRIU's images name them
/// (`haulage_criu::guard`).
///
/// Not asked: whether it is of a file. In such a mapping none is, and the kernel would have to look at every page's
/// own record to answer, which takes most of the time of a scan.
pub(crate) fn exists() -> Filter {
    let guard = if tells_guards() { Categories::GUARD } else { Categories::NONE };
    let any = Categories::PRESENT | Categories::SWAPPED;
    Filter { none: Categories::ZERO_PAGE | guard, any, ..Filter::ANYTHING }
}

/// Scans a frozen process: pages that exist, and those among them that the kernel vouches for as unwritten in any
/// registration.
pub(crate) fn scan_frozen(process: Process) -> Result<FinalScan, TrackError> {
    let vpid = process.vpid;
    let maps = Maps::of(process.pid).map_err(|source| TrackError::Maps { vpid, source })?;
    let mapped = maps.tracked_pages();
    let scanned = Pagemap::open(process.pid).and_then(|mut pagemap| existing(&mut pagemap, &mapped));
    let (exists, unwritten) = match scanned {
        // A zombie has neither mappings nor a pagemap.
        Err(error) if error.is_gone() && mapped.is_empty() => Default::default(),
        other => other.map_err(|source| TrackError::Scan { vpid, source })?,
    };
    Ok(FinalScan { process, exists, unwritten })
}

/// Pages of a process that exist and were written, or lie outside `ours`, where nobody tells that of them.
pub(crate) fn written_within(process: Process, ours: &RangeSet) -> Result<RangeSet, TrackError> {
    let vpid = process.vpid;
    let maps = Maps::of(process.pid).map_err(|source| TrackError::Maps { vpid, source })?;
    let mapped = maps.tracked_pages();
    let scan = |mut pagemap| {
        let untold = find(&mut pagemap, &mapped.subtract(ours), exists())?;
        let untold = untold.union(&unregistered(&mut pagemap, &mapped)?);
        Ok(untold.union(&find(&mut pagemap, &mapped, written())?))
    };
    Pagemap::open(process.pid).and_then(scan).map_err(|source| TrackError::Scan { vpid, source })
}

/// Pages of `within` that exist outside registered mappings.
pub(crate) fn unregistered(pagemap: &mut Pagemap, within: &RangeSet) -> Result<RangeSet, CallError> {
    let exists = exists();
    find(pagemap, within, Filter { none: exists.none | Categories::WP_ALLOWED, ..exists })
}

/// What makes an existing page of a registered mapping a written one.
///
/// Only pages that hold something are asked for: otherwise holes would be protected too, and a sparse mapping of 64 GiB
/// would cost 131 MB of page tables.
pub(crate) fn written() -> Filter {
    Filter { all: Categories::WP_ALLOWED | Categories::WRITTEN, ..exists() }
}

fn find(pagemap: &mut Pagemap, within: &RangeSet, filter: Filter) -> Result<RangeSet, CallError> {
    let mut found = RangeSet::new();
    for run in within.iter() {
        pagemap.scan(run.addresses(), filter, Categories::PRESENT, &mut |region| {
            PageRange::of_addresses(region.start..region.end)
                .into_iter()
                .for_each(|range| found.insert(range));
        })?;
    }
    Ok(found)
}

/// Pages of which more must be known than that they exist, are in memory and were not written.
const DOUBTFUL: Filter = Filter {
    any: Categories::WRITTEN.and(Categories::ZERO_PAGE),
    lacks: Categories::PRESENT.and(Categories::WP_ALLOWED),
    ..Filter::ANYTHING
};

/// The pages of `mapped` that exist, and those among them that the kernel vouches for as unwritten. All of `mapped` must
/// be mapped, and stay so.
///
/// Most pages exist and are unwritten, so the kernel is asked for the others: to list a page takes it four times as long
/// as to pass it by.
fn existing(pagemap: &mut Pagemap, mapped: &RangeSet) -> Result<(RangeSet, RangeSet), CallError> {
    let (mut found, mut unwritten) = (RangeSet::new(), RangeSet::new());
    let (exists, vouched) = (exists(), Categories::WP_ALLOWED | Categories::WRITTEN);
    for run in mapped.iter() {
        let Range { start: mut next, end } = run.addresses();
        let scanned =
            pagemap.scan(run.addresses(), DOUBTFUL, exists.any | exists.none | vouched, &mut |region| {
                let passed_by = PageRange::of_addresses(next..region.start);
                next = region.end;
                passed_by.into_iter().for_each(|range| found.insert(range));
                passed_by.into_iter().for_each(|range| unwritten.insert(range));
                let is = |categories| region.categories.overlaps(categories);
                let there = PageRange::of_addresses(region.start..region.end);
                let there = there.filter(|_| is(exists.any) && !is(exists.none));
                there.into_iter().for_each(|range| found.insert(range));
                let kept = there.filter(|_| is(Categories::WP_ALLOWED) && !is(Categories::WRITTEN));
                kept.into_iter().for_each(|range| unwritten.insert(range));
            });
        match scanned {
            Ok(()) => {
                let passed_by = PageRange::of_addresses(next..end);
                passed_by.into_iter().for_each(|range| found.insert(range));
                passed_by.into_iter().for_each(|range| unwritten.insert(range));
            }
            Err(CallError { errno: Errno::NOTTY | Errno::INVAL, .. }) => {
                // Before 6.7.
                let mut zeros = ZeroFrames::find().ok();
                let found = entries::read(pagemap, mapped, zeros.as_mut())?;
                return Ok((found.exists, RangeSet::new()));
            }
            Err(error) => return Err(error),
        }
    }
    Ok((found, unwritten))
}

/// An error and what caused it, in one line, for reasons that are data.
pub(crate) fn in_one_line(error: &dyn Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        line.push_str(": ");
        line.push_str(&error.to_string());
        cause = error.source();
    }
    line
}
