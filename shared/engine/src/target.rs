//! Whether this host can take a container: rules over the spec, its host and what is known of this one.

use std::collections::{BTreeMap, BTreeSet};

use crate::facts::{ApiVersion, ContainerEntry, EngineInfo, HostPort, NetworkFacts};
use crate::host::HostFacts;
use crate::recreate::mac_of_address;
use crate::refusal::{Refusal, RefusalCode as Code};
use crate::spec::{ContainerSpec, NetworkSpec};

/// The name under which the runtime that restores is registered with Docker.
pub const HAUL_RUNTIME: &str = "haul";

/// What is known of the target.
#[derive(Debug, Clone)]
pub struct TargetFacts {
    /// Its engine.
    pub engine: EngineInfo,
    /// The machine.
    pub host: HostFacts,
    /// All its containers.
    pub containers: Vec<ContainerEntry>,
    /// Which of the volumes the container needs by name exist.
    pub volumes: BTreeSet<String>,
    /// The networks it needs, as far as they exist, by name.
    pub networks: BTreeMap<String, NetworkFacts>,
    /// Which of the host ports it needs cannot be bound.
    pub ports_taken: BTreeSet<HostPort>,
    /// Id of the image that the container's reference names here, if any.
    pub reference_names: Option<String>,
    /// Whether the container's image, by id, is here.
    pub image_present: bool,
    /// Bytes of memory that can be had without swapping.
    pub memory_available: u64,
    /// Bytes free under the engine's data root.
    pub disk_available: u64,
}

/// What the container will need on the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Need {
    /// Bytes of memory.
    pub memory: u64,
    /// Bytes of disk: writable layer, volumes and, where it is missing, the image.
    pub disk: u64,
}

/// Every reason why the target cannot take the container; empty when it can.
pub fn target_refusals(
    spec: &ContainerSpec,
    source: &HostFacts,
    target: &TargetFacts,
    need: Need,
) -> Vec<Refusal> {
    let mut found = Vec::new();
    machine(source, &target.host, &mut found);
    engine(spec, &target.engine, &mut found);
    names(spec, target, &mut found);
    for network in &spec.networks {
        match target.networks.get(&network.name) {
            Some(theirs) => place(network, theirs, &mut found),
            None => found.push(Refusal::new(
                Code::NetworkMissing,
                format!("the target has no network {}", network.name),
                format!("create it there with the driver {} and {}", network.driver, subnets(network)),
            )),
        }
    }
    second_macs(spec, &target.engine, &mut found);
    room(target, need, &mut found);
    found
}

fn machine(source: &HostFacts, target: &HostFacts, found: &mut Vec<Refusal>) {
    if source.architecture != target.architecture {
        found.push(Refusal::new(
            Code::Architecture,
            format!("the target is {}, the source {}", target.architecture, source.architecture),
            "choose a target of the same architecture",
        ));
        return;
    }
    let missing = source.cpu_missing(target);
    if !missing.is_empty() {
        found.push(Refusal::new(
            Code::Cpu,
            format!("the target's CPU lacks {}, which the container may be using", missing.join(", ")),
            "choose a target whose CPU has all features of the source's",
        ));
    }
    if source.cgroup_version != target.cgroup_version {
        found.push(Refusal::new(
            Code::CgroupVersion,
            format!(
                "the target gives containers cgroup {}, the source {}",
                target.cgroup_version, source.cgroup_version
            ),
            "boot both hosts with the same cgroup hierarchy (systemd.unified_cgroup_hierarchy)",
        ));
    }
    if target.kernel_series() < source.kernel_series() {
        found.push(Refusal::new(
            Code::Kernel,
            format!("the target's kernel {} is older than the source's {}", target.kernel, source.kernel),
            "update the target's kernel",
        ));
    }
}

fn engine(spec: &ContainerSpec, engine: &EngineInfo, found: &mut Vec<Refusal>) {
    if engine.storage_driver != "overlay2" {
        found.push(Refusal::new(
            Code::StorageDriver,
            format!("the target's engine keeps containers with the storage driver {}", engine.storage_driver),
            "configure the engine with the storage driver overlay2",
        ));
    }
    for (feature, code) in [("rootless", Code::Rootless), ("userns", Code::UsernsRemap)] {
        if engine.security.contains(feature) {
            found.push(Refusal::new(
                code,
                format!("the target's engine runs with {feature}"),
                "choose a target whose engine runs as root without userns-remap",
            ));
        }
    }
    if !engine.runtimes.contains(HAUL_RUNTIME) {
        found.push(Refusal::new(
            Code::RuntimeMissing,
            format!("the target's engine has no runtime named {HAUL_RUNTIME}"),
            "register haul-runtime with the engine (see the operator's guide) and restart it",
        ));
    }
    if !matches!(spec.log_driver(), "" | "none") && !engine.log_drivers.contains(spec.log_driver()) {
        found.push(Refusal::new(
            Code::LogDriver,
            format!("the target's engine has no log driver {}", spec.log_driver()),
            "install it there, or create the container with json-file",
        ));
    }
    for (feature, used) in [("apparmor", &spec.apparmor), ("selinux", &spec.selinux)] {
        if let Some(used) = used.as_deref().filter(|used| *used != "unconfined")
            && !engine.security.contains(feature)
        {
            found.push(Refusal::new(
                Code::SecurityModule,
                format!(
                    "the container is confined by {feature} ({used}), which the target's engine does not use"
                ),
                format!("choose a target with {feature}"),
            ));
        }
    }
}

