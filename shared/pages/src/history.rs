//! In which of the last eight rounds each page was dirty.

use std::collections::BTreeMap;

use crate::range::{PageNo, RangeSet};

/// Rounds that are remembered.
pub const ROUNDS: u8 = 8;

/// Pages that share one allocation: 512 bytes for 2 MiB of memory.
const CHUNK: u64 = 512;

/// One byte for each page that was dirty lately: a shift register whose lowest bit is the latest round.
#[derive(Debug, Clone, Default)]
pub struct History {
    chunks: BTreeMap<u64, Box<[u8]>>,
}

impl History {
    /// Remembers one more round, in which the pages of `dirty` were dirty.
    pub fn advance(&mut self, dirty: &RangeSet) {
        self.chunks.retain(|_, rounds| {
            rounds.iter_mut().for_each(|page| *page <<= 1);
            rounds.iter().any(|page| *page != 0)
        });
        for page in dirty.pages() {
            let chunk = self.chunks.entry(page.0 / CHUNK).or_insert_with(|| vec![0; CHUNK as usize].into());
            if let Some(rounds) = chunk.get_mut((page.0 % CHUNK) as usize) {
                *rounds |= 1;
            }
        }
    }

    /// In how many of the last `window` rounds (at most [`ROUNDS`]) `page` was dirty.
    pub fn dirty_rounds(&self, page: PageNo, window: u8) -> u8 {
        let rounds =
            self.chunks.get(&(page.0 / CHUNK)).and_then(|chunk| chunk.get((page.0 % CHUNK) as usize));
        let seen = u8::MAX.checked_shr(u32::from(ROUNDS.saturating_sub(window))).unwrap_or(0);
        rounds.map_or(0, |rounds| (rounds & seen).count_ones() as u8)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::range::PageRange;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn it_counts_as_a_list_of_rounds_would(
            rounds in prop::collection::vec(prop::collection::btree_set(500..530_u64, 0..30), 0..20),
            window in 0..=8_u8,
        ) {
            let mut history = History::default();
            for dirty in &rounds {
                history.advance(&dirty.iter().filter_map(|page| PageRange::with_count(PageNo(*page), 1)).collect());
            }
            for page in 498..532 {
                let latest = rounds.iter().rev().take(window.into());
                let expected = latest.filter(|dirty| dirty.contains(&page)).count();
                prop_assert_eq!(usize::from(history.dirty_rounds(PageNo(page), window)), expected);
            }
        }
    }
}
