//! Frames there and back, and what is none.

use super::*;
use proptest::prelude::*;

/// Ascending runs, built from gaps and lengths, with at most 60 pages of data.
fn any_runs() -> impl Strategy<Value = Vec<Run>> {
    let step = (0..1000_u64, 1..6_u64, 0..=Parts::ALL.0, any::<bool>());
    prop::collection::vec(step, 0..12).prop_map(|steps| {
        let mut next = 5;
        let mut runs = Vec::new();
        for (gap, count, parts, huge) in steps {
            let count = if parts == 0 && huge { count * 100_000 } else { count };
            let range = PageRange::with_count(PageNo(next + gap), count).unwrap();
            runs.push(Run { range, parts: Parts(parts) });
            next += gap + count;
        }
        runs
    })
}

fn label() -> Label {
    Label::new(b"heap\xff")
}

fn encoded(runs: &[Run]) -> (Vec<u8>, Vec<u8>) {
    let parts: usize = runs.iter().map(|run| run.range.count() as usize * run.parts.count()).sum();
    let data: Vec<u8> = (0..parts * PART_BYTES).map(|index| (index / 7) as u8).collect();
    let mut bytes = vec![0; HEADER];
    bytes.extend(&data);
    let (vpid, generation, label) = (Vpid::of_object(7), Generation(1 << 40), &label());
    let head = BatchHead { vpid, generation, label, round: 3, runs };
    head.complete(Codec::Raw, &mut bytes);
    (bytes, data)
}

proptest! {
    #[test]
    fn a_batch_comes_back_as_it_was(runs in any_runs()) {
        let (bytes, data) = encoded(&runs);
        let batch = Batch::decode(&bytes).unwrap();
        prop_assert_eq!((batch.vpid, batch.generation, batch.round), (Vpid::of_object(7), Generation(1 << 40), 3));
        prop_assert_eq!(&batch.label, &label());
        prop_assert_eq!(&batch.runs, &runs);
        prop_assert_eq!(&*batch.data, &data);
        let joined: Vec<u8> = batch.pieces().flat_map(|(_, bytes)| bytes.to_vec()).collect();
        prop_assert_eq!(joined, data);
    }

    #[test]
    fn a_batch_cut_short_or_grown_is_refused(runs in any_runs(), at in any::<prop::sample::Index>()) {
        let (mut bytes, _) = encoded(&runs);
        prop_assert!(Batch::decode(&bytes[..at.index(bytes.len())]).is_err());
        bytes.push(0);
        prop_assert!(Batch::decode(&bytes).is_err());
    }

    #[test]
    fn a_damaged_batch_never_panics_and_never_breaks_its_promises(
        runs in any_runs(),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let (mut bytes, data) = encoded(&runs);
        // Damage to data is the checksum's to find; here it is header and runs that matter.
        for (index, value) in damage {
            let outside = index.index(bytes.len() - data.len());
            let at = if outside < HEADER { outside } else { outside + data.len() };
            bytes[at] = value;
        }
        let Ok(batch) = Batch::decode(&bytes) else { return Ok(()) };
        prop_assert!(batch.runs.windows(2).all(|pair| pair[0].range.end() <= pair[1].range.start()));
        for (run, bytes) in batch.pieces() {
            prop_assert_eq!(bytes.len(), run.range.count() as usize * run.parts.count() * PART_BYTES);
        }
    }

    #[test]
    fn garbage_is_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        prop_assert!(Batch::decode(&bytes).is_err());
        prop_assert!(ManifestPart::decode(&bytes).is_err());
    }

    #[test]
    fn a_manifest_part_comes_back_as_it_was(runs in any_runs(), last in any::<bool>()) {
        let ranges = runs.iter().map(|run| run.range).collect();
        let vpid = Vpid::of_object(1);
        let part = ManifestPart { vpid, generation: Generation(2), label: label(), last, ranges };
        let bytes = part.encode();
        prop_assert_eq!(ManifestPart::decode(&bytes).unwrap(), part);
        prop_assert!(ManifestPart::decode(&bytes[..bytes.len() - 1]).is_err());
        prop_assert_eq!(Batch::decode(&bytes), Err(FrameError::Magic));
    }
}

#[test]
fn a_zero_run_costs_its_header_only_and_long_ones_are_split() {
    let range = PageRange::with_count(PageNo(1), 3 * MAX_RUN_PAGES).unwrap();
    let (bytes, _) = encoded(&[Run { range, parts: Parts::NONE }]);
    assert_eq!(bytes.len(), HEADER + 3 * RUN + label().as_bytes().len());
    assert_eq!(Batch::decode(&bytes).unwrap().runs.len(), 3);
}

#[test]
fn more_data_than_allowed_and_overlapping_runs_are_refused() {
    let run =
        |start, count| Run { range: PageRange::with_count(PageNo(start), count).unwrap(), parts: Parts::ALL };
    let (bytes, _) = encoded(&[run(1, MAX_DATA_PAGES as u64), run(1000, 1)]);
    assert_eq!(Batch::decode(&bytes), Err(FrameError::TooMany));
    let (bytes, _) = encoded(&[run(10, 2), run(11, 2)]);
    assert_eq!(Batch::decode(&bytes), Err(FrameError::Run { index: 1 }));
    let (mut bytes, _) = encoded(&[run(10, 2)]);
    bytes[11] = 0;
    assert_eq!(Batch::decode(&bytes), Err(FrameError::Reserved), "a process with a label");
    let (mut bytes, _) = encoded(&[run(10, 2)]);
    bytes[4] = 9;
    assert_eq!(Batch::decode(&bytes), Err(FrameError::Codec(CodecError::Unknown(9))));
}
