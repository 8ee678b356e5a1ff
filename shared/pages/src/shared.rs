//! What was written to shared memory since the last round, and what of it exists.
//!
//! Page tables tell of writes, and each process has its own. So what was written to an object is
//! - what some page table says, of mappings that have been registered since the last round;
//! - all that a mapping shows which is new, or has been: whatever was done through it went unseen;
//! - pages that held nothing the last time;
//! - pages of a memfd or of a System V segment that are not as they were sent, if its time of change says that there may be some ([`crate::contents`]);
//! - pages without a descriptor that somebody may have taken out, and that are zeros now ([`crate::given_back`]);
//! - everything, if some process may have been born and have died in between, or the kernel may have taken pages out of
//!   page tables ([`crate::births`]); of those two, what a comparison finds.
//!
//! A process whose first thread has ended, while others run on, shows neither mappings nor page tables: everything counts
//! as written from when it is seen until a round after it was.
//!
//! What remains unseen is a write
//! - through a second mapping that a process makes of the same memory (`mremap` with an old size of 0) and gives up again
//!   between two rounds;
//! - to a page that the process itself takes out of its page tables before the next round (`MADV_DONTNEED`, `MADV_PAGEOUT`
//!   on shared memory);
//! - by a process that the kernel had given its number, but had not yet put into the control group, when a look and the
//!   listing after it came: it must have been held up in the middle of its birth.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs::File;
use std::io;
use std::mem;
use std::time::SystemTime;

use crate::births::Births;
use crate::contents::{Contents, Look};
use crate::given_back::GivenBack;
use crate::maps::Maps;
use crate::object::{self, Label, ObjectId, ObjectMapping};
use crate::process::{self, Process, Vpid};
use crate::range::{PageRange, RangeSet};
use crate::track::{
    Collected, DirtyTracker, FinalScan, Forgotten, SharedScan, SharedWrites, TrackError, Tracking,
};

/// The shared memory of one container.
#[derive(Debug, Default)]
pub(crate) struct SharedMemory {
    births: Births,
    objects: BTreeMap<ObjectId, Known>,
    numbers: BTreeMap<ObjectId, u32>,
    /// There has been some.
    is_used: bool,
    /// Some process hid its memory at the last round.
    hidden: bool,
}

/// An object, as the last round has seen it.
#[derive(Debug)]
struct Known {
    file: File,
    label: Label,
    /// Where there may be descriptors of it, or it can be mapped at any time.
    contents: Option<Contents>,
    /// Of use where there are no descriptors.
    given_back: GivenBack,
    extents: RangeSet,
    /// Mappings that have been registered since.
    mappings: Vec<ObjectMapping>,
}

/// What the processes' page tables say about the mappings of one object.
#[derive(Debug, Default)]
struct Writes {
    dirty: RangeSet,
    /// Mappings that are registered from now on.
    followed: Vec<ObjectMapping>,
    direct_io: bool,
    /// Some process cannot be followed.
    unknown: bool,
}

type Objects = BTreeMap<ObjectId, Vec<ObjectMapping>>;

impl SharedMemory {
    /// That of a container with these processes.
    pub(crate) fn begin(processes: &[Process]) -> Self {
        let maps: Vec<_> =
            processes.iter().filter_map(|process| Some((*process, Maps::of(process.pid).ok()?))).collect();
        let is_used = object::carried(&maps).is_ok_and(|objects| !objects.is_empty());
        Self { births: Births::of(processes), is_used, ..Self::default() }
    }

    /// To be called before processes are listed for [`Self::collect`], [`Self::scan`] or [`Self::left`].
    pub(crate) fn look(&mut self) {
        if self.is_used {
            self.births.look();
        }
    }

    /// The object that the id stands for with what it is called, and what takes note of what is read of it to be sent.
    pub(crate) fn read(&mut self, vpid: Vpid) -> (Option<(&File, &Label)>, Option<&mut Contents>) {
        match self.id_of(vpid).and_then(|id| self.objects.get_mut(&id)) {
            Some(Known { file, label, contents, .. }) => (Some((&*file, &*label)), contents.as_mut()),
            None => (None, None),
        }
    }

