//! The policy `adaptive`: is it worth sending a page now, or will it be written again before the freeze?
//!
//! Every page is taken to be written at random moments, at a rate of its own that its history tells. Sent now, it
//! survives the time `t` until the freeze with the probability `exp(-rate * t)`, and only then was it worth its
//! bytes. And each page that is sent puts the freeze off for all the others. So of the pages that wait, coldest
//! first, as many are sent as make least of what is expected to be left at the freeze:
//!
//! ```text
//! left(k) = waiting - sum over the k coldest of exp(-rate * t) + sum over the others of (1 - exp(-rate * t))
//!       t = k / pages per second + the way to the freeze
//! ```
//! A round sends only the coldest part of these, also near the freeze, so that the next one knows more, and so that what it
//! sends was protected shortly before: a page that is written between the two is sent for nothing.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::history::{Census, Pattern, ROUNDS};
use crate::policy::{Pace, Quota};

/// From the end of the last round to the freeze, in seconds: a few messages.
const TO_THE_FREEZE: f64 = 0.02;
/// Between any other round and the freeze the target is prepared, in seconds. A page that is written in that time goes
/// afterwards, however often it went before.
const PREPARING: f64 = 0.25;
/// Pages a second that are reckoned with while nothing was measured: 1 Gbit/s.
const ASSUMED_RATE: f64 = 29_000.0;
/// The time between looks at how a container writes, before the first round. They cost no bytes, only faults, and spare
/// the first round what would go again.
pub const LOOK: Duration = Duration::from_millis(100);
/// Pages for which it is worth it to look for longer: 2 MiB.
const WORTH_A_LOOK: u64 = 512;
/// The shortest round of an unfinished pre-copy, in seconds: each round costs every writer a fault a page.
const SHORTEST: f64 = 0.25;
/// What a round between the preparation of the target and the freeze sends at most, in seconds or of what waits, whichever
/// is more: of what a long one sends, much is written again by its end.
const SETTLING: f64 = 0.04;
const SETTLING_SHARE: f64 = 0.75;
/// A round takes one part in so many of what waits.
const PARTS: f64 = 8.0;
/// How long the first round lasts, when nothing is known of the rate or of the pages.
const FIRST: Duration = Duration::from_secs(1);
/// Below the allowance, a page is sent only if that is expected to save so much of a page in the freeze.
const WORTH: f64 = 0.25;
/// Logarithmic classes of rates, two to a doubling, from 2^-10 to 2^10 writes a second.
const CLASSES: usize = 41;
/// Steps that a class is looked at in.
const STEPS: u32 = 8;
/// What is taken to be known of a page beforehand: so many writes in so many seconds. Little, for a prior that is
/// outweighed by one observation.
const PRIOR_WRITES: f64 = 0.1;
const PRIOR_SECONDS: f64 = 0.5;

/// Whether to look for longer, when after each [`LOOK`] so many pages had been seen written since the first: as long as
/// there are many new ones among them, `most` times at most.
pub fn is_worth_a_look(seen: &[u64], most: usize) -> bool {
    let (latest, before) = match *seen {
        [] => return true,
        [latest] => (latest, 0),
        [.., before, latest] => (latest, before),
    };
    let new = latest.saturating_sub(before);
    seen.len() < most && new >= WORTH_A_LOOK && new.saturating_mul(8) >= latest
}

/// When the rounds of the history were.
#[derive(Debug, Clone, Default)]
pub struct Timeline {
    last: Option<Instant>,
    /// Seconds between scans, latest first.
    intervals: VecDeque<f64>,
}

impl Timeline {
    /// A scan at the time `now`.
    pub fn scanned(&mut self, now: Instant) {
        if let Some(last) = self.last.replace(now) {
            self.intervals.push_front(now.saturating_duration_since(last).as_secs_f64().max(1e-6));
            self.intervals.truncate(ROUNDS.into());
        }
    }

