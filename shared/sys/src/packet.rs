//! Whole packets of TCP over IPv4, taken from the interfaces of a network namespace and put back into it
//! (`packet(7)`): what a packet filter drops on its way in is seen here all the same.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::arp;

/// Ethernet's header: destination, source, type.
const HEADER: usize = 14;
/// The longest frame: an IPv4 packet may have 65,535 bytes, also where the medium has shorter ones, since the kernel
/// joins segments.
const LONGEST: usize = HEADER + 65_535;
/// Room for packets that nobody has read yet, in bytes: 60 ms at 1 Gbit/s.
const ROOM: libc::c_int = 8 << 20;
/// Where the loopback interface leads back to.
const LOOPBACK: &str = "lo";

/// Packets that arrive, from when this was made.
#[derive(Debug)]
pub struct Capture(OwnedFd);

impl Capture {
    /// Begins to take packets of TCP over IPv4 that are addressed to the interfaces of the calling thread's network
    /// namespace, but for the loopback. Those beyond some 8 MiB are lost. Needs `CAP_NET_RAW`.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn begin() -> io::Result<Self> {
        // Nothing comes before it is bound to a protocol, which is after it has its filter.
        let socket = socket(libc::SOCK_RAW | libc::SOCK_NONBLOCK)?;
        attach_filter(&socket)?;
        // Without CAP_NET_ADMIN it is as long as the system allows.
        if option(&socket, libc::SO_RCVBUFFORCE, &ROOM).is_err() {
            option(&socket, libc::SO_RCVBUF, &ROOM)?;
        }
        let at = address(0);
        // SAFETY: the kernel reads one `struct sockaddr_ll`, which `at` is.
        check(unsafe { libc::bind(socket.as_raw_fd(), (&raw const at).cast(), size_of_val(&at) as u32) })?;
        Ok(Self(socket))
    }

    /// The next IPv4 packet, without the medium's header; `None` when there is none yet.
    ///
    /// # Errors
    /// What `recv(2)` says.
    pub fn next(&self) -> io::Result<Option<Vec<u8>>> {
        let mut frame = vec![0; LONGEST];
        // SAFETY: the kernel writes at most as many bytes as the buffer has.
        let got = unsafe { libc::recv(self.0.as_raw_fd(), frame.as_mut_ptr().cast(), frame.len(), 0) };
        match usize::try_from(got) {
            Ok(length) => {
                frame.truncate(length);
                Ok(Some(frame.split_off(HEADER.min(length))))
            }
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
                error => Err(error),
            },
        }
    }
}

