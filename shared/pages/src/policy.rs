//! Which dirty pages a round sends. A page that is withheld is sent at the end at the latest: the ledger owes it.

use std::time::Duration;

use crate::history::{self, Census, History};
use crate::range::RangeSet;

/// A transfer policy, as data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TransferPolicy {
    /// Every dirty page in every round, as P.Haul does.
    All,
    /// Withhold pages that are often written, since they would soon be written again. Before the freeze they go.
    History {
        /// Rounds looked at, 1 to 8 (more counts as 8).
        window: u8,
        /// Written in so many of them, a page is withheld.
        threshold: u8,
    },
    /// Withhold pages that sending now does not pay for: see [`crate::adaptive`].
    #[default]
    Adaptive,
}

/// What a round knows of the way to the target and of the freeze.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Pace {
    /// Pages that the way takes in a second, once that was measured.
    pub rate: Option<f64>,
    /// Pages that may be left for the freeze.
    pub allowance: u64,
    /// The freeze is next, so that nothing may be put off.
    pub last: bool,
    /// The next round begins no sooner after the beginning of this one: it may send for as long.
    pub interval: Duration,
    /// It ends after that time, with what it has sent.
    pub within: Option<Duration>,
}

/// How many pages of each pattern a round may send.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Quota {
    pub(crate) pages: Census,
    /// As [`Pace::last`].
    pub(crate) last: bool,
}

/// The pages of a round, divided.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Selection {
    /// To be sent now.
    pub send: RangeSet,
    /// To wait.
    pub withhold: RangeSet,
}

impl TransferPolicy {
    /// Divides the pages of `dirty`; each is in exactly one part. `quota` is what the round may still send under
    /// [`Self::Adaptive`], and is used up by this; the other policies ask for none.
    pub fn select(self, dirty: &RangeSet, history: &History, quota: &mut Quota) -> Selection {
        let send = match self {
            Self::History { .. } if quota.last => {
                return Selection { send: dirty.clone(), withhold: RangeSet::new() };
            }
            Self::All => return Selection { send: dirty.clone(), withhold: RangeSet::new() },
            Self::History { window, threshold } => {
                history.select(dirty, |pattern| history::count(pattern, window) < threshold)
            }
            Self::Adaptive => history.select(dirty, |pattern| quota.pages.take(pattern)),
        };
        Selection { withhold: dirty.subtract(&send), send }
    }

    /// Looks at the writing container before the first round, at most, where it can make use of them. What `history`
    /// takes for cold goes for good, and `adaptive` thinks of it again.
    pub fn most_looks(self) -> usize {
        match self {
            Self::All => 0,
            // The first round's own scan is in the window, too.
            Self::History { window, .. } => usize::from(window).saturating_sub(1).min(6),
            Self::Adaptive => 2,
        }
    }

    /// Whether it looks at the history, which then must be kept.
    pub fn needs_history(self) -> bool {
        self != Self::All
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::range::{PageNo, PageRange};

    #[test]
    fn what_history_withholds_goes_before_the_freeze() {
        let pages: RangeSet = PageRange::with_count(PageNo(3), 5).into_iter().collect();
        let mut history = History::default();
        (0..2).for_each(|_| history.advance(&pages));
        let policy = TransferPolicy::History { window: 4, threshold: 2 };
        let quota = |last| Quota { pages: Census::default(), last };
        assert_eq!(policy.select(&pages, &history, &mut quota(false)).withhold, pages);
        assert_eq!(policy.select(&pages, &history, &mut quota(true)).send, pages);
    }
}
