//! The clairvoyant bound D*: the least downtime that a policy which sends whole pages could reach on a link, if it knew
//! all writes beforehand.
//!
//! A page last written `t` before the freeze cannot be sent, in its last state, earlier than `t` before it. So all pages
//! last written in the final `t` have to go in that time and the downtime: for every `t`
//!
//! ```text
//! bytes of the pages last written in the final t  <=  rate * (t + downtime)
//! ```
//!
//! and the least downtime is the largest lack over all `t`, by the link's rate. What a real migration costs besides
//! (dump, start, network) comes on top of it.

use crate::bench::cell::{Cell, Workload};
use crate::bench::schedule::Schedule;
use crate::bench::stats::figure;
use std::collections::HashMap;

const PAGE: f64 = 4096.0;

/// What is looked at: writes before that are far beyond the reach of any link in the plan.
const SECONDS: u64 = 30;

/// One write: when, in seconds, and to which page.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Write {
    /// When.
    pub at: f64,
    /// Where.
    pub page: u64,
}

/// The bound in seconds, for a freeze at `freeze` (in seconds, after all writes that count) and a link of so many bytes
/// per second. Later writes are ignored. Without writes it is zero.
#[must_use]
pub fn bound(writes: impl IntoIterator<Item = Write>, freeze: f64, rate: f64) -> f64 {
    let mut last: HashMap<u64, f64> = HashMap::new();
    for write in writes.into_iter().filter(|write| write.at <= freeze) {
        let at = last.entry(write.page).or_insert(write.at);
        *at = at.max(write.at);
    }
    let mut ages: Vec<f64> = last.into_values().map(|at| freeze - at).collect();
    ages.sort_by(f64::total_cmp);
    // Between two ages the number of pages stays and the time grows: the lack is largest right at an age.
    let lack = (1u64..).zip(ages).map(|(pages, age)| figure(pages) * PAGE - rate * age);
    lack.fold(0.0, f64::max) / rate
}

/// The bound of a cell in milliseconds: of the synthetic writer, whose writes are known, on a link with a known rate.
#[must_use]
pub fn of(cell: &Cell) -> Option<f64> {
    let Workload::Writer(writer) = cell.workload else { return None };
    let (rate, link) = (cell.write_rate(), cell.link.bytes_per_second()?);
    let each = figure(rate) / f64::from(writer.processes.max(1));
    let count = rate * SECONDS / u64::from(writer.processes.max(1));
    let writes = (0..writer.processes).flat_map(|process| {
        let schedule = Schedule::new(&writer, process);
        (0..count).map(move |number| Write {
            at: figure(number) / each,
            page: u64::from(process) << 40 | schedule.page(number),
        })
    });
    Some(bound(writes, figure(SECONDS), link) * 1e3)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn write(at: f64, page: u64) -> Write {
        Write { at, page }
    }

    #[test]
    fn without_writes_there_is_none() {
        assert_eq!(bound([], 10.0, 1e6), 0.0);
    }

    #[test]
    fn pages_written_at_the_freeze_must_all_go_after_it() {
        let writes = (0..100).map(|page| write(5.0, page));
        assert!((bound(writes, 5.0, 4096.0 * 100.0) - 1.0).abs() < 1e-9);
    }

    #[test]
    fn pages_that_can_go_before_cost_nothing() {
        // One page a second on a link that takes two: only the last one, written at the freeze itself, remains.
        let writes = (0..=10u32).map(|n| write(f64::from(n), u64::from(n)));
        assert!((bound(writes, 10.0, 2.0 * 4096.0) - 0.5).abs() < 1e-9);
    }

    #[test]
    fn only_the_last_write_of_a_page_counts() {
        let writes = (0..=1000).map(|n| write(f64::from(n) / 100.0, 7));
        assert!((bound(writes, 10.0, 4096.0) - 1.0).abs() < 1e-9);
    }

    /// By the definition, one `t` after the other.
    fn by_definition(writes: &[Write], freeze: f64, rate: f64) -> f64 {
        let pages: std::collections::HashSet<u64> = writes.iter().map(|w| w.page).collect();
        let last =
            |page| writes.iter().filter(|w| w.page == page).map(|w| w.at).fold(f64::NEG_INFINITY, f64::max);
        let bytes_within =
            |t: f64| 4096.0 * pages.iter().filter(|page| freeze - last(**page) <= t).count() as f64;
        let times = writes.iter().map(|w| freeze - w.at);
        times.map(|t| (bytes_within(t) - rate * t) / rate).fold(0.0, f64::max)
    }

    proptest! {
        #[test]
        fn is_what_the_definition_says(
            writes in proptest::collection::vec((0u32..1000, 0u64..20), 0..60),
            rate in 1u32..1_000_000,
        ) {
            let writes: Vec<Write> =
                writes.into_iter().map(|(at, page)| write(f64::from(at) / 100.0, page)).collect();
            let rate = f64::from(rate);
            let found = bound(writes.iter().copied(), 10.0, rate);
            prop_assert!((found - by_definition(&writes, 10.0, rate)).abs() < 1e-6);
            // No policy needs more than to send every page that was ever written after the freeze.
            prop_assert!(found >= 0.0 && found <= 20.0 * 4096.0 / rate);
            // A faster link never makes it longer, nor does what was written to no page.
            prop_assert!(bound(writes.iter().copied(), 10.0, rate * 2.0) <= found);
            // What is written after the freeze does not matter.
            let later = writes.iter().copied().chain([write(10.5, 99)]);
            prop_assert!((bound(later, 10.0, rate) - found).abs() < 1e-9);
        }
    }
}
