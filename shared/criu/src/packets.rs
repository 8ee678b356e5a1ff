//! Packets of TCP that arrive for a container while it stands still. They are kept, on the source beside the images and on
//! the target by the runtime, and put back when it runs: a client that had to send one again would wait 200 ms at least
//! (`TCP_RTO_MIN` of the kernel).
//!
//! Whatever is kept twice, or had been taken in before, is a repetition to TCP, which drops it. Other protocols are not
//! kept: they must live with loss, and not with repetition.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Read};
use std::path::Path;

use haulage_sys::packet::{self, Capture};

/// The file among the images.
const NAME: &str = "haulage-packets";
/// Its first bytes: the name and the version of the format. After them each packet, with its length (u16,
/// little-endian) before it.
const MAGIC: &[u8; 8] = b"HAULPK\0\x01";
/// What is kept at most, in bytes; the rest is sent again by those who sent it.
const MOST: usize = 16 << 20;
const LOOPBACK_CHECK: &str = "/proc/sys/net/ipv4/conf/lo/rp_filter";
/// "Loose mode": the source must be reachable, over whatever interface (`ip-sysctl.rst`). The stricter of the setting of
/// all interfaces and of one does not count, but the larger.
const LOOSE: &str = "2";

/// Everything that has arrived so far, fit to be put back.
///
/// # Errors
/// When the socket fails.
pub fn drain(capture: &Capture) -> io::Result<Vec<Vec<u8>>> {
    let mut packets = Vec::new();
    let mut size = 0;
    while let Some(packet) = capture.next()? {
        size += packet.len();
        if size > MOST {
            break;
        }
        packets.extend(complete(packet));
    }
    Ok(packets)
}

/// Puts packets back, in the network namespace of the calling thread.
///
/// # Errors
/// Those that could not be are sent again by those who sent them.
pub fn put_back(packets: &[Vec<u8>]) -> io::Result<()> {
    if packets.is_empty() {
        return Ok(());
    }
    let before = fs::read_to_string(LOOPBACK_CHECK)?;
    fs::write(LOOPBACK_CHECK, LOOSE)?;
    let put = packet::put_back(packets.iter().map(Vec::as_slice));
    fs::write(LOOPBACK_CHECK, before.trim())?;
    put
}

/// Writes packets beside the images in `images`; none leave no file.
///
/// # Errors
/// Of the file system.
pub fn write(images: &Path, packets: &[Vec<u8>]) -> io::Result<()> {
    if packets.is_empty() {
        return Ok(());
    }
    let mut bytes = MAGIC.to_vec();
    for packet in packets {
        // An IPv4 packet is no longer.
        let Ok(length) = u16::try_from(packet.len()) else { continue };
        bytes.extend(length.to_le_bytes());
        bytes.extend(packet);
    }
    fs::write(images.join(NAME), bytes)
}

/// Reads those beside the images in `images`.
///
/// # Errors
/// `InvalidData` when the file is not understood.
pub fn read(images: &Path) -> io::Result<Vec<Vec<u8>>> {
    let file = match File::open(images.join(NAME)) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        file => file?,
    };
    let mut bytes = Vec::new();
    // Each packet of the least length, 20 bytes, has two more.
    file.take(2 * MOST as u64).read_to_end(&mut bytes)?;
    parse(&bytes).ok_or_else(|| io::Error::new(ErrorKind::InvalidData, format!("{NAME} is not understood")))
}

fn parse(bytes: &[u8]) -> Option<Vec<Vec<u8>>> {
    let mut rest = bytes.strip_prefix(MAGIC)?;
    let mut packets = Vec::new();
    while !rest.is_empty() {
        let (length, after) = rest.split_first_chunk()?;
        let (packet, after) = after.split_at_checked(usize::from(u16::from_le_bytes(*length)))?;
        packets.push(complete(packet.to_vec())?);
        rest = after;
    }
    Some(packets)
}

