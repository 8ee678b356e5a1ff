//! What an operator or a program asks for: a migration, or the end of one.

use serde::{Deserialize, Serialize};

use crate::fault::Fault;
use crate::id::{HostId, MigrationId};
use crate::policy::Policy;
use crate::transfer::Transfer;
use crate::unit::Micros;
use crate::version::Version;

/// A request to migrate, published on the work queue. The same id twice is one migration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Job {
    /// The protocol version of the sender.
    pub version: Version,
    /// Chosen by the sender.
    pub id: MigrationId,
    /// A name, an id, or a unique beginning of an id.
    pub container: String,
    /// Where it runs; found by asking every host when absent.
    #[serde(default)]
    pub from: Option<HostId>,
    /// Where it shall run.
    pub to: HostId,
    /// How.
    #[serde(default)]
    pub options: Options,
}

/// How to migrate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Options {
    /// Which dirty pages a round sends, and with `phaul` when rounds end.
    pub policy: Policy,
    /// Pre-copy goes on until the container is predicted to stand still for no longer than this, in milliseconds.
    /// [`DOWNTIME`] when absent.
    pub max_downtime_ms: Option<u64>,
    /// The longest time, in milliseconds, from the first round to the freeze. When it has passed the container is
    /// frozen all the same, or, if `max_downtime_ms` was given and cannot be kept, the migration is undone. Without
    /// it the container is frozen when more rounds no longer help.
    pub deadline_ms: Option<u64>,
    /// The most pre-copy rounds.
    pub max_rounds: Option<u32>,
    /// The least time, in milliseconds, between the beginnings of two rounds of pre-copy. The few rounds between the
    /// preparation of the target and the freeze do not keep it. At most [`MAX_ROUND_INTERVAL_MS`].
    pub round_interval_ms: u64,
    /// What write tracking may cost the container, in percent (1 to 100) of one processor's time: rounds are put apart, up
    /// to a second, until it is no more. 100 is no bound. Not kept by the rounds before the freeze, by `phaul`, and
    /// by rounds that get nowhere where a downtime and a deadline must be kept.
    pub max_tax_percent: u8,
    /// Slow the container down when it writes faster than its memory can be sent.
    pub auto_converge: bool,
    /// Where the downtime cannot be kept, run the container on the target before it has its memory, which it gets from the
    /// frozen source while it runs. Should source or link be lost before it has all, what it has done since is lost.
    pub post_copy: bool,
    /// The longest time, in milliseconds, that the container may stand still before the target is asked to restore it;
    /// then the migration is undone. Zero: as long as it takes.
    pub max_frozen_ms: u64,
    /// Bind mounts (paths on the hosts) that are the same on both hosts.
    pub shared_binds: Vec<String>,
    /// How pages and files travel.
    pub transfer: Transfer,
}

/// The longest interval between rounds, in milliseconds, and what a longer one is taken for: a cancellation waits for the
/// round that is under way, its pause included.
pub const MAX_ROUND_INTERVAL_MS: u64 = 10_000;

/// The tax that is allowed when none is given, in percent.
pub const TAX: u8 = 5;

/// The downtime that is aimed at when none is asked for.
pub const DOWNTIME: Micros = Micros(150_000);

impl Options {
    /// The downtime that is aimed at.
    #[must_use]
    pub fn downtime(&self) -> Micros {
        self.max_downtime_ms.map_or(DOWNTIME, |ms| Micros(ms.saturating_mul(1000)))
    }
}

impl Default for Options {
    fn default() -> Self {
        Self {
            policy: Policy::default(),
            max_downtime_ms: None,
            deadline_ms: None,
            max_rounds: None,
            round_interval_ms: 0,
            max_tax_percent: TAX,
            auto_converge: false,
            post_copy: false,
            max_frozen_ms: 60_000,
            shared_binds: Vec::new(),
            transfer: Transfer::default(),
        }
    }
}

/// Asks the coordinator that owns a migration to give it up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cancel {
    /// The protocol version of the sender.
    pub version: Version,
    /// Which.
    pub id: MigrationId,
    /// The operator vouches that the container does not run on the target host and will not start to: the source
    /// goes on without the target's word, even if the target was asked to restore.
    #[serde(default)]
    pub target_is_dead: bool,
}

/// The answer to [`Cancel`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "snake_case")]
pub enum CancelAnswer {
    /// It will be rolled back.
    Accepted,
    /// It will not.
    Refused {
        /// Why.
        fault: Fault,
    },
}
