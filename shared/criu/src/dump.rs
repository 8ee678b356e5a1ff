//! What a dump is asked to do, and doing it up to the point where it can still be undone.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use haulage_sys::Pid;
use haulage_sys::ipc::IpcNamespace;

use crate::cause::Cause;
use crate::companion::{CarriedTmpfs, Companion};
use crate::held::HeldDump;
use crate::mask::{MaskError, PagemapMask};
use crate::quiet::namespace_of;
use crate::rpc::{CgroupMode, Kind, NetworkLock, Options, Request};
use crate::swrk::{Criu, RpcError, Worker, WorkerView};
use crate::tmpfs::SmallTmpfs;

/// CRIU's log in the working directory of a dump.
pub const DUMP_LOG: &str = "dump.log";
/// Where runc looks for what the standard streams were, in the images' directory.
pub const DESCRIPTORS: &str = "descriptors.json";
const EARLY_LOG: &str = "criu-stderr.log";
const POST_DUMP: &str = "post-dump";
/// `CLONE_NEWNET` of `linux/sched.h`.
const CLONE_NEWNET: u32 = 0x4000_0000;

/// The network namespace of the tree in the images.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Network {
    /// Its devices and addresses are not dumped: the target's engine makes them. Sockets and connections are.
    Empty,
    /// It is not in the images at all: CRIU runs in the tree's namespace, here and in the restore, and takes it for a
    /// part of the world. Nor does it walk the kernel's table of connections then, 10 ms each of two times on a host
    /// whose table has 262,144 buckets.
    Inherited,
}

/// The IPC namespace of the tree in the images.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ipc {
    /// It is in them, with all that is in its shared memory.
    Dumped,
    /// It is not: CRIU runs in it, here and in the restore. No mapping of a segment may show ([`crate::ipc`]).
    Inherited,
}

/// What becomes of cgroups.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cgroups {
    /// They are in the images, properties of those that CRIU will make included.
    Dumped,
    /// They are left out: all tasks are in the container's own cgroup, and the restore runs in that of its own.
    Ignored,
}

/// A dump of a container's processes.
#[derive(Debug, Clone)]
pub struct DumpRequest {
    /// The container's init, in our own pid namespace.
    pub pid: i32,
    /// Where the images go: an existing, empty directory.
    pub images: PathBuf,
    /// Where logs and working files go: an existing directory, not necessarily the same.
    pub work: PathBuf,
    /// The container's root file system, as the host sees it.
    pub rootfs: PathBuf,
    /// The container's directory in the freezer hierarchy (cgroup v1) or its cgroup (v2). Frozen by the caller: CRIU
    /// then neither waits nor thaws it in the end.
    pub freeze_cgroup: Option<PathBuf>,
    /// The destinations in the container of mounts that the restore finds by that name: bind mounts and the
    /// controllers of a cgroup v1 mount.
    pub external_mounts: Vec<PathBuf>,
    /// Masked paths that are bind mounts of `/dev/null`; runc's restore knows them by that name.
    pub null_masks: Vec<PathBuf>,
    /// The container's own tmpfs mounts, each with its options as the kernel shows them. Those that are small go as a list
    /// ([`SmallTmpfs`]), the others are packed by CRIU.
    pub tmpfs: Vec<(PathBuf, String)>,
    /// Further ones, which the restore finds filled.
    pub carried: Vec<CarriedTmpfs>,
    /// What the standard streams of init were (runc's state, `external_descriptors`), e.g. `pipe:[1234]`.
    pub descriptors: Vec<String>,
    /// See [`Network`].
    pub network: Network,
    /// See [`Ipc`].
    pub ipc: Ipc,
    /// See [`Cgroups`].
    pub cgroups: Cgroups,
    /// How packets are kept away meanwhile; CRIU's default where `None`.
    pub network_lock: Option<NetworkLock>,
    /// Dump established TCP connections rather than fail on them.
    pub tcp_established: bool,
    /// The largest deleted but open file that goes into the images, in bytes; CRIU's default is 1 MiB.
    pub ghost_limit: Option<u32>,
    /// CRIU's log level, 0 to 4. Level 4 costs milliseconds.
    pub log_level: u8,
    /// The longest time until the dump must be held.
    pub patience: Duration,
}

