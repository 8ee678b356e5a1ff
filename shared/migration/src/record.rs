//! The record of a migration: everything that a coordinator must know to carry it on, and what people read.

use std::collections::{BTreeMap, BTreeSet};

use haulage_protocol::checkpointer::{Dumped, Frozen, Inspected};
use haulage_protocol::fault::Fault;
use haulage_protocol::id::{CoordinatorId, Epoch, HostId, Step};
use haulage_protocol::job::Job;
use haulage_protocol::page_shipper::{FinalReport, PagesOpened, RoundReport, TrackingStarted};
use haulage_protocol::restorer::{Checked, Created, Filled, Prepared, Restored};
use haulage_protocol::secret::Token;
use haulage_protocol::syncer::{FilesOpened, FilesSynced, ImagePulled, ImagePushed};
use haulage_protocol::unit::Micros;
use haulage_protocol::version::Version;
use serde::{Deserialize, Serialize};

use crate::converge::{Convergence, Slowdown};
use crate::effect::Effect;
use crate::fixed::{Fixed, Shape};
use crate::pace::{Ago, Pacing, pacing};
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
    /// What it was called when it was found; an operator may have named it by its id.
    #[serde(default)]
    pub name: Option<String>,
    /// What earlier moves between the two hosts say of a small container's switch.
    #[serde(default)]
    pub fixed: Option<Fixed>,
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
    /// When the container was slowed down, and how much.
    #[serde(default)]
    pub slowdowns: Vec<Slowdown>,
    /// It has its processor time back.
    #[serde(default)]
    pub unthrottled: bool,
    /// How pre-copy ended.
    #[serde(default)]
    pub convergence: Option<Convergence>,
    /// The file passes: live, of the tmpfs mounts once more if there are any, frozen, and the dump.
    pub passes: Vec<FilesSynced>,
    /// What the target has made ready.
    #[serde(default)]
    pub prepared: Option<Prepared>,
    /// The freeze.
    pub frozen: Option<Frozen>,
    /// The dump.
    pub dumped: Option<Dumped>,
    /// The last round.
    pub last_round: Option<FinalReport>,
    /// The restore.
    pub restored: Option<Restored>,
    /// How the container got its memory after it ran on the target.
    #[serde(default)]
    pub filled: Option<Filled>,
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

    /// The container's name, as far as it is known; before it is found, whatever the operator called it.
    #[must_use]
    pub fn name(&self) -> &str {
        let inspected = self.facts.inspected.as_ref().map(|inspected| &inspected.name);
        inspected.or(self.facts.name.as_ref()).unwrap_or(&self.job.container)
    }

    /// When the container will have stood still for too long, on the coordinator's clock: only while it does, and may
    /// still go on without anybody's word but the source's.
    #[must_use]
    pub fn frozen_until(&self) -> Option<Micros> {
        let limit = Micros(self.job.options.max_frozen_ms.saturating_mul(1000));
        let stands_still = (Phase::Freeze..=Phase::Ship).contains(&self.phase);
        let frozen = self.spans.iter().find(|span| span.effect == Effect::Freeze)?;
        (stands_still && limit > Micros(0)).then_some(frozen.from + limit)
    }

    /// How long pre-copy lasts by `now`, the preparation of the target included; zero before it.
    #[must_use]
    pub fn pre_copied(&self, now: Micros) -> Micros {
        let began = self.phases.iter().find(|(phase, _)| *phase == Phase::PreCopy);
        began.map_or(Micros(0), |(_, at)| now.since(*at))
    }

    /// What this container's switch is taken to cost besides memory.
    #[must_use]
    pub fn fixed(&self) -> Fixed {
        let shape = self.facts.inspected.as_ref().map_or(Shape::SMALL, Shape::from);
        self.facts.fixed.unwrap_or_default().of(shape)
    }

    /// When the next round begins, seen from `now`. Clocks of different hosts are not compared: a round has begun as
    /// long before its answer as its source says that it took.
    #[must_use]
    pub fn pacing(&self, now: Micros) -> Pacing {
        let rounds = self.spans.iter().filter(|span| matches!(span.effect, Effect::RunRound(_)));
        let ends = rounds.filter_map(|span| span.to);
        let began: Vec<Micros> =
            ends.zip(&self.facts.rounds).map(|(to, round)| to.since(round.took)).collect();
        let mut ago = began.iter().rev().map(|began| now.since(*began));
        let ago = Ago { last: ago.next().unwrap_or_default(), before: ago.next() };
        let settles = self.phase != Phase::PreCopy;
        pacing(&self.facts.rounds, &self.job.options, self.pre_copied(now), ago, settles)
    }

    /// Whether the container is to run on the target before all its memory is there.
    #[must_use]
    pub fn is_post_copy(&self) -> bool {
        self.facts.convergence.is_some_and(|convergence| convergence.post_copy)
    }

    /// Rounds that have ended since the target was prepared.
    #[must_use]
    pub fn settled(&self) -> usize {
        let spans = self.spans.iter().skip_while(|span| span.effect != Effect::Prepare);
        spans.filter(|span| matches!(span.effect, Effect::RunRound(_)) && span.to.is_some()).count()
    }

    /// When it was over, on the coordinator's clock.
    #[must_use]
    pub fn ended(&self) -> Option<Micros> {
        self.phases.last().filter(|(phase, _)| *phase == Phase::Done).map(|(_, at)| *at)
    }

    /// Where the container ran at first, once that is known.
    #[must_use]
    pub fn source(&self) -> Option<&HostId> {
        self.facts.source.as_ref()
    }
}
