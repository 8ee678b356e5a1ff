//! Pages that a container which runs on the target already still lacks, and that its frozen source still has.
//!
//! ```text
//!  freeze ──► Owed: what the target lacks, hottest first ──► next  ──┐
//!             target asks for what somebody waits for ─────► asked ──┴─► Errand ──► Frozen::read ──► batch
//! ```
//! The source must stand still until all of it has gone: each batch is handed over only if the container is frozen after
//! it was read.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, ErrorKind};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use haulage_sys::Pid;
use haulage_sys::freezer::{Freezer, FreezerState};

use crate::gather::{PageBatch, gather};
use crate::history::Pattern;
use crate::manifest::{FinalManifest, ManifestProcess};
use crate::maps::Maps;
use crate::object::Label;
use crate::process::{self, Generation, Process, Vpid};
use crate::range::{PageNo, PageRange, RangeSet};
use crate::source::SourceError;

/// Pages of one errand, at most (256 KiB): whoever waits for a page waits for no more than one that is under way.
const ERRAND: u64 = 64;

/// Written since the last round: hotter than whatever a history of rounds tells.
const JUST_WRITTEN: u16 = 1 << 8;

/// Pages to be read and sent now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Errand {
    process: Process,
    round: u32,
    pages: RangeSet,
}

impl Errand {
    /// Which.
    pub fn pages(&self) -> &RangeSet {
        &self.pages
    }
}

#[derive(Debug)]
struct Debt {
    process: Process,
    pages: RangeSet,
    /// Those of them that went because they were asked for.
    asked: RangeSet,
}

/// The account of what is owed.
#[derive(Debug)]
pub struct Owed {
    round: u32,
    debts: BTreeMap<Vpid, Debt>,
    /// What is left to be sent unasked, the next one last.
    order: Vec<(u16, Vpid, PageRange)>,
}

impl Owed {
    pub(crate) fn new(round: u32) -> Self {
        Self { round, debts: BTreeMap::new(), order: Vec::new() }
    }

    /// The pages of `runs` are owed, each with the rounds in which it was written, and perhaps since the last of them.
    pub(crate) fn owe(&mut self, process: Process, runs: &[(Pattern, PageRange)], since: bool) {
        if runs.is_empty() {
            return;
        }
        let pages: RangeSet = runs.iter().map(|(_, run)| *run).collect();
        let since = if since { JUST_WRITTEN } else { 0 };
        // The latest round counts most.
        let heat = |pattern: Pattern| since | u16::from(pattern.reverse_bits());
        self.order.extend(runs.iter().map(|(pattern, run)| (heat(*pattern), process.vpid, *run)));
        let debt = self.debts.entry(process.vpid);
        let debt = debt.or_insert_with(|| Debt { process, pages: RangeSet::new(), asked: RangeSet::new() });
        debt.pages = debt.pages.union(&pages);
    }

    /// Puts what is owed in its order: hottest first, and within that as it lies in memory.
    pub(crate) fn sort(&mut self) {
        self.order.sort_by_key(|(heat, vpid, run)| (*heat, std::cmp::Reverse((*vpid, run.start()))));
    }

    /// How many pages were owed at the freeze.
    pub fn pages(&self) -> u64 {
        self.debts.values().map(|debt| debt.pages.page_count()).sum()
    }

    /// What was owed at the freeze, for [`crate::target::TargetEngine::finish_owing`].
    pub fn manifest(&self) -> FinalManifest {
        let entry = |(vpid, debt): (&Vpid, &Debt)| {
            let generation = debt.process.generation;
            (*vpid, ManifestProcess { generation, label: Label::default(), pages: debt.pages.clone() })
        };
        FinalManifest { processes: self.debts.iter().map(entry).collect() }
    }

    /// What is to be sent next although nobody has asked for it; `None` when all has gone.
    pub fn next_errand(&mut self) -> Option<Errand> {
        loop {
            let (_, vpid, _) = *self.order.last()?;
            let Some(debt) = self.debts.get(&vpid) else {
                self.order.pop();
                continue;
            };
            let (mut pages, mut room) = (RangeSet::new(), ERRAND);
            while room > 0
                && let Some((heat, _, run)) = self.order.pop_if(|(_, of, _)| *of == vpid)
            {
                let (run, rest) = run.split_at(room);
                self.order.extend(rest.map(|rest| (heat, vpid, rest)));
                room -= run.count();
                match debt.asked.overlaps(run) {
                    true => RangeSet::from_iter([run])
                        .subtract(&debt.asked)
                        .iter()
                        .for_each(|run| pages.insert(run)),
                    false => pages.insert(run),
                }
            }
            if !pages.is_empty() {
                return Some(Errand { process: debt.process, round: self.round, pages });
            }
        }
    }

    /// What somebody waits for. Pages that have gone already go once more: they may be far behind in a queue.
    pub fn asked(&mut self, ask: Ask) -> Option<Errand> {
        let debt = self.debts.get_mut(&ask.vpid)?;
        if debt.process.generation != ask.generation {
            return None;
        }
        let (wanted, _) = ask.pages.split_at(ERRAND);
        let pages = debt.pages.intersect(&RangeSet::from_iter([wanted]));
        pages.iter().for_each(|run| debt.asked.insert(run));
        (!pages.is_empty()).then_some(Errand { process: debt.process, round: self.round, pages })
    }
}

