//! The container comes to life.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use haulage_criu::dump::DESCRIPTORS;
use haulage_engine::Engine;
use haulage_engine::RunState;
use haulage_engine::armed::{Outcome, State};
use haulage_protocol::fault::{Fault, code};
use haulage_protocol::id::MigrationId;
use haulage_protocol::restorer::{Prepare, Restore, Restored};
use haulage_protocol::syncer::TargetRoot;
use haulage_protocol::unit::Micros;
use haulage_service::now;
use rustix::fs::{Mode, OFlags, open};

use crate::create::told;
use crate::failure::{self, ENGINE, IMAGES as BAD_IMAGES, RESTORE, blocking, fault};
use crate::notes::Notes;
use crate::prepare::prepare;
use crate::{COMPLETE, IMAGES, Restorer, join};

/// An engine that was asked to start a container comes to the runtime within this time.
const ENGINE_COMES_WITHIN: Duration = Duration::from_secs(5);
/// And knows a container to run within this time after it was recorded.
const ENGINE_LEARNS_WITHIN: Duration = Duration::from_secs(30);
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
    let Some(notes) = Notes::load(&dir).await? else {
        return Err(Fault::new(code::OUT_OF_ORDER, "the container was not created here for this migration"));
    };
    let began = Instant::now();
    let waiting = match service.starts.take(&migration) {
        Some(waiting) => waiting,
        // Another life of this service had prepared it. It may have gone further than that.
        None => {
            if notes.armed
                && let Some(state) = began_before(&service, id).await?
            {
                service.guards.watch(dir, &migration, state.pid);
                let start = Micros::from_duration(began.elapsed());
                return Ok(Restored { at: now(), merge: Micros(0), start, since: Micros(0) });
            }
            let images = service.config.scratch(&migration).find(IMAGES);
            let descriptors = descriptors(&images).map_err(fault(BAD_IMAGES))?;
            let ask = Prepare { container: ask.container.clone(), store: ask.store.clone(), descriptors };
            prepare(service.clone(), migration.clone(), ask).await?;
            let taken = || Fault::new(code::INTERNAL, "a runtime that waited was taken by another command");
            service.starts.take(&migration).ok_or_else(taken)?
        }
    };
    service.memories.sealed(&migration);
    let scratch = service.config.scratch(&migration);
    let (received, complete) = (scratch.find(IMAGES), scratch.find(COMPLETE));
    let store = PathBuf::from(&ask.store);
    let (provided, tmpfs) = blocking(move || {
        Ok((join::join(&received, &store, &complete)?, filled(&ask.tmpfs).map_err(fault(RESTORE))?))
    })
    .await?;
    let merge = Micros::from_duration(began.elapsed());
    let began = Instant::now();
    if let Err(error) = waiting.go(provided, tmpfs).await {
        return Err(failed(&service, id, Some(&error)).await);
    }
    let (spoke, replied) = (outcome(&service, id).await?, began.elapsed());
    let state = service.docker.inspect(id).await.map_err(|error| failure::engine(&error))?;
    let state = state.state().map_err(fault(ENGINE))?;
    // An engine that found it running, or a runtime that looked elsewhere for the armed state, has restored nothing.
    let restored = service.armed_state(id).await? == State::Restored;
    if !restored || !state.running || state.pid <= 0 {
        return Err(failed(&service, id, None).await);
    }
    service.guards.watch(dir, &migration, state.pid);
    if let Some(lost) = spoke.as_ref().and_then(|outcome| outcome.packets_lost.as_ref()) {
        tracing::warn!(%migration, error = lost, "packets that arrived meanwhile were lost, or it was not announced");
    }
    let start = spoke.map_or(replied, |outcome| Duration::from_micros(outcome.start_us));
    Ok(Restored {
        at: now(),
        merge,
        start: Micros::from_duration(start),
        since: Micros::from_duration(began.elapsed().saturating_sub(start)),
    })
}

/// The tmpfs mounts that the files service has filled, which are nobody's if it has died since: then they are not there.
fn filled(tmpfs: &[TargetRoot]) -> io::Result<Vec<OwnedFd>> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    tmpfs.iter().map(|TargetRoot { path, .. }| Ok(open(path, flags, Mode::empty())?)).collect()
}

/// As the dump has them.
fn descriptors(images: &Path) -> io::Result<Vec<String>> {
    Ok(serde_json::from_slice(&fs::read(images.join(DESCRIPTORS))?)?)
}

/// Whether a restorer that has died since had begun this restore. The engine and the runtime went on without it, so
/// it is waited for: the container may run and have answered clients by now.
async fn began_before(service: &Restorer, id: &str) -> Result<Option<RunState>, Fault> {
    let began = Instant::now();
    loop {
        match service.armed_state(id).await? {
            State::Absent => return Ok(None),
            // Armed, and the engine was perhaps never asked to start it: asking twice is harmless.
            State::Armed(_) if began.elapsed() >= ENGINE_COMES_WITHIN => return Ok(None),
            State::Restored => {
                let state = service.docker.inspect(id).await.map_err(|error| failure::engine(&error))?;
                let state = state.state().map_err(fault(ENGINE))?;
                if state.running && state.pid > 0 {
                    return Ok(Some(state));
                }
                // It is recorded just before the processes run, and the engine learns of them later.
                if began.elapsed() >= ENGINE_LEARNS_WITHIN {
                    return Err(failed(service, id, None).await);
                }
                tokio::time::sleep(LOOK_AGAIN_AFTER).await;
            }
            State::Consumed if outcome(service, id).await?.is_some_and(|outcome| !outcome.ok) => {
                return Err(failed(service, id, None).await);
            }
            State::Consumed if began.elapsed() >= RESTORED_WITHIN => {
                return Err(failed(service, id, None).await);
            }
            State::Armed(_) | State::Consumed => tokio::time::sleep(LOOK_AGAIN_AFTER).await,
        }
    }
}

async fn outcome(service: &Restorer, id: &str) -> Result<Option<Outcome>, Fault> {
    let id = id.to_owned();
    service.armed(move |armed| armed.outcome(&id)).await
}

/// What the runtime knows of the failure says more than the engine does.
pub(crate) async fn failed(
    service: &Restorer,
    id: &str,
    error: Option<&(dyn std::error::Error + Send + Sync)>,
) -> Fault {
    let mut fault = Fault::new(RESTORE, "the container did not come to life on the target");
    match outcome(service, id).await {
        Ok(Some(outcome)) => fault.causes.extend(outcome.error),
        Ok(None) => fault.causes.push("the runtime did not get as far as the restore".to_owned()),
        Err(error) => fault.causes.push(error.to_string()),
    }
    fault.causes.extend(error.map(|error| told(error)));
    fault.remedy("the container goes on where it was; the cause above is CRIU's or the engine's")
}
