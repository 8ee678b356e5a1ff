//! The state machine: `step(event) -> (new record, effects)`.
//!
//! What always holds, whatever fails, is lost, repeated or restarted:
//! - the container runs in at most one place: the target is asked to restore only while the source is frozen and
//!   held, and the source is thawed only when the target has confirmed that it does not run there, if a restore
//!   was ever asked for;
//! - the source is ended only in [`Phase::Retire`], after the commit, that is a record whose phase was
//!   [`Phase::Commit`], which is entered only from `Verify`, and after the target's files are on its disk;
//! - every effect that was *asked for* is undone, whether or not its answer came.
//!
//! An effect is asked for when it is in the record that was written, so performing it may come after a restart.

use std::collections::BTreeSet;

use haulage_protocol::fault::{Fault, code};
use haulage_protocol::id::{CoordinatorId, Epoch, Round, Step};
use haulage_protocol::job::Job;
use haulage_protocol::secret::Token;
use haulage_protocol::unit::Micros;
use haulage_protocol::version::Version;

use crate::converge::{Convergence, Decision, Slowdown, Why, aim, decide, forecast, settle};
use crate::effect::{Effect, Success};
use crate::phase::Phase;
use crate::record::{Facts, Leftover, Migration, Outcome, Span};

/// What a driver tells the machine.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// An effect succeeded.
    Done(Step, Success),
    /// An effect failed, or its answer never came.
    Failed(Step, Fault),
    /// An operator wants it undone.
    Cancelled,
    /// An operator vouches that the container does not run on the target and will not: undo without its word.
    TargetIsDead,
    /// Time has passed: see [`Migration::frozen_until`]. Harmless at any moment.
    TimePassed,
    /// Another coordinator takes over: every pending effect is to be performed again under its number.
    TakenOver(CoordinatorId),
}

/// An event that makes no sense in the state. The record is unchanged.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IllegalEvent {
    /// The answer does not belong to the effect.
    #[error("step {step} is {effect}, which cannot give that answer")]
    WrongAnswer {
        /// The step.
        step: Step,
        /// What was asked under it.
        effect: Effect,
    },
    /// It is too late to cancel.
    #[error("the migration is in phase {0} and can no longer be cancelled")]
    NotCancellable(Phase),
}

/// The new record, to be persisted, and then the effects, to be performed.
#[derive(Debug, Clone, PartialEq)]
pub struct Transition {
    /// The whole new state.
    pub next: Migration,
    /// What to do once it is persisted. All of it is in `next.pending`.
    pub effects: Vec<(Step, Effect)>,
}

impl Migration {
    /// A migration that was just accepted, and its first effects.
    #[must_use]
    pub fn accept(job: Job, token: Token, owner: CoordinatorId, now: Micros) -> Transition {
        let mut next = Self {
            version: Version::CURRENT,
            facts: Facts { source: job.from.clone(), ..Facts::default() },
            job,
            phase: Phase::Locate,
            epoch: Epoch(1),
            owner,
            last_step: Step(0),
            pending: Default::default(),
            attempted: BTreeSet::new(),
            token,
            fault: None,
            outcome: None,
            leftovers: Vec::new(),
            began: now,
            phases: Vec::new(),
            spans: Vec::new(),
        };
        let effects = next.enter(Phase::Locate, now);
        Transition { next, effects }
    }

    /// Applies an event at time `now` (microseconds since the Unix epoch). An answer to a step that is not
    /// pending is a repetition and changes nothing.
    ///
    /// # Errors
    /// [`IllegalEvent`]; the record is unchanged.
    pub fn step(&self, event: Event, now: Micros) -> Result<Transition, IllegalEvent> {
        let mut next = self.clone();
        let effects = match event {
            Event::Done(step, success) => match next.answered(step, now) {
                None => Vec::new(),
                Some(effect) => {
                    next.learn(step, effect, success)?;
                    next.advance(now)
                }
            },
            Event::Failed(step, fault) => match next.answered(step, now) {
                None => Vec::new(),
                Some(effect) => {
                    next.note_failure(effect, fault);
                    next.advance(now)
                }
            },
            Event::Cancelled => {
                if !next.phase.is_cancellable() {
                    return Err(IllegalEvent::NotCancellable(next.phase));
                }
                next.fault.get_or_insert_with(|| Fault::new(code::CANCELLED, "cancelled by an operator"));
                next.advance(now)
            }
            Event::TargetIsDead => {
                if !next.phase.is_revocable() && next.phase != Phase::Fence {
                    return Err(IllegalEvent::NotCancellable(next.phase));
                }
                next.give_up_target(now)
            }
            Event::TimePassed => match next.frozen_until() {
                Some(until) if now >= until => next.give_up_frozen(now),
                _ => Vec::new(),
            },
            Event::TakenOver(owner) => {
                next.epoch = Epoch(next.epoch.0.saturating_add(1));
                next.owner = owner;
                next.pending.iter().map(|(step, effect)| (*step, *effect)).collect()
            }
        };
        Ok(Transition { next, effects })
    }

