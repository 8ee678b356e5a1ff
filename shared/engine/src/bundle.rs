//! The OCI side of a running container: its shim, its bundle and runc's state, from which CRIU must be told the
//! same things that runc would tell it, since runc restores the images.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::facts::CgroupVersion;
use crate::mountinfo::{self, MountPoint};

/// Where runc's states lie when the bundle does not say: what Docker passes, then the shim's and runc's defaults.
const STATE_ROOTS: &[&str] =
    &["/run/docker/runtime-runc", "/run/docker/runtime-haul", "/run/containerd/runc", "/run/runc"];

/// The namespace of containers when the shim does not name one.
const DEFAULT_NAMESPACE: &str = "moby";

/// Everything about a running container that driving CRIU directly takes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BundleFacts {
    /// Pid of the container's first process, in the PID namespace of the reader.
    pub init_pid: i32,
    /// Pid of its shim, which is its parent.
    pub shim_pid: i32,
    /// The bundle's directory (config.json).
    pub bundle: PathBuf,
    /// What was given to runc as `--root`, without the namespace.
    pub runc_root: PathBuf,
    /// runc's state.json.
    pub state_path: PathBuf,
    /// The root file system's directory, CRIU's `--root`.
    pub rootfs: PathBuf,
    /// The container's cgroups.
    pub cgroup: CgroupFacts,
    /// Mount points that come from outside, under runc's names: CRIU's `--external mnt[X]:X`.
    pub external_mounts: Vec<String>,
    /// Masked files, which are binds of /dev/null: CRIU's `--external mnt[X]:/dev/null`.
    pub masked_null: Vec<String>,
    /// The container's own tmpfs mounts, masked directories among them, that nothing else shows.
    pub tmpfs: Vec<TmpfsFacts>,
    /// What the first process's descriptors 0, 1 and 2 were at its start (`pipe:[1234]`, `/dev/null`):
    /// the content of `descriptors.json`.
    pub external_descriptors: Vec<String>,
}

/// Where a container's cgroups are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CgroupFacts {
    /// Which hierarchy the container is frozen by.
    pub version: CgroupVersion,
    /// The cgroup to freeze: v1's freezer, or the unified one. CRIU's `--freeze-cgroup`.
    pub freezer_dir: PathBuf,
    /// Lists the pids of all its processes.
    pub procs_file: PathBuf,
    /// Every cgroup by controller; the unified one has an empty name.
    pub paths: BTreeMap<String, PathBuf>,
    /// All its processes are in these cgroups and see them as the host does: there are none below, and no cgroup
    /// namespace of its own.
    pub plain: bool,
}

/// A tmpfs of the container's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TmpfsFacts {
    /// Where it is in the container.
    pub at: String,
    /// Which file system it is, as `major:minor`.
    pub device: String,
    /// Whether its mount may be written through.
    pub writable: bool,
    /// The file system's own options as the kernel shows them, such as `rw,size=65536k,mode=755`.
    pub options: String,
}

/// The OCI side of a container could not be read.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// A file or link could not be read; the container may have ended.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file or link.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file is not what its format says.
    #[error("cannot understand {}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
    /// The parent of the first process is not containerd's shim: the engine is not one we know.
    #[error("the parent of process {init} (pid {parent}) is not a containerd shim but {command:?}")]
    NoShim {
        /// The container's first process.
        init: i32,
        /// Its parent.
        parent: i32,
        /// The parent's command line.
        command: String,
    },
    /// runc's state is in none of the places it can be.
    #[error("no state of the container {container} under any of {tried:?}")]
    NoState {
        /// The container's id.
        container: String,
        /// The files looked for.
        tried: Vec<PathBuf>,
    },
    /// The state belongs to another run of the container.
    #[error("runc's state names process {state}, the engine {engine}")]
    StalePid {
        /// According to the state.
        state: i32,
        /// According to the engine.
        engine: i32,
    },
    /// The state has no cgroup by which the container can be frozen.
    #[error("runc's state has neither a freezer cgroup nor a unified one")]
    NoFreezer,
    /// The kernel's account of the process has another form than expected.
    #[error("cannot understand {}", path.display())]
    Proc {
        /// The file of /proc.
        path: PathBuf,
    },
}

/// runc's state.json, as far as it matters.
#[derive(Debug, Deserialize)]
struct RuncState {
    init_process_pid: i32,
    cgroup_paths: BTreeMap<String, PathBuf>,
    #[serde(default)]
    external_descriptors: Option<Vec<String>>,
    config: RuncConfig,
}

