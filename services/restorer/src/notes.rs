//! What was made on this host for a migration, written down before it is made.

use std::fs;
use std::io::{self, ErrorKind, Write};
use std::path::Path;

use haulage_engine::ContainerSpec;
use haulage_protocol::id::MigrationId;
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
}

/// The name of a container that is not complete: nobody else's, so that undo never removes a stranger.
pub(crate) fn working_name(migration: &MigrationId) -> String {
    format!("haul-incoming-{migration}")
}

impl Notes {
    /// Writes them so that a crash leaves the old or the new ones.
    pub(crate) fn write(&self, dir: &Path) -> io::Result<()> {
        fs::create_dir_all(dir)?;
        let (path, new) = (dir.join(FILE), dir.join("target.json.new"));
        let mut file = fs::File::create(&new)?;
        file.write_all(&serde_json::to_vec(self)?)?;
        file.sync_all()?;
        fs::rename(new, path)
    }

    /// Reads them; `None` when there are none.
    pub(crate) fn read(dir: &Path) -> io::Result<Option<Self>> {
        match fs::read(dir.join(FILE)) {
            Ok(raw) => Ok(Some(serde_json::from_slice(&raw)?)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Removes them and everything else that this service keeps of the migration.
    pub(crate) fn remove(dir: &Path) -> io::Result<()> {
        let gone = |result: io::Result<()>| match result {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            other => other,
        };
        for part in [crate::IMAGES, crate::COMPLETE, crate::WORK] {
            gone(fs::remove_dir_all(dir.join(part)))?;
        }
        gone(fs::remove_file(dir.join(FILE)))?;
        // Other services of the host may still have their part in it.
        match fs::remove_dir(dir) {
            Err(error)
                if error.kind() != ErrorKind::NotFound && error.kind() != ErrorKind::DirectoryNotEmpty =>
            {
                Err(error)
            }
            _ => Ok(()),
        }
    }
}
