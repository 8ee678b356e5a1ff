//! The freeze: every task of the container stands still, and all of them are of its own tree.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use haulage_criu::mask::{DEFAULT_PARENT, PagemapMask};
use haulage_criu::quiet;
use haulage_engine::{BundleFacts, Captured, ContainerSpec, Engine, RestartPolicy, capture};
use haulage_pages::in_flight::Rings;
use haulage_pages::maps::Maps;
use haulage_pages::process::{self, Process};
use haulage_protocol::checkpointer::{Freeze, FreezePrepared, Frozen, MappedFile, Network, PrepareFreeze};
use haulage_protocol::fault::Fault;
use haulage_protocol::id::MigrationId;
use haulage_protocol::unit::Micros;
use haulage_service::now;
use haulage_sys::freezer::Freezer;
use haulage_sys::netns::NetworkNamespace;
use haulage_sys::packet::Capture;
use haulage_sys::rcu::Expedited;

use crate::Checkpointer;
use crate::drift;
use crate::failure::{self, EXEC_SESSION, FREEZE, IO_IN_FLIGHT, fault, joined};
use crate::hold::{self, Session, State, WORK_DIR, criu_s_network};
use crate::inspect::{bundle, carried_tmpfs, volume_root};
use crate::notes::{DUMP, Notes};
use crate::obstacle;
use crate::room;

/// How long a cgroup may take to freeze. It takes well under a millisecond unless a task is stuck in the kernel.
pub(crate) const FREEZE_WITHIN: Duration = Duration::from_secs(5);
/// How long to wait for `docker exec` sessions and health checks to end.
const EXECS_END_WITHIN: Duration = Duration::from_secs(5);
const LOOK_AGAIN_AFTER: Duration = Duration::from_millis(20);
/// How long what was prepared waits for a freeze, which else prepares it anew: its migration may have ended unnoticed, as
/// when this service was restarted with the request still on its way.
const WAITS_FOR: Duration = Duration::from_secs(600);

/// What a freeze needs beforehand and what changes nothing: CRIU waits, and so does what will silence the network. Dropping
/// it ends them.
pub(crate) struct Prepared {
    at: Instant,
    bundle: BundleFacts,
    network: Network,
    mask: PagemapMask,
    silence: Silence,
}

impl Prepared {
    /// Not when the container has become another or been mounted upon since, or has what CRIU must know of when it starts; nor
    /// when what waits has died. It ends then.
    fn if_still_of_use(
        mut self,
        bundle: &BundleFacts,
        processes: &[Process],
        network: Network,
    ) -> Option<Self> {
        let (memfds, ipc) = hold::expected(processes);
        let of_use = self.bundle == *bundle
            && self.network == network
            && self.mask.would_serve((criu_s_network(network), ipc), memfds)
            && self.silence.change.is_ready();
        of_use.then_some(self)
    }
}

/// Leaves less to [`freeze`], and only as long as the container is what it is now. Nothing is changed, so nothing is noted;
/// directories are made, which any roll-back removes.
pub(crate) async fn prepare_freeze(
    service: Arc<Checkpointer>,
    migration: MigrationId,
    ask: PrepareFreeze,
) -> Result<FreezePrepared, Fault> {
    let ask = ask.freeze;
    let captured = unchanged(&service, &migration, &ask).await?;
    let (keeper, of) = (service.clone(), migration.clone());
    let work = move || {
        let (bundle, processes) = movable(&captured)?;
        let prepared = prepare(&keeper, &of, bundle, &processes, ask.network)?;
        let at = prepared.at;
        // Whatever was there before ends here, at leisure.
        drop(keeper.prepared.put(&of, prepared));
        Ok(at)
    };
    let at = joined(tokio::task::spawn_blocking(work).await)?;
    let service = Arc::downgrade(&service);
    tokio::spawn(async move {
        tokio::time::sleep(WAITS_FOR).await;
        let Some(service) = service.upgrade() else { return };
        let late = service.prepared.take_if(&migration, |prepared| prepared.at == at);
        if late.is_some() {
            tracing::info!(%migration, "no freeze has come yet for what was prepared: it ends");
            // Which waits for processes to end.
            tokio::task::spawn_blocking(move || drop(late));
        }
    });
    Ok(FreezePrepared {})
}