impl DumpRequest {
    /// A request for the tree of `pid` with nothing external, and with the choices that a container wants.
    pub fn new(
        pid: i32,
        rootfs: impl Into<PathBuf>,
        images: impl Into<PathBuf>,
        work: impl Into<PathBuf>,
    ) -> Self {
        Self {
            pid,
            images: images.into(),
            work: work.into(),
            rootfs: rootfs.into(),
            freeze_cgroup: None,
            external_mounts: Vec::new(),
            null_masks: Vec::new(),
            tmpfs: Vec::new(),
            carried: Vec::new(),
            descriptors: Vec::new(),
            network: Network::Empty,
            ipc: Ipc::Dumped,
            cgroups: Cgroups::Dumped,
            network_lock: None,
            tcp_established: true,
            ghost_limit: None,
            log_level: 2,
            patience: Duration::from_secs(60),
        }
    }

    /// What the images will lack.
    fn companion(&self) -> io::Result<Companion> {
        let pid = Pid::from_raw(self.pid).ok_or(io::ErrorKind::InvalidInput)?;
        let tmpfs = SmallTmpfs::read(pid, &self.tmpfs)?;
        Ok(Companion::new(self.cgroups == Cgroups::Ignored, tmpfs, self.carried.clone()))
    }

    fn options(&self, images: &OwnedFd, work: &OwnedFd, companion: &Companion) -> Options {
        let text = |path: &Path| path.to_string_lossy().into_owned();
        let binds = self.external_mounts.iter().map(|path| format!("mnt[{0}]:{0}", text(path)));
        let nulls = self.null_masks.iter().map(|path| format!("mnt[{}]:/dev/null", text(path)));
        let tmpfs = companion.keys().map(|(at, key)| format!("mnt[{}]:{key}", text(at)));
        let external = binds.chain(nulls).chain(tmpfs).collect();
        let empty_ns = (self.network == Network::Empty).then_some(CLONE_NEWNET);
        let cgroups = match self.cgroups {
            Cgroups::Dumped => CgroupMode::Soft,
            Cgroups::Ignored => CgroupMode::Ignore,
        };
        Options {
            images_dir_fd: images.as_raw_fd(),
            work_dir_fd: Some(work.as_raw_fd()),
            pid: Some(self.pid),
            // Success means that the tree has moved: CRIU kills it.
            leave_running: Some(false),
            ext_unix_sk: Some(true),
            tcp_established: Some(self.tcp_established),
            // Whoever connects while the tree stands still waits in the backlog, and tries again after the move.
            tcp_skip_in_flight: Some(true),
            shell_job: Some(true),
            file_locks: Some(true),
            log_level: Some(self.log_level.into()),
            log_file: Some(DUMP_LOG.to_owned()),
            notify_scripts: Some(true),
            root: Some(text(&self.rootfs)),
            manage_cgroups_mode: Some(cgroups.into()),
            ghost_limit: self.ghost_limit,
            external,
            empty_ns,
            freeze_cgroup: self.freeze_cgroup.as_deref().map(text),
            network_lock: self.network_lock.map(Into::into),
            ..Options::default()
        }
    }
}

