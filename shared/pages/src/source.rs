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

use crate::codec::Codec;
use crate::gather::{Gathered, Sink, gather};
use crate::ledger::Ledger;
use crate::manifest::{FinalManifest, ManifestProcess};
use crate::none::NoTracking;
use crate::policy::TransferPolicy;
use crate::process::{self, Generation, ListError, Process, Vpid};
use crate::track::{self, DirtyTracker, Method, Refused, TrackError, Tracking, Untracked};
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
}

/// How to choose and pack.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SourceOptions {
    /// Which dirty pages a round sends.
    pub policy: TransferPolicy,
    /// How they are packed.
    pub codec: Codec,
}

/// How one process is tracked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProcessReport {
    /// Which.
    pub process: Process,
    /// How.
    pub tracking: Tracking,
}

impl ProcessReport {
    /// Why its memory is sent in the final round only, if it is.
    pub fn untracked(&self) -> Option<&Untracked> {
        match &self.tracking {
            Tracking::Untracked(reason) => Some(reason),
            Tracking::Tracked { .. } => None,
        }
    }

    /// Mappings of it that are sent in the final round only.
    pub fn refused(&self) -> &[Refused] {
        match &self.tracking {
            Tracking::Untracked(_) => &[],
            Tracking::Tracked { refused } => refused,
        }
    }
}

/// What tracking can do for this container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrackerReport {
    /// How writes are learnt of.
    pub method: Method,
    /// Why the kernel cannot track, when the method is none.
    pub kernel: Option<String>,
    /// Every process.
    pub processes: Vec<ProcessReport>,
    /// Time it took, injection included.
    pub elapsed: Duration,
}

/// What one round did. Pages are 4096 bytes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RoundReport {
    /// Its number, from 1.
    pub round: u32,
    /// Every process there was, and how it is tracked.
    pub processes: Vec<ProcessReport>,
    /// Pages found written or new. In the final round: pages that exist.
    pub dirty_pages: u64,
    /// Pages sent with data.
    pub data_pages: u64,
    /// Pages sent as zeros.
    pub zero_pages: u64,
    /// Dirty pages that wait for a later round: withheld by the policy, or not sent because the sink stopped.
    pub pending_pages: u64,
    /// Pages that could no longer be read.
    pub gone_pages: u64,
    /// Bytes handed to the sink.
    pub bytes: u64,
    /// Time to list processes, find and protect written pages.
    pub scan: Duration,
    /// Time to read and encode pages.
    pub read: Duration,
    /// Time that the sink took.
    pub sink: Duration,
    /// The sink ended the round.
    pub stopped: bool,
}

impl RoundReport {
    fn add(&mut self, gathered: &Gathered) {
        self.data_pages += gathered.data_pages;
        self.zero_pages += gathered.zero_pages;
        self.gone_pages += gathered.gone.page_count();
        self.bytes += gathered.bytes;
        self.read += gathered.reading;
        self.sink += gathered.sink;
        self.stopped |= gathered.stopped;
    }
}

/// Sends the memory of one container.
#[derive(Debug)]
pub struct SourceEngine {
    cgroup_procs: PathBuf,
    freezer: Freezer,
    tracker: Box<dyn DirtyTracker>,
    ledgers: BTreeMap<(Vpid, Generation), Ledger>,
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
        match WriteProtect::new() {
            Ok(tracker) => Self::begin_with(cgroup_procs, Box::new(tracker), None, options),
            Err(error) => {
                let detail = track::in_one_line(&error);
                Self::begin_with(
                    cgroup_procs,
                    Box::new(NoTracking::new(detail.clone())),
                    Some(detail),
                    options,
                )
            }
        }
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
        let processes = tracker.begin(&process::list(cgroup_procs)?);
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
        Ok((Self { cgroup_procs, freezer, tracker, ledgers: BTreeMap::new(), options, round: 0 }, report))
    }

    /// Finds what has been written since the last round and sends what the policy chooses of it. The first round sends
    /// everything. The container runs on.
    ///
    /// # Errors
    /// When processes cannot be listed or read. What was handed to the sink before counts as sent only if the process
    /// it belongs to was done; the next round sends the rest again.
    pub fn round(&mut self, sink: Sink<'_>) -> Result<RoundReport, SourceError> {
        self.round += 1;
        let mut report = RoundReport { round: self.round, ..RoundReport::default() };
        let started = Instant::now();
        let processes = process::list(&self.cgroup_procs)?;
        self.ledgers.retain(|key, _| processes.iter().any(|process| key_of(*process) == *key));
        let mut wanted = Vec::new();
        for collected in self.tracker.collect(&processes) {
            let ledger = self.ledgers.entry(key_of(collected.process)).or_default();
            ledger.observe(&collected, self.options.policy, Instant::now());
            report.dirty_pages += collected.dirty.page_count();
            report.processes.push(ProcessReport { process: collected.process, tracking: collected.tracking });
            wanted.push((collected.process, ledger.select(self.options.policy).send));
        }
        report.scan = started.elapsed();
        for (process, pages) in wanted {
            if report.stopped {
                break;
            }
            let gathered = gather(process, self.round, self.options.codec, &pages, sink);
            let gathered = gathered.map_err(|source| SourceError::Read { vpid: process.vpid, source })?;
            if let Some(ledger) = self.ledgers.get_mut(&key_of(process)) {
                ledger.settle(&gathered.sent, &gathered.gone, Instant::now());
            }
            report.add(&gathered);
        }
        report.pending_pages = self.ledgers.values().map(|ledger| ledger.pending().page_count()).sum();
        Ok(report)
    }

    /// Sends everything that the target does not have, of the frozen container, and says which pages exist.
    ///
    /// The container is not changed: it may be thawed and rounds may go on.
    ///
    /// # Errors
    /// When the container is not frozen, or anything cannot be known or read: a copy is whole or an error.
    pub fn final_round(&mut self, sink: Sink<'_>) -> Result<(FinalManifest, RoundReport), SourceError> {
        self.round += 1;
        let mut report = RoundReport { round: self.round, ..RoundReport::default() };
        let started = Instant::now();
        let processes = process::list(&self.cgroup_procs)?;
        // CRIU, which may dump meanwhile, thaws the cgroup once it holds every task by itself.
        if self.freezer.state()? != FreezerState::Frozen && !process::all_traced(&processes)? {
            return Err(SourceError::NotFrozen);
        }
        let scans = self.tracker.final_scan(&processes)?;
        let none = Ledger::default();
        let mut manifest = FinalManifest::default();
        let mut wanted = Vec::new();
        for scan in scans {
            let process = scan.process;
            let ledger = self.ledgers.get(&key_of(process)).unwrap_or(&none);
            wanted.push((process, ledger.owed(&scan.exists, &scan.unwritten)));
            report.dirty_pages += scan.exists.page_count();
            let entry = ManifestProcess { generation: process.generation, pages: scan.exists };
            manifest.processes.insert(process.vpid, entry);
        }
        report.scan = started.elapsed();
        for (process, pages) in wanted {
            let gathered = gather(process, self.round, self.options.codec, &pages, sink);
            let gathered = gathered.map_err(|source| SourceError::Read { vpid: process.vpid, source })?;
            report.add(&gathered);
            if gathered.stopped {
                return Err(SourceError::Stopped);
            }
            if !gathered.gone.is_empty() {
                let count = gathered.gone.page_count();
                return Err(SourceError::Unreadable { vpid: process.vpid, count });
            }
        }
        Ok((manifest, report))
    }
}

fn key_of(process: Process) -> (Vpid, Generation) {
    (process.vpid, process.generation)
}
