//! Batches as bytes for the wire, packed when that pays.

use std::time::{Duration, Instant};

use haulage_sys::PAGE_BYTES;

use crate::choice::{Choice, Compression};
use crate::codec::{Codec, Packer};
use crate::gather::PageBatch;

/// Pages that are packed to see whether the rest of a batch is worth it.
const SAMPLE_PAGES: usize = 4;
/// Pages that each codec is tried on from time to time.
const TRIAL_PAGES: usize = 16;
/// Bytes below which the time that packing took is mostly the clock's.
const TIMED: usize = 64 << 10;

/// An encoded batch, for [`crate::target::TargetEngine::apply`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoded {
    /// At most [`crate::frame::MAX_FRAME`] of them.
    pub bytes: Vec<u8>,
    /// How the data in it is packed.
    pub codec: Codec,
    /// Pages with data in it.
    pub data_pages: u64,
}

/// Encodes the batches of one connection, and learns from what they and the connection do.
#[derive(Debug)]
pub struct Encoder {
    choice: Choice,
    packer: Packer,
    sample: Vec<u8>,
}

impl Encoder {
    /// Nothing is known yet: the first batches go as they are, unless a codec was asked for.
    pub fn new(wanted: Compression) -> Self {
        Self { choice: Choice::new(wanted), packer: Packer::default(), sample: Vec::new() }
    }

    /// The connection took `bytes` of encoded batches, and was busy with them for `took`.
    pub fn sent(&mut self, bytes: u64, took: Duration) {
        self.choice.sent(bytes, took);
    }

    /// Bytes in a second that the connection takes, once that is known.
    pub fn link_rate(&self) -> Option<u64> {
        self.choice.link_rate().map(|rate| rate as u64)
    }

    /// Everything that was sent has arrived: a round is over.
    pub fn rested(&mut self) {
        self.choice.rested();
    }

    /// Encodes one batch. A batch that packing makes no shorter goes as it is.
    pub fn encode(&mut self, batch: PageBatch) -> Encoded {
        let data_pages = batch.data_pages();
        if data_pages == 0 {
            return Encoded { bytes: batch.into_frame(), codec: Codec::Raw, data_pages };
        }
        if batch.data().len() >= TIMED && self.choice.wants_trial() {
            self.try_all(batch.data());
        }
        let codec = self.choice.next();
        match self.packed(codec, &batch) {
            Some(bytes) => Encoded { bytes, codec, data_pages },
            None => Encoded { bytes: batch.into_frame(), codec: Codec::Raw, data_pages },
        }
    }

    fn packed(&mut self, codec: Codec, batch: &PageBatch) -> Option<Vec<u8>> {
        let data = batch.data();
        if codec == Codec::Raw {
            return None;
        }
        if data.len() > 4 * SAMPLE_PAGES * PAGE_BYTES {
            take_sample(&mut self.sample, data, SAMPLE_PAGES);
            let length = self.packer.pack(codec, &self.sample).map_or(self.sample.len(), <[u8]>::len);
            if self.choice.is_hopeless(self.sample.len(), length) {
                return None;
            }
        }
        let started = Instant::now();
        let packed = self.packer.pack(codec, data);
        let took = started.elapsed();
        let length = packed.map_or(data.len(), <[u8]>::len);
        let frame = packed.map(|packed| batch.packed_frame(codec, packed));
        if data.len() >= TIMED {
            self.choice.packed(codec, data.len(), length, took);
        }
        frame
    }

    fn try_all(&mut self, data: &[u8]) {
        take_sample(&mut self.sample, data, TRIAL_PAGES);
        for codec in [Codec::Lz4, Codec::Zstd] {
            let started = Instant::now();
            let length = self.packer.pack(codec, &self.sample).map_or(self.sample.len(), <[u8]>::len);
            self.choice.packed(codec, self.sample.len(), length, started.elapsed());
        }
    }
}

/// Some pages of `data`, evenly spread.
fn take_sample(sample: &mut Vec<u8>, data: &[u8], pages: usize) {
    sample.clear();
    let step = (data.len() / PAGE_BYTES / pages).max(1);
    for page in data.chunks_exact(PAGE_BYTES).step_by(step).take(pages) {
        sample.extend_from_slice(page);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::{Batch, MAX_DATA_PAGES};
    use crate::gather::tests::batch_of;

    const SLOW: Duration = Duration::from_millis(100);

    fn noise(seed: u64) -> [u8; PAGE_BYTES] {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        std::array::from_fn(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        })
    }

    fn text(seed: u64) -> [u8; PAGE_BYTES] {
        let line = format!("user:{seed} has visited page {} and bought nothing; ", seed * 7);
        std::array::from_fn(|at| line.as_bytes()[at % line.len()])
    }

    fn pages(of: fn(u64) -> [u8; PAGE_BYTES], count: usize) -> Vec<[u8; PAGE_BYTES]> {
        (0..count as u64).map(of).collect()
    }

    #[test]
    fn whatever_the_codec_the_batch_comes_back() {
        let mixed: Vec<_> = pages(noise, 16).into_iter().chain(pages(text, 48)).collect();
        for wanted in [Compression::Auto]
            .into_iter()
            .chain(Codec::SUPPORTED.iter().map(|codec| Compression::Only(*codec)))
        {
            let mut encoder = Encoder::new(wanted);
            for _ in 0..40 {
                let encoded = encoder.encode(batch_of(&mixed));
                encoder.sent(1 << 20, SLOW);
                let back = Batch::decode(&encoded.bytes).unwrap();
                assert_eq!((back.data.as_ref(), encoded.data_pages), (mixed.concat().as_slice(), 64));
                if let Compression::Only(codec) = wanted {
                    assert_eq!(encoded.codec, codec);
                }
            }
        }
    }

    #[test]
    fn on_a_slow_link_text_is_packed_and_noise_is_not_and_both_at_once() {
        let mut encoder = Encoder::new(Compression::Auto);
        for n in 0..60 {
            let text = encoder.encode(batch_of(&pages(text, MAX_DATA_PAGES)));
            let noise = encoder.encode(batch_of(&pages(noise, MAX_DATA_PAGES)));
            encoder.sent(1 << 20, SLOW);
            assert_eq!(noise.codec, Codec::Raw);
            if n > 20 {
                assert_ne!(text.codec, Codec::Raw);
                assert!(text.bytes.len() < noise.bytes.len() / 4);
            }
        }
    }

    #[test]
    fn a_forced_codec_leaves_noise_as_it_is() {
        let encoded =
            Encoder::new(Compression::Only(Codec::Zstd)).encode(batch_of(&pages(noise, MAX_DATA_PAGES)));
        assert_eq!(encoded.codec, Codec::Raw);
    }

    #[test]
    fn a_batch_of_zeros_is_its_header() {
        let encoded = Encoder::new(Compression::Only(Codec::Lz4)).encode(batch_of(&[[0; PAGE_BYTES]; 9]));
        assert_eq!((encoded.codec, encoded.data_pages), (Codec::Raw, 0));
        assert!(encoded.bytes.len() < 64);
    }
}
