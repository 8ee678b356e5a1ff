//! The end on this host: the container is verified and kept, or undone.

use std::sync::Arc;
use std::time::Duration;

use haulage_engine::{Engine, EngineErrorKind};
use haulage_protocol::fault::{Fault, code};
use haulage_protocol::id::MigrationId;
use haulage_protocol::restorer::{Adopt, Adopted, Filled, Undone, Verified, Verify};
use haulage_protocol::unit::{Micros, Pages};

use crate::failure::{self, ENGINE, NOT_RUNNING, STATE, blocking, fault};
use crate::guard;
use crate::kill::{kill_container, silence_container};
use crate::notes::{Notes, working_name};
use crate::{Restorer, WORK};

/// How long one command waits for a container's memory. A copy that nobody has decided about is mute when no command has
/// come for 10 s ([`guard`]), so the next one must come before that.
const MEMORY_WITHIN: Duration = Duration::from_secs(4);

/// Waits until the container has all its memory, and looks whether it runs.
pub(crate) async fn verify(
    service: Arc<Restorer>,
    migration: MigrationId,
    ask: Verify,
) -> Result<Verified, Fault> {
    let work = service.dir(&migration).join(WORK);
    let complete = service.memories.complete(&migration, &work, ask.container.as_str());
    let filled = match tokio::time::timeout(MEMORY_WITHIN, complete).await {
        Ok(filled) => Some(filled?),
        Err(_) => None,
    };
    let found =
        service.docker.inspect(ask.container.as_str()).await.map_err(|error| failure::engine(&error))?;
    let state = found.state().map_err(fault(ENGINE))?;
    if state.running && !state.paused && state.pid > 0 {
        service.guards.dismiss(&migration).await;
        let dir = service.dir(&migration);
        if let Some(mut notes) = Notes::load(&dir).await? {
            guard::unmute(&service, &dir, &mut notes).await?;
        }
        service.guards.watch(dir, &migration, state.pid);
        let Some(filled) = filled else {
            return Err(Fault::new(code::MEMORY_INCOMPLETE, "the container lacks memory yet"));
        };
        return Ok(Verified {
            pid: state.pid,
            filled: Filled {
                took: Micros(filled.took_us),
                faults: Pages(filled.faults),
                on_demand: Pages(filled.on_demand),
                in_background: Pages(filled.in_background),
                pulled: Pages(filled.pulled),
                pushed: Pages(filled.pushed),
            },
        });
    }
    let message = format!("the container ended after its restore, with exit code {}", state.exit_code);
    Err(Fault::new(NOT_RUNNING, message).remedy("see its log on the source: it goes on there"))
}

pub(crate) async fn adopt(
    service: Arc<Restorer>,
    migration: MigrationId,
    ask: Adopt,
) -> Result<Adopted, Fault> {
    service.guards.dismiss(&migration).await;
    let dir = service.dir(&migration);
    let Some(mut notes) = Notes::load(&dir).await? else {
        // Done before: an adoption that is asked for again.
        return Ok(Adopted {});
    };
    guard::unmute(&service, &dir, &mut notes).await?;
    let id = ask.container.as_str();
    let policy = notes.spec.restart_policy();
    // Docker refuses to change the policy of a container that it removes when it ends, which has none.
    if !policy.is_never() && !notes.spec.auto_remove() {
        match service.docker.set_restart_policy(id, &policy).await {
            Err(error) if !error.is_not_found() => return Err(failure::engine(&error)),
            _ => {}
        }
    }
    service.disarm(id).await?;
    service.memories.forget(&migration);
    notes.forget(service.config.scratch(&migration)).await?;
    Ok(Adopted {})
}

/// Removes whatever the notes tell of, in the reverse order of making. Safe to repeat.
pub(crate) async fn undo(service: Arc<Restorer>, migration: MigrationId) -> Result<Undone, Fault> {
    service.guards.dismiss(&migration).await;
    let dir = service.dir(&migration);
    let Some(notes) = Notes::load(&dir).await? else { return Ok(Undone {}) };
    // A creation that was cut off before its id was noted left the working name.
    let container = notes.container.clone().unwrap_or_else(|| working_name(&migration));
    service.starts.call_off(&migration).await;
    if let Some(id) = notes.container.clone() {
        let silenced = tokio::task::spawn_blocking(move || silence_container(&id)).await;
        if let Ok(Err(error)) = silenced {
            tracing::warn!(%migration, %error, "a container that is to be removed was not silenced");
        }
    }
    remove_container(&service, &container).await?;
    if let Some(id) = notes.container.clone() {
        // What the engine does not know of, such as a restore whose runtime has died.
        blocking(move || kill_container(&id).map_err(fault(STATE))).await?;
    }
    let (worker, at, work) = (service.clone(), migration.clone(), dir.join(WORK));
    blocking(move || worker.memories.end(&at, &work).map_err(fault(STATE))).await?;
    if let Some(id) = &notes.container {
        service.disarm(id).await?;
    }
    for volume in &notes.volumes {
        match service.docker.remove_volume(volume).await {
            Err(error) if !error.is_not_found() => return Err(failure::engine(&error)),
            _ => {}
        }
    }
    notes.forget(service.config.scratch(&migration)).await?;
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
