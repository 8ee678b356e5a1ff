//! The dump, and the hold that follows it.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use haulage_criu::companion::CarriedTmpfs;
use haulage_criu::descriptors::LeftOutMemfd;
use haulage_criu::dump::{self, DumpRequest, Ipc};
use haulage_criu::guard;
use haulage_criu::held::HeldDump;
use haulage_criu::mask::PagemapMask;
use haulage_criu::packets;
use haulage_criu::rpc::NetworkLock;
use haulage_criu::shared::{LeftOut, LeftOutProcess, SharedObject};
use haulage_engine::{BundleFacts, TmpfsFacts};
use haulage_pages::in_flight::Rings;
use haulage_pages::maps::Maps;
use haulage_pages::object::{self, Memfd, ObjectId};
use haulage_pages::process::{self, Process, Vpid};
use haulage_protocol::checkpointer::{Confirmed, Dump, Dumped, Network, SourceTmpfs};
use haulage_protocol::fault::{Fault, code};
use haulage_protocol::id::MigrationId;
use haulage_protocol::unit::{Bytes, Micros};
use haulage_sys::PAGE_SIZE;
use haulage_sys::freezer::Freezer;
use haulage_sys::packet::Capture;
use haulage_sys::pagemap::Pagemap;
use haulage_sys::rcu::Expedited;

use crate::Checkpointer;
use crate::descriptors::{Descriptors, OpenFiles, Table};
use crate::failure::{DUMP, fault, joined};
use crate::freeze::{FREEZE_WITHIN, io_in_flight};
use crate::locks;
use crate::notes::{DUMP as DUMP_DIR, Notes};
use crate::segments;

/// CRIU's logs, in the directory of a dump.
pub(crate) const WORK_DIR: &str = "work";

/// A container that this process has frozen.
pub(crate) struct Session {
    pub(crate) notes: Notes,
    pub(crate) bundle: BundleFacts,
    /// Packets that arrive since it is silent.
    pub(crate) capture: Option<Capture>,
    /// While it is frozen and dumped.
    pub(crate) expedited: Option<Expedited>,
    /// The events of asynchronous IO, as they stood when the container was frozen.
    pub(crate) rings: Rings,
    pub(crate) state: State,
}

pub(crate) enum State {
    /// Frozen, not dumped: the mask is ready to cover it.
    Frozen(PagemapMask),
    /// Dumped and held.
    Held(HeldDump),
    /// A dump failed.
    Spoilt,
}

pub(crate) async fn dump(
    service: Arc<Checkpointer>,
    migration: MigrationId,
    ask: Dump,
) -> Result<Dumped, Fault> {
    let work = move || {
        let mut session = service.sessions.take(&migration).ok_or_else(not_frozen)?;
        let result = dump_frozen(&service, &migration, &mut session, &ask);
        drop(service.sessions.put(&migration, session));
        result
    };
    joined(tokio::task::spawn_blocking(work).await)
}

fn not_frozen() -> Fault {
    Fault::new(code::OUT_OF_ORDER, "this checkpointer has not frozen the container")
        .remedy("it was restarted in between: the migration is rolled back, start it again")
}

