//! A network namespace for a container whose engine makes none that suits: on the fleet's segment, with the address that the
//! container takes along.

use super::{Place, announce};
use crate::process::{feed, run};
use anyhow::Result;
use std::path::Path;

impl Place<'_> {
    /// The namespace's name on a host, under /run/netns.
    pub(super) fn netns(&self, host: usize) -> String {
        format!("{}-{}", self.fleet.host(host).netns(), self.name())
    }

    /// Makes the network namespace on a host, with the container's address on an interface that is down still.
    pub(super) fn make_network(&self, host: usize) -> Result<()> {
        let (netns, outer) = (self.netns(host), self.fleet.host(host).netns());
        let link = format!("mv{}", self.index);
        let address = self.fleet.container_address(self.index);
        // As Docker makes them: 02:42 and the address.
        let [a, b, c, d] = address.octets();
        let mac = format!("02:42:{a:02x}:{b:02x}:{c:02x}:{d:02x}");
        run("ip", &["netns", "add", &netns])?;
        let add = ["-n", outer, "link", "add", &link, "link", "eth0", "address", &mac];
        run("ip", &[add.as_slice(), &["netns", &netns, "type", "macvlan", "mode", "bridge"]].concat())?;
        run("ip", &["-n", &netns, "link", "set", &link, "name", "eth0"])?;
        run("ip", &["-n", &netns, "addr", "add", &format!("{address}/24"), "dev", "eth0"])?;
        // Until its sockets are back, the kernel would reset the connections of whoever writes.
        drop_tcp(&netns, true)
    }

    /// Puts the address into use.
    pub(super) fn open_network(&self, host: usize) -> Result<()> {
        let netns = self.netns(host);
        run("ip", &["-n", &netns, "link", "set", "lo", "up"])?;
        run("ip", &["-n", &netns, "link", "set", "eth0", "up"])?;
        announce(format!("/run/netns/{netns}"), self.fleet.container_address(self.index));
        Ok(())
    }

    /// Makes it anew, whatever a move before has left of it.
    pub(super) fn renew_network(&self, host: usize) -> Result<()> {
        self.remove_network(host)?;
        self.make_network(host)
    }

    pub(super) fn remove_network(&self, host: usize) -> Result<()> {
        let netns = self.netns(host);
        if Path::new("/run/netns").join(&netns).exists() {
            run("ip", &["netns", "delete", &netns])?;
        }
        Ok(())
    }
}

/// Lets a network namespace drop all TCP that comes from elsewhere, or none. CRIU tries the kernel out over the loopback.
pub(super) fn drop_tcp(netns: &str, is_dropped: bool) -> Result<()> {
    let rule = if is_dropped { "-I INPUT -j HAUL\n-A HAUL -i eth0 -p tcp -j DROP\n" } else { "" };
    // Naming the chain makes it, or empties it.
    let text = format!("*filter\n:HAUL - [0:0]\n{rule}COMMIT\n");
    let inside = format!("--net=/run/netns/{netns}");
    feed("nsenter", &[&inside, "iptables-restore", "--noflush"], text.as_bytes()).map(drop)
}
