//! What a tree holds, as seen at one time.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use crate::path::RelPath;

/// A time of the file system: nanoseconds since 1970, UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Time {
    /// Whole seconds, before 1970 negative.
    pub seconds: i64,
    /// Nanoseconds on top, below 10⁹.
    pub nanos: u32,
}

impl Time {
    /// Now, by the clock that file systems take their times from.
    pub fn now() -> Self {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Self { seconds: now.as_secs() as i64, nanos: now.subsec_nanos() }
    }

    /// This time, earlier by `by`.
    pub fn before(self, by: Duration) -> Self {
        let nanos = self.total_nanos() - by.as_nanos() as i128;
        Self {
            seconds: nanos.div_euclid(1_000_000_000) as i64,
            nanos: nanos.rem_euclid(1_000_000_000) as u32,
        }
    }

    pub(crate) fn total_nanos(self) -> i128 {
        i128::from(self.seconds) * 1_000_000_000 + i128::from(self.nanos)
    }
}

/// One extended attribute.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Xattr {
    /// With its namespace, such as `security.capability`.
    pub name: Vec<u8>,
    /// As the kernel gives it.
    pub value: Vec<u8>,
}

/// What every kind of entry has and what is copied of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Meta {
    /// Permissions with set-id and sticky bits: 0 to 0o7777.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// When the content was last changed.
    pub mtime: Time,
    /// Sorted by name; without those that belong to the host.
    pub xattrs: Vec<Xattr>,
}

/// What an entry is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// A directory.
    Directory,
    /// A regular file.
    File {
        /// Bytes, holes included.
        size: u64,
    },
    /// A symbolic link.
    Symlink {
        /// Where it points, taken as it is.
        target: Vec<u8>,
    },
    /// A character device; 0:0 in an upper directory is a whiteout.
    CharDevice {
        /// Its driver.
        major: u32,
        /// Its instance.
        minor: u32,
    },
    /// A block device.
    BlockDevice {
        /// Its driver.
        major: u32,
        /// Its instance.
        minor: u32,
    },
    /// A named pipe.
    Fifo,
    /// A socket's name. No one listens behind the copy.
    Socket,
}

impl Kind {
    /// Whether it says that a lower layer's entry of this name is gone.
    pub fn is_whiteout(&self) -> bool {
        matches!(self, Self::CharDevice { major: 0, minor: 0 })
    }
}

/// One entry of a tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// What it is.
    pub kind: Kind,
    /// What is copied besides its content.
    pub meta: Meta,
    /// Which inode of the source it is.
    pub ino: u64,
    /// How many names that inode has, in the tree and elsewhere.
    pub links: u64,
    /// When anything about it was last changed; set by the kernel alone.
    pub ctime: Time,
}

/// A tree as a scan saw it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Taken before the scan began.
    pub started: Time,
    /// By path; directories before what is in them.
    pub entries: BTreeMap<RelPath, Entry>,
    /// Directories on which another file system is mounted: taken as empty ones.
    pub mounts: Vec<RelPath>,
}
