//! What goes of files that are compared block by block.

use std::fs::File;
use std::os::unix::fs::FileExt;

use proptest::prelude::*;

use super::*;

const MIB: usize = 1 << 20;

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever was written where, to files with holes.
    #[test]
    fn of_files_that_are_all_forced_only_changed_blocks_go(
        sizes in proptest::collection::vec(prop_oneof![0..12 * MIB, 0..20usize << 10], 1..4),
        grown in 0..3 * MIB,
        writes in proptest::collection::vec((0..12 * MIB, 1..40_000usize), 0..12),
        seed in any::<u64>(),
    ) {
        let mut pair = Pair::fine();
        let name = |index: usize| format!("file-{index}");
        for (index, size) in sizes.iter().enumerate() {
            let content = noise(*size / 2, seed ^ index as u64);
            let file = File::create(pair.from(&name(index))).unwrap();
            // The first quarter is a hole.
            file.write_all_at(&content, *size as u64 / 4).unwrap();
            file.set_len(*size as u64).unwrap();
        }
        let base = pair.pass().base;
        prop_assert_eq!(base.files().len(), sizes.len());
        let file = |root: PathBuf| File::options().write(true).open(root).unwrap();
        let mut changed = 0;
        for (number, (at, length)) in writes.iter().enumerate() {
            let index = number % sizes.len();
            let at = (*at).min(sizes[index]);
            file(pair.from(&name(index))).write_all_at(&noise(*length, seed ^ 77), at as u64).unwrap();
            changed += (at + length).div_ceil(16 << 10) - at / (16 << 10);
        }
        let first = file(pair.from(&name(0)));
        let length = first.metadata().unwrap().len();
        first.set_len(length + grown as u64).unwrap();
        let pass = pair.pass_with(&base.files(), |_| {});
        prop_assert_eq!(pass.totals.patched as usize, sizes.len(), "every file is looked into");
        // A block that held its file's end may have got longer, and each file has one.
        let most = (changed + sizes.len() * 2) as u64 * (16 << 10);
        prop_assert!(pass.totals.data_bytes <= most, "{} of at most {most} bytes", pass.totals.data_bytes);
        pair.assert_same();
        let again = pair.pass_with(&pass.base.files(), |_| {});
        prop_assert_eq!(again.totals.data_bytes, 0);
        pair.assert_same();
    }
}
