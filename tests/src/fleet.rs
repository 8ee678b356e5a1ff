//! Building a fleet and taking it down.

use crate::host::{Host, Plan};
use crate::image;
use crate::janitor::Janitor;
use crate::nats::NatsServer;
use crate::net::{GATEWAY, Segment};
use crate::services::Services;
use anyhow::{Context, Result, bail};
use haulage_protocol::rpc::Service;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

/// Where fleets live. On disk rather than in /tmp, which may be a tmpfs: overlay mounts need a real file system. The
/// path is short because a Unix socket's is limited to 107 bytes.
const ROOT: &str = "/var/tmp";

/// Hosts are at `.11`, `.12`, …; containers get the addresses from here on.
const FIRST_HOST: u8 = 11;
const FIRST_CONTAINER: u8 = 100;

/// What a fleet shall have. [`FleetBuilder::start`] makes it.
#[derive(Debug, Clone)]
pub struct FleetBuilder {
    hosts: u8,
    without_images: Vec<usize>,
    experimental: bool,
}

impl Default for FleetBuilder {
    fn default() -> Self {
        Self { hosts: 2, without_images: Vec::new(), experimental: false }
    }
}

impl FleetBuilder {
    /// The number of hosts, 1 to 8; 2 unless told.
    #[must_use]
    pub fn hosts(mut self, count: u8) -> Self {
        self.hosts = count;
        self
    }

    /// The host with this index gets no test images.
    #[must_use]
    pub fn without_images(mut self, host: usize) -> Self {
        self.without_images.push(host);
        self
    }

    /// The engines get their experimental features, of which `docker checkpoint` is one.
    #[must_use]
    pub fn experimental(mut self) -> Self {
        self.experimental = true;
        self
    }

    /// Starts the hosts, their engines and the NATS server, and waits until all answer.
    ///
    /// # Errors
    /// Something could not be made or started. What had been made is removed.
    pub fn start(&self) -> Result<Fleet> {
        if !(1..=8).contains(&self.hosts) {
            bail!("{} hosts: a fleet has 1 to 8", self.hosts);
        }
        check_machine()?;
        let binaries = binaries()?;
        let runtime = binaries.join("haul-runtime");
        let images = image::archive()?;

        let segment = Segment::choose()?;
        let directory = Path::new(ROOT).join(&segment.name);
        // From here on the fleet exists, and dropping it, on whichever error, removes what has been made of it.
        segment.create()?;
        let janitor = Janitor::watch(&segment.name, &directory)?;
        let mut fleet = Fleet {
            services: None,
            nats: None,
            hosts: Vec::new(),
            janitor,
            kept: false,
            segment,
            directory,
            binaries,
        };
        std::fs::create_dir(&fleet.directory)
            .with_context(|| format!("make {}", fleet.directory.display()))?;
        std::fs::create_dir(fleet.directory.join("bucket"))?;

        for (index, letter) in (0..self.hosts).zip('a'..) {
            let host = Host::start(&Plan {
                segment: &fleet.segment,
                letter,
                address: fleet.segment.subnet.address(FIRST_HOST + index),
                directory: fleet.directory.join(format!("host-{letter}")),
                runtime: &runtime,
                experimental: self.experimental,
            })?;
            fleet.hosts.push(host);
        }
        fleet.nats = Some(NatsServer::start(
            &fleet.segment.name,
            fleet.segment.subnet.address(GATEWAY),
            &fleet.directory.join("nats"),
        )?);
        let subnet = fleet.segment.subnet;
        std::thread::scope(|scope| {
            let work: Vec<_> = fleet
                .hosts
                .iter_mut()
                .enumerate()
                .map(|(index, host)| {
                    let images = (!self.without_images.contains(&index)).then_some(images.as_path());
                    scope.spawn(move || -> Result<()> {
                        host.wait_ready()?;
                        host.make_lan(&subnet.cidr(), subnet.address(GATEWAY))?;
                        images.map_or(Ok(()), |archive| image::load(host, archive))
                    })
                })
                .collect();
            work.into_iter()
                .try_for_each(|thread| thread.join().unwrap_or_else(|_| bail!("preparing a host panicked")))
        })?;
        Ok(fleet)
    }
}

/// A running fleet. Dropping it removes everything it made.
#[derive(Debug)]
pub struct Fleet {
    // Dropped in this order: services first, the janitor's work last (see `Drop`).
    services: Option<Services>,
    nats: Option<NatsServer>,
    hosts: Vec<Host>,
    janitor: Janitor,
    kept: bool,
    segment: Segment,
    directory: PathBuf,
    binaries: PathBuf,
}

impl Fleet {
    /// Two hosts, with images.
    ///
    /// # Errors
    /// As [`FleetBuilder::start`].
    pub fn start() -> Result<Self> {
        FleetBuilder::default().start()
    }

    /// Starts a fleet with other properties.
    #[must_use]
    pub fn builder() -> FleetBuilder {
        FleetBuilder::default()
    }

