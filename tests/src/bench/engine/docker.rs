//! `docker checkpoint create`, a copy, `docker start --checkpoint`: the commands of the patent.
//!
//! Docker restores only from the container's own directory, so the checkpoint is copied into that of a container which
//! was created on the other host in advance. It takes no options for TCP: there must be no connections. It does not announce
//! the address on its new host either; that is done for it.

use super::{Moved, Place, REMOVE, Subject, announce, copy::copy, ms, on, other};
use crate::host::Host;
use anyhow::{Context, Result};
use serde_json::Value;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// A container that Docker itself moves.
#[derive(Debug)]
pub(super) struct Docker<'f> {
    place: Place<'f>,
    host: usize,
    /// Each has a checkpoint of its own: Docker refuses a second one of a name.
    moves: u32,
}

impl<'f> Docker<'f> {
    pub(super) fn start(place: Place<'f>) -> Result<Self> {
        place.run()?;
        Ok(Self { place, host: 0, moves: 0 })
    }

    fn checkpoint(&self) -> String {
        format!("move-{}", self.moves)
    }

    fn checkpoint_of(&self, host: &Host) -> Result<PathBuf> {
        let about = host.inspect(&self.place.name())?;
        let id = about.get("Id").and_then(Value::as_str).context("a container without an id")?;
        Ok(host.directory().join("data/containers").join(id).join("checkpoints").join(self.checkpoint()))
    }
}

impl Subject for Docker<'_> {
    fn server(&self) -> SocketAddr {
        self.place.server()
    }

    fn host(&self) -> usize {
        self.host
    }

    fn keeps_connections(&self) -> bool {
        false
    }

    fn prepare(&mut self) -> Result<()> {
        self.place.docker(other(self.host), &["create"]).map(drop)
    }

    fn go(&mut self, limit: Duration) -> Result<Moved> {
        let (from, to) = (self.place.fleet.host(self.host), self.place.fleet.host(other(self.host)));
        self.moves += 1;
        let (began, name, checkpoint) = (Instant::now(), self.place.name(), self.checkpoint());
        let left = || limit.saturating_sub(began.elapsed());
        let (source, target) = (self.checkpoint_of(from)?, self.checkpoint_of(to)?);
        let mut split = Vec::new();
        let mut part = |what: &str, since: Instant| split.push((what.to_owned(), ms(since.elapsed())));

        let at = Instant::now();
        on(from, &["checkpoint", "create", &name, &checkpoint], left())?;
        part("dump", at);
        let at = Instant::now();
        copy(from, &source, to, &target, left())?;
        part("ship", at);
        let at = Instant::now();
        on(to, &["start", "--checkpoint", &checkpoint, &name], left())?;
        let netns = format!("/proc/{}/ns/net", to.init_pid(&name)?);
        announce(netns, self.place.fleet.container_address(self.place.index));
        part("start", at);
        let total = ms(began.elapsed());
        on(from, &["rm", "--force", &name], REMOVE)?;
        std::fs::remove_dir_all(target)?;
        self.host = other(self.host);
        Ok(Moved { total, freeze: Some(total), split, ..Moved::default() })
    }

    fn remove(&mut self) -> Result<()> {
        self.place.remove()
    }
}