    /// What the target would have been asked is swept when it is back; what it was asked is waited for no longer.
    /// Parallel effects on the source are: an undo must not race with them.
    fn give_up_target(&mut self, now: Micros) -> Vec<(Step, Effect)> {
        let message = "the target host was declared dead by an operator";
        let fault = Fault::new(code::TARGET_DEAD, message);
        self.fault.get_or_insert(fault.clone());
        let unasked = self.attempted.insert(Effect::UndoTarget);
        if self.must_undo(Effect::UndoTarget) && (unasked || self.phase == Phase::Fence) {
            self.leftovers.push(Leftover { effect: Effect::UndoTarget, fault });
        }
        if self.phase >= Phase::Restore {
            self.pending.clear();
        }
        self.advance(now)
    }

    /// What is under way is not waited for, since it may be what takes so long. It works for a target that will not be
    /// asked to restore, and the checkpointer does one thing after the other: its undo comes after what it undoes.
    fn give_up_frozen(&mut self, now: Micros) -> Vec<(Step, Effect)> {
        let limit = Micros(self.job.options.max_frozen_ms.saturating_mul(1000));
        let message =
            format!("the container stood still for {limit} and the target could not be asked to restore it");
        let remedy = "see `haul show` for what took so long; --max-frozen allows more";
        self.fault.get_or_insert(Fault::new(code::FROZEN_TOO_LONG, message).remedy(remedy));
        self.pending.clear();
        self.advance(now)
    }

    fn answered(&mut self, step: Step, now: Micros) -> Option<Effect> {
        let effect = self.pending.remove(&step)?;
        let open = self.spans.iter_mut().rev().find(|span| span.effect == effect && span.to.is_none());
        if let Some(span) = open {
            span.to = Some(now);
        }
        Some(effect)
    }

    fn note_failure(&mut self, effect: Effect, fault: Fault) {
        if self.phase.is_revocable() {
            self.fault.get_or_insert(fault);
        } else {
            self.leftovers.push(Leftover { effect, fault });
        }
    }

    fn learn(&mut self, step: Step, effect: Effect, success: Success) -> Result<(), IllegalEvent> {
        let facts = &mut self.facts;
        match (effect, success) {
            (Effect::Locate, Success::Located(host, located, fixed)) => {
                facts.source = Some(host);
                facts.fixed = fixed;
                // By its id from here on: a name can pass to another container.
                if let Some(id) = located.container {
                    let asked = std::mem::replace(&mut self.job.container, id.to_string());
                    facts.name = Some(located.name.unwrap_or(asked));
                }
            }
            (Effect::Inspect, Success::Inspected(inspected)) => facts.inspected = Some(*inspected),
            (Effect::Check, Success::Checked(checked)) => facts.checked = Some(checked),
            (Effect::PushImage, Success::Pushed(pushed)) => facts.pushed = Some(pushed),
            (Effect::PullImage, Success::Pulled(pulled)) => facts.pulled = Some(pulled),
            (Effect::Create, Success::Created(created)) => facts.created = Some(created),
            (Effect::OpenPages, Success::PagesOpened(opened)) => facts.pages = Some(opened),
            (Effect::OpenFiles, Success::FilesOpened(opened)) => facts.files = Some(opened),
            (
                Effect::SyncFiles | Effect::SyncTmpfs | Effect::SyncFrozen | Effect::ShipImages,
                Success::Synced(synced),
            ) => facts.passes.push(synced),
            (Effect::StartTracking, Success::Tracking(tracking)) => facts.tracking = Some(tracking),
            (Effect::RunRound(_), Success::Round(report)) => facts.rounds.push(report),
            (Effect::Throttle(keep), Success::Unit) => {
                facts.slowdowns.push(Slowdown { after: facts.rounds.len(), keep });
            }
            (Effect::Unthrottle, Success::Unit) => facts.unthrottled = true,
            (Effect::Prepare, Success::Prepared(prepared)) => facts.prepared = Some(prepared),
            (Effect::Freeze, Success::Frozen(frozen)) => facts.frozen = Some(frozen),
            (Effect::Dump, Success::Dumped(dumped)) => facts.dumped = Some(dumped),
            (Effect::FinalRound, Success::Final(report)) => facts.last_round = Some(report),
            (Effect::Restore, Success::Restored(restored)) => facts.restored = Some(restored),
            (Effect::Verify, Success::Verified(verified)) => facts.filled = Some(verified.filled),
            (Effect::RollBackSource, Success::RolledBack(rolled_back)) => {
                facts.thawed_at = rolled_back.thawed_at
            }
            (
                Effect::AcquireLease
                | Effect::PrepareFreeze
                | Effect::TakePackets
                | Effect::ConfirmHold
                | Effect::ConfirmLease
                | Effect::PersistFiles
                | Effect::CommitSource
                | Effect::Adopt
                | Effect::UndoTarget
                | Effect::CloseSourcePages
                | Effect::CloseTargetPages
                | Effect::CloseSourceFiles
                | Effect::CloseTargetFiles
                | Effect::ReleaseLease,
                Success::Unit,
            ) => {}
            (effect, _) => return Err(IllegalEvent::WrongAnswer { step, effect }),
        }
        Ok(())
    }

