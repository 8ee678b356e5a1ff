//! The processes of a control group.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use haulage_sys::Pid;

/// A process as it calls itself: its id in its innermost pid namespace. CRIU names images by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Vpid(pub u32);

impl Vpid {
    /// Ids from here on stand for shared memory ([`crate::object`]); no process has one (`PID_MAX_LIMIT`, 2^22).
    const OBJECTS: u32 = 1 << 31;

    /// The id of the object with this number, below 2^31.
    pub(crate) const fn of_object(number: u32) -> Self {
        Self(number | Self::OBJECTS)
    }

    /// Whether it stands for shared memory rather than for a process.
    pub const fn is_object(self) -> bool {
        self.0 >= Self::OBJECTS
    }
}

impl fmt::Display for Vpid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Tells apart processes that had the same id one after the other: the start time in clock ticks since boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Generation(pub u64);

/// One process of a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Process {
    /// Its id in our pid namespace.
    pub pid: Pid,
    /// Its id in its own.
    pub vpid: Vpid,
    /// Tells it from an earlier process of the same id.
    pub generation: Generation,
}

/// The processes of a group could not be listed.
#[derive(Debug, thiserror::Error)]
pub enum ListError {
    /// A file or directory of the group could not be read; `NotFound` when the group is gone.
    #[error("read of {} failed", path.display())]
    Read {
        /// What was read.
        path: PathBuf,
        /// What happened.
        #[source]
        source: io::Error,
    },
    /// The group has a process that is not visible in our pid namespace.
    #[error("{} names a process outside our pid namespace", path.display())]
    OutOfSight {
        /// The list that names it.
        path: PathBuf,
    },
    /// A file about a process is not as `proc(5)` says.
    #[error("{} is not understood", path.display())]
    Format {
        /// The file.
        path: PathBuf,
    },
    /// Two processes call themselves by the same id, in different pid namespaces.
    #[error("two processes have the id {vpid} in pid namespaces of their own")]
    SameVpid {
        /// The id.
        vpid: Vpid,
    },
}

/// The processes of the control group whose `cgroup.procs` file is given, and of the groups below it, by [`Vpid`].
///
/// Processes that end meanwhile are left out. Zombies are listed: they have no memory but are part of the container.
///
/// # Errors
/// See [`ListError`].
pub fn list(cgroup_procs: &Path) -> Result<Vec<Process>, ListError> {
    let mut found = BTreeMap::new();
    let mut files = vec![cgroup_procs.to_owned()];
    while let Some(file) = files.pop() {
        for pid in read_pids(&file)? {
            let Some(process) = describe(pid)? else { continue };
            let Some(earlier) = found.insert(process.vpid, process) else { continue };
            // The listed process may have ended since and its number been used again.
            if earlier.pid != process.pid && describe(earlier.pid)? == Some(earlier) {
                return Err(ListError::SameVpid { vpid: process.vpid });
            }
        }
        files.extend(lists_below(&file)?);
    }
    Ok(found.into_values().collect())
}

fn read_pids(file: &Path) -> Result<Vec<Pid>, ListError> {
    let text = match fs::read_to_string(file) {
        Ok(text) => text,
        // A threaded group of version 2 lists its processes in the group above it.
        Err(error) if error.raw_os_error() == Some(rustix::io::Errno::OPNOTSUPP.raw_os_error()) => {
            return Ok(vec![]);
        }
        Err(source) => return Err(ListError::Read { path: file.to_owned(), source }),
    };
    let parse = |line: &str| match line.parse::<i32>() {
        Ok(0) => Err(ListError::OutOfSight { path: file.to_owned() }),
        Ok(number) if number > 0 => Pid::from_raw(number).ok_or(ListError::Format { path: file.to_owned() }),
        _ => Err(ListError::Format { path: file.to_owned() }),
    };
    text.lines().map(parse).collect()
}

fn lists_below(file: &Path) -> Result<Vec<PathBuf>, ListError> {
    let Some(dir) = file.parent() else { return Ok(vec![]) };
    let failed = |source| ListError::Read { path: dir.to_owned(), source };
    let mut below = Vec::new();
    for entry in fs::read_dir(dir).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let list = entry.path().join("cgroup.procs");
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) && list.exists() {
            below.push(list);
        }
    }
    Ok(below)
}

/// Whether every thread of these processes is under the trace of somebody. Threads that end meanwhile do not count.
///
/// # Errors
/// When `/proc` cannot be read or understood.
pub fn all_traced(processes: &[Process]) -> Result<bool, ListError> {
    Ok(threads_traced(processes)?.into_iter().all(|traced| traced))
}

