//! How far apart rounds are. Each protects the container's memory against writes once more, and the first write to a
//! page after that is a fault, which the container pays for.
//!
//! ```text
//!  tax = pages written since a round began * what a fault costs / time since then
//!
//!  beginning of a round ──────── at least the interval ────────► beginning of the next
//!     └─ the round itself ─┘└─ pause ─┘
//! ```
//! The interval is the longest of these: what an operator asks for; the time in which the faults that were seen are no
//! more than the tax that is allowed; and, for a long pre-copy that gets nowhere, a second. The few rounds between the
//! preparation of the target and the freeze keep none of them, unless they are many: the shorter one is, the less is
//! left for the freeze, and the sooner it begins, the less it has to send.

use haulage_protocol::job::{MAX_ROUND_INTERVAL_MS, Options};
use haulage_protocol::page_shipper::RoundReport;
use haulage_protocol::policy::Policy;
use haulage_protocol::unit::{Micros, Pages};

use crate::converge::{MOST_SETTLING, is_strict, nowhere, of, time_left};

/// What the first write to a page after a round costs its process, in microseconds. Measured: 0.7 to 1.0 µs.
const FAULT: u64 = 1;
/// No tax puts rounds further apart than this: where each write goes to another page, waiting does not lower it.
const SECOND: Micros = Micros(1_000_000);
/// A pre-copy that lasts longer than this tracks no more than a round a second, unless it is getting somewhere.
const LONG: Micros = Micros(2_000_000);
/// So does one of more rounds than this: short ones come by the hundred, and the record, which holds them all, has to
/// fit into one message.
const MANY: usize = 64;
/// Or one in so many parts of its time, so that a long deadline does not make a long record.
const PARTS: u64 = 64;

/// How long ago rounds began.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Ago {
    /// The last one.
    pub last: Micros,
    /// The one before, if there was one.
    pub before: Option<Micros>,
}

/// When the next round begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Pacing {
    /// The least time between the beginnings of rounds: a round that has enough to send may as well last as long.
    pub interval: Micros,
    /// The time from now until the next one.
    pub pause: Micros,
}

/// When the next round of a pre-copy begins that has lasted `elapsed`. If it `settles`, the target is prepared and the
/// freeze is near.
#[must_use]
pub fn pacing(rounds: &[RoundReport], options: &Options, elapsed: Micros, ago: Ago, settles: bool) -> Pacing {
    let interval = interval(rounds, options, elapsed, ago, settles);
    let Some(last) = rounds.last() else { return Pacing { interval, pause: Micros(0) } };
    // A round that ends by the deadline needs time before that.
    let until = match (time_left(options, elapsed), options.deadline_ms) {
        (Some(left), _) => left.since(last.took),
        (None, Some(deadline)) => Micros(deadline.saturating_mul(1000)).since(elapsed),
        (None, None) => Micros(u64::MAX),
    };
    Pacing { interval, pause: interval.since(ago.last).min(until) }
}

fn interval(rounds: &[RoundReport], options: &Options, elapsed: Micros, ago: Ago, settles: bool) -> Micros {
    let asked = if settles { 0 } else { options.round_interval_ms.min(MAX_ROUND_INTERVAL_MS) };
    let asked = Micros(asked.saturating_mul(1000));
    let Some((last, before)) = rounds.split_last() else { return asked };
    let least = before.iter().rev().take(MOST_SETTLING).map(of).min();
    let is_stuck = least.is_some_and(|least| nowhere(least, of(last)));
    let long = match is_stuck && (elapsed > LONG && !settles || rounds.len() > MANY) {
        true => SECOND.max(Micros(elapsed.0 / PARTS)),
        false => Micros(0),
    };
    // P.Haul knows no such bound. And where a downtime must be kept, rounds that get nowhere come closer together,
    // since they leave less then.
    let is_free = settles || options.policy == Policy::Phaul || (is_stuck && is_strict(options));
    let taxed = if is_free { Micros(0) } else { taxed(last, ago, options.max_tax_percent) };
    asked.max(long).max(taxed)
}