/// Puts IPv4 packets back into the network namespace of the calling thread, as if they had just arrived: over the loopback
/// interface, whose source address check (`rp_filter`) must not be strict.
///
/// # Errors
/// What the kernel says of a packet; those before it are in.
pub fn put_back<'a>(packets: impl IntoIterator<Item = &'a [u8]>) -> io::Result<()> {
    let loopback = arp::interface(LOOPBACK)?;
    let socket = socket(libc::SOCK_RAW)?;
    let to = address(i32::try_from(loopback.index).map_err(io::Error::other)?);
    let mut frame = Vec::with_capacity(LONGEST);
    for packet in packets {
        frame.clear();
        // To and from the loopback's address, which is zero.
        frame.extend([0; HEADER - 2]);
        frame.extend((libc::ETH_P_IP as u16).to_be_bytes());
        frame.extend(packet);
        // SAFETY: the kernel reads the frame and one `struct sockaddr_ll`, both of the lengths given.
        let sent = unsafe {
            libc::sendto(
                socket.as_raw_fd(),
                frame.as_ptr().cast(),
                frame.len(),
                0,
                (&raw const to).cast(),
                size_of_val(&to) as u32,
            )
        };
        if sent == -1 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Without a protocol: it receives nothing yet.
fn socket(kind: libc::c_int) -> io::Result<OwnedFd> {
    // SAFETY: the call takes numbers only and returns a new descriptor or -1.
    let fd = unsafe { libc::socket(libc::AF_PACKET, kind | libc::SOCK_CLOEXEC, 0) };
    check(fd)?;
    // SAFETY: the descriptor is fresh from the kernel and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// IPv4 on an interface; on all where `index` is zero.
fn address(index: i32) -> libc::sockaddr_ll {
    // SAFETY: the structure is plain numbers, for which zero is valid.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = (libc::ETH_P_IP as u16).to_be();
    address.sll_ifindex = index;
    address
}

fn option<T>(socket: &OwnedFd, name: libc::c_int, value: &T) -> io::Result<()> {
    // SAFETY: the kernel reads one value of the size given.
    check(unsafe {
        let (value, length) = ((&raw const *value).cast(), size_of::<T>() as u32);
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, name, value, length)
    })
}

/// Accepts what is for this host (`PACKET_HOST`), not of the loopback, and TCP. The offsets of the kernel's own facts and
/// the instructions are those of `linux/filter.h`.
fn attach_filter(socket: &OwnedFd) -> io::Result<()> {
    const LOAD_WORD: u16 = 0x20;
    const LOAD_BYTE: u16 = 0x30;
    const JUMP_IF_EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    const FACTS: u32 = 0xffff_f000;
    const PACKET_TYPE: u32 = FACTS + 4;
    const HARDWARE_TYPE: u32 = FACTS + 28;
    const PACKET_HOST: u32 = 0;
    const LOOPBACK: u32 = 772;
    const PROTOCOL: u32 = HEADER as u32 + 9;
    const TCP: u32 = 6;
    let instruction = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let mut program = [
        instruction(LOAD_WORD, 0, 0, PACKET_TYPE),
        instruction(JUMP_IF_EQUAL, 0, 5, PACKET_HOST),
        instruction(LOAD_WORD, 0, 0, HARDWARE_TYPE),
        instruction(JUMP_IF_EQUAL, 3, 0, LOOPBACK),
        instruction(LOAD_BYTE, 0, 0, PROTOCOL),
        instruction(JUMP_IF_EQUAL, 0, 1, TCP),
        instruction(RETURN, 0, 0, LONGEST as u32),
        instruction(RETURN, 0, 0, 0),
    ];
    let program = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    option(socket, libc::SO_ATTACH_FILTER, &program)
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netns::NetworkNamespace;
    use std::process::Command;

    fn ip(arguments: &str) {
        assert!(Command::new("ip").args(arguments.split(' ')).status().unwrap().success(), "ip {arguments}");
    }

    /// States of IPv4 TCP sockets on port 7 (`proc_pid_net(5)`): 0A listens, 03 has been asked for a connection.
    fn states() -> Vec<String> {
        let table = std::fs::read_to_string("/proc/thread-self/net/tcp").unwrap();
        let fields = table.lines().skip(1).map(|line| line.split_whitespace().collect::<Vec<_>>());
        fields.filter(|fields| fields[1].ends_with(":0007")).map(|fields| fields[3].to_owned()).collect()
    }

    #[test]
    fn what_was_taken_can_be_put_back() {
        let (near, _near_stays) = NetworkNamespace::create().unwrap();
        let (far, far_stays) = NetworkNamespace::create().unwrap();
        near.run(|| {
            ip(&format!("link add near type veth peer name far netns {}", far_stays.id()));
            ip("addr add 10.9.9.1/24 dev near");
            ip("link set near up");
        })
        .unwrap();
        let capture = far.run(|| {
            ip("addr add 10.9.9.2/24 dev far");
            ip("link set lo up");
            ip("link set far up");
            Capture::begin().unwrap()
        });
        let capture = capture.unwrap();
        near.run(|| {
            let to = "10.9.9.2:7".parse().unwrap();
            // Nobody listens yet: the packet is refused, and taken all the same.
            std::net::TcpStream::connect_timeout(&to, std::time::Duration::from_secs(5)).unwrap_err();
            ip("link set near down");
        })
        .unwrap();
        let packet = capture.next().unwrap().unwrap();
        assert_eq!((packet[0] >> 4, &packet[16..20]), (4, &[10, 9, 9, 2][..]));
        assert!(capture.next().unwrap().is_none());
        let (_listener, before, after) = far
            .run(|| {
                let listener = std::net::TcpListener::bind("0.0.0.0:7").unwrap();
                let before = states();
                put_back([with_checksum(packet.clone()).as_slice()]).unwrap();
                (listener, before, states())
            })
            .unwrap();
        assert_eq!(before, ["0A"]);
        assert!(after.contains(&"03".to_owned()), "{after:?}");
    }

    /// The sender left it to a device that there is not.
    fn with_checksum(mut packet: Vec<u8>) -> Vec<u8> {
        packet[36..38].fill(0);
        let pseudo =
            [&packet[12..20], &[0, 6], &(packet.len() as u16 - 20).to_be_bytes(), &packet[20..]].concat();
        let sum: u32 = pseudo.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
        let sum = (sum & 0xffff) + (sum >> 16);
        let sum = !(((sum & 0xffff) + (sum >> 16)) as u16);
        packet[36..38].copy_from_slice(&sum.to_be_bytes());
        packet
    }
}
