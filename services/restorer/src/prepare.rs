//! A container is started as far as it can be without its state, while it still runs on the source host: the engine
//! has mounted its root, its network is made, its page server is there, and runc waits for CRIU, whose place is held
//! by a gate that has started it and waits for a word, by way of the keeper in `haul-runtime`.
//!
//! ```text
//!   docker start ──▶ containerd ──▶ haul-runtime create ── network ──▶ runc restore ──▶ gate waits
//!                                         │ keeper ◀──────── gate.socket ────────────────┘
//!                                         ▼ go.socket
//!   Prepare ───────────────────────── accepts
//!   TakePackets ── TAKE ──▶ packets come here, and are kept
//!   Restore ── MEMORY…, IPC, TMPFS…, GO ──▶ root put on, CRIU restores
//!   Undo, or our death: the connection ends, and the start fails with nothing restored
//! ```

use std::collections::HashMap;
use std::fs;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use haulage_criu::dump::DESCRIPTORS;
use haulage_engine::armed::{Armed, GO, IPC, MEMORY, TAKE, TMPFS};
use haulage_engine::{ContainerSpec, Engine, EngineError};
use haulage_protocol::checkpointer::Network;
use haulage_protocol::fault::{Fault, code};
use haulage_protocol::id::MigrationId;
use haulage_protocol::restorer::{PacketsTaken, Prepare, Prepared};
use haulage_protocol::unit::Micros;
use haulage_sys::pass_fd;
use tokio::net::UnixListener;
use tokio::task::JoinHandle;

use crate::failure::{STATE, blocking, fault};
use crate::join::Provided;
use crate::notes::Notes;
use crate::restore::failed;
use crate::{COMPLETE, IMAGES, Restorer, WORK};

/// How long the engine may take until the runtime waits.
const READY_WITHIN: Duration = Duration::from_secs(60);
/// How long a start may take to fail once it is called off.
const CALLED_OFF_WITHIN: Duration = Duration::from_secs(60);

/// A runtime that waits.
#[derive(Debug)]
pub(crate) struct Waiting {
    runtime: UnixStream,
    start: JoinHandle<Result<(), EngineError>>,
    prepared: Prepared,
}

impl Waiting {
    /// Hands over the container's shared memory, its IPC namespace and its filled tmpfs mounts, sends the word, and waits for the engine to say that the container runs.
    pub(crate) async fn go(mut self, provided: Provided, tmpfs: Vec<OwnedFd>) -> Result<(), StartError> {
        // A start that has failed meanwhile may have left the gate behind, which must not hear the word: nobody would
        // know of what it restored.
        if !self.start.is_finished() {
            // A gate that is gone fails the start, which says more than a broken pipe.
            let memories = provided.shared.iter().map(|memory| (MEMORY, memory));
            let ipc = provided.ipc.iter().map(|namespace| (IPC, namespace));
            let mut handed = memories.chain(ipc).chain(tmpfs.iter().map(|filled| (TMPFS, filled)));
            let sent = handed.try_for_each(|(what, fd)| pass_fd::send(&self.runtime, what, Some(fd.as_fd())));
            let _ = sent.and_then(|()| self.runtime.write_all(&[GO]));
        }
        drop(self.runtime);
        match self.start.await {
            Ok(started) => started.map_err(StartError::Engine),
            Err(error) => Err(StartError::Task(error)),
        }
    }
}

/// Why a start did not succeed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StartError {
    #[error(transparent)]
    Engine(EngineError),
    #[error("the task that starts the container died")]
    Task(#[source] tokio::task::JoinError),
}

/// The runtimes that wait on this host.
#[derive(Debug, Default)]
pub(crate) struct Starts(Mutex<HashMap<MigrationId, Waiting>>);

impl Starts {
    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<MigrationId, Waiting>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn take(&self, migration: &MigrationId) -> Option<Waiting> {
        self.lock().remove(migration)
    }

    fn prepared(&self, migration: &MigrationId) -> Option<Prepared> {
        self.lock().get(migration).map(|waiting| waiting.prepared)
    }

