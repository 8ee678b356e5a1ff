//! Drives one migration: performs effects, tells the machine, persists what it says, performs the next.
//!
//! ```text
//! effect ends -> machine.step -> record written (compare-and-set) -> events published -> next effects begin
//!                    |             | conflict: another coordinator owns it now -> stop at once
//!                    └─ nothing begins by it, others are under way: written with the next change, or soon
//! ```
//! An answer that is lost so is asked for again, like one that had not come yet.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use haulage_migration::{Effect, Event, Migration, Persistence, Success, Transition};
use haulage_protocol::event;
use haulage_protocol::fault::{Fault, code};
use haulage_protocol::id::Step;
use haulage_protocol::job::CancelAnswer;
use haulage_protocol::unit::Micros;
use haulage_protocol::version::Version;
use haulage_service::failure::ENGINE;
use haulage_service::{chain, now};
use haulage_transport::nats::HEARTBEAT;
use haulage_transport::queue::{CancelRequest, Delivery};
use haulage_transport::{Revision, TableError};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::journal::Owned;
use crate::{Coordinator, events, perform};

/// Between tries of an effect that is insisted on.
const BACKOFF: [Duration; 5] = [
    Duration::from_millis(100),
    Duration::from_millis(250),
    Duration::from_millis(500),
    Duration::from_secs(1),
    Duration::from_secs(2),
];
/// How long an answer may go unwritten by which nothing begins. In the freeze, answers come faster than they are written.
const WRITTEN_WITHIN: Duration = Duration::from_millis(50);
/// How often an effect that is only attempted is tried.
const ATTEMPTS: usize = 3;

type Ended = (Step, Result<Success, Fault>);

pub(crate) struct Driver {
    coordinator: Arc<Coordinator>,
    record: Migration,
    revision: Revision,
    before: Option<Migration>,
    /// The record as it was written last, and when the present one must be, where they differ.
    unwritten: Option<(Migration, Instant)>,
    todo: Vec<(Step, Effect)>,
    running: JoinSet<Ended>,
}

/// The record is another coordinator's now.
struct Lost;

/// How driving a migration ended.
pub(crate) enum End {
    /// It is over.
    Over,
    /// This coordinator stops; another one is to go on at once.
    Stopped,
    /// Another coordinator goes on already, upon a delivery of its own.
    TakenOver,
}

impl Driver {
    pub(crate) fn new(coordinator: Arc<Coordinator>, owned: Box<Owned>) -> Self {
        let Owned { record, revision, effects, before } = *owned;
        Self {
            coordinator,
            record,
            revision,
            before,
            unwritten: None,
            todo: effects,
            running: JoinSet::new(),
        }
    }

    /// Drives the migration to its end, or until `stop` or until another coordinator has taken it over. Dropping
    /// the effects that are under way is harmless: they are asked for again.
    pub(crate) async fn run(
        mut self,
        delivery: &Delivery,
        stop: CancellationToken,
    ) -> Result<End, TableError> {
        let mut cancellations = self.coordinator.nats.cancellations(&self.record.job.id).await?;
        let mut heartbeat = tokio::time::interval(HEARTBEAT);
        let first = self.before.take();
        self.publish(first.as_ref()).await;
        self.begin_effects();
        while !self.record.is_over() {
            let moved = tokio::select! {
                () = stop.cancelled() => return Ok(End::Stopped),
                _ = heartbeat.tick() => {
                    if let Err(error) = delivery.heartbeat().await {
                        tracing::warn!(migration = %self.record.job.id, error = %chain(&error), "no heartbeat");
                    }
                    continue;
                }
                Some(request) = cancellations.next() => self.cancel(request).await,
                () = reached(self.record.frozen_until()) => self.time_passed().await,
                () = due(self.unwritten.as_ref().map(|(_, by)| *by)) => {
                    let present = self.record.clone();
                    self.adopt(present, Vec::new()).await
                }
                Some(ended) = self.running.join_next() => match ended {
                    Ok(ended) => self.ended(ended).await,
                    Err(error) if error.is_cancelled() => continue,
                    Err(error) => {
                        // Performing panicked: a defect. The record stands; a takeover would meet it again.
                        tracing::error!(migration = %self.record.job.id, %error, "an effect was lost");
                        return Ok(End::Stopped);
                    }
                },
            };
            if let Err(Lost) = moved {
                tracing::warn!(migration = %self.record.job.id, "another coordinator has taken it over");
                return Ok(End::TakenOver);
            }
        }
        self.coordinator.remember_leftovers(&self.record).await?;
        self.coordinator.costs.note(&self.record).await;
        tracing::info!(
            migration = %self.record.job.id,
            outcome = self.record.outcome.map_or("none", haulage_migration::Outcome::as_str),
            "over"
        );
        Ok(End::Over)
    }

    async fn ended(&mut self, (step, result): Ended) -> Result<(), Lost> {
        let event = match result {
            Ok(success) => Event::Done(step, success),
            Err(fault) if is_another_owners(&fault) => return Err(Lost),
            Err(fault) => {
                tracing::warn!(migration = %self.record.job.id, %step, %fault, "an effect failed");
                Event::Failed(step, fault)
            }
        };
        let is_done = matches!(event, Event::Done(..));
        match self.record.step(event, now()) {
            Ok(Transition { next, effects }) if is_done && effects.is_empty() && self.can_wait(&next) => {
                let before = std::mem::replace(&mut self.record, next);
                self.unwritten.get_or_insert_with(|| (before, Instant::now() + WRITTEN_WITHIN));
                Ok(())
            }
            Ok(transition) => self.adopt(transition.next, transition.effects).await,
            Err(illegal) => {
                let fault = Fault::new(code::INTERNAL, "an answer of the wrong kind").because(&illegal);
                match self.record.step(Event::Failed(step, fault), now()) {
                    Ok(transition) => self.adopt(transition.next, transition.effects).await,
                    Err(_) => Err(Lost),
                }
            }
        }
    }

