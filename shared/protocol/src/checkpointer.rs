//! Requests to the checkpointer: the process state of a container that leaves its host.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::id::ContainerId;
use crate::rpc::{Rpc, Service};
use crate::unit::{Bytes, Micros};

macro_rules! rpc {
    ($request:ty, $service:ident, $verb:literal, $reply:ty) => {
        impl Rpc for $request {
            const SERVICE: Service = Service::$service;
            const VERB: &'static str = $verb;
            type Reply = $reply;
        }
    };
}
pub(crate) use rpc;

/// Does this host's engine have that container? Never a fault when it has not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Locate {
    /// A name, an id, or a unique beginning of an id.
    pub container: String,
}

/// The answer to [`Locate`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Located {
    /// The container's full id, if the host has it.
    pub container: Option<ContainerId>,
    /// Its name then, without the leading slash.
    #[serde(default)]
    pub name: Option<String>,
}

/// Captures what the container is, and refuses with a code and a remedy what cannot move. Changes nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inspect {
    /// A name, an id, or a unique beginning of an id.
    pub container: String,
    /// Bind mounts (paths on the host) that the operator declares to be the same on both hosts.
    #[serde(default)]
    pub shared_binds: Vec<String>,
}

/// What the container is, and where its parts lie on the source host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inspected {
    /// The container's full id on the source.
    pub container: ContainerId,
    /// Its name, without the leading slash.
    pub name: String,
    /// Everything that creates it again, as the engine crate's `ContainerSpec`; opaque to the coordinator.
    pub spec: Value,
    /// The source host's kernel, CPU and engine, as the engine crate's `HostFacts`; opaque to the coordinator.
    pub host: Value,
    /// The image, as the engine's content id (`sha256:…`).
    pub image: String,
    /// The file that lists the processes of the container's cgroup.
    pub cgroup_procs: String,
    /// The number of processes.
    pub processes: u32,
    /// Memory in use: the resident memory of all processes, shared pages counted in each.
    pub memory: Bytes,
    /// What CRIU's images of it may come to, nearly, if that is known.
    #[serde(default)]
    pub images: Option<Bytes>,
    /// What the writable layer and the volumes take up on disk.
    pub disk: Bytes,
    /// The size of the image's layers.
    pub image_size: Bytes,
    /// The directories that the files service carries over.
    pub roots: Vec<SourceRoot>,
    /// The tmpfs mounts that it carries over besides.
    #[serde(default)]
    pub tmpfs: Vec<SourceTmpfs>,
    /// What the descriptors 0, 1 and 2 of its first process were at its start (`pipe:[1234]`, `/dev/null`).
    #[serde(default)]
    pub descriptors: Vec<String>,
    /// Files that some process maps shared and writable, as [`Frozen::mapped_writable`]: one that is unmapped before
    /// the freeze may have been written to after the live pass without a trace all the same.
    pub mapped_writable: Vec<MappedFile>,
}

/// A directory or file of the container on the source host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceRoot {
    /// What it is: `layer`, `log`, `images` or `volume:<name>`. The same on both hosts.
    pub root: String,
    /// Where it is on the source host.
    pub path: String,
}

/// A tmpfs of the container on the source host, seen by its processes only.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceTmpfs {
    /// Where it is in the container.
    pub at: String,
    /// A process that sees it there, on the source host: the container's first one.
    pub process: i32,
    /// Which file system it is there, as `major:minor`.
    pub device: String,
    /// Its options as the kernel shows them, such as `rw,size=65536k`.
    pub options: String,
    /// What its files take up.
    pub used: Bytes,
}

impl SourceTmpfs {
    /// What it is called between the hosts, as [`SourceRoot::root`].
    #[must_use]
    pub fn root(&self) -> String {
        format!("tmpfs:{}", self.at)
    }
}

/// Lets the container have only a share of the processor time that it used until now, so that it writes less memory.
/// What its limit was is written down before. Asked again, the share is of the same amount.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Throttle {
    /// The container.
    pub container: ContainerId,
    /// The share that it keeps, in percent.
    pub keep: u8,
}

/// The answer to [`Throttle`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Throttled {}

