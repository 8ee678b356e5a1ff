//! No tracking: everything is sent when the container is frozen.

use crate::process::Process;
use crate::track::{
    Collected, DirtyTracker, FinalScan, Forgotten, Method, SharedTracker, TrackError, Tracking, Untracked,
};
use crate::{range::RangeSet, track};

/// Used where the kernel cannot track: rounds find nothing, the final scan finds everything.
#[derive(Debug, Clone)]
pub struct NoTracking {
    detail: String,
}

impl NoTracking {
    /// `detail` says why tracking is not possible; it is told with every process.
    pub fn new(detail: String) -> Self {
        Self { detail }
    }

    fn tracking(&self) -> Tracking {
        Tracking::Untracked(Untracked::KernelCannot { detail: self.detail.clone() })
    }
}

impl DirtyTracker for NoTracking {
    fn method(&self) -> Method {
        Method::None
    }

    fn shared(&mut self) -> Option<&mut dyn SharedTracker> {
        None
    }

    fn begin(&mut self, processes: &[Process]) -> Vec<(Process, Tracking)> {
        processes.iter().map(|process| (*process, self.tracking())).collect()
    }

    fn collect(&mut self, processes: &[Process]) -> Vec<Collected> {
        let unknown = |process: &Process| Collected {
            process: *process,
            tracking: self.tracking(),
            mapped: RangeSet::new(),
            forgotten: Forgotten::All,
            dirty: RangeSet::new(),
            direct_io: false,
        };
        processes.iter().map(unknown).collect()
    }

    fn final_scan(&mut self, processes: &[Process]) -> Result<Vec<FinalScan>, TrackError> {
        let scan =
            |process: &Process| Ok(FinalScan { unwritten: RangeSet::new(), ..track::scan_frozen(*process)? });
        processes.iter().map(scan).collect()
    }
}
