//! Whole pre-copies on synthetic writes, with the real policies and the real rules of when to stop: what each policy
//! sends, and for how long the container would stand still. Pure, and so the quick way to compare them.
//!
//! `cargo test --release -p haulage-migration --test simulation -- --ignored --nocapture` prints the figures.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
#![allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]

use std::time::{Duration, Instant};

use haulage_migration::fixed::FIXED;
use haulage_migration::{ASSUMED_RATE, Decision, Why, allowance, decide, forecast, settle};
use haulage_pages::adaptive::{self, Timeline};
use haulage_pages::history::{Census, History};
use haulage_pages::policy::{Pace, TransferPolicy};
use haulage_pages::range::{PageNo, PageRange, RangeSet};
use haulage_protocol::id::Round;
use haulage_protocol::job::Options;
use haulage_protocol::page_shipper::RoundReport;
use haulage_protocol::policy::Policy;
use haulage_protocol::unit::{Bytes, Micros, Pages};

/// 512 MiB on a link of 1 Gbit/s.
const PAGES: u64 = 131_072;
/// 128 MiB, as in the benchmark's cells.
const CELL: u64 = 32_768;
const RATE: f64 = 29_000.0;
/// What a round costs beside its pages, and what the preparation of the target takes, in seconds.
const ROUND: f64 = 0.006;
const PREPARE: f64 = 0.3;

/// Which pages a container writes: to so many of them, at such a share of the link, in such a way.
#[derive(Debug, Clone, Copy)]
struct Writes {
    /// Pages of the container.
    pages: u64,
    hot: f64,
    load: f64,
    how: How,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum How {
    /// Each page of the hot set with the same probability.
    Uniform,
    /// One after the other, round and round.
    Sweep,
    /// Some much more often than others.
    Skewed,
    /// Uniform, in a hot set that moves on by its own size every second.
    Shifting,
}

/// A container, its target, and the time.
struct World {
    writes: Writes,
    random: u64,
    cursor: f64,
    now: f64,
    written: Vec<bool>,
    known: Vec<bool>,
    sent: u64,
}

impl World {
    fn new(writes: Writes) -> Self {
        let all = writes.pages as usize;
        let (written, known) = (vec![false; all], vec![false; all]);
        Self { writes, random: 0x9e37_79b9_7f4a_7c15, cursor: 0.0, now: 0.0, written, known, sent: 0 }
    }

    /// From 0 to 1.
    fn roll(&mut self) -> f64 {
        // xorshift64*
        self.random ^= self.random >> 12;
        self.random ^= self.random << 25;
        self.random ^= self.random >> 27;
        (self.random.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11) as f64 / (1u64 << 53) as f64
    }

    fn run(&mut self, seconds: f64) {
        let until = self.now + seconds;
        let each = 1.0 / (RATE * self.writes.load).max(1e-9);
        let (all, hot) = (self.writes.pages, self.writes.hot * self.writes.pages as f64);
        while self.now + each < until {
            self.now += each;
            self.cursor += 1.0;
            let page = match self.writes.how {
                How::Uniform => self.roll() * hot,
                How::Sweep => self.cursor % hot,
                How::Skewed => self.roll().powi(4) * hot,
                How::Shifting => (self.roll() + self.now.floor()) * hot,
            };
            // Spread over the memory, as real hot pages are.
            let page = (page as u64).wrapping_mul(40_503) % all;
            self.written[page as usize] = true;
        }
        self.now = until;
    }

