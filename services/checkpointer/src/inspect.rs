//! What the container is, and whether it can move. Changes nothing.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use haulage_engine::{
    BundleFacts, Captured, Engine, HostFacts, MountSpec, TmpfsFacts, VolumeSpec, capture, refusals,
    running_facts,
};
use haulage_pages::process::Process;
use haulage_protocol::checkpointer::{Inspect, Inspected, Locate, Located, SourceRoot, SourceTmpfs};
use haulage_protocol::fault::{Fault, FaultCode, code};
use haulage_protocol::id::ContainerId;
use haulage_protocol::unit::Bytes;
use haulage_sys::Pid;
use haulage_sys::mount_ns::mounted_alone;
use haulage_sys::tmpfs::is_settable;

use crate::Checkpointer;
use crate::failure::{self, joined};
use crate::freeze::mapped_writable;
use crate::obstacle;
use crate::room;

const NOT_INSPECTABLE: FaultCode = FaultCode::known("not_inspectable");
/// The longest path of a tmpfs in the container that is good for a root's name, which has 300 bytes at most.
const MAX_TMPFS_PATH: usize = 256;
const LACKS_CAPABILITY: FaultCode = FaultCode::known("lacks_capability");

pub(crate) async fn locate(service: Arc<Checkpointer>, ask: Locate) -> Result<Located, Fault> {
    match service.docker.inspect(&ask.container).await {
        Ok(found) => {
            let id = found.id().map_err(failure::fault(failure::ENGINE))?;
            let name = found.name().map_err(failure::fault(failure::ENGINE))?;
            Ok(Located { container: Some(container_id(id)?), name: Some(name.to_owned()) })
        }
        Err(error) if error.is_not_found() => Ok(Located { container: None, name: None }),
        Err(error) => Err(failure::engine(&error)),
    }
}

fn container_id(id: &str) -> Result<ContainerId, Fault> {
    id.parse().map_err(failure::fault(failure::ENGINE))
}

pub(crate) async fn inspect(service: Arc<Checkpointer>, ask: Inspect) -> Result<Inspected, Fault> {
    let captured = capture(&service.docker, &ask.container).await.map_err(|e| failure::gather(&e))?;
    let shared = ask.shared_binds.into_iter().map(Into::into).collect();
    let facts = running_facts(&service.docker, &captured, shared).await.map_err(|e| failure::gather(&e))?;
    failure::refused(&refusals(&captured.spec, &facts))?;
    let image = service.docker.image(&captured.spec.image.id).await.map_err(|e| failure::engine(&e))?;
    let described =
        tokio::task::spawn_blocking(move || describe(&captured, &facts.engine, Bytes(image.size)));
    joined(described.await)
}

fn describe(
    captured: &Captured,
    engine: &haulage_engine::facts::EngineInfo,
    image_size: Bytes,
) -> Result<Inspected, Fault> {
    let spec = &captured.spec;
    let bundle = bundle(&spec.id, captured.state.pid)?;
    let processes =
        haulage_pages::process::list(&bundle.cgroup.procs_file).map_err(failure::fault(NOT_INSPECTABLE))?;
    limits_are_readable(&processes)?;
    obstacle::refuse(&processes, bundle.cgroup.version, &NOT_INSPECTABLE)?;
    let memory = processes.iter().map(|process| resident(process.pid.as_raw_nonzero().get())).sum();
    let (roots, tmpfs) = (roots(captured)?, carried_tmpfs(&bundle));
    let host = HostFacts::gather(engine).map_err(failure::fault(NOT_INSPECTABLE))?;
    let encode =
        |error: serde_json::Error| Fault::new(code::INTERNAL, "cannot encode the container").because(&error);
    Ok(Inspected {
        container: container_id(&spec.id)?,
        name: spec.name.clone(),
        spec: serde_json::to_value(spec).map_err(encode)?,
        host: serde_json::to_value(&host).map_err(encode)?,
        image: spec.image.id.clone(),
        cgroup_procs: text(&bundle.cgroup.procs_file)?,
        processes: u32::try_from(processes.len()).unwrap_or(u32::MAX),
        memory,
        images: Some(room::of_images(&processes, &bundle, &tmpfs).map_err(failure::fault(NOT_INSPECTABLE))?),
        disk: roots.iter().map(|root| on_disk(Path::new(&root.path))).sum(),
        image_size,
        roots,
        tmpfs,
        descriptors: bundle.external_descriptors.clone(),
        mapped_writable: mapped_writable(&processes, spec)?,
    })
}

