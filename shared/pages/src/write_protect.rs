//! Tracking by an injected userfaultfd in asynchronous write-protection mode and `PAGEMAP_SCAN`.
//!
//! Per process and round:
//! 1. Is the memory still the one that our descriptor acts on? After `exec` it is not: inject again, forget all.
//! 2. Find pages outside registered mappings: new mappings, and old ones moved or replaced. Register the mappings that
//!    hold them and forget what was known of their addresses.
//! 3. Scan for written pages and protect them again, in one step of the kernel's.
//!
//! # What the kernel vouches for
//! A mapping loses its registration when it is unmapped, moved by `mremap` or copied by `fork`, and a new mapping never
//! joins a registered neighbour. So "in a registered mapping and not written" means: this very page, of the mapping
//! that was registered, since it was protected. Every registration of ours forgets its addresses first.

mod shared;

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::time::Duration;

use haulage_sys::inject::{self, InjectError};
use haulage_sys::pagemap::{Categories, Pagemap};
use haulage_sys::uffd::WriteTracker;
use haulage_sys::{ADDRESS_END, CallError, pidfd};

use crate::direct_io;
use crate::maps::{Class, Maps, MapsError};
use crate::process::{Process, Vpid};
use crate::range::{PageRange, RangeSet};
use crate::track::{
    self, Collected, DirtyTracker, FinalScan, Forgotten, Method, Refused, SharedTracker, TrackError,
    Tracking, Untracked,
};

/// How long a process may take to stop for injection. Running and sleeping threads stop within microseconds.
const PATIENCE: Duration = Duration::from_millis(200);

/// Follows processes by write-protecting their memory. Dropping it removes all protection.
#[derive(Debug)]
pub struct WriteProtect {
    followed: BTreeMap<Vpid, Followed>,
    /// Makes an injected descriptor ready for use.
    negotiate: fn(OwnedFd) -> Result<WriteTracker, CallError>,
}

#[derive(Debug)]
pub(crate) struct Followed {
    process: Process,
    pub(crate) hold: Hold,
    /// Attached since the last [`DirtyTracker::collect`], so that nothing sent earlier counts.
    pub(crate) fresh: bool,
    /// Has been seen to use direct IO.
    pub(crate) direct_io: bool,
}

#[derive(Debug)]
pub(crate) enum Hold {
    Held(Held),
    Not { reason: Untracked, retry: bool },
}

/// One process's memory that we have a descriptor for.
#[derive(Debug)]
pub(crate) struct Held {
    pub(crate) tracker: WriteTracker,
    /// What was registered by us and not refused since; other registrations are not ours to judge by.
    pub(crate) ours: RangeSet,
    pub(crate) refused: Vec<Refused>,
    /// Shared mappings that can never be written through: of a descriptor that was opened for reading only.
    pub(crate) unwritable: RangeSet,
}

