//! What our services use: processor time and memory, from /proc.

use crate::fleet::Fleet;
use anyhow::{Context, Result, anyhow};
use serde::Serialize;
use serde_json::Value;
use std::collections::HashMap;
use std::fs;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// Ticks per second in /proc/PID/stat: 100 on every Linux that programs are compiled for (USER_HZ).
const TICKS: f64 = 100.0;

/// How often it is looked at what of a service's memory is shared.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// The services of a host, over a run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Usage {
    /// Processor time, in seconds, of the services and of the children that they waited for.
    pub cpu: f64,
    /// The sum of each one's peak of resident memory, in bytes, without the container's own shared memory, which a service
    /// that watches it has mapped.
    pub peak: u64,
}

/// The processes of the services of one host.
#[derive(Debug)]
pub struct Processes {
    pids: Vec<u64>,
    cpu: f64,
    over: Sender<()>,
    watch: JoinHandle<HashMap<u64, Seen>>,
}

/// The most that was seen of a process's memory, in KiB.
#[derive(Debug, Clone, Copy, Default)]
struct Seen {
    own: u64,
    shared: u64,
}

impl Processes {
    /// Finds them by `haul hosts`, and begins to measure.
    ///
    /// # Errors
    /// `haul` or a process does not answer.
    pub fn begin(fleet: &Fleet, host: usize) -> Result<Self> {
        let answer = fleet.haul(&["hosts", "--json"])?.json()?;
        let name = fleet.host(host).name();
        let services = answer.get(name).and_then(Value::as_array).context("haul knows no services")?;
        let pids: Vec<u64> = services.iter().filter_map(|s| s.get("pid")?.as_u64()).collect();
        for pid in &pids {
            // "5" resets the peak (proc_pid_clear_refs(5)); dirty bits stay as they are.
            fs::write(format!("/proc/{pid}/clear_refs"), "5").context("reset a service's memory peak")?;
        }
        let (cpu, (over, end)) = (cpu_of(&pids)?, mpsc::channel());
        let watched = pids.clone();
        let watch = thread::spawn(move || watch(&watched, &end));
        Ok(Self { pids, cpu, over, watch })
    }

    /// What they have used since then.
    ///
    /// # Errors
    /// One is gone.
    pub fn end(self) -> Result<Usage> {
        let cpu = cpu_of(&self.pids)? - self.cpu;
        drop(self.over);
        let seen = self.watch.join().map_err(|_| anyhow!("nobody watched the services' memory"))?;
        let mut peak = 0;
        for pid in &self.pids {
            let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
            let most = kib(&status, "VmHWM:").context("no VmHWM")?;
            let Seen { own, shared } = seen.get(pid).copied().unwrap_or_default();
            peak += own.max(most.saturating_sub(shared)) * 1024;
        }
        Ok(Usage { cpu, peak })
    }
}

/// Looks at the processes' memory until `end` is closed.
fn watch(pids: &[u64], end: &Receiver<()>) -> HashMap<u64, Seen> {
    let mut seen: HashMap<u64, Seen> = HashMap::new();
    while end.recv_timeout(LOOK_EVERY) == Err(RecvTimeoutError::Timeout) {
        for pid in pids {
            // One that is gone is found missing at the end.
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            let now = |field| kib(&status, field).unwrap_or(0);
            let most = seen.entry(*pid).or_default();
            most.own = most.own.max(now("RssAnon:") + now("RssFile:"));
            most.shared = most.shared.max(now("RssShmem:"));
        }
    }
    seen
}

/// A field of /proc/PID/status in KiB.
fn kib(status: &str, field: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(field))?;
    line.trim().strip_suffix(" kB")?.parse().ok()
}

fn cpu_of(pids: &[u64]) -> Result<f64> {
    let mut ticks = 0;
    for pid in pids {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).context("a service is gone")?;
        ticks += ticks_in(&stat).with_context(|| format!("not the state of a process: {stat}"))?;
    }
    Ok(crate::bench::stats::figure(ticks) / TICKS)
}

/// utime, stime, cutime and cstime. The name before them may hold anything, parentheses too.
fn ticks_in(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().skip(11).take(4).map(|field| field.parse::<u64>().ok()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_found_by_its_name() {
        let status = "Name:\tx\nVmHWM:\t    4096 kB\nRssShmem:\t       0 kB\n";
        assert_eq!(
            (kib(status, "VmHWM:"), kib(status, "RssShmem:"), kib(status, "RssAnon:")),
            (Some(4096), Some(0), None)
        );
    }

    #[test]
    fn ticks_are_found_behind_any_name() {
        let stat = "7 (a ) b) S 1 7 7 0 -1 4194560 100 200 0 0 11 22 33 44 20 0 1 0 500 1000 50";
        assert_eq!(ticks_in(stat), Some(110));
    }
}
