//! Slowing a container down: its cgroup's quota of processor time, version 1 (`cpu.cfs_quota_us`) or 2 (`cpu.max`).
//!
//! What the quota was is written down before it is changed, and put back by [`unthrottle`], or when the service starts:
//! a container must not stay slow because its migration was forgotten. A quota that somebody else has set meanwhile stays.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use haulage_engine::{CgroupFacts, capture};
use haulage_protocol::checkpointer::{Throttle, Throttled, Unthrottle, Unthrottled};
use haulage_protocol::fault::{Fault, FaultCode, code};
use haulage_protocol::id::{ContainerId, MigrationId};
use haulage_service::config::HostConfig;
use haulage_service::{chain, notes};
use serde::{Deserialize, Serialize};

use crate::Checkpointer;
use crate::failure::{self, blocking, fault};
use crate::inspect::bundle;

const THROTTLE: FaultCode = FaultCode::known("throttle_failed");
const FILE: &str = "throttle.json";
/// How long is looked at what the container uses.
const SAMPLE: Duration = Duration::from_millis(200);
/// The kernel takes no smaller quota.
const LEAST_QUOTA: u64 = 1000;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Notes {
    container: ContainerId,
    /// The file with the quota, and what it held.
    file: PathBuf,
    before: String,
    /// What the container used in a period when it was not yet slowed down, in microseconds.
    used: u64,
    period: u64,
    /// What we have written to the file, from before it was; not known of an older version of this.
    #[serde(default)]
    written: Vec<String>,
}

pub(crate) async fn throttle(
    service: Arc<Checkpointer>,
    migration: MigrationId,
    ask: Throttle,
) -> Result<Throttled, Fault> {
    let captured = capture(&service.docker, ask.container.as_str()).await;
    let captured = captured.map_err(|error| failure::gather(&error))?;
    let dir = service.config.migration_dir(&migration);
    blocking(move || {
        let path = dir.join(FILE);
        let known = notes::read::<Notes>(&path).map_err(fault(THROTTLE))?;
        let mut notes = match known {
            Some(notes) if notes.container == ask.container => notes,
            Some(_) => return Err(Fault::new(code::MALFORMED, "the migration was of another container")),
            None => {
                let cgroup = bundle(&captured.spec.id, captured.state.pid)?.cgroup;
                Notes::of(ask.container, &cgroup).map_err(fault(THROTTLE))?
            }
        };
        notes.keep(ask.keep, &path).map_err(fault(THROTTLE))?;
        Ok(Throttled {})
    })
    .await
}

pub(crate) async fn unthrottle(
    service: Arc<Checkpointer>,
    migration: MigrationId,
    ask: Unthrottle,
) -> Result<Unthrottled, Fault> {
    let dir = service.config.migration_dir(&migration);
    blocking(move || {
        let notes = notes::read::<Notes>(&dir.join(FILE)).map_err(fault(THROTTLE))?;
        if notes.is_some_and(|notes| notes.container != ask.container) {
            return Err(Fault::new(code::MALFORMED, "the migration was of another container"));
        }
        end(&dir).map_err(fault(THROTTLE))?;
        Ok(Unthrottled {})
    })
    .await
}

/// Ends every throttling of an earlier life of the service.
pub(crate) fn end_all(config: &HostConfig) {
    for dir in config.migration_dirs() {
        if let Err(error) = end(&dir) {
            tracing::error!(dir = %dir.display(), error = %chain(&error), "a container may still be slowed down");
        }
    }
}

/// Puts the quota back and forgets it. Harmless when there is nothing to put back, or nobody to give it to.
fn end(dir: &Path) -> io::Result<()> {
    let Some(notes) = notes::read::<Notes>(&dir.join(FILE))? else { return Ok(()) };
    match notes.put_back() {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => notes::remove(dir, &[FILE]),
    }
}