fn names(spec: &ContainerSpec, target: &TargetFacts, found: &mut Vec<Refusal>) {
    if let Some(other) = target.containers.iter().find(|entry| entry.name == spec.name) {
        found.push(Refusal::new(
            Code::NameTaken,
            format!("the target has a container named {} ({}, {})", spec.name, short(&other.id), other.state),
            "remove or rename it there",
        ));
    }
    for (_, volume) in spec.volumes().filter(|(_, volume)| !volume.anonymous) {
        if target.volumes.contains(&volume.name) {
            found.push(Refusal::new(
                Code::VolumeExists,
                format!("the target has a volume named {}, whose content would be overwritten", volume.name),
                "remove it there if it is no longer needed (docker volume rm)",
            ));
        }
    }
    for port in spec.fixed_ports() {
        let holder =
            target.containers.iter().find(|entry| entry.ports.iter().any(|theirs| theirs.clashes(&port)));
        let by = match holder {
            Some(holder) => format!("the container {}", holder.name),
            None if target.ports_taken.contains(&port) => "another program".to_owned(),
            None => continue,
        };
        found.push(Refusal::new(
            Code::PortTaken,
            format!("the port {port} of the target is taken by {by}"),
            "free it there",
        ));
    }
}

fn place(network: &NetworkSpec, theirs: &NetworkFacts, found: &mut Vec<Refusal>) {
    let remedy = || format!("create it there with the driver {} and {}", network.driver, subnets(network));
    if network.driver != theirs.driver {
        found.push(Refusal::new(
            Code::NetworkMismatch,
            format!("the target's network {} has the driver {}", network.name, theirs.driver),
            remedy(),
        ));
        return;
    }
    let Some(address) = network.ipv4 else { return };
    if !theirs.subnets.iter().any(|subnet| subnet.contains(address)) {
        found.push(Refusal::new(
            Code::NetworkMismatch,
            format!("the target's network {} has no subnet with the address {address}", network.name),
            remedy(),
        ));
    } else if let Some(holder) = theirs.addresses.get(&address) {
        found.push(Refusal::new(
            Code::AddressTaken,
            format!("on the target, {address} belongs to the container {holder}"),
            "give that container another address, or keep the two hosts' --ip-range apart",
        ));
    }
}

/// Before Docker 25 only the first network's MAC address can be asked for; the others get theirs from their address.
fn second_macs(spec: &ContainerSpec, engine: &EngineInfo, found: &mut Vec<Refusal>) {
    if engine.api_version >= ApiVersion::ENDPOINT_MAC {
        return;
    }
    for network in spec.networks.iter().skip(1) {
        let derived = network.ipv4.map(mac_of_address);
        if let Some(mac) = network.mac.as_ref().filter(|mac| derived.as_ref() != Some(&mac.to_lowercase())) {
            found.push(Refusal::new(
                Code::MacAddress,
                format!(
                    "the target's engine cannot give the container {mac} on its network {}",
                    network.name
                ),
                "update the target to Docker 25 or later",
            ));
        }
    }
}

fn room(target: &TargetFacts, need: Need, found: &mut Vec<Refusal>) {
    for (code, what, need, available) in [
        (Code::Memory, "memory", need.memory, target.memory_available),
        (Code::Disk, "disk space under its data root", need.disk, target.disk_available),
    ] {
        if need > available {
            found.push(Refusal::new(
                code,
                format!("the target has {} MiB of {what}, {} MiB are needed", available >> 20, need >> 20),
                "make room there, or choose another target",
            ));
        }
    }
}

fn subnets(network: &NetworkSpec) -> String {
    match network.subnets.as_slice() {
        [] => "no subnet".to_owned(),
        subnets => subnets.iter().map(|subnet| format!("--subnet {subnet}")).collect::<Vec<_>>().join(" "),
    }
}

fn short(id: &str) -> &str {
    id.get(..12).unwrap_or(id)
}

#[cfg(test)]
#[path = "target_tests.rs"]
mod tests;
