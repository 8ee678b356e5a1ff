//! Which dirty pages a round sends. A page that is withheld is sent at the end at the latest: the ledger owes it.

use crate::history::History;
use crate::range::{PageRange, RangeSet};

/// A transfer policy, as data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TransferPolicy {
    /// Every dirty page in every round, as P.Haul does.
    #[default]
    All,
    /// Withhold pages that are often dirty, since they would soon be dirty again.
    History {
        /// Rounds looked at, 1 to 8 (more counts as 8).
        window: u8,
        /// Dirty in so many of them, a page is withheld.
        threshold: u8,
    },
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
    /// Divides the pages of `dirty`; each is in exactly one part.
    pub fn select(self, dirty: &RangeSet, history: &History) -> Selection {
        match self {
            Self::All => Selection { send: dirty.clone(), withhold: RangeSet::new() },
            Self::History { window, threshold } => {
                let hot = dirty.pages().filter(|page| history.dirty_rounds(*page, window) >= threshold);
                let withhold = hot.filter_map(|page| PageRange::with_count(page, 1)).collect();
                Selection { send: dirty.subtract(&withhold), withhold }
            }
        }
    }

    /// Whether it looks at the history, which then must be kept.
    pub fn needs_history(self) -> bool {
        matches!(self, Self::History { .. })
    }
}
