//! From an engine's answers to a [`ContainerSpec`].

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::facts::{NetworkFacts, VolumeFacts};
use crate::inspect::{Inspect, InspectError};
use crate::spec::{
    ContainerSpec, ImageRef, LayerSpec, MountKind, MountSpec, NetworkSpec, SPEC_VERSION, VolumeSpec,
};

/// A mount as `docker inspect` shows it.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct MountEntry {
    #[serde(rename = "Type")]
    kind: MountKind,
    #[serde(default)]
    name: String,
    #[serde(default)]
    source: String,
    destination: PathBuf,
    #[serde(default)]
    driver: String,
    #[serde(rename = "RW", default)]
    writable: bool,
    #[serde(default)]
    propagation: String,
}

/// An endpoint as `docker inspect` shows it. Docker writes "no value" as null, as "" or not at all.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct EndpointEntry {
    #[serde(rename = "IPAMConfig")]
    ipam: Option<IpamEntry>,
    links: Option<Vec<String>>,
    aliases: Option<Vec<String>>,
    #[serde(rename = "IPAddress")]
    ip_address: Option<String>,
    #[serde(rename = "GlobalIPv6Address")]
    ipv6_address: Option<String>,
    mac_address: Option<String>,
    gateway: Option<String>,
    driver_opts: Option<BTreeMap<String, String>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct IpamEntry {
    #[serde(rename = "IPv4Address")]
    ipv4: Option<String>,
    #[serde(rename = "IPv6Address")]
    ipv6: Option<String>,
}

impl ContainerSpec {
    /// Reads a container's description. `volumes` and `networks` hold what the engine knows of those that the
    /// container uses, by name; one that is missing there is described by what the container says of it.
    ///
    /// Works for running containers and for created ones, whose addresses are those asked for.
    ///
    /// # Errors
    /// When the description lacks a field that every engine gives.
    pub fn capture(
        inspect: &Inspect,
        volumes: &BTreeMap<String, VolumeFacts>,
        networks: &BTreeMap<String, NetworkFacts>,
    ) -> Result<Self, InspectError> {
        let id = inspect.id()?.to_owned();
        let config = inspect.object("/Config")?;
        let mut host_config = inspect.object("/HostConfig")?;
        name_network_mode(&mut host_config, networks);
        let endpoints: BTreeMap<String, EndpointEntry> =
            inspect.parse_or_default("/NetworkSettings/Networks")?;
        let primary = host_config.get("NetworkMode").and_then(Value::as_str).unwrap_or_default();
        let primary = if primary == "default" { "bridge" } else { primary };
        let own_names = OwnNames { id: &id, hostname: inspect.text("/Config/Hostname") };
        let mut networks: Vec<NetworkSpec> = endpoints
            .into_iter()
            .map(|(name, entry)| {
                let configured_mac = (name == primary).then(|| inspect.text("/Config/MacAddress")).flatten();
                network_spec(&own_names, networks.get(&name), name, entry, configured_mac)
            })
            .collect();
        networks.sort_by_key(|network| network.name != primary);
        let mut mounts = inspect
            .parse_or_default::<Vec<MountEntry>>("/Mounts")?
            .into_iter()
            .map(|entry| mount_spec(entry, &host_config, volumes))
            .collect::<Vec<_>>();
        // Docker lists them in the order of a hash map.
        mounts.sort_by(|a, b| a.destination.cmp(&b.destination));
        Ok(Self {
            version: SPEC_VERSION,
            name: inspect.name()?.to_owned(),
            image: ImageRef {
                reference: inspect.required_text("/Config/Image")?.to_owned(),
                id: inspect.required_text("/Image")?.to_owned(),
            },
            mounts,
            networks,
            layer: inspect.text("/GraphDriver/Name").map(|driver| LayerSpec {
                driver: driver.to_owned(),
                upper: inspect.path("/GraphDriver/Data/UpperDir"),
                merged: inspect.path("/GraphDriver/Data/MergedDir"),
            }),
            log_path: inspect.path("/LogPath"),
            engine_dir: inspect.path("/ResolvConfPath").and_then(|file| file.parent().map(Path::to_owned)),
            apparmor: inspect.text("/AppArmorProfile").map(str::to_owned),
            selinux: inspect.text("/ProcessLabel").map(str::to_owned),
            id,
            config,
            host_config,
        })
    }
}

