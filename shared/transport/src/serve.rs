//! Typed commands to the services of hosts: the answering side.
//!
//! ```text
//! command -> decoded? -> not from an earlier epoch, nor given up on?
//!         -> new step: handler runs (one at a time per migration, in the order of arrival)
//!                                                   -> known step: joins the one under way, or its result
//!         -> result within PENDING_AFTER: Done | Failed      otherwise: Pending, and the asker asks again
//! ```
//!
//! A success is kept and given again; a failure is not, so that a step that is insisted on is tried again.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_nats::service::{Request, ServiceExt};
use bytes::Bytes;
use futures_util::StreamExt;
use haulage_protocol::fault::{Fault, code};
use haulage_protocol::id::{Epoch, HostId, MigrationId, Step};
use haulage_protocol::rpc::{Answer, Command, PENDING_AFTER, Rpc, Service, decode};
use haulage_protocol::subject::command_prefix;
use tokio::sync::watch;
use tokio_util::task::TaskTracker;

use crate::nats::{Nats, NatsError, failed};

/// After how long without a command the results of a migration are forgotten.
const FORGET_AFTER: Duration = Duration::from_secs(3600);

/// Which command of which migration a handler works on.
#[derive(Debug, Clone)]
pub struct Context {
    /// The migration.
    pub migration: MigrationId,
    /// The owner that asks.
    pub epoch: Epoch,
    /// The command's number.
    pub step: Step,
    /// The lowest number that the owner still waits for.
    pub floor: Step,
}

/// Answers the commands to one service of one host. Dropping it stops answering; see [`CommandServer::stop`].
pub struct CommandServer {
    service: async_nats::service::Service,
    prefix: String,
    ledger: Arc<Ledger>,
    listeners: tokio::task::JoinSet<()>,
    handlers: TaskTracker,
}

impl CommandServer {
    /// Registers the service with NATS (`nats micro ls` shows it), with no verbs yet.
    ///
    /// # Errors
    /// [`NatsError::Use`].
    pub async fn start(nats: &Nats, host: &HostId, service: Service) -> Result<Self, NatsError> {
        let micro = nats.client.service_builder().description(format!("haulage {service} of host {host}"));
        let micro = micro
            .start(format!("haul-{service}"), env!("CARGO_PKG_VERSION"))
            .await
            .map_err(failed("register the service"))?;
        Ok(Self {
            service: micro,
            prefix: command_prefix(host, service),
            ledger: Arc::default(),
            listeners: tokio::task::JoinSet::new(),
            handlers: TaskTracker::new(),
        })
    }

    /// Answers `R` with `handler` from now on.
    ///
    /// # Errors
    /// [`NatsError::Use`].
    pub async fn answer<R, F, Fut>(&mut self, handler: F) -> Result<(), NatsError>
    where
        R: Rpc,
        F: Fn(Context, R) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<R::Reply, Fault>> + Send + 'static,
    {
        let group = self.service.group(&self.prefix);
        let mut endpoint =
            group.endpoint_builder().name(R::VERB).add(R::VERB).await.map_err(failed("register a verb"))?;
        let (ledger, handlers, handler) = (self.ledger.clone(), self.handlers.clone(), Arc::new(handler));
        self.listeners.spawn(async move {
            while let Some(request) = endpoint.next().await {
                let (ledger, handler) = (ledger.clone(), handler.clone());
                let work = handlers.clone();
                handlers.spawn(async move {
                    let answer = respond::<R, _, _>(&ledger, &work, handler, &request).await;
                    if let Err(error) = request.respond(Ok(answer)).await {
                        // The asker asks again: the result is in the ledger.
                        tracing::warn!(verb = R::VERB, %error, "an answer could not be sent");
                    }
                });
            }
        });
        Ok(())
    }

    /// Takes no more commands and waits for those under way.
    pub async fn stop(mut self) {
        if let Err(error) = self.service.stop().await {
            tracing::debug!(%error, "the service was not deregistered");
        }
        self.listeners.shutdown().await;
        self.handlers.close();
        self.handlers.wait().await;
    }
}

