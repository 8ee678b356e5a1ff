//! Haulage's services as separate processes on the fleet.

use crate::fleet::Fleet;
use crate::host::Host;
use crate::nats::NatsServer;
use crate::process::{Daemon, tail};
use crate::wait;
use anyhow::{Context, Result, bail};
use haulage_protocol::rpc::Service;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// How long a service may take from its start until NATS knows it.
const ANNOUNCE: Duration = Duration::from_secs(20);

/// How long a service may take to end when asked.
const DRAIN: Duration = Duration::from_secs(20);

/// The services that every host runs, with their programs.
const ON_EVERY_HOST: [(Service, &str); 4] = [
    (Service::Checkpointer, "haul-checkpointer"),
    (Service::PageShipper, "haul-page-shipper"),
    (Service::Syncer, "haul-syncer"),
    (Service::Restorer, "haul-restorer"),
];

/// One service of one host.
#[derive(Debug)]
struct Running {
    host: usize,
    service: Service,
    daemon: Daemon,
}

/// The running services of a fleet.
#[derive(Debug)]
pub struct Services {
    services: Vec<Running>,
    coordinators: Vec<Option<Daemon>>,
}

impl Services {
    /// Starts all of them; see [`Fleet::start_services`].
    pub(crate) fn start(fleet: &Fleet, on_every_host: &[Service]) -> Result<Self> {
        let mut all = Self { services: Vec::new(), coordinators: Vec::new() };
        for (index, _) in fleet.hosts().iter().enumerate() {
            for service in on_every_host {
                all.start_service(fleet, index, *service)?;
            }
        }
        all.start_coordinator(fleet, &[])?;
        all.wait_announced(fleet)?;
        Ok(all)
    }

    /// Starts one service of a host, by index. It does not wait for it (see [`Services::wait_announced`]).
    ///
    /// # Errors
    /// It could not be started.
    pub fn start_service(&mut self, fleet: &Fleet, host: usize, service: Service) -> Result<()> {
        let on = fleet.host(host);
        let daemon =
            start_on(on, fleet.nats()?, fleet.binaries(), &fleet.directory().join("bucket"), service)?;
        self.services.push(Running { host, service, daemon });
        Ok(())
    }

    /// Starts one more coordinator, in the root namespace, with these arguments, and gives its index.
    ///
    /// # Errors
    /// It could not be started.
    pub fn start_coordinator(&mut self, fleet: &Fleet, arguments: &[&str]) -> Result<usize> {
        let index = self.coordinators.len();
        let mut command = Command::new(program(fleet.binaries(), "haul-coordinator")?);
        command.args(["--nats", &fleet.nats()?.url()]).args(arguments);
        let log = fleet.directory().join(format!("haul-coordinator-{index}.log"));
        self.coordinators.push(Some(Daemon::start("haul-coordinator", fleet.name(), command, &log)?));
        Ok(index)
    }

    /// Kills a coordinator with SIGKILL.
    ///
    /// # Errors
    /// There is none with this index, or it was killed before.
    pub fn kill_coordinator(&mut self, index: usize) -> Result<()> {
        let slot = self.coordinators.get_mut(index).and_then(Option::take);
        slot.with_context(|| format!("no coordinator {index} runs"))?.kill().map(drop)
    }

    /// Kills a service of a host with SIGKILL.
    ///
    /// # Errors
    /// It does not run.
    pub fn kill_service(&mut self, host: usize, service: Service) -> Result<()> {
        self.take(host, service)?.kill().map(drop)
    }

    /// Asks a service of a host to end, and waits until it has.
    ///
    /// # Errors
    /// It does not run, or it did not end in time.
    pub fn stop_service(&mut self, host: usize, service: Service) -> Result<()> {
        let status = self.take(host, service)?.terminate(DRAIN)?;
        if !status.success() {
            bail!("{service} of host {host} ended with {status}");
        }
        Ok(())
    }

    fn take(&mut self, host: usize, service: Service) -> Result<Daemon> {
        let at = self.services.iter().position(|r| r.host == host && r.service == service);
        let at = at.with_context(|| format!("{service} of host {host} does not run"))?;
        Ok(self.services.swap_remove(at).daemon)
    }

    /// Waits until every running service has announced itself in the host registry, which is what a coordinator goes
    /// by. Fails at once if one has ended.
    ///
    /// # Errors
    /// One ended or did not announce itself; the error holds the end of its log.
    pub fn wait_announced(&mut self, fleet: &Fleet) -> Result<()> {
        let expected: Vec<Announced> = self
            .services
            .iter()
            .map(|r| (fleet.host(r.host).name().to_owned(), r.service.as_str().to_owned(), r.daemon.pid()))
            .collect();
        wait::until("the announcement of all services", ANNOUNCE, || {
            self.check_running()?;
            let answer = fleet.haul(&["hosts", "--json"])?;
            let known = if answer.code == 0 { announced(&answer.json()?) } else { Vec::new() };
            Ok(expected.iter().all(|service| known.contains(service)).then_some(()))
        })
        .with_context(|| format!("the services' logs end:\n{}", self.logs(5)))
    }

