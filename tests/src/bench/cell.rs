//! What there is to measure, as data.

use serde::Serialize;
use std::fmt;
use std::time::Duration;

/// The link between the two hosts, each way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Link {
    /// Limited to so many megabits per second.
    Mbit(u32),
    /// As fast as the machine is.
    Unshaped,
}

impl Link {
    /// Bytes per second, where there is a limit.
    #[must_use]
    pub fn bytes_per_second(self) -> Option<f64> {
        match self {
            Self::Mbit(mbit) => Some(f64::from(mbit) * 1e6 / 8.0),
            Self::Unshaped => None,
        }
    }
}

impl fmt::Display for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mbit(mbit) if mbit % 1000 == 0 => write!(f, "{} Gbit/s", mbit / 1000),
            Self::Mbit(mbit) => write!(f, "{mbit} Mbit/s"),
            Self::Unshaped => f.write_str("unshaped"),
        }
    }
}

/// Which page a write of the synthetic writer goes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Pattern {
    /// Any of the hot set, at random.
    Hot,
    /// The same, but the hot set moves on when it has been written four times over.
    Shift,
}

impl Pattern {
    /// The word on the writer's command line.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Hot => "hot",
            Self::Shift => "shift",
        }
    }
}

/// What a write of the synthetic writer leaves in a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Fill {
    /// A page full of what does not compress.
    Random,
    /// 32 bytes in a page of zeros.
    Sparse,
    /// 16 bytes in a page full of what does not compress.
    Byte,
}

impl Fill {
    /// The word on the writer's command line.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Random => "random",
            Self::Sparse => "sparse",
            Self::Byte => "byte",
        }
    }
}

/// What memory the synthetic writer writes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Private anonymous memory.
    Private,
    /// Anonymous memory that all its processes share.
    Shared,
    /// The same in a memfd whose descriptor stays open.
    Memfd,
    /// The same in a System V segment.
    SysV,
}

impl Kind {
    /// The word on the writer's command line.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Private => "private",
            Self::Shared => "shared",
            Self::Memfd => "memfd",
            Self::SysV => "sysv",
        }
    }
}

/// How fast the synthetic writer writes.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Rate {
    /// Not at all.
    Idle,
    /// So many pages per second.
    Pages(u64),
    /// So many pages that their bytes are this share of the link's rate.
    OfLink(f64),
}

/// The synthetic writer (`workloads/writer.c`).
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Writer {
    /// Memory, over all processes.
    pub mebibytes: u64,
    /// Processes.
    pub processes: u32,
    /// Where it writes.
    pub pattern: Pattern,
    /// The hot set, in thousandths of the memory.
    pub hot_permille: u64,
    /// What it writes.
    pub fill: Fill,
    /// Where.
    pub kind: Kind,
    /// How fast.
    pub rate: Rate,
}

/// What clients do to a Redis.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum RedisLoad {
    /// Overwrite values of 1 KiB, so many megabytes per second.
    Set {
        /// Megabytes (10^6 bytes) of values per second.
        megabytes: u32,
        /// Which of the keys: by Zipf's law (exponent 0.99), else all alike.
        zipf: bool,
    },
    /// One client increments a counter, each command after the answer to the one before, as fast as it goes.
    Incr,
}

/// A Redis.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Redis {
    /// Its resident memory, about.
    pub mebibytes: u32,
    /// Its clients.
    pub load: RedisLoad,
}

/// What moves.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Workload {
    /// The synthetic writer.
    Writer(Writer),
    /// A Redis.
    Redis(Redis),
}

impl Workload {
    /// Resident memory, about.
    #[must_use]
    pub fn mebibytes(&self) -> u64 {
        match self {
            Self::Writer(writer) => writer.mebibytes,
            Self::Redis(redis) => u64::from(redis.mebibytes),
        }
    }
}

/// A way to move a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Engine {
    /// Ours, with a transfer policy, or with the default one.
    Haul(Option<&'static str>),
    /// `runc checkpoint`, copy, `runc restore`, without pre-copy.
    Runc,
    /// `docker checkpoint create`, copy, `docker start --checkpoint`.
    Docker,
    /// `podman container checkpoint --export`, copy, `podman container restore --import`.
    Podman,
}

impl fmt::Display for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Haul(None) => f.write_str("haul"),
            Self::Haul(Some(policy)) => write!(f, "haul {policy}"),
            Self::Runc => f.write_str("runc"),
            Self::Docker => f.write_str("docker"),
            Self::Podman => f.write_str("podman"),
        }
    }
}

/// A contender in a cell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Contender {
    /// How it moves the container.
    pub engine: Engine,
    /// How many runs are counted; one more is made before them and discarded.
    pub runs: u32,
}

/// One workload on one link, with all that compete there.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Cell {
    /// Unique in the plan; marks find cells by it.
    pub name: &'static str,
    /// The link.
    pub link: Link,
    /// What moves.
    pub workload: Workload,
    /// What `haul migrate` is told besides.
    pub haul: &'static [&'static str],
    /// Who moves it.
    pub contenders: Vec<Contender>,
    /// No run is begun when the cell has taken so long.
    #[serde(skip)]
    pub limit: Duration,
}

impl Cell {
    /// Pages that the synthetic writer writes per second.
    #[must_use]
    pub fn write_rate(&self) -> u64 {
        let Workload::Writer(writer) = self.workload else { return 0 };
        match writer.rate {
            Rate::Idle => 0,
            Rate::Pages(pages) => pages,
            // Of a link without a limit no share can be taken; the plan has no such cell.
            Rate::OfLink(share) => {
                crate::bench::stats::whole(self.link.bytes_per_second().unwrap_or_default() * share / 4096.0)
            }
        }
    }
}
