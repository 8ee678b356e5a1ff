//! When to stop pre-copying: from the figures of the rounds so far.

use haulage_protocol::job::Options;
use haulage_protocol::page_shipper::RoundReport;
use haulage_protocol::unit::Micros;

/// A round that leaves more than this share of the one before has not got anywhere.
const STALLED_PERCENT: u64 = 90;

/// What to do after a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// Another round.
    Again,
    /// Freeze: what remains is predicted to fit, or more rounds would not help.
    Freeze,
}

/// The time that sending one more round's worth of pages would take: as many pages were dirtied during the last
/// round as it found, and they go at the rate that it had. The fixed cost of the freeze comes on top.
#[must_use]
pub fn predicted(rounds: &[RoundReport]) -> Micros {
    let Some(last) = rounds.last() else { return Micros(u64::MAX) };
    // The first round finds everything dirty, which says nothing about the rate of writes.
    if rounds.len() < 2 { last.took } else { Micros(last.took.0.max(last.scan.0)) }
}

/// Decides after at least one round. Stops when the prediction is within the budget, when two rounds in a row
/// no longer shrink, or at the limit of rounds.
#[must_use]
pub fn decide(rounds: &[RoundReport], options: &Options) -> Decision {
    let count = u32::try_from(rounds.len()).unwrap_or(u32::MAX);
    if count >= options.max_rounds.max(1) {
        return Decision::Freeze;
    }
    let [.., before, last] = rounds else { return Decision::Again };
    if last.dirty.0 == 0 || predicted(rounds) <= Micros(options.max_downtime_ms.saturating_mul(1000)) {
        return Decision::Freeze;
    }
    let stalled = |before: &RoundReport, after: &RoundReport| {
        after.dirty.0.saturating_mul(100) >= before.dirty.0.saturating_mul(STALLED_PERCENT)
    };
    match rounds {
        [.., earlier, _, _] if stalled(earlier, before) && stalled(before, last) => Decision::Freeze,
        _ => Decision::Again,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use haulage_protocol::id::Round;
    use haulage_protocol::unit::{Bytes, Pages};
    use proptest::prelude::*;

    fn round(n: u32, dirty: u64, took_ms: u64) -> RoundReport {
        RoundReport {
            round: Round(n),
            dirty: Pages(dirty),
            sent: Pages(dirty),
            zero: Pages(0),
            withheld: Pages(0),
            wire: Bytes(dirty * 4096),
            scan: Micros(10),
            took: Micros(took_ms * 1000),
        }
    }

    #[test]
    fn freezes_when_what_is_left_fits() {
        let rounds = [round(0, 65536, 900), round(1, 2000, 40)];
        assert_eq!(decide(&rounds, &Options::default()), Decision::Freeze);
    }

    #[test]
    fn the_first_round_is_never_the_last() {
        assert_eq!(decide(&[round(0, 10, 1)], &Options::default()), Decision::Again);
    }

    #[test]
    fn goes_on_while_it_shrinks_and_stops_when_it_does_not() {
        let mut rounds = vec![round(0, 100_000, 4000), round(1, 50_000, 2000)];
        assert_eq!(decide(&rounds, &Options::default()), Decision::Again);
        rounds.extend([round(2, 49_000, 1990), round(3, 48_500, 1980)]);
        assert_eq!(decide(&rounds, &Options::default()), Decision::Freeze);
    }

    proptest! {
        #[test]
        fn pre_copy_always_ends(dirty in proptest::collection::vec((0u64..1 << 30, 0u64..100_000), 1..64), max in 0u32..20) {
            let options = Options { max_rounds: max, ..Options::default() };
            let mut rounds = Vec::new();
            for (n, (pages, ms)) in dirty.into_iter().enumerate() {
                rounds.push(round(u32::try_from(n).unwrap(), pages, ms));
                if decide(&rounds, &options) == Decision::Freeze {
                    break;
                }
                prop_assert!(rounds.len() < max as usize);
            }
        }
    }
}