pub(crate) async fn freeze(
    service: Arc<Checkpointer>,
    migration: MigrationId,
    ask: Freeze,
) -> Result<Frozen, Fault> {
    let captured = unchanged(&service, &migration, &ask).await?;
    let (mut session, silence) = {
        let (service, migration, captured) = (service.clone(), migration.clone(), captured.clone());
        joined(tokio::task::spawn_blocking(move || begin(&service, &migration, ask, &captured)).await)?
    };
    // Its processes will be killed from outside, which Docker must not take for a crash.
    if !captured.spec.restart_policy().is_never() {
        let id = &captured.spec.id;
        let set = service.docker.set_restart_policy(id, &RestartPolicy::never()).await;
        set.map_err(|error| failure::engine(&error))?;
    }
    let (worker, at) = (service.clone(), migration.clone());
    let frozen = tokio::task::spawn_blocking(move || {
        let frozen = freeze_whole(&mut session, &captured.spec, silence)?;
        drop(worker.sessions.put(&at, session));
        Ok(frozen)
    });
    let frozen = joined(frozen.await);
    if frozen.is_err() {
        // The freezer has thawed it; the rest is put back by the same way as any roll-back.
        let undone = crate::roll_back::undo(&service, &migration).await;
        if let Err(error) = undone {
            tracing::error!(%migration, %error, "a failed freeze was not undone, the coordinator will ask again");
        }
    }
    frozen
}

/// The container, if it is still what the target was made from.
async fn unchanged(service: &Checkpointer, migration: &MigrationId, ask: &Freeze) -> Result<Captured, Fault> {
    let captured = capture(&service.docker, ask.container.as_str()).await.map_err(|e| failure::gather(&e))?;
    if let Some(inspected) = &ask.spec {
        let begun = Notes::load(&service.config.migration_dir(migration)).await?.is_some();
        drift::refuse(inspected, &captured.spec, begun)?;
    }
    Ok(captured)
}

/// The running container, which may have begun since it was inspected what the dump would fail for.
fn movable(captured: &Captured) -> Result<(BundleFacts, Vec<Process>), Fault> {
    let bundle = bundle(&captured.spec.id, captured.state.pid)?;
    let processes = process::list(&bundle.cgroup.procs_file).map_err(fault(FREEZE))?;
    obstacle::refuse(&processes, bundle.cgroup.version, &FREEZE)?;
    Ok((bundle, processes))
}

fn prepare(
    service: &Checkpointer,
    migration: &MigrationId,
    bundle: BundleFacts,
    processes: &[Process],
    network: Network,
) -> Result<Prepared, Fault> {
    let room = room::of_images(processes, &bundle, &carried_tmpfs(&bundle)).map_err(fault(FREEZE))?;
    let scratch = service.config.scratch(migration);
    // One that is there may have been made where less was to be kept.
    scratch.remove(&[DUMP]).map_err(fault(FREEZE))?;
    let dump = scratch.make(DUMP, Some(room.0)).map_err(fault(FREEZE))?;
    let work = dump.join(WORK_DIR);
    std::fs::create_dir_all(&work).map_err(fault(FREEZE))?;
    let mut mask = PagemapMask::prepare(&service.criu, Path::new(DEFAULT_PARENT)).map_err(fault(FREEZE))?;
    let (criu_s, (memfds, ipc)) = (criu_s_network(network), hold::expected(processes));
    mask.call_criu(bundle.init_pid, (criu_s, ipc), memfds, &work).map_err(fault(FREEZE))?;
    let namespace = quiet::namespace_of(bundle.init_pid).map_err(fault(FREEZE))?;
    let change = quiet::Change::to_silence(&namespace).map_err(fault(FREEZE))?;
    Ok(Prepared { at: Instant::now(), bundle, network, mask, silence: Silence { namespace, change } })
}

