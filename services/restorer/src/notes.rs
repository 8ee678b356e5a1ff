//! What was made on this host for a migration, written down before it is made.

use std::io;
use std::path::{Path, PathBuf};

use haulage_engine::ContainerSpec;
use haulage_protocol::id::MigrationId;
use haulage_service::notes;
use serde::{Deserialize, Serialize};

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
    /// Where images and pages are joined, once they are: beside the page store.
    pub(crate) complete: Option<PathBuf>,
    /// The runtime was armed: from here on the engine may have restored it, whatever became of this service.
    #[serde(default)]
    pub(crate) armed: bool,
}

/// The name of a container that is not complete: nobody else's, so that undo never removes a stranger.
pub(crate) fn working_name(migration: &MigrationId) -> String {
    format!("haul-incoming-{migration}")
}

impl Notes {
    pub(crate) fn write(&self, dir: &Path) -> io::Result<()> {
        notes::write(&dir.join(FILE), self)
    }

    pub(crate) fn read(dir: &Path) -> io::Result<Option<Self>> {
        notes::read(&dir.join(FILE))
    }

    /// Removes them and everything else that this service keeps of the migration.
    pub(crate) fn remove(&self, dir: &Path) -> io::Result<()> {
        if let Some(complete) = &self.complete
            && let (Some(parent), Some(name)) =
                (complete.parent(), complete.file_name().and_then(|n| n.to_str()))
        {
            notes::remove(parent, &[name])?;
        }
        notes::remove(dir, &[crate::IMAGES, crate::WORK, FILE])
    }
}
