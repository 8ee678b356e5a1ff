//! What coordinators publish about a migration, for people and automation to follow.

use serde::{Deserialize, Serialize};

use crate::fault::Fault;
use crate::id::MigrationId;
use crate::page_shipper::RoundReport;
use crate::unit::Micros;
use crate::version::Version;

/// One event. Published in the order of `sequence`, at least once: a reader drops what it has seen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// The protocol version of the sender.
    pub version: Version,
    /// The migration.
    pub migration: MigrationId,
    /// The record's revision that the event tells of; grows, not by one.
    pub sequence: u64,
    /// When, on the coordinator's clock, since the Unix epoch.
    pub at: Micros,
    /// What happened.
    pub what: What,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum What {
    /// The migration entered a phase.
    Phase {
        /// Its name, as the migration crate's `Phase`.
        phase: String,
    },
    /// How writes are tracked. `none` means that the whole memory is sent while the container is frozen.
    Tracking {
        /// `write_protect`, `soft_dirty` or `none`.
        tracker: String,
        /// Why not by write protection, when not.
        reason: Option<String>,
    },
    /// A pre-copy round is over.
    Round {
        /// Its figures.
        report: RoundReport,
        /// The predicted downtime, if the container were frozen now.
        predicted: Micros,
    },
    /// Something failed: the migration is being undone.
    Failed {
        /// Why.
        fault: Fault,
    },
    /// It is over.
    Finished {
        /// `committed` or `rolled_back`.
        outcome: String,
        /// Why it was rolled back.
        fault: Option<Fault>,
    },
}
