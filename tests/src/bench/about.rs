//! What a run was made on and with.

use crate::fleet::Fleet;
use crate::process::{finish, run};
use anyhow::{Context, Result};
use serde::Serialize;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// How fast `process_vm_readv` is, as a program.
const READMEM: &str = include_str!("../../workloads/readmem.c");

/// The machine, the versions, the commit.
#[derive(Debug, Clone, Serialize)]
pub struct About {
    /// Which plan.
    pub plan: &'static str,
    /// When it was begun, UTC.
    pub date: String,
    /// The commit that was checked out, with `+` when files differed from it.
    pub commit: String,
    /// Processor, cores, memory, kernel.
    pub machine: String,
    /// How busy the machine was before the run, in percent of all its processors: what others take from it.
    pub busy: u64,
    /// Programs and their versions.
    pub versions: Vec<(String, String)>,
}

impl About {
    /// Asks the machine. How busy it was before the fleet began is for the caller to say; see [`busy`].
    ///
    /// # Errors
    /// /proc cannot be read. A program that does not tell its version is left out.
    pub fn ask(fleet: &Fleet, plan: &'static str, busy: u64) -> Result<Self> {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo")?;
        let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        let cores = cpuinfo.lines().filter(|line| line.starts_with("processor")).count();
        let meminfo = fs::read_to_string("/proc/meminfo")?;
        let kib = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:")?.split_whitespace().next());
        let gib = kib.and_then(|kib| kib.parse::<u64>().ok()).unwrap_or_default() / (1 << 20);
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease")?;
        let model = model.map_or("unknown processor", |(_, model)| model);
        let version = |name: &str, program: &Path, arguments: &[&str]| {
            let said = finish(Command::new(program).args(arguments)).ok()?;
            let line = said.lines().find(|line| line.chars().any(|c| c.is_ascii_digit()))?;
            Some((name.to_owned(), line.trim().to_owned()))
        };
        let versions = [
            version("haul", &fleet.binaries().join("haul"), &["--version"]),
            version("dockerd", Path::new("dockerd"), &["--version"]),
            version("runc", Path::new("runc"), &["--version"]),
            version("podman", Path::new("podman"), &["--version"]),
            version("criu", Path::new("criu"), &["--version"]),
            version("nats-server", Path::new("nats-server"), &["--version"]),
        ];
        Ok(Self {
            plan,
            date: run("date", &["--utc", "+%Y-%m-%d %H:%M"])?,
            commit: commit().unwrap_or_else(|_| "unknown".to_owned()),
            machine: format!("{model}, {cores} cores, {gib} GiB, Linux {}", kernel.trim()),
            busy,
            versions: versions.into_iter().flatten().collect(),
        })
    }
}

/// How busy the machine is, in percent of all its processors, over a second.
///
/// # Errors
/// /proc cannot be read.
pub fn busy() -> Result<u64> {
    let before = Ticks::now()?;
    // Not to wait for something: what happens in this time is measured.
    std::thread::sleep(Duration::from_secs(1));
    let after = Ticks::now()?;
    let (idle, all) = (after.idle.saturating_sub(before.idle), after.all.saturating_sub(before.all));
    Ok(100 - (idle * 100).checked_div(all).unwrap_or(100).min(100))
}

/// Processor time since the machine's start.
struct Ticks {
    idle: u64,
    all: u64,
}

impl Ticks {
    fn now() -> Result<Self> {
        let stat = fs::read_to_string("/proc/stat")?;
        let line = stat.lines().next().and_then(|line| line.strip_prefix("cpu")).context("no processors")?;
        let fields: Vec<u64> = line.split_whitespace().filter_map(|field| field.parse().ok()).collect();
        // user, nice, system, idle, iowait, irq, softirq, steal; what follows is part of the first two.
        let idle = fields.iter().skip(3).take(2).sum();
        Ok(Self { idle, all: fields.iter().take(8).sum() })
    }
}

fn commit() -> Result<String> {
    let workspace = workspace()?;
    let git = |arguments: &[&str]| finish(Command::new("git").current_dir(&workspace).args(arguments));
    let mark = if git(&["status", "--porcelain", "--untracked-files=no"])?.is_empty() { "" } else { "+" };
    Ok(format!("{}{mark}", git(&["rev-parse", "--short=12", "HEAD"])?))
}

/// The directory with `target` in it, of which this program is a part.
///
/// # Errors
/// The program lies elsewhere.
pub fn workspace() -> Result<PathBuf> {
    let own = std::env::current_exe()?;
    let target = own.ancestors().find(|path| path.file_name().is_some_and(|name| name == "target"));
    Ok(target.and_then(Path::parent).context("this program is not in a target directory")?.to_owned())
}

/// How fast `process_vm_readv` reads on one core, in bytes per second.
///
/// # Errors
/// The program could not be compiled or failed.
pub fn vm_readv(fleet: &Fleet) -> Result<f64> {
    let program = fleet.directory().join("readmem");
    crate::dirtier::compile(READMEM, &program)?;
    Ok(finish(&mut Command::new(program))?.parse()?)
}