    async fn time_passed(&mut self) -> Result<(), Lost> {
        match self.record.step(Event::TimePassed, now()) {
            Ok(Transition { next, effects }) if next != self.record => self.adopt(next, effects).await,
            _ => Ok(()),
        }
    }

    async fn cancel(&mut self, request: CancelRequest) -> Result<(), Lost> {
        let event = match &request.cancel {
            Ok(cancel) if cancel.target_is_dead => Event::TargetIsDead,
            Ok(_) => Event::Cancelled,
            Err(fault) => {
                let fault = fault.clone();
                request.answer(CancelAnswer::Refused { fault }).await;
                return Ok(());
            }
        };
        match self.record.step(event, now()) {
            Ok(transition) => {
                let adopted = self.adopt(transition.next, transition.effects).await;
                if adopted.is_ok() {
                    request.answer(CancelAnswer::Accepted).await;
                }
                adopted
            }
            Err(illegal) => {
                let fault = Fault::new(code::NOT_CANCELLABLE, illegal.to_string())
                    .remedy("see `haul show`; if the target host is dead for good, `haul cancel --help`");
                request.answer(CancelAnswer::Refused { fault }).await;
                Ok(())
            }
        }
    }

    /// Whether a state in which nothing begins need not be written at once.
    fn can_wait(&self, next: &Migration) -> bool {
        next.phase == self.record.phase && !next.is_over() && !next.pending.is_empty()
    }

    /// Persists the new state, then tells the world, then begins its effects: in that order, so that whatever
    /// was begun can be found again.
    async fn adopt(&mut self, next: Migration, effects: Vec<(Step, Effect)>) -> Result<(), Lost> {
        if !self.record.pending.keys().any(|step| next.pending.contains_key(step)) {
            // What is no longer waited for must not be asked again.
            self.running.abort_all();
        }
        self.persist(&next).await?;
        let before = std::mem::replace(&mut self.record, next);
        let before = self.unwritten.take().map_or(before, |(written, _)| written);
        self.todo = effects;
        self.begin_effects();
        self.publish(Some(&before)).await;
        Ok(())
    }

    async fn persist(&mut self, next: &Migration) -> Result<(), Lost> {
        let mut pauses = BACKOFF.into_iter().chain(std::iter::repeat(Duration::from_secs(2)));
        loop {
            match self.coordinator.journal.write(next, self.revision).await {
                Ok(revision) => {
                    self.revision = revision;
                    return Ok(());
                }
                Err(TableError::Conflict(_)) => return Err(Lost),
                Err(error) => {
                    tracing::warn!(migration = %next.job.id, error = %chain(&error), "the record was not written");
                    tokio::time::sleep(pauses.next().unwrap_or_default()).await;
                }
            }
        }
    }

    async fn publish(&self, before: Option<&Migration>) {
        for (index, what) in events::between(before, &self.record).into_iter().enumerate() {
            let event = event::Event {
                version: Version::CURRENT,
                migration: self.record.job.id.clone(),
                sequence: self.revision.0,
                at: now(),
                what,
            };
            if let Err(error) = self.coordinator.nats.publish_event(&event, index).await {
                // Events are for followers; the record is the truth.
                tracing::warn!(migration = %event.migration, error = %chain(&error), "an event was not published");
            }
        }
    }

    fn begin_effects(&mut self) {
        for (step, effect) in std::mem::take(&mut self.todo) {
            let (coordinator, record) = (self.coordinator.clone(), self.record.clone());
            self.running.spawn(async move { (step, insist(&coordinator, &record, step, effect).await) });
        }
    }
}

/// Waits until then; for ever where there is none.
async fn due(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

/// Waits until a time on this process's clock; for ever where there is none.
async fn reached(at: Option<Micros>) {
    match at {
        Some(at) => tokio::time::sleep(Duration::from_micros(at.since(now()).0)).await,
        None => std::future::pending().await,
    }
}

/// A service has heard of another owner, or of steps that only another owner can have asked for.
fn is_another_owners(fault: &Fault) -> bool {
    fault.code == code::STALE_EPOCH || fault.code == code::SUPERSEDED
}

/// Performs an effect as often as its persistence asks for.
async fn insist(
    coordinator: &Coordinator,
    record: &Migration,
    step: Step,
    effect: Effect,
) -> Result<Success, Fault> {
    let persistence = effect.persistence(record.phase);
    let mut pauses = BACKOFF.into_iter().chain(std::iter::repeat(Duration::from_secs(2)));
    let mut tries = 0;
    loop {
        tries += 1;
        let fault = match perform::perform(coordinator, record, step, effect).await {
            Ok(success) => return Ok(success),
            // It has waited for as long as it may.
            Err(fault) if persistence == Persistence::FindOut && fault.code == code::MEMORY_INCOMPLETE => {
                continue;
            }
            Err(fault) => fault,
        };
        let again = match persistence {
            Persistence::Report => false,
            Persistence::FindOut => fault.is_unreachable() || fault.code == ENGINE,
            Persistence::Attempt => tries < ATTEMPTS,
            Persistence::Insist => true,
        };
        if !again || is_another_owners(&fault) {
            return Err(fault);
        }
        tracing::warn!(migration = %record.job.id, %effect, %fault, tries, "trying again");
        tokio::time::sleep(pauses.next().unwrap_or_default()).await;
    }
}
