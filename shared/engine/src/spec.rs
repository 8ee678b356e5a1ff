//! What a container is: everything needed to create it again on another engine.
//!
//! The engine's own `Config` and `HostConfig` are kept whole, so that nothing is lost that this crate does not
//! know of; what they do not say (which volume and network lie behind a name, which address was given) stands
//! beside them in types.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::facts::{HostPort, Subnet};

/// Version of [`ContainerSpec`] as it travels. Additions keep it; a change of meaning raises it.
pub const SPEC_VERSION: u32 = 1;

/// A container, independent of the engine it is on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ContainerSpec {
    /// [`SPEC_VERSION`] of who wrote it.
    pub version: u32,
    /// Full id on the engine it was captured from.
    pub id: String,
    /// Name, without the leading slash.
    pub name: String,
    /// The image it was created from.
    pub image: ImageRef,
    /// The engine's `Config`, whole. `Config.NetworkMode` names networks, never ids of one engine.
    pub config: Map<String, Value>,
    /// The engine's `HostConfig`, whole.
    pub host_config: Map<String, Value>,
    /// Mounts that have a place in the engine's list: volumes, binds and `--mount type=tmpfs`.
    pub mounts: Vec<MountSpec>,
    /// Networks; the one of `HostConfig.NetworkMode` first.
    pub networks: Vec<NetworkSpec>,
    /// The writable layer, where the storage driver tells.
    #[serde(default)]
    pub layer: Option<LayerSpec>,
    /// The log file on the source, for log drivers that keep one.
    #[serde(default)]
    pub log_path: Option<PathBuf>,
    /// The engine's directory for this container (hosts, resolv.conf, hostname, logs).
    #[serde(default)]
    pub engine_dir: Option<PathBuf>,
    /// AppArmor profile in force, if any.
    #[serde(default)]
    pub apparmor: Option<String>,
    /// SELinux process label in force, if any.
    #[serde(default)]
    pub selinux: Option<String>,
}

/// An image, by what it is called and by what it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRef {
    /// What the container was created from, such as "redis:7"; may meanwhile name another image, or none.
    pub reference: String,
    /// The image itself: "sha256:" and 64 hexadecimal digits.
    pub id: String,
}

/// Where the writable layer of an overlay container lies.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerSpec {
    /// Storage driver.
    pub driver: String,
    /// The directory with what the container changed.
    pub upper: Option<PathBuf>,
    /// Where the whole root file system is mounted while the container runs.
    pub merged: Option<PathBuf>,
}

/// When and how often the engine starts a container again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestartPolicy {
    /// "no", "always", "unless-stopped" or "on-failure"; empty means "no".
    #[serde(rename = "Name", default)]
    pub name: String,
    /// Tries of "on-failure"; 0 means no limit.
    #[serde(rename = "MaximumRetryCount", default)]
    pub maximum_retry_count: i64,
}

impl RestartPolicy {
    /// Never start it again.
    pub fn never() -> Self {
        Self { name: "no".into(), maximum_retry_count: 0 }
    }

    /// Whether the engine leaves the container alone when it ends.
    pub fn is_never(&self) -> bool {
        self.name.is_empty() || self.name == "no"
    }
}

/// What is mounted at one place in the container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountSpec {
    /// What kind of thing is mounted.
    pub kind: MountKind,
    /// Path in the container.
    pub destination: PathBuf,
    /// Path on the host; none for tmpfs.
    pub source: Option<PathBuf>,
    /// May be written through this mount.
    pub writable: bool,
    /// Mount propagation, such as "rprivate"; empty where it has no meaning.
    pub propagation: String,
    /// The volume, for volumes.
    pub volume: Option<VolumeSpec>,
}

/// The kinds of mounts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MountKind {
    /// A volume that the engine keeps.
    Volume,
    /// A directory or file of the host.
    Bind,
    /// Memory.
    Tmpfs,
    /// Something newer, by the engine's name for it.
    #[serde(untagged)]
    Other(String),
}

/// A volume, independent of the engine it is on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeSpec {
    /// Name; of an anonymous volume it belongs to one engine and is not kept.
    pub name: String,
    /// Made by the engine for this container alone and removed with it.
    pub anonymous: bool,
    /// Volume driver.
    pub driver: String,
    /// The driver's options.
    pub options: BTreeMap<String, String>,
    /// Labels.
    pub labels: BTreeMap<String, String>,
}

/// The container's place on one network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkSpec {
    /// The network's name.
    pub name: String,
    /// Its driver.
    pub driver: String,
    /// Its driver's options.
    pub options: BTreeMap<String, String>,
    /// Its IPv4 subnets.
    pub subnets: Vec<Subnet>,
    /// The container's address; none on networks without addresses.
    pub ipv4: Option<Ipv4Addr>,
    /// The container's IPv6 address, if it has one.
    pub ipv6: Option<std::net::Ipv6Addr>,
    /// The container's MAC address; none where it has none of its own (ipvlan) or does not run.
    pub mac: Option<String>,
    /// The router.
    pub gateway: Option<Ipv4Addr>,
    /// Names that other containers on the network may call it by, beside its id and host name.
    pub aliases: Vec<String>,
    /// Legacy links to other containers.
    pub links: Vec<String>,
    /// Options of the endpoint.
    pub driver_opts: BTreeMap<String, String>,
}

