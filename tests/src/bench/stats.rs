//! Order statistics of a few runs.

use serde::Serialize;

/// What a figure was over the counted runs.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Summary {
    /// Runs.
    pub n: usize,
    /// The middle one; of an even number, the mean of the two in the middle.
    pub median: f64,
    /// The smallest value that at least 95 % of the runs do not exceed: with fewer than 20 runs, the largest.
    pub p95: f64,
}

/// Sums up the figures of several runs; nothing when there are none.
#[must_use]
pub fn summary(values: impl IntoIterator<Item = f64>) -> Option<Summary> {
    let mut sorted: Vec<f64> = values.into_iter().filter(|v| v.is_finite()).collect();
    sorted.sort_by(f64::total_cmp);
    let n = sorted.len();
    let low = sorted.get(n.checked_sub(1)? / 2)?;
    let high = sorted.get(n / 2)?;
    // The nearest rank: ceil(0.95 n), counted from 1.
    let p95 = sorted.get((n * 95).div_ceil(100).saturating_sub(1))?;
    Some(Summary { n, median: f64::midpoint(*low, *high), p95: *p95 })
}

/// The nearest whole number; nothing below zero.
#[must_use]
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "the cast saturates")]
pub fn whole(value: f64) -> u64 {
    value.round() as u64
}

/// A count as a figure. Exact up to 2^53.
#[must_use]
#[expect(clippy::cast_precision_loss, reason = "no count of a benchmark is that large")]
pub fn figure(count: u64) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_and_p95_by_nearest_rank() {
        assert_eq!(summary([]), None);
        assert_eq!(summary([7.0]), Some(Summary { n: 1, median: 7.0, p95: 7.0 }));
        assert_eq!(summary([4.0, 1.0]), Some(Summary { n: 2, median: 2.5, p95: 4.0 }));
        let hundred = (1..=100).rev().map(f64::from);
        assert_eq!(summary(hundred), Some(Summary { n: 100, median: 50.5, p95: 95.0 }));
    }
}
