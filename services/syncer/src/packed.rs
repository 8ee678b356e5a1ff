//! Frames on the way while the container stands still: what they take on the link is downtime.
//!
//! ```text
//!  0, records        as they are
//!  1, length u32 little-endian, LZ4 block of the records
//! ```

use std::borrow::Cow;

use bytes::Bytes;
use haulage_protocol::fault::{Fault, code};
use lz4_flex::block::{compress_into, decompress_into, get_maximum_output_size};

const PLAIN: u8 = 0;
const LZ4: u8 = 1;
/// Bytes of the tag and the length.
const HEAD: usize = 5;
/// The most that a frame unpacks to, in bytes: the longest frame is of little more than a MiB.
const LONGEST: usize = 4 << 20;
/// What is shorter goes in a packet or two, however it is packed.
const SHORT: usize = 2 << 10;

/// A frame to send, no longer than the records and a byte.
pub(crate) fn pack(records: &[u8]) -> Bytes {
    let plain = || Bytes::from([&[PLAIN], records].concat());
    let Some(length) = u32::try_from(records.len()).ok().filter(|_| records.len() >= SHORT) else {
        return plain();
    };
    let mut packed = vec![0; HEAD + get_maximum_output_size(records.len())];
    let Some((head, body)) = packed.split_first_chunk_mut::<HEAD>() else { return plain() };
    let [tag, length_s @ ..] = head;
    (*tag, *length_s) = (LZ4, length.to_le_bytes());
    match compress_into(records, body) {
        Ok(size) if HEAD + size < records.len() => {
            packed.truncate(HEAD + size);
            packed.into()
        }
        _ => plain(),
    }
}

/// The records of a frame that came.
///
/// # Errors
/// `malformed`, of what [`pack`] does not make. No more than 4 MiB are allocated.
pub(crate) fn unpack(frame: &[u8]) -> Result<Cow<'_, [u8]>, Fault> {
    let malformed = || Fault::new(code::MALFORMED, "a packed frame of files is damaged");
    let (tag, rest) = frame.split_first().ok_or_else(malformed)?;
    match *tag {
        PLAIN => Ok(Cow::Borrowed(rest)),
        LZ4 => {
            let (length, packed) = rest.split_first_chunk::<4>().ok_or_else(malformed)?;
            let length = usize::try_from(u32::from_le_bytes(*length)).map_err(|_| malformed())?;
            let mut records =
                vec![0; Some(length).filter(|length| *length <= LONGEST).ok_or_else(malformed)?];
            match decompress_into(packed, &mut records) {
                Ok(found) if found == length => Ok(Cow::Owned(records)),
                _ => Err(malformed()),
            }
        }
        _ => Err(malformed()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_come_back_as_they_were_and_no_longer() {
        let noise: Vec<u8> =
            (0_u64..20_000).map(|n| (n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect();
        for records in [&b""[..], b"short", &[7; 300_000], &noise] {
            let packed = pack(records);
            assert!(packed.len() <= records.len() + 1);
            assert_eq!(unpack(&packed).unwrap(), records);
        }
        assert!(pack(&[7; 300_000]).len() < 3000);
    }

    #[test]
    fn damage_and_greed_are_refused() {
        let packed = pack(&[7; 10_000]);
        for cut in 0..packed.len() {
            assert!(unpack(&packed[..cut]).is_err(), "{cut}");
        }
        let mut greedy = packed.to_vec();
        greedy[1..5].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(unpack(&greedy).is_err());
        let mut short = packed.to_vec();
        short[1..5].copy_from_slice(&9_999_u32.to_le_bytes());
        assert!(unpack(&short).is_err());
        assert!(unpack(&[2, 0]).is_err());
    }
}
