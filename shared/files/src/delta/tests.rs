//! The plan, carried out on a model of a file system.

use proptest::prelude::*;

use super::*;
use crate::entry::Meta;

const STEP_NANOS: i64 = 700_000_000;

/// An inode of the model. Content is a number; the metadata's mode stands for all metadata.
#[derive(Clone, Debug, PartialEq)]
struct Node {
    kind: Kind,
    mode: u32,
    content: u64,
    ctime: Time,
}

/// A tree of names over inodes, with a clock.
#[derive(Clone, Debug)]
struct Model {
    names: BTreeMap<RelPath, u64>,
    nodes: BTreeMap<u64, Node>,
    next_ino: u64,
    clock: i64,
    /// Inodes that were written to through a mapping.
    mapped: BTreeSet<u64>,
}

#[derive(Clone, Debug)]
enum Act {
    Create(u8, u8),
    MakeDir(u8),
    Special(u8),
    Whiteout(u8),
    Write(u8, u8),
    /// As through a shared mapping: no time changes.
    WriteUnseen(u8, u8),
    Chmod(u8),
    Link(u8, u8),
    Rename(u8, u8),
    Remove(u8),
    Wait,
}

fn act() -> impl Strategy<Value = Act> {
    let n = any::<u8>;
    prop_oneof![
        3 => (n(), n()).prop_map(|(a, b)| Act::Create(a, b)),
        2 => n().prop_map(Act::MakeDir),
        1 => n().prop_map(Act::Special),
        1 => n().prop_map(Act::Whiteout),
        2 => (n(), n()).prop_map(|(a, b)| Act::Write(a, b)),
        1 => (n(), n()).prop_map(|(a, b)| Act::WriteUnseen(a, b)),
        1 => n().prop_map(Act::Chmod),
        2 => (n(), n()).prop_map(|(a, b)| Act::Link(a, b)),
        2 => (n(), n()).prop_map(|(a, b)| Act::Rename(a, b)),
        2 => n().prop_map(Act::Remove),
        2 => Just(Act::Wait),
    ]
}

/// Few names, so that they collide: three levels of four.
fn path_of(n: u8) -> RelPath {
    let letter = |bits: u8| char::from(b'a' + (bits & 3));
    let text = match n & 3 {
        0 => format!("{}", letter(n >> 2)),
        1 => format!("{}/{}", letter(n >> 2), letter(n >> 4)),
        _ => format!("{}/{}/{}", letter(n >> 2), letter(n >> 4), letter(n >> 6)),
    };
    RelPath::new(text).unwrap()
}

fn below(path: &RelPath, dir: &RelPath) -> bool {
    path.as_bytes().strip_prefix(dir.as_bytes()).is_some_and(|rest| rest.first() == Some(&b'/'))
}

impl Model {
    fn new() -> Self {
        let mut model = Self {
            names: BTreeMap::new(),
            nodes: BTreeMap::new(),
            next_ino: 1,
            clock: 1_000_000,
            mapped: BTreeSet::new(),
        };
        let ino = model.node(Kind::Directory, 0);
        model.names.insert(RelPath::root(), ino);
        model
    }

    fn now(&self) -> Time {
        let nanos = self.clock * STEP_NANOS;
        Time { seconds: nanos / 1_000_000_000, nanos: (nanos % 1_000_000_000) as u32 }
    }

    fn node(&mut self, kind: Kind, content: u64) -> u64 {
        let ino = self.next_ino;
        self.next_ino += 1;
        self.nodes.insert(ino, Node { kind, mode: 0o600, content, ctime: self.now() });
        ino
    }

    fn get(&self, path: &RelPath) -> Option<&Node> {
        self.names.get(path).map(|ino| &self.nodes[ino])
    }

    fn is_dir(&self, path: &RelPath) -> bool {
        self.get(path).is_some_and(|node| node.kind == Kind::Directory)
    }

    fn has_parent(&self, path: &RelPath) -> bool {
        path.split().is_some_and(|(parent, _)| self.is_dir(&parent))
    }

    /// A directory's time changes with the names in it: in the model, a part of its mode.
    fn touch_parent(&mut self, path: &RelPath) {
        let stamp = self.clock as u32;
        let (parent, _) = path.split().unwrap();
        let now = self.now();
        let node = self.nodes.get_mut(&self.names[&parent]).unwrap();
        node.mode = node.mode & 0o7777 | stamp << 12;
        node.ctime = now;
    }

