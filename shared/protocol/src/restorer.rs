//! Requests to the restorer: a container that arrives on its host.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::checkpointer::{Inspected, Network, rpc};
use crate::id::ContainerId;
use crate::rpc::{Rpc, Service};
use crate::syncer::TargetRoot;
use crate::unit::{Bytes, Micros, Pages};

/// Can this host take the container? Refuses with a code and a remedy. Changes nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// The container (`Inspected::spec`).
    pub spec: Value,
    /// The source host (`Inspected::host`).
    pub source: Value,
    /// The image's content id.
    pub image: String,
    /// Memory in use on the source, by processes and in tmpfs mounts.
    pub memory: Bytes,
    /// What the writable layer and the volumes take up on disk.
    pub disk: Bytes,
    /// The size of the image's layers, which need room where the image is missing.
    pub image_size: Bytes,
}

impl From<&Inspected> for Check {
    fn from(inspected: &Inspected) -> Self {
        Self {
            spec: inspected.spec.clone(),
            source: inspected.host.clone(),
            image: inspected.image.clone(),
            memory: inspected.memory + inspected.tmpfs.iter().map(|tmpfs| tmpfs.used).sum(),
            disk: inspected.disk,
            image_size: inspected.image_size,
        }
    }
}

/// The answer to [`Check`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checked {
    /// The engine has the image already.
    pub image_present: bool,
}

/// Creates the container, not started: same name and configuration, restart policy `no` until adopted. On a
/// fault nothing is left of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Create {
    /// The container (`Inspected::spec`).
    pub spec: Value,
    /// Its memory (`Inspected::memory`), for which there must be room too.
    #[serde(default)]
    pub memory: Bytes,
    /// What CRIU's images of it may come to (`Inspected::images`).
    #[serde(default)]
    pub images: Option<Bytes>,
}

/// The answer to [`Create`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Created {
    /// Its id on the target.
    pub container: ContainerId,
    /// Where the files service puts what it carries over, the directory of the CRIU images included.
    pub roots: Vec<TargetRoot>,
}

/// Starts the container as far as it can be without its state: its root file system is mounted, its network made, and
/// the runtime waits for [`Restore`]. Nothing of it runs or answers. The source may go on meanwhile, files included.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prepare {
    /// The container on the target.
    pub container: ContainerId,
    /// The page store (`PagesOpened::store`), not sealed yet.
    pub store: String,
    /// What the standard streams of its first process were at its start (`Inspected::descriptors`).
    pub descriptors: Vec<String>,
}

/// The answer to [`Prepare`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prepared {
    /// What the dump must say of the network.
    pub network: Network,
    /// How long it took.
    pub took: Micros,
}

/// The container stands still on its source, and is silent there: its packets shall come here, and are kept until it runs.
/// Does nothing where its network is made with the restore. Its address goes on to be the source's if this is undone, or
/// if nothing follows for 10 s.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TakePackets {
    /// The container on the target.
    pub container: ContainerId,
}

/// The answer to [`TakePackets`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PacketsTaken {}

/// Joins pages and images and brings the container to life. On a fault it does not run here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Restore {
    /// The container on the target.
    pub container: ContainerId,
    /// The sealed page store (`PagesOpened::store`).
    pub store: String,
    /// The tmpfs mounts that the files service has filled (`FilesOpened::tmpfs`), in the order of `Dump::tmpfs`.
    #[serde(default)]
    pub tmpfs: Vec<TargetRoot>,
}

/// The answer to [`Restore`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Restored {
    /// When the container ran, on the target host's clock, since the Unix epoch.
    pub at: Micros,
    /// Joining pages and images.
    pub merge: Micros,
    /// From the word to the runtime until the container ran and its address was announced, CRIU's restore included.
    pub start: Micros,
    /// How long it had run when this was answered.
    pub since: Micros,
}

/// Waits until the container has all its memory. Is it running? Answers `memory_incomplete` after some seconds while
/// something is missing, and is to be asked again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verify {
    /// The container on the target.
    pub container: ContainerId,
}

/// The answer to [`Verify`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verified {
    /// Its first process on the target host.
    pub pid: i32,
    /// How it got its memory.
    pub filled: Filled,
}

/// How a container that ran before it had its memory got it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Filled {
    /// From its first instruction to the last page in place.
    pub took: Micros,
    /// Pages that a thread waited for.
    pub faults: Pages,
    /// Pages put in place for those, their neighbours included.
    pub on_demand: Pages,
    /// Pages put in place in the background.
    pub in_background: Pages,
    /// Pages that the source had owed at the freeze and sent because they were asked for.
    #[serde(default)]
    pub pulled: Pages,
    /// Pages that the source had owed at the freeze and sent unasked.
    #[serde(default)]
    pub pushed: Pages,
}

/// After the commit: gives the container its true restart policy and removes what the migration needed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Adopt {
    /// The container on the target.
    pub container: ContainerId,
}

/// The answer to [`Adopt`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Adopted {}

/// Undoes whatever this service made for the migration: container, volumes that it created, armed state, images.
/// When it has succeeded the container does not run here and cannot start to. Harmless when there is nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Undo {}

/// The answer to [`Undo`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Undone {}

rpc!(Check, Restorer, "check", Checked);
rpc!(Create, Restorer, "create", Created);
rpc!(Prepare, Restorer, "prepare", Prepared);
rpc!(TakePackets, Restorer, "take_packets", PacketsTaken);
rpc!(Restore, Restorer, "restore", Restored);
rpc!(Verify, Restorer, "verify", Verified);
rpc!(Adopt, Restorer, "adopt", Adopted);
rpc!(Undo, Restorer, "undo", Undone);
