//! Slowing a container down: its cgroup's quota of processor time, version 1 (`cpu.cfs_quota_us`) or 2 (`cpu.max`).
//!
//! What the quota was is written down before it is changed, and put back by [`unthrottle`], or when the service starts:
//! a container must not stay slow because its migration was forgotten.

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
        let notes = match known {
            Some(notes) if notes.container == ask.container => notes,
            Some(_) => return Err(Fault::new(code::MALFORMED, "the migration was of another container")),
            None => {
                let cgroup = bundle(&captured.spec.id, captured.state.pid)?.cgroup;
                let notes = Notes::of(ask.container, &cgroup).map_err(fault(THROTTLE))?;
                notes::write(&path, &notes).map_err(fault(THROTTLE))?;
                notes
            }
        };
        notes.keep(ask.keep).map_err(fault(THROTTLE))?;
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
    match fs::write(&notes.file, &notes.before) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    notes::remove(dir, &[FILE])
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
        Ok(Self { container, file, before, used: used.saturating_mul(period) / elapsed, period })
    }

    /// Leaves the container so many percent of what it used.
    fn keep(&self, percent: u8) -> io::Result<()> {
        let quota = (self.used.saturating_mul(percent.into()) / 100).max(LEAST_QUOTA);
        match self.before.contains(' ') {
            true => fs::write(&self.file, format!("{quota} {}", self.period)),
            false => fs::write(&self.file, quota.to_string()),
        }
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
        Notes { container, file, before: before.to_owned(), used: 80_000, period: 100_000 }
    }

    #[test]
    fn a_share_is_of_what_was_used_in_either_version() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("quota");
        noted(file.clone(), "-1").keep(25).unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "20000");
        noted(file.clone(), "max 100000").keep(50).unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "40000 100000");
        noted(file.clone(), "-1").keep(0).unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "1000");
    }

    #[test]
    fn what_was_noted_is_put_back_once_and_a_cgroup_that_is_gone_is_no_error() {
        let dir = tempfile::tempdir().unwrap();
        let (home, file) = (dir.path().join("migration"), dir.path().join("quota"));
        fs::write(&file, "20000").unwrap();
        notes::write(&home.join(FILE), &noted(file.clone(), "-1")).unwrap();
        end(&home).unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "-1");
        assert!(!home.exists());
        fs::write(&file, "5").unwrap();
        end(&home).unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "5");
        notes::write(&home.join(FILE), &noted(dir.path().join("gone/quota"), "-1")).unwrap();
        end(&home).unwrap();
        assert!(!home.exists());
    }
}