/// The time in which the faults that were seen are no more than `percent` of one processor's time, if they were more.
fn taxed(last: &RoundReport, ago: Ago, percent: u8) -> Micros {
    // Since the last round began, and between the two before it: the shorter time tells it sooner, the longer one
    // better. What a first round finds dirty is all there is.
    let during = last.left.map(|left| (Pages(left.0.saturating_sub(last.withheld.0)), last.took));
    let between = ago.before.map(|before| (last.dirty, before.since(ago.last)));
    let share = u64::from(percent.clamp(1, 100));
    let needed = during.into_iter().chain(between).map(|(pages, time)| {
        let cost = pages.0.saturating_mul(FAULT).saturating_mul(100);
        if percent < 100 && cost > time.0.saturating_mul(share) { Micros(cost / share) } else { Micros(0) }
    });
    needed.max().unwrap_or_default().min(SECOND)
}

#[cfg(test)]
mod tests {
    use super::*;
    use haulage_protocol::id::Round;
    use haulage_protocol::unit::Bytes;
    use proptest::prelude::*;

    /// A round that has found so many pages dirty, sent them in `took`, and left so many.
    fn round(dirty: u64, took: u64, left: u64) -> RoundReport {
        RoundReport {
            round: Round(0),
            dirty: Pages(dirty),
            sent: Pages(dirty),
            zero: Pages(0),
            withheld: Pages(0),
            left: Some(Pages(left)),
            wire: Bytes(0),
            scan: Micros(0),
            took: Micros(took),
            encoding: Default::default(),
        }
    }

    /// The rounds came back to back.
    fn ago(rounds: &[RoundReport]) -> Ago {
        let last = rounds.last().map_or(Micros(0), |last| last.took);
        let before = rounds.len().checked_sub(2).map(|n| last + rounds[n].took);
        Ago { last, before }
    }

    fn pause(rounds: &[RoundReport], options: &Options, elapsed: Micros) -> Micros {
        pacing(rounds, options, elapsed, ago(rounds), false).pause
    }

    const FREE: u8 = 100;

    fn options(tax: u8) -> Options {
        Options { max_tax_percent: tax, ..Options::default() }
    }

    #[test]
    fn a_round_a_second_is_enough_for_what_gets_nowhere() {
        let free = options(FREE);
        let flat = [round(1000, 100_000, 50_000), round(1000, 100_000, 50_000)];
        assert_eq!(pause(&flat, &free, LONG), Micros(0));
        let many = vec![round(1000, 100_000, 50_000); MANY + 1];
        assert!(pause(&many, &free, LONG) > Micros(0) && pause(&many[1..], &free, LONG) == Micros(0));
        assert_eq!(pause(&flat, &free, Micros(LONG.0 + 1)), Micros(900_000));
        assert_eq!(pause(&flat, &free, Micros(640_000_000)), Micros(9_900_000));
        let falling = [round(1000, 100_000, 50_000), round(1000, 100_000, 40_000)];
        assert_eq!(pause(&falling, &free, Micros(640_000_000)), Micros(0));
    }

    #[test]
    fn what_is_asked_for_is_kept_from_beginning_to_beginning_but_not_beyond_the_deadline() {
        let asked = Options { round_interval_ms: 1000, ..options(FREE) };
        let rounds = [round(9000, 300_000, 10)];
        assert_eq!(pause(&[], &asked, Micros(0)), Micros(0), "nothing to keep away from");
        assert_eq!(pause(&rounds, &asked, Micros(300_000)), Micros(700_000));
        let ago = Ago { last: Micros(1_200_000), before: None };
        assert_eq!(
            pacing(&rounds, &asked, Micros(300_000), ago, false).pause,
            Micros(0),
            "it is over already"
        );
        let soon = Options { deadline_ms: Some(500), ..asked };
        assert_eq!(pause(&rounds, &soon, Micros(300_000)), Micros(200_000));
        assert_eq!(pause(&rounds, &soon, Micros(600_000)), Micros(0));
        let for_ever = Options { round_interval_ms: u64::MAX, ..options(FREE) };
        assert_eq!(pause(&rounds, &for_ever, Micros(300_000)), Micros(9_700_000));
    }

