//! What the target has of each page, as hashes: pages that were written without being changed need not go again, and a
//! page that another one equals goes as the name of that one. Of a page of which some parts are still as the target has
//! them, only the others go.
//!
//! # Why this is safe
//! Two parts of pages (1 KiB) count as equal when their XXH64 hashes are. Among all pages of 1 TiB of memory in 100
//! rounds the odds of one wrong match are 2^-27, far below those of a memory error that no code notices. (XXH3 is faster
//! and will not do: of 1 KiB it adds up products word by word, and two words that change against one another cancel with
//! odds of 2^-32.) The hashes are seeded anew for each migration, so that a container cannot look for a collision; it
//! would spoil its own memory only.
//!
//! The account of a page always tells what the target has of it, once all that was sent has been stored: it changes
//! when the page goes, whatever way it goes, and is dropped when it goes unlooked at. A page is named only if it cannot
//! go again in the same round: it lies before the present one in the order in which a round is read. The target looks
//! names up when it has stored everything else of the round ([`crate::named`]), so that batches may come in any order.
//! Parts of a page it puts where the others are: those came in an earlier round.
//!
//! # Memory
//! At most 1.2 % of the container's: 32 bytes for a page, in leaves of 64 pages, up to 8 bytes for finding a page
//! by its hashes. What does not fit is sent as if nothing were known. A container's memory counts what processes share
//! once, so pages that do not fit are mostly those that can be named.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasher, RandomState};

use haulage_sys::PAGE_BYTES;
use xxhash_rust::xxh64::xxh64;

use crate::frame::{HEADER, PAGE_BITS, PART_BYTES, PARTS, Parts};
use crate::gather::{PageBatch, append};
use crate::named::{MAX_NAMED_RUN, Named, NamedRun, Owner};
use crate::object::Label;
use crate::range::{PageNo, PageRange};

const LEAF_PAGES: u64 = 64;
/// Places for pages with hashes that fall together.
const WAYS: usize = 4;
/// The least memory that is reckoned with.
const LEAST_MEMORY: u64 = 64 << 20;

/// The hashes of the parts of a page.
type Account = [u64; PARTS];
/// The account of a page of which nothing is known. That a page has it is less likely than a wrong match.
const UNKNOWN: Account = [0; PARTS];
type Leaf = Box<[Account; LEAF_PAGES as usize]>;

/// What is left of a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sifted {
    /// What has to go; it may have no runs.
    pub batch: PageBatch,
    /// Pages that the target has as they are.
    pub unchanged: u64,
    /// Pages that go as names, at the end of the round.
    pub named: u64,
}

/// The account of what the target has.
#[derive(Debug)]
pub struct Known {
    seed: u64,
    owners: HashMap<Owner, u32>,
    by_number: Vec<(Owner, Label)>,
    leaves: HashMap<(u32, u64), Leaf>,
    most_leaves: usize,
    /// In sets of [`WAYS`], by the account. May be out of date.
    places: Vec<Place>,
    round: u32,
    /// Owners whose pages have come in this round, the present one included.
    seen: HashSet<u32>,
    named: Vec<(u32, u32, NamedRun)>,
    most_named: usize,
}

enum Verdict {
    /// Of these parts.
    Goes(Parts),
    Unchanged,
    Named(u32, PageNo),
}

impl Known {
    /// Nothing is known of a container that uses `memory` bytes.
    pub fn new(memory: u64) -> Self {
        let memory = memory.max(LEAST_MEMORY);
        // The largest power of two that is no more than one for each page.
        let places = 1_u64 << (memory / PAGE_BYTES as u64).ilog2();
        Self {
            seed: RandomState::new().hash_one(0),
            owners: HashMap::new(),
            by_number: Vec::new(),
            leaves: HashMap::new(),
            most_leaves: (memory.div_ceil(LEAF_PAGES * PAGE_BYTES as u64)) as usize,
            places: vec![Place::default(); places as usize],
            round: 0,
            seen: HashSet::new(),
            named: Vec::new(),
            most_named: (memory / 1000 / size_of::<(u32, u32, NamedRun)>() as u64 / 2) as usize,
        }
    }