#[derive(Debug, Deserialize)]
struct RuncConfig {
    rootfs: PathBuf,
    #[serde(default)]
    mounts: Option<Vec<RuncMount>>,
    #[serde(default)]
    mask_paths: Option<Vec<String>>,
    #[serde(default)]
    namespaces: Option<Vec<RuncNamespace>>,
}

#[derive(Debug, Deserialize)]
struct RuncMount {
    device: String,
    destination: String,
}

#[derive(Debug, Deserialize)]
struct RuncNamespace {
    #[serde(rename = "type")]
    kind: String,
}

impl BundleFacts {
    /// Reads the OCI side of the running container `container` (its full id), whose first process is `init`.
    ///
    /// Blocks shortly, on /proc and tmpfs only. Must run in the mount namespace of the engine.
    ///
    /// # Errors
    /// When the container has ended meanwhile, or was not made by containerd and runc.
    pub fn read(container: &str, init: i32) -> Result<Self, BundleError> {
        let shim_pid = parent(init)?;
        let namespace = shim_namespace(init, shim_pid)?;
        let bundle = read_link(&PathBuf::from(format!("/proc/{shim_pid}/cwd")))?;
        let (runc_root, state_path) = find_state(container, &namespace, &bundle)?;
        let state: RuncState = read_json(&state_path)?;
        if state.init_process_pid != init {
            return Err(BundleError::StalePid { state: state.init_process_pid, engine: init });
        }
        let mounts = mountinfo::of_process(init)
            .map_err(|source| BundleError::Read { path: mountinfo::path(init), source })?;
        let root = PathBuf::from(format!("/proc/{init}/root"));
        let tmpfs = own_tmpfs(&mounts, &external_mounts(&state.config, &mounts, &root));
        Ok(Self {
            init_pid: init,
            shim_pid,
            bundle,
            runc_root,
            cgroup: cgroup_facts(state.cgroup_paths, has_own_cgroups(&state.config))?,
            tmpfs,
            external_mounts: external_mounts(&state.config, &mounts, &root),
            masked_null: masked_null(&state.config, &mounts),
            external_descriptors: state.external_descriptors.unwrap_or_default(),
            rootfs: state.config.rootfs,
            state_path,
        })
    }
}

/// Field 4 of /proc/PID/stat; the command before it may contain anything, also parentheses.
fn parent(pid: i32) -> Result<i32, BundleError> {
    let path = PathBuf::from(format!("/proc/{pid}/stat"));
    let stat = read(&path)?;
    let stat = String::from_utf8_lossy(&stat);
    stat.rsplit_once(')')
        .and_then(|(_, rest)| rest.split_whitespace().nth(1)?.parse().ok())
        .ok_or(BundleError::Proc { path })
}

/// The containerd namespace from the shim's command line (`-namespace NAME`).
fn shim_namespace(init: i32, shim: i32) -> Result<String, BundleError> {
    let command = read(&PathBuf::from(format!("/proc/{shim}/cmdline")))?;
    let words: Vec<&[u8]> = command.split(|byte| *byte == 0).collect();
    let program = words.first().copied().unwrap_or_default();
    if !program.windows(15).any(|part| part == b"containerd-shim") {
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        return Err(BundleError::NoShim { init, parent: shim, command });
    }
    let flag = words.iter().position(|word| matches!(*word, b"-namespace" | b"--namespace"));
    let name = flag.and_then(|at| words.get(at + 1)).map(|name| String::from_utf8_lossy(name).into_owned());
    Ok(name.unwrap_or_else(|| DEFAULT_NAMESPACE.to_owned()))
}

