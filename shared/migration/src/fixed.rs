//! What a switch costs besides memory: as earlier moves between the same hosts have shown, else assumed.
//!
//! ```text
//!  freeze ─┬─ dump ──────────┬─ ship ──┬─ join ─ start        the fixed cost is all of this
//!          ├─ last file pass ┘         │
//!          └─ last round ──────────────┴──────┐               without what the last round takes longer
//! ```

use std::fmt;

use haulage_protocol::unit::Micros;
use serde::{Deserialize, Serialize};

use crate::record::{Migration, Outcome};
use crate::timing;

/// What is assumed where nothing has been measured: a small container on a machine of two cores.
pub const FIXED: Micros = Micros(100_000);
/// So many moves count, the latest.
const LATEST: usize = 8;

/// The fixed cost of a switch, and where it comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fixed {
    /// How long a container stands still for it.
    pub cost: Micros,
    /// From so many earlier moves between the two hosts; zero when it is [`FIXED`], assumed.
    pub moves: u32,
}

impl Default for Fixed {
    fn default() -> Self {
        Self { cost: FIXED, moves: 0 }
    }
}

impl fmt::Display for Fixed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.moves {
            0 => write!(f, "{}, assumed", self.cost),
            1 => write!(f, "{}, as in the last move between these hosts", self.cost),
            moves => write!(f, "{}, as in the last {moves} moves between these hosts", self.cost),
        }
    }
}

/// What the latest moves from one host to another have cost.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Costs {
    /// Latest last.
    latest: Vec<Micros>,
}

impl Costs {
    /// One more.
    pub fn note(&mut self, cost: Micros) {
        self.latest.push(cost);
        let old = self.latest.len().saturating_sub(LATEST);
        self.latest.drain(..old);
    }

    /// What the next one is taken to cost: the median, of an even number the lower one, since a machine that was busy
    /// with something else has made some of them long.
    #[must_use]
    pub fn fixed(&self) -> Fixed {
        let mut sorted = self.latest.clone();
        sorted.sort_unstable();
        let middle = sorted.get(sorted.len().saturating_sub(1) / 2);
        let moves = u32::try_from(sorted.len()).unwrap_or(u32::MAX);
        middle.map_or_else(Fixed::default, |cost| Fixed { cost: *cost, moves })
    }
}

/// What the switch has cost, of a migration that was committed.
#[must_use]
pub fn cost_of(migration: &Migration) -> Option<Micros> {
    if migration.outcome != Some(Outcome::Committed) {
        return None;
    }
    let split = timing::freeze_split(migration)?;
    let for_memory = split.last_round.since(split.dump.max(split.files) + split.ship);
    Some(split.total.since(for_memory))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn costs(all: &[u64]) -> Costs {
        let mut costs = Costs::default();
        all.iter().for_each(|cost| costs.note(Micros(*cost)));
        costs
    }

    #[test]
    fn the_middle_of_the_latest_counts_and_without_any_the_constant() {
        assert_eq!(costs(&[]).fixed(), Fixed { cost: FIXED, moves: 0 });
        assert_eq!(costs(&[7]).fixed(), Fixed { cost: Micros(7), moves: 1 });
        assert_eq!(costs(&[9000, 7]).fixed(), Fixed { cost: Micros(7), moves: 2 }, "the lower of two");
        assert_eq!(costs(&[1, 9000, 7]).fixed().cost, Micros(7));
        // The first has been forgotten.
        let nine = costs(&[1, 10, 10, 10, 10, 20, 20, 20, 20]);
        assert_eq!((nine.latest.len(), nine.fixed().cost), (LATEST, Micros(10)));
    }

    #[test]
    fn it_says_where_it_comes_from() {
        assert_eq!(Fixed::default().to_string(), "100.0 ms, assumed");
        assert!(costs(&[5, 5, 5]).fixed().to_string().contains("last 3 moves"));
    }
}
