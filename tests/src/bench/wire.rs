//! Bytes that the hosts exchange with each other and with NATS.
//!
//! The interfaces' own counters would include the clients of the containers. So the packet filters of the hosts count:
//! what a container with an address of its own sends or receives never passes them.

use crate::fleet::Fleet;
use crate::host::Host;
use crate::process::run;
use anyhow::{Context, Result};
use serde::Serialize;
use std::net::Ipv4Addr;

/// Marks our rules.
const MARK: &str = "haul-bench";

/// The largest payload of a TCP segment on Ethernet, with timestamps, and all headers of one: Ethernet, IP, TCP.
const SEGMENT: u64 = 1448;
const HEADERS: u64 = 66;
const ETHERNET: u64 = 14;

/// Bytes so far, headers included.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Wire {
    /// Between the two hosts, both ways.
    pub hosts: u64,
    /// Between the hosts and NATS, both ways.
    pub control: u64,
}

impl Wire {
    /// What has come since an earlier reading.
    #[must_use]
    pub fn since(self, earlier: Self) -> Self {
        Self {
            hosts: self.hosts.saturating_sub(earlier.hosts),
            control: self.control.saturating_sub(earlier.control),
        }
    }

    /// Both.
    #[must_use]
    pub fn sum(self) -> u64 {
        self.hosts + self.control
    }
}

/// The counters of a fleet's first two hosts.
#[derive(Debug)]
pub struct Counters {
    hosts: [(String, Ipv4Addr); 2],
    nats: Ipv4Addr,
}

impl Counters {
    /// Starts counting.
    ///
    /// # Errors
    /// `iptables` refused.
    pub fn install(fleet: &Fleet) -> Result<Self> {
        let of = |host: &Host| (host.netns().to_owned(), host.address());
        let hosts = [of(fleet.host(0)), of(fleet.host(1))];
        let nats = match fleet.nats()?.address().ip() {
            std::net::IpAddr::V4(ip) => ip,
            std::net::IpAddr::V6(_) => anyhow::bail!("the fleet's NATS server has no IPv4 address"),
        };
        let counters = Self { hosts, nats };
        for (netns, _) in &counters.hosts {
            for peer in counters.hosts.iter().map(|(_, ip)| *ip).chain([nats]) {
                let peer = peer.to_string();
                for (chain, side) in [("OUTPUT", "-d"), ("INPUT", "-s")] {
                    let rule = ["-I", chain, side, &peer, "-m", "comment", "--comment", MARK];
                    inside(netns, "iptables", &rule)?;
                }
            }
        }
        Ok(counters)
    }

    /// Reads the counters.
    ///
    /// # Errors
    /// `iptables` failed.
    pub fn read(&self) -> Result<Wire> {
        let mut all = Wire::default();
        for (index, (netns, own)) in self.hosts.iter().enumerate() {
            let rules = inside(netns, "iptables-save", &["-c", "-t", "filter"])?;
            for rule in rules.lines().filter(|line| line.contains(MARK)) {
                let (peer, bytes) = counted(rule).with_context(|| format!("not a counter: {rule}"))?;
                if peer == self.nats {
                    all.control += bytes;
                } else if peer != *own && index == 0 {
                    // The other host sees the same packets.
                    all.hosts += bytes;
                }
            }
        }
        Ok(all)
    }
}

/// Runs a program in a network namespace and gives what it printed.
pub(crate) fn inside(netns: &str, program: &str, arguments: &[&str]) -> Result<String> {
    let netns = format!("--net=/run/netns/{netns}");
    run("nsenter", &[&[netns.as_str(), program], arguments].concat())
}

/// The peer and the bytes of a line such as `[12:3456] -A INPUT -s 10.0.0.1/32 -m comment …`.
fn counted(rule: &str) -> Option<(Ipv4Addr, u64)> {
    let (counts, rest) = rule.strip_prefix('[')?.split_once(']')?;
    let (packets, bytes) = counts.split_once(':')?;
    let peer = rest.split_whitespace().find_map(|word| word.strip_suffix("/32"))?;
    Some((peer.parse().ok()?, on_wire(packets.parse().ok()?, bytes.parse().ok()?)))
}

/// What so many packets with so many bytes of IP take on a wire. The kernel passes up to 64 KiB as one packet here, which
/// a network card would cut into segments, each with headers of its own.
fn on_wire(packets: u64, bytes: u64) -> u64 {
    let segments = (bytes / (SEGMENT + HEADERS - ETHERNET)).max(packets);
    bytes + packets * ETHERNET + (segments - packets) * HEADERS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_gives_peer_and_bytes_with_headers() {
        let rule = "[2:3000] -A OUTPUT -d 10.64.1.12/32 -m comment --comment haul-bench";
        // Two whole segments: 1500 bytes of IP each, and Ethernet's headers.
        assert_eq!(counted(rule), Some((Ipv4Addr::new(10, 64, 1, 12), 3028)));
        // The same as one large packet: its second segment has headers too, which the packet filter does not see.
        assert_eq!(on_wire(1, 3000), 3000 + 14 + 66);
        assert_eq!(counted("-A OUTPUT -d 10.64.1.12/32"), None);
    }
}