    /// Fails if a service or coordinator has ended by itself.
    ///
    /// # Errors
    /// One has ended; the error holds the end of its log.
    pub fn check_running(&mut self) -> Result<()> {
        let coordinators = self.coordinators.iter_mut().flatten();
        self.services
            .iter_mut()
            .map(|r| &mut r.daemon)
            .chain(coordinators)
            .try_for_each(Daemon::check_running)
    }

    /// The last lines of every log, for a failure's report.
    #[must_use]
    pub fn logs(&self, lines: usize) -> String {
        let daemons = self.services.iter().map(|r| &r.daemon).chain(self.coordinators.iter().flatten());
        daemons.map(|d| format!("== {}\n{}\n", d.log().display(), tail(&d.output(), lines))).collect()
    }
}

fn start_on(
    on: &Host,
    nats: &NatsServer,
    binaries: &Path,
    bucket: &Path,
    service: Service,
) -> Result<Daemon> {
    let name = ON_EVERY_HOST.iter().find(|(s, _)| *s == service).map(|(_, name)| *name);
    let name = name.with_context(|| format!("{service} is not a service of hosts"))?;
    let mut command = on.command(&program(binaries, name)?);
    command
        .args(["--nats", &nats.url(), "--host", on.name()])
        .arg("--state-dir")
        .arg(on.state_dir())
        .arg("--docker")
        .arg(format!("unix://{}", on.socket().display()))
        .arg("--bucket")
        .arg(format!("file://{}", bucket.display()))
        // The host's own tmpfs, which goes with its mount namespace.
        .args(["--page-dir", "/run"])
        .arg("--bulk-listen")
        .arg(format!("{}:0", on.address()));
    on.start_daemon(name, command)
}

/// A program of the workspace.
pub(crate) fn program(binaries: &Path, name: &str) -> Result<PathBuf> {
    let path = binaries.join(name);
    if !path.exists() {
        bail!("{} is missing: run `cargo build --workspace`", path.display());
    }
    Ok(path)
}

/// A service in the registry: host, service, process id.
type Announced = (String, String, u32);

/// The services in an answer of `haul hosts --json`: a list for each host.
fn announced(hosts: &Value) -> Vec<Announced> {
    let services = hosts.as_object().into_iter().flatten();
    let services =
        services.flat_map(|(host, list)| list.as_array().into_iter().flatten().map(move |s| (host, s)));
    services
        .filter_map(|(host, s)| {
            let pid = u32::try_from(s.get("pid")?.as_u64()?).ok()?;
            Some((host.clone(), s.get("service")?.as_str()?.to_owned(), pid))
        })
        .collect()
}

impl Fleet {
    /// Kills a service of a host with SIGKILL and starts it again, as an init system would, without waiting for it.
    ///
    /// # Errors
    /// The services have not been started, or it does not run.
    pub fn restart_service(&mut self, host: usize, service: Service) -> Result<()> {
        self.with_services(|services, fleet| {
            services.kill_service(host, service)?;
            services.start_service(fleet, host, service)
        })
    }

    /// Starts all services of a host that were killed, and waits until they are announced.
    ///
    /// # Errors
    /// It could not be started.
    pub fn revive(&mut self, host: usize) -> Result<()> {
        self.with_services(|services, fleet| {
            for service in Service::ALL {
                services.start_service(fleet, host, service)?;
            }
            services.wait_announced(fleet)
        })
    }

    /// Starts one more coordinator, with these arguments, and gives its index.
    ///
    /// # Errors
    /// It could not be started.
    pub fn add_coordinator(&mut self, arguments: &[&str]) -> Result<usize> {
        self.with_services(|services, fleet| services.start_coordinator(fleet, arguments))
    }

    fn with_services<T>(&mut self, act: impl FnOnce(&mut Services, &Self) -> Result<T>) -> Result<T> {
        let mut services = self.take_services()?;
        let done = act(&mut services, self);
        self.put_services(services);
        done
    }

    /// Kills the coordinator with this index, starts another, and gives its index.
    ///
    /// # Errors
    /// The services have not been started, or it does not run.
    pub fn replace_coordinator(&mut self, index: usize) -> Result<usize> {
        self.with_services(|services, fleet| {
            services.kill_coordinator(index)?;
            services.start_coordinator(fleet, &[])
        })
    }
}
