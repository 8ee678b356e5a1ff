//! The fleet's network: a bridge in the root namespace and one namespace for each host.

use crate::process::run;
use anyhow::{Result, bail};
use std::collections::HashSet;
use std::net::Ipv4Addr;

/// The /24 of a fleet, out of 10.64.0.0/10.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Subnet {
    second: u8,
    third: u8,
}

impl Subnet {
    /// The address with the given last number.
    #[must_use]
    pub fn address(self, last: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, self.second, self.third, last)
    }

    /// The subnet in CIDR notation.
    #[must_use]
    pub fn cidr(self) -> String {
        format!("{}/24", self.address(0))
    }
}

/// Where the bridge itself is: the clients' address, the NATS server's, and the containers' gateway.
pub const GATEWAY: u8 = 1;

/// A bridge with a name and a subnet that nothing else uses.
#[derive(Debug)]
pub struct Segment {
    /// The bridge's name, which is the fleet's name too: `haul-` and four hexadecimal digits.
    pub name: String,
    /// Its subnet.
    pub subnet: Subnet,
}

impl Segment {
    /// The candidates for a name, each with its subnet, in an order that differs from process to process.
    fn candidates() -> impl Iterator<Item = Self> {
        let seed = std::process::id();
        (0..=u32::from(u16::MAX)).map(move |i| {
            // 10.64.0.0/10 has 2^14 subnets of that size; an odd factor visits each of them.
            let number = (seed.wrapping_add(i)).wrapping_mul(7919) % (1 << 14);
            let [_, _, high, low] = number.to_be_bytes();
            Self { name: format!("haul-{number:04x}"), subnet: Subnet { second: 64 + high, third: low } }
        })
    }

    /// Chooses a free name and subnet. Nothing is made yet; [`Segment::create`] fails if another took it meanwhile.
    ///
    /// # Errors
    /// `ip` cannot list the machine's routes, or none is free.
    pub fn choose() -> Result<Self> {
        let routes = run("ip", &["-4", "-o", "route", "show", "table", "all"])?;
        let used: HashSet<&str> = routes.split_whitespace().collect();
        for candidate in Self::candidates() {
            let bridge = std::path::Path::new("/sys/class/net").join(&candidate.name);
            if !used.contains(candidate.subnet.cidr().as_str()) && !bridge.exists() {
                return Ok(candidate);
            }
        }
        bail!("no free /24 in 10.64.0.0/10")
    }

    /// Makes the bridge. The kernel refuses a name that is taken, so two fleets never share one.
    ///
    /// # Errors
    /// `ip` failed; a bridge half made is the janitor's to remove.
    pub fn create(&self) -> Result<()> {
        ip(&["link", "add", &self.name, "type", "bridge"])?;
        ip(&["addr", "add", &format!("{}/24", self.subnet.address(GATEWAY)), "dev", &self.name])?;
        ip(&["link", "set", &self.name, "up"])
    }

    /// Makes the network namespace `<name>-<letter>`, joined to the bridge by its `eth0` with the given address.
    ///
    /// # Errors
    /// `ip` failed; what was made is the janitor's to remove.
    pub fn add_host(&self, letter: char, address: Ipv4Addr) -> Result<()> {
        let netns = self.netns(letter);
        let outer = format!("{}-{letter}", self.name);
        ip(&["netns", "add", &netns])?;
        ip(&["link", "add", &outer, "type", "veth", "peer", "name", "eth0", "netns", &netns])?;
        ip(&["link", "set", &outer, "master", &self.name, "up"])?;
        ip(&["-n", &netns, "addr", "add", &format!("{address}/24"), "dev", "eth0"])?;
        ip(&["-n", &netns, "link", "set", "eth0", "up"])?;
        ip(&["-n", &netns, "link", "set", "lo", "up"])?;
        ip(&["-n", &netns, "route", "add", "default", "via", &self.subnet.address(GATEWAY).to_string()])
    }

    /// The name of a host's network namespace.
    #[must_use]
    pub fn netns(&self, letter: char) -> String {
        format!("{}-{letter}", self.name)
    }
}

fn ip(arguments: &[&str]) -> Result<()> {
    run("ip", arguments).map(drop)
}
