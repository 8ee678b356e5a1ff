//! What our services use: processor time and memory, from /proc.

use crate::fleet::Fleet;
use anyhow::{Context, Result};
use serde::Serialize;
use serde_json::Value;
use std::fs;

/// Ticks per second in /proc/PID/stat: 100 on every Linux that programs are compiled for (USER_HZ).
const TICKS: f64 = 100.0;

/// The services of a host, over a run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Usage {
    /// Processor time, in seconds, of the services and of the children that they waited for.
    pub cpu: f64,
    /// The sum of each one's peak of resident memory, in bytes: no less than the peak of the sum.
    pub peak: u64,
}

/// The processes of the services of one host.
#[derive(Debug)]
pub struct Processes {
    pids: Vec<u64>,
    cpu: f64,
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
        let cpu = cpu_of(&pids)?;
        Ok(Self { pids, cpu })
    }

    /// What they have used since then.
    ///
    /// # Errors
    /// One is gone.
    pub fn end(&self) -> Result<Usage> {
        let mut peak = 0;
        for pid in &self.pids {
            let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
            let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
            let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok());
            peak += kib.context("no VmHWM")? * 1024;
        }
        Ok(Usage { cpu: cpu_of(&self.pids)? - self.cpu, peak })
    }
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
    fn ticks_are_found_behind_any_name() {
        let stat = "7 (a ) b) S 1 7 7 0 -1 4194560 100 200 0 0 11 22 33 44 20 0 1 0 500 1000 50";
        assert_eq!(ticks_in(stat), Some(110));
    }
}
