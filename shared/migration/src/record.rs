//! The record of a migration: everything that a coordinator must know to carry it on, and what people read.

use std::collections::{BTreeMap, BTreeSet};

use haulage_protocol::checkpointer::{Dumped, Frozen, Inspected};
use haulage_protocol::fault::Fault;
use haulage_protocol::id::{CoordinatorId, Epoch, HostId, Step};
use haulage_protocol::job::Job;
use haulage_protocol::page_shipper::{FinalReport, PagesOpened, RoundReport, TrackingStarted};
use haulage_protocol::restorer::{Checked, Created, Restored};
use haulage_protocol::secret::Token;
use haulage_protocol::syncer::{FilesOpened, FilesSynced, ImagePulled, ImagePushed};
use haulage_protocol::unit::Micros;
use haulage_protocol::version::Version;
use serde::{Deserialize, Serialize};

use crate::effect::Effect;
use crate::phase::Phase;

/// How a migration ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The container runs on the target.
    Committed,
    /// The container runs on the source, as if nothing had happened.
    RolledBack,
}

impl Outcome {
    /// The name in records and events.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Committed => "committed",
            Self::RolledBack => "rolled_back",
        }
    }
}

/// When an effect began and ended, on the coordinator's clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Span {
    /// What.
    pub effect: Effect,
    /// When it was asked for, since the Unix epoch.
    pub from: Micros,
    /// When its answer came.
    pub to: Option<Micros>,
}

/// Something that could not be removed, because its host did not answer or failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Leftover {
    /// What was to be done.
    pub effect: Effect,
    /// Why it was not.
    pub fault: Fault,
}

/// What the effects have found out so far.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Facts {
    /// Where the container runs.
    pub source: Option<HostId>,
    /// What it is.
    pub inspected: Option<Inspected>,
    /// What the target said.
    pub checked: Option<Checked>,
    /// The image, put into the bucket.
    pub pushed: Option<ImagePushed>,
    /// The image, taken from it.
    pub pulled: Option<ImagePulled>,
    /// The container on the target.
    pub created: Option<Created>,
    /// The target's page store.
    pub pages: Option<PagesOpened>,
    /// The target's file session.
    pub files: Option<FilesOpened>,
    /// How writes are tracked.
    pub tracking: Option<TrackingStarted>,
    /// The rounds.
    pub rounds: Vec<RoundReport>,
    /// The file passes: live, frozen, and the dump.
    pub passes: Vec<FilesSynced>,
    /// The freeze.
    pub frozen: Option<Frozen>,
    /// The dump.
    pub dumped: Option<Dumped>,
    /// The last round.
    pub last_round: Option<FinalReport>,
    /// The restore.
    pub restored: Option<Restored>,
    /// When the source was thawed again, on its own clock.
    pub thawed_at: Option<Micros>,
}

/// A migration, whole. Kept in KV under its id, replaced with compare-and-set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Migration {
    /// The protocol version of the writer.
    pub version: Version,
    /// What was asked for.
    pub job: Job,
    /// Where it stands.
    pub phase: Phase,
    /// Counts its owners.
    pub epoch: Epoch,
    /// Its present owner.
    pub owner: CoordinatorId,
    /// The number of the last command.
    pub last_step: Step,
    /// Commands without an answer yet.
    pub pending: BTreeMap<Step, Effect>,
    /// Every effect that was ever asked for, whether or not an answer came: what undo looks at.
    pub attempted: BTreeSet<Effect>,
    /// What is known.
    pub facts: Facts,
    /// Lets the source write to the target.
    pub token: Token,
    /// Why it is being, or was, undone: the first fault.
    pub fault: Option<Fault>,
    /// How it ended.
    pub outcome: Option<Outcome>,
    /// What could not be cleaned.
    #[serde(default)]
    pub leftovers: Vec<Leftover>,
    /// When it was accepted.
    pub began: Micros,
    /// When it entered each phase.
    pub phases: Vec<(Phase, Micros)>,
    /// When each effect ran.
    pub spans: Vec<Span>,
}

impl Migration {
    /// Numbers a try to remove what was left behind, under numbers that no earlier command had. The record is to be
    /// persisted before the effects are performed.
    pub fn retry_leftovers(&mut self) -> Vec<(Step, Effect)> {
        let leftovers = self.leftovers.iter().map(|leftover| leftover.effect).collect::<Vec<_>>();
        leftovers
            .into_iter()
            .map(|effect| {
                self.last_step = Step(self.last_step.0.saturating_add(1));
                (self.last_step, effect)
            })
            .collect()
    }

    /// Whether nothing more will happen.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.phase == Phase::Done
    }

    /// Where the container ran at first, once that is known.
    #[must_use]
    pub fn source(&self) -> Option<&HostId> {
        self.facts.source.as_ref()
    }
}
