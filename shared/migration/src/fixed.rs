//! What a switch costs besides memory: as earlier moves between the same hosts have shown, else assumed. Containers of
//! different shapes are compared by what each costs on one machine.
//!
//! ```text
//!  freeze ─┬─ dump ──────────┬─ ship ──┬─ join ─ start        the fixed cost is all of this
//!          ├─ last file pass ┘         │
//!          └─ last round ──────────────┴──────┐               without what the last round takes longer
//! ```

use std::fmt;

use haulage_protocol::checkpointer::Inspected;
use haulage_protocol::unit::{Bytes, Micros};
use serde::{Deserialize, Serialize};

use crate::record::{Migration, Outcome};
use crate::timing;

/// What is assumed where nothing has been measured: a small container on a machine of two cores.
pub const FIXED: Micros = Micros(100_000);
/// So many moves count, the latest.
const LATEST: usize = 8;

/// What one process, each further one and each GiB of a tmpfs take: a machine of two cores (deploy/BENCHMARKS.md: idle-64,
/// processes-14 and -50; README.md, of tmpfs).
const USUAL: (Micros, Micros, Micros) = (Micros(45_000), Micros(6_500), Micros(400_000));

/// That of a container which says what its switch costs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// How many it has.
    pub processes: u32,
    /// What is in its tmpfs mounts, to be compared when it stands still.
    pub tmpfs: Bytes,
}

impl Shape {
    /// One process, and no files in memory.
    pub const SMALL: Self = Self { processes: 1, tmpfs: Bytes(0) };

    /// What it costs beyond [`Self::SMALL`].
    fn extra(self) -> Micros {
        let (_, process, gibibyte) = USUAL;
        let processes = process.0.saturating_mul(u64::from(self.processes.saturating_sub(1)));
        let tmpfs = (u128::from(gibibyte.0) * u128::from(self.tmpfs.0)) >> 30;
        Micros(processes.saturating_add(u64::try_from(tmpfs).unwrap_or(u64::MAX)))
    }

    fn usual(self) -> Micros {
        USUAL.0 + self.extra()
    }
}

impl From<&Inspected> for Shape {
    fn from(inspected: &Inspected) -> Self {
        Self { processes: inspected.processes, tmpfs: inspected.tmpfs.iter().map(|tmpfs| tmpfs.used).sum() }
    }
}

/// `cost`, that of a container of shape `from`, of one of shape `to`.
fn scaled(cost: Micros, from: Shape, to: Shape) -> Micros {
    let scaled = u128::from(cost.0) * u128::from(to.usual().0) / u128::from(from.usual().0.max(1));
    Micros(u64::try_from(scaled).unwrap_or(u64::MAX))
}

/// The fixed cost of a switch, and where it comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fixed {
    /// How long a container stands still for it: [`Shape::SMALL`], or one it has been turned to by [`Self::of`].
    pub cost: Micros,
    /// From so many earlier moves between the two hosts; zero when it is [`FIXED`], assumed.
    pub moves: u32,
}

impl Fixed {
    /// That of a container of this shape, where this is a small one's.
    #[must_use]
    pub fn of(self, shape: Shape) -> Self {
        let cost = match self.moves {
            0 => self.cost + shape.extra(),
            _ => scaled(self.cost, Shape::SMALL, shape),
        };
        Self { cost, ..self }
    }
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
            1 => write!(f, "{}, by the last move between these hosts", self.cost),
            moves => write!(f, "{}, by the last {moves} moves between these hosts", self.cost),
        }
    }
}

/// What the latest moves from one host to another have cost.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Costs {
    /// Latest last, each turned to what [`Shape::SMALL`] would have cost.
    #[serde(default)]
    small: Vec<Micros>,
}

impl Costs {
    /// One more, of a container of this shape.
    pub fn note(&mut self, cost: Micros, shape: Shape) {
        self.small.push(scaled(cost, shape, Shape::SMALL));
        let old = self.small.len().saturating_sub(LATEST);
        self.small.drain(..old);
    }

    /// What the next one of [`Shape::SMALL`] is taken to cost: the median, of an even number the lower one, since a machine that was busy
    /// with something else has made some of them long.
    #[must_use]
    pub fn fixed(&self) -> Fixed {
        let mut sorted = self.small.clone();
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
        all.iter().for_each(|cost| costs.note(Micros(*cost), Shape::SMALL));
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
        assert_eq!((nine.small.len(), nine.fixed().cost), (LATEST, Micros(10)));
    }

    #[test]
    fn more_processes_and_files_in_memory_cost_more_on_whatever_machine() {
        let fifty = Shape { processes: 50, tmpfs: Bytes(0) };
        let filled = Shape { processes: 1, tmpfs: Bytes(1 << 30) };
        assert_eq!(Fixed::default().of(Shape::SMALL), Fixed::default());
        assert_eq!(Fixed::default().of(fifty).cost, Micros(418_500));
        assert_eq!(Fixed::default().of(filled).cost, Micros(500_000));
        // A machine on which a small one takes a third of the usual.
        assert_eq!(costs(&[15_000]).fixed().of(fifty), Fixed { cost: Micros(121_166), moves: 1 });
        let mut known = Costs::default();
        known.note(Micros(121_166), fifty);
        assert_eq!(known.fixed().cost, Micros(14_999));
        let none = Shape { processes: 0, ..Shape::SMALL };
        assert_eq!(costs(&[15_000]).fixed().of(none), costs(&[15_000]).fixed());
        let most = Shape { processes: u32::MAX, tmpfs: Bytes(u64::MAX) };
        assert!(costs(&[u64::MAX]).fixed().of(most).cost >= Micros(u64::MAX / 2));
    }

    #[test]
    fn it_says_where_it_comes_from() {
        assert_eq!(Fixed::default().to_string(), "100.0 ms, assumed");
        assert!(costs(&[5, 5, 5]).fixed().to_string().contains("last 3 moves"));
    }
}
