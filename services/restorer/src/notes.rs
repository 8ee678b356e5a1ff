//! What was made on this host for a migration, written down before it is made.

use std::io;
use std::path::Path;

use haulage_engine::ContainerSpec;
use haulage_protocol::fault::Fault;
use haulage_protocol::id::MigrationId;
use haulage_service::notes;
use haulage_service::scratch::Scratch;
use serde::{Deserialize, Serialize};

use crate::failure::{STATE, blocking, fault};

const FILE: &str = "target.json";

/// Enough to remove everything again.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Notes {
    /// The container as it was on the source.
    pub(crate) spec: ContainerSpec,
    /// Its id here, once it is created. Until it is noted the container has [`working_name`].
    pub(crate) container: Option<String>,
    /// Named volumes that were made here, and did not exist before.
    pub(crate) volumes: Vec<String>,
    /// The runtime was armed: from here on the engine may have restored it, whatever became of this service.
    #[serde(default)]
    pub(crate) armed: bool,
    /// `arp_ignore` of its network namespace, once it was silenced.
    #[serde(default)]
    pub(crate) arp_ignore: Option<String>,
}

/// The name of a container that is not complete: nobody else's, so that undo never removes a stranger.
pub(crate) fn working_name(migration: &MigrationId) -> String {
    format!("haul-incoming-{migration}")
}

impl Notes {
    /// Nothing is made yet.
    pub(crate) fn of(spec: ContainerSpec) -> Self {
        Self { spec, container: None, volumes: Vec::new(), armed: false, arp_ignore: None }
    }

    /// Of every migration that has left some here.
    pub(crate) fn all(state_dir: &Path) -> io::Result<Vec<(MigrationId, Self)>> {
        let migrations = match std::fs::read_dir(state_dir.join("migrations")) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            migrations => migrations?,
        };
        let mut all = Vec::new();
        for migration in migrations {
            let migration = migration?;
            // Directories of other names are nobody's migrations.
            let Some(id) = migration.file_name().to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            all.extend(Self::read(&migration.path())?.map(|notes| (id, notes)));
        }
        Ok(all)
    }

    pub(crate) fn write(&self, dir: &Path) -> io::Result<()> {
        notes::write(&dir.join(FILE), self)
    }

    pub(crate) fn read(dir: &Path) -> io::Result<Option<Self>> {
        notes::read(&dir.join(FILE))
    }

    /// As [`Notes::read`], off the executor.
    pub(crate) async fn load(dir: &Path) -> Result<Option<Self>, Fault> {
        let dir = dir.to_owned();
        blocking(move || Self::read(&dir).map_err(fault(STATE))).await
    }

    /// As [`Notes::write`], off the executor.
    pub(crate) async fn store(&self, dir: &Path) -> Result<(), Fault> {
        let (notes, dir) = (self.clone(), dir.to_owned());
        blocking(move || notes.write(&dir).map_err(fault(STATE))).await
    }

    /// As [`Notes::remove`], off the executor.
    pub(crate) async fn forget(self, scratch: Scratch) -> Result<(), Fault> {
        blocking(move || self.remove(&scratch).map_err(fault(STATE))).await
    }

    /// Removes them and everything else that this service keeps of the migration.
    fn remove(&self, scratch: &Scratch) -> io::Result<()> {
        scratch.remove(&[crate::IMAGES, crate::COMPLETE, crate::WORK, FILE])
    }
}
