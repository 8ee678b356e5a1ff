//! Shared memory by the same descriptor: what one process's page tables say about its writes to it.
//!
//! Only pages that are in the page tables are protected. Protecting the others too would cost each process page tables
//! for all of the memory (2 MiB a GiB), and there may be hundreds of them.

use haulage_sys::pagemap::{self, Categories, Filter, Pagemap};
use haulage_sys::{CallError, Errno};

use super::{Held, Hold, WriteProtect};
use crate::maps::{Class, Maps, Region};
use crate::process::Process;
use crate::range::{PageRange, RangeSet};
use crate::track::{SharedScan, SharedTracker, SharedWrites, Untracked};

const WRITTEN: Filter = Filter {
    all: Categories::WP_ALLOWED.and(Categories::WRITTEN),
    any: Categories::PRESENT.and(Categories::SWAPPED),
    ..Filter::ANYTHING
};

/// In a registered mapping, whether it holds something or not.
const REGISTERED: Filter = Filter { all: Categories::WP_ALLOWED, ..Filter::ANYTHING };

impl SharedTracker for WriteProtect {
    fn collect_shared(&mut self, process: Process, pages: &RangeSet) -> SharedWrites {
        self.ask(process, |held| held.collect_shared(process, pages))
    }

    fn scan_shared(&mut self, process: Process, pages: &RangeSet) -> SharedWrites {
        self.ask(process, |held| held.scan_shared(process, pages))
    }
}

impl WriteProtect {
    fn ask(
        &mut self,
        process: Process,
        scan: impl FnOnce(&mut Held) -> Option<(RangeSet, RangeSet)>,
    ) -> SharedWrites {
        let followed = self.followed.get_mut(&process.vpid).filter(|followed| followed.process == process);
        let Some(followed) = followed else { return SharedWrites::Unknown };
        let direct_io = followed.direct_io;
        match &mut followed.hold {
            Hold::Not { reason: Untracked::SharesMemory { .. }, .. } => SharedWrites::Elsewhere,
            Hold::Not { .. } => SharedWrites::Unknown,
            Hold::Held(held) => match scan(held) {
                Some((registered, written)) => {
                    SharedWrites::Known(SharedScan { registered, written, direct_io })
                }
                None => SharedWrites::Unknown,
            },
        }
    }
}

impl Held {
    fn collect_shared(&mut self, process: Process, pages: &RangeSet) -> Option<(RangeSet, RangeSet)> {
        let mut pagemap = Pagemap::open(process.pid).ok()?;
        let mut registered = found(&mut pagemap, pages, REGISTERED, Categories::WP_ALLOWED).ok()?;
        let new = pages.subtract(&registered);
        let before = std::mem::take(&mut self.unwritable);
        if !new.is_empty() {
            // As with private memory, by what lies between mappings of other kinds: one that has changed since it was
            // looked at must not be cut in two.
            for (span, mappings) in Maps::of(process.pid).ok()?.spans_of(Class::Shared) {
                if mappings.iter().any(|mapping| new.overlaps(*mapping)) && self.register_range(span).is_err()
                {
                    for mapping in mappings.into_iter().filter(|mapping| pages.overlaps(*mapping)) {
                        match self.register_range(mapping) {
                            Err(CallError { errno: Errno::PERM, .. }) => self.unwritable.insert(mapping),
                            registered => registered.ok()?,
                        }
                    }
                }
            }
        }
        let never = self.unwritable.intersect(&before);
        registered = registered.union(&never);
        let mut written = RangeSet::new();
        for run in pages.iter() {
            let scanned =
                pagemap.scan_and_protect(run.addresses(), WRITTEN, Categories::WRITTEN, &mut |region| {
                    add(&mut written, region);
                });
            scanned.ok()?;
        }
        // After an exec it would be other memory that was looked at.
        self.tracker.is_alive().ok()?.then_some((registered, written))
    }

    /// What was found to be so at the last round, where nothing else has been mapped since, as far as `maps` show.
    fn still_unwritable(&self, maps: &Maps) -> RangeSet {
        let fixed =
            maps.regions().iter().filter(|region| region.class() == Class::Shared && !region.writable);
        fixed.filter_map(Region::pages).collect::<RangeSet>().intersect(&self.unwritable)
    }

    fn scan_shared(&mut self, process: Process, pages: &RangeSet) -> Option<(RangeSet, RangeSet)> {
        let mut pagemap = Pagemap::open(process.pid).ok()?;
        let registered = found(&mut pagemap, pages, REGISTERED, Categories::WP_ALLOWED).ok()?;
        let registered = match self.unwritable.is_empty() {
            true => registered,
            false => registered.union(&self.still_unwritable(&Maps::of(process.pid).ok()?)),
        };
        let written = found(&mut pagemap, pages, WRITTEN, Categories::WRITTEN).ok()?;
        self.tracker.is_alive().ok()?.then_some((registered, written))
    }
}

/// The pages of `pages` that match.
fn found(
    pagemap: &mut Pagemap,
    pages: &RangeSet,
    filter: Filter,
    report: Categories,
) -> Result<RangeSet, CallError> {
    let mut found = RangeSet::new();
    for run in pages.iter() {
        pagemap.scan(run.addresses(), filter, report, &mut |region| add(&mut found, region))?;
    }
    Ok(found)
}

fn add(pages: &mut RangeSet, region: pagemap::Region) {
    PageRange::of_addresses(region.start..region.end).into_iter().for_each(|range| pages.insert(range));
}
