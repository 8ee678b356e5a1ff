//! `podman container checkpoint --export`, a copy, `podman container restore --import`, without pre-checkpoints.
//!
//! Podman has no daemon. It runs in each host's namespaces with a store of its own for every container, and the container in
//! the network namespace that Podman is run in (`--network host`), which is made as for runc.
//!
//! Everything is done in its favour. The store, and with it checkpoint and archive, lies in memory (tmpfs) on both hosts, and
//! the archive is not compressed. The image is on the target before the move is asked for. Connections survive, and those that
//! the server has not accepted yet are no obstacle.

use super::{Moved, Place, REMOVE, Subject, copy::copy, ms, network::drop_tcp, other, within};
use crate::host::Host;
use crate::process::{FLEET_VARIABLE, finish, run, tail};
use crate::{fleet, image};
use anyhow::{Context, Result, bail, ensure};
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// What checkpoint and restore are both told.
const KEEP: [&str; 2] = ["--tcp-established", "--file-locks"];

/// Why Podman cannot take part on this machine.
pub(super) fn why_not() -> Option<String> {
    let is_there = fleet::is_on_path("podman");
    (!is_there).then(|| "podman is not installed (apt-get install --no-install-recommends podman)".to_owned())
}

/// A container of Podman's.
#[derive(Debug)]
pub(super) struct Podman<'f> {
    place: Place<'f>,
    host: usize,
}

impl<'f> Podman<'f> {
    pub(super) fn start(place: Place<'f>) -> Result<Self> {
        let mut this = Self { place, host: 0 };
        let Err(e) = this.run() else { return Ok(this) };
        match this.remove() {
            Ok(()) => Err(e),
            Err(left) => bail!("{e:#}; and what was started is not removed: {left:#}"),
        }
    }

    fn run(&self) -> Result<()> {
        for host in 0..2 {
            self.make_store(host).context("make a store for podman")?;
        }
        self.place.make_network(0)?;
        self.place.open_network(0)?;
        drop_tcp(&self.place.netns(0), false)?;
        let Place { fleet, program, .. } = &self.place;
        let mut command = self.in_network(0, &["run", "--detach", "--pull", "never", "--network", "host"]);
        // The janitor finds what is left of the container by its cgroup. Podman's own limits are more than a machine without
        // CAP_SYS_RESOURCE allows.
        command.args([
            "--cgroup-parent",
            &format!("/{}/{}", fleet.name(), self.place.name()),
            "--ulimit",
            "host",
        ]);
        command.arg("--annotation").arg(format!("org.criu.config={}/criu.conf", self.store().display()));
        command.args(["--name", &self.place.name(), &format!("localhost/{}", program.image)]);
        done(command.args(&program.command), REMOVE)
    }

    fn at(&self, host: usize) -> &Host {
        self.place.fleet.host(host)
    }

    /// All that Podman has on a host: a file system in memory, mounted in the host's mount namespace only, as is what Podman
    /// mounts below. The path is the same on both, since the container's configuration, which moves, holds such paths.
    fn store(&self) -> PathBuf {
        self.place.fleet.directory().join(self.place.name())
    }

    /// Where the store of a host is seen from outside.
    fn seen(&self, host: usize) -> PathBuf {
        self.at(host).seen_inside(&self.store())
    }

    fn make_store(&self, host: usize) -> Result<()> {
        let (on, store) = (self.at(host), self.store());
        fs::create_dir_all(&store)?;
        finish(on.command(Path::new("mount")).args(["-t", "tmpfs", "tmpfs"]).arg(&store))?;
        let seen = self.seen(host);
        fs::create_dir(seen.join("export"))?;
        let store = store.display();
        // Locks in shared memory are the machine's; so are the configuration and the lock of its networks.
        let containers = format!(
            "[engine]\nruntime = \"runc\"\ncgroup_manager = \"cgroupfs\"\nlock_type = \"file\"\nevents_logger = \"none\"\n\
             image_copy_tmp_dir = \"{store}\"\n[network]\nnetwork_config_dir = \"{store}/networks\"\n\
             [containers]\nlog_driver = \"none\"\n"
        );
        let storage = format!(
            "[storage]\ndriver = \"overlay\"\ngraphroot = \"{store}/root\"\nrunroot = \"{store}/run\"\n"
        );
        fs::write(seen.join("containers.conf"), containers)?;
        fs::write(seen.join("storage.conf"), storage)?;
        fs::write(seen.join("criu.conf"), "tcp-established\nskip-in-flight\n")?;
        // Podman keeps notes about layers that it copies below /var/lib, wherever its store is.
        let aside = "mount -t tmpfs tmpfs /var/lib && exec \"$@\"";
        let mut command = on.command(Path::new("unshare"));
        command.args(["--mount", "sh", "-c", aside, "sh", "podman"]);
        let mut command = self.told(command, &["load", "--quiet", "--input"]);
        done(command.arg(image::archive()?), REMOVE)
    }

