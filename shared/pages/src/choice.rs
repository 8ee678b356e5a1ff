//! Which codec carries pages fastest, by what was measured. Pure: no clock, no bytes.
//!
//! A lane packs one batch while the one before it is on its way, so it carries pages at the pace of the slower of the
//! two: of the codec, or of the link, which has only the packed part to carry.
//!
//! ```text
//! rate(codec) = min(speed of the codec, rate of the link / share that is left after packing)
//! rate(raw)   = rate of the link
//! ```
//! The best is taken, but another one only when it promises clearly more than the present one ([`HYSTERESIS`]).

use std::time::Duration;

use crate::codec::Codec;

/// What was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Compression {
    /// Whatever is fastest.
    #[default]
    Auto,
    /// This one, wherever it makes a batch shorter.
    Only(Codec),
}

/// How much faster another codec must promise to be.
const HYSTERESIS: f64 = 1.15;
/// Weight of the newest measurement of a codec.
const NEWEST: f64 = 0.25;
/// Batches from one trial of all codecs to the next.
const TRIAL_EVERY: u32 = 64;
/// Bytes after which what was known of the link counts half.
const LINK_HALF_LIFE: f64 = 16.0 * 1048576.0;
/// The first bytes after the link has rested go into buffers, on both sides, and say nothing about it.
const BUFFERED: u64 = 6 << 20;

#[derive(Debug, Clone, Copy)]
struct Measured {
    /// Bytes that go in, in a second.
    speed: f64,
    /// Of a byte that goes in, how much comes out.
    share: f64,
}

/// Chooses, batch by batch.
#[derive(Debug)]
pub(crate) struct Choice {
    wanted: Compression,
    current: Codec,
    lz4: Option<Measured>,
    zstd: Option<Measured>,
    /// Bytes on the wire and seconds, both halved every [`LINK_HALF_LIFE`].
    link: (f64, f64),
    since_rest: u64,
    since_trial: u32,
}

impl Choice {
    pub(crate) fn new(wanted: Compression) -> Self {
        let current = match wanted {
            Compression::Auto => Codec::Raw,
            Compression::Only(codec) => codec,
        };
        let (link, since_rest, since_trial) = ((0.0, 0.0), 0, TRIAL_EVERY);
        Self { wanted, current, lz4: None, zstd: None, link, since_rest, since_trial }
    }

    /// The connection took `bytes` after it had been busy with them for `took`.
    pub(crate) fn sent(&mut self, bytes: u64, took: Duration) {
        self.since_rest = self.since_rest.saturating_add(bytes);
        if self.since_rest <= BUFFERED {
            return;
        }
        let keep = 0.5_f64.powf(bytes as f64 / LINK_HALF_LIFE);
        self.link = (self.link.0 * keep + bytes as f64, self.link.1 * keep + took.as_secs_f64());
    }

    /// Everything that was sent has arrived.
    pub(crate) fn rested(&mut self) {
        self.since_rest = 0;
    }

    /// Bytes in a second that the connection takes, once that is known.
    pub(crate) fn link_rate(&self) -> Option<f64> {
        (self.link.1 > 0.0).then(|| self.link.0 / self.link.1)
    }

    /// Packing `raw` bytes to `packed` took so long.
    pub(crate) fn packed(&mut self, codec: Codec, raw: usize, packed: usize, took: Duration) {
        let seconds = took.as_secs_f64().max(1e-9);
        let new = Measured { speed: raw as f64 / seconds, share: packed as f64 / raw.max(1) as f64 };
        let known = match codec {
            Codec::Raw => return,
            Codec::Lz4 => &mut self.lz4,
            Codec::Zstd => &mut self.zstd,
        };
        let mix = |old: f64, new: f64| old + NEWEST * (new - old);
        *known = Some(known.map_or(new, |old| Measured {
            speed: mix(old.speed, new.speed),
            share: mix(old.share, new.share),
        }));
    }

    /// Whether it is time to try what each codec does with the data of now.
    pub(crate) fn wants_trial(&mut self) -> bool {
        self.since_trial = self.since_trial.saturating_add(1);
        let due = self.wanted == Compression::Auto && self.since_trial > TRIAL_EVERY;
        if due {
            self.since_trial = 0;
        }
        due
    }

    /// The codec for the next batch.
    pub(crate) fn next(&mut self) -> Codec {
        let Some(link) = self.link_rate().filter(|_| self.wanted == Compression::Auto) else {
            return self.current;
        };
        let rate = |measured: Measured| measured.speed.min(link / measured.share.max(1e-6));
        let rates =
            [(Codec::Raw, Some(link)), (Codec::Lz4, self.lz4.map(rate)), (Codec::Zstd, self.zstd.map(rate))];
        let of = |codec| rates.iter().find(|(known, _)| *known == codec).and_then(|(_, rate)| *rate);
        let now = of(self.current).unwrap_or(0.0);
        for (codec, rate) in rates {
            if let Some(rate) = rate
                && rate > now * HYSTERESIS
                && rate > of(self.current).unwrap_or(0.0)
            {
                self.current = codec;
            }
        }
        self.current
    }

