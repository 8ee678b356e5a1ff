//! The container's addresses are announced from here: switches and neighbours still point at the old host.

use std::io;

use haulage_engine::ContainerSpec;
use haulage_sys::Pid;
use haulage_sys::arp::{Interface, announce, interface};
use haulage_sys::netns::NetworkNamespace;

/// Announces every IPv4 address that the container keeps, in the network namespace of process `init`.
pub(crate) fn addresses(spec: &ContainerSpec, init: i32) -> io::Result<()> {
    let init = Pid::from_raw(init).ok_or_else(|| io::Error::other("no such process"))?;
    NetworkNamespace::of(init)?.run(|| {
        let interfaces = interfaces()?;
        for network in &spec.networks {
            let (Some(address), Some(mac)) = (network.ipv4, network.mac.as_deref()) else { continue };
            let found = interfaces.iter().find(|interface| text(interface).eq_ignore_ascii_case(mac));
            match found {
                Some(interface) => announce(*interface, address)?,
                None => {
                    tracing::warn!(network = network.name, mac, "no interface has this address to announce")
                }
            }
        }
        Ok(())
    })?
}

/// The Ethernet interfaces of the thread's network namespace, by `/proc`, which follows the namespace as `/sys`
/// does not.
fn interfaces() -> io::Result<Vec<Interface>> {
    let table = std::fs::read_to_string("/proc/thread-self/net/dev")?;
    let names = table.lines().skip(2).filter_map(|line| line.split_once(':')).map(|(name, _)| name.trim());
    names.filter(|name| *name != "lo").map(interface).collect()
}

fn text(interface: &Interface) -> String {
    interface.mac.0.map(|byte| format!("{byte:02x}")).join(":")
}
