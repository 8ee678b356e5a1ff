//! The end on this host: the container is verified and kept, or undone.

use std::sync::Arc;

use haulage_engine::{Engine, EngineErrorKind};
use haulage_protocol::fault::Fault;
use haulage_protocol::id::MigrationId;
use haulage_protocol::restorer::{Adopt, Adopted, Undone, Verified, Verify};

use crate::Restorer;
use crate::failure::{self, ENGINE, NOT_RUNNING, STATE, fault};
use crate::notes::{Notes, working_name};

pub(crate) async fn verify(service: Arc<Restorer>, ask: Verify) -> Result<Verified, Fault> {
    let found =
        service.docker.inspect(ask.container.as_str()).await.map_err(|error| failure::engine(&error))?;
    let state = found.state().map_err(fault(ENGINE))?;
    if state.running && !state.paused && state.pid > 0 {
        return Ok(Verified { pid: state.pid });
    }
    let message = format!("the container ended after its restore, with exit code {}", state.exit_code);
    Err(Fault::new(NOT_RUNNING, message).remedy("see its log on the source: it goes on there"))
}

pub(crate) async fn adopt(
    service: Arc<Restorer>,
    migration: MigrationId,
    ask: Adopt,
) -> Result<Adopted, Fault> {
    let dir = service.dir(&migration);
    let Some(notes) = Notes::read(&dir).map_err(fault(STATE))? else {
        // Done before: an adoption that is asked for again.
        return Ok(Adopted {});
    };
    let id = ask.container.as_str();
    let policy = notes.spec.restart_policy();
    // Docker refuses to change the policy of a container that it removes when it ends, which has none.
    if !policy.is_never() && !notes.spec.auto_remove() {
        match service.docker.set_restart_policy(id, &policy).await {
            Err(error) if !error.is_not_found() => return Err(failure::engine(&error)),
            _ => {}
        }
    }
    service.armed.disarm(id).map_err(fault(STATE))?;
    notes.remove(&dir).map_err(fault(STATE))?;
    Ok(Adopted {})
}

/// Removes whatever the notes tell of, in the reverse order of making. Safe to repeat.
pub(crate) async fn undo(service: Arc<Restorer>, migration: MigrationId) -> Result<Undone, Fault> {
    let dir = service.dir(&migration);
    let Some(notes) = Notes::read(&dir).map_err(fault(STATE))? else { return Ok(Undone {}) };
    // A creation that was cut off before its id was noted left the working name.
    let container = notes.container.clone().unwrap_or_else(|| working_name(&migration));
    remove_container(&service, &container).await?;
    if let Some(id) = &notes.container {
        service.armed.disarm(id).map_err(fault(STATE))?;
    }
    for volume in &notes.volumes {
        match service.docker.remove_volume(volume).await {
            Err(error) if !error.is_not_found() => return Err(failure::engine(&error)),
            _ => {}
        }
    }
    notes.remove(&dir).map_err(fault(STATE))?;
    Ok(Undone {})
}

async fn remove_container(service: &Restorer, container: &str) -> Result<(), Fault> {
    loop {
        match service.docker.remove(container).await {
            Ok(()) => return Ok(()),
            Err(error) if error.is_not_found() => return Ok(()),
            // "removal … is already in progress": Docker removes what was created with `--rm` by itself.
            Err(error) if error.kind() == EngineErrorKind::Conflict => {
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            }
            Err(error) => return Err(failure::engine(&error)),
        }
    }
}
