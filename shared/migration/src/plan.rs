//! What a migration would be like, from a look at how the container writes: the rounds of a pre-copy with numbers of
//! pages in the place of pages, and the rules by which a real one ends.

use haulage_protocol::id::Round;
use haulage_protocol::job::Options;
use haulage_protocol::page_shipper::{RoundReport, WriteClass};
use haulage_protocol::policy::Policy;
use haulage_protocol::unit::{Bytes, Micros, Pages};
use serde::Serialize;

use crate::converge::{Decision, Why, decide, predicted, settle};
use crate::pace::{Ago, Pacing, pacing};

/// What a round costs beside its pages, in seconds.
const ROUND: f64 = 0.006;
/// Preparing the target, in seconds.
const PREPARE: f64 = 0.3;
/// The rounds of `adaptive`: no shorter than this, in seconds, and one part in so many of what waits.
const SHORTEST: f64 = 0.25;
const PARTS: f64 = 8.0;
/// No plan looks further ahead.
const MOST_ROUNDS: usize = 400;

/// What is expected of a migration's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Prediction {
    /// Rounds while the container runs.
    pub rounds: usize,
    /// Memory that is sent, in all, without headers and before any encoding.
    pub bytes: Bytes,
    /// From the first round to the container running on the target.
    pub total: Micros,
    /// How long it stands still.
    pub downtime: Micros,
    /// Why pre-copy would end; `None` when it would not within the rounds that are looked at.
    pub why: Option<Why>,
    /// It would be refused.
    pub refused: bool,
}

/// Pages that are written as often as one another.
#[derive(Debug, Clone, Copy)]
struct Class {
    pages: f64,
    /// A second.
    writes: f64,
    /// How many of them the target does not have.
    dirty: f64,
}

struct Model {
    classes: Vec<Class>,
    rate: f64,
    policy: Policy,
    rounds: Vec<RoundReport>,
    /// When each began, in seconds.
    began: Vec<f64>,
    fixed: Micros,
    seconds: f64,
    sent: f64,
}

/// Predicts a migration of a container that writes as `classes` say, over a way that takes `rate` pages a second, with
/// a switch that costs `fixed`.
#[must_use]
pub fn predict(classes: &[WriteClass], rate: Pages, options: &Options, fixed: Micros) -> Prediction {
    let mut model = Model::new(classes, rate, options.policy, fixed);
    let end = model.run(options);
    let downtime = predicted(&model.rounds, fixed);
    let left = model.dirty();
    Prediction {
        rounds: model.rounds.len(),
        bytes: whole(model.sent + left).bytes(),
        total: micros(model.seconds) + downtime,
        downtime,
        why: match end {
            Decision::Freeze(why) | Decision::PostCopy(why) | Decision::Refuse(why) => Some(why),
            Decision::Again | Decision::SlowDown(_) => None,
        },
        refused: matches!(end, Decision::Refuse(_)),
    }
}

impl Model {
    #[allow(clippy::cast_precision_loss, reason = "an estimate")]
    fn new(classes: &[WriteClass], rate: Pages, policy: Policy, fixed: Micros) -> Self {
        let class = |class: &WriteClass| {
            let pages = class.pages.0 as f64;
            Class { pages, writes: class.writes as f64 / 1000.0, dirty: pages }
        };
        let mut classes: Vec<Class> = classes.iter().map(class).collect();
        // Coldest first.
        classes.sort_by(|a, b| a.writes.total_cmp(&b.writes));
        let rate = (rate.0 as f64).max(1.0);
        let (rounds, began) = (Vec::new(), Vec::new());
        Self { classes, rate, policy, rounds, began, fixed, seconds: 0.0, sent: 0.0 }
    }

    fn dirty(&self) -> f64 {
        self.classes.iter().map(|class| class.dirty).sum()
    }

    /// The container writes for a while.
    fn write(&mut self, seconds: f64) {
        for class in &mut self.classes {
            class.dirty += (class.pages - class.dirty) * -(-class.writes * seconds).exp_m1();
        }
        self.seconds += seconds;
    }

    /// When the next round of pre-copy begins.
    fn pacing(&self, options: &Options) -> Pacing {
        let mut ago = self.began.iter().rev().map(|began| micros(self.seconds - began));
        let ago = Ago { last: ago.next().unwrap_or_default(), before: ago.next() };
        pacing(&self.rounds, options, micros(self.seconds), ago, false)
    }

    /// A round that may last for `interval`, or the last of all, in which nothing waits.
    fn round(&mut self, interval: Micros, last: bool) {
        self.began.push(self.seconds);
        let found = self.dirty();
        let mut room = match self.policy {
            Policy::Adaptive if !last => {
                self.rate * (found / self.rate / PARTS).max(SHORTEST).max(seconds(interval))
            }
            _ => f64::INFINITY,
        };
        let mut sent = 0.0;
        for class in &mut self.classes {
            // Written so often between rounds that it waits; in the first nothing is known yet.
            let often = match self.policy {
                Policy::History { window, threshold } => {
                    let last = self.rounds.last().map_or(0.0, |round| seconds(round.took));
                    !self.rounds.is_empty()
                        && -(-class.writes * last).exp_m1() * f64::from(window) >= f64::from(threshold)
                }
                Policy::All | Policy::Phaul | Policy::Adaptive => false,
            };
            let part = if often { 0.0 } else { class.dirty.min(room) };
            class.dirty -= part;
            room -= part;
            sent += part;
        }
        let withheld = self.dirty();
        let took = sent / self.rate + ROUND;
        self.write(took);
        self.sent += sent;
        self.rounds.push(RoundReport {
            round: Round(u32::try_from(self.rounds.len()).unwrap_or(u32::MAX)),
            dirty: whole(found),
            sent: whole(sent),
            zero: Pages(0),
            withheld: whole(withheld),
            left: Some(whole(self.dirty())),
            wire: whole(sent).bytes(),
            scan: Micros(0),
            took: micros(took),
            encoding: Default::default(),
        });
    }

