//! The target's end: batches into the store as they come, and at the end exactly the pages that exist.

use std::path::{Path, PathBuf};

use crate::frame::{Batch, FrameError, Parts};
use crate::manifest::FinalManifest;
use crate::named::Named;
use crate::process::Vpid;
use crate::range::{PageRange, RangeSet};
use crate::store::{Objects, PageStore, StoreError, StoreLimits};

/// A batch or a manifest could not be taken in.
#[derive(Debug, thiserror::Error)]
pub enum TargetError {
    /// The bytes are not a batch.
    #[error("not a batch of pages")]
    Frame(#[from] FrameError),
    /// The batch is of an earlier round than one that came before it, and could replace newer pages by older ones.
    #[error("batch of round {found} after one of round {latest}")]
    Late {
        /// The latest round seen.
        latest: u32,
        /// The batch's.
        found: u32,
    },
    /// The pages could not be stored.
    #[error("pages cannot be stored")]
    Store(#[from] StoreError),
    /// Pages exist that were never sent.
    #[error("{count} pages of process {vpid} have not come, the first at {first}")]
    Incomplete {
        /// Whose.
        vpid: Vpid,
        /// How many.
        count: u64,
        /// The first run of them.
        first: PageRange,
    },
    /// The source would owe pages that do not exist.
    #[error("pages of process {0} are owed that do not exist")]
    NotOwed(Vpid),
}

/// What one batch held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Applied {
    /// Pages with data.
    pub data_pages: u64,
    /// Pages of zeros.
    pub zero_pages: u64,
}

/// What the sealed store holds.
#[derive(Debug)]
pub struct FinishReport {
    /// The store's directory.
    pub dir: PathBuf,
    /// Processes.
    pub processes: usize,
    /// Their pages.
    pub pages: u64,
    /// Pages that had come and no longer existed.
    pub dropped_pages: u64,
    /// Those of their pages whose bytes are still to come.
    pub owed_pages: u64,
    /// To be held until the store has been opened by whoever is to have its shared memory.
    pub objects: Objects,
}

/// Takes pages in.
#[derive(Debug)]
pub struct TargetEngine {
    store: PageStore,
    latest: u32,
}

impl TargetEngine {
    /// Starts with an empty store in `dir`.
    ///
    /// # Errors
    /// When `dir` holds a store already, or cannot be written to.
    pub fn create(dir: &Path, limits: StoreLimits) -> Result<Self, StoreError> {
        Ok(Self { store: PageStore::create(dir, limits)?, latest: 0 })
    }

    /// Takes one encoded batch in. Batches of one round may come in any order, rounds only one after the other.
    ///
    /// # Errors
    /// A batch that cannot be decoded, or is late, changes nothing; after any other error the session is lost.
    pub fn apply(&mut self, bytes: &[u8]) -> Result<Applied, TargetError> {
        self.store(&Batch::decode(bytes)?)
    }

    /// As [`Self::apply`], of a batch that was decoded elsewhere.
    ///
    /// # Errors
    /// As there.
    pub fn store(&mut self, batch: &Batch<'_>) -> Result<Applied, TargetError> {
        if batch.round < self.latest {
            return Err(TargetError::Late { latest: self.latest, found: batch.round });
        }
        self.latest = batch.round;
        self.store.enter_round(batch.round);
        if batch.vpid.is_object() {
            self.store.introduce(batch.vpid, batch.generation, &batch.label)?;
        }
        let mut applied = Applied::default();
        for (run, bytes) in batch.pieces() {
            let (vpid, generation, range) = (batch.vpid, batch.generation, run.range);
            match run.parts {
                Parts::NONE => self.store.zero(vpid, generation, range)?,
                Parts::ALL => self.store.write(vpid, generation, range, bytes)?,
                parts => self.store.mend(vpid, generation, range, parts, bytes)?,
            }
            let pages = if run.is_zero() { &mut applied.zero_pages } else { &mut applied.data_pages };
            *pages += range.count();
        }
        Ok(applied)
    }

    /// Stores pages that equal others, which are stored: a frame of [`crate::known::Known::take_named`].
    ///
    /// # Errors
    /// As [`Self::apply`], and when one of the others has not come; the session is lost then.
    pub fn copy(&mut self, bytes: &[u8]) -> Result<(), TargetError> {
        let named = Named::decode(bytes)?;
        if named.round < self.latest {
            return Err(TargetError::Late { latest: self.latest, found: named.round });
        }
        self.latest = named.round;
        self.store.enter_round(named.round);
        if named.of.vpid.is_object() {
            self.store.introduce(named.of.vpid, named.of.generation, &named.label)?;
        }
        for run in named.runs {
            self.store.copy(named.of, run.pages, named.like, run.like)?;
        }
        Ok(())
    }

    /// Makes the store hold exactly the pages of `manifest` and seals it.
    ///
    /// # Errors
    /// [`TargetError::Incomplete`] when a page is missing. The store is not sealed then.
    pub fn finish(self, manifest: &FinalManifest) -> Result<FinishReport, TargetError> {
        self.finish_owing(manifest, &FinalManifest::default())
    }

    /// As [`Self::finish`], with the bytes of the pages of `owed` still to come: whatever is stored of them is void.
    ///
    /// # Errors
    /// As there, and [`TargetError::NotOwed`].
    pub fn finish_owing(
        mut self,
        manifest: &FinalManifest,
        owed: &FinalManifest,
    ) -> Result<FinishReport, TargetError> {
        let unknown = owed.processes.iter().find(|(vpid, owed)| {
            let known = manifest.processes.get(vpid);
            vpid.is_object()
                || known.is_none_or(|known| {
                    known.generation != owed.generation || !owed.pages.subtract(&known.pages).is_empty()
                })
        });
        if let Some((vpid, _)) = unknown {
            return Err(TargetError::NotOwed(*vpid));
        }
        let nothing = RangeSet::new();
        let gone = self.store.processes().into_iter().filter(|vpid| !manifest.processes.contains_key(vpid));
        let mut dropped_pages: u64 =
            gone.collect::<Vec<_>>().into_iter().map(|vpid| self.store.reset(vpid)).sum();
        for (vpid, process) in &manifest.processes {
            if self.store.generation(*vpid).is_some_and(|stored| stored != process.generation) {
                dropped_pages += self.store.reset(*vpid);
            }
            match vpid.is_object() {
                true => self.store.introduce(*vpid, process.generation, &process.label)?,
                false => self.store.admit(*vpid, process.generation)?,
            }
            let owed = owed.processes.get(vpid).map_or(&nothing, |owed| &owed.pages);
            let missing = self.store.missing(*vpid, &process.pages).subtract(owed);
            if let Some(first) = missing.runs().first() {
                return Err(TargetError::Incomplete {
                    vpid: *vpid,
                    count: missing.page_count(),
                    first: *first,
                });
            }
            dropped_pages += self.store.retain(*vpid, &process.pages)?;
            self.store.owe(*vpid, process.generation, owed)?;
        }
        let (processes, pages) = (manifest.processes.len(), manifest.page_count());
        let owed_pages = owed.page_count();
        let (dir, objects) = self.store.seal()?;
        Ok(FinishReport { dir, processes, pages, dropped_pages, owed_pages, objects })
    }
}
