//! The source's end: which pages of a container to send, round by round, and the truth at the freeze.
//!
//! ```text
//!  begin ──► round ──► round ──► … ──► (freeze) ──► final_round ──► manifest
//!             └─ collect, select, read, hand to the sink
//! ```
//! Everything here blocks; it belongs on a thread of its own. Dropping the engine removes all tracking, at any time and
//! without a trace in the container.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use haulage_sys::CallError;
use haulage_sys::freezer::{Freezer, FreezerError, FreezerState};

use crate::adaptive::{self, Timeline};
use crate::gather::{Gathered, Sink, gather};
use crate::history::Census;
use crate::ledger::Ledger;
use crate::manifest::{FinalManifest, ManifestProcess};
use crate::none::NoTracking;
use crate::owed::{self, Frozen, Owed};
use crate::policy::{Pace, Quota, TransferPolicy};
use crate::process::{self, Generation, ListError, Process, Vpid};
use crate::range::RangeSet;
pub use crate::report::{ProcessReport, RoundReport, TrackerReport};
use crate::shared::SharedMemory;
use crate::soft_dirty::SoftDirty;
use crate::track::{self, Collected, DirtyTracker, Method, TrackError};
use crate::write_protect::WriteProtect;

/// A round could not be made.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The processes cannot be known.
    #[error("processes of the container cannot be listed")]
    List(#[from] ListError),
    /// The group cannot be asked whether it is frozen.
    #[error("freezer of the container cannot be used")]
    Freezer(#[from] FreezerError),
    /// The final round was asked for while tasks run.
    #[error("container is not frozen")]
    NotFrozen,
    /// The final scan failed.
    #[error("final scan failed")]
    Track(#[from] TrackError),
    /// Memory could not be read.
    #[error("memory of process {vpid} cannot be read")]
    Read {
        /// Whose.
        vpid: Vpid,
        /// What happened.
        #[source]
        source: CallError,
    },
    /// A page that exists in a frozen process could not be read, so that the copy would not be whole.
    #[error("{count} existing pages of process {vpid} cannot be read")]
    Unreadable {
        /// Whose.
        vpid: Vpid,
        /// How many.
        count: u64,
    },
    /// The sink ended the final round.
    #[error("final round was stopped")]
    Stopped,
    /// Which mappings are locked cannot be known.
    #[error("mappings of process {vpid} cannot be known")]
    Mappings {
        /// Whose.
        vpid: Vpid,
        /// What happened.
        #[source]
        source: std::io::Error,
    },
}

/// How to choose.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SourceOptions {
    /// Which dirty pages a round sends.
    pub policy: TransferPolicy,
}

/// Sends the memory of one container.
#[derive(Debug)]
pub struct SourceEngine {
    cgroup_procs: PathBuf,
    freezer: Freezer,
    tracker: Box<dyn DirtyTracker>,
    ledgers: BTreeMap<(Vpid, Generation), Ledger>,
    shared: SharedMemory,
    timeline: Timeline,
    options: SourceOptions,
    round: u32,
}

impl SourceEngine {
    /// Starts tracking every process of the container whose `cgroup.procs` file is given. That file is in the
    /// directory of a freezer: the version 1 freezer hierarchy, or version 2.
    ///
    /// A process that cannot be tracked is no error: it is reported, and sent whole in the final round.
    ///
    /// # Errors
    /// When the processes cannot be listed or the directory is no freezer's. Nothing is tracked then.
    pub fn begin(cgroup_procs: &Path, options: SourceOptions) -> Result<(Self, TrackerReport), SourceError> {
        let (tracker, kernel) = best_tracker(cgroup_procs);
        Self::begin_with(cgroup_procs, tracker, kernel, options)
    }

    /// As [`Self::begin`], with a given tracker; `kernel` says why it is not a better one.
    ///
    /// # Errors
    /// As [`Self::begin`].
    pub fn begin_with(
        cgroup_procs: &Path,
        mut tracker: Box<dyn DirtyTracker>,
        kernel: Option<String>,
        options: SourceOptions,
    ) -> Result<(Self, TrackerReport), SourceError> {
        let started = Instant::now();
        let freezer = Freezer::open(cgroup_procs.parent().unwrap_or(Path::new("/")))?;
        let listed = process::list(cgroup_procs)?;
        let shared = SharedMemory::begin(&listed);
        let processes = tracker.begin(&listed);
        let report = TrackerReport {
            method: tracker.method(),
            kernel,
            processes: processes
                .into_iter()
                .map(|(process, tracking)| ProcessReport { process, tracking })
                .collect(),
            elapsed: started.elapsed(),
        };
        let cgroup_procs = cgroup_procs.to_owned();
        let (ledgers, timeline) = (BTreeMap::new(), Timeline::default());
        Ok((Self { cgroup_procs, freezer, tracker, ledgers, shared, timeline, options, round: 0 }, report))
    }

    /// Watches how the container writes, where the policy can make use of it, for as long as
    /// [`adaptive::is_worth_a_look`] says: the first round then leaves out what would soon go again. To be called
    /// before the first round.
    ///
    /// # Errors
    /// As [`Self::look`].
    pub fn watch(&mut self) -> Result<(), SourceError> {
        let most = self.options.policy.most_looks();
        if most == 0 || self.tracker.method() == Method::None {
            return Ok(());
        }
        let mut seen = Vec::new();
        self.look()?;
        while adaptive::is_worth_a_look(&seen, most) {
            std::thread::sleep(adaptive::LOOK);
            self.look()?;
            let (mut pages, mut none) = (Census::default(), Census::default());
            self.ledgers.values().for_each(|ledger| ledger.tally(&mut pages, &mut none));
            seen.push(pages.iter().filter(|(pattern, _)| *pattern != 0).map(|(_, pages)| pages).sum());
        }
        Ok(())
    }

    /// Finds what has been written since the last time, and sends nothing: a look at how a container writes, which
    /// costs it the faults of a round. The engine's policy must be one that needs the history.
    ///
    /// # Errors
    /// When processes cannot be listed.
    pub fn look(&mut self) -> Result<(), SourceError> {
        self.shared.look();
        let processes = process::list(&self.cgroup_procs)?;
        self.timeline.scanned(Instant::now());
        for collected in self.collect(&processes, false) {
            let ledger = self.ledgers.entry(key_of(collected.process)).or_default();
            ledger.observe(&collected, self.options.policy, Instant::now());
        }
        Ok(())
    }

    /// What looks have shown: so many pages are written so often, a second.
    pub fn seen(&self) -> Vec<(f64, u64)> {
        let (mut pages, mut none) = (Census::default(), Census::default());
        self.ledgers.values().for_each(|ledger| ledger.tally(&mut pages, &mut none));
        let some = pages.iter().filter(|(_, pages)| *pages > 0);
        some.map(|(pattern, pages)| {
            // What was never seen written is taken to be at rest, however short the look.
            let writes = if pattern == 0 { 0.0 } else { self.timeline.writes_per_second(pattern) };
            (writes, pages)
        })
        .collect()
    }

    /// Finds what has been written since the last round and sends what the policy chooses of it, given `pace`. The
    /// container runs on.
    ///
    /// # Errors
    /// When processes cannot be listed or read. What was handed to the sink before counts as sent only if the process
    /// it belongs to was done; the next round sends the rest again.
    pub fn round(&mut self, pace: Pace, sink: Sink<'_>) -> Result<RoundReport, SourceError> {
        self.round += 1;
        let mut report = RoundReport { round: self.round, ..RoundReport::default() };
        let started = Instant::now();
        self.shared.look();
        let processes = process::list(&self.cgroup_procs)?;
        let mut followed = Vec::new();
        self.timeline.scanned(started);
        let all = self.collect(&processes, pace.last);
        self.ledgers.retain(|key, _| {
            let mut there = processes.iter().chain(all.iter().map(|collected| &collected.process));
            there.any(|process| key_of(*process) == *key)
        });
        for collected in all {
            let ledger = self.ledgers.entry(key_of(collected.process)).or_default();
            ledger.observe(&collected, self.options.policy, Instant::now());
            report.dirty_pages += collected.dirty.page_count();
            followed.push(collected.process);
            if !collected.process.vpid.is_object() {
                let tracking = collected.tracking;
                report.processes.push(ProcessReport { process: collected.process, tracking });
            }
        }
        if self.round == 1 {
            // What looks have found is dirty, too.
            report.dirty_pages = self.ledgers.values().map(|ledger| ledger.pending().page_count()).sum();
        }
        let (mut quota, limit) = self.quota(pace);
        report.scan = started.elapsed();
        for process in followed {
            let Some(ledger) = self.ledgers.get_mut(&key_of(process)) else { continue };
            let wanted = ledger.select(self.options.policy, &mut quota).send;
            for piece in pieces(wanted, limit.is_some()) {
                if report.stopped || limit.is_some_and(|limit| started.elapsed() >= limit) {
                    break;
                }
                let gathered = send(&mut self.shared, process, self.round, &piece, sink);
                let gathered = gathered.map_err(|source| SourceError::Read { vpid: process.vpid, source })?;
                ledger.settle(&gathered.sent, &gathered.gone, Instant::now());
                report.add(&gathered);
            }
        }
        report.pending_pages = self.ledgers.values().map(|ledger| ledger.pending().page_count()).sum();
        self.shared.look();
        report.left_pages = self.left(&processes);
        Ok(report)
    }

    /// What has been written since the last time, by processes and then to shared memory.
    fn collect(&mut self, processes: &[Process], is_last: bool) -> Vec<Collected> {
        let mut all = self.tracker.collect(processes);
        all.extend(self.shared.collect(processes, self.tracker.as_mut(), is_last));
        all
    }

    /// What this round sends under the adaptive policy, and how long it may take under any.
    fn quota(&self, pace: Pace) -> (Quota, Option<Duration>) {
        let (mut pending, mut known) = (Census::default(), Census::default());
        if self.options.policy != TransferPolicy::Adaptive {
            return (Quota { pages: pending, last: pace.last }, pace.within);
        }
        self.ledgers.values().for_each(|ledger| ledger.tally(&mut pending, &mut known));
        let limit = [adaptive::time_limit(pace, pending.total()), pace.within].into_iter().flatten().min();
        (adaptive::quota(&self.timeline, &pending, &known, pace), limit)
    }

    /// What the final round would send now, nearly: the processes run.
    fn left(&mut self, processes: &[Process]) -> Option<u64> {
        if self.tracker.method() == Method::None {
            return None;
        }
        let none = Ledger::default();
        let ledger = |process| self.ledgers.get(&key_of(process)).unwrap_or(&none);
        // Each on its own: one that ends meanwhile leaves nothing.
        let mut left = 0;
        for process in processes {
            left += self.tracker.written(*process).map_or(0, |written| ledger(*process).left(&written));
        }
        for scan in self.shared.left(processes, self.tracker.as_mut())? {
            left += ledger(scan.process).owed(&scan.exists, &scan.unwritten).page_count();
        }
        Some(left)
    }

    /// Sends everything that the target does not have, of the frozen container, and says which pages exist.
    ///
    /// The container is not changed: it may be thawed and rounds may go on.
    ///
    /// # Errors
    /// When the container is not frozen, or anything cannot be known or read: a copy is whole or an error.
    pub fn final_round(&mut self, sink: Sink<'_>) -> Result<(FinalManifest, RoundReport), SourceError> {
        let LastLook { manifest, wanted, mut report } = self.last_look()?;
        for Wanted { process, pages, .. } in wanted {
            self.deliver(process, &pages, sink, &mut report)?;
        }
        Ok((manifest, report))
    }

    /// As [`Self::final_round`], but what the target can do without for a while is not sent: it is owed, and is read
    /// for as long as the container stands still.
    ///
    /// # Errors
    /// As there.
    pub fn final_round_owing(
        &mut self,
        sink: Sink<'_>,
    ) -> Result<(FinalManifest, Owed, RoundReport), SourceError> {
        let LastLook { manifest, wanted, mut report } = self.last_look()?;
        let mut owed = Owed::new(self.round);
        let none = Ledger::default();
        for Wanted { process, pages, unwritten } in wanted {
            // The pages of shared memory are numbers within it, not addresses, and it must be there when it is mapped.
            let later = match process.vpid.is_object() {
                true => Ok(RangeSet::new()),
                false => owed::can_come_later(process),
            };
            let later = later.map_err(|source| SourceError::Mappings { vpid: process.vpid, source })?;
            self.deliver(process, &pages.subtract(&later), sink, &mut report)?;
            let ledger = self.ledgers.get(&key_of(process)).unwrap_or(&none);
            let later = pages.intersect(&later);
            owed.owe(process, &ledger.runs(&later.subtract(&unwritten)), true);
            owed.owe(process, &ledger.runs(&later.intersect(&unwritten)), false);
        }
        owed.sort();
        Ok((manifest, owed, report))
    }

    /// What is needed to read what is owed.
    pub fn frozen(&self) -> Frozen {
        Frozen::new(self.freezer.clone(), &self.cgroup_procs)
    }

    /// The frozen container's truth, and what the target does not have of it.
    fn last_look(&mut self) -> Result<LastLook, SourceError> {
        self.round += 1;
        let mut report = RoundReport { round: self.round, ..RoundReport::default() };
        let started = Instant::now();
        self.shared.look();
        let processes = process::list(&self.cgroup_procs)?;
        // CRIU, which may dump meanwhile, thaws the cgroup once it holds every task by itself.
        if self.freezer.state()? != FreezerState::Frozen && !process::all_traced(&processes)? {
            return Err(SourceError::NotFrozen);
        }
        let mut scans = self.tracker.final_scan(&processes)?;
        scans.extend(self.shared.scan(&processes, self.tracker.as_mut())?);
        let none = Ledger::default();
        let mut manifest = FinalManifest::default();
        let mut wanted = Vec::new();
        for scan in scans {
            let process = scan.process;
            let ledger = self.ledgers.get(&key_of(process)).unwrap_or(&none);
            let pages = ledger.owed(&scan.exists, &scan.unwritten);
            wanted.push(Wanted { process, pages, unwritten: scan.unwritten });
            report.dirty_pages += scan.exists.page_count();
            let label = self.shared.label(process.vpid);
            let entry = ManifestProcess { generation: process.generation, label, pages: scan.exists };
            manifest.processes.insert(process.vpid, entry);
        }
        report.scan = started.elapsed();
        Ok(LastLook { manifest, wanted, report })
    }

    fn deliver(
        &mut self,
        process: Process,
        pages: &RangeSet,
        sink: Sink<'_>,
        report: &mut RoundReport,
    ) -> Result<(), SourceError> {
        // No account is kept of it: a container that is thawed goes on as if it had not been.
        let (object, _) = self.shared.read(process.vpid);
        let gathered = gather(process, object, self.round, pages, sink);
        let gathered = gathered.map_err(|source| SourceError::Read { vpid: process.vpid, source })?;
        report.add(&gathered);
        if gathered.stopped {
            return Err(SourceError::Stopped);
        }
        if !gathered.gone.is_empty() {
            let count = gathered.gone.page_count();
            return Err(SourceError::Unreadable { vpid: process.vpid, count });
        }
        Ok(())
    }
}

/// Reads pages of a process, or of an object, and hands them to the sink.
fn send(
    shared: &mut SharedMemory,
    process: Process,
    round: u32,
    pages: &RangeSet,
    sink: Sink<'_>,
) -> Result<Gathered, CallError> {
    let (object, mut contents) = shared.read(process.vpid);
    gather(process, object, round, pages, &mut |batch| {
        if let Some(contents) = &mut contents {
            contents.sent(&batch);
        }
        sink(batch)
    })
}

/// A frozen container, with nothing sent of it yet.
struct LastLook {
    manifest: FinalManifest,
    wanted: Vec<Wanted>,
    report: RoundReport,
}

/// What the target lacks of a frozen process.
struct Wanted {
    process: Process,
    pages: RangeSet,
    /// Pages that were not written since the round before.
    unwritten: RangeSet,
}

/// How writes of the container would be tracked, and why not better. Nothing is tracked by this.
pub fn best_method(cgroup_procs: &Path) -> (Method, Option<String>) {
    let (tracker, kernel) = best_tracker(cgroup_procs);
    (tracker.method(), kernel)
}

/// The best tracker that this kernel can have, and why it is not a better one.
fn best_tracker(cgroup_procs: &Path) -> (Box<dyn DirtyTracker>, Option<String>) {
    let no_protection = match WriteProtect::new() {
        Ok(tracker) => return (Box::new(tracker), None),
        Err(error) => track::in_one_line(&error),
    };
    match SoftDirty::new(cgroup_procs) {
        Ok(tracker) => (Box::new(tracker), Some(no_protection)),
        Err(error) => {
            let detail = format!("{no_protection}; {}", track::in_one_line(&error));
            (Box::new(NoTracking::new(detail.clone())), Some(detail))
        }
    }
}

/// Pages read between two looks at the time.
const PIECE: u64 = 512;

/// `wanted` in pieces, when a round is to end in time.
fn pieces(wanted: RangeSet, in_time: bool) -> Vec<RangeSet> {
    if !in_time {
        return vec![wanted];
    }
    let (mut pieces, mut piece, mut room) = (Vec::new(), RangeSet::new(), PIECE);
    for run in wanted.iter() {
        let mut rest = Some(run);
        while let Some(run) = rest {
            let (part, after) = run.split_at(room);
            room -= part.count();
            piece.insert(part);
            if room == 0 {
                pieces.push(std::mem::take(&mut piece));
                room = PIECE;
            }
            rest = after;
        }
    }
    pieces.push(piece);
    pieces
}

fn key_of(process: Process) -> (Vpid, Generation) {
    (process.vpid, process.generation)
}