    fn run(&mut self, options: &Options) -> Decision {
        while self.rounds.len() < MOST_ROUNDS {
            let Pacing { interval, pause } = self.pacing(options);
            self.write(seconds(pause));
            self.round(interval, false);
            match decide(&self.rounds, &[], options, self.fixed, micros(self.seconds)) {
                Decision::Again | Decision::SlowDown(_) => {}
                Decision::Freeze(_) => return self.settle(options),
                end @ (Decision::PostCopy(_) | Decision::Refuse(_)) => return end,
            }
        }
        Decision::Again
    }

    fn settle(&mut self, options: &Options) -> Decision {
        self.write(PREPARE);
        let before = self.rounds.len();
        while self.rounds.len() < MOST_ROUNDS {
            self.round(Micros(0), true);
            let settling = self.rounds.len() - before;
            match settle(&self.rounds, settling, &[], options, self.fixed, micros(self.seconds)) {
                Decision::Again | Decision::SlowDown(_) => {}
                end => return end,
            }
        }
        Decision::Again
    }
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "saturates")]
fn whole(pages: f64) -> Pages {
    Pages(pages.round() as u64)
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "saturates")]
fn micros(seconds: f64) -> Micros {
    Micros((seconds * 1e6) as u64)
}

#[allow(clippy::cast_precision_loss, reason = "an estimate")]
fn seconds(time: Micros) -> f64 {
    time.0 as f64 / 1e6
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixed::FIXED;
    use proptest::prelude::*;

    const RATE: Pages = Pages(29_000);

    fn with(policy: &str) -> Options {
        Options { policy: policy.parse().unwrap(), ..Options::default() }
    }

    fn classes(hot: u64, writes_per_second: u64) -> Vec<WriteClass> {
        let class = |pages, writes| WriteClass { pages: Pages(pages), writes };
        vec![class(100_000 - hot, 0), class(hot, writes_per_second * 1000)]
    }

    #[test]
    fn memory_at_rest_goes_once_and_costs_no_downtime_but_the_fixed() {
        for policy in ["all", "phaul", "history", "adaptive"] {
            let plan = predict(&classes(0, 0), RATE, &with(policy), FIXED);
            assert_eq!((plan.bytes, plan.downtime), (Pages(100_000).bytes(), FIXED), "{policy}");
            assert!(plan.total > Micros(3_400_000) && !plan.refused, "{policy}: {plan:?}");
        }
    }

    #[test]
    fn more_writes_take_more_bytes_and_adaptive_takes_fewer_than_phaul() {
        let plan = |policy, writes| predict(&classes(20_000, writes), RATE, &with(policy), FIXED);
        for policy in ["all", "phaul", "adaptive"] {
            assert!(plan(policy, 1).bytes > plan(policy, 0).bytes, "{policy}");
        }
        assert!(plan("adaptive", 1).bytes < plan("phaul", 1).bytes);
    }

    #[test]
    fn what_cannot_be_kept_is_said_to_be_refused() {
        let strict = Options { deadline_ms: Some(20_000), max_downtime_ms: Some(120), ..with("adaptive") };
        assert!(predict(&classes(50_000, 100), RATE, &strict, FIXED).refused);
        assert!(!predict(&classes(50_000, 0), RATE, &strict, FIXED).refused);
    }

    #[test]
    fn rounds_that_are_kept_apart_send_meanwhile_and_take_little_longer() {
        let apart = Options { round_interval_ms: 1000, ..with("adaptive") };
        let plan = |options| predict(&classes(5_000, 1), Pages(290_000), options, FIXED);
        let (close, apart) = (plan(&with("adaptive")), plan(&apart));
        assert!(apart.total.0 < close.total.0 + 2_000_000, "{close:?} {apart:?}");
    }

    proptest! {
        #[test]
        fn a_plan_is_never_less_than_the_memory(
            pages in prop::collection::vec((0..1_000_000_u64, 0..1_000_000_u64), 0..20),
            rate in 1..1_000_000_u64,
            policy in prop_oneof![Just("all"), Just("phaul"), Just("history:3,2"), Just("adaptive")],
        ) {
            let classes: Vec<_> =
                pages.into_iter().map(|(pages, writes)| WriteClass { pages: Pages(pages), writes }).collect();
            let total: u64 = classes.iter().map(|class| class.pages.0).sum();
            let plan = predict(&classes, Pages(rate), &with(policy), FIXED);
            prop_assert!(plan.bytes.0 + 4096 >= Pages(total).bytes().0 && plan.downtime >= FIXED, "{plan:?}");
        }
    }
}