/// The OCI side of the running container.
pub(crate) fn bundle(container: &str, init: i32) -> Result<BundleFacts, Fault> {
    BundleFacts::read(container, init).map_err(|error| {
        Fault::from_error(NOT_INSPECTABLE, &error)
            .remedy("haulage moves containers that Docker runs through containerd and runc or haul-runtime")
    })
}

/// CRIU reads every process's resource limits, which the kernel allows for a process of another user only with
/// `CAP_SYS_RESOURCE` (prlimit(2)). A host has it; a restricted virtual machine or container may not.
fn limits_are_readable(processes: &[Process]) -> Result<(), Fault> {
    const SYS_RESOURCE: u32 = 24;
    let ours =
        Status::of("self").ok_or_else(|| Fault::new(NOT_INSPECTABLE, "/proc/self/status is not readable"))?;
    if ours.capabilities & (1 << SYS_RESOURCE) != 0 {
        return Ok(());
    }
    for process in processes {
        let pid = process.pid.as_raw_nonzero();
        let other = Status::of(&pid.to_string()).filter(|theirs| theirs.ids != ours.ids);
        if other.is_some() {
            let message =
                format!("process {pid} is of another user, and this checkpointer lacks CAP_SYS_RESOURCE");
            return Err(Fault::new(LACKS_CAPABILITY, message)
                .remedy("run haul-checkpointer with all capabilities of root, or the container as root"));
        }
    }
    Ok(())
}

/// What `/proc/<pid>/status` says about the right to do something.
struct Status {
    /// The lines of user and group ids.
    ids: Vec<String>,
    /// The effective set.
    capabilities: u64,
}

impl Status {
    /// `None` when the process is gone.
    fn of(pid: &str) -> Option<Self> {
        let text = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let ids = text.lines().filter(|line| line.starts_with("Uid:") || line.starts_with("Gid:"));
        let effective = text.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
        let capabilities = u64::from_str_radix(effective.trim(), 16).ok()?;
        Some(Self { ids: ids.map(ToOwned::to_owned).collect(), capabilities })
    }
}

/// Resident memory of a process, shared pages counted in each; zero when it is gone.
fn resident(pid: i32) -> Bytes {
    let statm = std::fs::read_to_string(format!("/proc/{pid}/statm")).unwrap_or_default();
    let pages = statm.split_ascii_whitespace().nth(1).and_then(|pages| pages.parse().ok());
    haulage_protocol::unit::Pages(pages.unwrap_or(0)).bytes()
}

fn roots(captured: &Captured) -> Result<Vec<SourceRoot>, Fault> {
    let spec = &captured.spec;
    let upper = spec.layer.as_ref().and_then(|layer| layer.upper.as_ref());
    let upper =
        upper.ok_or_else(|| Fault::new(NOT_INSPECTABLE, "the engine does not tell the writable layer"))?;
    let mut roots = vec![SourceRoot { root: "layer".to_owned(), path: text(upper)? }];
    for (mount, volume) in spec.volumes() {
        let root = volume_root(mount, volume);
        let source = mount.source.as_ref();
        let source = source.ok_or_else(|| Fault::new(NOT_INSPECTABLE, format!("{root} has no directory")))?;
        roots.push(SourceRoot { root, path: text(source)? });
    }
    // Docker's own log files; other drivers keep theirs elsewhere or nowhere.
    if spec.log_driver() == "json-file"
        && let Some(log) = &spec.log_path
    {
        roots.push(SourceRoot { root: "log".to_owned(), path: text(log)? });
    }
    Ok(roots)
}