fn dump_frozen(
    service: &Checkpointer,
    migration: &MigrationId,
    session: &mut Session,
    ask: &Dump,
) -> Result<Dumped, Fault> {
    let mask = match std::mem::replace(&mut session.state, State::Spoilt) {
        State::Frozen(mask) => mask,
        other => {
            session.state = other;
            return Err(Fault::new(code::OUT_OF_ORDER, "the container was dumped before"));
        }
    };
    let began = Instant::now();
    let dir = service.config.scratch(migration).find(DUMP_DIR);
    let (images, work) = (dir.join("images"), dir.join(WORK_DIR));
    for dir in [&images, &work] {
        std::fs::create_dir_all(dir).map_err(fault(DUMP))?;
    }
    let processes = with_memory(session)?;
    let (mask, ipc) = cover(mask, &processes, &images)?;
    let mut request = request(&session.bundle, images.clone(), work, ask)?;
    request.ipc = ipc;
    // To look for guards takes milliseconds for each GiB of memory.
    let (held, guards) = std::thread::scope(|scope| {
        let guards = scope.spawn(|| guards(&processes));
        let held = dump::Dump::start(&service.criu, &request, Some(mask)).map_err(fault(DUMP));
        (held, guards.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    });
    let (held, guards) = (held?, guards?);
    for (vpid, guards) in guards {
        guard::add(&images, vpid.0, &guards).map_err(fault(DUMP))?;
    }
    session.state = State::Held(held);
    // CRIU has thawed the cgroup and stops the tasks itself. Should it die, they shall stand still all the same.
    let freezer = Freezer::open(&session.notes.freezer).map_err(fault(DUMP))?;
    freezer.freeze(FREEZE_WITHIN).map_err(fault(DUMP))?;
    keep_packets(migration, session, &images);
    session.expedited = None;
    Ok(Dumped {
        bytes: size(&images).map_err(fault(DUMP))?,
        images: images.to_string_lossy().into_owned(),
        took: Micros::from_duration(began.elapsed()),
    })
}

/// What has come since the container is silent goes to the target with the images. By now packets go there themselves.
/// Those that are lost are sent again by those who sent them, so this fails nothing.
fn keep_packets(migration: &MigrationId, session: &mut Session, images: &Path) {
    let kept = session.capture.take().map(|capture| packets::drain(&capture)).transpose();
    if let Err(error) = kept.and_then(|kept| packets::write(images, &kept.unwrap_or_default())) {
        tracing::warn!(%migration, %error, "packets that arrived for the container were lost");
    }
}

/// Private mappings of so many bytes, all of whose pages the page-shipper carries, CRIU is not told of: looking at every
/// page of them takes it 15 ms per GiB, and leaving one out takes us a few microseconds.
const LARGE: u64 = 16 << 20;

/// The guard regions of each process, which are addresses.
type Guards = Vec<(Vpid, Vec<Range<u64>>)>;

/// The processes of a frozen container and their mappings.
fn with_memory(session: &Session) -> Result<Vec<(Process, Maps)>, Fault> {
    let mut all = Vec::new();
    for process in process::list(&session.notes.procs).map_err(fault(DUMP))? {
        let maps = Maps::of(process.pid).map_err(fault(DUMP))?;
        // A zombie has no memory, and no pagemap to cover.
        if !maps.regions().is_empty() {
            all.push((process, maps));
        }
    }
    Ok(all)
}

/// Whether descriptors are likely to be hidden from CRIU, and what becomes of the IPC namespace, to judge by processes that
/// run.
pub(crate) fn expected(processes: &[Process]) -> (bool, Ipc) {
    let maps = processes.iter().filter_map(|process| Some((*process, Maps::of(process.pid).ok()?)));
    let objects = object::carried(&maps.collect::<Vec<_>>()).unwrap_or_default();
    let has_memfds = objects.iter().any(|(id, mappings)| matches!(object::memfd(*id, mappings), Ok(Some(_))));
    let ipc = segments::carried(processes.iter(), &objects).map_or(Ipc::Dumped, |_| Ipc::Inherited);
    (has_memfds, ipc)
}

/// Hides the memory that the page-shipper carries, and writes down what CRIU does not even know of, or loses.
fn cover(mut mask: PagemapMask, all: &[(Process, Maps)], images: &Path) -> Result<(PagemapMask, Ipc), Fault> {
    locks::write_down(all.iter().map(|(process, _)| *process), images)?;
    let ipc = hide(&mut mask, all, images)?;
    Ok((mask, ipc))
}

/// Guards, which are not told by what CRIU sees behind the mask.
fn guards(all: &[(Process, Maps)]) -> Result<Guards, Fault> {
    let guards = all.iter().map(|(process, _)| {
        let guarded = Pagemap::open(process.pid).and_then(|mut pagemap| pagemap.guards());
        Ok((process.vpid, guarded.map_err(fault(DUMP))?))
    });
    guards.collect()
}

fn hide(mask: &mut PagemapMask, all: &[(Process, Maps)], images: &Path) -> Result<Ipc, Fault> {
    let mut objects = object::carried(all).map_err(fault(DUMP))?;
    let mut ipc = segments::carried(all.iter().map(|(process, _)| process), &objects);
    if ipc.is_none() {
        objects.retain(|id, _| id.segment().is_none());
    }
    let mut memfds = BTreeMap::new();
    for (id, mappings) in &objects {
        let memfd = object::memfd(*id, mappings).map_err(fault(DUMP))?;
        memfds.extend(memfd.map(|memfd| (*id, described(memfd))));
    }
    let tables = tables(all, &memfds.keys().copied().collect())?;
    for id in tables.iter().flat_map(Table::criu_s) {
        if memfds.remove(&id).is_some() {
            tracing::info!(memfd = id.0, "locked or with an owner for signals: left to criu");
        }
        objects.remove(&id);
    }
    let ours: BTreeSet<_> = memfds.keys().copied().collect();
    let mut left_out = LeftOut::default();
    for (id, mappings) in &objects {
        let size = object::size(*id, mappings).map_err(fault(DUMP))?;
        let (segment, memfd) = (id.segment(), memfds.remove(id));
        // All of the last page of a segment is mapped.
        let size = if segment.is_some() { size.next_multiple_of(PAGE_SIZE) } else { size };
        left_out.objects.push(SharedObject { id: id.0, size, memfd, segment });
    }
    let mut files = OpenFiles::default();
    for ((process, maps), table) in all.iter().zip(tables) {
        let hidden: Vec<_> = maps.tracked().map(|pages| pages.addresses()).collect();
        let theirs = objects.iter().flat_map(|(id, mappings)| mappings.iter().map(move |m| (*id, m)));
        let theirs = theirs.filter(|(_, mapping)| mapping.process == *process);
        let theirs: BTreeMap<_, _> =
            theirs.map(|(id, mapping)| (mapping.pages.addresses().start, (id, mapping.pages))).collect();
        let unknown: Vec<_> = theirs.values().map(|(_, pages)| pages.addresses()).collect();
        let pid = process.pid.as_raw_nonzero().get();
        let needless: Vec<_> =
            hidden.iter().filter(|range| range.end - range.start >= LARGE).cloned().collect();
        let mut mappings = mask.cover_shared(pid, &hidden, &unknown, &needless).map_err(fault(DUMP))?;
        for mapping in mappings.iter_mut().filter(|mapping| !mapping.is_private()) {
            // The number of a segment is not its alone.
            mapping.object = theirs.get(&mapping.start).map_or(mapping.object, |(id, _)| id.0);
        }
        if let Some(ipc) = &mut ipc {
            ipc.attached.extend(segments::attached(process.vpid.0, &mappings));
        }
        let Descriptors { shown, left_out: descriptors } = files.descriptors(*process, table, &ours)?;
        if !descriptors.is_empty() {
            mask.cover_descriptors(pid, &shown).map_err(fault(DUMP))?;
        }
        if !mappings.is_empty() || !descriptors.is_empty() {
            left_out.processes.push(LeftOutProcess { pid: process.vpid.0, mappings, descriptors });
        }
    }
    left_out.files = files.into_files();
    if !left_out.processes.is_empty() {
        left_out.write(images).map_err(fault(DUMP))?;
    }
    match ipc {
        Some(ipc) => ipc.write(images).map_err(fault(DUMP)).map(|()| Ipc::Inherited),
        None => Ok(Ipc::Dumped),
    }
}

/// The descriptors of each process; of none, where there are no memfds to look for.
fn tables(all: &[(Process, Maps)], memfds: &BTreeSet<ObjectId>) -> Result<Vec<Table>, Fault> {
    let read = |(process, _): &(Process, Maps)| match memfds.is_empty() {
        true => Ok(Table::default()),
        false => Table::read(*process, memfds),
    };
    all.iter().map(read).collect()
}

fn described(memfd: Memfd) -> LeftOutMemfd {
    let Memfd { label, mode, owner: (uid, gid), seals, .. } = memfd;
    LeftOutMemfd { name: label.as_bytes().to_vec(), mode, uid, gid, seals }
}

fn request(bundle: &BundleFacts, images: PathBuf, work: PathBuf, ask: &Dump) -> Result<DumpRequest, Fault> {
    let paths = |names: &[String]| names.iter().map(PathBuf::from).collect();
    let mut request = DumpRequest::new(bundle.init_pid, &bundle.rootfs, images, work);
    request.freeze_cgroup = Some(bundle.cgroup.freezer_dir.clone());
    request.external_mounts = paths(&bundle.external_mounts);
    request.null_masks = paths(&bundle.masked_null);
    request.descriptors.clone_from(&bundle.external_descriptors);
    let others = bundle.tmpfs.iter().filter(|tmpfs| ask.tmpfs.iter().all(|carried| carried.at != tmpfs.at));
    request.tmpfs = others.map(|tmpfs| (tmpfs.at.clone().into(), tmpfs.options.clone())).collect();
    request.carried = ask.tmpfs.iter().map(|tmpfs| carried(bundle, tmpfs)).collect::<Result<_, _>>()?;
    if bundle.cgroup.plain {
        request.cgroups = dump::Cgroups::Ignored;
    }
    request.network = criu_s_network(ask.network);
    if ask.network == Network::Made {
        // The network is silenced by ourselves, here and there.
        request.network_lock = Some(NetworkLock::Skip);
    }
    Ok(request)
}

/// What of the network is in the images.
pub(crate) fn criu_s_network(network: Network) -> dump::Network {
    match network {
        Network::Made => dump::Network::Inherited,
        Network::AtRestore => dump::Network::Empty,
    }
}

/// One that the files service carries, which must be what it was when that began.
fn carried(bundle: &BundleFacts, was: &SourceTmpfs) -> Result<CarriedTmpfs, Fault> {
    let same = |is: &&TmpfsFacts| (&is.at, &is.device, &is.options) == (&was.at, &was.device, &was.options);
    if bundle.tmpfs.iter().find(same).is_none() {
        let message =
            format!("the tmpfs at {} was mounted anew or otherwise since the migration began", was.at);
        return Err(Fault::new(DUMP, message).remedy("start the migration again"));
    }
    Ok(CarriedTmpfs { at: was.at.clone().into(), options: was.options.clone() })
}

fn size(dir: &Path) -> std::io::Result<Bytes> {
    let mut bytes = 0;
    for entry in std::fs::read_dir(dir)? {
        bytes += entry?.metadata()?.len();
    }
    Ok(Bytes(bytes))
}

pub(crate) async fn confirm(service: Arc<Checkpointer>, migration: MigrationId) -> Result<Confirmed, Fault> {
    let lost = || {
        Fault::new(code::HOLD_LOST, "the container is no longer held in the state that was dumped")
            .remedy("the migration is rolled back: start it again")
    };
    let session = service.sessions.take(&migration).ok_or_else(lost)?;
    let alive = matches!(&session.state, State::Held(held) if held.is_alive());
    let moved = session.rings.have_moved().map_err(fault(code::HOLD_LOST));
    drop(service.sessions.put(&migration, session));
    match moved? {
        _ if !alive => Err(lost()),
        true => Err(io_in_flight("asynchronous IO has ended after the container was dumped")),
        false => Ok(Confirmed {}),
    }
}
