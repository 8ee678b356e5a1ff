//! What a covered process shows.

use super::*;
use proptest::prelude::*;

proptest! {
    #[test]
    fn subtraction_agrees_with_the_naive_one(
        lengths in prop::collection::vec((0u64..4, 1u64..6), 0..8),
        hidden in prop::collection::vec((0u64..60, 0u64..12), 0..8),
    ) {
        let mut at = 0;
        let mut all = Vec::new();
        for (gap, length) in lengths {
            at += gap;
            all.push(at..at + length);
            at += length;
        }
        let hidden: Vec<_> = hidden.into_iter().map(|(start, length)| start..start + length).collect();
        let expected: Vec<u64> =
            all.iter().cloned().flatten().filter(|at| !hidden.iter().any(|hide| hide.contains(at))).collect();
        let shown: Vec<u64> = subtract(&all, &hidden).into_iter().flatten().collect();
        prop_assert_eq!(shown, expected);
    }
}

#[test]
fn a_line_of_maps_without_a_range_is_an_error() {
    assert_eq!(parse_range(b"7f00-7f10"), Some(0x7f00..0x7f10));
    for bad in ["", "7f00", "7f10-7f00", "zz-7f", "\u{fffd}"] {
        assert_eq!(parse_range(bad.as_bytes()), None, "{bad:?}");
    }
}

#[test]
fn a_covered_process_shows_only_what_is_not_hidden() {
    let (Ok(criu), Ok(true)) = (Criu::find(), fs::exists(DEFAULT_PARENT)) else {
        panic!("this test needs criu and {DEFAULT_PARENT}: see deploy/setup");
    };
    let pages = vec![1u8; 64 * PAGE_SIZE as usize];
    let start = (pages.as_ptr() as u64).next_multiple_of(PAGE_SIZE);
    let mut mask = PagemapMask::prepare(&criu, Path::new(DEFAULT_PARENT)).unwrap();
    let dir = mask.dir.clone();
    // As a process that died would leave it; the mask in use stays when it is swept.
    let stale = Path::new(DEFAULT_PARENT).join(format!("{DIR_PREFIX}stale-{}", std::process::id()));
    fs::create_dir(&stale).unwrap();
    drop(PagemapMask::prepare(&criu, Path::new(DEFAULT_PARENT)).unwrap());
    assert!(!stale.exists() && dir.exists());
    let hidden = start + 8 * PAGE_SIZE..start + 16 * PAGE_SIZE;
    let pid = std::process::id() as i32;
    mask.cover(pid, std::slice::from_ref(&hidden)).unwrap();
    let masked = File::open(dir.join(pid.to_string())).unwrap();
    for page in 0..63 {
        let mut entry = [0; 8];
        let address = start + page * PAGE_SIZE;
        masked.read_exact_at(&mut entry, address / PAGE_SIZE * ENTRY).unwrap();
        let present = u64::from_le_bytes(entry) >> 63 == 1;
        assert_eq!(present, !hidden.contains(&address), "page {page}");
    }
    // Its mappings are many enough for the kernel's counts of their pages to be left out.
    let smaps = fs::read_to_string(dir.join(format!("{pid}.smaps"))).unwrap();
    assert!(smaps.contains("[stack]") && smaps.contains("VmFlags: rd") && !smaps.contains("Rss:"));
    drop(mask);
    assert!(!dir.exists());
    drop(pages);
}