/// Why a process could not be scanned.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RoundError {
    #[error(transparent)]
    Maps(#[from] MapsError),
    #[error(transparent)]
    Call(#[from] CallError),
    /// The descriptor acts on other memory than the process now has.
    #[error("the process has other memory than its tracker")]
    OtherMemory,
}

impl RoundError {
    pub(crate) fn is_gone(&self) -> bool {
        match self {
            Self::Maps(error) => error.is_gone(),
            Self::Call(error) => error.is_gone(),
            Self::OtherMemory => false,
        }
    }
}

impl WriteProtect {
    /// A tracker that follows nothing yet, if this kernel can track.
    ///
    /// # Errors
    /// What the kernel refuses: userfaultfd, its features, or `PAGEMAP_SCAN`.
    pub fn new() -> Result<Self, CallError> {
        WriteTracker::of_self()?;
        let mut pagemap = Pagemap::open(rustix::process::getpid())?;
        pagemap.scan(0..ADDRESS_END, track::exists(), Categories::WP_ALLOWED, &mut |_| {})?;
        Ok(Self { followed: BTreeMap::new(), negotiate: WriteTracker::negotiate })
    }

    /// What follows processes for another tracker: registers their mappings and protects nothing.
    pub(crate) fn registering() -> Self {
        Self { followed: BTreeMap::new(), negotiate: WriteTracker::negotiate_registration }
    }

    /// The process, if it is followed.
    pub(crate) fn followed(&mut self, process: Process) -> Option<&mut Followed> {
        self.followed.get_mut(&process.vpid).filter(|followed| followed.process == process)
    }

    /// Forgets whom it is not to follow (any more).
    pub(crate) fn follow_only(&mut self, processes: &[Process]) {
        self.followed.retain(|_, followed| processes.contains(&followed.process));
    }

    /// Lets go of the process, to be followed anew in the next round.
    pub(crate) fn give_up(&mut self, process: Process, reason: Untracked) {
        let hold = Hold::Not { reason, retry: true };
        self.followed.insert(process.vpid, Followed { process, hold, fresh: true, direct_io: false });
    }

    fn attach(&mut self, process: Process) {
        let hold = self.hold(process);
        self.followed.insert(process.vpid, Followed { process, hold, fresh: true, direct_io: false });
    }

    fn hold(&self, process: Process) -> Hold {
        let not = |reason, retry| Hold::Not { reason, retry };
        match Maps::of(process.pid) {
            // A zombie, or one in the midst of an exec.
            Ok(maps) if maps.regions().is_empty() => return not(Untracked::NoMemory, true),
            Ok(_) => {}
            Err(error) => return not(Untracked::Failed { detail: track::in_one_line(&error) }, true),
        }
        if let Some(with) = self.shares_memory(process) {
            return not(Untracked::SharesMemory { with }, true);
        }
        let fd = match inject::userfaultfd_of(process.pid, PATIENCE) {
            Ok(fd) => fd,
            Err(error) => {
                // Who is stopped for nothing once is not stopped in each round.
                let retry = !matches!(error, InjectError::Not64Bit | InjectError::Refused(_));
                return not(Untracked::Injection { detail: track::in_one_line(&error) }, retry);
            }
        };
        match (self.negotiate)(fd) {
            Ok(tracker) => {
                let mut held =
                    Held { tracker, ours: RangeSet::new(), refused: Vec::new(), unwritable: RangeSet::new() };
                // The injection took its time: the process may have other mappings by now.
                match Maps::of(process.pid) {
                    Ok(maps) => held.register(&maps, |_| true),
                    Err(error) => return not(Untracked::Failed { detail: track::in_one_line(&error) }, true),
                };
                Hold::Held(held)
            }
            Err(error) => not(Untracked::KernelCannot { detail: track::in_one_line(&error) }, false),
        }
    }

    /// The process, held already, whose memory this one uses.
    fn shares_memory(&self, process: Process) -> Option<Vpid> {
        let held = self.followed.values().filter(|followed| matches!(followed.hold, Hold::Held(_)));
        let mut others = held.map(|followed| followed.process).filter(|other| other.pid != process.pid);
        // On a kernel without kcmp the registration itself fails, and says so.
        others
            .find(|other| pidfd::share_memory(process.pid, other.pid).unwrap_or(false))
            .map(|other| other.vpid)
    }

    /// Makes sure that `process` is followed with the memory that it has now. Says whether it was not.
    pub(crate) fn follow(&mut self, process: Process) -> bool {
        let again = match self.followed.get(&process.vpid) {
            Some(followed) if followed.process == process => match &followed.hold {
                Hold::Held(held) => !held.tracker.is_alive().unwrap_or(false),
                Hold::Not { retry, .. } => *retry,
            },
            _ => true,
        };
        if again {
            self.attach(process);
        }
        again
    }

    /// How each is tracked.
    pub(crate) fn tracking(&self) -> Vec<(Process, Tracking)> {
        let tracking = |followed: &Followed| match &followed.hold {
            Hold::Held(held) => Tracking::Tracked { refused: held.refused.clone() },
            Hold::Not { reason, .. } => Tracking::Untracked(reason.clone()),
        };
        self.followed.values().map(|followed| (followed.process, tracking(followed))).collect()
    }

    fn collect_one(&mut self, process: Process) -> Option<Collected> {
        self.follow(process);
        let mut round = self.round(process);
        if matches!(round, Err(RoundError::OtherMemory)) {
            self.attach(process);
            round = self.round(process);
        }
        match round {
            Ok(collected) => Some(collected),
            Err(error) if error.is_gone() => None,
            Err(error) => {
                let reason = Untracked::Failed { detail: track::in_one_line(&error) };
                self.give_up(process, reason.clone());
                Some(unknown(process, reason))
            }
        }
    }

    fn round(&mut self, process: Process) -> Result<Collected, RoundError> {
        let Some(followed) = self.followed.get_mut(&process.vpid) else {
            return Err(RoundError::OtherMemory);
        };
        let held = match &mut followed.hold {
            Hold::Held(held) => held,
            Hold::Not { reason, .. } => return Ok(unknown(process, reason.clone())),
        };
        let maps = Maps::of(process.pid)?;
        let mapped = maps.tracked_pages();
        let mut pagemap = Pagemap::open(process.pid)?;
        let (new, forgotten) = held.register_new(&mut pagemap, &maps, &mapped)?;
        let written = protect_written(&mut pagemap, &mapped)?;
        let forgotten = if followed.fresh { Forgotten::All } else { Forgotten::Pages(forgotten) };
        followed.fresh = false;
        // After the scan: what is opened later pins its pages, and so marks them, later.
        followed.direct_io = followed.direct_io || direct_io::in_use(process.pid, &maps);
        Ok(Collected {
            process,
            tracking: Tracking::Tracked { refused: held.refused.clone() },
            dirty: written.union(&new),
            mapped,
            forgotten,
            direct_io: followed.direct_io,
        })
    }
}

impl Held {
    /// Registers the mappings that are `wanted` and says which were.
    ///
    /// The process goes on meanwhile. Were a mapping registered by the bounds that it had when they were read, the kernel
    /// could cut in two one that has taken its place since, and `mremap` of the process on it would fail. So all that
    /// lies between two mappings that are not ours is registered at once: no mapping of ours reaches across these.
    pub(crate) fn register(&mut self, maps: &Maps, wanted: impl Fn(PageRange) -> bool) -> RangeSet {
        let mut registered = RangeSet::new();
        for (span, mappings) in maps.spans_of(Class::Tracked) {
            let mut mappings = mappings.into_iter().filter(|range| wanted(*range)).peekable();
            if mappings.peek().is_none() {
                continue;
            }
            if self.register_range(span).is_ok() {
                mappings.for_each(|range| registered.insert(range));
                continue;
            }
            // Something in there cannot be registered; one by one it is found.
            for range in mappings {
                match self.register_range(range) {
                    Ok(()) => registered.insert(range),
                    Err(error) => self.refused.push(Refused { range, reason: track::in_one_line(&error) }),
                }
            }
        }
        let refused: RangeSet = self.refused.iter().map(|refused| refused.range).collect();
        self.ours = self.ours.subtract(&refused).union(&registered);
        registered
    }

    fn register_range(&self, range: PageRange) -> Result<(), CallError> {
        let addresses = range.addresses();
        self.tracker.register(addresses.start, addresses.end - addresses.start)
    }

    /// Finds pages outside registered mappings and registers the mappings that hold them. Returns the pages that are
    /// registered now, and all addresses that were (tried to be) registered.
    fn register_new(
        &mut self,
        pagemap: &mut Pagemap,
        maps: &Maps,
        mapped: &RangeSet,
    ) -> Result<(RangeSet, RangeSet), RoundError> {
        let outside = track::unregistered(pagemap, mapped)?;
        if outside.is_empty() {
            self.refused.clear();
            return Ok((RangeSet::new(), RangeSet::new()));
        }
        let touched: Vec<_> = maps.tracked().filter(|range| outside.overlaps(*range)).collect();
        self.refused.clear();
        let registered = self.register(maps, |range| outside.overlaps(range));
        let found = outside.intersect(&registered);
        if !found.is_empty() && found == track::unregistered(pagemap, &found)? {
            return Err(RoundError::OtherMemory);
        }
        Ok((found, touched.into_iter().collect()))
    }
}

/// Pages of `within` that were written, protected again.
fn protect_written(pagemap: &mut Pagemap, within: &RangeSet) -> Result<RangeSet, CallError> {
    let mut found = RangeSet::new();
    for run in within.iter() {
        pagemap.scan_and_protect(run.addresses(), track::written(), Categories::WRITTEN, &mut |region| {
            PageRange::of_addresses(region.start..region.end)
                .into_iter()
                .for_each(|range| found.insert(range));
        })?;
    }
    Ok(found)
}

pub(crate) fn unknown(process: Process, reason: Untracked) -> Collected {
    Collected {
        process,
        tracking: Tracking::Untracked(reason),
        mapped: RangeSet::new(),
        forgotten: Forgotten::All,
        dirty: RangeSet::new(),
        direct_io: false,
    }
}

impl DirtyTracker for WriteProtect {
    fn method(&self) -> Method {
        Method::WriteProtect
    }

    fn shared(&mut self) -> Option<&mut dyn SharedTracker> {
        Some(self)
    }

    fn begin(&mut self, processes: &[Process]) -> Vec<(Process, Tracking)> {
        for process in processes {
            self.follow(*process);
        }
        self.tracking()
    }

    fn collect(&mut self, processes: &[Process]) -> Vec<Collected> {
        self.follow_only(processes);
        processes.iter().filter_map(|process| self.collect_one(*process)).collect()
    }

    /// Asks the kernel for written pages only, which takes it a fraction of the time that a list of all takes.
    fn written(&mut self, process: Process) -> Result<RangeSet, TrackError> {
        let held = self.followed.get(&process.vpid).filter(|followed| followed.process == process);
        let ours = match held.map(|followed| &followed.hold) {
            Some(Hold::Held(held)) if held.tracker.is_alive().unwrap_or(false) => &held.ours,
            _ => &RangeSet::new(),
        };
        track::written_within(process, ours)
    }

    fn final_scan(&mut self, processes: &[Process]) -> Result<Vec<FinalScan>, TrackError> {
        let scan = |process: &Process| {
            let mut scan = track::scan_frozen(*process)?;
            let held = self.followed.get(&process.vpid).filter(|followed| followed.process == *process);
            scan.unwritten = match held.map(|followed| &followed.hold) {
                Some(Hold::Held(held)) if held.tracker.is_alive().unwrap_or(false) => {
                    scan.unwritten.intersect(&held.ours)
                }
                _ => RangeSet::new(),
            };
            Ok(scan)
        };
        processes.iter().map(scan).collect()
    }
}