/// Pages of a process that somebody on the target waits for, where they were when it was frozen.
///
/// ```text
/// vpid u32, pages u32, generation u64, first page u64      little-endian; no pages: begin to send what nobody asks for
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ask {
    /// Whose.
    pub vpid: Vpid,
    /// Which process of that id.
    pub generation: Generation,
    /// Which; no more than 64 of them are sent.
    pub pages: PageRange,
}

/// What the target says to the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Word {
    /// Send the rest, in whatever order is best.
    Begin,
    /// Send these first.
    Ask(Ask),
}

/// Bytes of a [`Word`].
pub const WORD: usize = 24;

impl Word {
    /// As it travels.
    pub fn encode(self) -> [u8; WORD] {
        let mut bytes = [0; WORD];
        if let Self::Ask(Ask { vpid, generation, pages }) = self {
            let count = u32::try_from(pages.count()).unwrap_or(u32::MAX);
            let numbers = u64::from(vpid.0) | u64::from(count) << 32;
            for (to, from) in bytes.chunks_exact_mut(8).zip([numbers, generation.0, pages.start().0]) {
                to.copy_from_slice(&from.to_le_bytes());
            }
        }
        bytes
    }

    /// `None` for what is none.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let (&[numbers, generation, first], []) = bytes.as_chunks::<8>() else { return None };
        let numbers = u64::from_le_bytes(numbers);
        let (vpid, count) = (Vpid(numbers as u32), numbers >> 32);
        if count == 0 {
            return Some(Self::Begin);
        }
        let pages = PageRange::with_count(PageNo(u64::from_le_bytes(first)), count)?;
        Some(Self::Ask(Ask { vpid, generation: Generation(u64::from_le_bytes(generation)), pages }))
    }
}

/// Reads what is owed, for as long as the container stands still.
#[derive(Debug, Clone)]
pub struct Frozen {
    freezer: Freezer,
    cgroup_procs: PathBuf,
}

impl Frozen {
    pub(crate) fn new(freezer: Freezer, cgroup_procs: &Path) -> Self {
        Self { freezer, cgroup_procs: cgroup_procs.to_owned() }
    }

    /// The pages of an errand, as they were at the freeze.
    ///
    /// # Errors
    /// [`SourceError::NotFrozen`] when the container has been let go: nobody may have what was read then. Else when a page
    /// cannot be read.
    pub fn read(&self, errand: &Errand) -> Result<Vec<PageBatch>, SourceError> {
        let Errand { process, round, pages } = errand;
        let vpid = process.vpid;
        let mut batches = Vec::new();
        let gathered = gather(*process, None, *round, pages, &mut |batch| {
            batches.push(batch);
            ControlFlow::Continue(())
        });
        let gathered = gathered.map_err(|source| SourceError::Read { vpid, source })?;
        if self.freezer.state()? != FreezerState::Frozen
            && !process::all_traced(&process::list(&self.cgroup_procs)?)?
        {
            return Err(SourceError::NotFrozen);
        }
        match gathered.gone.page_count() {
            0 => Ok(batches),
            count => Err(SourceError::Unreadable { vpid, count }),
        }
    }
}

/// The pages of a frozen process that a restore can do without for a while: CRIU's restore fills in locked memory itself.
pub(crate) fn can_come_later(process: Process) -> io::Result<RangeSet> {
    let maps = Maps::of(process.pid).map_err(io::Error::other)?;
    let ours = maps.regions().iter().filter(|region| !region.shared && region.inode == 0);
    let ours: RangeSet = ours.filter_map(|region| region.pages()).collect();
    let tracked = maps.tracked_pages().intersect(&ours);
    Ok(tracked.subtract(&locked(process.pid)?))
}

/// Memory that `mlock(2)` holds.
fn locked(pid: Pid) -> io::Result<RangeSet> {
    let read = |file: &str| match fs::read(format!("/proc/{pid}/{file}")) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(String::new()),
        Err(error) => Err(error),
        Ok(bytes) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
    };
    // Which mappings it is takes a walk over all of them.
    let status = read("status")?;
    let amount = status.lines().find_map(|line| line.strip_prefix("VmLck:"));
    let none = amount.is_none_or(|amount| amount.split_ascii_whitespace().next() == Some("0"));
    if none { Ok(RangeSet::new()) } else { Ok(locked_of(&read("smaps")?)) }
}

/// As `smaps` tells: `start-end …` begins a mapping, and `VmFlags:` has `lo`.
fn locked_of(smaps: &str) -> RangeSet {
    let (mut locked, mut mapping) = (RangeSet::new(), None);
    for line in smaps.lines() {
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            if flags.split_ascii_whitespace().any(|flag| flag == "lo") {
                mapping.into_iter().for_each(|mapping| locked.insert(mapping));
            }
        } else if let Some((start, end)) = line.split(' ').next().and_then(|range| range.split_once('-')) {
            let address = |text| u64::from_str_radix(text, 16).ok();
            mapping =
                address(start).zip(address(end)).and_then(|(start, end)| PageRange::of_addresses(start..end));
        }
    }
    locked
}

#[cfg(test)]
#[path = "owed_tests.rs"]
mod tests;
