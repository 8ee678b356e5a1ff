//! In which of the last eight rounds each page was written.

use std::collections::BTreeMap;

use crate::range::{PageNo, PageRange, RangeSet};

/// Rounds that are remembered.
pub const ROUNDS: u8 = 8;

/// Pages that share one allocation: 512 bytes for 2 MiB of memory.
const CHUNK: u64 = 512;

/// In which rounds a page was written: the lowest bit is the latest round.
pub type Pattern = u8;

/// How many pages there are of each pattern.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Census([u64; 256]);

impl Default for Census {
    fn default() -> Self {
        Self([0; 256])
    }
}

impl Census {
    /// Counts `pages` more of `pattern`.
    pub fn add(&mut self, pattern: Pattern, pages: u64) {
        if let Some(count) = self.0.get_mut(usize::from(pattern)) {
            *count += pages;
        }
    }

    /// Pages of `pattern`.
    pub fn count(&self, pattern: Pattern) -> u64 {
        self.0.get(usize::from(pattern)).copied().unwrap_or(0)
    }

    /// Takes one of `pattern` away, if there is one.
    pub fn take(&mut self, pattern: Pattern) -> bool {
        let Some(count) = self.0.get_mut(usize::from(pattern)).filter(|count| **count > 0) else {
            return false;
        };
        *count -= 1;
        true
    }

    /// Each pattern with its number of pages.
    pub fn iter(&self) -> impl Iterator<Item = (Pattern, u64)> + '_ {
        (0..=Pattern::MAX).zip(self.0.iter().copied())
    }

    /// All pages.
    pub fn total(&self) -> u64 {
        self.0.iter().sum()
    }
}

/// One byte for each page that was written lately: a shift register whose lowest bit is the latest round. Where nothing
/// was written for eight rounds, nothing is kept.
#[derive(Debug, Clone, Default)]
pub struct History {
    chunks: BTreeMap<u64, Box<[Pattern]>>,
}

impl History {
    /// Remembers one more round, in which the pages of `written` were written.
    pub fn advance(&mut self, written: &RangeSet) {
        self.chunks.retain(|_, rounds| {
            rounds.iter_mut().for_each(|page| *page <<= 1);
            rounds.iter().any(|page| *page != 0)
        });
        for (number, part) in written.iter().flat_map(parts) {
            let chunk = self.chunks.entry(number).or_insert_with(|| vec![0; CHUNK as usize].into());
            for rounds in slice_mut(chunk, part) {
                *rounds |= 1;
            }
        }
    }

    /// In which of the last rounds `page` was written.
    pub fn pattern(&self, page: PageNo) -> Pattern {
        let chunk = self.chunks.get(&(page.0 / CHUNK));
        chunk.and_then(|chunk| chunk.get((page.0 % CHUNK) as usize)).copied().unwrap_or(0)
    }

    /// In how many of the last `window` rounds (at most [`ROUNDS`]) `page` was written.
    pub fn dirty_rounds(&self, page: PageNo, window: u8) -> u8 {
        count(self.pattern(page), window)
    }

    /// Counts the pages of `of` by their patterns.
    pub fn tally(&self, of: &RangeSet, census: &mut Census) {
        for (number, part) in of.iter().flat_map(parts) {
            match self.chunks.get(&number) {
                None => census.add(0, part.count()),
                Some(chunk) => slice(chunk, part).iter().for_each(|pattern| census.add(*pattern, 1)),
            }
        }
    }

    /// The pages of `of` in runs of one pattern, ascending.
    pub fn runs(&self, of: &RangeSet) -> Vec<(Pattern, PageRange)> {
        let mut runs: Vec<(Pattern, PageRange)> = Vec::new();
        for (number, part) in of.iter().flat_map(parts) {
            let Some(chunk) = self.chunks.get(&number) else {
                runs.push((0, part));
                continue;
            };
            let mut start = part.start();
            for alike in slice(chunk, part).chunk_by(|a, b| a == b) {
                let run = PageRange::with_count(start, alike.len() as u64);
                runs.extend(alike.first().copied().zip(run));
                start = PageNo(start.0 + alike.len() as u64);
            }
        }
        runs
    }