    /// Takes out of a batch what need not go. Batches come in the order in which they are read.
    pub fn sift(&mut self, mut batch: PageBatch) -> Sifted {
        let owner = self.enter(&batch);
        let (mut unchanged, mut named) = (0, 0);
        let mut runs = Vec::with_capacity(batch.runs.len());
        let (mut from, mut to) = (HEADER, HEADER);
        for run in std::mem::take(&mut batch.runs) {
            if run.is_zero() {
                self.forget(owner, run.range);
                runs.push(run);
                continue;
            }
            for page in (run.range.start().0..run.range.end().0).map(PageNo) {
                let bytes = batch.buffer.get(from..from + PAGE_BYTES).unwrap_or_default();
                match self.judge(owner, page, bytes) {
                    Verdict::Unchanged => unchanged += 1,
                    Verdict::Named(other, place) => {
                        self.name(owner, page, other, place);
                        named += 1;
                    }
                    Verdict::Goes(parts) => {
                        for part in parts.ranges() {
                            batch.buffer.copy_within(from + part.start..from + part.end, to);
                            to += part.len();
                        }
                        append(&mut runs, page, parts);
                    }
                }
                from += PAGE_BYTES;
            }
        }
        batch.buffer.truncate(to);
        batch.runs = runs;
        Sifted { batch, unchanged, named }
    }

    /// A batch goes as it is, unlooked at.
    pub fn pass(&mut self, batch: &PageBatch) {
        let owner = self.enter(batch);
        if !self.leaves.is_empty() {
            batch.runs.iter().for_each(|run| self.forget(owner, run.range));
        }
    }

    /// The names of the round so far, for [`crate::target::TargetEngine::copy`]: to be sent when everything else of the
    /// round has been stored.
    pub fn take_named(&mut self) -> Vec<Vec<u8>> {
        let round = self.round;
        let all = std::mem::take(&mut self.named);
        let mut frames = Vec::new();
        for same in all.chunk_by(|a, b| (a.0, a.1) == (b.0, b.1)) {
            let Some((of, like, _)) = same.first() else { continue };
            let owner = |number: u32| self.by_number.get(number as usize);
            let (Some((of, label)), Some((like, _))) = (owner(*of), owner(*like)) else { continue };
            let runs: Vec<NamedRun> = same.iter().map(|(_, _, run)| *run).collect();
            frames.extend(Named::encode(*of, label, *like, round, &runs));
        }
        frames
    }

    fn enter(&mut self, batch: &PageBatch) -> u32 {
        if batch.round != self.round {
            self.round = batch.round;
            self.seen.clear();
        }
        let owner = Owner { vpid: batch.vpid, generation: batch.generation };
        let next = self.by_number.len() as u32;
        let number = *self.owners.entry(owner).or_insert(next);
        if number == next {
            self.by_number.push((owner, batch.label.clone()));
        }
        self.seen.insert(number);
        number
    }

    fn judge(&mut self, owner: u32, page: PageNo, bytes: &[u8]) -> Verdict {
        let hashes = self.account_for(bytes);
        let (before, remembered) = self.remember(owner, page, hashes);
        if before == hashes && before != UNKNOWN {
            return Verdict::Unchanged;
        }
        let mixed = hashes.iter().fold(0_u64, |all, hash| all.rotate_left(5) ^ hash);
        let sets = (self.places.len() / WAYS).max(1);
        let first = (mixed % sets as u64) as usize * WAYS;
        let set = self.places.get(first..first + WAYS).unwrap_or_default();
        let like = set.iter().filter_map(|place| place.with(mixed)).find(|(other, like)| {
            let stays = if *other == owner { *like < page } else { self.seen.contains(other) };
            stays && self.account_of(*other, *like) == hashes
        });
        if let Some((other, like)) = like.filter(|_| self.named.len() < self.most_named) {
            return Verdict::Named(other, like);
        }
        if let Some(place) = Place::of(owner, page, mixed).filter(|_| remembered) {
            let free = set.iter().position(Place::is_free);
            let at = free.unwrap_or_else(|| (hashes.first().copied().unwrap_or(0) % WAYS as u64) as usize);
            self.places.get_mut(first + at).into_iter().for_each(|old| *old = place);
        }
        Verdict::Goes(match before == UNKNOWN {
            true => Parts::ALL,
            false => Parts::which(|part| before.get(part) != hashes.get(part)),
        })
    }

