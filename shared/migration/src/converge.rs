//! When to stop pre-copying: from the figures of the rounds so far.
//!
//! ```text
//!  predicted downtime = fixed cost + what is left / measured rate
//!
//!  within the downtime asked for ──────────────────────────► freeze (fits)
//!  no longer falls, with --auto-converge ──────────────────► slow the container down, again
//!  no longer falls, and no deadline to wait for ───────────► freeze (stalled)
//!  deadline passed, or rounds used up ──┬─ downtime given ─► refuse: cannot_converge
//!                                       └─ not given ──────► freeze
//!
//!  with --post-copy, instead of a freeze that does not fit, or a refusal ─► freeze, and the rest follows (post-copy)
//! ```
//! What is left is counted by the source after each round: pages held back, and pages written since they were sent.

use std::fmt;

use haulage_protocol::job::Options;
use haulage_protocol::page_shipper::RoundReport;
use haulage_protocol::policy::Policy;
use haulage_protocol::unit::{Micros, Pages};
use serde::{Deserialize, Serialize};

/// What a link takes when nothing has been measured: 1 Gbit/s.
pub const ASSUMED_RATE: Pages = Pages(29_000);
/// Rounds that send fewer pages say little of the rate.
const TELLING: u64 = 2048;
/// Of so many rounds the rate is measured.
const LATEST: usize = 3;
/// What is left has got nowhere when it is more than this share of what it was.
const STALLED_PERCENT: u64 = 95;
/// The most rounds of a pre-copy without a deadline, should nothing else end it.
const MOST_ROUNDS: usize = 100;
/// The most rounds between the preparation of the target and the freeze.
pub(crate) const MOST_SETTLING: usize = 24;
/// What a round may leave, of what it found, for another one to pay although it fits.
const PAYS_PERCENT: u64 = 50;
/// The same under `history`, which is there to save bytes.
const FRUGAL_PERCENT: u64 = 40;
/// What the latest rounds of `adaptive`, which sends a part of what waits, must have saved the freeze, of what they have
/// sent, for another one to pay; and how many these are.
const SAVES_PERCENT: u64 = 10;
const SAVING: usize = 2;
/// Time to send what is not worth another round.
const NEARLY_NOTHING: Micros = Micros(5_000);
/// Preparing the target takes about as long, and what is written meanwhile has to be sent in any case.
const PREPARING: Micros = Micros(250_000);
/// What is aimed at beside the fixed cost, where nothing was asked for and that alone takes as long as the default.
const REACH: Micros = Micros(20_000);

/// What a container that is slowed down keeps of its processor time, in percent, step by step.
const KEEPS: [u8; 4] = [50, 25, 10, 5];

/// P.Haul's limits: iterations beside the first, pages, and percent.
const PHAUL: (usize, u64, u64) = (8, 64, 10);

/// Why pre-copy has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Why {
    /// The predicted downtime is what was asked for.
    Fits,
    /// It is not, and more rounds would not help.
    Stalled,
    /// It is not, and the deadline has passed.
    Deadline,
    /// It is not, and the rounds are used up.
    Rounds,
    /// P.Haul's rule has ended it, which does not look at the downtime.
    Phaul,
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Fits => "it fits",
            Self::Stalled => "more rounds would not help",
            Self::Deadline => "the deadline has passed",
            Self::Rounds => "the rounds are used up",
            Self::Phaul => "P.Haul's rule says so",
        })
    }
}

/// A step of slowing the container down.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Slowdown {
    /// After so many rounds.
    pub after: usize,
    /// What it keeps of its processor time, in percent.
    pub keep: u8,
}

/// What to do after a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// Another round.
    Again,
    /// The container keeps so many percent of its processor time, then another round.
    SlowDown(u8),
    /// On to the freeze.
    Freeze(Why),
    /// On to the freeze, with what is left to follow when the container runs on the target.
    PostCopy(Why),
    /// The downtime that was asked for cannot be kept: give up, with the container untouched.
    Refuse(Why),
}

/// What the rounds say of the freeze.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Forecast {
    /// Pages that are left.
    pub left: Pages,
    /// What the way to the target takes in a second; `None` while no round has told, and then [`ASSUMED_RATE`] counts.
    pub rate: Option<Pages>,
    /// How long the container would stand still.
    pub downtime: Micros,
}

