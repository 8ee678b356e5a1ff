//! Announcing an IPv4 address: gratuitous ARP, as RFC 826 and RFC 5227 describe it.
//!
//! After a container has moved, switches and neighbours still send its packets to the old host until they hear from
//! the new one.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// An Ethernet address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MacAddr(pub [u8; 6]);

impl std::fmt::Display for MacAddr {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0.map(|byte| format!("{byte:02x}")).join(":"))
    }
}

/// A network interface, as the kernel numbers it in one network namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Interface {
    /// Its index.
    pub index: u32,
    /// Its Ethernet address.
    pub mac: MacAddr,
}

const ETHERNET: u16 = 1;
const REQUEST: u16 = 1;
const REPLY: u16 = 2;
const BROADCAST: [u8; 6] = [0xff; 6];

/// The interface called `name` in the network namespace of the calling thread.
///
/// # Errors
/// `NotFound`-like errors of the kernel (`ENODEV`) when there is none; `InvalidInput` for a name longer than 15 bytes.
pub fn interface(name: &str) -> io::Result<Interface> {
    let socket = socket(libc::AF_INET, libc::SOCK_DGRAM, 0)?;
    // SAFETY: the structure is plain bytes and numbers, for which zero is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "interface name too long"));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    // SAFETY: SIOCGIFINDEX reads and writes one `struct ifreq`; on success its index is set.
    let index = unsafe {
        check(libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFINDEX as libc::Ioctl, &raw mut request))?;
        request.ifr_ifru.ifru_ifindex
    };
    // SAFETY: SIOCGIFHWADDR likewise; on success its hardware address is set.
    let address = unsafe {
        check(libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFHWADDR as libc::Ioctl, &raw mut request))?;
        request.ifr_ifru.ifru_hwaddr.sa_data
    };
    let mut mac = [0; 6];
    for (to, from) in mac.iter_mut().zip(address) {
        *to = from as u8;
    }
    Ok(Interface { index: index as u32, mac: MacAddr(mac) })
}

/// Tells everyone on the segment of `interface` that `address` is at its Ethernet address, in both customary forms,
/// request and reply. Acts in the network namespace of the calling thread; needs `CAP_NET_RAW`.
///
/// # Errors
/// What the kernel says, `ENETDOWN` when the interface is down. The first form may have been sent.
pub fn announce(interface: Interface, address: Ipv4Addr) -> io::Result<()> {
    let protocol = (libc::ETH_P_ARP as u16).to_be();
    let socket = socket(libc::AF_PACKET, libc::SOCK_DGRAM, i32::from(protocol))?;
    // SAFETY: the structure is plain numbers, for which zero is valid.
    let mut to: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    to.sll_family = libc::AF_PACKET as u16;
    to.sll_protocol = protocol;
    to.sll_ifindex = interface.index as i32;
    to.sll_halen = BROADCAST.len() as u8;
    for (to, from) in to.sll_addr.iter_mut().zip(BROADCAST) {
        *to = from;
    }
    for operation in [REQUEST, REPLY] {
        let packet = packet(operation, interface.mac, address);
        // SAFETY: the kernel reads `packet` and one `struct sockaddr_ll`, both of the lengths given.
        let sent = unsafe {
            libc::sendto(
                socket.as_raw_fd(),
                packet.as_ptr().cast(),
                packet.len(),
                0,
                (&raw const to).cast(),
                size_of::<libc::sockaddr_ll>() as libc::socklen_t,
            )
        };
        if sent == -1 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Announces, in the network namespace of process `pid`, each address on the interface that has the Ethernet address
/// (`aa:bb:cc:dd:ee:ff`) given with it; returns those for which there is no interface.
///
/// # Errors
/// When the namespace cannot be entered or an interface does not send. Some may have been announced.
pub fn announce_all(pid: crate::Pid, addresses: &[(String, Ipv4Addr)]) -> io::Result<Vec<Ipv4Addr>> {
    announce_in(&crate::netns::NetworkNamespace::of(pid)?, addresses)
}

/// As [`announce_all`], in a namespace that is known.
///
/// # Errors
/// As those.
pub fn announce_in(
    namespace: &crate::netns::NetworkNamespace,
    addresses: &[(String, Ipv4Addr)],
) -> io::Result<Vec<Ipv4Addr>> {
    namespace.run(|| {
        // By `/proc`, which follows the thread's namespace as `/sys` does not.
        let table = std::fs::read_to_string("/proc/thread-self/net/dev")?;
        let names =
            table.lines().skip(2).filter_map(|line| line.split_once(':')).map(|(name, _)| name.trim());
        let interfaces = names.filter(|name| *name != "lo").map(interface).collect::<io::Result<Vec<_>>>()?;
        let mut absent = Vec::new();
        for (mac, address) in addresses {
            match interfaces.iter().find(|found| found.mac.to_string().eq_ignore_ascii_case(mac)) {
                Some(found) => announce(*found, *address)?,
                None => absent.push(*address),
            }
        }
        Ok(absent)
    })?
}

/// An ARP packet in which sender and target are the announced address.
fn packet(operation: u16, mac: MacAddr, address: Ipv4Addr) -> Vec<u8> {
    let target = if operation == REPLY { mac.0 } else { [0; 6] };
    let mut packet = Vec::with_capacity(28);
    packet.extend(ETHERNET.to_be_bytes());
    packet.extend((libc::ETH_P_IP as u16).to_be_bytes());
    packet.extend([6, 4]);
    packet.extend(operation.to_be_bytes());
    packet.extend(mac.0);
    packet.extend(address.octets());
    packet.extend(target);
    packet.extend(address.octets());
    packet
}

fn socket(family: libc::c_int, kind: libc::c_int, protocol: libc::c_int) -> io::Result<OwnedFd> {
    // SAFETY: the call takes numbers only and returns a new descriptor or -1.
    let fd = unsafe { libc::socket(family, kind | libc::SOCK_CLOEXEC, protocol) };
    check(fd)?;
    // SAFETY: the descriptor is fresh from the kernel and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_packet_is_laid_out_as_rfc_826_says() {
        let packet = packet(REQUEST, MacAddr([2, 0, 0, 0, 0, 7]), Ipv4Addr::new(10, 0, 0, 9));
        #[rustfmt::skip]
        assert_eq!(packet, [
            0, 1, 8, 0, 6, 4, 0, 1,
            2, 0, 0, 0, 0, 7, 10, 0, 0, 9,
            0, 0, 0, 0, 0, 0, 10, 0, 0, 9,
        ]);
    }

    #[test]
    fn loopback_takes_an_announcement_and_an_unknown_interface_is_an_error() {
        let loopback = interface("lo").unwrap();
        assert_eq!(loopback.mac, MacAddr([0; 6]));
        announce(loopback, Ipv4Addr::LOCALHOST).unwrap();
        assert!(interface("no-such-if0").is_err());
        assert!(interface("a-name-that-is-too-long").is_err());
    }
}
