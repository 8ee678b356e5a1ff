//! Pages as names of other pages, as bytes.
//!
//! ```text
//! named      magic "HPN2", 0 u32, vpid u32, round u32, generation u64, words u24, label length u8, 16 u32,
//!            vpid of the others u32, 0 u32, their generation u64, then two u64 for each run, then label
//! run        bits 0-35 first page, bits 36-62 number of pages, 1 to 256; then the first of the pages that they equal
//! ```
//! The target copies what it has of the others when it has stored all batches of the round, run by run in the order in
//! which they come: a run may name pages that a run before it has filled, but none of its own.

use crate::frame::{Body, FrameError, HEADER, Header, MAX_RUNS, PAGE_BITS, RUN};
use crate::object::Label;
use crate::process::{Generation, Vpid};
use crate::range::{PageNo, PageRange};

const MAGIC: [u8; 4] = *b"HPN2";
const OTHERS: usize = 16;
/// Pages in one run, at most.
pub(crate) const MAX_NAMED_RUN: u64 = 256;

/// Whose a page is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Owner {
    pub(crate) vpid: Vpid,
    pub(crate) generation: Generation,
}

/// Adjacent pages that equal adjacent pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct NamedRun {
    pub(crate) pages: PageRange,
    /// The first of those that they equal.
    pub(crate) like: PageNo,
}

/// Pages of one process that equal pages of one process, decoded and checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Named {
    pub(crate) of: Owner,
    /// What the first is called, if it is shared memory.
    pub(crate) label: Label,
    pub(crate) like: Owner,
    pub(crate) round: u32,
    pub(crate) runs: Vec<NamedRun>,
}

impl Named {
    /// In as many frames as it takes.
    pub(crate) fn encode(
        of: Owner,
        label: &Label,
        like: Owner,
        round: u32,
        runs: &[NamedRun],
    ) -> Vec<Vec<u8>> {
        let frame = |runs: &[NamedRun]| {
            let mut bytes = vec![0; HEADER];
            bytes.extend(like.vpid.0.to_le_bytes());
            bytes.extend([0; 4]);
            bytes.extend(like.generation.0.to_le_bytes());
            for run in runs {
                bytes.extend((run.pages.start().0 | run.pages.count() << PAGE_BITS).to_le_bytes());
                bytes.extend(run.like.0.to_le_bytes());
            }
            let Owner { vpid, generation } = of;
            let words = 2 * runs.len() as u32;
            let (third, data) = (round, OTHERS as u32);
            let header = Header { first: 0, vpid, third, generation, runs: words, data, label: 0 };
            header.complete(label, &mut bytes, MAGIC);
            bytes
        };
        runs.chunks(MAX_RUNS / 2).map(frame).collect()
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, FrameError> {
        let header = Header::decode(bytes, MAGIC)?;
        let Body { data: like, runs: words, label } = header.body(bytes)?;
        let wrong = FrameError::Length { expected: OTHERS, found: like.len() };
        let (&[vpid, reserved, low, high], []) = like.as_chunks::<4>() else { return Err(wrong) };
        if header.first != 0 || reserved != [0; 4] || header.runs % 2 != 0 {
            return Err(FrameError::Reserved);
        }
        let number = u32::from_le_bytes;
        let generation = Generation(u64::from(number(low)) | u64::from(number(high)) << 32);
        let like = Owner { vpid: Vpid(number(vpid)), generation };
        let of = Owner { vpid: header.vpid, generation: header.generation };
        let (words, _) = words.as_chunks::<{ 2 * RUN }>();
        let run = |(index, word): (usize, &[u8; 2 * RUN])| {
            let (first, second) = word.split_at(RUN);
            let word = |bytes: &[u8]| u64::from_le_bytes(bytes.first_chunk().copied().unwrap_or_default());
            let (first, like) = (word(first), PageNo(word(second)));
            let count = first >> PAGE_BITS;
            let pages = PageRange::with_count(PageNo(first & ((1 << PAGE_BITS) - 1)), count);
            let there = PageRange::with_count(like, count);
            let fits = count <= MAX_NAMED_RUN && there.is_some();
            let pages = pages.filter(|_| fits).ok_or(FrameError::Run { index })?;
            Ok(NamedRun { pages, like })
        };
        let runs: Result<Vec<NamedRun>, FrameError> = words.iter().enumerate().map(run).collect();
        Ok(Self { of, label, like, round: header.third, runs: runs? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const OF: Owner = Owner { vpid: Vpid(7), generation: Generation(1 << 40) };
    const LIKE: Owner = Owner { vpid: Vpid(9), generation: Generation(3) };

    fn any_run() -> impl Strategy<Value = NamedRun> {
        (0..1_u64 << 30, 1..=MAX_NAMED_RUN, 0..1_u64 << 30).prop_map(|(start, count, like)| NamedRun {
            pages: PageRange::with_count(PageNo(start), count).unwrap(),
            like: PageNo(like),
        })
    }

    proptest! {
        #[test]
        fn names_come_back_as_they_were_and_damage_does_no_harm(
            runs in prop::collection::vec(any_run(), 1..40),
            at in any::<prop::sample::Index>(),
            value in any::<u8>(),
        ) {
            let label = Label::new(b"some");
            let of = Owner { vpid: Vpid::of_object(7), ..OF };
            let frames = Named::encode(of, &label, LIKE, 5, &runs);
            prop_assert_eq!(frames.len(), 1);
            let named = Named { of, label, like: LIKE, round: 5, runs };
            prop_assert_eq!(&Named::decode(&frames[0]).unwrap(), &named);
            let mut bytes = frames[0].clone();
            prop_assert!(Named::decode(&bytes[..at.index(bytes.len())]).is_err());
            let at = at.index(bytes.len());
            bytes[at] = value;
            if let Ok(named) = Named::decode(&bytes) {
                prop_assert!(named.runs.iter().all(|run| run.pages.count() <= MAX_NAMED_RUN));
            }
        }
    }

    #[test]
    fn runs_that_are_too_long_or_out_of_memory_are_refused() {
        for (count, like) in [(MAX_NAMED_RUN + 1, 0), (2, PageNo::END.0 - 1)] {
            let pages = PageRange::with_count(PageNo(1), count).unwrap();
            let frames =
                Named::encode(OF, &Label::default(), LIKE, 1, &[NamedRun { pages, like: PageNo(like) }]);
            assert_eq!(Named::decode(&frames[0]), Err(FrameError::Run { index: 0 }));
        }
    }
}