    /// What the object is called that the id stands for; nothing, of a process.
    pub(crate) fn label(&self, vpid: Vpid) -> Label {
        let known = self.id_of(vpid).and_then(|id| self.objects.get(&id));
        known.map(|known| known.label.clone()).unwrap_or_default()
    }

    fn id_of(&self, vpid: Vpid) -> Option<ObjectId> {
        let mut all = self.numbers.iter();
        all.find(|(_, number)| Vpid::of_object(**number) == vpid).map(|(id, _)| *id)
    }

    /// What was written since the last call, with the objects in place of processes. Nothing where the tracker cannot
    /// tell, nor of an object that a process uses which cannot be followed: it goes in the final round. What was written
    /// through descriptors may wait for a later round, unless this is the last one.
    pub(crate) fn collect(
        &mut self,
        processes: &[Process],
        tracker: &mut dyn DirtyTracker,
        is_last: bool,
    ) -> Vec<Collected> {
        let Some(tracker) = tracker.shared() else { return Vec::new() };
        let (listed, mut unsure) = (SystemTime::now(), false);
        let maps = processes.iter().filter_map(|process| match Maps::of(process.pid) {
            Ok(maps) => Some((*process, maps)),
            Err(error) => {
                unsure |= !error.is_gone();
                None
            }
        });
        let maps: Vec<_> = maps.collect();
        let Ok(objects) = object::carried(&maps) else { return Vec::new() };
        self.is_used |= !objects.is_empty();
        let hidden = some_hide(&maps);
        unsure |= self.births.is_unsure(processes) | hidden | mem::replace(&mut self.hidden, hidden);
        self.births.forgive();
        let scans = scans(&objects, |process, pages| tracker.collect_shared(process, pages));
        self.objects.retain(|id, _| objects.contains_key(id));
        let mut all = Vec::new();
        for (id, mappings) in objects {
            let Some(process) = self.stand_in(id, &mappings) else { continue };
            let Some(known) = self.objects.get_mut(&id) else { continue };
            let writes = writes(&known.mappings, &mappings, &scans);
            let Ok((extents, mut dirty)) = known.collect(&writes.dirty, listed, unsure, is_last) else {
                // What the page tables said is forgotten with this: everything counts as written the next time.
                (known.extents, known.mappings) = (RangeSet::new(), Vec::new());
                continue;
            };
            (known.extents, known.mappings) = (extents.clone(), writes.followed);
            if writes.unknown {
                (known.extents, dirty) = (RangeSet::new(), RangeSet::new());
            }
            all.push(Collected {
                process,
                tracking: Tracking::Tracked { refused: Vec::new() },
                mapped: extents,
                forgotten: Forgotten::Pages(RangeSet::new()),
                dirty,
                direct_io: writes.direct_io,
            });
        }
        all
    }

    /// The truth about the objects of a frozen container, with them in place of processes. Changes nothing, except that
    /// objects may be opened.
    ///
    /// # Errors
    /// When anything cannot be known.
    pub(crate) fn scan(
        &mut self,
        processes: &[Process],
        tracker: &mut dyn DirtyTracker,
    ) -> Result<Vec<FinalScan>, TrackError> {
        let mut maps = Vec::new();
        for process in processes {
            let vpid = process.vpid;
            maps.push((*process, Maps::of(process.pid).map_err(|source| TrackError::Maps { vpid, source })?));
        }
        self.scan_maps(processes, &maps, tracker, true)
    }

    /// As [`Self::scan`], nearly: the processes run, and those that end meanwhile are left out, as is what only a
    /// comparison of memfds would show.
    pub(crate) fn left(
        &mut self,
        processes: &[Process],
        tracker: &mut dyn DirtyTracker,
    ) -> Option<Vec<FinalScan>> {
        let maps = processes.iter().filter_map(|process| Some((*process, Maps::of(process.pid).ok()?)));
        self.scan_maps(processes, &maps.collect::<Vec<_>>(), tracker, false).ok()
    }

