//! The container comes to life.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use haulage_engine::Engine;
use haulage_engine::armed::{Armed, ArmedError};
use haulage_protocol::fault::{Fault, code};
use haulage_protocol::id::MigrationId;
use haulage_protocol::restorer::{Restore, Restored};
use haulage_protocol::unit::Micros;
use haulage_service::now;

use crate::create::told;
use crate::failure::{self, ENGINE, RESTORE, STATE, fault, joined};
use crate::notes::Notes;
use crate::{COMPLETE, IMAGES, Restorer, WORK, announce, join};

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
    if !state.running || state.pid <= 0 {
        return Err(failed(&service, id, None));
    }
    let announced = tokio::task::spawn_blocking(move || announce::addresses(&notes.spec, state.pid));
    match announced.await {
        Ok(Ok(())) => {}
        // The container runs and answers; neighbours find it when they ask again.
        Ok(Err(error)) => tracing::warn!(container = id, %error, "its addresses were not announced"),
        Err(error) => tracing::warn!(container = id, %error, "its addresses were not announced"),
    }
    Ok(Restored { at, merge, start: Micros::from_duration(began.elapsed()) })
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
    match service.armed.arm(id, &armed) {
        Err(error @ ArmedError::Occupied { .. }) => {
            Err(Fault::from_error(code::OUT_OF_ORDER, &error)
                .remedy("the migration is undone: start it again"))
        }
        result => result.map_err(fault(STATE)),
    }
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
