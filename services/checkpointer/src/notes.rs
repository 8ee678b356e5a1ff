//! What was changed on this host for a migration, written down before it is changed.

use std::io;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use haulage_engine::RestartPolicy;
use haulage_protocol::fault::Fault;
use haulage_protocol::id::ContainerId;
use haulage_service::notes;
use haulage_service::scratch::Scratch;
use serde::{Deserialize, Serialize};

use crate::failure::{RELEASE, blocking, fault};

const FILE: &str = "source.json";
/// CRIU's images and logs.
pub(crate) const DUMP: &str = "dump";

/// Enough to put everything back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Notes {
    pub(crate) container: ContainerId,
    /// The container's first process when it was frozen.
    pub(crate) init: i32,
    pub(crate) freezer: PathBuf,
    /// Lists the processes of the container.
    pub(crate) procs: PathBuf,
    pub(crate) restart_policy: RestartPolicy,
    /// `arp_ignore` of the container's network namespace, once it was changed.
    pub(crate) arp_ignore: Option<String>,
    /// Ethernet and IPv4 addresses, to be announced again.
    pub(crate) addresses: Vec<(String, Ipv4Addr)>,
    /// Named volumes that leave with the container.
    pub(crate) volumes: Vec<String>,
}

impl Notes {
    pub(crate) fn write(&self, dir: &Path) -> io::Result<()> {
        notes::write(&dir.join(FILE), self)
    }

    pub(crate) fn read(dir: &Path) -> io::Result<Option<Self>> {
        notes::read(&dir.join(FILE))
    }

    /// As [`Notes::read`], off the executor.
    pub(crate) async fn load(dir: &Path) -> Result<Option<Self>, Fault> {
        let dir = dir.to_owned();
        blocking(move || Self::read(&dir).map_err(fault(RELEASE))).await
    }

    /// As [`Notes::remove`], off the executor.
    pub(crate) async fn forget(scratch: Scratch) -> Result<(), Fault> {
        blocking(move || Self::remove(&scratch).map_err(fault(RELEASE))).await
    }

    /// Removes them and everything else that this service keeps of the migration.
    fn remove(scratch: &Scratch) -> io::Result<()> {
        scratch.remove(&[DUMP, FILE])
    }
}
