//! How the bytes of a batch are packed. Both sides name a codec by its id, and a side that does not know an id refuses
//! the batch.
//!
//! Unpacking is bounded: the length is known from the batch's runs before anything is unpacked, the result goes into a
//! buffer of just that length, and neither decoder keeps a window of its own beside it.

use std::borrow::Cow;
use std::fmt;

use zstd_safe::{CCtx, DCtx};

/// The level at which zstd packs: the fastest one of the format proper.
const ZSTD_LEVEL: i32 = 1;

/// A way to pack bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum Codec {
    /// As they are.
    #[default]
    Raw,
    /// One LZ4 block.
    Lz4,
    /// One zstd frame.
    Zstd,
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
    /// They are not what the codec makes, or would unpack to more than they should.
    #[error("packed bytes are damaged, or hold more than {expected} bytes")]
    Damaged {
        /// What the batch's runs add up to.
        expected: usize,
    },
}

impl Codec {
    /// Every codec this version speaks.
    pub const SUPPORTED: &[Self] = &[Self::Raw, Self::Lz4, Self::Zstd];

    /// Its id on the wire.
    pub fn id(self) -> u8 {
        match self {
            Self::Raw => 0,
            Self::Lz4 => 1,
            Self::Zstd => 2,
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

    /// Unpacks to exactly `length` bytes, and allocates no more than these.
    ///
    /// # Errors
    /// When they are not that many, or not this codec's.
    pub(crate) fn unpack(self, packed: &[u8], length: usize) -> Result<Cow<'_, [u8]>, CodecError> {
        if self == Self::Raw {
            let right = packed.len() == length;
            let wrong = CodecError::Length { expected: length, found: packed.len() };
            return if right { Ok(Cow::Borrowed(packed)) } else { Err(wrong) };
        }
        let mut bytes = vec![0; length];
        let damaged = CodecError::Damaged { expected: length };
        let found = match self {
            Self::Zstd => {
                let mut context = DCtx::try_create().ok_or(damaged)?;
                context.decompress(bytes.as_mut_slice(), packed).map_err(|_| damaged)?
            }
            Self::Lz4 | Self::Raw => {
                lz4_flex::block::decompress_into(packed, &mut bytes).map_err(|_| damaged)?
            }
        };
        if found != length {
            return Err(CodecError::Length { expected: length, found });
        }
        Ok(Cow::Owned(bytes))
    }
}

impl fmt::Display for Codec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Raw => "raw",
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
        })
    }
}

/// Packs, with the memory that this takes: at most some 3 MiB, most of it zstd's tables.
#[derive(Default)]
pub(crate) struct Packer {
    zstd: Option<CCtx<'static>>,
    scratch: Vec<u8>,
}

impl Packer {
    /// Packs `bytes`; `None` when that makes them no shorter, or the codec packs nothing.
    pub(crate) fn pack(&mut self, codec: Codec, bytes: &[u8]) -> Option<&[u8]> {
        let bound = match codec {
            Codec::Raw => return None,
            Codec::Lz4 => lz4_flex::block::get_maximum_output_size(bytes.len()),
            Codec::Zstd => zstd_safe::compress_bound(bytes.len()),
        };
        if self.scratch.len() < bound {
            self.scratch.resize(bound, 0);
        }
        let length = match codec {
            Codec::Zstd => {
                if self.zstd.is_none() {
                    self.zstd = CCtx::try_create();
                }
                self.zstd.as_mut()?.compress(self.scratch.as_mut_slice(), bytes, ZSTD_LEVEL).ok()?
            }
            Codec::Lz4 | Codec::Raw => lz4_flex::block::compress_into(bytes, &mut self.scratch).ok()?,
        };
        self.scratch.get(..length).filter(|packed| packed.len() < bytes.len())
    }
}

impl fmt::Debug for Packer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Packer").field("scratch", &self.scratch.len()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PACKING: [Codec; 2] = [Codec::Lz4, Codec::Zstd];

    /// Bytes that pack well, badly or not at all.
    fn any_bytes() -> impl Strategy<Value = Vec<u8>> {
        let part = prop_oneof![
            prop::collection::vec(any::<u8>(), 1..300),
            (any::<u8>(), 1..3000_usize).prop_map(|(byte, count)| vec![byte; count]),
            (prop::collection::vec(any::<u8>(), 1..20), 1..200_usize)
                .prop_map(|(word, count)| word.repeat(count)),
        ];
        prop::collection::vec(part, 0..12).prop_map(|parts| parts.concat())
    }

    proptest! {
        #[test]
        fn what_is_packed_comes_back_and_is_shorter(bytes in any_bytes()) {
            let mut packer = Packer::default();
            for codec in PACKING {
                let Some(packed) = packer.pack(codec, &bytes) else { continue };
                prop_assert!(packed.len() < bytes.len());
                let back = codec.unpack(packed, bytes.len()).unwrap();
                prop_assert_eq!(&*back, &bytes);
            }
        }

        #[test]
        fn nothing_unpacks_to_another_length(bytes in any_bytes(), other in 0..40_000_usize) {
            let mut packer = Packer::default();
            prop_assume!(other != bytes.len());
            for codec in PACKING {
                let Some(packed) = packer.pack(codec, &bytes) else { continue };
                prop_assert!(codec.unpack(packed, other).is_err());
            }
        }

        #[test]
        fn damage_is_an_error_or_other_bytes_of_the_right_length(
            bytes in any_bytes(),
            damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
            cut in any::<prop::sample::Index>(),
        ) {
            let mut packer = Packer::default();
            for codec in PACKING {
                let Some(packed) = packer.pack(codec, &bytes) else { continue };
                prop_assert!(codec.unpack(&packed[..cut.index(packed.len())], bytes.len()).is_err());
                let mut packed = packed.to_vec();
                for (at, value) in &damage {
                    let at = at.index(packed.len());
                    packed[at] = *value;
                }
                if let Ok(back) = codec.unpack(&packed, bytes.len()) {
                    prop_assert_eq!(back.len(), bytes.len());
                }
            }
        }

        #[test]
        fn garbage_does_no_harm(bytes in prop::collection::vec(any::<u8>(), 0..300), length in 0..10_000_usize) {
            for codec in PACKING {
                if let Ok(back) = codec.unpack(&bytes, length) {
                    prop_assert_eq!(back.len(), length);
                }
            }
        }
    }

    #[test]
    fn a_bomb_gets_no_more_room_than_the_batch_has() {
        let bomb = vec![0; 64 << 20];
        let mut packer = Packer::default();
        for codec in PACKING {
            let packed = packer.pack(codec, &bomb).unwrap();
            assert!(packed.len() < 1 << 20, "{codec}: {}", packed.len());
            assert_eq!(codec.unpack(packed, 1 << 20), Err(CodecError::Damaged { expected: 1 << 20 }));
        }
    }

    #[test]
    fn every_codec_is_found_by_its_id_and_no_other_is() {
        for codec in Codec::SUPPORTED {
            assert_eq!(Codec::from_id(codec.id()), Ok(*codec));
        }
        assert_eq!(Codec::from_id(3), Err(CodecError::Unknown(3)));
    }
}