/// How pre-copy ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Convergence {
    /// Why.
    pub why: Why,
    /// What was predicted then.
    pub forecast: Forecast,
    /// The downtime that was aimed at.
    pub wanted: Micros,
    /// What is left does not go in the freeze: it follows when the container runs on the target.
    #[serde(default)]
    pub post_copy: bool,
}

/// The downtime that is aimed at, with a switch that costs `fixed`: what was asked for. Where nothing was, what is
/// within reach.
#[must_use]
pub fn aim(options: &Options, fixed: Micros) -> Micros {
    match options.max_downtime_ms {
        Some(_) => options.downtime(),
        None => options.downtime().max(fixed + REACH),
    }
}

/// What the rounds say of the freeze.
#[must_use]
pub fn forecast(rounds: &[RoundReport], fixed: Micros) -> Forecast {
    let left = left(rounds);
    let rate = rate(rounds);
    let pages = u128::from(left.0).saturating_mul(1_000_000);
    let transfer = pages / u128::from(rate.unwrap_or(ASSUMED_RATE).0.max(1));
    Forecast { left, rate, downtime: fixed + Micros(u64::try_from(transfer).unwrap_or(u64::MAX)) }
}

/// The predicted downtime.
#[must_use]
pub fn predicted(rounds: &[RoundReport], fixed: Micros) -> Micros {
    forecast(rounds, fixed).downtime
}

/// Pages that may be left for the freeze.
#[must_use]
pub fn allowance(rounds: &[RoundReport], options: &Options, fixed: Micros) -> Pages {
    let time = aim(options, fixed).since(fixed);
    let pages = u128::from(rate(rounds).unwrap_or(ASSUMED_RATE).0) * u128::from(time.0) / 1_000_000;
    Pages(u64::try_from(pages).unwrap_or(u64::MAX))
}

/// What a round left; what was written during it is as much as it found when nobody has counted.
pub(crate) fn of(round: &RoundReport) -> Pages {
    round.left.unwrap_or(round.withheld + round.dirty)
}

fn left(rounds: &[RoundReport]) -> Pages {
    rounds.last().map_or(Pages(u64::MAX), of)
}

/// Whether a round has left nearly as much as one before it.
pub(crate) fn nowhere(before: Pages, after: Pages) -> bool {
    u128::from(after.0) * 100 >= u128::from(before.0) * u128::from(STALLED_PERCENT)
}

fn rate(rounds: &[RoundReport]) -> Option<Pages> {
    let data = |round: &RoundReport| round.sent.0.saturating_sub(round.zero.0);
    let telling: Vec<_> = rounds.iter().rev().filter(|round| data(round) >= TELLING).take(LATEST).collect();
    if !telling.is_empty() {
        let pages: u64 = telling.iter().fold(0, |sum, round| sum.saturating_add(data(round)));
        let took: Micros = telling.iter().map(|round| round.took).sum();
        return Some(per_second(pages, took));
    }
    // Overhead makes a small round look slower than the way is: the best of them is nearest.
    rounds.iter().filter(|round| data(round) > 0).map(|round| per_second(data(round), round.took)).max()
}

fn per_second(pages: u64, took: Micros) -> Pages {
    let rate = u128::from(pages) * 1_000_000 / u128::from(took.0.max(1));
    Pages(u64::try_from(rate).unwrap_or(u64::MAX).max(1))
}

/// Decides after the rounds of the pre-copy, which have taken `elapsed`, with the container slowed down by `slowdowns`
/// and a switch that costs `fixed`.
#[must_use]
pub fn decide(
    rounds: &[RoundReport],
    slowdowns: &[Slowdown],
    options: &Options,
    fixed: Micros,
    elapsed: Micros,
) -> Decision {
    if options.policy == Policy::Phaul && !is_late(options, elapsed) {
        return if phaul_goes_on(rounds) { Decision::Again } else { Decision::Freeze(Why::Phaul) };
    }
    // What is left when it is prepared is sent afterwards.
    let early =
        options.policy == Policy::Adaptive && is_possible(options, fixed) && !is_late(options, elapsed);
    let slack = if early { PREPARING } else { Micros(0) };
    match rounds {
        [] => Decision::Again,
        [first] if first.dirty.0 > 0 && first.left.is_none() => {
            out_of_bounds(rounds, options, fixed, elapsed)
        }
        _ if predicted(rounds, fixed) <= aim(options, fixed) + slack => Decision::Freeze(Why::Fits),
        _ => match out_of_bounds(rounds, options, fixed, elapsed) {
            Decision::Again if is_stalled(since(rounds, slowdowns), options) => {
                stalled(slowdowns, options, fixed, elapsed)
            }
            decision => decision,
        },
    }
}