    fn account_for(&self, page: &[u8]) -> Account {
        let mut account = UNKNOWN;
        for (hash, part) in account.iter_mut().zip(page.chunks_exact(PART_BYTES)) {
            *hash = xxh64(part, self.seed);
        }
        account
    }

    fn name(&mut self, owner: u32, page: PageNo, other: u32, place: PageNo) {
        if let Some((of, like, last)) = self.named.last_mut()
            && (*of, *like) == (owner, other)
            && last.pages.end() == page
            && last.like.0 + last.pages.count() == place.0
            && last.pages.count() < MAX_NAMED_RUN
            // A run is read before it is written, so it names none of its own pages.
            && !(owner == other && place >= last.pages.start())
            && let Some(longer) = PageRange::new(last.pages.start(), PageNo(page.0 + 1))
        {
            last.pages = longer;
        } else if let Some(pages) = PageRange::with_count(page, 1) {
            self.named.push((owner, other, NamedRun { pages, like: place }));
        }
    }

    fn account_of(&self, owner: u32, page: PageNo) -> Account {
        let leaf = self.leaves.get(&(owner, page.0 / LEAF_PAGES));
        leaf.and_then(|leaf| leaf.get((page.0 % LEAF_PAGES) as usize)).copied().unwrap_or(UNKNOWN)
    }

    /// What was known of the page, and whether there was room for `account`; else nothing is known of it.
    fn remember(&mut self, owner: u32, page: PageNo, account: Account) -> (Account, bool) {
        let full = self.leaves.len() >= self.most_leaves;
        let leaf = match self.leaves.entry((owner, page.0 / LEAF_PAGES)) {
            Entry::Occupied(leaf) => leaf.into_mut(),
            Entry::Vacant(_) if full => return (UNKNOWN, false),
            Entry::Vacant(place) => place.insert(Box::new([UNKNOWN; LEAF_PAGES as usize])),
        };
        let known = leaf.get_mut((page.0 % LEAF_PAGES) as usize);
        (known.map_or(UNKNOWN, |known| std::mem::replace(known, account)), true)
    }

    fn forget(&mut self, owner: u32, range: PageRange) {
        let (start, end) = (range.start().0, range.end().0);
        for number in start / LEAF_PAGES..end.div_ceil(LEAF_PAGES) {
            let Some(leaf) = self.leaves.get_mut(&(owner, number)) else { continue };
            for (page, known) in (number * LEAF_PAGES..).zip(leaf.iter_mut()) {
                if (start..end).contains(&page) {
                    *known = UNKNOWN;
                }
            }
        }
    }
}

/// Where a page with an account is: some bits of the account, never all zero; its owner's number; its number. Zero for
/// nowhere. By the bits, most pages with other accounts are told apart without a look at theirs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Place(u64);

/// Owners with higher numbers have no places.
const OWNER_BITS: u32 = 16;
const TAG_BITS: u32 = u64::BITS - OWNER_BITS - PAGE_BITS;

impl Place {
    fn of(owner: u32, page: PageNo, mixed: u64) -> Option<Self> {
        let fits = owner < 1 << OWNER_BITS && page.0 < 1 << PAGE_BITS;
        fits.then_some(Self((Self::tag(mixed) << OWNER_BITS | u64::from(owner)) << PAGE_BITS | page.0))
    }

    /// The owner and the page, if its account may be the one that was mixed.
    fn with(self, mixed: u64) -> Option<(u32, PageNo)> {
        let (upper, page) = (self.0 >> PAGE_BITS, self.0 & ((1 << PAGE_BITS) - 1));
        let owner = (upper & ((1 << OWNER_BITS) - 1)) as u32;
        (upper >> OWNER_BITS == Self::tag(mixed)).then_some((owner, PageNo(page)))
    }

    fn is_free(&self) -> bool {
        self.0 == 0
    }

    /// Of the upper bits: the lower ones say in which set it is.
    fn tag(mixed: u64) -> u64 {
        (mixed >> (u64::BITS - TAG_BITS)).max(1)
    }
}

#[cfg(test)]
#[path = "known_tests.rs"]
mod tests;