    /// How often a page of that pattern is written, a second: the most likely rate, if its writes come at random.
    pub fn writes_per_second(&self, pattern: Pattern) -> f64 {
        let (mut low, mut high) = (1e-4_f64, 1e4_f64);
        // What is looked for is where this, which falls with the rate, changes its sign.
        let slope = |rate: f64| {
            let seen = self.intervals.iter().enumerate().map(|(age, seconds)| {
                let written = pattern.checked_shr(age as u32).unwrap_or(0) & 1 == 1;
                if written { seconds / (rate * seconds).exp_m1() } else { -seconds }
            });
            seen.sum::<f64>() + PRIOR_WRITES / rate - PRIOR_SECONDS
        };
        for _ in 0..24 {
            let middle = (low * high).sqrt();
            if slope(middle) > 0.0 { low = middle } else { high = middle }
        }
        (low * high).sqrt()
    }

    /// How often a page is written that was not written in the rounds of the history: by how many of those that had not
    /// been in the rounds before were in the last one. There are so many of them that what is taken to be known
    /// beforehand of each would outweigh what they show. Nothing where there are none.
    fn writes_per_second_of_the_cold(&self, waiting: &Census, current: &Census) -> Option<f64> {
        let pages = |pattern| (waiting.count(pattern) + current.count(pattern)) as f64;
        let (still, no_more) = (pages(0), pages(1));
        let interval = self.intervals.front()?;
        (still + no_more > 0.0).then(|| no_more / (still + no_more) / interval)
    }

    fn knows_nothing(&self) -> bool {
        self.intervals.is_empty()
    }
}

/// The class of a rate, and the rate of a class.
fn class_of(rate: f64) -> usize {
    // The logarithm of nothing is the lowest class, too.
    ((rate.log2() + 10.0) * 2.0).round().clamp(0.0, (CLASSES - 1) as f64) as usize
}

fn rate_of(class: usize) -> f64 {
    (class as f64 / 2.0 - 10.0).exp2()
}

/// How long a round of `adaptive` may last at most, where it must not go on for as long as there is something to send.
pub fn time_limit(pace: Pace, waiting: u64) -> Option<Duration> {
    match pace.rate {
        _ if pace.last => None,
        None => Some(FIRST),
        // Twice what was planned: the rate may have fallen.
        Some(rate) => Some(Duration::from_secs_f64((2.0 * seconds_of_a_round(rate, waiting, pace)).min(1e6))),
    }
}

fn seconds_of_a_round(rate: f64, waiting: u64, pace: Pace) -> f64 {
    (waiting as f64 / rate.max(1.0) / PARTS).max(SHORTEST).max(pace.interval.as_secs_f64())
}

/// What a round sends of the pages of `waiting`; `current` are those that the target has.
pub fn quota(timeline: &Timeline, waiting: &Census, current: &Census, pace: Pace) -> Quota {
    if timeline.knows_nothing() {
        return Quota { pages: waiting.clone(), last: pace.last };
    }
    let rate = pace.rate.filter(|rate| *rate > 0.0).unwrap_or(ASSUMED_RATE);
    let total = waiting.total();
    let classes = classes(timeline, waiting, current, pace.last);
    let class = |pattern: Pattern| classes.get(usize::from(pattern)).copied().unwrap_or(0);
    let sorted = |census: &Census| {
        let mut counts = [0.0; CLASSES];
        for (pattern, pages) in census.iter().filter(|(_, pages)| *pages > 0) {
            if let Some(count) = counts.get_mut(class(pattern)) {
                *count += pages as f64;
            }
        }
        counts
    };
    let ahead = if pace.last { TO_THE_FREEZE } else { TO_THE_FREEZE + PREPARING };
    let worth = worth_sending(&sorted(waiting), &sorted(current), rate, ahead, pace.allowance as f64);
    let most = match pace.rate {
        // The first round ends by its time.
        None => f64::INFINITY,
        Some(_) if pace.last => (rate * SETTLING).max(total as f64 * SETTLING_SHARE),
        Some(_) => rate * seconds_of_a_round(rate, total, pace),
    };
    let mut room = worth.min(most).ceil() as u64;
    // Coldest first.
    let mut order: Vec<(usize, Pattern, u64)> = waiting
        .iter()
        .filter(|(_, pages)| *pages > 0)
        .map(|(pattern, pages)| (class(pattern), pattern, pages))
        .collect();
    order.sort_unstable();
    let mut pages = Census::default();
    for (_, pattern, waiting) in order {
        let share = waiting.min(room);
        pages.add(pattern, share);
        room -= share;
    }
    Quota { pages, last: pace.last }
}

