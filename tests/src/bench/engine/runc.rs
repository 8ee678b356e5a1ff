//! `runc checkpoint`, a copy, `runc restore`, without pre-copy: what P.Haul does for Docker's containers.
//!
//! Everything is done in its favour. The images lie in memory (tmpfs) on both hosts. The bundle and the network
//! namespace of the target are made before the move is asked for. Connections survive, and those that the server has not
//! accepted yet are no obstacle.

use super::{Moved, Place, REMOVE, Subject, copy::copy, end_within, ms, network::drop_tcp, other};
use crate::host::Host;
use crate::process::{finish, run, tail};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// A container of runc alone.
#[derive(Debug)]
pub(super) struct Runc<'f> {
    place: Place<'f>,
    host: usize,
}

impl<'f> Runc<'f> {
    pub(super) fn start(place: Place<'f>) -> Result<Self> {
        let mut this = Self { place, host: 0 };
        for host in 0..2 {
            this.make_bundle(host).context("make a bundle for runc")?;
        }
        this.place.make_network(0)?;
        this.place.open_network(0)?;
        drop_tcp(&this.place.netns(0), false)?;
        let mut command = this.runc(0, &["run", "--detach", "--bundle"]);
        command.arg(this.directory(0).join("bundle")).arg(this.place.name());
        if let Err(e) = this.finish(0, &mut command, REMOVE) {
            this.remove()?;
            return Err(e);
        }
        Ok(this)
    }

    fn at(&self, host: usize) -> &Host {
        self.place.fleet.host(host)
    }

    fn directory(&self, host: usize) -> PathBuf {
        self.at(host).directory().join(self.place.name())
    }

    fn images(&self, host: usize) -> PathBuf {
        self.directory(host).join("images")
    }

    fn runc(&self, host: usize, arguments: &[&str]) -> Command {
        let mut command = Command::new("runc");
        command.arg("--root").arg(self.directory(host).join("state"));
        command.arg("--log").arg(self.directory(host).join("runc.log")).args(arguments);
        command
    }

    /// Runs a command of [`Runc::runc`] to its end. The container inherits its streams, so they must lead nowhere.
    fn finish(&self, host: usize, command: &mut Command, limit: Duration) -> Result<()> {
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = command.spawn().context("start runc")?;
        end_within(&mut child, "end of runc", limit)?;
        let status = child.wait()?;
        let said = fs::read_to_string(self.directory(host).join("runc.log")).unwrap_or_default();
        ensure!(status.success(), "{command:?} ended with {status}: {}", tail(&said, 5));
        Ok(())
    }

    fn make_bundle(&self, host: usize) -> Result<()> {
        let (directory, on, name) = (self.directory(host), self.at(host), self.place.name());
        let rootfs = directory.join("bundle/rootfs");
        fs::create_dir_all(&rootfs)?;
        fs::create_dir_all(self.images(host))?;
        run("mount", &["-t".as_ref(), "tmpfs".as_ref(), "tmpfs".as_ref(), self.images(host).as_os_str()])?;
        fs::write(directory.join("criu.conf"), "tcp-established\nskip-in-flight\n")?;
        self.place.docker(host, &["create"])?;
        let archive = directory.join("rootfs.tar");
        on.docker(&["export", "--output", &archive.display().to_string(), &name])?;
        finish(Command::new("tar").arg("-xf").arg(&archive).arg("-C").arg(&rootfs))?;
        let about = on.inspect(&name)?;
        on.docker(&["rm", &name])?;
        fs::remove_file(archive)?;
        let config = self.config(host, &about);
        Ok(fs::write(directory.join("bundle/config.json"), serde_json::to_vec_pretty(&config)?)?)
    }

    fn config(&self, host: usize, about: &Value) -> Value {
        let of = |pointer: &str| about.pointer(pointer).cloned().unwrap_or_default();
        let capabilities = ["CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_KILL", "CAP_SETGID", "CAP_SETUID"];
        let mount = |to: &str, kind: &str, options: &[&str]| json!({ "destination": to, "type": kind, "source": kind, "options": options });
        json!({
            "ociVersion": "1.0.2",
            "process": {
                "user": { "uid": 0, "gid": 0 },
                "args": of("/Config/Cmd"), "env": of("/Config/Env"), "cwd": of("/Config/WorkingDir"),
                "capabilities": { "bounding": capabilities, "effective": capabilities, "permitted": capabilities },
                "noNewPrivileges": true,
            },
            "root": { "path": "rootfs" },
            "hostname": self.place.name(),
            "annotations": { "org.criu.config": self.directory(host).join("criu.conf") },
            "mounts": [
                mount("/proc", "proc", &[]),
                mount("/dev", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
                mount("/dev/pts", "devpts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]),
                mount("/dev/shm", "tmpfs", &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]),
                mount("/dev/mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
            ],
            "linux": {
                // The janitor finds what is left of the container by this.
                "cgroupsPath": format!("/{}/{}", self.place.fleet.name(), self.place.name()),
                "namespaces": [
                    { "type": "pid" }, { "type": "ipc" }, { "type": "uts" }, { "type": "mount" },
                    { "type": "network", "path": format!("/run/netns/{}", self.place.netns(host)) },
                ],
            },
        })
    }
}

impl Subject for Runc<'_> {
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
        let images = |host: usize| self.images(host).join("dump");
        let run = |host: usize, verb: &str, arguments: &[&str]| {
            let mut command = self.runc(host, &[verb, "--tcp-established", "--file-locks", "--image-path"]);
            command.arg(images(host)).arg("--work-path").arg(self.directory(host)).args(arguments);
            self.finish(host, &mut command, left())
        };

        fs::create_dir_all(images(from))?;
        let at = Instant::now();
        run(from, "checkpoint", &[&name])?;
        part("dump", at);
        let at = Instant::now();
        // What is left of the source's network would go on answering for the address.
        self.place.remove_network(from)?;
        copy(self.at(from), &images(from), self.at(to), &images(to), left())?;
        part("ship", at);
        let at = Instant::now();
        let bundle = self.directory(to).join("bundle").display().to_string();
        self.place.open_network(to)?;
        run(to, "restore", &["--detach", "--bundle", &bundle, &name])?;
        drop_tcp(&self.place.netns(to), false)?;
        part("restore", at);
        let total = ms(began.elapsed());
        for host in [from, to] {
            fs::remove_dir_all(images(host))?;
        }
        self.host = to;
        Ok(Moved { total, freeze: Some(total), split, ..Moved::default() })
    }

    fn remove(&mut self) -> Result<()> {
        for host in 0..2 {
            let name = self.place.name();
            let mut command = self.runc(host, &["delete", "--force", &name]);
            self.finish(host, &mut command, REMOVE)?;
            self.place.remove_network(host)?;
            if self.images(host).exists() {
                let images = self.images(host);
                run("umount", &["--lazy".as_ref(), images.as_os_str()])?;
            }
            if self.directory(host).exists() {
                fs::remove_dir_all(self.directory(host))?;
            }
        }
        self.place.remove()
    }
}