    /// Moves on while nothing is pending; parallel effects are waited for, also when one has failed, so that undo does
    /// not race with what it undoes.
    fn advance(&mut self, now: Micros) -> Vec<(Step, Effect)> {
        if self.can_ship_early() {
            return vec![self.ask(Effect::ShipImages, now)];
        }
        while self.pending.is_empty() && self.phase != Phase::Done {
            let effects = match self.following(now) {
                Following::Stay(effect) => vec![self.ask(effect, now)],
                Following::Enter(phase) => self.enter(phase, now),
                Following::Converged { why, post_copy, on } => {
                    self.facts.convergence = Some(Convergence { post_copy, ..self.convergence(why) });
                    self.enter(on, now)
                }
                Following::Refuse(why) => {
                    self.refuse(why);
                    Vec::new()
                }
            };
            if !effects.is_empty() {
                return effects;
            }
        }
        Vec::new()
    }

    /// The dump need not wait for the last round of memory: it goes beside it, once the files of the frozen container,
    /// which take the same way, have gone.
    fn can_ship_early(&self) -> bool {
        let is_alone = self.pending.values().all(|effect| *effect == Effect::FinalRound);
        let may = self.phase == Phase::Switch && self.fault.is_none() && self.facts.dumped.is_some();
        may && is_alone && !self.pending.is_empty() && !self.attempted.contains(&Effect::ShipImages)
    }

