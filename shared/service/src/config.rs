//! What a service is told when it starts, on the command line or in the environment.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use clap::Args;
use haulage_protocol::id::{HostId, MigrationId};

/// Where NATS is; every process of the system needs this.
#[derive(Debug, Clone, Args)]
pub struct NatsConfig {
    /// The NATS server, with JetStream.
    #[arg(long, env = "HAUL_NATS", default_value = "nats://127.0.0.1:4222", value_name = "URL")]
    pub nats: String,
}

/// A service of a host.
#[derive(Debug, Clone, Args)]
pub struct HostConfig {
    #[command(flatten)]
    /// Where NATS is.
    pub nats: NatsConfig,
    /// The name of this host in the fleet: letters, digits, '-' and '_'.
    #[arg(long, env = "HAUL_HOST", value_name = "ID")]
    pub host: HostId,
    /// Where migrations keep what they must not lose.
    #[arg(long, env = "HAUL_STATE_DIR", default_value = "/var/lib/haul", value_name = "DIR")]
    pub state_dir: PathBuf,
    /// A tmpfs, for the memory of containers that arrive and for the images of those that leave or arrive, while it has ample
    /// room; else they go to the state directory.
    #[arg(long, env = "HAUL_PAGE_DIR", default_value = "/dev/shm", value_name = "DIR")]
    pub page_dir: PathBuf,
    /// The socket of this host's Docker engine.
    #[arg(long, env = "HAUL_DOCKER", default_value = "unix:///var/run/docker.sock", value_name = "URL")]
    pub docker: String,
    /// The object store that images travel through; every host must see the same.
    #[arg(long, env = "HAUL_BUCKET", default_value = "file:///var/lib/haul/bucket", value_name = "URL")]
    pub bucket: String,
    /// The address on which bulk data is received; other hosts must reach it. Port 0 takes any free one.
    #[arg(long, env = "HAUL_BULK_LISTEN", default_value = "0.0.0.0:0", value_name = "ADDRESS:PORT")]
    pub bulk_listen: SocketAddr,
    /// The address that other hosts are told, when it is not the one that is listened on.
    #[arg(long, env = "HAUL_BULK_ADVERTISE", value_name = "ADDRESS")]
    pub bulk_advertise: Option<IpAddr>,
}

/// Other hosts cannot connect there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("other hosts cannot connect to {0}: name this host's address with --bulk-listen or --bulk-advertise")]
pub struct NotAnAddress(IpAddr);

impl HostConfig {
    /// The directory of one migration on this host; not created.
    #[must_use]
    pub fn migration_dir(&self, migration: &MigrationId) -> PathBuf {
        self.state_dir.join("migrations").join(migration.as_str())
    }

    /// The directories of all migrations that this host has notes of; none when they cannot be listed.
    #[must_use]
    pub fn migration_dirs(&self) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(self.state_dir.join("migrations")).into_iter().flatten();
        entries.filter_map(|entry| Some(entry.ok()?.path())).collect()
    }

    /// The directory of one migration in memory (tmpfs); not created.
    #[must_use]
    pub fn memory_dir(&self, migration: &MigrationId) -> PathBuf {
        self.page_dir.join(format!("haul-{}-{migration}", self.host))
    }

    /// The Docker socket as a path.
    #[must_use]
    pub fn docker_socket(&self) -> &str {
        self.docker.strip_prefix("unix://").unwrap_or(&self.docker)
    }

    /// What other hosts connect to, given where the listener ended up.
    ///
    /// # Errors
    /// [`NotAnAddress`] when it listens on every address and none was named for others.
    pub fn advertised(&self, listening: SocketAddr) -> Result<SocketAddr, NotAnAddress> {
        let ip = self.bulk_advertise.unwrap_or_else(|| listening.ip());
        if ip.is_unspecified() { Err(NotAnAddress(ip)) } else { Ok(SocketAddr::new(ip, listening.port())) }
    }
}