    fn scan_maps(
        &mut self,
        processes: &[Process],
        maps: &[(Process, Maps)],
        tracker: &mut dyn DirtyTracker,
        compares: bool,
    ) -> Result<Vec<FinalScan>, TrackError> {
        let objects = object::carried(maps).map_err(TrackError::Shared)?;
        let unsure = self.births.is_unsure(processes) | self.hidden | some_hide(maps);
        let mut tracker = tracker.shared();
        let scans = scans(&objects, |process, pages| match &mut tracker {
            Some(tracker) => tracker.scan_shared(process, pages),
            None => SharedWrites::Unknown,
        });
        let mut all = Vec::new();
        for (id, mappings) in objects {
            // What can be gone of a frozen container is CRIU's own, which comes and goes beside us. What is not, and yet
            // missing, the join refuses.
            let Some(process) = self.stand_in(id, &mappings) else { continue };
            let Some(known) = self.objects.get(&id) else { continue };
            let writes = writes(&known.mappings, &mappings, &scans);
            let (exists, unwritten) = known.scan(&writes, unsure, compares).map_err(TrackError::Shared)?;
            all.push(FinalScan { process, exists, unwritten });
        }
        Ok(all)
    }

    /// What goes by the object's id in place of a process. The object is open then, unless that is not possible.
    fn stand_in(&mut self, id: ObjectId, mappings: &[ObjectMapping]) -> Option<Process> {
        let first = mappings.first()?;
        if id.segment().is_some() && self.objects.get(&id).is_some_and(|known| !known.is_of(id, mappings)) {
            self.objects.remove(&id);
        }
        if let Entry::Vacant(place) = self.objects.entry(id) {
            let opened =
                mappings.iter().find_map(|mapping| Some((mapping.open(id).ok()?, mapping.label().ok()?)));
            let (file, label) = opened?;
            let contents = match (id.segment(), label.is_anonymous()) {
                (Some(_), _) => Some(Contents::of_segment()),
                (None, is_anonymous) => (!is_anonymous).then(Contents::new),
            };
            let (given_back, extents, mappings) = Default::default();
            place.insert(Known { file, label, contents, given_back, extents, mappings });
        }
        let next = u32::try_from(self.numbers.len()).ok()?;
        let number = *self.numbers.entry(id).or_insert(next);
        Some(Process { pid: first.process.pid, vpid: Vpid::of_object(number), generation: id.generation() })
    }
}

impl Known {
    /// Whether it is still the memory of these mappings. A segment may get the id of one that is gone, whose memory we keep.
    fn is_of(&self, id: ObjectId, mappings: &[ObjectMapping]) -> bool {
        let made = |file: &File| file.metadata().ok()?.created().ok();
        let now = mappings.iter().find_map(|mapping| mapping.open(id).ok());
        now.is_none_or(|now| made(&now) == made(&self.file))
    }

    /// The pages that exist, and those of them that are not known to be as they were sent, for all that page tables have
    /// `told` since mappings were `listed`.
    fn collect(
        &mut self,
        told: &RangeSet,
        listed: SystemTime,
        unsure: bool,
        is_last: bool,
    ) -> io::Result<(RangeSet, RangeSet)> {
        // Before all else: what is written from here on shows the next time.
        let look = self.look()?.of_those_listed(listed);
        let extents = object::extents(&self.file)?;
        let written = told.union(&extents.subtract(&self.extents)).intersect(&extents);
        let written = match &mut self.contents {
            Some(contents) => {
                let differing = contents.collect(&self.file, &extents, told, look, unsure, is_last)?;
                written.union(&differing.intersect(&extents))
            }
            None if unsure => extents.clone(),
            None => written,
        };
        if !self.has_descriptors() {
            let zeros = self.given_back.collect(&self.file, &extents, &written, is_last)?;
            return Ok((extents, written.union(&zeros)));
        }
        Ok((extents, written))
    }