/// Decides after the rounds that followed the preparation of the target, `settling` of all the `rounds`.
#[must_use]
pub fn settle(
    rounds: &[RoundReport],
    settling: usize,
    slowdowns: &[Slowdown],
    options: &Options,
    fixed: Micros,
    elapsed: Micros,
) -> Decision {
    let slowed = since(rounds, slowdowns).len();
    let settled = rounds.get(rounds.len().saturating_sub(settling.min(slowed))..).unwrap_or_default();
    if settled.is_empty() {
        return Decision::Again;
    }
    if options.policy == Policy::Phaul && !is_late(options, elapsed) {
        return Decision::Freeze(Why::Phaul);
    }
    if predicted(rounds, fixed) <= aim(options, fixed) {
        let more = settled.len() < MOST_SETTLING
            && pays(settled, rounds, options.policy)
            && out_of_bounds(rounds, options, fixed, elapsed) == Decision::Again;
        return if more { Decision::Again } else { Decision::Freeze(Why::Fits) };
    }
    match out_of_bounds(rounds, options, fixed, elapsed) {
        Decision::Again if settled.len() >= MOST_SETTLING || is_stalled(settled, options) => {
            stalled(slowdowns, options, fixed, elapsed)
        }
        decision => decision,
    }
}

/// More rounds do not help: slower, if that is wanted and there is a step left, or no further.
fn stalled(slowdowns: &[Slowdown], options: &Options, fixed: Micros, elapsed: Micros) -> Decision {
    let helps = options.auto_converge && is_possible(options, fixed);
    let slower = KEEPS.get(slowdowns.len()).filter(|_| helps);
    slower.map_or_else(|| give_up(options, fixed, elapsed, Why::Stalled), |keep| Decision::SlowDown(*keep))
}

/// Whether one more round is worth its bytes although it fits already: the last one of the `settled` has left more than
/// nearly nothing, and so much less than there was before it that the next one will save more of the freeze than it sends in
/// vain.
fn pays(settled: &[RoundReport], rounds: &[RoundReport], policy: Policy) -> bool {
    let found = |round: &RoundReport| round.sent + round.withheld;
    let Some(last) = settled.last() else { return true };
    let is_below = |pages: Pages, percent: u64, whole: Pages| {
        u128::from(pages.0) * 100 < u128::from(whole.0) * u128::from(percent)
    };
    let falls = match policy {
        Policy::Adaptive => {
            // One that leaves more is forgiven: something else may have had the processor.
            let (before, latest) = settled.split_at(settled.len().saturating_sub(SAVING));
            let before = before.last().map(of).or(latest.first().map(found)).unwrap_or_default();
            let saved = Pages(before.0.saturating_sub(of(last).0));
            saved > Pages(0) && !is_below(saved, SAVES_PERCENT, latest.iter().map(|round| round.sent).sum())
        }
        Policy::History { .. } => is_below(of(last), FRUGAL_PERCENT, found(last)),
        Policy::All | Policy::Phaul => is_below(of(last), PAYS_PERCENT, found(last)),
    };
    falls && predicted(rounds, Micros(0)) > NEARLY_NOTHING
}

fn out_of_bounds(rounds: &[RoundReport], options: &Options, fixed: Micros, elapsed: Micros) -> Decision {
    if is_late(options, elapsed) {
        return give_up(options, fixed, elapsed, Why::Deadline);
    }
    let most = match (options.max_rounds, options.deadline_ms) {
        (Some(most), _) => usize::try_from(most.max(1)).unwrap_or(usize::MAX),
        (None, Some(_)) => usize::MAX,
        (None, None) => MOST_ROUNDS,
    };
    if rounds.len() >= most { give_up(options, fixed, elapsed, Why::Rounds) } else { Decision::Again }
}

