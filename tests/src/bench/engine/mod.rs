//! The ways to move a container, each behind the same trait.

mod copy;
mod docker;
mod haul;
mod network;
mod podman;
mod runc;

pub use haul::{Capabilities, policies};

use crate::bench::cell::{Cell, Engine, Workload};
use crate::bench::writer;
use crate::fleet::Fleet;
use crate::host::Host;
use crate::process::finish;
use crate::{image, wait};
use anyhow::{Context, Result, bail};
use serde::Serialize;
use serde_json::Value;
use std::net::{Ipv4Addr, SocketAddr};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

/// How long a removal may take.
const REMOVE: Duration = Duration::from_secs(30);

/// What an engine tells of a move. Times are in milliseconds.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Moved {
    /// From the request to the decision that it has succeeded.
    pub total: f64,
    /// How long nothing ran, by the engine's own account, and its parts by name. Parts may overlap.
    pub freeze: Option<f64>,
    /// See `freeze`.
    pub split: Vec<(String, f64)>,
    /// Pages that existed at the freeze and were not all zeros.
    pub pages: Option<u64>,
    /// Rounds of pre-copy.
    pub rounds: Option<u64>,
    /// Bytes per second in the first round of pre-copy, which sends all memory.
    pub page_path: Option<f64>,
    /// When pre-copy began and ended, in microseconds since 1970: the rounds before the target is prepared.
    pub pre_copy: Option<(u64, u64)>,
    /// The part of it after all memory had gone once.
    pub repeated: Option<(u64, u64)>,
    /// Rounds a second in pre-copy.
    pub pace: Option<f64>,
    /// The engine's whole report.
    #[serde(skip)]
    pub report: Value,
}

/// A workload that runs on one of the two hosts.
pub trait Subject {
    /// Where it listens; the same on both hosts.
    fn server(&self) -> SocketAddr;

    /// The index of the host it runs on.
    fn host(&self) -> usize;

    /// Whether its clients' connections outlive a move. If not, there must be none when it begins.
    fn keeps_connections(&self) -> bool;

    /// What can be done on the other host before the move is asked for.
    ///
    /// # Errors
    /// It failed; the workload goes on.
    fn prepare(&mut self) -> Result<()>;

    /// Moves it to the other host within `limit`. After an error it may run, or not, on either.
    ///
    /// # Errors
    /// It was not moved.
    fn go(&mut self, limit: Duration) -> Result<Moved>;

    /// Removes it, wherever and in whatever state it is.
    ///
    /// # Errors
    /// Something is left; the error names it.
    fn remove(&mut self) -> Result<()>;
}

/// Starts a cell's workload on the first host, under the care of an engine. `index` keeps names and addresses apart.
///
/// # Errors
/// It could not be started.
pub fn start<'f>(fleet: &'f Fleet, cell: &Cell, engine: Engine, index: u8) -> Result<Box<dyn Subject + 'f>> {
    let place = Place { fleet, index, program: Program::of(&cell.workload) };
    Ok(match engine {
        Engine::Haul(policy) => Box::new(haul::Haul::start(place, policy, cell.haul)?),
        Engine::Runc => Box::new(runc::Runc::start(place)?),
        Engine::Docker => Box::new(docker::Docker::start(place)?),
        Engine::Podman => Box::new(podman::Podman::start(place)?),
    })
}

/// Why an engine cannot take part on this machine.
#[must_use]
pub fn why_not(engine: Engine) -> Option<String> {
    matches!(engine, Engine::Podman).then(podman::why_not).flatten()
}

/// What runs in the container.
#[derive(Debug, Clone)]
struct Program {
    image: &'static str,
    /// Empty for the image's own.
    command: Vec<String>,
}

impl Program {
    fn of(workload: &Workload) -> Self {
        match workload {
            Workload::Writer(spec) => Self { image: image::WRITER, command: writer::command_line(spec) },
            Workload::Redis(_) => Self { image: image::REDIS, command: Vec::new() },
        }
    }
}

/// Where and as what a workload is to run.
#[derive(Debug)]
struct Place<'f> {
    fleet: &'f Fleet,
    index: u8,
    program: Program,
}

impl Place<'_> {
    fn name(&self) -> String {
        format!("bench-{}", self.index)
    }

    fn server(&self) -> SocketAddr {
        SocketAddr::from((self.fleet.container_address(self.index), 6379))
    }

    /// Runs Docker with `verb` and all that makes the container what it is.
    fn docker(&self, host: usize, verb: &[&str]) -> Result<String> {
        let (name, ip) = (self.name(), self.fleet.container_address(self.index).to_string());
        let network = ["--name", &name, "--network", crate::host::LAN, "--ip", &ip, self.program.image];
        let command = self.program.command.iter().map(String::as_str);
        let all: Vec<&str> = verb.iter().copied().chain(network).chain(command).collect();
        self.fleet.host(host).docker(&all)
    }

    /// Runs it on the first host, and tells everybody that it is there: an earlier one may have had the address elsewhere.
    fn run(&self) -> Result<()> {
        self.docker(0, &["run", "--detach"])?;
        let pid = self.fleet.host(0).init_pid(&self.name())?;
        announce(format!("/proc/{pid}/ns/net"), self.fleet.container_address(self.index));
        Ok(())
    }

    /// Removes the container from both hosts' engines, if they have it.
    fn remove(&self) -> Result<()> {
        let name = self.name();
        for host in self.fleet.hosts().iter().take(2) {
            if host.has_container(&name)? {
                on(host, &["rm", "--force", "--volumes", &name], REMOVE)?;
            }
        }
        Ok(())
    }
}

/// Runs Docker's command line against a host's engine, at most for `limit`.
fn on(host: &Host, arguments: &[&str], limit: Duration) -> Result<()> {
    let mut command = Command::new("docker");
    command.arg("-H").arg(format!("unix://{}", host.socket().display())).args(arguments);
    done_within(&mut command, limit)
}

/// Tells everybody where an address is now, from inside the network namespace of that name or path.
///
/// Switches send frames for its old place otherwise until the container says something by itself. It lasts a second, which
/// nobody waits for, and fails when nobody answers, which nobody does.
fn announce(netns: String, address: Ipv4Addr) {
    std::thread::spawn(move || {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={netns}")).args(["busybox", "arping", "-q", "-U", "-c", "2", "-w", "1"]);
        finish(command.args(["-I", "eth0", &address.to_string()]))
    });
}

/// The host that is not this one.
const fn other(host: usize) -> usize {
    1 - host
}

/// Runs a command to its end, at most for `limit`; then it is killed.
fn within(command: &mut Command, limit: Duration) -> Result<Output> {
    let what = format!("{command:?}");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("start {what}"))?;
    end_within(&mut child, &what, limit)?;
    Ok(child.wait_with_output()?)
}

/// As [`within`], for what must succeed.
fn done_within(command: &mut Command, limit: Duration) -> Result<()> {
    let output = within(command, limit)?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("{command:?} ended with {}: {}", output.status, crate::process::tail(said.trim(), 5));
    }
    Ok(())
}

fn end_within(child: &mut Child, what: &str, limit: Duration) -> Result<()> {
    let ended = wait::until(what, limit, || Ok(child.try_wait()?));
    if ended.is_err() {
        child.kill()?;
        child.wait()?;
    }
    ended.map(drop)
}

/// Milliseconds.
fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
