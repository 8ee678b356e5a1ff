//! The container comes to life.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use haulage_engine::Engine;
use haulage_engine::RunState;
use haulage_engine::armed::{Armed, State};
use haulage_protocol::fault::{Fault, code};
use haulage_protocol::id::MigrationId;
use haulage_protocol::restorer::{Restore, Restored};
use haulage_protocol::unit::Micros;
use haulage_service::now;
use haulage_sys::Pid;
use haulage_sys::arp::announce_all;

use crate::create::told;
use crate::failure::{self, ENGINE, RESTORE, STATE, fault, joined};
use crate::notes::Notes;
use crate::{COMPLETE, IMAGES, Restorer, WORK, join};

/// An engine that was asked to start a container comes to the runtime within this time.
const ENGINE_COMES_WITHIN: Duration = Duration::from_secs(5);
/// How long a restore that somebody else began may take.
const RESTORED_WITHIN: Duration = Duration::from_secs(300);
const LOOK_AGAIN_AFTER: Duration = Duration::from_millis(20);

pub(crate) async fn restore(
    service: Arc<Restorer>,
    migration: MigrationId,
    ask: Restore,
) -> Result<Restored, Fault> {
    let dir = service.dir(&migration);
    let id = ask.container.as_str();
    let Some(mut notes) = Notes::read(&dir).map_err(fault(STATE))? else {
        return Err(Fault::new(code::OUT_OF_ORDER, "the container was not created here for this migration"));
    };
    let began = Instant::now();
    if notes.armed
        && let Some(state) = began_before(&service, id).await?
    {
        announce_from(&notes, state.pid).await;
        return Ok(Restored { at: now(), merge: Micros(0), start: Micros::from_duration(began.elapsed()) });
    }
    let prepared = {
        let (service, id, store) = (service.clone(), id.to_owned(), ask.store.clone());
        tokio::task::spawn_blocking(move || {
            prepare(&service, &migration, &id, store.as_ref(), &mut notes).map(|()| notes)
        })
    };
    let notes = joined(prepared.await)?;
    let merge = Micros::from_duration(began.elapsed());
    let began = Instant::now();
    if let Err(error) = service.docker.start(id).await {
        return Err(failed(&service, id, Some(&error)));
    }
    let at = now();
    let state = service.docker.inspect(id).await.map_err(|error| failure::engine(&error))?;
    let state = state.state().map_err(fault(ENGINE))?;
    // An engine that found it running, or a runtime that looked elsewhere for the armed state, has restored nothing.
    let restored = service.armed.state(id).map_err(fault(STATE))? == State::Restored;
    if !restored || !state.running || state.pid <= 0 {
        return Err(failed(&service, id, None));
    }
    announce_from(&notes, state.pid).await;
    Ok(Restored { at, merge, start: Micros::from_duration(began.elapsed()) })
}

/// Whether a restorer that has died since had begun this restore. The engine and the runtime went on without it, so
/// it is waited for: the container may run and have answered clients by now.
async fn began_before(service: &Restorer, id: &str) -> Result<Option<RunState>, Fault> {
    let began = Instant::now();
    loop {
        match service.armed.state(id).map_err(fault(STATE))? {
            State::Absent => return Ok(None),
            // Armed, and the engine was perhaps never asked to start it: asking twice is harmless.
            State::Armed(_) if began.elapsed() >= ENGINE_COMES_WITHIN => return Ok(None),
            State::Restored => break,
            State::Consumed if service.armed.outcome(id).map_err(fault(STATE))?.is_some_and(|o| !o.ok) => {
                return Err(failed(service, id, None));
            }
            State::Consumed if began.elapsed() >= RESTORED_WITHIN => return Err(failed(service, id, None)),
            State::Armed(_) | State::Consumed => tokio::time::sleep(LOOK_AGAIN_AFTER).await,
        }
    }
    let state = service.docker.inspect(id).await.map_err(|error| failure::engine(&error))?;
    let state = state.state().map_err(fault(ENGINE))?;
    if state.running && state.pid > 0 { Ok(Some(state)) } else { Err(failed(service, id, None)) }
}

/// Switches and neighbours still point at the old host.
async fn announce_from(notes: &Notes, init: i32) {
    let addresses = notes.spec.addresses();
    let announced = tokio::task::spawn_blocking(move || {
        let init = Pid::from_raw(init).ok_or_else(|| std::io::Error::other("no such process"))?;
        announce_all(init, &addresses)
    });
    // The container runs and answers; neighbours find it when they ask again.
    match announced.await {
        Ok(Ok(absent)) if absent.is_empty() => {}
        Ok(Ok(absent)) => tracing::warn!(init, ?absent, "no interface has these addresses to announce"),
        Ok(Err(error)) => tracing::warn!(init, %error, "its addresses were not announced"),
        Err(error) => tracing::warn!(init, %error, "its addresses were not announced"),
    }
}

/// Complete images, and a runtime that will restore them.
fn prepare(
    service: &Restorer,
    migration: &MigrationId,
    id: &str,
    store: &Path,
    notes: &mut Notes,
) -> Result<(), Fault> {
    let dir = service.dir(migration);
    let (received, complete, work) = (dir.join(IMAGES), store.with_file_name(COMPLETE), dir.join(WORK));
    notes.complete = Some(complete.clone());
    notes.write(&dir).map_err(fault(STATE))?;
    std::fs::create_dir_all(&work).map_err(fault(STATE))?;
    join::join(&received, store, &complete)?;
    let armed = Armed::new(migration.as_str(), complete, work);
    // Until here it was barred from starting.
    service.armed.disarm(id).map_err(fault(STATE))?;
    service.armed.arm(id, &armed).map_err(fault(STATE))?;
    notes.armed = true;
    notes.write(&dir).map_err(fault(STATE))
}

/// What the runtime knows of the failure says more than the engine does.
fn failed(service: &Restorer, id: &str, error: Option<&haulage_engine::EngineError>) -> Fault {
    let mut fault = Fault::new(RESTORE, "the container did not come to life on the target");
    match service.armed.outcome(id) {
        Ok(Some(outcome)) => fault.causes.extend(outcome.error),
        Ok(None) => fault.causes.push("the runtime did not get as far as the restore".to_owned()),
        Err(error) => fault.causes.push(told(&error)),
    }
    fault.causes.extend(error.map(|error| told(error)));
    fault.remedy("the container goes on where it was; the cause above is CRIU's or the engine's")
}