    fn following(&self, now: Micros) -> Following {
        use Following::{Enter, Stay};
        if self.phase.is_revocable() && self.fault.is_some() {
            return Enter(Phase::Fence);
        }
        match self.phase {
            Phase::Locate => Enter(Phase::Inspect),
            Phase::Inspect => Enter(Phase::Check),
            Phase::Check => Enter(Phase::Reserve),
            Phase::Reserve => Enter(Phase::Image),
            // Two effects, one after the other: the target takes out what the source has put in.
            Phase::Image if self.image_is_missing() && !self.attempted.contains(&Effect::PullImage) => {
                Stay(Effect::PullImage)
            }
            Phase::Image => Enter(Phase::Create),
            Phase::Create => Enter(Phase::Open),
            Phase::Open => Enter(Phase::Files),
            Phase::Files => Enter(Phase::Track),
            Phase::Track => Enter(Phase::PreCopy),
            Phase::PreCopy if !self.is_tracked() => Enter(Phase::Prepare),
            Phase::PreCopy => {
                let Facts { rounds, slowdowns, .. } = &self.facts;
                let (options, fixed) = (&self.job.options, self.fixed().cost);
                self.decided(decide(rounds, slowdowns, options, fixed, self.pre_copied(now)), Phase::Prepare)
            }
            // Not beside `Prepare`: the source's CRIU has to know which network the target has made. Where no rounds
            // follow, the freeze does all of it.
            Phase::Prepare
                if self.is_tracked()
                    && !self.is_post_copy()
                    && !self.attempted.contains(&Effect::PrepareFreeze) =>
            {
                Stay(Effect::PrepareFreeze)
            }
            // What is written meanwhile follows too.
            Phase::Prepare if self.is_post_copy() => Enter(Phase::Freeze),
            Phase::Prepare => Enter(Phase::Settle),
            Phase::Settle if !self.is_tracked() => Enter(Phase::Freeze),
            Phase::Settle => {
                let Facts { rounds, slowdowns, .. } = &self.facts;
                let (options, fixed) = (&self.job.options, self.fixed().cost);
                let decision =
                    settle(rounds, self.settled(), slowdowns, options, fixed, self.pre_copied(now));
                self.decided(decision, Phase::Freeze)
            }
            // What is dumped has the limits that it came with.
            Phase::Freeze if self.is_throttled() => Stay(Effect::Unthrottle),
            Phase::Freeze => Enter(Phase::Switch),
            Phase::Switch => Enter(Phase::Ship),
            Phase::Ship => Enter(Phase::Restore),
            Phase::Restore => Enter(Phase::Verify),
            Phase::Verify => Enter(Phase::Commit),
            Phase::Fence => Enter(Phase::Resume),
            Phase::Commit => Enter(Phase::Retire),
            Phase::Retire | Phase::Resume => Enter(Phase::Clean),
            Phase::Clean => Enter(Phase::Release),
            Phase::Release | Phase::Done => Enter(Phase::Done),
        }
    }

    fn decided(&self, decision: Decision, on: Phase) -> Following {
        match decision {
            Decision::Again => Following::Stay(Effect::RunRound(self.next_round())),
            Decision::SlowDown(keep) => Following::Stay(Effect::Throttle(keep)),
            Decision::Freeze(why) => Following::Converged { why, post_copy: false, on },
            Decision::PostCopy(why) => Following::Converged { why, post_copy: true, on },
            Decision::Refuse(why) => Following::Refuse(why),
        }
    }

    fn convergence(&self, why: Why) -> Convergence {
        let fixed = self.fixed().cost;
        Convergence {
            why,
            forecast: forecast(&self.facts.rounds, fixed),
            wanted: aim(&self.job.options, fixed),
            post_copy: false,
        }
    }

    /// The container has not been touched: what is undone is the target's, and what was made ready for a freeze.
    fn refuse(&mut self, why: Why) {
        let convergence = self.convergence(why);
        let (predicted, wanted) = (convergence.forecast.downtime, convergence.wanted);
        self.facts.convergence = Some(convergence);
        let fixed = self.fixed();
        let message = format!(
            "the container would stand still for {predicted} (the switch alone: {fixed}), not for {wanted}, and {why}"
        );
        let remedy = "allow more with --max-downtime or --deadline, slow it down with --auto-converge, or let it run \
                      on the target before it has its memory, with the risk of --post-copy";
        self.fault.get_or_insert(Fault::new(code::CANNOT_CONVERGE, message).remedy(remedy));
    }

    fn enter(&mut self, phase: Phase, now: Micros) -> Vec<(Step, Effect)> {
        self.phase = phase;
        let effects = self.effects_of(phase);
        // A phase with nothing to do, such as fencing a target that was never asked to restore, leaves no mark.
        if !effects.is_empty() || phase == Phase::Done {
            self.phases.push((phase, now));
        }
        if phase == Phase::Commit {
            self.outcome = Some(Outcome::Committed);
        }
        if phase == Phase::Done {
            self.outcome.get_or_insert(Outcome::RolledBack);
        }
        effects.into_iter().map(|effect| self.ask(effect, now)).collect()
    }

    fn ask(&mut self, effect: Effect, now: Micros) -> (Step, Effect) {
        self.last_step = Step(self.last_step.0.saturating_add(1));
        self.pending.insert(self.last_step, effect);
        self.attempted.insert(effect);
        self.spans.push(Span { effect, from: now, to: None });
        (self.last_step, effect)
    }

