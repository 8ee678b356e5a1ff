//! The freezer of a control group, version 1 (`freezer.state`) and version 2 (`cgroup.freeze`).
//!
//! Both freeze a whole subtree. Plain file IO, no daemon is asked.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Time between two looks at whether the group is frozen by now. A freeze mostly takes 0.2 ms.
const LOOK_EVERY: Duration = Duration::from_micros(100);
/// How often a version 1 group is told again to freeze: a task that forked at the wrong moment is otherwise missed.
const TELL_EVERY: Duration = Duration::from_millis(5);

/// A control group that can be frozen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Freezer {
    dir: PathBuf,
    version: Version,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    V1,
    V2,
}

/// What a group is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FreezerState {
    /// Its tasks run.
    Thawed,
    /// Some tasks have not stopped yet.
    Freezing,
    /// Every task is stopped.
    Frozen,
}

/// Why a group could not be frozen, thawed or asked.
#[derive(Debug, thiserror::Error)]
pub enum FreezerError {
    /// The directory is not a control group with a freezer.
    #[error("{} is not a control group with a freezer", dir.display())]
    NotAFreezer {
        /// The directory.
        dir: PathBuf,
    },
    /// Tasks still ran at the deadline. The group was thawed again.
    #[error("tasks still ran after {waited:?}")]
    TimedOut {
        /// How long was waited.
        waited: Duration,
    },
    /// A file of the group could not be read or written.
    #[error("access to {} failed", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What happened.
        #[source]
        source: io::Error,
    },
    /// A file of the group says what no kernel says.
    #[error("{} holds {text:?}", path.display())]
    Unexpected {
        /// The file.
        path: PathBuf,
        /// What it holds.
        text: String,
    },
}

impl Freezer {
    /// The freezer of the control group whose directory is `dir`.
    ///
    /// # Errors
    /// [`FreezerError::NotAFreezer`] for any other directory, and for a root group, which cannot be frozen.
    pub fn open(dir: &Path) -> Result<Self, FreezerError> {
        let version = if dir.join("freezer.state").exists() {
            Version::V1
        } else if dir.join("cgroup.freeze").exists() {
            Version::V2
        } else {
            return Err(FreezerError::NotAFreezer { dir: dir.to_owned() });
        };
        Ok(Self { dir: dir.to_owned(), version })
    }

    /// The group's directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Freezes the group and waits until every task is stopped, at most `patience`. Returns how long it took.
    ///
    /// # Errors
    /// Whatever happens half-way, the group is told to thaw again before this returns an error.
    pub fn freeze(&self, patience: Duration) -> Result<Duration, FreezerError> {
        let frozen = self.freeze_and_wait(patience);
        if frozen.is_err() {
            // The first error is the one to tell; if thawing fails too, the group's directory is gone.
            let _already_failing = self.thaw();
        }
        frozen
    }

    fn freeze_and_wait(&self, patience: Duration) -> Result<Duration, FreezerError> {
        let started = Instant::now();
        let mut told = started;
        self.tell(true)?;
        loop {
            if self.state()? == FreezerState::Frozen {
                return Ok(started.elapsed());
            }
            if started.elapsed() >= patience {
                return Err(FreezerError::TimedOut { waited: started.elapsed() });
            }
            if self.version == Version::V1 && told.elapsed() >= TELL_EVERY {
                told = Instant::now();
                self.tell(true)?;
            }
            std::thread::sleep(LOOK_EVERY);
        }
    }

    /// Lets the group run. Thawing a running group does nothing.
    ///
    /// # Errors
    /// When the group is gone; its tasks are, then, too.
    pub fn thaw(&self) -> Result<(), FreezerError> {
        self.tell(false)
    }

    /// What the group is doing, frozen by itself or by a group above it.
    ///
    /// # Errors
    /// When the group is gone.
    pub fn state(&self) -> Result<FreezerState, FreezerError> {
        match self.version {
            Version::V1 => {
                let (path, text) = self.read("freezer.state")?;
                match text.trim() {
                    "THAWED" => Ok(FreezerState::Thawed),
                    "FREEZING" => Ok(FreezerState::Freezing),
                    "FROZEN" => Ok(FreezerState::Frozen),
                    _ => Err(FreezerError::Unexpected { path, text }),
                }
            }
            Version::V2 => {
                let (path, text) = self.read("cgroup.events")?;
                match text.lines().find_map(|line| line.strip_prefix("frozen ")) {
                    Some("1") => Ok(FreezerState::Frozen),
                    Some("0") => {
                        let (_, asked) = self.read("cgroup.freeze")?;
                        Ok(if asked.trim() == "1" { FreezerState::Freezing } else { FreezerState::Thawed })
                    }
                    _ => Err(FreezerError::Unexpected { path, text }),
                }
            }
        }
    }

    fn tell(&self, freeze: bool) -> Result<(), FreezerError> {
        let (name, word) = match (self.version, freeze) {
            (Version::V1, true) => ("freezer.state", "FROZEN"),
            (Version::V1, false) => ("freezer.state", "THAWED"),
            (Version::V2, true) => ("cgroup.freeze", "1"),
            (Version::V2, false) => ("cgroup.freeze", "0"),
        };
        let path = self.dir.join(name);
        fs::OpenOptions::new()
            .write(true)
            .open(&path)
            .and_then(|mut file| io::Write::write_all(&mut file, word.as_bytes()))
            .map_err(|source| FreezerError::Io { path, source })
    }