/// Gives the container the limit back that it had before [`Throttle`]. Harmless when it was not throttled, or is gone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unthrottle {
    /// The container.
    pub container: ContainerId,
}

/// The answer to [`Unthrottle`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unthrottled {}

/// Everything of a [`Freeze`] that changes nothing, while the container runs on: it then has less time to write before it
/// stands still. [`RollBack`] drops it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PrepareFreeze {
    /// What will be asked.
    pub freeze: Freeze,
}

/// The answer to [`PrepareFreeze`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FreezePrepared {}

/// Freezes the container's cgroup. Afterwards every task of it stands still; on a fault it runs as before.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Freeze {
    /// The container.
    pub container: ContainerId,
    /// What it was ([`Inspected::spec`]). It is refused, untouched, when it is something else by now, such as after
    /// `docker update` or `docker network connect`: the target was made from this.
    #[serde(default)]
    pub spec: Option<Value>,
    /// That of the [`Dump`] which follows, for which CRIU is started before the freeze.
    #[serde(default)]
    pub network: Network,
}

/// The answer to [`Freeze`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Frozen {
    /// The time of the freeze on the source host's clock, since the Unix epoch.
    pub at: Micros,
    /// How long freezing took, retries for exec sessions included.
    pub took: Micros,
    /// The number of processes that were frozen.
    pub processes: u32,
    /// Files that some process maps shared and writable: their content can change without a change of their
    /// times, so the last file pass sends them whatever their times say.
    pub mapped_writable: Vec<MappedFile>,
}

/// A file of the container, by what carries it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct MappedFile {
    /// As [`SourceRoot::root`].
    pub root: String,
    /// Its path below that, without a leading slash.
    pub path: String,
}

/// Dumps all but the tracked memory of the frozen container, and holds it: tasks stopped, connections locked.
/// On a fault the container is still frozen and can be rolled back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dump {
    /// The container.
    pub container: ContainerId,
    /// How its network comes into being on the target.
    pub network: Network,
    /// The tmpfs mounts whose files the files service carries. What they are must not have changed.
    #[serde(default)]
    pub tmpfs: Vec<SourceTmpfs>,
}

/// How a container's network comes into being on the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Network {
    /// While the container is restored.
    #[default]
    AtRestore,
    /// It is made before.
    Made,
}

/// The answer to [`Dump`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dumped {
    /// The directory of the CRIU images on the source host.
    pub images: String,
    /// Their size.
    pub bytes: Bytes,
    /// How long the dump took.
    pub took: Micros,
}

/// Asks whether the hold of [`Dump`] still stands: a fault `hold_lost` when it does not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Confirm {}

/// The answer to [`Confirm`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Confirmed {}

/// Ends the container on the source for good: its processes are killed, it is removed with its moved volumes.
/// Only after the commit was recorded. A fault leaves it frozen or dead, never running; ask again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Commit {
    /// The container.
    pub container: ContainerId,
}

/// The answer to [`Commit`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Committed {}

/// Undoes whatever this service did to the container: it runs on, connections and all. Drops what was made ready
/// ([`PrepareFreeze`]). Harmless when nothing had been done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RollBack {
    /// The container.
    pub container: ContainerId,
}

/// The answer to [`RollBack`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RolledBack {
    /// The time of the thaw on the source host's clock, if it had been frozen.
    pub thawed_at: Option<Micros>,
}

rpc!(Locate, Checkpointer, "locate", Located);
rpc!(Inspect, Checkpointer, "inspect", Inspected);
rpc!(Throttle, Checkpointer, "throttle", Throttled);
rpc!(Unthrottle, Checkpointer, "unthrottle", Unthrottled);
rpc!(PrepareFreeze, Checkpointer, "prepare-freeze", FreezePrepared);
rpc!(Freeze, Checkpointer, "freeze", Frozen);
rpc!(Dump, Checkpointer, "dump", Dumped);
rpc!(Confirm, Checkpointer, "confirm", Confirmed);
rpc!(Commit, Checkpointer, "commit", Committed);
rpc!(RollBack, Checkpointer, "roll-back", RolledBack);