    /// Lets a runtime that waits fail, and waits until the engine has taken note: it answers nothing that concerns the
    /// container before.
    pub(crate) async fn call_off(&self, migration: &MigrationId) {
        let Some(Waiting { runtime, start, .. }) = self.take(migration) else { return };
        drop(runtime);
        if tokio::time::timeout(CALLED_OFF_WITHIN, start).await.is_err() {
            tracing::warn!(%migration, "the engine still tries to start a container that was called off");
        }
    }
}

pub(crate) async fn prepare(
    service: Arc<Restorer>,
    migration: MigrationId,
    ask: Prepare,
) -> Result<Prepared, Fault> {
    if let Some(prepared) = service.starts.prepared(&migration) {
        return Ok(prepared);
    }
    let dir = service.dir(&migration);
    let Some(mut notes) = Notes::load(&dir).await? else {
        return Err(Fault::new(code::OUT_OF_ORDER, "the container was not created here for this migration"));
    };
    let began = Instant::now();
    let network = network(&notes.spec);
    let id = ask.container.as_str();
    let (scratch, work) = (service.config.scratch(&migration), dir.join(WORK));
    let complete = blocking(move || scratch.make_beside(COMPLETE, IMAGES).map_err(fault(STATE))).await?;
    let armed = Armed {
        lazy_pages: true,
        network_first: network == Network::Made,
        wait: true,
        addresses: notes.spec.addresses(),
        ..Armed::new(migration.as_str(), &complete, &work)
    };
    let listener = {
        let (service, migration, id) = (service.clone(), migration.clone(), id.to_owned());
        blocking(move || {
            fs::create_dir_all(&work).map_err(fault(STATE))?;
            // runc reads them before it asks for the state.
            let descriptors = serde_json::to_vec(&ask.descriptors).map_err(fault(STATE))?;
            fs::write(complete.join(DESCRIPTORS), descriptors).map_err(fault(STATE))?;
            service.memories.start(&migration, &work, ask.store.as_ref(), &complete, &id)?;
            // Until here it was barred from starting. From here on the engine may have started it, whatever becomes
            // of this service.
            notes.armed = true;
            notes.write(&dir).map_err(fault(STATE))?;
            service.armed.disarm(&id).map_err(fault(STATE))?;
            service.armed.arm(&id, &armed).map_err(fault(STATE))?;
            let listener = service.armed.listen(&id).map_err(fault(STATE))?;
            listener.set_nonblocking(true).map_err(fault(STATE))?;
            Ok(listener)
        })
        .await?
    };
    let listener = UnixListener::from_std(listener).map_err(fault(STATE))?;
    let (engine, container) = (service.docker.clone(), id.to_owned());
    let mut start = tokio::spawn(async move { engine.start(&container).await });
    let accepted = tokio::select! {
        accepted = tokio::time::timeout(READY_WITHIN, listener.accept()) => accepted,
        ended = &mut start => {
            let error = ended.ok().and_then(Result::err);
            return Err(failed(&service, id, error.as_ref().map(|error| error as _)).await);
        }
    };
    let Ok(accepted) = accepted else {
        let message = format!("the engine has not called the runtime within {} s", READY_WITHIN.as_secs());
        return Err(Fault::new(STATE, message).remedy("see the log of dockerd on the target host"));
    };
    let runtime = accepted.and_then(|(runtime, _)| runtime.into_std()).map_err(fault(STATE))?;
    runtime.set_nonblocking(false).map_err(fault(STATE))?;
    let prepared = Prepared { network, took: Micros::from_duration(began.elapsed()) };
    service.starts.lock().insert(migration, Waiting { runtime, start, prepared });
    Ok(prepared)
}

/// Has a runtime that waits take the container's packets. One that does not wait any more has nothing to take them for:
/// the restore will tell.
pub(crate) async fn take_packets(
    service: Arc<Restorer>,
    migration: MigrationId,
) -> Result<PacketsTaken, Fault> {
    if let Some(waiting) = service.starts.lock().get_mut(&migration) {
        let _ = waiting.runtime.write_all(&[TAKE]);
    }
    Ok(PacketsTaken {})
}

/// An IPv6 address speaks of itself as soon as it is there, so such a network is made only when it may.
fn network(spec: &ContainerSpec) -> Network {
    match spec.networks.iter().any(|network| network.ipv6.is_some()) {
        true => Network::AtRestore,
        false => Network::Made,
    }
}
