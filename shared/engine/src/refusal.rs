//! Why a container cannot be moved, said so that a person can do something about it.

use std::fmt;

use serde::{Deserialize, Serialize};

/// One reason why a container cannot be moved, or not to this target.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// Stable code.
    pub code: RefusalCode,
    /// What is in the way, with names.
    pub message: String,
    /// What the operator can do.
    pub remedy: String,
}

impl Refusal {
    pub(crate) fn new(code: RefusalCode, message: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { code, message: message.into(), remedy: remedy.into() }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} ({})", self.code, self.message, self.remedy)
    }
}

macro_rules! codes {
    ($($(#[$doc:meta])* $variant:ident = $text:literal,)*) => {
        /// The stable codes of refusals, as they stand in messages between services and in output for programs.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[non_exhaustive]
        pub enum RefusalCode {
            $($(#[$doc])* #[serde(rename = $text)] $variant,)*
        }

        impl RefusalCode {
            /// Every code.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// The code as text, in snake case.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text,)* }
            }
        }
    };
}

codes! {
    /// The container has a terminal.
    Tty = "tty",
    /// Its standard input comes from the client that started it.
    AttachedStdin = "attached_stdin",
    /// It does not run.
    NotRunning = "not_running",
    /// `docker pause` holds it.
    Paused = "paused",
    /// It is between two runs.
    Restarting = "restarting",
    /// It is privileged.
    Privileged = "privileged",
    /// It uses host devices.
    Devices = "devices",
    /// It asked for devices such as GPUs.
    DeviceRequests = "device_requests",
    /// It shares a PID namespace.
    PidMode = "pid_mode",
    /// It shares an IPC namespace.
    IpcMode = "ipc_mode",
    /// It shares the host's UTS namespace.
    UtsMode = "uts_mode",
    /// It shares the host's or another container's network.
    NetworkMode = "network_mode",
    /// The engine remaps users.
    UsernsRemap = "userns_remap",
    /// The engine runs without root.
    Rootless = "rootless",
    /// A directory of the host is mounted in it.
    BindMount = "bind_mount",
    /// A kind of mount that cannot be carried.
    MountType = "mount_type",
    /// A volume is kept by a driver other than "local".
    VolumeDriver = "volume_driver",
    /// A local volume stands for something outside the engine.
    VolumeOptions = "volume_options",
    /// Another container uses the same volume.
    VolumeShared = "volume_shared",
    /// Volumes are taken from another container.
    VolumesFrom = "volumes_from",
    /// The engine's storage driver is not overlay2.
    StorageDriver = "storage_driver",
    /// It is on the default bridge, where no address can be kept.
    DefaultBridge = "default_bridge",
    /// It is on a network whose driver cannot keep an address across hosts.
    NetworkDriver = "network_driver",
    /// A swarm service owns it.
    Swarm = "swarm",
    /// Its log driver is a plugin, or is missing on the target.
    LogDriver = "log_driver",
    /// Its OCI runtime is not runc.
    Runtime = "runtime",
    /// The target has a container of that name.
    NameTaken = "name_taken",
    /// A port is taken on the target.
    PortTaken = "port_taken",
    /// The target lacks a network.
    NetworkMissing = "network_missing",
    /// The target's network of that name is of another kind or has other addresses.
    NetworkMismatch = "network_mismatch",
    /// The address is in use on the target.
    AddressTaken = "address_taken",
    /// The target's engine cannot set a second network's MAC address.
    MacAddress = "mac_address",
    /// The target has a volume of that name.
    VolumeExists = "volume_exists",
    /// The target's engine does not know our runtime.
    RuntimeMissing = "runtime_missing",
    /// Not enough memory on the target.
    Memory = "memory",
    /// Not enough disk space on the target.
    Disk = "disk",
    /// The target's CPU lacks features.
    Cpu = "cpu",
    /// The target is of another architecture.
    Architecture = "architecture",
    /// The target's kernel is older.
    Kernel = "kernel",
    /// Source and target use different cgroup hierarchies.
    CgroupVersion = "cgroup_version",
    /// The container is confined by a security module that the target lacks.
    SecurityModule = "security_module",
}

impl fmt::Display for RefusalCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_snake_case_unique_and_the_same_on_the_wire() {
        let mut seen = std::collections::BTreeSet::new();
        for code in RefusalCode::ALL {
            let text = code.as_str();
            assert!(text.chars().all(|c| c.is_ascii_lowercase() || c == '_'), "{text}");
            assert!(seen.insert(text), "{text} twice");
            assert_eq!(serde_json::to_value(code).unwrap(), text);
            assert_eq!(serde_json::from_value::<RefusalCode>(text.into()).unwrap(), *code);
        }
    }
}
