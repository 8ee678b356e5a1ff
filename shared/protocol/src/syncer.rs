//! Requests to the syncer: the files of a container, on the source and on the target host.

use serde::{Deserialize, Serialize};

use crate::checkpointer::{MappedFile, SourceTmpfs, rpc};
use crate::rpc::{Rpc, Service};
use crate::secret::Token;
use crate::transfer::Rate;
use crate::unit::{Bytes, Micros};

/// Source role: puts the image into the bucket, layer by layer, what it already has excepted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PushImage {
    /// The image's content id (`sha256:…`).
    pub image: String,
}

/// The answer to [`PushImage`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImagePushed {
    /// Bytes that had to be put.
    pub put: Bytes,
    /// Bytes that the bucket had already.
    pub present: Bytes,
    /// How long it took.
    pub took: Micros,
}

/// Target role: loads the image from the bucket into the engine and checks that its id is the same.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PullImage {
    /// The image's content id (`sha256:…`).
    pub image: String,
}

/// The answer to [`PullImage`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImagePulled {
    /// Bytes read from the bucket; zero when the engine had the image.
    pub read: Bytes,
    /// How long it took.
    pub took: Micros,
}

/// Target role: lets one source in, to write under these directories and nowhere else.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenFiles {
    /// What the source must present.
    pub token: Token,
    /// Where each root goes.
    pub roots: Vec<TargetRoot>,
    /// The tmpfs mounts to make.
    #[serde(default)]
    pub tmpfs: Vec<SourceTmpfs>,
}

/// A directory or file of the container on the target host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TargetRoot {
    /// What it is: `layer`, `log`, `images`, `volume:<name>` or `tmpfs:<path in the container>`. The same on both hosts.
    pub root: String,
    /// Where it is on the target host.
    pub path: String,
}

/// The answer to [`OpenFiles`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FilesOpened {
    /// Where the source connects to: `address:port`.
    pub address: String,
    /// The tmpfs mounts that were made, in the order of the request. They are mounted nowhere: their paths are those of
    /// descriptors of the files service (`/proc/<pid>/fd/<descriptor>`), and they are gone when it closes the session or
    /// dies, unless somebody has mounted them.
    #[serde(default)]
    pub tmpfs: Vec<TargetRoot>,
}

/// Source role: carries these roots over. The first pass of a root sends all of it, a later one what changed.
/// Returns when the target has applied it. A fault leaves the target's copy incomplete: the whole is undone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SyncFiles {
    /// The target's bulk address.
    pub address: String,
    /// The target's token.
    pub token: Token,
    /// What to carry over.
    pub roots: Vec<SyncRoot>,
    /// The container is frozen: nothing changes any more.
    pub frozen: bool,
    /// Files to send whatever their times say (`Frozen::mapped_writable`).
    #[serde(default)]
    pub forced: Vec<MappedFile>,
    /// What pages and files together may take of the link.
    #[serde(default)]
    pub bandwidth: Option<Rate>,
}

/// A directory or file of the container, on both hosts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SyncRoot {
    /// What it is: `layer`, `log`, `images`, `volume:<name>`, `volume-at:<path in the container>` or
    /// `tmpfs:<path in the container>`.
    pub root: String,
    /// Where it is on the source host.
    pub source: String,
    /// Where it goes on the target host; a log file has another name there.
    pub target: String,
    /// It is this tmpfs, which has no place of its own on the source host. All its files are compared when the container
    /// is frozen, since what is written to mapped ones leaves no trace in their times.
    #[serde(default)]
    pub tmpfs: Option<SourceTmpfs>,
}

/// The answer to [`SyncFiles`], and what the record keeps of a pass.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FilesSynced {
    /// Entries looked at.
    pub entries: u64,
    /// Entries sent: files, directories, links, changes of ownership and so on.
    pub sent: u64,
    /// Entries deleted on the target.
    pub deleted: u64,
    /// Bytes on the wire, headers included.
    pub wire: Bytes,
    /// How long it took.
    pub took: Micros,
}

/// Target role: waits until everything below these roots is on disk. After the commit, before the source is removed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PersistFiles {
    /// The roots, as they were opened.
    pub roots: Vec<TargetRoot>,
}

/// The answer to [`PersistFiles`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FilesPersisted {}

/// Either role: ends the session and forgets its snapshots. Harmless when there is none.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CloseFiles {}

/// The answer to [`CloseFiles`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FilesClosed {}

rpc!(PushImage, Syncer, "push-image", ImagePushed);
rpc!(PullImage, Syncer, "pull-image", ImagePulled);
rpc!(OpenFiles, Syncer, "open", FilesOpened);
rpc!(SyncFiles, Syncer, "sync", FilesSynced);
rpc!(PersistFiles, Syncer, "persist", FilesPersisted);
rpc!(CloseFiles, Syncer, "close", FilesClosed);