    fn put(&mut self, path: RelPath, ino: u64) {
        self.touch_parent(&path);
        self.names.insert(path, ino);
    }

    fn touch(&mut self, ino: u64) {
        let now = self.now();
        if let Some(node) = self.nodes.get_mut(&ino) {
            node.ctime = now;
        }
    }

    fn remove(&mut self, path: &RelPath) {
        let doomed: Vec<_> = self.names.keys().filter(|p| *p == path || below(p, path)).cloned().collect();
        for path in doomed {
            let ino = self.names.remove(&path).unwrap();
            self.touch(ino);
        }
        self.touch_parent(path);
    }

    /// One name of each mapped file.
    fn forced(&self) -> BTreeSet<RelPath> {
        let named = |ino: &u64| self.names.iter().find(|(_, i)| *i == ino).map(|(path, _)| path.clone());
        self.mapped.iter().filter_map(named).collect()
    }

    /// Does what can be done.
    fn act(&mut self, act: &Act) {
        match act {
            Act::Create(n, content) => self.create(*n, Kind::File { size: 1 }, u64::from(*content)),
            Act::MakeDir(n) => self.create(*n, Kind::Directory, 0),
            Act::Special(n) => self.create(*n, Kind::Fifo, 0),
            Act::Whiteout(n) => self.create(*n, Kind::CharDevice { major: 0, minor: 0 }, 0),
            Act::Write(n, content) => {
                if let Some(ino) = self.file(*n) {
                    self.nodes.get_mut(&ino).unwrap().content = u64::from(*content);
                    self.touch(ino);
                }
            }
            Act::WriteUnseen(n, content) => {
                if let Some(ino) = self.file(*n) {
                    self.nodes.get_mut(&ino).unwrap().content = u64::from(*content);
                    self.mapped.insert(ino);
                }
            }
            Act::Chmod(n) => {
                if let Some(ino) = self.names.get(&path_of(*n)).copied() {
                    self.nodes.get_mut(&ino).unwrap().mode ^= 0o100;
                    self.touch(ino);
                }
            }
            Act::Link(from, to) => {
                let (from, to) = (path_of(*from), path_of(*to));
                if self.names.contains_key(&from) && !self.is_dir(&from) && self.is_free(&to) {
                    let ino = self.names[&from];
                    self.put(to, ino);
                    self.touch(ino);
                }
            }
            Act::Rename(from, to) => {
                let (from, to) = (path_of(*from), path_of(*to));
                if self.names.contains_key(&from) && self.is_free(&to) && !below(&to, &from) {
                    self.rename(&from, &to);
                }
            }
            Act::Remove(n) => {
                let path = path_of(*n);
                if self.names.contains_key(&path) {
                    self.remove(&path);
                }
            }
            Act::Wait => self.clock += 7,
        }
        self.clock += 1;
    }

    fn is_free(&self, path: &RelPath) -> bool {
        self.has_parent(path) && !self.names.contains_key(path)
    }

    fn create(&mut self, n: u8, kind: Kind, content: u64) {
        let path = path_of(n);
        if self.is_free(&path) {
            let ino = self.node(kind, content);
            self.put(path, ino);
        }
    }

    fn file(&self, n: u8) -> Option<u64> {
        let path = path_of(n);
        matches!(self.get(&path)?.kind, Kind::File { .. }).then(|| self.names[&path])
    }

    fn rename(&mut self, from: &RelPath, to: &RelPath) {
        let moved: Vec<_> = self.names.keys().filter(|p| *p == from || below(p, from)).cloned().collect();
        self.touch(self.names[from]);
        self.touch_parent(from);
        for path in moved {
            let ino = self.names.remove(&path).unwrap();
            let rest = &path.as_bytes()[from.as_bytes().len()..];
            self.names.insert(RelPath::new([to.as_bytes(), rest].concat()).unwrap(), ino);
        }
        self.touch_parent(to);
    }

    fn snapshot(&self) -> Snapshot {
        let entry = |ino: &u64| {
            let node = &self.nodes[ino];
            let meta = Meta { mode: node.mode, uid: 0, gid: 0, mtime: node_time(node), xattrs: Vec::new() };
            Entry {
                kind: node.kind.clone(),
                meta,
                ino: *ino,
                links: self.names.values().filter(|i| *i == ino).count() as u64,
                ctime: node.ctime,
            }
        };
        Snapshot {
            started: self.now(),
            entries: self.names.iter().map(|(path, ino)| (path.clone(), entry(ino))).collect(),
            mounts: Vec::new(),
        }
    }