    /// Whether a batch of which a sample packs this badly is better left alone.
    pub(crate) fn is_hopeless(&self, raw: usize, packed: usize) -> bool {
        self.wanted == Compression::Auto && packed.saturating_mul(100) > raw.saturating_mul(97)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: usize = 1 << 20;

    /// A choice that has seen a link and what the codecs do with the data.
    fn after(link_mb: f64, lz4: (f64, f64), zstd: (f64, f64)) -> Choice {
        let mut choice = Choice::new(Compression::Auto);
        choice.sent(BUFFERED, Duration::ZERO);
        for _ in 0..100 {
            see(&mut choice, link_mb, lz4, zstd);
        }
        choice
    }

    /// Link in MB/s, codecs in MB/s and share.
    fn see(choice: &mut Choice, link_mb: f64, lz4: (f64, f64), zstd: (f64, f64)) {
        choice.sent(MIB as u64, Duration::from_secs_f64(MIB as f64 / (link_mb * 1e6)));
        for (codec, (speed, share)) in [(Codec::Lz4, lz4), (Codec::Zstd, zstd)] {
            let took = Duration::from_secs_f64(MIB as f64 / (speed * 1e6));
            choice.packed(codec, MIB, (MIB as f64 * share) as usize, took);
        }
    }

    #[test]
    fn the_slower_the_link_the_harder_it_packs() {
        let (lz4, zstd) = ((800.0, 0.5), (500.0, 0.35));
        assert_eq!(after(12.0, lz4, zstd).next(), Codec::Zstd);
        assert_eq!(after(118.0, lz4, zstd).next(), Codec::Zstd);
        assert_eq!(after(400.0, lz4, zstd).next(), Codec::Lz4);
        assert_eq!(after(1200.0, lz4, zstd).next(), Codec::Raw);
    }

    #[test]
    fn what_does_not_pack_goes_as_it_is() {
        assert_eq!(after(12.0, (900.0, 1.0), (700.0, 1.0)).next(), Codec::Raw);
        assert!(Choice::new(Compression::Auto).is_hopeless(16384, 16300));
        assert!(!Choice::new(Compression::Auto).is_hopeless(16384, 12000));
    }

    #[test]
    fn nothing_is_packed_before_the_link_is_known_and_buffers_say_nothing() {
        let mut choice = Choice::new(Compression::Auto);
        choice.packed(Codec::Lz4, MIB, MIB / 10, Duration::from_millis(1));
        assert_eq!(choice.next(), Codec::Raw);
        for _ in 0..50 {
            choice.sent(MIB as u64, Duration::from_micros(100));
            choice.rested();
        }
        assert_eq!((choice.link_rate(), choice.next()), (None, Codec::Raw));
    }

    #[test]
    fn a_small_difference_changes_nothing_and_a_large_one_does() {
        let (lz4, zstd) = ((800.0, 0.5), (300.0, 0.5));
        let mut choice = after(100.0, lz4, zstd);
        assert_eq!(choice.next(), Codec::Lz4);
        for _ in 0..200 {
            see(&mut choice, 100.0, lz4, (300.0, 0.45));
            assert_eq!(choice.next(), Codec::Lz4);
        }
        for _ in 0..200 {
            see(&mut choice, 100.0, lz4, (300.0, 0.35));
            choice.next();
        }
        assert_eq!(choice.next(), Codec::Zstd);
        for _ in 0..200 {
            see(&mut choice, 2000.0, lz4, (300.0, 0.35));
            choice.next();
        }
        assert_eq!(choice.next(), Codec::Raw);
    }

    #[test]
    fn what_was_asked_for_is_taken_whatever_is_measured() {
        for codec in [Codec::Raw, Codec::Lz4, Codec::Zstd] {
            let mut choice = Choice::new(Compression::Only(codec));
            choice.sent(BUFFERED, Duration::ZERO);
            see(&mut choice, 1.0, (800.0, 0.1), (500.0, 0.05));
            assert_eq!((choice.next(), choice.wants_trial()), (codec, false));
            assert!(!choice.is_hopeless(100, 100));
        }
    }

    #[test]
    fn trials_come_at_once_and_then_seldom() {
        let mut choice = Choice::new(Compression::Auto);
        let trials: Vec<bool> = (0..=TRIAL_EVERY + 1).map(|_| choice.wants_trial()).collect();
        assert_eq!(trials.iter().filter(|due| **due).count(), 2);
        assert!(trials[0]);
    }
}