/// Whether any thread of these processes is under the trace of somebody.
///
/// # Errors
/// As [`all_traced`].
pub fn any_traced(processes: &[Process]) -> Result<bool, ListError> {
    Ok(threads_traced(processes)?.into_iter().any(|traced| traced))
}

fn threads_traced(processes: &[Process]) -> Result<Vec<bool>, ListError> {
    let mut found = Vec::new();
    for process in processes {
        let tasks = PathBuf::from(format!("/proc/{}/task", process.pid));
        let threads = match fs::read_dir(&tasks) {
            Ok(threads) => threads,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(source) => return Err(ListError::Read { path: tasks, source }),
        };
        for thread in threads {
            let thread = thread.map_err(|source| ListError::Read { path: tasks.clone(), source })?;
            let path = thread.path().join("status");
            let Ok(status) = fs::read_to_string(&path) else { continue };
            let tracer = status.lines().find_map(|line| line.strip_prefix("TracerPid:"));
            let tracer = tracer.ok_or(ListError::Format { path })?;
            found.push(tracer.trim() != "0");
        }
    }
    Ok(found)
}

/// What is known of `pid`; `None` when it has ended.
///
/// # Errors
/// When `/proc` cannot be read or understood.
pub fn describe(pid: Pid) -> Result<Option<Process>, ListError> {
    let Some(status) = read_of(pid, "status")? else { return Ok(None) };
    let Some(stat) = read_of(pid, "stat")? else { return Ok(None) };
    let format = |name: &str| ListError::Format { path: PathBuf::from(format!("/proc/{pid}/{name}")) };
    let vpid = own_number(&status).ok_or_else(|| format("status"))?;
    // Field 22, and the name in field 2 may contain spaces and parentheses.
    let start = stat
        .rsplit_once(") ")
        .and_then(|(_, fields)| fields.split(' ').nth(19)?.parse().ok())
        .ok_or_else(|| format("stat"))?;
    Ok(Some(Process { pid, vpid: Vpid(vpid), generation: Generation(start) }))
}

/// The id in its innermost pid namespace of the task that has this `status`.
pub(crate) fn own_number(status: &str) -> Option<u32> {
    let numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:"))?;
    numbers.split_ascii_whitespace().last()?.parse().ok()
}

/// The ids of the threads of `pid` in its innermost pid namespace, of all of which something can be known.
pub(crate) fn thread_numbers(pid: Pid) -> impl Iterator<Item = u32> {
    let statuses = threads(pid).filter_map(|thread| fs::read(thread.join("status")).ok());
    statuses.filter_map(|status| own_number(&String::from_utf8_lossy(&status)))
}

/// Whether the process has ended as far as `/proc/PID` shows, which stands for its first thread, and yet has others. So
/// it is for a moment whenever a process with threads ends.
pub(crate) fn is_without_leader(pid: Pid) -> bool {
    let mut threads = threads(pid).filter(|thread| !thread.ends_with(pid.to_string()));
    threads.any(|thread| fs::read(thread.join("maps")).is_ok_and(|maps| !maps.is_empty()))
}

fn threads(pid: Pid) -> impl Iterator<Item = PathBuf> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    threads.map(|thread| thread.path())
}

fn read_of(pid: Pid, name: &str) -> Result<Option<String>, ListError> {
    let path = PathBuf::from(format!("/proc/{pid}/{name}"));
    match fs::read(&path) {
        Ok(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).into_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) if error.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error()) => Ok(None),
        Err(source) => Err(ListError::Read { path, source }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn we_are_described_as_we_are() {
        let us = rustix::process::getpid();
        let process = describe(us).unwrap().unwrap();
        assert_eq!(process.vpid.0, std::process::id());
        assert!(process.generation.0 > 0);
    }

    #[test]
    fn a_group_below_counts_and_an_ended_process_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let below = dir.path().join("below");
        fs::create_dir(&below).unwrap();
        let mut ended = std::process::Command::new("true").spawn().unwrap();
        ended.wait().unwrap();
        fs::write(dir.path().join("cgroup.procs"), format!("{}\n", ended.id())).unwrap();
        fs::write(below.join("cgroup.procs"), format!("{}\n", std::process::id())).unwrap();
        let processes = list(&dir.path().join("cgroup.procs")).unwrap();
        assert_eq!(processes, [describe(rustix::process::getpid()).unwrap().unwrap()]);
    }

    #[test]
    fn what_cannot_be_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("cgroup.procs");
        assert!(matches!(list(&file), Err(ListError::Read { .. })));
        fs::write(&file, "0\n").unwrap();
        assert!(matches!(list(&file), Err(ListError::OutOfSight { .. })));
        fs::write(&file, "-4\n").unwrap();
        assert!(matches!(list(&file), Err(ListError::Format { .. })));
    }
}