/// Everything up to the standstill: what was prepared, if it is still of use, and notes.
fn begin(
    service: &Checkpointer,
    migration: &MigrationId,
    ask: Freeze,
    captured: &Captured,
) -> Result<(Session, Silence), Fault> {
    let spec = &captured.spec;
    let (bundle, processes) = movable(captured)?;
    let before = service.prepared.take(migration);
    let still = before.and_then(|before| before.if_still_of_use(&bundle, &processes, ask.network));
    let prepared = match still {
        Some(prepared) => prepared,
        None => prepare(service, migration, bundle, &processes, ask.network)?,
    };
    let Prepared { bundle, mask, silence, .. } = prepared;
    let volumes =
        spec.volumes().filter(|(_, volume)| !volume.anonymous).map(|(_, volume)| volume.name.clone());
    let dir = service.config.migration_dir(migration);
    let before = Notes::read(&dir).map_err(fault(FREEZE))?;
    let arp_ignore = match before.as_ref().and_then(|notes| notes.arp_ignore.clone()) {
        Some(setting) => setting,
        None => quiet::present(&silence.namespace).map_err(fault(FREEZE))?,
    };
    let notes = Notes {
        container: ask.container,
        init: bundle.init_pid,
        freezer: bundle.cgroup.freezer_dir.clone(),
        procs: bundle.cgroup.procs_file.clone(),
        // A freeze that was begun before, by a checkpointer that has died since, may have changed them already.
        restart_policy: before
            .as_ref()
            .map_or_else(|| spec.restart_policy(), |notes| notes.restart_policy.clone()),
        arp_ignore: Some(arp_ignore),
        addresses: spec.addresses(),
        volumes: volumes.collect(),
    };
    notes.write(&dir).map_err(fault(FREEZE))?;
    let (rings, state) = (Rings::default(), State::Frozen(mask));
    Ok((Session { notes, bundle, rings, capture: None, expedited: None, state }, silence))
}

/// The container's network, about to be silenced.
struct Silence {
    namespace: NetworkNamespace,
    change: quiet::Change,
}

/// On an error it runs again, but its network may be silent.
fn freeze_whole(session: &mut Session, spec: &ContainerSpec, silence: Silence) -> Result<Frozen, Fault> {
    let freezer = Freezer::open(&session.notes.freezer).map_err(fault(FREEZE))?;
    // Where it cannot be had everything takes longer.
    session.expedited = Expedited::begin().ok();
    let began = Instant::now();
    let (at, processes) = loop {
        let at = now();
        freezer.freeze(FREEZE_WITHIN).map_err(fault(FREEZE))?;
        match own_tree(&session.notes) {
            Ok(processes) => break (at, processes),
            Err(stray) => {
                freezer.thaw().map_err(fault(FREEZE))?;
                if began.elapsed() >= EXECS_END_WITHIN {
                    return Err(stray);
                }
                std::thread::sleep(LOOK_AGAIN_AFTER);
            }
        }
    };
    // Just before packets are dropped: what is seen twice is harmless, what is not seen is waited for.
    let capture = silence.namespace.run(Capture::begin).and_then(|begun| begun);
    session.capture =
        capture.inspect_err(|error| tracing::warn!(%error, "arriving packets are not kept")).ok();
    // It may have been stopped since.
    let traceable = obstacle::refuse_stopped(&processes, session.bundle.cgroup.version, &FREEZE);
    // Before its sockets are dumped: what the kernel acknowledged afterwards would be lost.
    let silenced =
        traceable.and_then(|()| quiet::hush(&silence.namespace, silence.change).map_err(fault(FREEZE)));
    let ready = silenced.and_then(|()| {
        session.rings = settled(&processes)?;
        mapped_writable(&processes, spec)
    });
    match ready {
        Ok(mapped_writable) => Ok(Frozen {
            at,
            took: Micros::from_duration(began.elapsed()),
            processes: u32::try_from(processes.len()).unwrap_or(u32::MAX),
            mapped_writable,
        }),
        Err(error) => {
            freezer.thaw().map_err(fault(FREEZE))?;
            Err(error)
        }
    }
}