/// The tmpfs mounts that the files service carries: those that it can make anew, name and look at. What is in `/dev`,
/// `/proc` and `/sys` the engine has made; it goes as a list, and any other is left to CRIU.
pub(crate) fn carried_tmpfs(bundle: &BundleFacts) -> Vec<SourceTmpfs> {
    let all = bundle.tmpfs.iter().filter(|tmpfs| can_be_carried(tmpfs));
    all.filter_map(|tmpfs| source_tmpfs(bundle.init_pid, tmpfs).ok().flatten()).collect()
}

fn can_be_carried(tmpfs: &TmpfsFacts) -> bool {
    let made =
        tmpfs.at == "/dev" || ["/proc", "/sys"].iter().any(|dir| Path::new(&tmpfs.at).starts_with(dir));
    let has_name = tmpfs.at.len() <= MAX_TMPFS_PATH && tmpfs.at.bytes().all(|byte| byte.is_ascii_graphic());
    tmpfs.writable && !made && has_name && is_settable(&tmpfs.options)
}

/// `None` where something else is found in its place, which CRIU may know what to do about.
fn source_tmpfs(process: i32, tmpfs: &TmpfsFacts) -> io::Result<Option<SourceTmpfs>> {
    let pid = Pid::from_raw(process).ok_or(io::ErrorKind::InvalidInput)?;
    let root = mounted_alone(pid, Path::new(&tmpfs.at))?;
    let (is, space) = (rustix::fs::fstat(&root)?, rustix::fs::fstatvfs(&root)?);
    let device = format!("{}:{}", rustix::fs::major(is.st_dev), rustix::fs::minor(is.st_dev));
    Ok((device == tmpfs.device).then(|| SourceTmpfs {
        at: tmpfs.at.clone(),
        process,
        device,
        options: tmpfs.options.clone(),
        used: Bytes(space.f_blocks.saturating_sub(space.f_bfree).saturating_mul(space.f_frsize)),
    }))
}

/// What a tree takes up. Files that go while it is looked at, and what cannot be read, do not count: it is an
/// estimate, and the container is at work.
fn on_disk(path: &Path) -> Bytes {
    let Ok(metadata) = std::fs::symlink_metadata(path) else { return Bytes(0) };
    // stat(2): blocks are of 512 bytes, whatever the file system's are.
    let own = Bytes(metadata.blocks().saturating_mul(512));
    match std::fs::read_dir(path) {
        Ok(entries) if metadata.is_dir() => own + entries.flatten().map(|entry| on_disk(&entry.path())).sum(),
        _ => own,
    }
}

/// What a volume is called between the hosts. An anonymous one has another name on each; where it is mounted tells
/// it apart.
pub(crate) fn volume_root(mount: &MountSpec, volume: &VolumeSpec) -> String {
    match volume.anonymous {
        true => format!("volume-at:{}", mount.destination.display()),
        false => format!("volume:{}", volume.name),
    }
}

fn text(path: &Path) -> Result<String, Fault> {
    let text = path.to_str().map(ToOwned::to_owned);
    text.ok_or_else(|| Fault::new(NOT_INSPECTABLE, format!("the path {} is not UTF-8", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_made_anew_is_not_carried() {
        let carried = |at: &str, options: &str, writable| {
            let (at, options) = (at.to_owned(), options.to_owned());
            can_be_carried(&TmpfsFacts { at, device: "0:1".into(), writable, options })
        };
        assert!(carried("/dev/shm", "rw,size=65536k,inode64", true));
        assert!(carried("/run/lock", "rw", true));
        assert!(carried("/system", "rw", true), "what only begins like a directory of the engine's");
        for at in ["/dev", "/proc/acpi", "/sys/firmware", "/a b", "/ä"] {
            assert!(!carried(at, "rw", true), "{at}");
        }
        assert!(!carried(&format!("/{}", "x".repeat(300)), "rw", true));
        assert!(!carried("/scratch", "rw", false) && !carried("/scratch", "rw,mpol=local", true));
    }
}
