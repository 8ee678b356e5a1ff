//! Against a real store: whatever pages do, what is sifted and stored in any order is what was read.

use super::*;
use crate::frame::Batch;
use crate::gather::tests::batch_at;
use crate::manifest::{FinalManifest, ManifestProcess};
use crate::process::{Generation, Vpid};
use crate::range::RangeSet;
use crate::sealed::SealedStore;
use crate::store::StoreLimits;
use crate::target::TargetEngine;
use proptest::prelude::*;
use std::collections::BTreeMap;

const PAGES: u64 = 200;
/// Bytes of a leaf, and of its place in the map.
const LEAF_BYTES: u64 = LEAF_PAGES * size_of::<Account>() as u64 + 120;

fn page(content: u8) -> [u8; PAGE_BYTES] {
    let mut page = [content; PAGE_BYTES];
    if content > 0 {
        page[PAGE_BYTES - 1] = 77;
    }
    page
}

/// As [`page`], with the parts in `parts`, bit by bit, of another content.
fn patched(content: u8, parts: u8) -> [u8; PAGE_BYTES] {
    let mut page = page(content);
    let other = |at: &usize| parts & 1 << (at / PART_BYTES) != 0;
    (0..PAGE_BYTES).step_by(PART_BYTES / 2).filter(other).for_each(|at| page[at] = 99);
    page
}

/// What one round reads: of which process, which pages, with what content; and whether batches are looked at.
#[derive(Debug, Clone)]
struct Round {
    writes: Vec<(u32, u64, (u8, u8))>,
    looked_at: bool,
    order: usize,
}

fn any_round() -> impl Strategy<Value = Round> {
    let content = (0..6_u8, prop_oneof![Just(0_u8), 0..1_u8 << PARTS]);
    let write = (1..4_u32, 0..PAGES / 4, content);
    (prop::collection::vec(write, 1..60), prop::bool::weighted(0.8), 0..7_usize)
        .prop_map(|(writes, looked_at, order)| Round { writes, looked_at, order })
}

proptest! {
    #[test]
    fn the_target_ends_with_what_was_read(rounds in prop::collection::vec(any_round(), 1..8)) {
        let dir = tempfile::tempdir().unwrap();
        let mut target = TargetEngine::create(&dir.path().join("store"), StoreLimits::default()).unwrap();
        let mut known = Known::new(0);
        let mut truth: BTreeMap<(u32, u64), (u8, u8)> = BTreeMap::new();
        for (number, round) in (1..).zip(&rounds) {
            let read: BTreeMap<(u32, u64), (u8, u8)> =
                round.writes.iter().map(|(vpid, at, content)| ((*vpid, *at), *content)).collect();
            truth.extend(&read);
            let mut frames = Vec::new();
            for ((vpid, at), content) in &read {
                let batch = batch_at(Vpid(*vpid), number, PageNo(1000 + at), &[patched(content.0, content.1)]);
                if round.looked_at {
                    let sifted = known.sift(batch);
                    let gone = sifted.batch.data_pages() + sifted.batch.zero_pages();
                    prop_assert_eq!(gone + sifted.unchanged + sifted.named, 1);
                    frames.push(sifted.batch.into_frame());
                } else {
                    known.pass(&batch);
                    frames.push(batch.into_frame());
                }
            }
            let middle = round.order % frames.len();
            frames.rotate_left(middle);
            frames.reverse();
            for frame in frames {
                target.store(&Batch::decode(&frame).unwrap()).unwrap();
            }
            for named in known.take_named() {
                target.copy(&named).unwrap();
            }
        }
        let mut manifest = FinalManifest::default();
        for (vpid, at) in truth.keys() {
            let one = PageRange::with_count(PageNo(1000 + at), 1).unwrap();
            let entry = manifest.processes.entry(Vpid(*vpid)).or_insert(ManifestProcess {
                generation: Generation(9),
                label: Label::default(),
                pages: RangeSet::new(),
            });
            entry.pages.insert(one);
        }
        target.finish(&manifest).unwrap();
        let sealed = SealedStore::open(&dir.path().join("store")).unwrap();
        for ((vpid, at), content) in truth {
            let mut there = [1; PAGE_BYTES];
            let one = PageRange::with_count(PageNo(1000 + at), 1).unwrap();
            sealed.read_into(Vpid(vpid), one, &mut there).unwrap();
            prop_assert!(there == patched(content.0, content.1), "page {at} of {vpid} is not {content:?}");
        }
    }
}

fn sift(known: &mut Known, vpid: u32, round: u32, contents: &[u8]) -> (u64, u64, u64) {
    let pages: Vec<_> = contents.iter().map(|content| page(*content)).collect();
    let sifted = known.sift(batch_at(Vpid(vpid), round, PageNo(100), &pages));
    (sifted.batch.data_pages(), sifted.unchanged, sifted.named)
}

