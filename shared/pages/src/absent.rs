//! Which pages a restored process still misses, and where each was when it was dumped: memory moves while it is filled.

use std::collections::BTreeMap;

use crate::range::{PageNo, PageRange};

/// A run of missing pages: where it is now, and where it was in the images.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Missing {
    /// Where the process has it now.
    pub(crate) now: PageRange,
    /// Its first page when it was dumped.
    pub(crate) then: PageNo,
}

impl Missing {
    /// The part of it in `range`, by where it is now.
    fn part(self, range: PageRange) -> Option<Self> {
        let now = self.now.intersect(range)?;
        Some(Self { now, then: PageNo(self.then.0 + (now.start().0 - self.now.start().0)) })
    }

    /// No more than its first `count` pages.
    pub(crate) fn first(self, count: u64) -> Self {
        Self { now: self.now.split_at(count).0, ..self }
    }
}

/// The missing pages of one process.
#[derive(Debug, Clone, Default)]
pub(crate) struct Absent {
    /// By the first page of each run as it is now: how many pages, and where they were. Runs do not overlap.
    runs: BTreeMap<PageNo, (u64, PageNo)>,
    /// Of the runs that have moved: the first page of each as it is now, by where it was.
    moved: BTreeMap<PageNo, PageNo>,
    pages: u64,
}

impl Absent {
    /// How many pages are missing.
    pub(crate) fn pages(&self) -> u64 {
        self.pages
    }

    /// Pages of `range` are missing, and are where they were dumped. They must not be known yet.
    pub(crate) fn insert(&mut self, range: PageRange) {
        self.put(Missing { now: range, then: range.start() });
    }

    /// These pages are missing. They must not be known yet.
    pub(crate) fn put(&mut self, run: Missing) {
        self.pages += run.now.count();
        self.runs.insert(run.now.start(), (run.now.count(), run.then));
        if run.then != run.now.start() {
            self.moved.insert(run.then, run.now.start());
        }
    }

    /// The first run of missing pages that has a page in `range`: its part in there.
    pub(crate) fn next_in(&self, range: PageRange) -> Option<Missing> {
        let before = self.runs.range(..=range.start()).next_back().and_then(whole);
        let after = self.runs.range(range.start()..).next().and_then(whole);
        before.and_then(|run| run.part(range)).or_else(|| after.and_then(|run| run.part(range)))
    }

    /// The first run of all.
    pub(crate) fn next(&self) -> Option<Missing> {
        self.runs.iter().next().and_then(whole)
    }

    /// Pages of `range` are missing no longer.
    pub(crate) fn remove(&mut self, range: PageRange) {
        self.take(range);
    }

    /// Memory moved: what is missing of the `count` pages at `from` is missing at `to`, where nothing else is.
    pub(crate) fn relocate(&mut self, from: PageRange, to: PageNo) {
        let moved = self.take(from);
        if let Some(there) = PageRange::with_count(to, from.count()) {
            self.remove(there);
        }
        for run in moved {
            let start = PageNo(to.0 + (run.now.start().0 - from.start().0));
            if let Some(now) = PageRange::with_count(start, run.now.count()) {
                self.put(Missing { now, then: run.then });
            }
        }
    }

    /// Takes out what is missing of the pages that were in `range` when they were dumped, wherever they are now.
    pub(crate) fn take_dumped(&mut self, range: PageRange) -> Vec<Missing> {
        let mut found = Vec::new();
        let mut rest = Some(range);
        while let Some(run) = rest.and_then(|rest| self.next_in(rest)) {
            rest = PageRange::new(run.now.end(), range.end());
            if run.then == run.now.start() {
                found.push(run);
            }
        }
        let before = self.moved.range(..range.start()).next_back();
        let moved = before.into_iter().chain(self.moved.range(range.start()..range.end()));
        for (then, now) in moved {
            let Some((count, _)) = self.runs.get(now) else { continue };
            let dumped = PageRange::with_count(*then, *count).and_then(|dumped| dumped.intersect(range));
            let Some(dumped) = dumped else { continue };
            let start = PageNo(now.0 + (dumped.start().0 - then.0));
            let now = PageRange::with_count(start, dumped.count());
            found.extend(now.map(|now| Missing { now, then: dumped.start() }));
        }
        found.iter().for_each(|run| self.remove(run.now));
        found
    }

