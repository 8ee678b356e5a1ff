//! What the target has of one process, and what it is owed. Pure: no kernel, no IO.
//!
//! ```text
//!            dirty                    sent
//!  unknown ────────► pending ───────────────────► known
//!     ▲                 ▲  withheld: stays           │
//!     │ forgotten       └────────────── dirty ───────┤
//!     └────────────────────────── forgotten ─────────┘
//! ```
//! Where devices write to memory unseen ([`Collected::direct_io`]), what was sent goes from known back to pending once,
//! [`TRANSFER`] later, and counts for nothing at the freeze until then.
//!
//! At the freeze, a page is left out only if it is known *and* the kernel vouches that it was not written since.

use std::time::{Duration, Instant};

use crate::history::{Census, History, Pattern};
use crate::policy::{Quota, Selection, TransferPolicy};
use crate::range::{PageRange, RangeSet};
use crate::track::{Collected, Forgotten};

/// How long a device may take to fill a page that was pinned for it. Far above what a working disk takes.
pub const TRANSFER: Duration = Duration::from_secs(2);

/// The account of one process.
#[derive(Debug, Default)]
pub struct Ledger {
    /// The target has what the page held after it was last protected.
    known: RangeSet,
    /// Found dirty and not sent since.
    pending: RangeSet,
    history: History,
    /// Sent lately and known, with the time of sending: a device may still be filling them.
    recent: Vec<(Instant, RangeSet)>,
    /// Those of the pending pages that are sent a second time for that reason, and so not a third time.
    repeated: RangeSet,
    direct_io: bool,
}

impl Ledger {
    /// Takes in what a round found at the time `now`.
    pub fn observe(&mut self, found: &Collected, policy: TransferPolicy, now: Instant) {
        self.known = match &found.forgotten {
            Forgotten::All => RangeSet::new(),
            Forgotten::Pages(pages) => self.known.subtract(pages).subtract(&found.dirty),
        };
        self.direct_io |= found.direct_io;
        let (over, recent) = std::mem::take(&mut self.recent)
            .into_iter()
            .partition(|(sent, _)| now.saturating_duration_since(*sent) >= TRANSFER);
        self.recent = recent;
        self.repeated = self.repeated.subtract(&found.dirty);
        self.pending = self.pending.union(&found.dirty);
        let over: Vec<(Instant, RangeSet)> = over;
        for (_, pages) in over.into_iter().filter(|_| self.direct_io) {
            let again = pages.intersect(&self.known);
            self.known = self.known.subtract(&again);
            self.repeated = self.repeated.union(&again);
            self.pending = self.pending.union(&again);
        }
        self.pending = self.pending.intersect(&found.mapped);
        if policy.needs_history() {
            // What is new was not found written a second time.
            self.history.advance(&match &found.forgotten {
                Forgotten::All => RangeSet::new(),
                Forgotten::Pages(pages) => found.dirty.subtract(pages),
            });
        }
    }

    /// Divides what is pending.
    pub fn select(&self, policy: TransferPolicy, quota: &mut Quota) -> Selection {
        policy.select(&self.pending, &self.history, quota)
    }

    /// Counts by their histories the pages that are pending, and those that the target has.
    pub fn tally(&self, pending: &mut Census, known: &mut Census) {
        self.history.tally(&self.pending, pending);
        self.history.tally(&self.known, known);
    }

    /// `sent` was read after the last [`Self::observe`] and handed over by `now`; `gone` could not be read and is
    /// dropped, to be found again if it comes back.
    pub fn settle(&mut self, sent: &RangeSet, gone: &RangeSet, now: Instant) {
        self.pending = self.pending.subtract(sent).subtract(gone);
        self.known = self.known.union(sent);
        self.recent.push((now, sent.subtract(&self.repeated)));
        self.repeated = self.repeated.subtract(sent);
    }

    /// What must still be sent of a frozen process of which the pages of `exists` exist, and those of `unwritten` were
    /// not written since the last round.
    pub fn owed(&self, exists: &RangeSet, unwritten: &RangeSet) -> RangeSet {
        let owed = exists.subtract(&self.known.intersect(unwritten));
        let unsure = self.recent.iter().filter(|_| self.direct_io);
        unsure.fold(owed, |owed, (_, pages)| owed.union(&pages.intersect(exists)))
    }

