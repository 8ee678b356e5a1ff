//! One Docker host of the fleet: network namespace, mount namespace, Docker engine.

use crate::cgroups;
use crate::net::Segment;
use crate::process::{Daemon, feed, finish, tail};
use crate::wait;
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::io::{Read, Write};
use std::net::Ipv4Addr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// The macvlan network whose containers keep their address when they move.
pub const LAN: &str = "lan";

/// How long an engine may take to answer after its start.
const ENGINE_START: Duration = Duration::from_secs(30);

/// A host. It lives as long as its fleet.
#[derive(Debug)]
pub struct Host {
    name: String,
    fleet: String,
    netns: String,
    address: Ipv4Addr,
    directory: PathBuf,
    engine: Daemon,
}

/// What a host is made from.
pub(crate) struct Plan<'a> {
    pub(crate) segment: &'a Segment,
    pub(crate) letter: char,
    pub(crate) address: Ipv4Addr,
    pub(crate) directory: PathBuf,
    pub(crate) runtime: &'a Path,
    pub(crate) experimental: bool,
}

impl Host {
    /// Makes the namespaces and starts the engine; it does not wait for the engine (see [`Host::wait_ready`]).
    pub(crate) fn start(plan: &Plan<'_>) -> Result<Self> {
        let Plan { segment, letter, address, directory, runtime, experimental } = plan;
        let name = format!("host-{letter}");
        let netns = segment.netns(*letter);
        std::fs::create_dir_all(directory).with_context(|| format!("make {}", directory.display()))?;
        segment.add_host(*letter, *address)?;
        // A machine has a /run of its own. The hosts' are tmpfs in their mount namespaces, gone with their processes.
        // `nsenter`, not `ip netns exec`: that mounts a fresh /sys, which hides the cgroups from the engine.
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net=/run/netns/{netns}"))
            .args(["unshare", "--mount", "--propagation", "private", "sh", "-c"])
            .arg(format!("{} && exec dockerd \"$@\"", cgroups::own_run()))
            .arg("dockerd")
            .arg("--config-file")
            .arg(directory.join("daemon.json"))
            .arg("--data-root")
            .arg(directory.join("data"))
            .arg("--exec-root")
            .arg(directory.join("exec"))
            .arg("--pidfile")
            .arg(directory.join("docker.pid"))
            .arg(format!("--host=unix://{}/docker.sock", directory.display()))
            .arg(format!("--containerd-namespace={name}"))
            .arg(format!("--containerd-plugins-namespace={name}-plugins"))
            .args(cgroups::engine_arguments(&segment.name, *letter))
            .arg(format!("--add-runtime=haul={}", runtime.display()))
            .args(["--storage-driver=overlay2", "--shutdown-timeout=1", "--log-level=warn"]);
        std::fs::write(directory.join("daemon.json"), format!("{{ \"experimental\": {experimental} }}\n"))?;
        let log = directory.join("dockerd.log");
        let engine = Daemon::start(&format!("dockerd of {name}"), &segment.name, command, &log)?;
        Ok(Self {
            name,
            fleet: segment.name.clone(),
            netns,
            address: *address,
            directory: directory.clone(),
            engine,
        })
    }

    /// Waits until the engine answers.
    pub(crate) fn wait_ready(&mut self) -> Result<()> {
        let socket = self.socket();
        let engine = &mut self.engine;
        wait::until(&format!("an answer of the engine of {}", self.name), ENGINE_START, || {
            engine.check_running()?;
            Ok(ping(&socket).then_some(()))
        })
        .with_context(|| format!("the engine's log ends:\n{}", tail(&self.engine.output(), 20)))
    }

    /// Makes the network [`LAN`] on the fleet's segment.
    pub(crate) fn make_lan(&self, subnet: &str, gateway: Ipv4Addr) -> Result<()> {
        self.docker(&[
            "network",
            "create",
            "--driver",
            "macvlan",
            "--subnet",
            subnet,
            "--gateway",
            &gateway.to_string(),
            "--opt",
            "parent=eth0",
            LAN,
        ])
        .map(drop)
    }

    /// The host's name among the services: `host-a`, `host-b`, …
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its address on the fleet's segment.
    #[must_use]
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// The name of its network namespace, under /run/netns.
    #[must_use]
    pub fn netns(&self) -> &str {
        &self.netns
    }

    /// The name of its fleet.
    #[must_use]
    pub fn fleet(&self) -> &str {
        &self.fleet
    }

    /// Its directory: engine data, service state and logs.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The `--state-dir` of its services.
    #[must_use]
    pub fn state_dir(&self) -> PathBuf {
        self.directory.join("state")
    }