    fn look(&self) -> io::Result<Look> {
        match self.label.segment() {
            Some(_) => Look::at_segment(&self.file),
            None => Look::at(&self.file),
        }
    }

    /// Whether there may be any.
    fn has_descriptors(&self) -> bool {
        self.contents.is_some() && self.label.segment().is_none()
    }

    /// The pages that exist when frozen, and those of them that are as they were sent. Changes nothing. Only if it
    /// `compares`, memory is looked at and not page tables alone.
    fn scan(&self, writes: &Writes, unsure: bool, compares: bool) -> io::Result<(RangeSet, RangeSet)> {
        let look = self.look()?;
        let extents = object::extents(&self.file)?;
        if writes.unknown || unsure && self.contents.is_none() {
            return Ok((extents, RangeSet::new()));
        }
        let unwritten = extents.intersect(&self.extents).subtract(&writes.dirty);
        let mut others = match &self.contents {
            Some(contents) if compares => contents.scan(&self.file, &extents, look, unsure)?,
            _ => RangeSet::new(),
        };
        if compares && !self.has_descriptors() {
            others = others.union(&self.given_back.scan(&self.file, &unwritten.subtract(&others))?);
        }
        Ok((extents, unwritten.subtract(&others)))
    }
}

/// Whether some process has memory that it does not show.
fn some_hide(maps: &[(Process, Maps)]) -> bool {
    maps.iter().any(|(process, maps)| maps.regions().is_empty() && process::is_without_leader(process.pid))
}

/// What `scan` says of each process that has an object mapped.
fn scans(
    objects: &Objects,
    mut scan: impl FnMut(Process, &RangeSet) -> SharedWrites,
) -> BTreeMap<Vpid, SharedWrites> {
    let mut mapped = BTreeMap::<Vpid, (Process, RangeSet)>::new();
    for mapping in objects.values().flatten() {
        let entry = mapped.entry(mapping.process.vpid).or_insert((mapping.process, RangeSet::new()));
        entry.1.insert(mapping.pages);
    }
    mapped.into_iter().map(|(vpid, (process, pages))| (vpid, scan(process, &pages))).collect()
}

/// Puts together what is said about the mappings of one object, which were `before` at the last round and are `now`.
fn writes(before: &[ObjectMapping], now: &[ObjectMapping], scans: &BTreeMap<Vpid, SharedWrites>) -> Writes {
    let (mut writes, mut dirty) = (Writes::default(), Vec::new());
    // Of processes with the memory of another one, that one tells all.
    let speaks =
        |mapping: &&ObjectMapping| !matches!(scans.get(&mapping.process.vpid), Some(SharedWrites::Elsewhere));
    for mapping in now.iter().filter(speaks) {
        let pages = RangeSet::from_iter([mapping.pages]);
        let Some(SharedWrites::Known(SharedScan { registered, written, direct_io })) =
            scans.get(&mapping.process.vpid)
        else {
            writes.unknown = true;
            continue;
        };
        let sure = common(mapping, before).intersect(registered);
        let seen = written.intersect(&sure).union(&pages.subtract(&sure));
        dirty.extend(mapping.of_object(&seen).iter());
        writes.direct_io |= direct_io;
        writes.followed.push(*mapping);
    }
    for mapping in before.iter().filter(speaks) {
        let gone = RangeSet::from_iter([mapping.pages]).subtract(&common(mapping, now));
        dirty.extend(mapping.of_object(&gone).iter());
    }
    writes.dirty = in_order(dirty);
    writes
}

/// The pages of a mapping that are at the same place in one of `others`.
fn common(mapping: &ObjectMapping, others: &[ObjectMapping]) -> RangeSet {
    let same = others.iter().filter(|other| other.is_aligned_with(mapping));
    in_order(same.filter_map(|other| other.pages.intersect(mapping.pages)).collect())
}

/// All pages of many runs. Adding them in order takes the least time.
fn in_order(mut runs: Vec<PageRange>) -> RangeSet {
    runs.sort_unstable_by_key(|run| run.start());
    runs.into_iter().collect()
}