impl Notes {
    /// Looks at a container that is not slowed down yet. Changes nothing.
    fn of(container: ContainerId, cgroup: &CgroupFacts) -> io::Result<Self> {
        let no_cgroup = || io::Error::other("the container has no cgroup for processor time");
        let (file, usage) = match (cgroup.paths.get("cpu"), cgroup.paths.get("cpuacct")) {
            (Some(cpu), Some(usage)) if cpu.join("cpu.cfs_quota_us").exists() => {
                (cpu.join("cpu.cfs_quota_us"), usage.join("cpuacct.usage"))
            }
            _ => {
                let unified = cgroup.paths.get("").ok_or_else(no_cgroup)?;
                (unified.join("cpu.max"), unified.join("cpu.stat"))
            }
        };
        let before = fs::read_to_string(&file)?.trim().to_owned();
        let period = match before.split_once(' ') {
            Some((_, period)) => number(period)?,
            None => number(&fs::read_to_string(file.with_file_name("cpu.cfs_period_us"))?)?,
        };
        let (began, first) = (Instant::now(), used(&usage)?);
        std::thread::sleep(SAMPLE);
        let used = used(&usage)?.saturating_sub(first);
        let elapsed = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX).max(1);
        let used = used.saturating_mul(period) / elapsed;
        Ok(Self { container, file, before, used, period, written: Vec::new() })
    }

    /// Leaves the container so many percent of what it used, and notes that at `path` first.
    fn keep(&mut self, percent: u8, path: &Path) -> io::Result<()> {
        let now = fs::read_to_string(&self.file)?.trim().to_owned();
        if !self.written.is_empty() && now != self.before && !self.written.contains(&now) {
            self.before = now;
        }
        let quota = (self.used.saturating_mul(percent.into()) / 100).max(LEAST_QUOTA);
        let text = match self.before.contains(' ') {
            true => format!("{quota} {}", self.period),
            false => quota.to_string(),
        };
        self.written.push(text.clone());
        notes::write(path, self)?;
        fs::write(&self.file, text)
    }

    fn put_back(&self) -> io::Result<()> {
        let now = fs::read_to_string(&self.file)?;
        if self.written.is_empty() || self.written.iter().any(|ours| ours == now.trim()) {
            fs::write(&self.file, &self.before)?;
        }
        Ok(())
    }
}

/// Processor time that was used, in microseconds.
fn used(file: &Path) -> io::Result<u64> {
    let text = fs::read_to_string(file)?;
    match text.lines().find_map(|line| line.strip_prefix("usage_usec ")) {
        Some(micros) => number(micros),
        None => Ok(number(&text)? / 1000),
    }
}

fn number(text: &str) -> io::Result<u64> {
    text.trim().parse().map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noted(file: PathBuf, before: &str) -> Notes {
        let container = "c0ffee".repeat(10).parse().unwrap();
        let (used, period, written) = (80_000, 100_000, Vec::new());
        Notes { container, file, before: before.to_owned(), used, period, written }
    }

    #[test]
    fn a_share_is_of_what_was_used_in_either_version() {
        let dir = tempfile::tempdir().unwrap();
        let (home, file) = (dir.path().join("migration"), dir.path().join("quota"));
        for (before, keep, quota) in
            [("-1", 25, "20000"), ("max 100000", 50, "40000 100000"), ("-1", 0, "1000")]
        {
            fs::write(&file, before).unwrap();
            noted(file.clone(), before).keep(keep, &home.join(FILE)).unwrap();
            assert_eq!(fs::read_to_string(&file).unwrap(), quota);
        }
    }

    #[test]
    fn what_was_noted_is_put_back_once_and_a_cgroup_that_is_gone_is_no_error() {
        let dir = tempfile::tempdir().unwrap();
        let (home, file) = (dir.path().join("migration"), dir.path().join("quota"));
        fs::write(&file, "-1\n").unwrap();
        let mut notes = noted(file.clone(), "-1");
        notes.keep(50, &home.join(FILE)).unwrap();
        // The next step was noted and not made.
        notes.written.push("20000".to_owned());
        notes::write(&home.join(FILE), &notes).unwrap();
        end(&home).unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "-1");
        assert!(!home.exists());
        fs::write(&file, "5").unwrap();
        end(&home).unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "5");
        // As a version wrote them that did not know what else it had written.
        notes::write(&home.join(FILE), &noted(file.clone(), "-1")).unwrap();
        end(&home).unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "-1");
        notes::write(&home.join(FILE), &noted(dir.path().join("gone/quota"), "-1")).unwrap();
        end(&home).unwrap();
        assert!(!home.exists());
    }

    #[test]
    fn a_quota_that_somebody_else_has_set_meanwhile_stays() {
        let dir = tempfile::tempdir().unwrap();
        let (home, file) = (dir.path().join("migration"), dir.path().join("quota"));
        for another_step in [false, true] {
            fs::write(&file, "max 100000\n").unwrap();
            let mut notes = noted(file.clone(), "max 100000");
            notes.keep(50, &home.join(FILE)).unwrap();
            fs::write(&file, "150000 100000\n").unwrap();
            if another_step {
                notes.keep(25, &home.join(FILE)).unwrap();
                assert_eq!(fs::read_to_string(&file).unwrap(), "20000 100000");
            }
            end(&home).unwrap();
            assert_eq!(fs::read_to_string(&file).unwrap().trim(), "150000 100000");
            assert!(!home.exists());
        }
    }
}
