//! The truth at the freeze: which processes there are, and exactly which pages each of them has.

use std::collections::{BTreeMap, BTreeSet};

use crate::frame::{FrameError, MAX_RUNS, ManifestPart, split_runs};
use crate::object::Label;
use crate::process::{Generation, Vpid};
use crate::range::RangeSet;

/// Processes in one manifest, at most.
const MAX_PROCESSES: usize = 1 << 16;
/// Runs of pages in one manifest, at most: 16 bytes each in memory.
const MAX_TOTAL_RUNS: usize = 1 << 24;

/// The pages of one process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ManifestProcess {
    /// Which process of that id.
    pub generation: Generation,
    /// What it is called, if it is shared memory.
    pub label: Label,
    /// Its pages.
    pub pages: RangeSet,
}

/// Every process and every page that exists in the frozen container, of the memory that we carry.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct FinalManifest {
    /// By the processes' own ids.
    pub processes: BTreeMap<Vpid, ManifestProcess>,
}

impl FinalManifest {
    /// Number of pages of all processes.
    pub fn page_count(&self) -> u64 {
        self.processes.values().map(|process| process.pages.page_count()).sum()
    }

    /// The manifest as frames, none longer than [`crate::frame::MAX_FRAME`]. A process without pages has one too.
    pub fn encode(&self) -> impl Iterator<Item = Vec<u8>> + '_ {
        self.processes.iter().flat_map(|(vpid, process)| {
            let mut ranges = split_runs(process.pages.runs()).peekable();
            let mut done = false;
            std::iter::from_fn(move || {
                if done {
                    return None;
                }
                let part: Vec<_> = ranges.by_ref().take(MAX_RUNS).collect();
                done = ranges.peek().is_none();
                let (generation, label) = (process.generation, process.label.clone());
                Some(ManifestPart { vpid: *vpid, generation, label, last: done, ranges: part }.encode())
            })
        })
    }
}

/// Frames that are not a manifest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    /// A frame is not part of one.
    #[error("not a part of a manifest")]
    Frame(#[from] FrameError),
    /// A part that follows the last part of its process, disagrees with earlier ones, or is not after them in memory.
    #[error("part of process {0} contradicts earlier ones")]
    Contradiction(Vpid),
    /// It lists more than a manifest may.
    #[error("more processes or runs than a manifest may have")]
    TooMany,
    /// The last part of a process has not come.
    #[error("manifest ends before the pages of process {0} do")]
    Incomplete(Vpid),
}

/// Puts a manifest together from its frames. Parts of different processes may come in any order.
#[derive(Debug, Default)]
pub struct ManifestBuilder {
    manifest: FinalManifest,
    open: BTreeSet<Vpid>,
    runs: usize,
}

impl ManifestBuilder {
    /// Adds a frame that [`FinalManifest::encode`] made.
    ///
    /// # Errors
    /// See [`ManifestError`]. The builder is as before, then.
    pub fn push(&mut self, bytes: &[u8]) -> Result<(), ManifestError> {
        let part = ManifestPart::decode(bytes)?;
        let vpid = part.vpid;
        let runs = self.runs.saturating_add(part.ranges.len());
        if runs > MAX_TOTAL_RUNS || self.manifest.processes.len() >= MAX_PROCESSES {
            return Err(ManifestError::TooMany);
        }
        let known = self.manifest.processes.get_mut(&vpid);
        let process = match (known, self.open.contains(&vpid)) {
            (Some(process), true) if process.generation == part.generation => process,
            (None, _) => {
                let (generation, label) = (part.generation, part.label);
                let fresh = ManifestProcess { generation, label, pages: RangeSet::new() };
                self.manifest.processes.entry(vpid).or_insert(fresh)
            }
            _ => return Err(ManifestError::Contradiction(vpid)),
        };
        let end = process.pages.runs().last().map(|run| run.end());
        if part.ranges.first().is_some_and(|first| end.is_some_and(|end| first.start() < end)) {
            return Err(ManifestError::Contradiction(vpid));
        }
        self.runs = runs;
        for range in part.ranges {
            process.pages.insert(range);
        }
        match part.last {
            true => self.open.remove(&vpid),
            false => self.open.insert(vpid),
        };
        Ok(())
    }

    /// The manifest.
    ///
    /// # Errors
    /// [`ManifestError::Incomplete`].
    pub fn finish(self) -> Result<FinalManifest, ManifestError> {
        match self.open.first() {
            Some(vpid) => Err(ManifestError::Incomplete(*vpid)),
            None => Ok(self.manifest),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::range::{PageNo, PageRange};

    fn manifest(runs: u64) -> FinalManifest {
        let pages = (0..runs).filter_map(|run| PageRange::with_count(PageNo(1 + 2 * run), 1)).collect();
        let process = |pages| ManifestProcess { generation: Generation(9), label: Label::default(), pages };
        let processes = [(Vpid(1), process(pages)), (Vpid(30), process(RangeSet::new()))];
        FinalManifest { processes: processes.into() }
    }

    #[test]
    fn a_manifest_longer_than_a_frame_comes_back_as_it_was() {
        let original = manifest(MAX_RUNS as u64 * 2 + 5);
        let frames: Vec<_> = original.encode().collect();
        assert_eq!(frames.len(), 4);
        let mut builder = ManifestBuilder::default();
        frames.iter().for_each(|frame| builder.push(frame).unwrap());
        assert_eq!(builder.finish().unwrap(), original);
    }

    #[test]
    fn a_missing_and_a_repeated_part_are_refused() {
        let frames: Vec<_> = manifest(MAX_RUNS as u64 + 1).encode().collect();
        let mut builder = ManifestBuilder::default();
        builder.push(&frames[0]).unwrap();
        assert_eq!(builder.push(&frames[0]), Err(ManifestError::Contradiction(Vpid(1))));
        builder.push(&frames[2]).unwrap();
        assert_eq!(builder.push(&frames[2]), Err(ManifestError::Contradiction(Vpid(30))));
        assert_eq!(builder.finish(), Err(ManifestError::Incomplete(Vpid(1))));
    }
}
