//! How the bytes of a batch are packed. The seam for compression: both sides name a codec by its id, and a side that
//! does not know an id refuses the batch.

use std::borrow::Cow;

/// A way to pack bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Codec {
    /// As they are.
    #[default]
    Raw,
}

/// Packed bytes could not be unpacked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    /// An id that this version does not know.
    #[error("codec {0} is not known")]
    Unknown(u8),
    /// They unpack to another length than they should.
    #[error("{found} bytes where {expected} should be")]
    Length {
        /// What the batch's runs add up to.
        expected: usize,
        /// What there was.
        found: usize,
    },
}

impl Codec {
    /// Every codec this version speaks, best first: what it offers in a negotiation.
    pub const SUPPORTED: &[Self] = &[Self::Raw];

    /// Its id on the wire.
    pub fn id(self) -> u8 {
        match self {
            Self::Raw => 0,
        }
    }

    /// The codec with this id.
    ///
    /// # Errors
    /// [`CodecError::Unknown`].
    pub fn from_id(id: u8) -> Result<Self, CodecError> {
        let known = Self::SUPPORTED.iter().copied().find(|codec| codec.id() == id);
        known.ok_or(CodecError::Unknown(id))
    }

    /// Packs the bytes of `buffer` from `start` on, in place.
    pub(crate) fn pack(self, _buffer: &mut Vec<u8>, _start: usize) {
        match self {
            Self::Raw => {}
        }
    }

    /// Unpacks to exactly `length` bytes.
    ///
    /// # Errors
    /// [`CodecError::Length`] when they are not that many.
    pub(crate) fn unpack(self, packed: &[u8], length: usize) -> Result<Cow<'_, [u8]>, CodecError> {
        match self {
            Self::Raw if packed.len() == length => Ok(Cow::Borrowed(packed)),
            Self::Raw => Err(CodecError::Length { expected: length, found: packed.len() }),
        }
    }
}
