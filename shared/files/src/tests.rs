//! Real trees, as root, on the file system that holds temporary files.

mod blocks;
mod compare;
mod hostile;
mod overlay;
mod passes;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use tempfile::TempDir;

use crate::source::{Block, Scope};
use crate::{Applier, Base, Pass, PassReport, RelPath, RootId, Source, Targets};

/// A source and a target directory, and what stands between them.
struct Pair {
    dir: TempDir,
    source: Source,
    targets: Targets,
    base: Option<Base>,
}

fn id() -> RootId {
    RootId::new("volume:test").unwrap()
}

impl Pair {
    fn new() -> Self {
        Self::scoped(Scope::Tree)
    }

    /// As for files in memory.
    fn fine() -> Self {
        let mut pair = Self::new();
        pair.source = Source::new(id(), &pair.from(""), Scope::Tree).in_blocks(Block::Fine);
        pair
    }

    fn scoped(scope: Scope) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let pair = Self {
            source: Source::new(id(), &dir.path().join("source"), scope),
            targets: Targets::default(),
            base: None,
            dir,
        };
        std::fs::create_dir(pair.from("")).unwrap();
        std::fs::create_dir(pair.to("")).unwrap();
        pair.targets.add(id(), &pair.to(""));
        pair
    }

    fn from(&self, path: &str) -> PathBuf {
        self.dir.path().join("source").join(path)
    }

    fn to(&self, path: &str) -> PathBuf {
        self.dir.path().join("target").join(path)
    }

    /// A pass, whose report must say what was sent.
    fn pass(&mut self) -> Pass {
        self.pass_with(&BTreeSet::new(), |_| {})
    }

    /// A pass during which something happens after each frame.
    fn pass_with(&mut self, forced: &BTreeSet<RelPath>, mut meanwhile: impl FnMut(usize)) -> Pass {
        let mut applier = Applier::new(self.targets.clone());
        let mut report: Option<PassReport> = None;
        let mut frames = 0;
        let mut sink = |frame: Bytes| {
            assert!(report.is_none(), "a frame after the end");
            report = applier.feed(&frame).unwrap();
            meanwhile(frames);
            frames += 1;
            Ok(())
        };
        let pass = self.source.pass(self.base.take(), forced, &mut sink).unwrap();
        let report = report.expect("the pass ends");
        let decoded = PassReport::decode(&report.encode()).unwrap();
        assert_eq!((decoded.pass, decoded.totals, decoded.root), (pass.id, pass.totals, id()));
        assert_eq!(self.targets.holds(&id()), Some(pass.id));
        self.base = Some(pass.base.clone());
        pass
    }

    fn assert_same(&self) {
        compare::assert_same(&self.from(""), &self.to(""));
    }
}

fn write(path: &Path, content: impl AsRef<[u8]>) {
    std::fs::write(path, content).unwrap();
}

/// Bytes without pattern, the same for the same seed.
fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let word = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    std::iter::repeat_with(word).flatten().take(len).collect()
}
