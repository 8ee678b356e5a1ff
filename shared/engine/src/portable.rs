//! Which containers can be moved at all: rules over a captured spec and what is known of it on its host.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::facts::EngineInfo;
use crate::inspect::RunState;
use crate::refusal::{Refusal, RefusalCode as Code};
use crate::spec::{ContainerSpec, MountKind, MountSpec, NetworkSpec};

/// Label by which a container declares binds whose content every host sees at the same path (a network file
/// system): their paths on the host, separated by commas.
pub const SHARED_BINDS_LABEL: &str = "haulage.shared-binds";

/// Log drivers that are part of the engine. Others are plugins, whose state is unknown to us.
const LOG_DRIVERS: &[&str] = &[
    "",
    "none",
    "json-file",
    "journald",
    "syslog",
    "gelf",
    "fluentd",
    "awslogs",
    "splunk",
    "gcplogs",
    "logentries",
];

/// What the rules ask beside the spec.
#[derive(Debug, Clone)]
pub struct RunningFacts {
    /// Whether and how the container runs.
    pub state: RunState,
    /// The engine it runs on.
    pub engine: EngineInfo,
    /// For each volume it uses, the names of the other containers that use it too, running or not.
    pub volume_users: BTreeMap<String, Vec<String>>,
    /// Host paths of binds that the operator declares shared for this migration.
    pub shared_binds: BTreeSet<PathBuf>,
}

/// Every reason why the container cannot be moved; empty when it can.
pub fn refusals(spec: &ContainerSpec, facts: &RunningFacts) -> Vec<Refusal> {
    let mut found = Vec::new();
    state(spec, facts, &mut found);
    engine(spec, &facts.engine, &mut found);
    namespaces(spec, &mut found);
    devices(spec, &mut found);
    mounts(spec, facts, &mut found);
    networks(spec, &mut found);
    found
}

fn state(spec: &ContainerSpec, facts: &RunningFacts, found: &mut Vec<Refusal>) {
    let state = &facts.state;
    if state.restarting {
        found.push(Refusal::new(
            Code::Restarting,
            "the container is between two runs of its restart policy",
            "find out why it ends (docker logs) and move it when it runs steadily",
        ));
    } else if !state.running || state.pid <= 0 {
        found.push(Refusal::new(
            Code::NotRunning,
            format!("the container does not run (it is {})", state.status),
            "start it first; a stopped container needs no live migration",
        ));
    } else if state.paused {
        found.push(Refusal::new(Code::Paused, "the container is paused", "docker unpause it first"));
    }
    if spec.tty() {
        found.push(Refusal::new(
            Code::Tty,
            "the container has a terminal, whose other end stays on this host",
            "create it without -t (tty: true)",
        ));
    }
    // With `-di` nobody need be at the other end, and `docker attach` works on the target; checked with CRIU 4.1.
    if spec.open_stdin() && spec.config_flag("AttachStdin") {
        found.push(Refusal::new(
            Code::AttachedStdin,
            "the container's standard input is the docker client that started it, on this host",
            "start it detached (docker run -d, or -di to attach to it later)",
        ));
    }
    let labels = spec.labels();
    if let Some(service) =
        labels.get("com.docker.swarm.service.name").or(labels.get("com.docker.swarm.task.id"))
    {
        found.push(Refusal::new(
            Code::Swarm,
            format!("the container belongs to the swarm service {service}, which would replace it"),
            "let the swarm reschedule it (docker service update, docker node update --availability drain)",
        ));
    }
}

fn engine(spec: &ContainerSpec, engine: &EngineInfo, found: &mut Vec<Refusal>) {
    if engine.security.contains("rootless") {
        found.push(Refusal::new(
            Code::Rootless,
            "the engine runs without root",
            "move containers of engines that run as root",
        ));
    }
    if engine.security.contains("userns") && spec.host_text("UsernsMode") != Some("host") {
        found.push(Refusal::new(
            Code::UsernsRemap,
            "the engine maps the container's users to others of the host (userns-remap)",
            "create the container with --userns=host, or run the engine without userns-remap",
        ));
    }
    if engine.storage_driver != "overlay2" {
        found.push(Refusal::new(
            Code::StorageDriver,
            format!("the engine keeps containers with the storage driver {}", engine.storage_driver),
            "configure the engine with the storage driver overlay2",
        ));
    }
    let runtime = if spec.runtime().is_empty() { engine.default_runtime.as_str() } else { spec.runtime() };
    if !matches!(runtime, "runc" | "io.containerd.runc.v2" | "haul" | "") {
        found.push(Refusal::new(
            Code::Runtime,
            format!("the container runs under the OCI runtime {runtime}"),
            "create it with --runtime runc",
        ));
    }
    if !LOG_DRIVERS.contains(&spec.log_driver()) {
        found.push(Refusal::new(
            Code::LogDriver,
            format!("the log driver {} is a plugin", spec.log_driver()),
            "create the container with a log driver of the engine, such as json-file",
        ));
    }
}