    fn take(&mut self, range: PageRange) -> Vec<Missing> {
        let mut taken = Vec::new();
        while let Some(part) = self.next_in(range) {
            let Some((start, (count, then))) = self.runs.range(..=part.now.start()).next_back() else {
                break;
            };
            let Some(run) = whole((start, &(*count, *then))) else { break };
            self.runs.remove(&run.now.start());
            if run.then != run.now.start() {
                self.moved.remove(&run.then);
            }
            self.pages -= run.now.count();
            let sides = [
                PageRange::new(run.now.start(), part.now.start()),
                PageRange::new(part.now.end(), run.now.end()),
            ];
            for side in sides.into_iter().flatten() {
                if let Some(rest) = run.part(side) {
                    self.put(rest);
                }
            }
            taken.push(part);
        }
        taken
    }
}

fn whole((start, (count, then)): (&PageNo, &(u64, PageNo))) -> Option<Missing> {
    Some(Missing { now: PageRange::with_count(*start, *count)?, then: *then })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Debug, Clone)]
    enum Step {
        Remove(PageRange),
        Move(PageRange, u64),
        TakeDumped(PageRange),
    }

    fn any_range() -> impl Strategy<Value = PageRange> {
        (0..60_u64, 1..20_u64).prop_map(|(start, count)| PageRange::with_count(PageNo(start), count).unwrap())
    }

    fn any_step() -> impl Strategy<Value = Step> {
        prop_oneof![
            any_range().prop_map(Step::Remove),
            (any_range(), 100..160_u64).prop_map(|(from, to)| Step::Move(from, to)),
            (any_range(), 0..60_u64).prop_map(|(from, to)| Step::Move(from, to)),
            any_range().prop_map(Step::TakeDumped),
        ]
    }

    fn pages(absent: &Absent) -> BTreeMap<u64, u64> {
        let mut all = BTreeMap::new();
        let mut rest = absent.clone();
        while let Some(run) = rest.next() {
            let moved = (0..run.now.count()).map(|n| (run.now.start().0 + n, run.then.0 + n));
            all.extend(moved);
            rest.remove(run.now);
        }
        all
    }

    proptest! {
        #[test]
        fn pages_follow_what_happens_to_them(steps in prop::collection::vec(any_step(), 0..20)) {
            let mut absent = Absent::default();
            absent.insert(PageRange::with_count(PageNo(5), 30).unwrap());
            absent.insert(PageRange::with_count(PageNo(40), 30).unwrap());
            let mut model: BTreeMap<u64, u64> = (5..35).chain(40..70).map(|page| (page, page)).collect();
            for step in steps {
                match step {
                    Step::Remove(range) => {
                        absent.remove(range);
                        model.retain(|page, _| !(range.start().0..range.end().0).contains(page));
                    }
                    Step::TakeDumped(range) => {
                        let dumped = |then: &u64| (range.start().0..range.end().0).contains(then);
                        let mut taken = BTreeMap::new();
                        for run in absent.take_dumped(range) {
                            let pages = (0..run.now.count()).map(|n| (run.now.start().0 + n, run.then.0 + n));
                            taken.extend(pages);
                        }
                        let (gone, stay): (BTreeMap<u64, u64>, BTreeMap<u64, u64>) =
                            model.into_iter().partition(|(_, then)| dumped(then));
                        prop_assert_eq!(taken, gone);
                        model = stay;
                    }
                    Step::Move(from, to) => {
                        // The kernel moves nothing onto itself.
                        if from.start().0 < to + from.count() && to < from.end().0 {
                            continue;
                        }
                        absent.relocate(from, PageNo(to));
                        let (moved, stay): (BTreeMap<u64, u64>, BTreeMap<u64, u64>) =
                            model.into_iter().partition(|(page, _)| (from.start().0..from.end().0).contains(page));
                        model = stay;
                        model.retain(|page, _| !(to..to + from.count()).contains(page));
                        model.extend(moved.into_iter().map(|(page, then)| (page - from.start().0 + to, then)));
                    }
                }
                prop_assert_eq!(absent.pages(), model.len() as u64);
                prop_assert_eq!(&pages(&absent), &model);
            }
        }

        #[test]
        fn the_next_run_is_the_first_that_has_a_page_there(range in any_range()) {
            let mut absent = Absent::default();
            absent.insert(PageRange::with_count(PageNo(5), 30).unwrap());
            absent.insert(PageRange::with_count(PageNo(40), 30).unwrap());
            let first = (range.start().0..range.end().0).find(|page| (5..35).contains(page) || (40..70).contains(page));
            prop_assert_eq!(absent.next_in(range).map(|run| run.now.start().0), first);
            prop_assert_eq!(absent.next_in(range).map(|run| run.then.0), first);
        }
    }
}