    /// Podman in a host's own network namespace.
    fn podman(&self, host: usize, arguments: &[&str]) -> Command {
        self.told(self.at(host).command(Path::new("podman")), arguments)
    }

    /// Podman in the container's network namespace.
    fn in_network(&self, host: usize, arguments: &[&str]) -> Command {
        let command = self.at(host).command_in(&self.place.netns(host), Path::new("podman"));
        self.told(command, arguments)
    }

    /// Tells a command that ends in `podman` about the store, and what to do.
    fn told(&self, mut command: Command, arguments: &[&str]) -> Command {
        let store = self.store();
        command.env(FLEET_VARIABLE, self.place.fleet.name());
        command.env("CONTAINERS_CONF", store.join("containers.conf"));
        command.env("CONTAINERS_STORAGE_CONF", store.join("storage.conf"));
        for (option, name) in [("--root", "root"), ("--runroot", "run"), ("--tmpdir", "tmp")] {
            command.arg(option).arg(store.join(name));
        }
        command.args(arguments);
        command
    }
}

impl Subject for Podman<'_> {
    fn server(&self) -> SocketAddr {
        self.place.server()
    }

    fn host(&self) -> usize {
        self.host
    }

    fn keeps_connections(&self) -> bool {
        true
    }

    fn prepare(&mut self) -> Result<()> {
        self.place.renew_network(other(self.host))
    }

    fn go(&mut self, limit: Duration) -> Result<Moved> {
        let (from, to, name) = (self.host, other(self.host), self.place.name());
        let began = Instant::now();
        let left = || limit.saturating_sub(began.elapsed());
        let mut split = Vec::new();
        let mut part = |what: &str, since: Instant| split.push((what.to_owned(), ms(since.elapsed())));
        let archive = self.store().join("export/checkpoint.tar");
        let export = |host: usize| self.seen(host).join("export");

        let at = Instant::now();
        let mut command =
            self.in_network(from, &["container", "checkpoint", "--compress", "none", "--export"]);
        done(command.arg(&archive).args(KEEP).arg(&name), left())?;
        part("dump", at);
        let at = Instant::now();
        // Podman's processes may hold the namespace a moment longer, and the source would go on answering for the address.
        run("ip", &["-n", &self.place.netns(from), "link", "delete", "eth0"])?;
        // Podman kills what it finds in the cgroup of a container that it removes. The hosts of a fleet have their cgroups in
        // common, and the container's is the same on both: it must be removed before it is restored.
        std::thread::scope(|scope| {
            let removal = scope.spawn(|| done(&mut self.podman(from, &["rm", &name]), left()));
            copy(self.at(from), &export(from), self.at(to), &export(to), left())?;
            removal.join().unwrap_or_else(|_| bail!("the removal from the source panicked"))
        })?;
        part("ship", at);
        let at = Instant::now();
        self.place.open_network(to)?;
        let mut command = self.in_network(to, &["container", "restore", "--import"]);
        done(command.arg(&archive).args(KEEP), left())?;
        drop_tcp(&self.place.netns(to), false)?;
        part("restore", at);
        let total = ms(began.elapsed());
        for host in [from, to] {
            fs::remove_file(export(host).join("checkpoint.tar"))?;
        }
        self.host = to;
        Ok(Moved { total, freeze: Some(total), split, ..Moved::default() })
    }

    fn remove(&mut self) -> Result<()> {
        let mut removed = Vec::new();
        let everything = ["rm", "--all", "--force", "--time", "0"];
        for host in 0..2 {
            if self.seen(host).join("export").exists() {
                removed.push(done(&mut self.podman(host, &everything), REMOVE));
                // Lazily: what Podman has mounted below goes with it.
                finish(self.at(host).command(Path::new("umount")).arg("--lazy").arg(self.store()))?;
            }
            self.place.remove_network(host)?;
        }
        fs::remove_dir(self.store())?;
        removed.into_iter().collect()
    }
}

/// Runs Podman to its end. Its own words are all that an error holds: the report has room for one line.
fn done(command: &mut Command, limit: Duration) -> Result<()> {
    let output = within(command, limit)?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "podman: {}", tail(said.trim(), 5).replace('\n', "; "));
    Ok(())
}
