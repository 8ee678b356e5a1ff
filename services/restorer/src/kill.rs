//! Ends every process of a container, without its engine: an engine asks for things that a container with missing
//! memory may never answer.

use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use haulage_criu::quiet;
use haulage_sys::freezer::{self, Freezer};
use haulage_sys::{Pid, pidfd};
use rustix::process::{Signal, pidfd_send_signal};

/// A killed process is gone within this time, unless the kernel holds it.
const GONE_WITHIN: Duration = Duration::from_secs(10);

/// Silences the network of container `id`, so that nobody hears of its end: its connections live on, on the source.
pub(crate) fn silence_container(id: &str) -> io::Result<()> {
    // While it is being restored, runc and CRIU are in its control group too, but on the host's network, which is ours.
    let host = std::fs::read_link("/proc/self/ns/net")?;
    let elsewhere =
        |pid: &Pid| std::fs::read_link(format!("/proc/{pid}/ns/net")).is_ok_and(|net| net != host);
    let Some(pid) = processes_of(id)?.into_iter().find(elsewhere) else { return Ok(()) };
    let namespace = quiet::namespace_of(pid.as_raw_nonzero().get())?;
    if quiet::is_silent(&namespace)? {
        return Ok(());
    }
    quiet::hush(&namespace, quiet::Change::to_silence(&namespace)?)
}

/// Kills, in silence, until no process is left whose control group is named after container `id` (64 hexadecimal
/// digits), which is how Docker names it under every driver.
///
/// # Errors
/// When processes cannot be listed or killed, or one does not die.
pub(crate) fn kill_container(id: &str) -> io::Result<()> {
    if id.len() != 64 || !id.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{id:?} is not a container's id")));
    }
    // A container that cannot be silenced must die all the same.
    if let Err(error) = silence_container(id) {
        tracing::warn!(container = id, %error, "a container that is to be killed was not silenced");
    }
    let began = Instant::now();
    loop {
        let processes = processes_of(id)?;
        if processes.is_empty() {
            return Ok(());
        }
        if began.elapsed() >= GONE_WITHIN {
            return Err(io::Error::other(format!(
                "{} processes of the container do not die",
                processes.len()
            )));
        }
        let groups: Vec<Freezer> = processes.iter().filter_map(|pid| group_of(*pid, id)).collect();
        let mut dying = Vec::new();
        for pid in &processes {
            dying.extend(kill(*pid, id)?);
        }
        // A restore that was broken off may have left it frozen. All of it has been told to die by now, so nothing runs.
        groups.iter().for_each(thaw);
        dying.iter().try_for_each(wait_for)?;
    }
}

/// What freezes `pid`, if that is named after the container: the number may have changed hands, and what has it now may
/// have to stand still.
fn group_of(pid: Pid, id: &str) -> Option<Freezer> {
    let dir = freezer::dir_of(&pid.to_string()).ok()?;
    let is_its = dir.to_str().is_some_and(|dir| dir.contains(id));
    is_its.then(|| Freezer::open(&dir).ok()).flatten()
}

fn thaw(group: &Freezer) {
    // One that is gone with its processes need not be thawed.
    if let Err(error) = group.thaw() {
        tracing::debug!(group = %group.dir().display(), %error, "the group of killed processes was not thawed");
    }
}

/// Nobody, if the process is gone.
fn kill(pid: Pid, id: &str) -> io::Result<Option<OwnedFd>> {
    let Ok(process) = pidfd::open(pid) else { return Ok(None) };
    // The number may have changed hands since it was listed; the descriptor cannot.
    if !is_of(pid, id) {
        return Ok(None);
    }
    match pidfd_send_signal(&process, Signal::KILL) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(Some(process)),
        Err(error) => {
            let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            let error = io::Error::from(error);
            Err(io::Error::new(error.kind(), format!("cannot kill {} ({pid}): {error}", name.trim_end())))
        }
    }
}

fn wait_for(process: &OwnedFd) -> io::Result<()> {
    let mut dying = [rustix::event::PollFd::new(process, rustix::event::PollFlags::IN)];
    let within = rustix::event::Timespec { tv_sec: 1, tv_nsec: 0 };
    rustix::event::poll(&mut dying, Some(&within))?;
    Ok(())
}

fn processes_of(id: &str) -> io::Result<Vec<Pid>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let pid = name.to_str().and_then(|name| name.parse().ok()).and_then(Pid::from_raw);
        found.extend(pid.filter(|pid| is_of(*pid, id)));
    }
    Ok(found)
}

/// Whether `pid` is a living process of the container. A zombie keeps its control group and is dead all the same.
fn is_of(pid: Pid, id: &str) -> bool {
    let read = |file: &str| std::fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
    let alive =
        || !read("stat").rsplit_once(')').is_none_or(|(_, rest)| rest.trim_start().starts_with(['Z', 'X']));
    read("cgroup").contains(id) && alive()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_whole_id_is_accepted() {
        for id in ["", "abc", &"g".repeat(64), &"a".repeat(63)] {
            assert!(kill_container(id).is_err(), "{id:?}");
        }
        assert!(kill_container(&"0123456789abcdef".repeat(4)).is_ok(), "nobody is killed");
    }
}