/// The dump failed. CRIU has undone what it did: the tree is as before, still frozen if it was, its connections alive.
#[derive(Debug, thiserror::Error)]
pub enum DumpError {
    /// CRIU gave up.
    #[error("criu cannot dump the container: {cause}")]
    Failed {
        /// Why.
        cause: Cause,
    },
    /// CRIU could not be talked to.
    #[error("the dump was cut off")]
    Rpc(#[source] RpcError),
    /// The pagemaps could not be masked.
    #[error("cannot mask the tracked memory")]
    Mask(#[from] MaskError),
    /// A directory or file of the dump is not usable.
    #[error("cannot use {path}")]
    Io {
        /// Which one.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// A dump; see [`Dump::start`].
#[derive(Debug)]
pub struct Dump;

impl Dump {
    /// Dumps the tree and holds it: everything is in the images, every task stands still under CRIU's trace, its
    /// packets are locked out. With `mask`, the memory that it hides is left out, and the CRIU that waits behind it
    /// ([`PagemapMask::call_criu`]) dumps.
    ///
    /// While held, the cgroup is thawed as far as the kernel is concerned (CRIU does that); the tasks stand still all
    /// the same.
    ///
    /// # Errors
    /// [`DumpError`]; the tree is then as it was before.
    pub fn start(
        criu: &Criu,
        request: &DumpRequest,
        mut mask: Option<PagemapMask>,
    ) -> Result<HeldDump, DumpError> {
        let (images, work) = (directory(&request.images)?, directory(&request.work)?);
        let descriptors = request.images.join(DESCRIPTORS);
        serde_json::to_vec(&request.descriptors)
            .map_err(io::Error::from)
            .and_then(|bytes| fs::write(&descriptors, bytes))
            .map_err(at(&descriptors))?;
        let companion = request.companion().map_err(at(Path::new("/proc")))?;
        companion.write(&request.images).map_err(at(&request.images))?;
        let waiting =
            mask.as_mut().map(|mask| mask.take_waiting((request.network, request.ipc))).transpose()?;
        let mut worker = match waiting.flatten() {
            Some(worker) => worker,
            None => {
                let namespaces = (request.network, request.ipc);
                match &mask {
                    Some(mask) => {
                        mask.start_worker(PagemapMask::view, request.pid, namespaces, &request.work)?
                    }
                    None => start_worker(criu, None, request.pid, namespaces, &request.work)?,
                }
            }
        };
        let log = request.work.join(DUMP_LOG);
        match run(&mut worker, request.options(&images, &work, &companion), request.patience) {
            Ok(()) => Ok(HeldDump::new(worker, mask, log)),
            Err(error) => {
                // CRIU logs and undoes until it ends; only then has the log its reason and the tree its freedom.
                worker.close();
                Err(match error {
                    RpcError::Refused(said) => DumpError::Failed { cause: Cause::of_log(&log, said) },
                    other => DumpError::Rpc(other),
                })
            }
        }
    }
}

/// A CRIU for the dump of `pid`, which has been told nothing yet.
pub(crate) fn start_worker(
    criu: &Criu,
    view: Option<&WorkerView>,
    pid: i32,
    (network, ipc): (Network, Ipc),
    work: &Path,
) -> Result<Worker, DumpError> {
    let early = work.join(EARLY_LOG);
    let stderr = File::create(&early).map_err(at(&early))?;
    let network = match network {
        Network::Empty => None,
        Network::Inherited => Some(namespace_of(pid).map_err(at(Path::new("/proc")))?),
    };
    let ipc = match ipc {
        Ipc::Dumped => None,
        Ipc::Inherited => Some(ipc_of(pid).map_err(at(Path::new("/proc")))?),
    };
    Worker::start(criu, view, (network, ipc), Some(stderr)).map_err(DumpError::Rpc)
}

/// Until the post-dump notification, which is left unanswered.
fn run(worker: &mut Worker, options: Options, patience: Duration) -> Result<(), RpcError> {
    let deadline = Instant::now() + patience;
    worker.send(&Request { kind: Kind::Dump.into(), options: Some(options), ..Request::default() })?;
    loop {
        let response = worker.receive(deadline.saturating_duration_since(Instant::now()))?;
        match response.kind() {
            Kind::Notify if response.notify.as_ref().is_some_and(|n| n.stage() == POST_DUMP) => return Ok(()),
            Kind::Notify => worker.send(&answer(true))?,
            // Only a dump that failed ends without the notification.
            Kind::Dump | Kind::Empty => return Err(RpcError::Refused(response.error)),
            got => return Err(RpcError::Unexpected { expected: Kind::Notify, got }),
        }
    }
}

/// The answer to a notification.
pub(crate) fn answer(success: bool) -> Request {
    Request { kind: Kind::Notify.into(), notify_success: Some(success), ..Request::default() }
}

fn ipc_of(pid: i32) -> io::Result<IpcNamespace> {
    IpcNamespace::of(Pid::from_raw(pid).ok_or(io::ErrorKind::InvalidInput)?)
}

fn directory(path: &Path) -> Result<OwnedFd, DumpError> {
    Ok(File::open(path).map_err(at(path))?.into())
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> DumpError {
    let path = path.to_owned();
    move |source| DumpError::Io { path, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn external_resources_have_runc_s_names() {
        let null = || OwnedFd::from(File::open("/dev/null").unwrap());
        let mut request = DumpRequest::new(7, "/root fs", "/images", "/work");
        request.external_mounts = vec!["/etc/hosts".into(), "/sys/fs/cgroup/memory".into()];
        request.null_masks = vec!["/proc/kcore".into()];
        let nothing = Companion::new(false, Vec::new(), Vec::new());
        let options = request.options(&null(), &null(), &nothing);
        assert_eq!(
            options.external,
            [
                "mnt[/etc/hosts]:/etc/hosts",
                "mnt[/sys/fs/cgroup/memory]:/sys/fs/cgroup/memory",
                "mnt[/proc/kcore]:/dev/null"
            ]
        );
        assert_eq!(options.empty_ns, Some(CLONE_NEWNET));
        request.network = Network::Inherited;
        let options = request.options(&null(), &null(), &nothing);
        assert_eq!(options.empty_ns, None);
    }
}