    fn read(&self, name: &str) -> Result<(PathBuf, String), FreezerError> {
        let path = self.dir.join(name);
        match fs::read_to_string(&path) {
            Ok(text) => Ok((path, text)),
            Err(source) => Err(FreezerError::Io { path, source }),
        }
    }
}

/// Where groups are: version 1's freezer, and version 2.
const FREEZER: &str = "/sys/fs/cgroup/freezer";
const UNIFIED: &str = "/sys/fs/cgroup";

/// The directory of the group that freezes `process`, a number or `self`.
///
/// # Errors
/// When the process is gone, or in no such group.
pub fn dir_of(process: &str) -> io::Result<PathBuf> {
    let text = fs::read_to_string(format!("/proc/{process}/cgroup"))?;
    place(&text, Path::new(FREEZER).is_dir()).ok_or_else(|| io::Error::other("a process without a cgroup"))
}

fn place(cgroups: &str, has_freezer: bool) -> Option<PathBuf> {
    let mut lines = cgroups.lines().filter_map(|line| {
        let mut parts = line.splitn(3, ':').skip(1);
        Some((parts.next()?, parts.next()?))
    });
    let (root, path) = match has_freezer {
        true => (FREEZER, lines.find(|(names, _)| names.split(',').any(|name| name == "freezer"))?.1),
        false => (UNIFIED, lines.find(|(names, _)| names.is_empty())?.1),
    };
    Some(Path::new(root).join(path.trim_start_matches('/')))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command};

    /// A group of our own with one sleeping process in it; gone afterwards whatever happens.
    struct Group {
        dir: PathBuf,
        child: Child,
    }

    impl Group {
        /// In each hierarchy of this machine that has a freezer.
        fn all(name: &str) -> Vec<Self> {
            ["/sys/fs/cgroup/freezer", "/sys/fs/cgroup/unified", "/sys/fs/cgroup"]
                .iter()
                .filter_map(|root| {
                    let dir = Path::new(root).join(format!("haul-sys-{name}-{}", std::process::id()));
                    fs::create_dir(&dir).ok()?;
                    if Freezer::open(&dir).is_err() {
                        let _unused = fs::remove_dir(&dir);
                        return None;
                    }
                    let child = Command::new("sleep").arg("600").spawn().unwrap();
                    fs::write(dir.join("cgroup.procs"), child.id().to_string()).unwrap();
                    Some(Self { dir, child })
                })
                .collect()
        }
    }

    impl Drop for Group {
        fn drop(&mut self) {
            if let Ok(freezer) = Freezer::open(&self.dir) {
                freezer.thaw().ok();
            }
            self.child.kill().ok();
            self.child.wait().ok();
            let deadline = Instant::now() + Duration::from_secs(5);
            while fs::remove_dir(&self.dir).is_err() && Instant::now() < deadline {
                std::thread::sleep(LOOK_EVERY);
            }
        }
    }

    #[test]
    fn groups_are_version_1_s_where_it_freezes() {
        let text = "9:name=systemd:/a\n6:freezer:/docker/b:c\n3:cpu,cpuacct:/d\n0::/e\n";
        assert_eq!(place(text, true).unwrap(), Path::new("/sys/fs/cgroup/freezer/docker/b:c"));
        assert_eq!(place(text, false).unwrap(), Path::new("/sys/fs/cgroup/e"));
        assert_eq!(place("0::/\n", false).unwrap(), Path::new("/sys/fs/cgroup"));
        assert_eq!(place("0::/\n", true), None);
    }

    #[test]
    fn a_group_freezes_and_thaws() {
        let groups = Group::all("freeze");
        assert!(!groups.is_empty(), "this machine has no freezer at all");
        for group in groups {
            let freezer = Freezer::open(&group.dir).unwrap();
            assert_eq!(freezer.state().unwrap(), FreezerState::Thawed);
            freezer.freeze(Duration::from_secs(5)).unwrap();
            assert_eq!(freezer.state().unwrap(), FreezerState::Frozen);
            freezer.thaw().unwrap();
            assert_eq!(freezer.state().unwrap(), FreezerState::Thawed);
            freezer.thaw().unwrap();
        }
    }

    #[test]
    fn a_plain_directory_is_no_freezer() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(Freezer::open(dir.path()), Err(FreezerError::NotAFreezer { .. })));
    }

    #[test]
    fn a_group_that_never_freezes_is_thawed_again() {
        // A directory that looks like a group of version 2 whose tasks never stop.
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("cgroup.freeze"), "0").unwrap();
        fs::write(dir.path().join("cgroup.events"), "populated 1\nfrozen 0\n").unwrap();
        let freezer = Freezer::open(dir.path()).unwrap();
        let error = freezer.freeze(Duration::from_millis(2)).unwrap_err();
        assert!(matches!(error, FreezerError::TimedOut { .. }));
        assert_eq!(fs::read_to_string(dir.path().join("cgroup.freeze")).unwrap(), "0");
    }
}
