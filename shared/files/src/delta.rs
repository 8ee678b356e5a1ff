//! From what the target has and what the source holds now to the steps between. Pure.
//!
//! Steps come in this order, in which each finds what it needs:
//! 1. [`Step::Remove`], what is in a directory before the directory;
//! 2. [`Step::MakeDir`], [`Step::PutFile`], [`Step::PutSpecial`] and [`Step::Link`], directories before what is in them,
//!    a file before further names of it;
//! 3. [`Step::DirMeta`], what is in a directory before the directory: the steps before changed its times.
//!
//! What a scan alone tells (directories, links, devices, owners, attributes …) is compared as it is. The content of
//! a file is taken as unchanged only on the word of its change time, which no process can set, and only if that is
//! older than the previous pass by [`RACY`]: the clock of change times ticks in milliseconds, and a write after the
//! read, in the same tick, would leave no trace. Writes through shared mappings leave none for longer; the caller
//! names those files.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::entry::{Entry, Kind, Snapshot, Time};
use crate::path::RelPath;

/// How much older than a pass a change must be to be certainly in it.
pub const RACY: Duration = Duration::from_secs(2);

/// One change of the target's tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Remove an entry; a directory is empty by then. It may be missing already.
    Remove(RelPath),
    /// Make an empty directory.
    MakeDir(RelPath),
    /// Put a file with its content and metadata in its place.
    PutFile {
        /// Where.
        path: RelPath,
        /// Whether the target's file there is an older state of this one, with the same names, so that writing
        /// what differs into it is enough.
        patch: bool,
    },
    /// Put a symbolic link, device, pipe or socket in its place, over what is there.
    PutSpecial(RelPath),
    /// Give an entry a further name, over what is there.
    Link {
        /// The new name.
        path: RelPath,
        /// A name it has, whose step came before.
        to: RelPath,
    },
    /// Set a directory's metadata.
    DirMeta(RelPath),
}

/// What the target is known to hold.
#[derive(Clone, Copy, Debug)]
pub struct Known<'a> {
    /// What was sent.
    pub snapshot: &'a Snapshot,
    /// Entries in it which did not arrive as it says.
    pub suspect: &'a BTreeSet<RelPath>,
}

/// Whether something that changed at `ctime` had certainly changed before a pass that started at `started`.
pub(crate) fn is_settled(ctime: Time, started: Time) -> bool {
    ctime < started.before(RACY)
}

/// The steps that turn what `known` tells (nothing: an empty directory) into `now`. Files in `forced` have changed
/// whatever their times say.
pub fn plan(known: Option<Known<'_>>, now: &Snapshot, forced: &BTreeSet<RelPath>) -> Vec<Step> {
    let mut plan = Plan { known, now, steps: Vec::new(), touched: BTreeSet::new() };
    plan.removals();
    plan.creations(forced);
    plan.directories();
    plan.steps
}

struct Plan<'a> {
    known: Option<Known<'a>>,
    now: &'a Snapshot,
    steps: Vec<Step>,
    /// Directories in which a name came or went.
    touched: BTreeSet<RelPath>,
}

impl<'a> Plan<'a> {
    /// The target's entry, if it is there as the snapshot says.
    fn on_target(&self, path: &RelPath) -> Option<&'a Entry> {
        let known = self.known?;
        known.snapshot.entries.get(path).filter(|_| !known.suspect.contains(path))
    }

    fn push(&mut self, path: &RelPath, step: Step) {
        if let Some((parent, _)) = path.split() {
            self.touched.insert(parent);
        }
        self.steps.push(step);
    }

    fn removals(&mut self) {
        let Some(known) = self.known else { return };
        for (path, old) in known.snapshot.entries.iter().rev() {
            let gives_way = self.now.entries.get(path).is_none_or(|new| is_dir(new) != is_dir(old));
            if gives_way {
                self.push(path, Step::Remove(path.clone()));
            }
        }
    }

    fn creations(&mut self, forced: &BTreeSet<RelPath>) {
        let names_now = names_by_inode(self.now);
        // First names under which a file was made anew: further ones are linked to it as their turn comes.
        let mut made = BTreeSet::new();
        let names_known = self.known.map(|known| names_by_inode(known.snapshot)).unwrap_or_default();
        for (path, entry) in &self.now.entries {
            if is_dir(entry) {
                let there = self.on_target(path).is_some_and(is_dir) || path.is_root();
                if !there {
                    self.push(path, Step::MakeDir(path.clone()));
                }
                continue;
            }
            let names = names_now.get(&entry.ino).filter(|_| is_linkable(entry)).cloned();
            let names = names.unwrap_or_else(|| vec![path]);
            if let Some(first) = names.first().filter(|first| **first != path) {
                if made.contains(first) {
                    self.push(path, Step::Link { path: path.clone(), to: (*first).clone() });
                }
                continue;
            }
            let same_names = names.iter().all(|name| {
                let old = self.on_target(name);
                old.is_some_and(|old| old.ino == entry.ino || entry.kind.is_whiteout())
            }) && match self.on_target(path) {
                Some(old) if is_linkable(old) => names_known.get(&old.ino) == Some(&names),
                Some(_) => names.len() == 1,
                None => false,
            };
            let forced = names.iter().any(|name| forced.contains(*name));
            match self.on_target(path) {
                Some(old) if same_names && !forced && self.is_unchanged(old, entry) => {}
                Some(old) if same_names && is_file(old) && is_file(entry) => {
                    // Nothing comes or goes by writing into a file: its directory is not touched.
                    self.steps.push(Step::PutFile { path: path.clone(), patch: true });
                }
                _ => {
                    let step = match entry.kind {
                        Kind::File { .. } => Step::PutFile { path: path.clone(), patch: false },
                        _ => Step::PutSpecial(path.clone()),
                    };
                    self.push(path, step);
                    made.insert(path);
                }
            }
        }
    }

    fn is_unchanged(&self, old: &Entry, new: &Entry) -> bool {
        let settled = self.known.is_some_and(|known| is_settled(new.ctime, known.snapshot.started));
        old.kind == new.kind && old.meta == new.meta && (!is_file(new) || (old.ctime == new.ctime && settled))
    }

    fn directories(&mut self) {
        for (path, entry) in self.now.entries.iter().rev().filter(|(_, entry)| is_dir(entry)) {
            let same = self.on_target(path).is_some_and(|old| is_dir(old) && old.meta == entry.meta);
            if !same || self.touched.contains(path) {
                self.steps.push(Step::DirMeta(path.clone()));
            }
        }
    }
}

/// All names of each inode that may have several, in order.
fn names_by_inode(snapshot: &Snapshot) -> BTreeMap<u64, Vec<&RelPath>> {
    let mut names = BTreeMap::<_, Vec<_>>::new();
    for (path, entry) in snapshot.entries.iter().filter(|(_, entry)| is_linkable(entry)) {
        names.entry(entry.ino).or_default().push(path);
    }
    names
}

/// Whether an entry can share its inode with another in the tree. The kernel makes whiteouts of one inode wherever
/// it can, which means nothing: each is taken by itself.
fn is_linkable(entry: &Entry) -> bool {
    entry.links > 1 && !is_dir(entry) && !entry.kind.is_whiteout()
}

fn is_dir(entry: &Entry) -> bool {
    entry.kind == Kind::Directory
}

fn is_file(entry: &Entry) -> bool {
    matches!(entry.kind, Kind::File { .. })
}

#[cfg(test)]
mod tests;