    /// How many pages [`Self::owed`] would name, nearly, with so many `written` since the last round.
    pub fn left(&self, written: &RangeSet) -> u64 {
        let left = self.pending.union(written);
        let unsure = self.recent.iter().filter(|_| self.direct_io);
        unsure.fold(left, |left, (_, pages)| left.union(pages)).page_count()
    }

    /// The pages of `of` in runs that were written in the same rounds, ascending.
    pub fn runs(&self, of: &RangeSet) -> Vec<(Pattern, PageRange)> {
        self.history.runs(of)
    }

    /// Pages found dirty and not sent.
    pub fn pending(&self) -> &RangeSet {
        &self.pending
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adaptive::{Timeline, quota};
    use crate::policy::Pace;
    use crate::process::{Generation, Process, Vpid};
    use crate::range::{PageNo, PageRange};
    use crate::track::Tracking;
    use proptest::prelude::*;
    use std::collections::{BTreeMap, BTreeSet};

    const PAGES: u64 = 24;

    /// What may happen to memory between two rounds.
    #[derive(Debug, Clone)]
    enum Event {
        Write(u64),
        Discard(u64),
        /// Unmapped and mapped anew: pages gone, registration gone.
        Remap(u64, u64),
        Round,
        Exec,
    }

    fn any_event() -> impl Strategy<Value = Event> {
        prop_oneof![
            8 => (0..PAGES).prop_map(Event::Write),
            2 => (0..PAGES).prop_map(Event::Discard),
            1 => (0..PAGES, 1..6_u64).prop_map(|(start, count)| Event::Remap(start, count)),
            4 => Just(Event::Round),
            1 => Just(Event::Exec),
        ]
    }

    fn any_policy() -> impl Strategy<Value = TransferPolicy> {
        let history = (1..=8_u8, 1..=8_u8)
            .prop_map(|(window, threshold)| TransferPolicy::History { window, threshold });
        prop_oneof![Just(TransferPolicy::All), Just(TransferPolicy::Adaptive), history]
    }

    fn any_pace() -> impl Strategy<Value = Pace> {
        (prop::option::of(0.1..100.0_f64), 0..PAGES, any::<bool>()).prop_map(|(rate, allowance, last)| Pace {
            rate,
            allowance,
            last,
            ..Pace::default()
        })
    }

    fn set(pages: impl IntoIterator<Item = u64>) -> RangeSet {
        pages.into_iter().filter_map(|page| PageRange::with_count(PageNo(page), 1)).collect()
    }

    /// A process whose pages hold numbers, with a tracker that knows what the real one does and no more.
    #[derive(Default)]
    struct Model {
        content: BTreeMap<u64, u32>,
        written: BTreeSet<u64>,
        registered: BTreeSet<u64>,
        replaced: bool,
        counter: u32,
    }

    impl Model {
        fn apply(&mut self, event: &Event) {
            match *event {
                Event::Write(page) => {
                    self.counter += 1;
                    self.content.insert(page, self.counter);
                    self.written.insert(page);
                }
                Event::Discard(page) => {
                    self.content.remove(&page);
                    self.written.insert(page);
                }
                Event::Remap(start, count) => {
                    self.content.retain(|page, _| !(start..start + count).contains(page));
                    self.registered.retain(|page| !(start..start + count).contains(page));
                }
                Event::Exec => *self = Self { counter: self.counter, replaced: true, ..Self::default() },
                Event::Round => {}
            }
        }

        fn exists(&self) -> RangeSet {
            set(self.content.keys().copied())
        }
    }

    proptest! {
        #[test]
        fn whatever_happens_and_is_withheld_the_target_ends_with_the_truth(
            events in prop::collection::vec(any_event(), 0..80),
            policy in any_policy(),
            unreadable in prop::collection::btree_set(0..PAGES, 0..3),
            pace in any_pace(),
        ) {
            let (mapped, mut now) = (set(0..PAGES), Instant::now());
            let (mut model, mut ledger, mut target) = (Model::default(), Ledger::default(), BTreeMap::new());
            let mut timeline = Timeline::default();
            for event in &events {
                model.apply(event);
                if !matches!(event, Event::Round) {
                    continue;
                }
                let new: BTreeSet<_> =
                    model.content.keys().filter(|page| !model.registered.contains(page)).copied().collect();
                let forgotten = match std::mem::take(&mut model.replaced) {
                    true => Forgotten::All,
                    false => Forgotten::Pages(set(new.iter().copied())),
                };
                model.registered.extend(&new);
                let written = std::mem::take(&mut model.written);
                let dirty = set(new.into_iter().chain(written).filter(|page| model.content.contains_key(page)));
                now += TRANSFER / 3;
                timeline.scanned(now);
                ledger.observe(&found(&mapped, forgotten, dirty), policy, now);
                let (mut pending, mut known) = (Census::default(), Census::default());
                ledger.tally(&mut pending, &mut known);
                let selection = ledger.select(policy, &mut quota(&timeline, &pending, &known, pace));
                prop_assert_eq!(&selection.send.union(&selection.withhold), ledger.pending());
                prop_assert!(selection.send.intersect(&selection.withhold).is_empty());
                let readable = |page: &u64| model.content.contains_key(page) && !unreadable.contains(page);
                let sent = set(selection.send.pages().map(|page| page.0).filter(readable));
                let gone = selection.send.subtract(&sent);
                for page in sent.pages() {
                    target.insert(page.0, model.content[&page.0]);
                }
                ledger.settle(&sent, &gone, now);
            }
            let unwritten = set(model.registered.iter().copied().filter(|page| !model.written.contains(page)));
            let exists = model.exists();
            if model.replaced {
                // The tracker vouches for nothing of memory that it never saw.
                prop_assert!(unwritten.is_empty());
            }
            for page in ledger.owed(&exists, &unwritten).pages() {
                target.insert(page.0, model.content[&page.0]);
            }
            target.retain(|page, _| exists.contains(PageNo(*page)));
            prop_assert_eq!(target, model.content);
        }
    }

    fn found(mapped: &RangeSet, forgotten: Forgotten, dirty: RangeSet) -> Collected {
        let process = Process { pid: rustix::process::getpid(), vpid: Vpid(1), generation: Generation(1) };
        let tracking = Tracking::Tracked { refused: Vec::new() };
        Collected { process, tracking, mapped: mapped.clone(), forgotten, dirty, direct_io: false }
    }

    #[test]
    fn an_idle_process_is_owed_nothing() {
        let (all, none, mut ledger) = (set(0..PAGES), RangeSet::new(), Ledger::default());
        ledger.observe(&found(&all, Forgotten::All, all.clone()), TransferPolicy::All, Instant::now());
        let selection =
            ledger.select(TransferPolicy::All, &mut Quota { pages: Census::default(), last: false });
        ledger.settle(&selection.send, &none, Instant::now());
        assert!(ledger.owed(&all, &all).is_empty());
        assert_eq!(ledger.owed(&all, &none), all);
    }

    #[test]
    fn what_a_device_may_have_filled_late_is_sent_once_more() {
        let (all, none, mut ledger) = (set(0..PAGES), RangeSet::new(), Ledger::default());
        let idle =
            Collected { direct_io: true, ..found(&all, Forgotten::Pages(RangeSet::new()), RangeSet::new()) };
        let start = Instant::now();
        ledger.observe(&found(&all, Forgotten::All, all.clone()), TransferPolicy::All, start);
        ledger.settle(&all, &none, start);
        ledger.observe(&idle, TransferPolicy::All, start + TRANSFER / 2);
        assert_eq!(ledger.pending(), &none);
        assert_eq!(ledger.owed(&all, &all), all);
        ledger.observe(&idle, TransferPolicy::All, start + TRANSFER);
        assert_eq!((ledger.pending(), ledger.owed(&all, &all)), (&all, all.clone()));
        ledger.settle(&all, &none, start + TRANSFER);
        assert_eq!(ledger.owed(&all, &all), none);
        ledger.observe(&idle, TransferPolicy::All, start + 2 * TRANSFER);
        assert_eq!(ledger.pending(), &none);
    }
}
