//! The fleet's network: a switch (a bridge in a namespace of its own), to which every host and the root namespace are
//! joined.
//!
//! The bridge is not in the root namespace because what it forwards would pass that one's packet filter: with an
//! engine of its own the machine has `br_netfilter` and drops what its filter does not know.

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

/// Where the root namespace is: the clients' address, the NATS server's, and the containers' gateway.
pub const GATEWAY: u8 = 1;

/// The last part of the name of the switch's namespace.
const SWITCH: &str = "switch";
/// The bridge in it.
const BRIDGE: &str = "bridge";

/// A segment of Ethernet with a name and a subnet that nothing else uses.
#[derive(Debug)]
pub struct Segment {
    /// The name of the root namespace's link to it, which is the fleet's name too: `haul-` and four hexadecimal digits.
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
            let link = std::path::Path::new("/sys/class/net").join(&candidate.name);
            if !used.contains(candidate.subnet.cidr().as_str()) && !link.exists() {
                return Ok(candidate);
            }
        }
        bail!("no free /24 in 10.64.0.0/10")
    }

    /// Makes the switch and joins the root namespace to it. The kernel refuses names that are taken, so two fleets
    /// never share one.
    ///
    /// # Errors
    /// `ip` failed; a switch half made is the janitor's to remove.
    pub fn create(&self) -> Result<()> {
        let switch = self.switch();
        ip(&["netns", "add", &switch])?;
        ip(&["-n", &switch, "link", "add", BRIDGE, "type", "bridge"])?;
        ip(&["-n", &switch, "link", "set", BRIDGE, "up"])?;
        ip(&["link", "add", &self.name, "type", "veth", "peer", "name", "root", "netns", &switch])?;
        ip(&["-n", &switch, "link", "set", "root", "master", BRIDGE, "up"])?;
        ip(&["addr", "add", &format!("{}/24", self.subnet.address(GATEWAY)), "dev", &self.name])?;
        ip(&["link", "set", &self.name, "up"])
    }

    /// Makes the network namespace `<name>-<letter>`, joined to the switch by its `eth0` with the given address.
    ///
    /// # Errors
    /// `ip` failed; what was made is the janitor's to remove.
    pub fn add_host(&self, letter: char, address: Ipv4Addr) -> Result<()> {
        let (switch, netns, cable) = (self.switch(), self.netns(letter), cable(letter));
        ip(&["netns", "add", &netns])?;
        ip(&["-n", &switch, "link", "add", &cable, "type", "veth", "peer", "name", "eth0", "netns", &netns])?;
        ip(&["-n", &switch, "link", "set", &cable, "master", BRIDGE, "up"])?;
        ip(&["-n", &netns, "addr", "add", &format!("{address}/24"), "dev", "eth0"])?;
        ip(&["-n", &netns, "link", "set", "eth0", "up"])?;
        ip(&["-n", &netns, "link", "set", "lo", "up"])?;
        ip(&["-n", &netns, "route", "add", "default", "via", &self.subnet.address(GATEWAY).to_string()])
    }

    /// Pulls the cable between a host and the switch, or plugs it in again.
    ///
    /// # Errors
    /// `ip` failed.
    pub fn plug(&self, letter: char, plugged: bool) -> Result<()> {
        let state = if plugged { "up" } else { "down" };
        ip(&["-n", &self.switch(), "link", "set", &cable(letter), state])
    }

    /// Both ends of a host's cable, each with the namespace it is in: what leaves the one reaches the host, what leaves
    /// the other comes from it.
    #[must_use]
    pub fn cable_ends(&self, letter: char) -> [(String, String); 2] {
        [(self.switch(), cable(letter)), (self.netns(letter), "eth0".to_owned())]
    }

    /// The name of the switch's network namespace.
    fn switch(&self) -> String {
        format!("{}-{SWITCH}", self.name)
    }

    /// The name of a host's network namespace.
    #[must_use]
    pub fn netns(&self, letter: char) -> String {
        format!("{}-{letter}", self.name)
    }
}

/// The switch's end of the link to a host.
fn cable(letter: char) -> String {
    format!("host-{letter}")
}

fn ip(arguments: &[&str]) -> Result<()> {
    run("ip", arguments).map(drop)
}