async fn respond<R, F, Fut>(
    ledger: &Arc<Ledger>,
    handlers: &TaskTracker,
    handler: Arc<F>,
    request: &Request,
) -> Bytes
where
    R: Rpc,
    F: Fn(Context, R) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<R::Reply, Fault>> + Send + 'static,
{
    let command = match decode::<Command<R>>(&request.message.payload) {
        Ok(command) => command,
        Err(fault) => {
            tracing::warn!(verb = R::VERB, %fault, "a message was refused");
            return encode::<R>(Answer::Failed { fault });
        }
    };
    let Command { migration, epoch, step, floor, body, .. } = command;
    let context = Context { migration, epoch, step, floor };
    let mut result = match ledger.enter(&context) {
        Err(fault) => return encode::<R>(Answer::Failed { fault }),
        Ok(Entered::Known(result)) => result,
        Ok(Entered::New { publish, before }) => {
            let result = publish.subscribe();
            let ledger = ledger.clone();
            let work = async move {
                // One command of a migration at a time: an undo never races with what it undoes. One that ended
                // without a result, by a panic, has ended all the same.
                if let Some(mut before) = before {
                    let _ended = before.wait_for(Option::is_some).await;
                }
                tracing::debug!(migration = %context.migration, step = %context.step, verb = R::VERB, "begins");
                let began = Instant::now();
                let outcome = handler(context.clone(), body).await;
                let took_ms = began.elapsed().as_millis();
                let answer = match outcome {
                    Ok(value) => {
                        tracing::info!(migration = %context.migration, verb = R::VERB, took_ms, "done");
                        Answer::Done { value }
                    }
                    Err(fault) => {
                        tracing::warn!(migration = %context.migration, verb = R::VERB, took_ms, %fault, "failed");
                        ledger.forget_step(&context);
                        Answer::Failed { fault }
                    }
                };
                publish.send_replace(Some(encode::<R>(answer)));
            };
            handlers.spawn(work);
            result
        }
    };
    match tokio::time::timeout(PENDING_AFTER, result.wait_for(Option::is_some)).await {
        Err(_) => encode::<R>(Answer::Pending),
        Ok(Ok(answer)) => answer.clone().unwrap_or_default(),
        Ok(Err(_)) => {
            let fault =
                Fault::new(code::INTERNAL, format!("the handler of {} ended without a result", R::VERB));
            encode::<R>(Answer::Failed { fault })
        }
    }
}

fn encode<R: Rpc>(answer: Answer<R::Reply>) -> Bytes {
    match serde_json::to_vec(&answer) {
        Ok(wire) => wire.into(),
        Err(error) => {
            let fault = Fault::new(code::INTERNAL, "cannot encode an answer").because(&error);
            // A fault holds only strings, which always encode.
            serde_json::to_vec(&Answer::<()>::Failed { fault }).unwrap_or_default().into()
        }
    }
}

type Published = watch::Receiver<Option<Bytes>>;

enum Entered {
    Known(Published),
    New { publish: watch::Sender<Option<Bytes>>, before: Option<Published> },
}

/// What was asked before, per migration.
#[derive(Default)]
struct Ledger(Mutex<HashMap<MigrationId, Page>>);

struct Page {
    epoch: Epoch,
    floor: Step,
    used: Instant,
    /// The command that arrived last: the next one waits for its end.
    last: Option<Published>,
    steps: HashMap<Step, Published>,
}

impl Ledger {
    fn enter(&self, context: &Context) -> Result<Entered, Fault> {
        let mut pages = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        pages.retain(|id, page| *id == context.migration || page.used.elapsed() < FORGET_AFTER);
        let page = pages.entry(context.migration.clone()).or_insert_with(|| Page {
            epoch: context.epoch,
            floor: context.floor,
            used: Instant::now(),
            last: None,
            steps: HashMap::new(),
        });
        if context.epoch < page.epoch {
            let message =
                format!("a command of owner {} when owner {} has been heard", context.epoch, page.epoch);
            return Err(Fault::new(code::STALE_EPOCH, message));
        }
        page.epoch = context.epoch;
        page.floor = page.floor.max(context.floor);
        page.used = Instant::now();
        // Their owner has the answers, or does not wait for them.
        let floor = page.floor;
        page.steps.retain(|step, _| *step >= floor);
        // A handler that ended without a result (it panicked) has closed its channel: run it again.
        let known =
            page.steps.get(&context.step).filter(|known| known.borrow().is_some() || !is_closed(known));
        if let Some(known) = known {
            return Ok(Entered::Known(known.clone()));
        }
        if context.step < page.floor {
            let message =
                format!("step {} was given up on, step {} has been heard", context.step, page.floor);
            return Err(Fault::new(code::SUPERSEDED, message));
        }
        let (publish, result) = watch::channel(None);
        page.steps.insert(context.step, result.clone());
        let before = page.last.replace(result);
        Ok(Entered::New { publish, before })
    }