/// What is not within the downtime asked for. Where there is time until a deadline, and a downtime was asked for, it is
/// used: the container may write less by then.
fn give_up(options: &Options, fixed: Micros, elapsed: Micros, why: Why) -> Decision {
    let (strict, possible) = (is_strict(options), is_possible(options, fixed));
    match why {
        Why::Stalled if strict && !is_late(options, elapsed) && possible => Decision::Again,
        // What the switch alone exceeds, post-copy exceeds too.
        _ if may_owe(options) && (possible || !strict) => Decision::PostCopy(why),
        _ if !strict => Decision::Freeze(why),
        _ => Decision::Refuse(why),
    }
}

/// Whether a downtime that cannot be kept is a reason not to migrate.
pub(crate) fn is_strict(options: &Options) -> bool {
    options.deadline_ms.is_some() && options.max_downtime_ms.is_some()
}

/// Whether any container could keep that downtime: one that writes nothing could.
fn is_possible(options: &Options, fixed: Micros) -> bool {
    aim(options, fixed) >= fixed
}

/// How long rounds may go on after `elapsed`, where what is left then does not go in the freeze. Else a round that is under
/// way is completed, whatever the deadline: without it the freeze would take as long.
pub(crate) fn time_left(options: &Options, elapsed: Micros) -> Option<Micros> {
    let deadline = Micros(options.deadline_ms?.saturating_mul(1000));
    (is_strict(options) || may_owe(options)).then(|| deadline.since(elapsed))
}

/// How long the next round may take, with a switch that costs `fixed`. If it is the first one `after_preparing` the target,
/// it has time for what was written meanwhile, which was known beforehand, and for what was left within the downtime.
#[must_use]
pub fn round_within(
    options: &Options,
    fixed: Micros,
    elapsed: Micros,
    after_preparing: bool,
) -> Option<Micros> {
    let least = if after_preparing { PREPARING + aim(options, fixed).since(fixed) } else { Micros(0) };
    Some(time_left(options, elapsed)?.max(least))
}

/// Whether memory may follow when the container runs on the target.
fn may_owe(options: &Options) -> bool {
    options.post_copy && options.policy != Policy::Phaul
}

fn is_late(options: &Options, elapsed: Micros) -> bool {
    options.deadline_ms.is_some_and(|deadline| elapsed >= Micros(deadline.saturating_mul(1000)))
}

/// The rounds since the container was last slowed down: those before say nothing of what more of them can do.
fn since<'a>(rounds: &'a [RoundReport], slowdowns: &[Slowdown]) -> &'a [RoundReport] {
    rounds.get(slowdowns.last().map_or(0, |slowdown| slowdown.after)..).unwrap_or_default()
}

/// Whether the latest rounds have left no less than those before them. The rounds of `adaptive` are short, and so it
/// takes more of them to tell.
fn is_stalled(rounds: &[RoundReport], options: &Options) -> bool {
    let patience = if options.policy == Policy::Adaptive { 4 } else { 2 };
    let Some((before, latest)) = rounds.split_at_checked(rounds.len().saturating_sub(patience)) else {
        return false;
    };
    let least = |rounds: &[RoundReport]| rounds.iter().map(of).min();
    matches!((least(before), least(latest)), (Some(before), Some(latest)) if nowhere(before, latest))
}

/// As P.Haul decides after each iteration: not below so many pages, not when it grows by more than so much, and not
/// for more than so many. It counts in whole percent, so that a growth of 10.9 counts as 10, and its limit of
/// iterations leaves out the first.
fn phaul_goes_on(rounds: &[RoundReport]) -> bool {
    let (most, small, growth) = PHAUL;
    let grows = |before: u64, after: u64| {
        u128::from(after) * 100 >= u128::from(before) * u128::from(100 + growth + 1)
    };
    match rounds {
        [] => true,
        [.., last] if last.dirty.0 <= small => false,
        [.., before, last] if grows(before.dirty.0, last.dirty.0) => false,
        _ => rounds.len() <= most,
    }
}

#[cfg(test)]
#[path = "converge_tests.rs"]
mod tests;
