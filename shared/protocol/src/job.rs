//! What an operator or a program asks for: a migration, or the end of one.

use serde::{Deserialize, Serialize};

use crate::fault::Fault;
use crate::id::{HostId, MigrationId};
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
    /// Pre-copy goes on until the rest is predicted to take no longer than this, in milliseconds.
    pub max_downtime_ms: u64,
    /// The most pre-copy rounds.
    pub max_rounds: u32,
    /// Bind mounts (paths on the hosts) that are the same on both hosts.
    pub shared_binds: Vec<String>,
}

impl Default for Options {
    fn default() -> Self {
        Self { max_downtime_ms: 150, max_rounds: 8, shared_binds: Vec::new() }
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
