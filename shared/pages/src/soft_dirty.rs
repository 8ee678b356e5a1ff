//! Tracking by soft-dirty marks, for kernels whose userfaultfd cannot write-protect by itself (before 6.7).
//!
//! ```text
//!  round:  all threads stopped ── new mappings? ── read marks ── take marks away ── all threads run on ──► send
//! ```
//! Reading marks and taking them away are two calls, and a write between them would leave no trace. So every thread of
//! the container stands still for both ([`standstill`]): by estimate some 20 ms per GiB of mapped memory, holes included,
//! and some tens of microseconds per thread. Pages are read after that; what is written meanwhile is marked again. Where not all threads
//! can be stopped in time (a parent in `vfork`), the round takes no mark away: what it tells is told again by the next.
//!
//! # What the kernel vouches for
//! Marks belong to page table entries, and one case in which the page behind an address changes leaves no mark: `mremap`
//! moves whole page tables as they are. So every mapping is also registered with an injected userfaultfd, as in
//! [`crate::write_protect`], which never protects anything: a mapping loses its registration when it is moved, replaced
//! or copied, and then all of it is dirty. "In a registered mapping and without a mark" means: this very page, of the
//! mapping that was registered, since the marks were taken away.
//!
//! Not marked either: a page that was discarded and then read, which is the kernel's page of zeros ([`ZeroFrames`]) and
//! so does not exist; and a page that `ksmd` merged with an equal one, so nothing is vouched for on a host where it runs.
//!
//! Marks are one set per process, for whoever uses them. A process that reads or takes away its own (some garbage
//! collectors do) is not tracked and keeps them; memory that another userfaultfd holds, as of a second tracker, stops
//! all taking away. Only another program that clears marks behind our back (`criu pre-dump`) would not be noticed.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use haulage_sys::pagemap::Pagemap;
use haulage_sys::soft_dirty::{self, NoSoftDirty, ZeroFrames};
use haulage_sys::uffd::WriteTracker;
use haulage_sys::{CallError, Pid, standstill};

use crate::direct_io;
use crate::entries::{self, Found};
use crate::maps::Maps;
use crate::process::{self, Process, Vpid};
use crate::program::Program;
use crate::range::{PageRange, RangeSet};
use crate::track::{
    Collected, DirtyTracker, FinalScan, Forgotten, Method, SharedTracker, TrackError, Tracking, Untracked,
};
use crate::write_protect::{Held, Hold, RoundError, WriteProtect, unknown};

/// How long the threads that have stopped may wait for the others. Running and sleeping threads stop within
/// microseconds.
const PATIENCE: Duration = Duration::from_millis(100);

/// Whether `ksmd` merges pages: `1` when it does.
const KSM: &str = "/sys/kernel/mm/ksm/run";

