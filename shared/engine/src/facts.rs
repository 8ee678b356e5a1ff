//! What an engine says about itself and about the things it keeps, reduced to what a migration asks.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A version of the engine's HTTP API, such as 1.41.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ApiVersion {
    /// The number before the dot.
    pub major: u32,
    /// The number after the dot.
    pub minor: u32,
}

impl ApiVersion {
    /// From this version on a MAC address belongs to an endpoint and a container may be created with several
    /// networks (Docker 25).
    pub const ENDPOINT_MAC: Self = Self { major: 1, minor: 44 };
}

impl fmt::Display for ApiVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// The cgroup hierarchy the engine works with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CgroupVersion {
    /// One hierarchy per controller; also what a hybrid host gives to containers.
    V1,
    /// The unified hierarchy.
    V2,
}

impl fmt::Display for CgroupVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V1 => "v1",
            Self::V2 => "v2",
        })
    }
}

/// What `docker info` tells, as far as it matters here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EngineInfo {
    /// The engine's release, such as "20.10.24".
    pub server_version: String,
    /// The API version spoken with it: the highest that both sides know.
    pub api_version: ApiVersion,
    /// Storage driver, such as "overlay2".
    pub storage_driver: String,
    /// Where the engine keeps images, containers and volumes.
    pub data_root: PathBuf,
    /// Names of the registered OCI runtimes.
    pub runtimes: BTreeSet<String>,
    /// The runtime of containers that name none.
    pub default_runtime: String,
    /// "cgroupfs" or "systemd".
    pub cgroup_driver: String,
    /// Which cgroup hierarchy containers get.
    pub cgroup_version: CgroupVersion,
    /// Names of the active security features: "seccomp", "apparmor", "selinux", "userns", "rootless", "cgroupns".
    pub security: BTreeSet<String>,
    /// Names of the log drivers that can be used.
    pub log_drivers: BTreeSet<String>,
    /// Release of the kernel, as `uname -r`.
    pub kernel: String,
    /// Machine architecture, as `uname -m`.
    pub architecture: String,
}

/// A container as the list of containers shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainerEntry {
    /// Full id, 64 hexadecimal digits.
    pub id: String,
    /// Name without the leading slash.
    pub name: String,
    /// "running", "exited", and so on.
    pub state: String,
    /// Names of the volumes it uses.
    pub volumes: Vec<String>,
    /// Host ports that it publishes now.
    pub ports: Vec<HostPort>,
}

/// A port of the host, taken or wanted.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct HostPort {
    /// Address it listens on; none means every address.
    pub ip: Option<std::net::IpAddr>,
    /// Port, 1 to 65535.
    pub port: u16,
    /// "tcp", "udp" or "sctp".
    pub protocol: String,
}

impl HostPort {
    /// Whether both cannot be open at once.
    pub fn clashes(&self, other: &Self) -> bool {
        let any = |ip: &Option<std::net::IpAddr>| ip.is_none_or(|ip| ip.is_unspecified());
        self.port == other.port
            && self.protocol == other.protocol
            && (any(&self.ip) || any(&other.ip) || self.ip == other.ip)
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.ip {
            Some(ip) => write!(f, "{}/{}", std::net::SocketAddr::new(ip, self.port), self.protocol),
            None => write!(f, "{}/{}", self.port, self.protocol),
        }
    }
}

/// An image as the engine knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageFacts {
    /// "sha256:" and 64 hexadecimal digits: the digest of the image's configuration.
    pub id: String,
    /// Names with tags that point to it.
    pub tags: Vec<String>,
    /// Size of all layers, in bytes.
    pub size: u64,
    /// Digests of the layers' contents, lowest first.
    pub layers: Vec<String>,
}

/// A volume as the engine knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeFacts {
    /// Name, unique on the engine.
    pub name: String,
    /// Volume driver: "local" or a plugin's name.
    pub driver: String,
    /// Where its content lies on the host.
    pub mountpoint: PathBuf,
    /// The driver's options.
    pub options: BTreeMap<String, String>,
    /// Labels.
    pub labels: BTreeMap<String, String>,
}

/// A network as the engine knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkFacts {
    /// Id on this engine.
    pub id: String,
    /// Name.
    pub name: String,
    /// "bridge", "macvlan", "ipvlan", "overlay", "host", "null" or a plugin's name.
    pub driver: String,
    /// The driver's options.
    pub options: BTreeMap<String, String>,
    /// IPv4 subnets that the engine hands addresses out of.
    pub subnets: Vec<Subnet>,
    /// Addresses of the running containers on it, on this engine only: address and container name.
    pub addresses: BTreeMap<Ipv4Addr, String>,
}

/// An IPv4 subnet in CIDR notation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Subnet {
    base: Ipv4Addr,
    prefix: u8,
}

/// Text that is not an IPv4 subnet.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not an IPv4 subnet in CIDR notation: {text:?}")]
pub struct SubnetError {
    text: String,
}

impl Subnet {
    /// Whether the address lies in it.
    pub fn contains(&self, address: Ipv4Addr) -> bool {
        let mask = u32::MAX.checked_shl(32 - u32::from(self.prefix)).unwrap_or(0);
        (self.base.to_bits() ^ address.to_bits()) & mask == 0
    }
}

impl FromStr for Subnet {
    type Err = SubnetError;

    fn from_str(text: &str) -> Result<Self, SubnetError> {
        let error = || SubnetError { text: text.to_owned() };
        let (base, prefix) = text.split_once('/').ok_or_else(error)?;
        let base = base.parse().map_err(|_| error())?;
        let prefix = prefix.parse().ok().filter(|p| *p <= 32).ok_or_else(error)?;
        Ok(Self { base, prefix })
    }
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.base, self.prefix)
    }
}

impl From<Subnet> for String {
    fn from(subnet: Subnet) -> Self {
        subnet.to_string()
    }
}

impl TryFrom<String> for Subnet {
    type Error = SubnetError;

    fn try_from(text: String) -> Result<Self, SubnetError> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_subnet_knows_its_addresses() {
        let subnet: Subnet = "10.77.0.0/24".parse().unwrap();
        assert!(subnet.contains("10.77.0.255".parse().unwrap()));
        assert!(!subnet.contains("10.77.1.0".parse().unwrap()));
        let all: Subnet = "0.0.0.0/0".parse().unwrap();
        assert!(all.contains("255.1.2.3".parse().unwrap()));
        let one: Subnet = "10.0.0.1/32".parse().unwrap();
        assert!(one.contains("10.0.0.1".parse().unwrap()) && !one.contains("10.0.0.0".parse().unwrap()));
        for bad in ["10.0.0.0", "10.0.0.0/33", "fd00::/8", "/8", ""] {
            assert!(bad.parse::<Subnet>().is_err(), "{bad}");
        }
    }

    #[test]
    fn ports_clash_on_every_address_or_the_same() {
        let port = |ip: Option<&str>, port, protocol: &str| HostPort {
            ip: ip.map(|ip| ip.parse().unwrap()),
            port,
            protocol: protocol.into(),
        };
        assert!(port(None, 80, "tcp").clashes(&port(Some("10.0.0.1"), 80, "tcp")));
        assert!(port(Some("0.0.0.0"), 80, "tcp").clashes(&port(Some("10.0.0.1"), 80, "tcp")));
        assert!(!port(Some("10.0.0.2"), 80, "tcp").clashes(&port(Some("10.0.0.1"), 80, "tcp")));
        assert!(!port(None, 80, "tcp").clashes(&port(None, 80, "udp")));
        assert!(!port(None, 80, "tcp").clashes(&port(None, 81, "tcp")));
    }
}
