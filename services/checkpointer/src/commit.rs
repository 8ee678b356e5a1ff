//! The container ends on this host: it runs on the target.

use std::io::ErrorKind;
use std::sync::Arc;
use std::time::Duration;

use haulage_engine::{Engine, EngineErrorKind};
use haulage_pages::process::{self, ListError};
use haulage_protocol::checkpointer::{Commit, Committed};
use haulage_protocol::fault::{Fault, code};
use haulage_protocol::id::MigrationId;
use haulage_service::chain;
use haulage_sys::freezer::Freezer;
use rustix::process::{Signal, kill_process};

use crate::Checkpointer;
use crate::failure::{self, RELEASE, fault, joined};
use crate::hold::{Session, State};
use crate::notes::Notes;

/// Docker removes a container that it saw die with `--rm` in its own time.
const LOOK_AGAIN_AFTER: Duration = Duration::from_millis(20);
const REMOVED_WITHIN: Duration = Duration::from_secs(20);

pub(crate) async fn commit(
    service: Arc<Checkpointer>,
    migration: MigrationId,
    ask: Commit,
) -> Result<Committed, Fault> {
    let dir = service.config.migration_dir(&migration);
    let Some(notes) = Notes::load(&dir).await? else {
        // Done before: a commit that is asked for again.
        return Ok(Committed {});
    };
    if notes.container != ask.container {
        return Err(Fault::new(code::MALFORMED, "the migration was of another container"));
    }
    let session = service.sessions.take(&migration);
    let ended = notes.clone();
    joined(tokio::task::spawn_blocking(move || end(session, &ended)).await)?;
    remove(&service, notes.container.as_str()).await?;
    for volume in &notes.volumes {
        match service.docker.remove_volume(volume).await {
            Ok(()) => {}
            Err(error) if error.is_not_found() => {}
            Err(error) => {
                tracing::warn!(volume, error = %chain(&error), "a volume that moved was not removed here");
            }
        }
    }
    Notes::forget(service.config.scratch(&migration)).await?;
    Ok(Committed {})
}

/// Kills every task without letting it run once more: killed while frozen, it dies when the cgroup thaws.
fn end(session: Option<Session>, notes: &Notes) -> Result<(), Fault> {
    match process::list(&notes.procs) {
        Ok(processes) => {
            for process in processes {
                // One that has just died needs no signal.
                let _gone = kill_process(process.pid, Signal::KILL);
            }
        }
        Err(ListError::Read { source, .. }) if source.kind() == ErrorKind::NotFound => {}
        // What cannot be listed cannot be killed, and must stay frozen.
        Err(error) => return Err(fault(RELEASE)(error)),
    }
    match Freezer::open(&notes.freezer) {
        Ok(freezer) => {
            if let Err(error) = freezer.thaw() {
                tracing::debug!(error = %chain(&error), "the cgroup is gone");
            }
        }
        Err(error) => tracing::debug!(error = %chain(&error), "the cgroup is gone"),
    }
    if let Some(Session { state: State::Held(held), .. }) = session
        && let Err(error) = held.commit()
    {
        // It held the dead; its success would have killed them.
        tracing::debug!(container = %notes.container, error = %chain(&error), "criu's end");
    }
    Ok(())
}

async fn remove(service: &Checkpointer, container: &str) -> Result<(), Fault> {
    let removed = async {
        loop {
            match service.docker.remove(container).await {
                Ok(()) => return Ok(()),
                Err(error) if error.is_not_found() => return Ok(()),
                // "removal … is already in progress": Docker does it because of `--rm`.
                Err(error) if error.kind() == EngineErrorKind::Conflict => {
                    tokio::time::sleep(LOOK_AGAIN_AFTER).await;
                }
                Err(error) => return Err(failure::engine(&error)),
            }
        }
    };
    match tokio::time::timeout(REMOVED_WITHIN, removed).await {
        Ok(result) => result,
        Err(_) => Err(Fault::new(RELEASE, "the engine does not finish removing the container")
            .remedy("see the engine's log; the container is dead, removing it by hand is safe")),
    }
}