    fn left(&self) -> u64 {
        self.written.iter().zip(&self.known).filter(|(written, known)| **written || !**known).count() as u64
    }
}

fn set(pages: impl Iterator<Item = u64>) -> RangeSet {
    pages.filter_map(|page| PageRange::with_count(PageNo(page), 1)).collect()
}

/// What came of a pre-copy.
#[derive(Debug, Clone, Copy)]
struct Result {
    /// Pages sent, the freeze included, as a share of the memory.
    sent: f64,
    /// Time to send what was left at the freeze.
    freeze_ms: f64,
    seconds: f64,
    rounds: usize,
    why: Why,
}

struct Simulation {
    world: World,
    policy: TransferPolicy,
    history: History,
    timeline: Timeline,
    pending: RangeSet,
    rounds: Vec<RoundReport>,
    options: Options,
    epoch: Instant,
}

impl Simulation {
    fn new(policy: &str, writes: Writes) -> Self {
        let options = Options { policy: policy.parse().unwrap(), ..Options::default() };
        let policy = match options.policy {
            Policy::All | Policy::Phaul => TransferPolicy::All,
            Policy::History { window, threshold } => TransferPolicy::History { window, threshold },
            Policy::Adaptive => TransferPolicy::Adaptive,
        };
        Self {
            world: World::new(writes),
            policy,
            history: History::default(),
            timeline: Timeline::default(),
            pending: RangeSet::new(),
            rounds: Vec::new(),
            options,
            epoch: Instant::now(),
        }
    }

    fn round(&mut self, last: bool) {
        let all = self.world.writes.pages;
        let first = self.rounds.is_empty();
        if first && self.policy.most_looks() > 0 {
            self.look();
        }
        let began = self.world.now;
        self.timeline.scanned(self.epoch + Duration::from_secs_f64(began));
        let written: Vec<u64> = (0..all).filter(|page| self.world.written[*page as usize]).collect();
        written.iter().for_each(|page| self.world.known[*page as usize] = false);
        self.world.written.fill(false);
        let written = set(written.into_iter());
        let dirty = if first { set(0..all) } else { written.clone() };
        let looked = self.policy.most_looks() > 0;
        self.history.advance(&if first && !looked { RangeSet::new() } else { written });
        self.pending = self.pending.union(&dirty);

        let rate = forecast(&self.rounds, FIXED).rate.map(|rate| rate.0 as f64);
        let allowance = allowance(&self.rounds, &self.options, FIXED).0;
        let pace = Pace { rate, allowance, last, ..Pace::default() };
        let (mut waiting, mut current) = (Census::default(), Census::default());
        self.history.tally(&self.pending, &mut waiting);
        let known = set((0..all).filter(|page| self.world.known[*page as usize]));
        self.history.tally(&known, &mut current);
        let mut quota = adaptive::quota(&self.timeline, &waiting, &current, pace);
        let chosen = self.policy.select(&self.pending, &self.history, &mut quota).send;
        let limit = match self.policy {
            TransferPolicy::Adaptive => adaptive::time_limit(pace, waiting.total()),
            _ => None,
        };
        let most = limit.map_or(u64::MAX, |limit| (limit.as_secs_f64() * RATE) as u64);
        let sent = set(chosen.pages().map(|page| page.0).take(most as usize));
        sent.pages().for_each(|page| self.world.known[page.0 as usize] = true);
        self.pending = self.pending.subtract(&sent);
        let count = sent.page_count();
        self.world.sent += count;
        self.world.run(count as f64 / RATE + ROUND);
        self.rounds.push(RoundReport {
            round: Round(self.rounds.len() as u32),
            dirty: Pages(dirty.page_count()),
            sent: Pages(count),
            zero: Pages(0),
            withheld: Pages(self.pending.page_count()),
            left: Some(Pages(self.world.left())),
            wire: Bytes(count * 4096),
            scan: Micros(1000),
            took: Micros(((self.world.now - began) * 1e6) as u64),
            encoding: Default::default(),
        });
    }

    /// As [`haulage_pages::source::SourceEngine::watch`] does before the first round.
    fn look(&mut self) {
        let mut seen = Vec::new();
        loop {
            self.timeline.scanned(self.epoch + Duration::from_secs_f64(self.world.now));
            let written: Vec<u64> =
                (0..self.world.writes.pages).filter(|page| self.world.written[*page as usize]).collect();
            self.world.written.fill(false);
            // At the first look everything is new.
            let is_first = self.world.now == 0.0;
            self.history.advance(&if is_first { RangeSet::new() } else { set(written.into_iter()) });
            if !is_first {
                let all = set(0..self.world.writes.pages);
                seen.push(self.history.select(&all, |pattern| pattern != 0).page_count());
            }
            if !adaptive::is_worth_a_look(&seen, self.policy.most_looks()) {
                break;
            }
            self.world.run(adaptive::LOOK.as_secs_f64());
        }
    }