    fn effects_of(&self, phase: Phase) -> Vec<Effect> {
        match phase {
            Phase::Locate => vec![Effect::Locate],
            Phase::Inspect => vec![Effect::Inspect],
            Phase::Check => vec![Effect::Check],
            Phase::Reserve => vec![Effect::AcquireLease],
            Phase::Image if self.image_is_missing() => vec![Effect::PushImage],
            Phase::Image | Phase::Done => Vec::new(),
            Phase::Create => vec![Effect::Create],
            Phase::Open => vec![Effect::OpenPages, Effect::OpenFiles],
            Phase::Files => vec![Effect::SyncFiles],
            Phase::Track => vec![Effect::StartTracking],
            Phase::PreCopy | Phase::Settle if self.is_tracked() => vec![Effect::RunRound(self.next_round())],
            Phase::PreCopy | Phase::Settle => Vec::new(),
            // It takes as long as it takes to look through, which the target needs to prepare anyway.
            Phase::Prepare if self.has_tmpfs() => vec![Effect::Prepare, Effect::SyncTmpfs],
            Phase::Prepare => vec![Effect::Prepare],
            Phase::Freeze => vec![Effect::Freeze],
            Phase::Switch => {
                vec![Effect::TakePackets, Effect::Dump, Effect::FinalRound, Effect::SyncFrozen]
            }
            // Whatever could forbid the move is asked before the target runs: once it does, it answers clients, and
            // undoing it would lose what they were told.
            Phase::Ship => {
                let ship = Some(Effect::ShipImages).filter(|ship| !self.attempted.contains(ship));
                ship.into_iter().chain([Effect::ConfirmHold, Effect::ConfirmLease]).collect()
            }
            Phase::Restore => vec![Effect::Restore],
            Phase::Verify => vec![Effect::Verify],
            Phase::Commit => vec![Effect::PersistFiles, Effect::Adopt],
            Phase::Retire => vec![Effect::CommitSource],
            Phase::Fence
                if self.attempted.contains(&Effect::Restore)
                    && !self.attempted.contains(&Effect::UndoTarget) =>
            {
                vec![Effect::UndoTarget]
            }
            Phase::Resume if self.attempted.contains(&Effect::Freeze) => vec![Effect::RollBackSource],
            Phase::Fence | Phase::Resume => Vec::new(),
            Phase::Clean => self.cleaning(),
            Phase::Release if self.must_undo(Effect::ReleaseLease) => vec![Effect::ReleaseLease],
            Phase::Release => Vec::new(),
        }
    }

    /// Both ends of a migration, good or bad, close the sessions; only a bad one has the target undone.
    fn cleaning(&self) -> Vec<Effect> {
        let closing = [
            Effect::CloseSourcePages,
            Effect::CloseTargetPages,
            Effect::CloseSourceFiles,
            Effect::CloseTargetFiles,
        ];
        let undo_target = (self.outcome != Some(Outcome::Committed)).then_some(Effect::UndoTarget);
        // A freeze that was asked for has been undone, insistently, or is over.
        let only_prepared = !self.attempted.contains(&Effect::Freeze);
        let drop_prepared = only_prepared.then_some(Effect::RollBackSource);
        let wanted = undo_target.into_iter().chain(drop_prepared).chain(closing);
        let wanted = wanted.filter(|effect| self.must_undo(*effect) && !self.attempted.contains(effect));
        // Asked before and failed, it is asked again.
        wanted.chain(self.is_throttled().then_some(Effect::Unthrottle)).collect()
    }

    fn must_undo(&self, undo: Effect) -> bool {
        self.attempted.iter().any(|effect| effect.undo() == Some(undo))
    }

    fn is_throttled(&self) -> bool {
        self.must_undo(Effect::Unthrottle) && !self.facts.unthrottled
    }

    fn image_is_missing(&self) -> bool {
        self.facts.checked.as_ref().is_some_and(|checked| !checked.image_present)
    }

    fn has_tmpfs(&self) -> bool {
        self.facts.files.as_ref().is_some_and(|files| !files.tmpfs.is_empty())
    }

    fn is_tracked(&self) -> bool {
        self.facts.tracking.as_ref().is_some_and(|tracking| tracking.tracker != "none")
    }

    fn next_round(&self) -> Round {
        Round(u32::try_from(self.facts.rounds.len()).unwrap_or(u32::MAX))
    }
}

enum Following {
    Stay(Effect),
    Enter(Phase),
    /// Enter `on`, at the end of pre-copy.
    Converged {
        why: Why,
        post_copy: bool,
        on: Phase,
    },
    /// The downtime cannot be kept.
    Refuse(Why),
}