/// Why this tracker cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum SoftDirtyError {
    /// The kernel has no marks, or does not show them.
    #[error(transparent)]
    Marks(#[from] NoSoftDirty),
    /// The kernel has no userfaultfd with write protection.
    #[error(transparent)]
    Registration(#[from] CallError),
    /// Kernel samepage merging runs.
    #[error("ksmd merges pages here, and drops the marks of those it merges ({KSM})")]
    PagesAreMerged,
}

/// Follows processes by their soft-dirty marks. Dropping it removes every registration.
#[derive(Debug)]
pub struct SoftDirty {
    cgroup_procs: PathBuf,
    followers: WriteProtect,
    /// The program that each process ran when its descriptor was made; none when it changed in that moment. Memory that
    /// outlives `exec`, since another process shares it, would otherwise be taken for the process's.
    programs: BTreeMap<Vpid, Option<Program>>,
    zeros: ZeroFrames,
    /// Pages have been merged since we began.
    merged: bool,
}

impl SoftDirty {
    /// A tracker for the container whose `cgroup.procs` file is given, that follows nothing yet, if this kernel can
    /// track so.
    ///
    /// # Errors
    /// See [`SoftDirtyError`].
    pub fn new(cgroup_procs: &Path) -> Result<Self, SoftDirtyError> {
        let zeros = ZeroFrames::find()?;
        WriteTracker::registration_of_self()?;
        if ksm_runs() {
            return Err(SoftDirtyError::PagesAreMerged);
        }
        Ok(Self {
            cgroup_procs: cgroup_procs.to_owned(),
            followers: WriteProtect::registering(),
            programs: BTreeMap::new(),
            zeros,
            merged: false,
        })
    }

    fn follow(&mut self, processes: &[Process]) {
        self.followers.follow_only(processes);
        for process in processes {
            let before = Program::of(process.pid);
            if self.followers.follow(*process) {
                let after = Program::of(process.pid);
                self.programs.insert(process.vpid, before.filter(|before| after.as_ref() == Some(before)));
            }
        }
    }

    /// Whether the descriptor that we have acts on the memory that the process has.
    fn has_its_memory(&self, process: Process) -> bool {
        let then = self.programs.get(&process.vpid).and_then(Option::as_ref);
        then.is_some_and(|then| Program::of(process.pid).as_ref() == Some(then))
    }

    /// The round of one process. Its threads stand still if `still`.
    fn collect_one(&mut self, process: Process, still: bool) -> Option<Collected> {
        match self.round(process, still) {
            Ok(collected) => Some(collected),
            Err(error) if error.is_gone() => None,
            Err(error) => {
                let reason = Untracked::Failed { detail: crate::track::in_one_line(&error) };
                self.followers.give_up(process, reason.clone());
                Some(unknown(process, reason))
            }
        }
    }

    fn round(&mut self, process: Process, still: bool) -> Result<Collected, RoundError> {
        let has_its_memory = self.has_its_memory(process);
        let Some(followed) = self.followers.followed(process) else { return Err(RoundError::OtherMemory) };
        if uses_marks(process.pid) {
            let detail = "it reads or clears soft-dirty marks of its own".into();
            followed.hold = Hold::Not { reason: Untracked::KernelCannot { detail }, retry: false };
        }
        let held = match &mut followed.hold {
            Hold::Held(held) => held,
            Hold::Not { reason, .. } => return Ok(unknown(process, reason.clone())),
        };
        let maps = Maps::of(process.pid)?;
        let mapped = maps.tracked_pages();
        if !has_its_memory && !mapped.is_empty() {
            return Err(RoundError::OtherMemory);
        }
        let lost = without_registration(held, &maps)?;
        // A mapping is registered only while its marks can be taken away in the same moment.
        let new = if still { held.renew(&maps, &lost) } else { RangeSet::new() };
        let pagemap = Pagemap::open(process.pid)?;
        let Found { exists, marked } = entries::read(&pagemap, &mapped, Some(&mut self.zeros))?;
        // Where somebody else may follow these marks, they are left alone.
        if still && mapped.subtract(&held.ours).is_empty() {
            soft_dirty::clear(process.pid)?;
        }
        let ours = exists.intersect(&held.ours);
        let fresh = followed.fresh;
        let (forgotten, dirty) = match fresh || self.merged {
            true => (Forgotten::All, ours),
            false => {
                let dirty = ours.intersect(&marked.union(&new)).subtract(&lost.subtract(&new));
                (Forgotten::Pages(lost), dirty)
            }
        };
        followed.fresh = fresh && !still;
        followed.direct_io = followed.direct_io || direct_io::in_use(process.pid, &maps);
        Ok(Collected {
            process,
            tracking: Tracking::Tracked { refused: held.refused.clone() },
            mapped,
            forgotten,
            dirty,
            direct_io: followed.direct_io,
        })
    }
}

/// Tracked mappings that are not registered (any more), or not by us.
fn without_registration(held: &Held, maps: &Maps) -> Result<RangeSet, RoundError> {
    let mut lost = RangeSet::new();
    for range in maps.tracked() {
        if !RangeSet::from_iter([range]).subtract(&held.ours).is_empty() {
            lost.insert(range);
            continue;
        }
        match held.tracker.is_registered(range.start().address()) {
            Ok(true) => {}
            Ok(false) => lost.insert(range),
            Err(error) if error.is_gone() => return Err(RoundError::OtherMemory),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(lost)
}

impl Held {
    /// Registers the mappings of which something is `lost`, and says which are registered now.
    fn renew(&mut self, maps: &Maps, lost: &RangeSet) -> RangeSet {
        self.refused.clear();
        if lost.is_empty() {
            RangeSet::new()
        } else {
            self.register(maps, |range: PageRange| lost.overlaps(range))
        }
    }
}

fn ksm_runs() -> bool {
    fs::read_to_string(KSM).is_ok_and(|text| text.trim() == "1")
}

/// Whether the process has a file open by which it follows or clears its own marks.
fn uses_marks(pid: Pid) -> bool {
    let Ok(entries) = fs::read_dir(format!("/proc/{pid}/fd")) else { return false };
    entries.flatten().any(|entry| {
        let link = fs::read_link(entry.path()).unwrap_or_default();
        link.ends_with("clear_refs") || link.ends_with("pagemap")
    })
}

impl DirtyTracker for SoftDirty {
    fn method(&self) -> Method {
        Method::SoftDirty
    }

    fn shared(&mut self) -> Option<&mut dyn SharedTracker> {
        None
    }

    fn begin(&mut self, processes: &[Process]) -> Vec<(Process, Tracking)> {
        self.follow(processes);
        self.followers.tracking()
    }

    fn collect(&mut self, processes: &[Process]) -> Vec<Collected> {
        self.follow(processes);
        self.merged |= ksm_runs();
        let procs = self.cgroup_procs.clone();
        let list = move || {
            let processes = process::list(&procs).ok()?;
            Some(processes.into_iter().map(|process| process.pid).collect())
        };
        let mut collect = |still| -> Vec<_> {
            processes.iter().filter_map(|process| self.collect_one(*process, still)).collect()
        };
        match standstill::while_still(&list, PATIENCE, || collect(true)) {
            Ok(collected) => collected,
            // They run: nothing is taken away, so nothing is lost.
            Err(_) => collect(false),
        }
    }

    fn final_scan(&mut self, processes: &[Process]) -> Result<Vec<FinalScan>, TrackError> {
        self.merged |= ksm_runs();
        processes.iter().map(|process| self.scan(*process)).collect()
    }
}

impl SoftDirty {
    fn scan(&mut self, process: Process) -> Result<FinalScan, TrackError> {
        let vpid = process.vpid;
        let maps = Maps::of(process.pid).map_err(|source| TrackError::Maps { vpid, source })?;
        let mapped = maps.tracked_pages();
        let found = Pagemap::open(process.pid)
            .and_then(|pagemap| entries::read(&pagemap, &mapped, Some(&mut self.zeros)));
        let Found { exists, marked } = match found {
            // A zombie has neither mappings nor a pagemap.
            Err(error) if error.is_gone() && mapped.is_empty() => Found::default(),
            other => other.map_err(|source| TrackError::Scan { vpid, source })?,
        };
        let sure = !self.merged && self.has_its_memory(process);
        let unwritten = match self.followers.followed(process) {
            Some(followed) if sure && !followed.fresh => match &followed.hold {
                // A descriptor that acts on other memory vouches for nothing.
                Hold::Held(held) => match without_registration(held, &maps) {
                    Ok(lost) => exists.subtract(&marked).intersect(&held.ours).subtract(&lost),
                    Err(_) => RangeSet::new(),
                },
                Hold::Not { .. } => RangeSet::new(),
            },
            _ => RangeSet::new(),
        };
        Ok(FinalScan { process, exists, unwritten })
    }
}