    fn run(mut self) -> Result {
        let elapsed = |world: &World| Micros((world.now * 1e6) as u64);
        loop {
            self.round(false);
            match decide(&self.rounds, &[], &self.options, FIXED, elapsed(&self.world)) {
                Decision::Again => {}
                Decision::Freeze(_) => break,
                Decision::PostCopy(_) | Decision::Refuse(_) | Decision::SlowDown(_) => {
                    unreachable!("not asked for")
                }
            }
        }
        self.world.run(PREPARE);
        let before = self.rounds.len();
        let why = loop {
            self.round(true);
            let settling = self.rounds.len() - before;
            match settle(&self.rounds, settling, &[], &self.options, FIXED, elapsed(&self.world)) {
                Decision::Again => {}
                Decision::Freeze(why) => break why,
                Decision::PostCopy(_) | Decision::Refuse(_) | Decision::SlowDown(_) => {
                    unreachable!("not asked for")
                }
            }
        };
        self.world.run(0.01);
        let left = self.world.left();
        Result {
            sent: (self.world.sent + left) as f64 / self.world.writes.pages as f64,
            freeze_ms: left as f64 / RATE * 1e3,
            seconds: self.world.now,
            rounds: self.rounds.len(),
            why,
        }
    }
}

fn simulate(policy: &str, writes: Writes) -> Result {
    let result = come_of(policy, writes);
    println!(
        "{:>8} hot {:>4.0}% load {:>3.1} {policy:<12} sent {:>5.2}  freeze {:>7.1} ms  {:>5.1} s  {:>3} rounds, {}",
        format!("{:?}", writes.how),
        writes.hot * 100.0,
        writes.load,
        result.sent,
        result.freeze_ms,
        result.seconds,
        result.rounds,
        result.why,
    );
    result
}

fn come_of(policy: &str, writes: Writes) -> Result {
    Simulation::new(policy, writes).run()
}

/// The least downtime in milliseconds that any policy could reach which sends each page once, and knew all writes: the
/// largest lack of the link over all ages of last writes.
fn clairvoyant(writes: Writes) -> f64 {
    let mut world = World::new(writes);
    let (step, seconds) = (0.001, 4.0);
    let mut last = vec![None; writes.pages as usize];
    while world.now < seconds {
        world.run(step);
        for (page, written) in world.written.iter_mut().enumerate().filter(|(_, written)| **written) {
            (last[page], *written) = (Some(world.now), false);
        }
    }
    let mut ages: Vec<f64> = last.into_iter().flatten().map(|at| world.now - at).collect();
    ages.sort_by(f64::total_cmp);
    let lack = (1_u32..).zip(ages).map(|(pages, age)| f64::from(pages) / RATE - age);
    lack.fold(0.0, f64::max) * 1e3
}

fn row(policy: &str, writes: Writes, phaul: &Result) {
    let result = come_of(policy, writes);
    let change = |ours: f64, theirs: f64| (ours / theirs - 1.0) * 100.0;
    println!(
        "| {:?} | {:.0} % | {:.1} | `{policy}` | {:.3} | {:+.1} % | {:.0} | {:+.0} | {} | {:.1} |",
        writes.how,
        writes.hot * 100.0,
        writes.load,
        result.sent,
        change(result.sent, phaul.sent),
        result.freeze_ms,
        result.freeze_ms - phaul.freeze_ms,
        result.rounds,
        result.seconds,
    );
}

const COLUMNS: &str = "| writes | hot | of link | policy | sent | against phaul | freeze ms | against phaul | rounds | s |\n\
                       | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |";

/// The sweep of the policies as Markdown, for `deploy/BENCHMARKS.md`:
/// `cargo test --release -p haulage-migration --test simulation -- --ignored --nocapture sweep`.
#[test]
#[ignore = "tables of figures"]
fn sweep_of_the_policies() {
    println!("| cell | phaul sent | at best | phaul freeze ms | at best |\n| --- | --- | --- | --- | --- |");
    for (hot, load) in [(0.05, 0.5), (0.2, 0.5), (0.05, 0.9), (0.2, 0.9)] {
        let writes = Writes { pages: CELL, hot, load, how: How::Uniform };
        let phaul = come_of("phaul", writes);
        let most = (1.0 / phaul.sent - 1.0) * 100.0;
        println!(
            "| hot{:.0}-{load} | {:.3} | {most:+.1} % | {:.0} | {:.0} |",
            hot * 100.0,
            phaul.sent,
            phaul.freeze_ms,
            clairvoyant(writes)
        );
    }
    println!("\n{COLUMNS}");
    for how in [How::Uniform, How::Sweep, How::Skewed, How::Shifting] {
        for hot in [0.05, 0.2] {
            for load in [0.1, 0.5, 0.9, 1.5] {
                let writes = Writes { pages: CELL, hot, load, how };
                let phaul = come_of("phaul", writes);
                for policy in ["phaul", "all", "history", "adaptive"] {
                    row(policy, writes, &phaul);
                }
            }
        }
    }
    println!("\n{COLUMNS}");
    for (how, hot, load) in [(How::Uniform, 0.2, 0.5), (How::Uniform, 0.2, 0.9), (How::Shifting, 0.05, 0.5)] {
        let writes = Writes { pages: CELL, hot, load, how };
        let phaul = come_of("phaul", writes);
        for (window, threshold) in [(2, 1), (2, 2), (4, 1), (4, 2), (4, 3), (8, 2), (8, 4), (8, 6)] {
            row(&format!("history:{window},{threshold}"), writes, &phaul);
        }
    }
}

#[test]
#[ignore = "a table of figures"]
fn figures_of_all_policies() {
    for how in [How::Uniform, How::Sweep, How::Skewed, How::Shifting] {
        for hot in [0.05, 0.2] {
            for load in [0.1, 0.5, 0.7, 0.9, 1.5] {
                for policy in ["phaul", "all", "history", "adaptive"] {
                    simulate(policy, Writes { pages: PAGES, hot, load, how });
                }
            }
        }
    }
}

/// The marks: a hot set of 5 % and of 20 % of the memory, written at 0.5 to 0.9 of the link.
#[test]
fn adaptive_sends_less_than_phaul_and_freezes_no_longer() {
    for how in [How::Uniform, How::Sweep] {
        for (hot, load) in [(0.05, 0.5), (0.05, 0.9), (0.2, 0.5), (0.2, 0.7), (0.2, 0.9)] {
            let writes = Writes { pages: PAGES, hot, load, how };
            let (phaul, adaptive) = (simulate("phaul", writes), simulate("adaptive", writes));
            // One copy of everything is sent in any case: what counts is what comes on top.
            assert!(adaptive.sent - 1.0 < 0.95 * (phaul.sent - 1.0), "{writes:?}: {adaptive:?}, {phaul:?}");
            assert!(adaptive.freeze_ms < phaul.freeze_ms, "{writes:?}: {adaptive:?}, {phaul:?}");
        }
    }
}

#[test]
fn an_idle_container_is_sent_once_by_every_policy() {
    for policy in ["phaul", "all", "history", "adaptive"] {
        let idle = simulate(policy, Writes { pages: PAGES, hot: 0.01, load: 0.0, how: How::Uniform });
        assert!((idle.sent - 1.0).abs() < 1e-9 && idle.freeze_ms == 0.0, "{policy}: {idle:?}");
    }
    assert!(ASSUMED_RATE.0 as f64 <= RATE);
}