impl ContainerSpec {
    /// Whether it has a terminal.
    pub fn tty(&self) -> bool {
        self.config_flag("Tty")
    }

    /// Whether its standard input is kept open (`docker run -i`).
    pub fn open_stdin(&self) -> bool {
        self.config_flag("OpenStdin")
    }

    /// Its host name.
    pub fn hostname(&self) -> Option<&str> {
        text(&self.config, "Hostname")
    }

    /// Its labels.
    pub fn labels(&self) -> BTreeMap<&str, &str> {
        let labels = self.config.get("Labels").and_then(Value::as_object);
        labels
            .into_iter()
            .flatten()
            .filter_map(|(key, value)| Some((key.as_str(), value.as_str()?)))
            .collect()
    }

    /// Created with `--rm`: the engine removes it when it ends.
    pub fn auto_remove(&self) -> bool {
        self.host_flag("AutoRemove")
    }

    /// Its restart policy.
    pub fn restart_policy(&self) -> RestartPolicy {
        self.host_config
            .get("RestartPolicy")
            .and_then(|value| RestartPolicy::deserialize(value).ok())
            .unwrap_or_else(RestartPolicy::never)
    }

    /// Name of its OCI runtime; empty means the engine's default.
    pub fn runtime(&self) -> &str {
        self.host_text("Runtime").unwrap_or_default()
    }

    /// Its network mode: "none", "host", "default", "container:ID" or a network's name.
    pub fn network_mode(&self) -> &str {
        self.host_text("NetworkMode").unwrap_or("default")
    }

    /// The Ethernet and IPv4 addresses that it keeps, of every network that has both.
    pub fn addresses(&self) -> Vec<(String, Ipv4Addr)> {
        self.networks.iter().filter_map(|network| Some((network.mac.clone()?, network.ipv4?))).collect()
    }

    /// Its log driver.
    pub fn log_driver(&self) -> &str {
        let kind = self.host_config.get("LogConfig").and_then(|log| log.get("Type"));
        kind.and_then(Value::as_str).unwrap_or_default()
    }

    /// Host ports that were asked for by number. Ports that the engine chooses are not among them, nor those of a
    /// container whose networks have no port mapping (macvlan and ipvlan: Docker accepts and ignores them).
    pub fn fixed_ports(&self) -> Vec<HostPort> {
        if !self.networks.iter().any(|network| matches!(network.driver.as_str(), "bridge" | "overlay" | "")) {
            return Vec::new();
        }
        let bindings = self.host_config.get("PortBindings").and_then(Value::as_object);
        let mut ports: Vec<HostPort> = bindings
            .into_iter()
            .flatten()
            .flat_map(|(inside, outside)| {
                let protocol = inside.split_once('/').map_or("tcp", |(_, protocol)| protocol);
                outside
                    .as_array()
                    .into_iter()
                    .flatten()
                    .filter_map(move |binding| host_port(binding, protocol))
            })
            .collect();
        ports.sort();
        ports
    }

    /// Places in the container of volumes whose content must travel, each with the volume.
    pub fn volumes(&self) -> impl Iterator<Item = (&MountSpec, &VolumeSpec)> {
        self.mounts.iter().filter_map(|mount| mount.volume.as_ref().map(|volume| (mount, volume)))
    }

    pub(crate) fn config_flag(&self, key: &str) -> bool {
        self.config.get(key).and_then(Value::as_bool).unwrap_or(false)
    }

    pub(crate) fn host_flag(&self, key: &str) -> bool {
        self.host_config.get(key).and_then(Value::as_bool).unwrap_or(false)
    }

    pub(crate) fn host_text(&self, key: &str) -> Option<&str> {
        text(&self.host_config, key)
    }

    /// The strings of a list in `HostConfig`; absent and null are an empty list.
    pub(crate) fn host_list(&self, key: &str) -> Vec<&str> {
        let list = self.host_config.get(key).and_then(Value::as_array);
        list.into_iter().flatten().filter_map(Value::as_str).collect()
    }
}

fn text<'a>(map: &'a Map<String, Value>, key: &str) -> Option<&'a str> {
    map.get(key).and_then(Value::as_str).filter(|text| !text.is_empty())
}

/// One entry of `PortBindings`; a range such as "8000-8010" lets the engine choose and is no fixed port.
fn host_port(binding: &Value, protocol: &str) -> Option<HostPort> {
    let port = binding.get("HostPort")?.as_str()?.parse().ok().filter(|port| *port != 0)?;
    let ip = binding.get("HostIp").and_then(Value::as_str).and_then(|ip| ip.parse::<IpAddr>().ok());
    Some(HostPort { ip, port, protocol: protocol.to_owned() })
}

#[cfg(test)]
#[path = "spec_tests.rs"]
mod tests;