    fn forget_step(&self, context: &Context) {
        let mut pages = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(page) = pages.get_mut(&context.migration) {
            page.steps.remove(&context.step);
        }
    }
}

fn is_closed(result: &Published) -> bool {
    result.has_changed().is_err()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn context(epoch: u64, step: u64) -> Context {
        Context { migration: "m".parse().unwrap(), epoch: Epoch(epoch), step: Step(step), floor: Step(0) }
    }

    #[test]
    fn what_was_given_up_on_does_not_begin_any_more() {
        let ledger = Ledger::default();
        let undo = Context { floor: Step(9), ..context(1, 9) };
        assert!(matches!(ledger.enter(&undo), Ok(Entered::New { .. })));
        // The freeze that it undoes was held up on the way and arrives now.
        assert_eq!(ledger.enter(&context(1, 5)).err().unwrap().code, code::SUPERSEDED);
        assert!(matches!(ledger.enter(&context(1, 10)), Ok(Entered::New { .. })));
    }

    #[test]
    fn commands_wait_for_those_that_arrived_before_them() {
        let ledger = Ledger::default();
        let Ok(Entered::New { publish, before: None }) = ledger.enter(&context(1, 1)) else {
            panic!("not first")
        };
        let Ok(Entered::New { before: Some(before), .. }) = ledger.enter(&context(1, 2)) else {
            panic!("no turn")
        };
        assert!(before.borrow().is_none() && !is_closed(&before));
        publish.send_replace(Some(Bytes::new()));
        assert!(before.borrow().is_some());
    }

    #[test]
    fn a_step_runs_once_and_an_old_owner_is_refused() {
        let ledger = Ledger::default();
        let Ok(Entered::New { publish, .. }) = ledger.enter(&context(1, 1)) else { panic!("not new") };
        assert!(matches!(ledger.enter(&context(1, 1)), Ok(Entered::Known(_))));
        publish.send_replace(Some(Bytes::from_static(b"x")));
        drop(publish);
        assert!(
            matches!(ledger.enter(&context(2, 1)), Ok(Entered::Known(_))),
            "a result outlives its handler"
        );
        assert_eq!(ledger.enter(&context(1, 2)).err().unwrap().code, code::STALE_EPOCH);
    }

    #[test]
    fn what_nobody_waits_for_is_not_kept() {
        let ledger = Ledger::default();
        for step in 1..=100 {
            let Ok(Entered::New { publish, .. }) =
                ledger.enter(&Context { floor: Step(step.max(3) - 2), ..context(1, step) })
            else {
                panic!("not new")
            };
            publish.send_replace(Some(Bytes::from_static(b"x")));
        }
        assert_eq!(ledger.0.lock().unwrap().values().next().unwrap().steps.len(), 3);
        assert!(matches!(ledger.enter(&context(1, 98)), Ok(Entered::Known(_))));
        assert_eq!(ledger.enter(&context(1, 97)).err().unwrap().code, code::SUPERSEDED);
    }

    #[test]
    fn a_failure_or_a_panic_lets_the_step_run_again() {
        let ledger = Ledger::default();
        let entered = ledger.enter(&context(1, 1)).unwrap();
        drop(entered); // as when the handler panics
        assert!(matches!(ledger.enter(&context(1, 1)), Ok(Entered::New { .. })));
        let entered = ledger.enter(&context(1, 2)).unwrap();
        ledger.forget_step(&context(1, 2));
        assert!(matches!(ledger.enter(&context(1, 2)), Ok(Entered::New { .. })));
        drop(entered);
    }
}
