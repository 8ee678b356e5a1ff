//! Page numbers, runs of pages and sets of pages.

use std::fmt;
use std::ops::Range;

use haulage_sys::{ADDRESS_END, PAGE_SIZE};

/// Number of a page in a process's address space: its address divided by [`PAGE_SIZE`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct PageNo(pub u64);

impl PageNo {
    /// One past the last page that can exist.
    pub const END: Self = Self(ADDRESS_END / PAGE_SIZE);

    /// The page that holds `address`.
    pub fn containing(address: u64) -> Self {
        Self(address / PAGE_SIZE)
    }

    /// The address of its first byte.
    pub fn address(self) -> u64 {
        self.0 * PAGE_SIZE
    }
}

/// Pages `start..end`, never empty and never beyond [`PageNo::END`].
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct PageRange {
    start: PageNo,
    end: PageNo,
}

impl PageRange {
    /// `None` when the range would be empty or would end beyond [`PageNo::END`].
    pub fn new(start: PageNo, end: PageNo) -> Option<Self> {
        (start < end && end <= PageNo::END).then_some(Self { start, end })
    }

    /// `count` pages from `start`; `None` as with [`Self::new`].
    pub fn with_count(start: PageNo, count: u64) -> Option<Self> {
        Self::new(start, PageNo(start.0.checked_add(count)?))
    }

    /// The pages that lie in the addresses `range`, whose bounds are multiples of the page size. Addresses beyond
    /// [`ADDRESS_END`] are cut off; `None` when nothing remains.
    pub fn of_addresses(range: Range<u64>) -> Option<Self> {
        Self::new(PageNo::containing(range.start), PageNo::containing(range.end.min(ADDRESS_END)))
    }

    /// First page.
    pub fn start(self) -> PageNo {
        self.start
    }

    /// One past the last page.
    pub fn end(self) -> PageNo {
        self.end
    }

    /// Number of pages, at least 1.
    pub fn count(self) -> u64 {
        self.end.0 - self.start.0
    }

    /// The addresses of its bytes.
    pub fn addresses(self) -> Range<u64> {
        self.start.address()..self.end.address()
    }

    /// The pages that are in both.
    pub fn intersect(self, other: Self) -> Option<Self> {
        Self::new(self.start.max(other.start), self.end.min(other.end))
    }

    /// Splits off the first `count` pages: them, and the rest if there is one.
    pub fn split_at(self, count: u64) -> (Self, Option<Self>) {
        let middle = PageNo(self.start.0.saturating_add(count.max(1)).min(self.end.0));
        (Self { end: middle, ..self }, Self::new(middle, self.end))
    }
}

impl fmt::Debug for PageRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}+{}", self.start.address(), self.count())
    }
}

impl fmt::Display for PageRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}-{:#x}", self.start.address(), self.end.address())
    }
}

/// A set of pages, held as runs in ascending order that neither overlap nor touch.
///
/// Set operations take time linear in the number of runs of both sides; [`RangeSet::insert`] at the end takes
/// constant time, so building a set in ascending order is linear too.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RangeSet {
    runs: Vec<PageRange>,
}

impl RangeSet {
    /// The empty set.
    pub const fn new() -> Self {
        Self { runs: Vec::new() }
    }

    /// Whether there is no page in it.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// Number of pages.
    pub fn page_count(&self) -> u64 {
        self.runs.iter().map(|run| run.count()).sum()
    }

    /// The runs, ascending.
    pub fn runs(&self) -> &[PageRange] {
        &self.runs
    }