    /// Its engine's socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.directory.join("docker.sock")
    }

    /// What the engine has logged.
    #[must_use]
    pub fn engine_log(&self) -> String {
        self.engine.output()
    }

    /// A command that runs `program` in the host's network and mount namespaces.
    #[must_use]
    pub fn command(&self, program: &Path) -> Command {
        self.command_in(&self.netns, program)
    }

    /// As [`Host::command`], but in the network namespace of that name.
    #[must_use]
    pub fn command_in(&self, netns: &str, program: &Path) -> Command {
        let pid = self.engine.pid();
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{netns}")).arg(format!("--mount=/proc/{pid}/ns/mnt")).arg("--");
        command.arg(program);
        command
    }

    /// Where a path of the host's mount namespace is to be found from outside.
    #[must_use]
    pub fn seen_inside(&self, path: &Path) -> PathBuf {
        let root = PathBuf::from(format!("/proc/{}/root", self.engine.pid()));
        root.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// Starts `command`, made by [`Host::command`], as a process of the fleet that logs to `<name>.log` in the
    /// host's directory.
    ///
    /// # Errors
    /// It could not be started.
    pub fn start_daemon(&self, name: &str, command: Command) -> Result<Daemon> {
        let log = self.directory.join(format!("{name}.log"));
        Daemon::start(&format!("{name} of {}", self.name), &self.fleet, command, &log)
    }

    /// Runs Docker's command line against the host's engine and gives what it printed.
    ///
    /// # Errors
    /// The command failed; the error holds what it said.
    pub fn docker(&self, arguments: &[&str]) -> Result<String> {
        finish(self.docker_command().args(arguments))
    }

    /// As [`Host::docker`], with `input` on the command's standard input.
    ///
    /// # Errors
    /// As [`Host::docker`].
    pub fn docker_feed(&self, arguments: &[&str], input: &[u8]) -> Result<String> {
        let socket = format!("unix://{}", self.socket().display());
        let all: Vec<&str> = ["-H", &socket].into_iter().chain(arguments.iter().copied()).collect();
        feed("docker", &all, input)
    }

    fn docker_command(&self) -> Command {
        let mut command = Command::new("docker");
        command.arg("-H").arg(format!("unix://{}", self.socket().display()));
        command
    }

    /// `docker inspect` of a container, parsed.
    ///
    /// # Errors
    /// There is no such container.
    pub fn inspect(&self, container: &str) -> Result<Value> {
        let text = self.docker(&["container", "inspect", container])?;
        let mut list: Vec<Value> = serde_json::from_str(&text)?;
        list.pop().with_context(|| format!("an empty answer about {container}"))
    }

    /// Whether the engine knows a container, running or not, of that name.
    ///
    /// # Errors
    /// The engine does not answer.
    pub fn has_container(&self, name: &str) -> Result<bool> {
        let filter = format!("name=^/{name}$");
        Ok(!self.docker(&["ps", "--all", "--quiet", "--filter", &filter])?.is_empty())
    }

    /// Whether a container of that name exists and runs.
    ///
    /// # Errors
    /// The engine does not answer.
    pub fn is_running(&self, name: &str) -> Result<bool> {
        let filter = format!("name=^/{name}$");
        let status = self.docker(&["ps", "--all", "--filter", &filter, "--format", "{{.State}}"])?;
        Ok(status == "running")
    }

    /// Whether the cgroup of a running container is frozen.
    ///
    /// # Errors
    /// There is no such container or it does not run.
    pub fn is_frozen(&self, container: &str) -> Result<bool> {
        let groups = std::fs::read_to_string(format!("/proc/{}/cgroup", self.init_pid(container)?))?;
        let groups =
            groups.lines().filter_map(|line| line.splitn(3, ':').skip(1).collect::<Vec<_>>().try_into().ok());
        let state = |[kind, path]: [&str; 2]| match kind {
            "freezer" => Some((format!("/sys/fs/cgroup/freezer{path}/freezer.state"), "FROZEN")),
            "" => Some((format!("/sys/fs/cgroup{path}/cgroup.events"), "frozen 1")),
            _ => None,
        };
        // Where there is a hierarchy of version 1 for it, the unified one has no freezer.
        let said = groups
            .filter_map(state)
            .find_map(|(file, word)| std::fs::read_to_string(file).ok().map(|text| text.contains(word)));
        said.with_context(|| format!("{container} is in no cgroup that could be frozen"))
    }

    /// The process id, on the machine, of a running container's init.
    ///
    /// # Errors
    /// There is no such container or it does not run.
    pub fn init_pid(&self, container: &str) -> Result<u32> {
        let pid = self.inspect(container)?.pointer("/State/Pid").and_then(Value::as_u64).unwrap_or_default();
        if pid == 0 {
            bail!("{container} does not run on {}", self.name);
        }
        Ok(u32::try_from(pid)?)
    }
}

/// One HTTP request for Docker's `_ping`. Any failure means: not yet.
fn ping(socket: &Path) -> bool {
    let Ok(mut stream) = UnixStream::connect(socket) else { return false };
    let mut answer = String::new();
    stream.write_all(b"GET /_ping HTTP/1.0\r\nHost: docker\r\n\r\n").is_ok()
        && stream.set_read_timeout(Some(wait::limit(Duration::from_secs(2)))).is_ok()
        && stream.read_to_string(&mut answer).is_ok()
        && answer.split_whitespace().nth(1) == Some("200")
}