    /// The pages of `of` whose pattern `choose` wants. It is asked once for each, in ascending order.
    pub fn select(&self, of: &RangeSet, mut choose: impl FnMut(Pattern) -> bool) -> RangeSet {
        let mut chosen = RangeSet::new();
        for (number, part) in of.iter().flat_map(parts) {
            let chunk = self.chunks.get(&number).map_or(&[][..], |chunk| slice(chunk, part));
            let patterns = chunk.iter().copied().chain(std::iter::repeat(0));
            for (page, pattern) in (part.start().0..part.end().0).zip(patterns) {
                if choose(pattern) {
                    PageRange::with_count(PageNo(page), 1).into_iter().for_each(|page| chosen.insert(page));
                }
            }
        }
        chosen
    }
}

/// In how many of the last `window` rounds of a pattern a page was written.
pub(crate) fn count(pattern: Pattern, window: u8) -> u8 {
    let seen = Pattern::MAX.checked_shr(u32::from(ROUNDS.saturating_sub(window))).unwrap_or(0);
    (pattern & seen).count_ones() as u8
}

/// A run cut at the borders of chunks, with the numbers of the chunks.
fn parts(run: PageRange) -> impl Iterator<Item = (u64, PageRange)> {
    let mut rest = Some(run);
    std::iter::from_fn(move || {
        let (part, after) = rest?.split_at(CHUNK - rest?.start().0 % CHUNK);
        rest = after;
        Some((part.start().0 / CHUNK, part))
    })
}

fn place(part: PageRange) -> std::ops::Range<usize> {
    let start = part.start().0 % CHUNK;
    start as usize..(start + part.count()) as usize
}

fn slice(chunk: &[Pattern], part: PageRange) -> &[Pattern] {
    chunk.get(place(part)).unwrap_or_default()
}

fn slice_mut(chunk: &mut [Pattern], part: PageRange) -> &mut [Pattern] {
    chunk.get_mut(place(part)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn set(pages: impl IntoIterator<Item = u64>) -> RangeSet {
        pages.into_iter().filter_map(|page| PageRange::with_count(PageNo(page), 1)).collect()
    }

    /// Rounds of pages around two borders of chunks, and far away.
    fn any_rounds() -> impl Strategy<Value = Vec<BTreeSet<u64>>> {
        let page = prop_oneof![500..530_u64, 1020..1030_u64, Just(1 << 30)];
        prop::collection::vec(prop::collection::btree_set(page, 0..30), 0..20)
    }

    fn remembered(rounds: &[BTreeSet<u64>]) -> History {
        let mut history = History::default();
        rounds.iter().for_each(|written| history.advance(&set(written.iter().copied())));
        history
    }

    /// What a list of rounds says of a page.
    fn naive(rounds: &[BTreeSet<u64>], page: u64) -> Pattern {
        let latest = rounds.iter().rev().take(ROUNDS.into()).enumerate();
        latest.filter(|(_, written)| written.contains(&page)).map(|(age, _)| 1 << age).sum()
    }

    proptest! {
        #[test]
        fn it_counts_as_a_list_of_rounds_would(rounds in any_rounds(), window in 0..=8_u8) {
            let history = remembered(&rounds);
            for page in (498..532).chain(1018..1032).chain([1 << 30, (1 << 30) + 1]) {
                prop_assert_eq!(history.pattern(PageNo(page)), naive(&rounds, page));
                let latest = rounds.iter().rev().take(window.into());
                let expected = latest.filter(|written| written.contains(&page)).count();
                prop_assert_eq!(usize::from(history.dirty_rounds(PageNo(page), window)), expected);
            }
        }

        #[test]
        fn it_selects_and_tallies_as_one_page_after_the_other_would(
            rounds in any_rounds(),
            of in prop::collection::btree_set(490..1040_u64, 0..300),
            wanted: Vec<Pattern>,
        ) {
            let (history, pages) = (remembered(&rounds), set(of.iter().copied()));
            let chosen = history.select(&pages, |pattern| wanted.contains(&pattern));
            let naively = of.iter().copied().filter(|page| wanted.contains(&naive(&rounds, *page)));
            prop_assert_eq!(chosen, set(naively));
            let (mut census, mut expected) = (Census::default(), Census::default());
            history.tally(&pages, &mut census);
            of.iter().for_each(|page| expected.add(naive(&rounds, *page), 1));
            prop_assert_eq!(census, expected);
        }

        #[test]
        fn what_was_not_written_for_eight_rounds_costs_nothing(rounds in any_rounds()) {
            let mut history = remembered(&rounds);
            (0..ROUNDS).for_each(|_| history.advance(&RangeSet::new()));
            prop_assert!(history.chunks.is_empty());
        }
    }
}
