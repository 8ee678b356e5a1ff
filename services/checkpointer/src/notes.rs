//! What was changed on this host for a migration, written down before it is changed.

use std::fs;
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};

use haulage_engine::RestartPolicy;
use haulage_protocol::id::ContainerId;
use serde::{Deserialize, Serialize};

const FILE: &str = "source.json";

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
    /// Named volumes that leave with the container.
    pub(crate) volumes: Vec<String>,
}

impl Notes {
    /// Writes them so that a crash leaves the old or the new ones.
    pub(crate) fn write(&self, dir: &Path) -> io::Result<()> {
        fs::create_dir_all(dir)?;
        let (path, new) = (dir.join(FILE), dir.join("source.json.new"));
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
        gone(fs::remove_dir_all(dir.join("dump")))?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_survive_a_restart_and_go_without_a_trace() {
        let parent = std::env::temp_dir().join(format!("haul-notes-{}", std::process::id()));
        let dir = parent.join("m");
        let notes = Notes {
            container: "c0ffee".parse().unwrap(),
            init: 7,
            freezer: "/f".into(),
            procs: "/f/cgroup.procs".into(),
            restart_policy: RestartPolicy::never(),
            arp_ignore: Some("0".into()),
            volumes: vec!["data".into()],
        };
        assert_eq!(Notes::read(&dir).unwrap(), None);
        notes.write(&dir).unwrap();
        assert_eq!(Notes::read(&dir).unwrap(), Some(notes));
        fs::create_dir(dir.join("dump")).unwrap();
        Notes::remove(&dir).unwrap();
        assert!(!dir.exists());
        Notes::remove(&dir).unwrap();
        fs::remove_dir(parent).unwrap();
    }
}