    /// The runs, ascending.
    pub fn iter(&self) -> impl Iterator<Item = PageRange> + '_ {
        self.runs.iter().copied()
    }

    /// Every page, ascending.
    pub fn pages(&self) -> impl Iterator<Item = PageNo> + '_ {
        self.runs.iter().flat_map(|run| (run.start.0..run.end.0).map(PageNo))
    }

    /// Whether `page` is in it.
    pub fn contains(&self, page: PageNo) -> bool {
        let at = self.runs.partition_point(|run| run.end <= page);
        self.runs.get(at).is_some_and(|run| run.start <= page)
    }

    /// Whether any page of `range` is in it.
    pub fn overlaps(&self, range: PageRange) -> bool {
        let at = self.runs.partition_point(|run| run.end <= range.start);
        self.runs.get(at).is_some_and(|run| run.start < range.end)
    }

    /// Adds the pages of `range`.
    pub fn insert(&mut self, range: PageRange) {
        if self.runs.last().is_none_or(|last| last.start <= range.start) {
            return self.extend_last(Some(range));
        }
        // The runs that overlap or touch the new one become one with it.
        let from = self.runs.partition_point(|run| run.end < range.start);
        let to = self.runs.partition_point(|run| run.start <= range.end);
        let merged = match (self.runs.get(from), self.runs.get(to.wrapping_sub(1))) {
            (Some(first), Some(last)) if from < to => {
                PageRange { start: first.start.min(range.start), end: last.end.max(range.end) }
            }
            _ => range,
        };
        self.runs.splice(from..to, [merged]);
    }

    /// Takes the pages of `range` away.
    pub fn remove(&mut self, range: PageRange) {
        let from = self.runs.partition_point(|run| run.end <= range.start);
        let to = self.runs.partition_point(|run| run.start < range.end);
        if from >= to {
            return;
        }
        let left = self.runs.get(from).and_then(|run| PageRange::new(run.start, range.start));
        let right = self.runs.get(to - 1).and_then(|run| PageRange::new(range.end, run.end));
        self.runs.splice(from..to, left.into_iter().chain(right));
    }

    /// The pages of either.
    pub fn union(&self, other: &Self) -> Self {
        let (mut left, mut right) = (self.runs.iter().peekable(), other.runs.iter().peekable());
        let mut result = Self { runs: Vec::with_capacity(self.runs.len().max(other.runs.len())) };
        loop {
            let next = match (left.peek(), right.peek()) {
                (Some(a), Some(b)) if a.start <= b.start => left.next(),
                (Some(_), None) => left.next(),
                (_, Some(_)) => right.next(),
                (None, None) => return result,
            };
            result.extend_last(next.copied());
        }
    }

    /// The pages of both.
    pub fn intersect(&self, other: &Self) -> Self {
        let mut result = Self::new();
        let (mut left, mut right) = (self.runs.iter().peekable(), other.runs.iter().peekable());
        while let (Some(a), Some(b)) = (left.peek(), right.peek()) {
            result.runs.extend(a.intersect(**b));
            if a.end <= b.end {
                left.next()
            } else {
                right.next()
            };
        }
        result
    }

    /// The pages of this set that are not in `other`.
    pub fn subtract(&self, other: &Self) -> Self {
        let mut result = Self::new();
        let mut cuts = other.runs.iter().peekable();
        for run in &self.runs {
            let mut start = run.start;
            while cuts.next_if(|cut| cut.end <= start).is_some() {}
            while let Some(cut) = cuts.peek().filter(|cut| cut.start < run.end) {
                result.runs.extend(PageRange::new(start, cut.start));
                start = cut.end;
                if cut.end > run.end {
                    break;
                }
                cuts.next();
            }
            result.runs.extend(PageRange::new(start, run.end));
        }
        result
    }

    /// Adds a run that starts at or after the start of the last one.
    fn extend_last(&mut self, run: Option<PageRange>) {
        match (self.runs.last_mut(), run) {
            (Some(last), Some(run)) if run.start <= last.end => last.end = last.end.max(run.end),
            (_, run) => self.runs.extend(run),
        }
    }
}

impl FromIterator<PageRange> for RangeSet {
    fn from_iter<I: IntoIterator<Item = PageRange>>(ranges: I) -> Self {
        let mut ranges: Vec<_> = ranges.into_iter().collect();
        ranges.sort_unstable_by_key(|range| range.start);
        let mut set = Self::new();
        for range in ranges {
            set.extend_last(Some(range));
        }
        set
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    const SPAN: u64 = 64;

    fn any_range() -> impl Strategy<Value = PageRange> {
        (0..SPAN, 1..12_u64).prop_map(|(start, count)| PageRange::with_count(PageNo(start), count).unwrap())
    }

    fn any_set() -> impl Strategy<Value = RangeSet> {
        prop::collection::vec(any_range(), 0..12).prop_map(RangeSet::from_iter)
    }

    fn model(set: &RangeSet) -> BTreeSet<u64> {
        set.pages().map(|page| page.0).collect()
    }

    fn is_canonical(set: &RangeSet) -> bool {
        set.runs.windows(2).all(|pair| pair[0].end < pair[1].start)
    }

    proptest! {
        #[test]
        fn inserting_and_removing_is_what_a_set_of_pages_does(
            steps in prop::collection::vec((any::<bool>(), any_range()), 0..40),
        ) {
            let (mut set, mut expected) = (RangeSet::new(), BTreeSet::new());
            for (add, range) in steps {
                if add {
                    set.insert(range);
                    expected.extend(range.start.0..range.end.0);
                } else {
                    set.remove(range);
                    expected.retain(|page| !(range.start.0..range.end.0).contains(page));
                }
                prop_assert!(is_canonical(&set));
                prop_assert_eq!(&model(&set), &expected);
                prop_assert_eq!(set.page_count(), expected.len() as u64);
            }
        }

        #[test]
        fn set_operations_are_those_of_sets_of_pages(a in any_set(), b in any_set()) {
            let (pages_a, pages_b) = (model(&a), model(&b));
            for (result, expected) in [
                (a.union(&b), &pages_a | &pages_b),
                (a.intersect(&b), &pages_a & &pages_b),
                (a.subtract(&b), &pages_a - &pages_b),
            ] {
                prop_assert!(is_canonical(&result));
                prop_assert_eq!(model(&result), expected);
            }
            for page in 0..SPAN + 16 {
                prop_assert_eq!(a.contains(PageNo(page)), pages_a.contains(&page));
                let three = PageRange::with_count(PageNo(page), 3).unwrap();
                prop_assert_eq!(a.overlaps(three), pages_a.range(page..page + 3).next().is_some());
            }
        }
    }

    #[test]
    fn empty_and_too_high_ranges_do_not_exist() {
        assert_eq!(PageRange::new(PageNo(3), PageNo(3)), None);
        assert_eq!(PageRange::with_count(PageNo::END, 1), None);
        assert_eq!(PageRange::with_count(PageNo(1), u64::MAX), None);
        assert_eq!(PageRange::of_addresses(ADDRESS_END..ADDRESS_END + PAGE_SIZE), None);
    }

    #[test]
    fn splitting_keeps_every_page() {
        let range = PageRange::with_count(PageNo(10), 5).unwrap();
        let (head, tail) = range.split_at(3);
        assert_eq!((head.count(), tail.map(PageRange::count)), (3, Some(2)));
        assert_eq!(range.split_at(9), (range, None));
    }
}