/// The packet without what the medium added, and with its checksum, which a sender on this machine leaves to a device
/// that there is not. `None` when it is no whole segment of TCP (RFC 791, RFC 9293).
fn complete(mut packet: Vec<u8>) -> Option<Vec<u8>> {
    const TCP: u8 = 6;
    const CHECKSUM: usize = 16;
    let (&first, &protocol) = (packet.first()?, packet.get(9)?);
    let header = usize::from(first & 0xf) * 4;
    let word = |packet: &[u8], at: usize| Some(u16::from_be_bytes([*packet.get(at)?, *packet.get(at + 1)?]));
    let length = usize::from(word(&packet, 2)?);
    let is_fragment = word(&packet, 6)? & 0x3fff != 0;
    if first >> 4 != 4 || header < 20 || protocol != TCP || is_fragment || length > packet.len() {
        return None;
    }
    packet.truncate(length);
    let segment = packet.get_mut(header..).filter(|segment| segment.len() >= 20)?;
    segment.get_mut(CHECKSUM..CHECKSUM + 2)?.fill(0);
    let segment_length = u16::try_from(length - header).ok()?;
    let sum =
        sum(packet.get(12..20)?) + u32::from(TCP) + u32::from(segment_length) + sum(packet.get(header..)?);
    let folded = (sum & 0xffff) + (sum >> 16);
    let checksum = !((folded & 0xffff) + (folded >> 16)) as u16;
    packet.get_mut(header + CHECKSUM..header + CHECKSUM + 2)?.copy_from_slice(&checksum.to_be_bytes());
    Some(packet)
}

/// Of 16-bit words; a packet is too short for it to overflow.
fn sum(bytes: &[u8]) -> u32 {
    let words = bytes.chunks(2).map(|pair| match pair {
        [high, low] => u32::from(u16::from_be_bytes([*high, *low])),
        [high] => u32::from(*high) << 8,
        _ => 0,
    });
    words.sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A segment with `payload` and a checksum that is none.
    fn segment(payload: &[u8]) -> Vec<u8> {
        let length = (40 + payload.len()) as u16;
        let mut packet = vec![0x45, 0];
        packet.extend(length.to_be_bytes());
        packet.extend([0, 1, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        packet.extend([0x30, 0x39, 0, 7, 0, 0, 0, 1, 0, 0, 0, 2, 0x50, 0x18, 1, 0, 0xde, 0xad, 0, 0]);
        packet.extend(payload);
        packet
    }

    /// RFC 1071: over pseudo header and segment, checksum included, it is all ones.
    fn is_right(packet: &[u8]) -> bool {
        let mut whole = packet[12..20].to_vec();
        whole.extend([0, 6]);
        whole.extend(((packet.len() - 20) as u16).to_be_bytes());
        whole.extend(&packet[20..]);
        let mut total: u64 = 0;
        for pair in whole.chunks(2) {
            total += u64::from(pair[0]) << 8 | pair.get(1).map_or(0, |low| u64::from(*low));
        }
        while total > 0xffff {
            total = (total & 0xffff) + (total >> 16);
        }
        total == 0xffff
    }

    proptest! {
        #[test]
        fn checksums_are_right(payload in prop::collection::vec(any::<u8>(), 0..2000), padding in 0usize..8) {
            let mut packet = segment(&payload);
            let length = packet.len();
            packet.extend(vec![7; padding]);
            let complete = complete(packet).unwrap();
            prop_assert_eq!(complete.len(), length);
            prop_assert!(is_right(&complete));
        }

        #[test]
        fn garbage_is_no_packet_and_no_file(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Some(packet) = complete(bytes.clone()) {
                prop_assert!(is_right(&packet));
            }
            let mut file = MAGIC.to_vec();
            file.extend(bytes);
            let _ = parse(&file);
        }
    }

    #[test]
    fn what_is_no_segment_is_left_out() {
        assert!(complete(segment(b"x")).is_some());
        let changed = |at: usize, to: u8| {
            let mut packet = segment(b"x");
            packet[at] = to;
            packet
        };
        for other in [changed(0, 0x65), changed(0, 0x44), changed(9, 17), changed(6, 0x20), changed(3, 200)] {
            assert_eq!(complete(other), None);
        }
        assert_eq!(complete(segment(b"x")[..39].to_vec()), None);
    }

    #[test]
    fn a_file_gives_what_it_was_given() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(read(dir.path()).unwrap(), Vec::<Vec<u8>>::new());
        let packets: Vec<_> = [&b""[..], b"abc"].map(segment).into_iter().filter_map(complete).collect();
        write(dir.path(), &packets).unwrap();
        assert_eq!(read(dir.path()).unwrap(), packets);
        let bytes = fs::read(dir.path().join(NAME)).unwrap();
        fs::write(dir.path().join(NAME), &bytes[..bytes.len() - 1]).unwrap();
        assert_eq!(read(dir.path()).unwrap_err().kind(), ErrorKind::InvalidData);
    }
}