/// runc's root and the container's state.json in it: where the bundle's options say, or else where it is found.
fn find_state(container: &str, namespace: &str, bundle: &Path) -> Result<(PathBuf, PathBuf), BundleError> {
    let options = bundle.join("options.json");
    // containerd writes the shim's options there; which spelling depends on its release.
    let named = match fs::read(&options) {
        Ok(bytes) => {
            let options: Value = serde_json::from_slice(&bytes)
                .map_err(|source| BundleError::Malformed { path: options, source })?;
            ["root", "Root"]
                .iter()
                .find_map(|key| options.get(key)?.as_str().filter(|root| !root.is_empty()).map(PathBuf::from))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(source) => return Err(BundleError::Read { path: options, source }),
    };
    let mut tried = Vec::new();
    for root in named.into_iter().chain(STATE_ROOTS.iter().map(PathBuf::from)) {
        let state = root.join(namespace).join(container).join("state.json");
        if state.is_file() {
            return Ok((root, state));
        }
        tried.push(state);
    }
    Err(BundleError::NoState { container: container.to_owned(), tried })
}

fn cgroup_facts(paths: BTreeMap<String, PathBuf>, own_namespace: bool) -> Result<CgroupFacts, BundleError> {
    // A hybrid host has a unified hierarchy too, without controllers: containers are frozen by v1's freezer there.
    let (version, dir) = match (paths.get("freezer"), paths.get("")) {
        (Some(freezer), _) => (CgroupVersion::V1, freezer.clone()),
        (None, Some(unified)) => (CgroupVersion::V2, unified.clone()),
        (None, None) => return Err(BundleError::NoFreezer),
    };
    let plain = !own_namespace && paths.values().all(|path| !has_directories(path));
    Ok(CgroupFacts { version, procs_file: dir.join("cgroup.procs"), freezer_dir: dir, paths, plain })
}

/// What cannot be read may have some.
fn has_directories(path: &Path) -> bool {
    let Ok(mut entries) = fs::read_dir(path) else { return true };
    entries.any(|entry| entry.and_then(|entry| entry.file_type()).map_or(true, |kind| kind.is_dir()))
}

/// With a cgroup namespace (always so on v2) /sys/fs/cgroup is a real mount, which CRIU dumps itself.
fn has_own_cgroups(config: &RuncConfig) -> bool {
    config.namespaces.iter().flatten().any(|namespace| namespace.kind == "NEWCGROUP")
}

/// Those whole ones that are mounted once, at a place that nothing covers, and that do not come from outside.
fn own_tmpfs(mounts: &[MountPoint], external: &[String]) -> Vec<TmpfsFacts> {
    let once = |mount: &&MountPoint| {
        mounts.iter().filter(|other| other.device == mount.device || other.at == mount.at).count() == 1
    };
    let own = mounts.iter().filter(|mount| mount.kind == "tmpfs" && mount.root == "/" && !mount.propagates);
    own.filter(once)
        .filter(|mount| !external.contains(&mount.at))
        .map(|mount| TmpfsFacts {
            at: mount.at.clone(),
            device: mount.device.clone(),
            writable: !mount.flags.split(',').any(|flag| flag == "ro"),
            options: mount.options.clone(),
        })
        .collect()
}

/// The names that runc gives to mounts from outside when it checkpoints, and looks for when it restores.
fn external_mounts(config: &RuncConfig, mounts: &[MountPoint], root: &Path) -> Vec<String> {
    let own_cgroups = has_own_cgroups(config);
    let mut external = Vec::new();
    for mount in config.mounts.iter().flatten() {
        match mount.device.as_str() {
            "bind" => external.push(inside(&mount.destination, &config.rootfs, mounts, root)),
            "cgroup" if !own_cgroups => external
                .extend(mounts.iter().map(|m| &m.at).filter(|at| at.starts_with("/sys/fs/cgroup/")).cloned()),
            _ => {}
        }
    }
    external
}

/// Masked directories are empty tmpfs mounts and dumped; masked files are binds of /dev/null.
fn masked_null(config: &RuncConfig, mounts: &[MountPoint]) -> Vec<String> {
    let masked = |at: &String| mounts.iter().any(|mount| mount.at == *at && mount.root.ends_with("/null"));
    config.mask_paths.iter().flatten().filter(|path| masked(path)).cloned().collect()
}

/// Where a bind really is in the container: symbolic links on the way (/var/run) are followed within its root.
fn inside(destination: &str, rootfs: &Path, mounts: &[MountPoint], root: &Path) -> String {
    let relative = Path::new(destination).strip_prefix(rootfs).ok();
    let destination = relative.map_or_else(|| destination.to_owned(), |path| format!("/{}", path.display()));
    if mounts.iter().any(|mount| mount.at == destination) {
        return destination;
    }
    mountinfo::resolve_in(root, &destination).unwrap_or(destination)
}

fn read(path: &Path) -> Result<Vec<u8>, BundleError> {
    fs::read(path).map_err(|source| BundleError::Read { path: path.to_owned(), source })
}

fn read_link(path: &Path) -> Result<PathBuf, BundleError> {
    let link = fs::read_link(path).map_err(|source| BundleError::Read { path: path.to_owned(), source })?;
    // A bundle that was removed shows as "… (deleted)".
    if link.as_os_str().as_bytes().ends_with(OsStr::new(" (deleted)").as_bytes()) {
        let source = io::Error::from(io::ErrorKind::NotFound);
        return Err(BundleError::Read { path: link, source });
    }
    Ok(link)
}

fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, BundleError> {
    serde_json::from_slice(&read(path)?)
        .map_err(|source| BundleError::Malformed { path: path.to_owned(), source })
}

#[cfg(test)]
#[path = "bundle_tests.rs"]
mod tests;
