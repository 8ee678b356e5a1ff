//! What tracking can do for a container, and what rounds have done.

use std::time::Duration;

use crate::gather::Gathered;
use crate::process::Process;
use crate::track::{Method, Refused, Tracking, Untracked};

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
    /// What the kernel cannot do, when the method is not the best.
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
    /// Pages that would have to be sent if the container were frozen right after this round: those that wait and
    /// those written meanwhile. `None` when that could not be found out, and in the final round.
    pub left_pages: Option<u64>,
    /// Pages that could no longer be read.
    pub gone_pages: u64,
    /// Bytes of pages with data, as they were read.
    pub bytes: u64,
    /// Time to list processes, find and protect written pages.
    pub scan: Duration,
    /// Time to read pages.
    pub read: Duration,
    /// Time that the sink took.
    pub sink: Duration,
    /// The sink ended the round.
    pub stopped: bool,
}

impl RoundReport {
    pub(crate) fn add(&mut self, gathered: &Gathered) {
        self.data_pages += gathered.data_pages;
        self.zero_pages += gathered.zero_pages;
        self.gone_pages += gathered.gone.page_count();
        self.bytes += gathered.bytes;
        self.read += gathered.reading;
        self.sink += gathered.sink;
        self.stopped |= gathered.stopped;
    }
}