/// The class of each pattern.
fn classes(timeline: &Timeline, waiting: &Census, current: &Census, last: bool) -> Vec<usize> {
    let cold = timeline.writes_per_second_of_the_cold(waiting, current).filter(|_| last);
    let rate = |pattern| match cold {
        Some(cold) if pattern == 0 => cold.min(timeline.writes_per_second(1)),
        _ => timeline.writes_per_second(pattern),
    };
    (0..=Pattern::MAX).map(|pattern| class_of(rate(pattern))).collect()
}

/// How many of the waiting pages, coldest first, are worth sending before the freeze, which comes `ahead` seconds
/// later.
fn worth_sending(waiting: &[f64], current: &[f64], rate: f64, ahead: f64, allowance: f64) -> f64 {
    let total: f64 = waiting.iter().sum();
    let left = |sent: f64| {
        let seconds = sent / rate + ahead;
        let (mut room, mut left) = (sent, total);
        for (class, (waits, has)) in waiting.iter().zip(current).enumerate() {
            let survives = (-rate_of(class) * seconds).exp();
            let part = waits.min(room);
            room -= part;
            left += has * (1.0 - survives) - part * survives;
        }
        left
    };
    let (mut best, mut least, mut sent) = (0.0, left(0.0), 0.0);
    for pages in waiting.iter().filter(|pages| **pages > 0.0) {
        for step in 1..=STEPS {
            let upto = sent + pages * f64::from(step) / f64::from(STEPS);
            let would = left(upto);
            let price = if least <= allowance { WORTH * (upto - best) } else { 0.0 };
            if would + price < least {
                (best, least) = (upto, would);
            }
        }
        sent += pages;
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn timeline(intervals: &[f64]) -> Timeline {
        Timeline { last: None, intervals: intervals.iter().copied().collect() }
    }

    fn census(pages: &[(Pattern, u64)]) -> Census {
        let mut census = Census::default();
        pages.iter().for_each(|(pattern, pages)| census.add(*pattern, *pages));
        census
    }

    #[test]
    fn a_rate_is_found_again() {
        let even = timeline(&[1.0; 8]);
        let rates: Vec<f64> =
            [0, 1, 0b11, 0b1111, 0xff].map(|pattern| even.writes_per_second(pattern)).to_vec();
        assert!(rates.is_sorted(), "{rates:?}");
        assert!(rates[0] < 0.03 && rates[4] > 2.0, "{rates:?}");
        // Written in half of the seconds: exp(-rate) is about a half.
        assert!((rates[3] - 0.69).abs() < 0.1, "{rates:?}");
        // A write in a long round says less than one in a short round.
        let (short, long) = (timeline(&[0.1]), timeline(&[10.0]));
        assert!(short.writes_per_second(1) > 2.0 * long.writes_per_second(1));
    }

    #[test]
    fn looks_go_on_while_they_show_many_new_pages() {
        assert!(is_worth_a_look(&[], 6) && is_worth_a_look(&[WORTH_A_LOOK], 6));
        assert!(!is_worth_a_look(&[WORTH_A_LOOK - 1], 6) && !is_worth_a_look(&[0], 6));
        assert!(is_worth_a_look(&[7000, 8000], 6) && !is_worth_a_look(&[7001, 8000], 6));
        assert!(is_worth_a_look(&[1000], 2) && !is_worth_a_look(&[1000, 2000], 2));
    }

    #[test]
    fn without_knowledge_everything_is_sent() {
        let waiting = census(&[(0, 1000)]);
        let pace = Pace { rate: Some(100.0), ..Pace::default() };
        assert_eq!(quota(&Timeline::default(), &waiting, &Census::default(), pace).pages, waiting);
        let pace = Pace::default();
        assert_eq!(quota(&timeline(&[1.0]), &waiting, &Census::default(), pace).pages, waiting);
    }

    #[test]
    fn cold_pages_go_and_hot_ones_wait_while_there_are_cold_ones() {
        let waiting = census(&[(0, 80_000), (0xff, 1000)]);
        let pace = Pace { rate: Some(10_000.0), ..Pace::default() };
        let quota = quota(&timeline(&[1.0; 8]), &waiting, &Census::default(), pace);
        assert_eq!(quota.pages.iter().filter(|(_, pages)| *pages > 0).count(), 1);
        // One part in eight of what waits, a second's worth.
        assert!((9_000..12_000).contains(&quota.pages.total()), "{}", quota.pages.total());
        // The next round will not come for three seconds.
        let apart = Pace { interval: Duration::from_secs(3), ..pace };
        let quota = super::quota(&timeline(&[1.0; 8]), &waiting, &Census::default(), apart);
        assert!((29_000..32_000).contains(&quota.pages.total()), "{}", quota.pages.total());
        assert_eq!(time_limit(apart, 80_000), Some(Duration::from_secs(6)));
    }

    #[test]
    fn what_is_written_faster_than_it_can_be_sent_is_not_sent() {
        let waiting = census(&[(0xff, 100_000)]);
        let slow = Pace { rate: Some(1000.0), ..Pace::default() };
        let sent = quota(&timeline(&[0.25; 8]), &waiting, &Census::default(), slow).pages.total();
        assert!(sent < 2_000, "{sent}");
        let last = Pace { last: true, rate: Some(1e7), ..slow };
        let sent = quota(&timeline(&[0.25; 8]), &waiting, &Census::default(), last).pages.total();
        assert!(sent > 50_000, "{sent}");
    }

    #[test]
    fn pages_of_a_large_memory_that_is_written_here_and_there_are_sent_though_it_fits() {
        // 5,000 pages a second of 262,144; the last rounds took a tenth of a second.
        let (waiting, current) = (census(&[(1, 500)]), census(&[(0, 260_000), (0b10, 500), (0b100, 500)]));
        let pace = Pace { rate: Some(29_000.0), allowance: 2000, last: true, ..Pace::default() };
        let quota = quota(&timeline(&[0.1; 8]), &waiting, &current, pace);
        assert_eq!(quota.pages, waiting);
    }

    #[test]
    fn below_the_allowance_only_what_is_likely_to_survive_is_sent() {
        let waiting = census(&[(0, 500), (0xff, 500)]);
        let pace = Pace { rate: Some(1000.0), allowance: 1200, last: true, ..Pace::default() };
        let quota = quota(&timeline(&[0.1; 8]), &waiting, &Census::default(), pace);
        assert_eq!(quota.pages, census(&[(0, 500)]));
    }

    proptest! {
        #[test]
        fn a_quota_never_exceeds_what_waits_and_takes_colder_classes_first(
            pages in prop::collection::vec((any::<u8>(), 0..100_000_u64), 0..40),
            intervals in prop::collection::vec(0.001..20.0_f64, 0..9),
            rate in prop::option::of(0.1..1e6_f64),
            allowance in 0..10_000_u64,
            last: bool,
        ) {
            let (line, waiting) = (timeline(&intervals), census(&pages));
            let pace = Pace { rate, allowance, last, ..Pace::default() };
            let quota = quota(&line, &waiting, &Census::default(), pace).pages;
            let classes = classes(&line, &waiting, &Census::default(), last);
            let class = |pattern: Pattern| classes[usize::from(pattern)];
            let cut = quota.iter().zip(waiting.iter()).filter(|((_, sent), (_, waits))| sent < waits);
            let cut = cut.map(|((pattern, _), _)| class(pattern)).min().unwrap_or(CLASSES);
            for ((pattern, sent), (_, waits)) in quota.iter().zip(waiting.iter()) {
                prop_assert!(sent <= waits);
                prop_assert!(sent == 0 || class(pattern) <= cut, "hotter pages before colder ones");
            }
        }
    }
}