/// `docker run --network ID` leaves the id in the network mode, which means nothing on another engine.
fn name_network_mode(host_config: &mut Map<String, Value>, networks: &BTreeMap<String, NetworkFacts>) {
    let Some(mode) = host_config.get("NetworkMode").and_then(Value::as_str).filter(|mode| !mode.is_empty())
    else {
        return;
    };
    if networks.contains_key(mode) {
        return;
    }
    // Docker accepts any unambiguous beginning of an id.
    let name = networks.values().find(|network| network.id.starts_with(mode)).map(|network| &network.name);
    if let Some(name) = name {
        host_config.insert("NetworkMode".into(), Value::from(name.as_str()));
    }
}

/// Names that the engine adds to the aliases by itself, on every engine anew.
struct OwnNames<'a> {
    id: &'a str,
    hostname: Option<&'a str>,
}

impl OwnNames<'_> {
    fn covers(&self, alias: &str) -> bool {
        self.id.get(..12) == Some(alias) || self.hostname == Some(alias)
    }
}

fn network_spec(
    own_names: &OwnNames<'_>,
    facts: Option<&NetworkFacts>,
    name: String,
    entry: EndpointEntry,
    configured_mac: Option<&str>,
) -> NetworkSpec {
    let ipam = entry.ipam.unwrap_or_default();
    let given = |actual: Option<String>, asked: Option<String>| {
        actual.filter(|text| !text.is_empty()).or(asked.filter(|text| !text.is_empty()))
    };
    NetworkSpec {
        name,
        driver: facts.map(|facts| facts.driver.clone()).unwrap_or_default(),
        options: facts.map(|facts| facts.options.clone()).unwrap_or_default(),
        subnets: facts.map(|facts| facts.subnets.clone()).unwrap_or_default(),
        ipv4: given(entry.ip_address, ipam.ipv4).and_then(|ip| ip.parse::<Ipv4Addr>().ok()),
        ipv6: given(entry.ipv6_address, ipam.ipv6).and_then(|ip| ip.parse::<Ipv6Addr>().ok()),
        mac: given(entry.mac_address, configured_mac.map(str::to_owned)),
        gateway: entry.gateway.and_then(|ip| ip.parse().ok()),
        aliases: entry
            .aliases
            .unwrap_or_default()
            .into_iter()
            .filter(|alias| !own_names.covers(alias))
            .collect(),
        links: entry.links.unwrap_or_default(),
        driver_opts: entry.driver_opts.unwrap_or_default(),
    }
}

fn mount_spec(
    entry: MountEntry,
    host_config: &Map<String, Value>,
    volumes: &BTreeMap<String, VolumeFacts>,
) -> MountSpec {
    let volume = (entry.kind == MountKind::Volume).then(|| {
        let facts = volumes.get(&entry.name);
        VolumeSpec {
            anonymous: !names_volume(host_config, &entry.name),
            driver: facts.map_or(entry.driver, |facts| facts.driver.clone()),
            options: facts.map(|facts| facts.options.clone()).unwrap_or_default(),
            labels: facts.map(|facts| facts.labels.clone()).unwrap_or_default(),
            name: entry.name,
        }
    });
    MountSpec {
        source: Some(entry.source).filter(|path| !path.is_empty()).map(PathBuf::from),
        kind: entry.kind,
        destination: entry.destination,
        writable: entry.writable,
        propagation: entry.propagation,
        volume,
    }
}

/// Whether the container's creator named the volume. One that nobody named was made by the engine, and goes with
/// the container (the same rule by which Docker decides what `docker rm -v` removes).
fn names_volume(host_config: &Map<String, Value>, volume: &str) -> bool {
    let list = |key: &str| host_config.get(key).and_then(Value::as_array).into_iter().flatten();
    let in_binds = list("Binds")
        .filter_map(Value::as_str)
        .any(|bind| bind.split_once(':').is_some_and(|(source, _)| source == volume));
    let in_mounts = list("Mounts").any(|mount| mount.get("Source").and_then(Value::as_str) == Some(volume));
    in_binds || in_mounts
}