fn namespaces(spec: &ContainerSpec, found: &mut Vec<Refusal>) {
    for (key, code, what, option) in [
        ("PidMode", Code::PidMode, "PID", "--pid"),
        ("IpcMode", Code::IpcMode, "IPC", "--ipc"),
        ("UTSMode", Code::UtsMode, "UTS", "--uts"),
    ] {
        let mode = spec.host_text(key).unwrap_or_default();
        if mode == "host" || mode.starts_with("container:") {
            found.push(Refusal::new(
                code,
                format!("the container shares the {what} namespace ({option} {mode})"),
                format!("create it without {option} {mode}"),
            ));
        }
    }
    if spec.host_text("IpcMode") == Some("shareable") {
        found.push(Refusal::new(
            Code::IpcMode,
            "other containers may join its IPC namespace (--ipc shareable), and its /dev/shm lies outside of it",
            "create it with --ipc private, which is the default",
        ));
    }
    let mode = spec.network_mode();
    if mode == "host" || mode.starts_with("container:") {
        found.push(Refusal::new(
            Code::NetworkMode,
            format!("the container shares the network of {mode}"),
            "create it on a macvlan or ipvlan network, or a user-defined network with the same subnet on both hosts",
        ));
    }
}

fn devices(spec: &ContainerSpec, found: &mut Vec<Refusal>) {
    if spec.host_flag("Privileged") {
        found.push(Refusal::new(
            Code::Privileged,
            "the container is privileged and may use anything of this host",
            "create it with only the capabilities it needs (--cap-add)",
        ));
    }
    let list = |key: &str| spec.host_config.get(key).and_then(Value::as_array).into_iter().flatten();
    let mut devices: Vec<&str> = list("Devices")
        .filter_map(|device| device.get("PathOnHost").and_then(Value::as_str))
        .chain(spec.host_list("DeviceCgroupRules"))
        .collect();
    devices.dedup();
    if !devices.is_empty() {
        found.push(Refusal::new(
            Code::Devices,
            format!("the container uses devices of this host: {}", devices.join(", ")),
            "create it without --device and --device-cgroup-rule",
        ));
    }
    let requests = list("DeviceRequests").count();
    if requests > 0 {
        found.push(Refusal::new(
            Code::DeviceRequests,
            "the container asked for devices such as GPUs, whose state cannot be carried",
            "create it without --gpus",
        ));
    }
}

fn mounts(spec: &ContainerSpec, facts: &RunningFacts, found: &mut Vec<Refusal>) {
    let from = spec.host_list("VolumesFrom");
    if !from.is_empty() {
        found.push(Refusal::new(
            Code::VolumesFrom,
            format!("the container takes its volumes from {}", from.join(", ")),
            "name the volumes instead (-v NAME:PATH)",
        ));
    }
    let labelled = spec.labels().get(SHARED_BINDS_LABEL).copied().unwrap_or_default();
    let shared: BTreeSet<&Path> = labelled
        .split(',')
        .map(|path| Path::new(path.trim()))
        .chain(facts.shared_binds.iter().map(PathBuf::as_path))
        .collect();
    for mount in &spec.mounts {
        match &mount.kind {
            MountKind::Tmpfs => {}
            MountKind::Bind => bind(mount, &shared, found),
            MountKind::Volume => volume(mount, facts, found),
            MountKind::Other(kind) => found.push(Refusal::new(
                Code::MountType,
                format!("{} is a mount of the kind {kind}", mount.destination.display()),
                "use a named volume of the driver local, or tmpfs",
            )),
        }
    }
}

fn bind(mount: &MountSpec, shared: &BTreeSet<&Path>, found: &mut Vec<Refusal>) {
    let Some(source) = mount.source.as_deref() else { return };
    if !shared.contains(source) {
        let source = source.display();
        found.push(Refusal::new(
            Code::BindMount,
            format!("{source} of this host is mounted at {}", mount.destination.display()),
            format!(
                "use a named volume; or, if every host sees the same content at {source}, declare it shared \
                 (--shared {source}, or the label {SHARED_BINDS_LABEL})"
            ),
        ));
    }
}

fn volume(mount: &MountSpec, facts: &RunningFacts, found: &mut Vec<Refusal>) {
    let Some(volume) = &mount.volume else { return };
    let name = &volume.name;
    if volume.driver != "local" {
        found.push(Refusal::new(
            Code::VolumeDriver,
            format!("the volume {name} is kept by the driver {}", volume.driver),
            "use a volume of the driver local",
        ));
    } else if let Some(device) = volume.options.get("device") {
        found.push(Refusal::new(
            Code::VolumeOptions,
            format!("the volume {name} stands for {device}, which the engine mounts only while it is in use"),
            "use a volume without driver options",
        ));
    }
    let users = facts.volume_users.get(name).map(Vec::as_slice).unwrap_or_default();
    if !users.is_empty() {
        found.push(Refusal::new(
            Code::VolumeShared,
            format!("the volume {name} is also used by {}", users.join(", ")),
            "give each container its own volume, or remove the containers that no longer need it",
        ));
    }
}

fn networks(spec: &ContainerSpec, found: &mut Vec<Refusal>) {
    for network in &spec.networks {
        if let Some(refusal) = network_refusal(network) {
            found.push(refusal);
        }
    }
}

fn network_refusal(network: &NetworkSpec) -> Option<Refusal> {
    let remedy = "create it on a macvlan or ipvlan network, or a user-defined bridge with the same subnet on both hosts";
    match network.driver.as_str() {
        "bridge" if network.name == "bridge" => Some(Refusal::new(
            Code::DefaultBridge,
            "the container is on the default bridge, where Docker gives no address on request",
            remedy,
        )),
        // "host" is refused by the network mode.
        "bridge" | "macvlan" | "ipvlan" | "null" | "host" => None,
        driver => Some(Refusal::new(
            Code::NetworkDriver,
            format!(
                "the network {} has the driver {driver}, which ties an address to its host",
                network.name
            ),
            remedy,
        )),
    }
}

#[cfg(test)]
#[path = "portable_tests.rs"]
mod tests;