#[test]
fn what_was_written_and_not_changed_stays_and_what_was_zeroed_between_goes_again() {
    let mut known = Known::new(0);
    assert_eq!(sift(&mut known, 1, 1, &[1, 2, 3]), (3, 0, 0));
    assert_eq!(sift(&mut known, 1, 2, &[1, 9, 3]), (1, 2, 0));
    assert_eq!(sift(&mut known, 1, 3, &[1, 0, 3]), (0, 2, 0));
    assert_eq!(sift(&mut known, 1, 4, &[1, 9, 3]), (1, 2, 0));
    assert!(known.take_named().is_empty());
}

#[test]
fn of_a_page_only_the_parts_that_changed_go() {
    let mut known = Known::new(0);
    let mut sift = |round, pages: &[[u8; PAGE_BYTES]]| {
        let batch = known.sift(batch_at(Vpid(1), round, PageNo(100), pages)).batch;
        (batch.data_pages(), batch.partial_pages(), batch.data().to_vec())
    };
    assert_eq!(sift(1, &[page(1), page(2)]), (2, 0, [page(1), page(2)].concat()));
    let changed = [patched(1, 0b0110), patched(2, 0b1000)];
    let parts = [&changed[0][PART_BYTES..3 * PART_BYTES], &changed[1][3 * PART_BYTES..]];
    assert_eq!(sift(2, &changed), (2, 2, parts.concat()));
    assert_eq!(sift(3, &[page(5), changed[1]]), (1, 0, page(5).to_vec()));
}

#[test]
fn parts_of_a_page_that_the_target_lacks_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let target = |name| TargetEngine::create(&dir.path().join(name), StoreLimits::default()).unwrap();
    let mut known = Known::new(0);
    let whole = known.sift(batch_at(Vpid(1), 1, PageNo(100), &[page(1), page(0)])).batch.into_frame();
    let parts = known.sift(batch_at(Vpid(1), 2, PageNo(100), &[patched(1, 1)])).batch.into_frame();
    assert!(target("without").apply(&parts).is_err());
    let mut with = target("with");
    with.apply(&whole).unwrap();
    with.apply(&parts).unwrap();
}

#[test]
fn a_forked_process_goes_as_names_in_few_runs() {
    let mut known = Known::new(0);
    let contents: Vec<u8> = (1..=200).collect();
    assert_eq!(sift(&mut known, 1, 1, &contents), (200, 0, 0));
    assert_eq!(sift(&mut known, 2, 1, &contents), (0, 0, 200));
    let named = known.take_named();
    assert_eq!(named.len(), 1);
    assert_eq!(Named::decode(&named[0]).unwrap().runs.len(), 1);
    assert!(known.take_named().is_empty());
}

#[test]
fn what_may_still_change_in_the_round_is_not_named() {
    let mut known = Known::new(0);
    assert_eq!(sift(&mut known, 2, 1, &[5, 6]), (2, 0, 0));
    // Process 2 may come later in this round.
    assert_eq!(sift(&mut known, 1, 2, &[5, 6]), (2, 0, 0));
    assert_eq!(sift(&mut known, 2, 2, &[5, 7]), (1, 1, 0));
}

#[test]
fn without_room_everything_goes() {
    let mut known = Known { most_leaves: 1, ..Known::new(0) };
    let contents: Vec<u8> = (1..=200).collect();
    assert_eq!(sift(&mut known, 1, 1, &contents), (200, 0, 0));
    assert_eq!(sift(&mut known, 1, 2, &contents), (200 - 28, 28, 0));
    assert_eq!(sift(&mut known, 2, 2, &contents), (200 - 28, 0, 28), "a name needs no room");
}

#[test]
fn the_account_takes_little_of_the_memory() {
    for memory in [1_u64 << 30, 5 << 30] {
        let known = Known::new(memory);
        let bytes = known.most_leaves as u64 * LEAF_BYTES
            + known.places.len() as u64 * 8
            + (known.most_named * size_of::<(u32, u32, NamedRun)>() * 2) as u64;
        assert!(bytes <= memory / 1000 * 12, "{bytes} of {memory}");
        assert!(known.most_leaves as u64 * LEAF_PAGES * PAGE_BYTES as u64 >= memory);
    }
}

#[test]
fn a_name_of_a_page_that_the_target_lacks_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut target = TargetEngine::create(&dir.path().join("store"), StoreLimits::default()).unwrap();
    let mut known = Known::new(0);
    sift(&mut known, 1, 1, &[1, 2]);
    sift(&mut known, 2, 1, &[1, 2]);
    for named in known.take_named() {
        assert!(target.copy(&named).is_err());
    }
}
