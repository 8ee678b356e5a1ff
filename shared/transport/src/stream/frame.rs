//! The frame: a 16-byte little-endian header and a payload.
//!
//! ```text
//!  0        4       6       8            12           16
//!  ├────────┼───────┼───────┼────────────┼────────────┼─────────…
//!  │ "HAUL" │ kind  │ flags │ length u32 │ crc32      │ payload
//!  └────────┴───────┴───────┴────────────┴────────────┴─────────…
//! ```
//! The checksum (CRC-32, IEEE) covers kind, flags, length and payload.

use bytes::Bytes;

use super::error::StreamError;

/// Bytes of a frame's header.
pub const HEADER_BYTES: usize = 16;

/// The most payload which one frame may carry, in bytes: 4 MiB.
pub const MAX_PAYLOAD_BYTES: usize = 4 << 20;

/// What opens every frame.
const MAGIC: [u8; 4] = *b"HAUL";

/// What a frame is.
///
/// Kinds from [`FrameKind::FIRST_OWN`] on belong to the session's two ends; those below are this protocol's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FrameKind(pub u16);

impl FrameKind {
    /// The lowest kind that a session may use for itself.
    pub const FIRST_OWN: Self = Self(0x0100);
    /// The greeting.
    pub(super) const HELLO: Self = Self(0x0001);
    /// The greeting was accepted.
    pub(super) const WELCOME: Self = Self(0x0002);
    /// The greeting was refused.
    pub(super) const REFUSED: Self = Self(0x0003);
    /// This direction of the stream is complete.
    pub(super) const END: Self = Self(0x0004);
}

/// One frame of a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// What it is.
    pub kind: FrameKind,
    /// For the session's own use; 0 when unused.
    pub flags: u16,
    /// At most [`MAX_PAYLOAD_BYTES`].
    pub payload: Bytes,
}

/// A header as read, its payload still to come.
#[derive(Clone, Copy, Debug)]
pub(super) struct Header {
    kind: FrameKind,
    flags: u16,
    length: u32,
    checksum: u32,
}

impl Header {
    /// The header of a frame.
    ///
    /// # Errors
    /// [`StreamError::FrameTooLarge`].
    pub(super) fn of(kind: FrameKind, flags: u16, payload: &[u8]) -> Result<Self, StreamError> {
        if payload.len() > MAX_PAYLOAD_BYTES {
            return Err(StreamError::too_large(payload.len()));
        }
        let length = payload.len() as u32;
        Ok(Self { kind, flags, length, checksum: checksum(kind, flags, length, payload) })
    }

    pub(super) fn encode(&self) -> [u8; HEADER_BYTES] {
        let [m0, m1, m2, m3] = MAGIC;
        let [k0, k1] = self.kind.0.to_le_bytes();
        let [f0, f1] = self.flags.to_le_bytes();
        let [l0, l1, l2, l3] = self.length.to_le_bytes();
        let [c0, c1, c2, c3] = self.checksum.to_le_bytes();
        [m0, m1, m2, m3, k0, k1, f0, f1, l0, l1, l2, l3, c0, c1, c2, c3]
    }

    /// Reads a header, allowing at most `limit` bytes of payload.
    ///
    /// # Errors
    /// [`StreamError::BadMagic`], [`StreamError::FrameTooLarge`].
    pub(super) fn decode(bytes: &[u8; HEADER_BYTES], limit: usize) -> Result<Self, StreamError> {
        let &[m0, m1, m2, m3, k0, k1, f0, f1, l0, l1, l2, l3, c0, c1, c2, c3] = bytes;
        if [m0, m1, m2, m3] != MAGIC {
            return Err(StreamError::BadMagic);
        }
        let length = u32::from_le_bytes([l0, l1, l2, l3]);
        if length as usize > limit {
            return Err(StreamError::FrameTooLarge { length: length.into(), limit: limit as u64 });
        }
        Ok(Self {
            kind: FrameKind(u16::from_le_bytes([k0, k1])),
            flags: u16::from_le_bytes([f0, f1]),
            length,
            checksum: u32::from_le_bytes([c0, c1, c2, c3]),
        })
    }