    #[test]
    fn faults_put_rounds_apart_until_they_are_no_more_than_the_tax() {
        // 2,000 faults in 10 ms are a fifth of the time; in 40 ms they are 5 %.
        let busy = [round(1 << 20, 10_000, 2000)];
        assert_eq!(pause(&busy, &options(5), Micros(10_000)), Micros(30_000));
        assert_eq!(pause(&busy, &options(10), Micros(10_000)), Micros(10_000));
        assert_eq!(pause(&busy, &options(20), Micros(10_000)), Micros(0));
        assert_eq!(pause(&busy, &options(FREE), Micros(10_000)), Micros(0));
        // What waits was not written meanwhile.
        let waiting = RoundReport { withheld: Pages(2000), ..busy[0].clone() };
        assert_eq!(pause(&[waiting], &options(5), Micros(10_000)), Micros(0));
        // What was written before the last round tells too, and no tax asks for more than a second.
        let two = [round(1 << 20, 100_000, 0), round(10_000, 10_000, 0)];
        assert_eq!(pause(&two, &options(5), Micros(110_000)), Micros(190_000));
        let all = [round(1 << 20, 100_000, 0), round(1 << 20, 10_000, 0)];
        assert_eq!(pause(&all, &options(5), Micros(110_000)), Micros(990_000));
    }

    #[test]
    fn near_the_freeze_only_many_rounds_that_get_nowhere_are_apart() {
        let settling = |count: usize| {
            let flat = vec![round(20_000, 500_000, 20_000); count];
            pacing(&flat, &options(5), Micros(90_000_000), ago(&flat), true).pause
        };
        assert_eq!(settling(12), Micros(0));
        assert!(settling(MANY + 1) > Micros(0));
    }

    #[test]
    fn neither_phaul_nor_a_downtime_that_must_be_kept_is_held_up_for_the_tax() {
        let stuck = [round(1 << 20, 10_000, 2000), round(2000, 10_000, 2000)];
        assert!(pause(&stuck, &options(5), Micros(20_000)) > Micros(0));
        let phaul = Options { policy: Policy::Phaul, ..options(5) };
        assert_eq!(pause(&stuck, &phaul, Micros(20_000)), Micros(0));
        let strict = Options { max_downtime_ms: Some(150), deadline_ms: Some(10_000), ..options(5) };
        assert_eq!(pause(&stuck, &strict, Micros(20_000)), Micros(0));
        assert!(pause(&stuck[..1], &strict, Micros(20_000)) > Micros(0), "it may get somewhere yet");
    }

    proptest! {
        #[test]
        fn no_pause_is_longer_than_asked_for_or_useful(
            all in prop::collection::vec((0..1_000_000_u64, 0..3_000_000_u64, 0..1_000_000_u64), 0..80),
            tax in 0..=255_u8, asked in 0..5000_u64, elapsed in 0..100_000_000_u64,
            deadline_ms in prop::option::of(0..100_000_u64),
        ) {
            let rounds: Vec<_> = all.iter().map(|(dirty, took, left)| round(*dirty, *took, *left)).collect();
            let options = Options { round_interval_ms: asked, deadline_ms, ..options(tax) };
            let Pacing { interval, pause } = pacing(&rounds, &options, Micros(elapsed), ago(&rounds), false);
            prop_assert!(pause <= interval);
            prop_assert!(interval <= Micros(asked * 1000).max(SECOND).max(Micros(elapsed / PARTS)));
            prop_assert!(interval >= Micros(asked * 1000));
            if let Some(deadline) = deadline_ms {
                prop_assert!(pause <= Micros(deadline * 1000).since(Micros(elapsed)));
            }
        }
    }
}
