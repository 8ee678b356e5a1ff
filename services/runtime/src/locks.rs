//! Locks of processes on ranges of files (`F_SETLK`) that CRIU has lost ([`haulage_criu::record_locks`]), and System V segments
//! that it was not told of ([`haulage_criu::ipc`]): they are taken and attached again before anything of the container runs.
//!
//! ```text
//!   pre-resume    all stand still for CRIU: who lacks a lock or a segment? ── nobody ──▶ nothing is done
//!                 CRIU leaves the container's cgroup, which is frozen
//!   post-resume   CRIU has let go: locks are taken, segments attached, and the container runs
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

use haulage_criu::ipc::IpcState;
use haulage_criu::record_locks::OwnedLock;
use haulage_sys::freezer::{self, Freezer};
use haulage_sys::ipc::IpcNamespace;
use haulage_sys::record_lock;
use haulage_sys::take_locks::{self, Wanted};
use haulage_sys::{Errno, Pid};

use crate::failure::Failure;

/// How long a group may take to freeze, whose processes stand still, and threads to stop that do not run.
const PATIENCE: Duration = Duration::from_secs(10);

/// Processes that lack locks or segments and do not run before they have them. They are killed when this is dropped: they must not run.
pub(crate) struct HeldBack {
    groups: Vec<Freezer>,
    processes: Vec<Pid>,
    lacking: Wanted,
    /// With the namespace of the segments.
    ipc: Option<(IpcState, IpcNamespace)>,
}

impl Drop for HeldBack {
    fn drop(&mut self) {
        take_locks::kill(&self.groups, &self.processes);
    }
}

impl HeldBack {
    /// Holds back the processes below `init`, which stand still, if one of them lacks one of `locks`, or a segment of `ipc`.
    ///
    /// # Errors
    /// [`Failure::Locks`]; they are killed.
    pub(crate) fn if_lacking(
        init: Pid,
        locks: &[OwnedLock],
        ipc: Option<IpcState>,
    ) -> Result<Option<Self>, Failure> {
        if locks.is_empty() && ipc.is_none() {
            return Ok(None);
        }
        let (groups, lacking) = Default::default();
        let mut held = Self { groups, processes: vec![init], lacking, ipc: None };
        held.find_lacking(init, locks, ipc).map_err(failed)?;
        if held.lacking == Wanted::default() && held.ipc.is_none() {
            held.processes.clear();
            return Ok(None);
        }
        held.freeze().map_err(failed)?;
        Ok(Some(held))
    }

    fn find_lacking(&mut self, init: Pid, locks: &[OwnedLock], ipc: Option<IpcState>) -> io::Result<()> {
        let processes = tree(init)?;
        let owner = |pid: u32| {
            let none = || io::Error::other(format!("there is no process {pid} to have what is its"));
            processes.get(&pid).copied().ok_or_else(none)
        };
        let wanted = locks.iter().map(|lock| Ok((owner(lock.pid)?, lock.lock())));
        self.lacking.locks = record_lock::missing(&wanted.collect::<io::Result<Vec<_>>>()?)?;
        if let Some(ipc) = ipc {
            let attachments = ipc.attached.iter().map(|is| Ok((owner(is.pid)?, is.attachment())));
            self.lacking.attachments = attachments.collect::<io::Result<_>>()?;
            self.ipc = Some((ipc, IpcNamespace::of(init)?));
        }
        self.processes = processes.into_values().collect();
        Ok(())
    }

    fn freeze(&mut self) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let mut dirs = BTreeSet::new();
        for pid in &self.processes {
            dirs.insert(freezer::dir_of(&pid.to_string())?);
        }
        let own = freezer::dir_of("self")?.join("cgroup.procs");
        for dir in dirs {
            if dir.join("cgroup.procs") == own {
                return Err(format!("{} is also that of this process", dir.display()).into());
            }
            // runc has put CRIU there, which is to let go of the others.
            for line in fs::read_to_string(dir.join("cgroup.procs"))?.lines() {
                let pid = line.parse().ok().and_then(Pid::from_raw).ok_or("a process out of sight")?;
                if !self.processes.contains(&pid) {
                    leave(&own, line)?;
                }
            }
            let group = Freezer::open(&dir)?;
            self.groups.push(group.clone());
            group.freeze(PATIENCE)?;
        }
        Ok(())
    }

    /// CRIU has let go of the processes: they get their locks and segments, and run.
    ///
    /// # Errors
    /// [`Failure::Locks`]; they are killed.
    pub(crate) fn run(mut self) -> Result<(), Failure> {
        let (groups, processes) = (std::mem::take(&mut self.groups), std::mem::take(&mut self.processes));
        let (lacking, ipc) = (std::mem::take(&mut self.lacking), self.ipc.take());
        // Nobody may see a segment that everybody may attach.
        let finish = || ipc.map_or(Ok(()), |(state, namespace)| state.finish(&namespace));
        take_locks::take_before_they_run(&groups, &processes, &lacking, finish, PATIENCE).map_err(failed)
    }
}

/// Has `process` leave its group for that of `procs`, unless it has ended.
fn leave(procs: &Path, process: &str) -> io::Result<()> {
    match fs::write(procs, process) {
        Err(error) if error.raw_os_error() == Some(Errno::SRCH.raw_os_error()) => Ok(()),
        other => other,
    }
}

fn failed(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Failure {
    Failure::Locks(error.into())
}

/// The processes below `init`, itself among them, by their ids in their innermost pid namespaces. Those that have ended, and
/// whose parents do not know yet, are none.
fn tree(init: Pid) -> io::Result<BTreeMap<u32, Pid>> {
    let (mut found, mut open) = (BTreeMap::new(), vec![init]);
    while let Some(pid) = open.pop() {
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        if status.lines().any(|line| line.starts_with("State:\tZ")) {
            continue;
        }
        found.insert(innermost(&status).ok_or_else(|| io::Error::other("a status without ids"))?, pid);
        for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
            let children = fs::read_to_string(thread?.path().join("children"))?;
            open.extend(children.split_whitespace().filter_map(|child| Pid::from_raw(child.parse().ok()?)));
        }
    }
    Ok(found)
}

/// The last of the ids that `/proc/<pid>/status` tells.
fn innermost(status: &str) -> Option<u32> {
    let ids = status.lines().find_map(|line| line.strip_prefix("NSpid:"))?;
    ids.split_whitespace().last()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_known_by_its_innermost_id() {
        assert_eq!(innermost("Name:\tx\nNSpid:\t4711\t12\nPid:\t4711\n"), Some(12));
        assert_eq!(innermost("Pid:\t4711\n"), None);
        let us = rustix::process::getpid();
        let tree = tree(us).unwrap();
        assert!(tree.values().any(|pid| *pid == us), "{tree:?}");
    }
}
