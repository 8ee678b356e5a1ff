//! Everything that was done to the container is undone; it goes on where it stopped.

use std::sync::Arc;
use std::time::{Duration, Instant};

use haulage_criu::quiet;
use haulage_engine::Engine;
use haulage_pages::process;
use haulage_protocol::checkpointer::{RollBack, RolledBack};
use haulage_protocol::fault::{Fault, code};
use haulage_protocol::id::MigrationId;
use haulage_protocol::unit::Micros;
use haulage_service::{chain, now};
use haulage_sys::Pid;
use haulage_sys::arp::announce_all;
use haulage_sys::freezer::{Freezer, FreezerState};

use crate::Checkpointer;
use crate::failure::{self, RELEASE, blocking, fault, joined};
use crate::hold::{Session, State};
use crate::notes::Notes;

/// How long CRIU may take to undo a dump.
const LETS_GO_WITHIN: Duration = Duration::from_secs(60);
const LOOK_AGAIN_AFTER: Duration = Duration::from_millis(5);

pub(crate) async fn roll_back(
    service: Arc<Checkpointer>,
    migration: MigrationId,
    ask: RollBack,
) -> Result<RolledBack, Fault> {
    let notes = Notes::load(&service.config.migration_dir(&migration)).await?;
    if notes.is_some_and(|notes| notes.container != ask.container) {
        let message = "the migration was of another container";
        return Err(Fault::new(code::MALFORMED, message));
    }
    undo(&service, &migration).await
}

/// The same, for a freeze that failed. Safe to repeat, also by a process that did not do what it undoes.
pub(crate) async fn undo(service: &Arc<Checkpointer>, migration: &MigrationId) -> Result<RolledBack, Fault> {
    let prepared = service.prepared.take(migration);
    blocking(move || {
        drop(prepared);
        Ok(())
    })
    .await?;
    let dir = service.config.migration_dir(migration);
    let Some(notes) = Notes::load(&dir).await? else {
        // It was not touched.
        Notes::forget(service.config.scratch(migration)).await?;
        return Ok(RolledBack { thawed_at: None });
    };
    let session = service.sessions.take(migration);
    let released = notes.clone();
    let thawed_at = joined(tokio::task::spawn_blocking(move || release(session, &released)).await)?;
    if !notes.restart_policy.is_never() {
        let set = service.docker.set_restart_policy(notes.container.as_str(), &notes.restart_policy).await;
        match set {
            Err(error) if !error.is_not_found() => return Err(failure::engine(&error)),
            _ => {}
        }
    }
    Notes::forget(service.config.scratch(migration)).await?;
    Ok(RolledBack { thawed_at })
}

/// CRIU lets go, the network answers again, the cgroup thaws: in that order, so that the tasks run only when
/// all is as it was.
fn release(session: Option<Session>, notes: &Notes) -> Result<Option<Micros>, Fault> {
    if let Some(Session { state: State::Held(held), .. }) = session
        && let Err(error) = held.roll_back()
    {
        // The tasks are still frozen by the cgroup. They can go on, if perhaps without their connections.
        tracing::error!(container = %notes.container, error = %chain(&error), "criu did not let go in order");
    }
    if !runs(notes) {
        // Its network namespace may be another's by now, and there is nothing to thaw.
        tracing::warn!(container = %notes.container, "the container ended while it was being moved");
        return Ok(None);
    }
    // A CRIU whose connection closed undoes in its own time, and freezes the cgroup as it found it before it lets go.
    untraced(notes)?;
    if let Some(setting) = &notes.arp_ignore {
        let namespace = quiet::namespace_of(notes.init).map_err(fault(RELEASE))?;
        quiet::restore(&namespace, setting).map_err(fault(RELEASE))?;
    }
    let Ok(freezer) = Freezer::open(&notes.freezer) else {
        // The cgroup is gone, and with it the container: it ended by itself or was removed by somebody.
        tracing::warn!(container = %notes.container, "the container is gone");
        return Ok(None);
    };
    let was_frozen = freezer.state().map_err(fault(RELEASE))? != FreezerState::Thawed;
    freezer.thaw().map_err(fault(RELEASE))?;
    let thawed_at = was_frozen.then(now);
    // A target that had come to life may have announced itself.
    if let Err(error) = announce(notes) {
        tracing::warn!(container = %notes.container, %error, "its addresses were not announced");
    }
    Ok(thawed_at)
}

/// Whether the container's first process is still the one that was noted, and not a stranger with its number.
fn runs(notes: &Notes) -> bool {
    let cgroups = std::fs::read_to_string(format!("/proc/{}/cgroup", notes.init));
    cgroups.is_ok_and(|cgroups| cgroups.contains(notes.container.as_str()))
}

/// Waits until nobody holds a task of the container any more.
fn untraced(notes: &Notes) -> Result<(), Fault> {
    let began = Instant::now();
    loop {
        let processes = process::list(&notes.procs).map_err(fault(RELEASE))?;
        if !process::any_traced(&processes).map_err(fault(RELEASE))? {
            return Ok(());
        }
        if began.elapsed() >= LETS_GO_WITHIN {
            let message = "a process of the container is still being traced, by CRIU or a debugger";
            return Err(Fault::new(RELEASE, message)
                .remedy("see TracerPid in /proc/PID/status; asked again until it ends"));
        }
        std::thread::sleep(LOOK_AGAIN_AFTER);
    }
}

fn announce(notes: &Notes) -> std::io::Result<()> {
    let init = Pid::from_raw(notes.init).ok_or_else(|| std::io::Error::other("no such process"))?;
    announce_all(init, &notes.addresses).map(drop)
}