    /// What must be the same on both sides: kinds, metadata, contents, and which names are of one inode.
    fn picture(&self) -> Vec<(RelPath, Kind, u32, u64, Vec<RelPath>)> {
        let names_of = |ino: &u64, node: &Node| match node.kind.is_whiteout() {
            true => Vec::new(),
            false => self.names.iter().filter(|(_, i)| *i == ino).map(|(p, _)| p.clone()).collect(),
        };
        self.names
            .iter()
            .map(|(path, ino)| {
                let node = &self.nodes[ino];
                (path.clone(), node.kind.clone(), node.mode, node.content, names_of(ino, node))
            })
            .collect()
    }

    /// Carries a step out as the target does, with content from `source` as it is now and the rest from `snapshot`.
    fn carry_out(&mut self, step: &Step, source: &Model, snapshot: &Snapshot) {
        self.clock += 1;
        match step {
            Step::Remove(path) => {
                assert!(!self.names.keys().any(|p| below(p, path)), "{path} is not empty");
                if self.names.contains_key(path) {
                    self.remove(path);
                }
            }
            Step::MakeDir(path) => {
                assert!(self.is_free(path), "{path} is taken or has no parent");
                let ino = self.node(Kind::Directory, 0);
                self.put(path.clone(), ino);
            }
            Step::PutFile { path, patch: true } => {
                let ino = self.names[path];
                self.fill(ino, path, source, snapshot);
            }
            Step::PutFile { path, patch: false } | Step::PutSpecial(path) => {
                assert!(self.has_parent(path) && !self.is_dir(path));
                let ino = self.node(Kind::Fifo, 0);
                self.put(path.clone(), ino);
                self.fill(ino, path, source, snapshot);
            }
            Step::Link { path, to } => {
                assert!(self.has_parent(path) && !self.is_dir(path));
                let ino = self.names[to];
                self.put(path.clone(), ino);
            }
            Step::DirMeta(path) => {
                assert!(self.is_dir(path));
                let ino = self.names[path];
                self.fill(ino, path, source, snapshot);
            }
        }
    }

    fn fill(&mut self, ino: u64, path: &RelPath, source: &Model, snapshot: &Snapshot) {
        let entry = &snapshot.entries[path];
        let node = self.nodes.get_mut(&ino).unwrap();
        node.kind = entry.kind.clone();
        node.mode = entry.meta.mode;
        node.content = source.nodes[&entry.ino].content;
    }
}

fn node_time(node: &Node) -> Time {
    match node.kind {
        // Its time is in its mode.
        Kind::Directory => Time { seconds: 0, nanos: 0 },
        _ => node.ctime,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn carried_out_every_plan_makes_the_trees_equal(
        passes in proptest::collection::vec(
            (proptest::collection::vec(act(), 0..25), proptest::collection::vec(act(), 0..3)), 1..5),
    ) {
        let mut source = Model::new();
        let mut target = Model::new();
        let mut known: Option<(Snapshot, BTreeSet<RelPath>)> = None;
        let last = passes.len();
        for (number, (acts, meanwhile)) in passes.into_iter().enumerate() {
            for act in &acts {
                source.act(act);
            }
            let snapshot = source.snapshot();
            // In a live pass, files are written to between the scan and their reading; the last one is frozen.
            if number + 1 < last {
                for act in meanwhile.iter().filter(|a| matches!(a, Act::Write(..) | Act::WriteUnseen(..))) {
                    source.act(act);
                }
            }
            let before = known.as_ref().map(|(snapshot, suspect)| Known { snapshot, suspect });
            for step in plan(before, &snapshot, &source.forced()) {
                target.carry_out(&step, &source, &snapshot);
            }
            known = Some((snapshot, BTreeSet::new()));
            if number + 1 == last {
                prop_assert_eq!(source.picture(), target.picture());
            }
        }
    }

    #[test]
    fn without_a_change_there_is_nothing_to_do(acts in proptest::collection::vec(act(), 0..40)) {
        let mut source = Model::new();
        for act in &acts {
            source.act(act);
        }
        source.clock += 7;
        let first = source.snapshot();
        source.clock += 7;
        let known = Known { snapshot: &first, suspect: &BTreeSet::new() };
        prop_assert_eq!(plan(Some(known), &source.snapshot(), &BTreeSet::new()), vec![]);
    }
}