    pub(super) fn payload_bytes(&self) -> usize {
        self.length as usize
    }

    /// Joins the header with its payload, of [`payload_bytes`](Self::payload_bytes).
    ///
    /// # Errors
    /// [`StreamError::ChecksumMismatch`].
    pub(super) fn accept(self, payload: Bytes) -> Result<Frame, StreamError> {
        if checksum(self.kind, self.flags, self.length, &payload) != self.checksum {
            return Err(StreamError::ChecksumMismatch);
        }
        Ok(Frame { kind: self.kind, flags: self.flags, payload })
    }
}

fn checksum(kind: FrameKind, flags: u16, length: u32, payload: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(&kind.0.to_le_bytes());
    crc.update(&flags.to_le_bytes());
    crc.update(&length.to_le_bytes());
    crc.update(payload);
    crc.finalize()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Decodes one frame from a whole buffer, as the connection does from a socket.
    fn decode(bytes: &[u8]) -> Result<Frame, StreamError> {
        let header = bytes.first_chunk::<HEADER_BYTES>().ok_or(StreamError::Truncated)?;
        let header = Header::decode(header, MAX_PAYLOAD_BYTES)?;
        let payload = bytes.get(HEADER_BYTES..HEADER_BYTES + header.payload_bytes());
        header.accept(Bytes::copy_from_slice(payload.ok_or(StreamError::Truncated)?))
    }

    fn encode(kind: u16, flags: u16, payload: &[u8]) -> Vec<u8> {
        let mut bytes = Header::of(FrameKind(kind), flags, payload).unwrap().encode().to_vec();
        bytes.extend_from_slice(payload);
        bytes
    }

    proptest! {
        #[test]
        fn what_is_encoded_comes_back(kind: u16, flags: u16, payload in proptest::collection::vec(any::<u8>(), 0..5000)) {
            let frame = decode(&encode(kind, flags, &payload)).unwrap();
            prop_assert_eq!(frame, Frame { kind: FrameKind(kind), flags, payload: payload.into() });
        }

        #[test]
        fn any_flipped_bit_is_noticed(
            kind: u16, flags: u16, payload in proptest::collection::vec(any::<u8>(), 0..200), at: prop::sample::Index,
        ) {
            let mut bytes = encode(kind, flags, &payload);
            let bit = at.index(bytes.len() * 8);
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(decode(&bytes).is_err());
        }

        #[test]
        fn any_cut_is_noticed(payload in proptest::collection::vec(any::<u8>(), 0..200), at: prop::sample::Index) {
            let bytes = encode(0x100, 0, &payload);
            let cut = &bytes[..at.index(bytes.len())];
            prop_assert!(matches!(decode(cut), Err(StreamError::Truncated)));
        }

        #[test]
        fn garbage_is_never_a_frame(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            prop_assume!(!bytes.starts_with(&MAGIC));
            prop_assert!(decode(&bytes).is_err());
        }
    }

    #[test]
    fn too_much_payload_is_refused_on_both_sides() {
        let payload = vec![0; MAX_PAYLOAD_BYTES + 1];
        assert!(matches!(Header::of(FrameKind(0x100), 0, &payload), Err(StreamError::FrameTooLarge { .. })));

        let mut bytes = encode(0x100, 0, b"");
        bytes[8..12].copy_from_slice(&(MAX_PAYLOAD_BYTES as u32 + 1).to_le_bytes());
        assert!(matches!(decode(&bytes), Err(StreamError::FrameTooLarge { .. })));
    }

    #[test]
    fn the_layout_is_fixed() {
        let bytes = encode(0x0102, 0x0304, b"abc");
        assert_eq!(&bytes[..12], b"HAUL\x02\x01\x04\x03\x03\x00\x00\x00");
        assert_eq!(&bytes[HEADER_BYTES..], b"abc");
    }
}