/// Waits for asynchronous IO that is under way.
fn settled(processes: &[Process]) -> Result<Rings, Fault> {
    match Rings::settled(processes).map_err(fault(FREEZE))? {
        (rings, true) => Ok(rings),
        (_, false) => {
            Err(io_in_flight("asynchronous IO of the container goes on for long after it was frozen"))
        }
    }
}

pub(crate) fn io_in_flight(message: &str) -> Fault {
    Fault::new(IO_IN_FLIGHT, message).remedy("try again when the container's disk has less to do")
}

/// The container's processes, all of which descend from its first one.
fn own_tree(notes: &Notes) -> Result<Vec<Process>, Fault> {
    let processes = process::list(&notes.procs).map_err(fault(FREEZE))?;
    let stray = processes.iter().find(|process| !descends(process.pid.as_raw_nonzero().get(), notes.init));
    match stray {
        None => Ok(processes),
        Some(process) => {
            let message = format!(
                "process {} came into the container from outside, such as by docker exec",
                process.pid.as_raw_nonzero()
            );
            Err(Fault::new(EXEC_SESSION, message)
                .remedy("end docker exec sessions in the container, or wait for its health check to end"))
        }
    }
}

fn descends(mut pid: i32, ancestor: i32) -> bool {
    while pid > 1 {
        if pid == ancestor {
            return true;
        }
        match parent(pid) {
            Some(parent) => pid = parent,
            None => return false,
        }
    }
    false
}

fn parent(pid: i32) -> Option<i32> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // proc(5): the command in parentheses may hold anything, the fields after it are plain.
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_ascii_whitespace().nth(1)?.parse().ok()
}

/// Files that some process maps shared and writable. Processes may end meanwhile, unless they are frozen.
pub(crate) fn mapped_writable(processes: &[Process], spec: &ContainerSpec) -> Result<Vec<MappedFile>, Fault> {
    let mut files = BTreeSet::new();
    for process in processes {
        let maps = match Maps::of(process.pid) {
            Err(error) if error.is_gone() => continue,
            maps => maps.map_err(fault(FREEZE))?,
        };
        files.extend(maps.shared_writable_files().iter().filter_map(|path| carried(path, spec)));
    }
    Ok(files.into_iter().collect())
}

/// What carries a file, by its path in the container. Paths that are not UTF-8 cannot be said in a message; the
/// last pass finds their files by their times, which a write to memory changes at the next write-back only.
fn carried(path: &Path, spec: &ContainerSpec) -> Option<MappedFile> {
    let below = |mount: &Path| path.strip_prefix(mount).ok().and_then(Path::to_str).map(ToOwned::to_owned);
    let volumes = spec.volumes().filter_map(|(mount, volume)| {
        let path = below(&mount.destination)?;
        let depth = mount.destination.components().count();
        Some((depth, MappedFile { root: volume_root(mount, volume), path }))
    });
    match volumes.max_by_key(|(depth, _)| *depth) {
        Some((_, file)) => Some(file),
        None => Some(MappedFile { root: "layer".to_owned(), path: below(Path::new("/"))? }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ancestry_is_found_out() {
        let us = i32::try_from(std::process::id()).unwrap();
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        assert!(descends(pid, us) && descends(us, us));
        assert!(!descends(us, pid));
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