    /// The fleet's name, which occurs in the name of everything it makes.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.segment.name
    }

    /// The directory of all its files and logs.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Where the workspace's programs are.
    #[must_use]
    pub fn binaries(&self) -> &Path {
        &self.binaries
    }

    /// The host with the given index: 0 is `host-a`.
    ///
    /// # Panics
    /// There is no such host: a mistake of the test.
    #[must_use]
    #[expect(clippy::panic, reason = "a test that asks for a host it did not order is wrong")]
    pub fn host(&self, index: usize) -> &Host {
        self.hosts.get(index).unwrap_or_else(|| panic!("the fleet has no host {index}"))
    }

    /// All hosts.
    #[must_use]
    pub fn hosts(&self) -> &[Host] {
        &self.hosts
    }

    /// Both ends of every host's cable: the namespace and the device in it.
    pub fn cable_ends(&self) -> impl Iterator<Item = (String, String)> {
        let letters = self.hosts.iter().zip('a'..).map(|(_, letter)| letter);
        letters.flat_map(|letter| self.segment.cable_ends(letter))
    }

    /// An address on the fleet's segment for the container with the given index, 0 to 99.
    #[must_use]
    pub fn container_address(&self, index: u8) -> Ipv4Addr {
        self.segment.subnet.address(FIRST_CONTAINER.saturating_add(index))
    }

    /// Cuts a host off from all others: NATS, bulk streams and its containers' clients. Its engine's socket still
    /// answers, since that is a file of this machine.
    ///
    /// # Errors
    /// `ip` failed.
    pub fn cut_off(&self, host: usize) -> Result<()> {
        self.segment.plug(self.letter(host)?, false)
    }

    /// Undoes [`Fleet::cut_off`].
    ///
    /// # Errors
    /// `ip` failed.
    pub fn reconnect(&self, host: usize) -> Result<()> {
        self.segment.plug(self.letter(host)?, true)
    }

    fn letter(&self, host: usize) -> Result<char> {
        self.host(host).name().chars().last().context("a host without a letter")
    }

    /// The NATS server.
    ///
    /// # Errors
    /// It has been stopped.
    pub fn nats(&self) -> Result<&NatsServer> {
        self.nats.as_ref().context("the NATS server has been stopped")
    }

    /// Starts all services of all hosts and one coordinator, and waits until all are announced.
    ///
    /// # Errors
    /// One could not be started, ended, or did not announce itself in time; the error holds the end of its log.
    pub fn start_services(&mut self) -> Result<()> {
        self.start_services_of(&Service::ALL)
    }

    /// As [`Fleet::start_services`], but with only these services on every host.
    ///
    /// # Errors
    /// As [`Fleet::start_services`].
    pub fn start_services_of(&mut self, on_every_host: &[Service]) -> Result<()> {
        self.services = Some(Services::start(self, on_every_host)?);
        Ok(())
    }

    /// The running services.
    ///
    /// # Errors
    /// [`Fleet::start_services`] has not been called.
    pub fn services(&mut self) -> Result<&mut Services> {
        self.services.as_mut().context("the services have not been started")
    }

    pub(crate) fn take_services(&mut self) -> Result<Services> {
        self.services.take().context("the services have not been started")
    }

    pub(crate) fn put_services(&mut self, services: Services) {
        self.services = Some(services);
    }

    /// Leaves everything running when this process ends. [`remove`] takes it down later.
    ///
    /// # Errors
    /// The janitor is gone.
    pub fn keep(mut self) -> Result<()> {
        self.janitor.dismiss()?;
        self.kept = true;
        // The handles' own Drop would kill their processes.
        std::mem::forget(self);
        Ok(())
    }

    /// Removes the fleet and tells what could not be removed, which dropping it can only print.
    ///
    /// # Errors
    /// Something is left; the error names it.
    pub fn stop(mut self) -> Result<()> {
        self.kept = true;
        self.janitor.clean()
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        if let Err(e) = self.janitor.clean() {
            eprintln!("fleet {}: {e:#}", self.segment.name);
        }
    }
}

/// Removes a fleet that was left running by [`Fleet::keep`].
///
/// # Errors
/// `name` is not a fleet's name, or something could not be removed.
pub fn remove(name: &str) -> Result<()> {
    Janitor::watch(name, &Path::new(ROOT).join(name))?.clean()
}

/// The directory of the workspace's programs: that of this program, or its parent when this is a test.
fn binaries() -> Result<PathBuf> {
    let own = std::env::current_exe().context("find this program's own path")?;
    let directory = own.parent().context("this program has no directory")?;
    // Tests and examples lie below the programs.
    let below = directory.ends_with("deps") || directory.ends_with("examples");
    Ok(directory.parent().filter(|_| below).unwrap_or(directory).to_owned())
}

/// Fails with the remedy when the machine lacks what a fleet needs.
fn check_machine() -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        bail!("a fleet makes namespaces and Docker engines: run as root");
    }
    for program in ["dockerd", "docker", "runc", "criu", "nats-server", "ip", "nsenter", "busybox", "cc"] {
        if !is_on_path(program) {
            bail!("{program} is not on PATH: run deploy/setup");
        }
    }
    Ok(())
}

/// Whether a program is installed.
pub(crate) fn is_on_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|directory| directory.join(program).exists())
}
