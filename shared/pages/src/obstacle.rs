//! What a process does that no dump can carry, found out before the container is touched.

use std::fmt;
use std::fs;
use std::io;

use haulage_sys::Pid;

use crate::maps::{Maps, MapsError};
use crate::process::{self, Process};

/// Why a process cannot be dumped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Obstacle {
    /// Another process traces it, as a debugger does: it can be traced by one at a time, and CRIU has to.
    Traced {
        /// The tracer, as our pid namespace numbers it.
        by: u32,
        /// What the tracer is called.
        name: String,
    },
    /// It holds a userfaultfd: nobody else can answer for its memory.
    Userfaultfd,
    /// It has a queue of io_uring, whose requests cannot be taken along.
    IoUring,
    /// It has opened or mapped an RDMA device, which writes to its memory unseen.
    Rdma,
    /// Its first thread has ended, others run on: the kernel shows nothing of it, and CRIU dumps no such process.
    LeaderExited,
    /// A signal has stopped it (SIGSTOP, SIGTSTP, SIGTTIN, SIGTTOU): see [`first_stopped`].
    Stopped,
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Traced { by, name } => write!(f, "is traced by {name} (process {by})"),
            Self::Userfaultfd => f.write_str("uses userfaultfd"),
            Self::IoUring => f.write_str("uses io_uring"),
            Self::Rdma => f.write_str("uses an RDMA device"),
            Self::LeaderExited => f.write_str("runs on although its first thread has ended"),
            Self::Stopped => f.write_str("is stopped by a signal"),
        }
    }
}

/// Files of RDMA devices, by their paths.
const RDMA: &str = "/dev/infiniband/";
const USERFAULTFD: &str = "anon_inode:[userfaultfd]";
const IO_URING: &str = "anon_inode:[io_uring]";

/// An obstacle and whose it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// The process.
    pub process: Process,
    /// What it is called.
    pub name: String,
    /// What is in the way.
    pub obstacle: Obstacle,
}

impl Found {
    fn new(process: Process, obstacle: Obstacle) -> Self {
        Self { process, name: name_of(&process.pid.to_string()), obstacle }
    }
}

/// The first obstacle among `processes`, which run on: what they do afterwards is not known. Processes that end
/// meanwhile have none.
///
/// Whoever injects into a process traces it and makes a userfaultfd in it for a moment, so that what is found once may
/// be our own tracker's doing.
///
/// # Errors
/// When the mappings of a process that lives cannot be read or understood.
pub fn first(processes: &[Process]) -> Result<Option<Found>, MapsError> {
    for process in processes {
        if let Some(obstacle) = of(*process)? {
            return Ok(Some(Found::new(*process, obstacle)));
        }
    }
    Ok(None)
}

/// The first process that a signal has stopped, frozen or not. It is an obstacle where the freezer of cgroup version 1
/// freezes it: whoever traces it then waits for a thaw (`ptrace_attach` of Linux 6.1 and later wakes it from its stop,
/// which the freezer keeps from it), and CRIU traces before it thaws. With version 2 it is none.
///
/// # Errors
/// When it cannot be read what a thread that lives is waiting for.
pub fn first_stopped(processes: &[Process]) -> io::Result<Option<Found>> {
    for process in processes {
        if is_stopped(process.pid)? {
            return Ok(Some(Found::new(*process, Obstacle::Stopped)));
        }
    }
    Ok(None)
}

/// All threads of a process stop together, and those that have ended tell nothing. A frozen one is in state D, and waits in
/// the same function, of whose name the compiler may have made a variant (`do_signal_stop.isra.0`).
fn is_stopped(pid: Pid) -> io::Result<bool> {
    let Some(threads) = unless_gone(fs::read_dir(format!("/proc/{pid}/task")))? else { return Ok(false) };
    for thread in threads {
        let Some(thread) = unless_gone(thread)? else { continue };
        let Some(stat) = unless_gone(fs::read_to_string(thread.path().join("stat")))? else { continue };
        let state = stat.rsplit_once(')').and_then(|(_, rest)| rest.trim_start().chars().next());
        match state {
            Some('T') => return Ok(true),
            Some('Z' | 'X') | None => {}
            Some(_) => {
                let place = unless_gone(fs::read_to_string(thread.path().join("wchan")))?;
                return Ok(place.is_some_and(|place| place.starts_with("do_signal_stop")));
            }
        }
    }
    Ok(false)
}

/// Nothing where the process or thread has ended.
fn unless_gone<T>(read: io::Result<T>) -> io::Result<Option<T>> {
    match read {
        Err(error)
            if error.kind() == io::ErrorKind::NotFound
                || error.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error()) =>
        {
            Ok(None)
        }
        other => other.map(Some),
    }
}

fn of(process: Process) -> Result<Option<Obstacle>, MapsError> {
    let maps = match Maps::of(process.pid) {
        Ok(maps) => maps,
        Err(error) if error.is_gone() => return Ok(None),
        Err(error) => return Err(error),
    };
    if maps.regions().is_empty() && process::is_without_leader(process.pid) {
        return Ok(Some(Obstacle::LeaderExited));
    }
    let mapped = maps.regions().iter().find_map(|region| told_by(&region.name));
    Ok(mapped.or_else(|| opened(process)).or_else(|| traced(process)))
}

/// What the path of an open or mapped file tells. A ring of io_uring can be in use without an open file.
fn told_by(path: &str) -> Option<Obstacle> {
    match path {
        USERFAULTFD => Some(Obstacle::Userfaultfd),
        IO_URING => Some(Obstacle::IoUring),
        _ if path.starts_with(RDMA) => Some(Obstacle::Rdma),
        _ => None,
    }
}

fn opened(process: Process) -> Option<Obstacle> {
    let open = fs::read_dir(format!("/proc/{}/fd", process.pid)).ok()?;
    let mut links = open.flatten().filter_map(|entry| fs::read_link(entry.path()).ok());
    links.find_map(|link| told_by(link.to_str()?))
}

fn traced(process: Process) -> Option<Obstacle> {
    let threads = fs::read_dir(format!("/proc/{}/task", process.pid)).ok()?;
    let by = threads.flatten().find_map(|thread| {
        let status = fs::read_to_string(thread.path().join("status")).ok()?;
        let by = status.lines().find_map(|line| line.strip_prefix("TracerPid:"))?.trim().parse().ok()?;
        // A tracer outside our pid namespace shows as 0, as does none.
        (by != 0).then_some(by)
    })?;
    Some(Obstacle::Traced { by, name: name_of(&by.to_string()) })
}

fn name_of(pid: &str) -> String {
    fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_tell_what_they_stand_for() {
        assert_eq!(told_by("anon_inode:[userfaultfd]"), Some(Obstacle::Userfaultfd));
        assert_eq!(told_by("anon_inode:[io_uring]"), Some(Obstacle::IoUring));
        assert_eq!(told_by("/dev/infiniband/uverbs0"), Some(Obstacle::Rdma));
        for harmless in ["", "[heap]", "/dev/null", "anon_inode:[eventpoll]", "/data/anon_inode:[io_uring]"] {
            assert_eq!(told_by(harmless), None, "{harmless}");
        }
    }
}
