//! 2 MiB of one process's memory, as the store knows it.

use crate::range::{PageNo, PageRange};

/// Pages in one chunk.
pub(crate) const CHUNK_PAGES: u64 = 512;
const WORD: u64 = 64;
const WORDS: usize = (CHUNK_PAGES / WORD) as usize;

/// One bit for each page of a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Bits(pub(crate) [u64; WORDS]);

impl Bits {
    /// The bits `start..end`.
    fn of(start: u64, end: u64) -> Self {
        let mut bits = Self::default();
        for (word, first) in bits.0.iter_mut().zip((0..CHUNK_PAGES).step_by(WORD as usize)) {
            let low = start.clamp(first, first + WORD) - first;
            let high = end.clamp(first, first + WORD) - first;
            // As 128 bits, so that shifting by 64 is defined.
            *word = ((1_u128 << high) - (1_u128 << low.min(high))) as u64;
        }
        bits
    }

    pub(crate) fn is_empty(self) -> bool {
        self.0.iter().all(|word| *word == 0)
    }

    pub(crate) fn count(self) -> u64 {
        self.0.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    pub(crate) fn contains(self, bit: u64) -> bool {
        self.0.get((bit / WORD) as usize).is_some_and(|word| word & (1 << (bit % WORD)) != 0)
    }

    pub(crate) fn or(self, other: Self) -> Self {
        self.zip(other, |one, other| one | other)
    }

    pub(crate) fn and(self, other: Self) -> Self {
        self.zip(other, |one, other| one & other)
    }

    pub(crate) fn and_not(self, other: Self) -> Self {
        self.zip(other, |one, other| one & !other)
    }

    /// The first bit from `start` on that is set.
    fn next(self, start: u64) -> Option<u64> {
        let words = self.0.into_iter().zip((0..CHUNK_PAGES).step_by(WORD as usize));
        words.skip((start / WORD) as usize).find_map(|(word, first)| {
            let word = word & (u64::MAX << start.saturating_sub(first));
            (word != 0).then(|| first + u64::from(word.trailing_zeros()))
        })
    }

    fn zip(mut self, other: Self, operation: impl Fn(u64, u64) -> u64) -> Self {
        for (one, other) in self.0.iter_mut().zip(other.0) {
            *one = operation(*one, other);
        }
        self
    }
}

/// What is stored of one chunk, and where.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Chunk {
    /// Place in the data file, counted in chunks. None while every stored page is zero.
    pub(crate) slot: Option<u32>,
    /// The round in which bytes of it came last.
    pub(crate) latest: u32,
    /// Pages that are stored.
    pub(crate) present: Bits,
    /// Those of them whose bytes are in the data file; the others are zero, unless they are owed.
    pub(crate) data: Bits,
    /// Those of them whose bytes are still to come from the source.
    pub(crate) owed: Bits,
}

/// What a store has of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kept {
    /// Its bytes, in the data file.
    InFile,
    /// That it is zero.
    Zero,
    /// That it exists: its bytes are still to come.
    Owed,
}

/// Part of a range within one chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Piece {
    /// Which chunk of the address space.
    pub(crate) chunk: u64,
    pub(crate) range: PageRange,
}

impl Piece {
    /// Cuts `range` at chunk boundaries.
    pub(crate) fn of(range: PageRange) -> impl Iterator<Item = Self> {
        let mut rest = Some(range);
        std::iter::from_fn(move || {
            let whole = rest?;
            let start = whole.start().0;
            let (range, after) = whole.split_at(CHUNK_PAGES - start % CHUNK_PAGES);
            rest = after;
            Some(Self { chunk: start / CHUNK_PAGES, range })
        })
    }

    /// First page within the chunk.
    pub(crate) fn first(self) -> u64 {
        self.range.start().0 % CHUNK_PAGES
    }

    pub(crate) fn bits(self) -> Bits {
        Bits::of(self.first(), self.first() + self.range.count())
    }
}

impl Chunk {
    /// What is kept of a page that is present.
    fn kept(&self, page: u64) -> Kept {
        if self.owed.contains(page) {
            Kept::Owed
        } else if self.data.contains(page) {
            Kept::InFile
        } else {
            Kept::Zero
        }
    }

    /// The stored pages of chunk number `index`, in runs that are alike.
    pub(crate) fn runs(&self, index: u64) -> impl Iterator<Item = (PageRange, Kept)> + '_ {
        let mut page = 0;
        std::iter::from_fn(move || {
            let start = self.present.next(page)?;
            let kept = self.kept(start);
            let alike = match kept {
                Kept::Owed => self.present.and(self.owed),
                Kept::InFile => self.present.and(self.data).and_not(self.owed),
                Kept::Zero => self.present.and_not(self.data).and_not(self.owed),
            };
            page = Bits([u64::MAX; WORDS]).and_not(alike).next(start).unwrap_or(CHUNK_PAGES);
            let first = PageNo(index * CHUNK_PAGES + start);
            Some((PageRange::with_count(first, page - start)?, kept))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn bits_are_those_asked_for(start in 0..CHUNK_PAGES, count in 0..CHUNK_PAGES) {
            let end = (start + count).min(CHUNK_PAGES);
            let bits = Bits::of(start, end);
            prop_assert!((0..CHUNK_PAGES).all(|bit| bits.contains(bit) == (start..end).contains(&bit)));
            prop_assert_eq!(bits.count(), end - start);
        }

        #[test]
        fn runs_are_as_page_by_page(bits in prop::array::uniform3(prop::array::uniform8(any::<u64>()))) {
            let [present, data, owed] = bits.map(|words| Bits(words.map(|word| word & word.rotate_left(9) | word << 40)));
            let chunk = Chunk { present, data, owed, ..Chunk::default() };
            let mut found = [None; CHUNK_PAGES as usize];
            let mut end = 0;
            for (run, kept) in chunk.runs(3) {
                prop_assert!(run.start().0 >= end);
                end = run.end().0;
                (run.start().0..end).for_each(|page| found[(page - 3 * CHUNK_PAGES) as usize] = Some(kept));
            }
            let expected = (0..CHUNK_PAGES).map(|page| present.contains(page).then(|| chunk.kept(page)));
            prop_assert_eq!(expected.collect::<Vec<_>>(), found);
        }

        #[test]
        fn pieces_cover_a_range_without_crossing_chunks(start in 0..5000_u64, count in 1..5000_u64) {
            let range = PageRange::with_count(PageNo(start), count).unwrap();
            let mut next = start;
            for piece in Piece::of(range) {
                prop_assert_eq!(piece.range.start().0, next);
                prop_assert!(piece.first() + piece.range.count() <= CHUNK_PAGES);
                prop_assert_eq!(piece.chunk, next / CHUNK_PAGES);
                next = piece.range.end().0;
            }
            prop_assert_eq!(next, start + count);
        }
    }
}
