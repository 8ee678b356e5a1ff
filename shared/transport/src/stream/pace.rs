//! A limit on what a migration sends, kept by all processes together that send for it.
//!
//! What has been let through is paid for until a point of time, which lies in a small file that every sender has open:
//! who wants to send waits for that point and moves it by what the bytes cost. A sender that is late keeps a little
//! credit ([`CREDIT`]), so that what timers lose is made up for, and a link that was idle saves up nothing more.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use rustix::time::{ClockId, clock_gettime};

/// How far behind the clock the paid-for time may stay.
const CREDIT: Duration = Duration::from_millis(20);
/// The time that one piece is to take, where that makes it no larger or smaller than these.
const PIECE: Duration = Duration::from_millis(20);
const LARGEST_PIECE: u64 = 64 << 10;
const SMALLEST_PIECE: u64 = 512;
/// Pieces that all senders together may have paid for and not sent. What the file says beyond is not true, such as
/// after the machine was started anew.
const AHEAD: u64 = 64;

/// A share in a migration's limit.
#[derive(Debug)]
pub struct Pace {
    bytes_per_second: u64,
    paid_until: File,
}

impl Pace {
    /// Joins those who keep the limit by the file at `path`, which is made if it is not there.
    ///
    /// # Errors
    /// Of the file system.
    pub fn open(path: &Path, bytes_per_second: u64) -> io::Result<Self> {
        let paid_until = File::options().read(true).write(true).create(true).truncate(false).open(path)?;
        Ok(Self { bytes_per_second: bytes_per_second.max(1), paid_until })
    }

    /// Bytes that are sent at once, at most.
    pub(super) fn piece(&self) -> usize {
        let wanted = cost_inverse(self.bytes_per_second, PIECE);
        wanted.clamp(SMALLEST_PIECE, LARGEST_PIECE) as usize
    }

    /// Waits until `bytes` may be sent.
    ///
    /// # Errors
    /// Of the file.
    pub(super) async fn take(&self, bytes: usize) -> io::Result<()> {
        let now = clock_gettime(ClockId::Monotonic);
        let now = Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec.unsigned_abs() as u32);
        let wait = self.reserve(now, bytes as u64)?;
        if !wait.is_zero() {
            tokio::time::sleep(wait).await;
        }
        Ok(())
    }

    /// Pays for `bytes` at the time `now` and says how long to wait before they are sent. The file is locked for the
    /// few microseconds of a read and a write of it.
    fn reserve(&self, now: Duration, bytes: u64) -> io::Result<Duration> {
        flock(&self.paid_until, FlockOperation::LockExclusive)?;
        let reserved = self.move_on(now, bytes);
        flock(&self.paid_until, FlockOperation::Unlock)?;
        reserved
    }

    fn move_on(&self, now: Duration, bytes: u64) -> io::Result<Duration> {
        let mut raw = [0; 8];
        // A new file is empty: nothing has been sent.
        let known = self.paid_until.read_at(&mut raw, 0)? == raw.len();
        let until = Duration::from_nanos(if known { u64::from_le_bytes(raw) } else { 0 });
        let latest = now.saturating_add(self.cost(AHEAD.saturating_mul(self.piece() as u64)));
        let from = until.clamp(now.saturating_sub(CREDIT), latest);
        let until = from.saturating_add(self.cost(bytes));
        let nanos = u64::try_from(until.as_nanos()).unwrap_or(u64::MAX);
        self.paid_until.write_all_at(&nanos.to_le_bytes(), 0)?;
        Ok(from.saturating_sub(now))
    }

    fn cost(&self, bytes: u64) -> Duration {
        let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(self.bytes_per_second);
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }
}

/// Bytes that go in `time`.
fn cost_inverse(bytes_per_second: u64, time: Duration) -> u64 {
    let bytes = u128::from(bytes_per_second) * time.as_nanos() / 1_000_000_000;
    u64::try_from(bytes).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const START: Duration = Duration::from_secs(1000);

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        /// Senders in turn, each of which wakes up late by up to 3 ms.
        #[test]
        fn several_senders_together_keep_the_limit_and_use_it(
            rate in 100_000_u64..300_000_000,
            senders in 1..4_usize,
            late in prop::collection::vec(0..3_000_u64, 50),
        ) {
            let dir = tempfile::tempdir().unwrap();
            let paces: Vec<_> =
                (0..senders).map(|_| Pace::open(&dir.path().join("pace"), rate).unwrap()).collect();
            let mut ready = vec![START; senders];
            let (mut sent, mut now, mut n) = (0_u64, START, 0);
            while now < START + Duration::from_secs(4) && n < 4_000 {
                let (next, at) = ready.iter().copied().enumerate().min_by_key(|(_, at)| *at).unwrap();
                let pace = &paces[next];
                let wait = pace.reserve(at, pace.piece() as u64).unwrap();
                let delay = if wait.is_zero() { 0 } else { late[n % late.len()] };
                ready[next] = at + wait + Duration::from_micros(delay);
                now = at;
                sent += pace.piece() as u64;
                n += 1;
            }
            let took = (now - START).as_secs_f64();
            let allowed = rate as f64 * took;
            // The credit at the start, and the piece of each that is paid for and not sent.
            let edge = rate as f64 * CREDIT.as_secs_f64() + ((senders + 1) * paces[0].piece()) as f64;
            prop_assert!(sent as f64 <= allowed + edge, "{sent} of {allowed} in {took} s");
            if took > 0.5 {
                prop_assert!(sent as f64 >= allowed * 0.95 - edge, "{sent} of {allowed} in {took} s");
            }
        }
    }

    #[test]
    fn what_is_late_is_made_up_for_and_what_was_idle_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let pace = Pace::open(&dir.path().join("pace"), 1_000_000).unwrap();
        assert_eq!(pace.reserve(START, 20_000).unwrap(), Duration::ZERO);
        assert_eq!(pace.reserve(START, 10_000).unwrap(), Duration::ZERO, "its credit is used up only now");
        assert_eq!(pace.reserve(START, 10_000).unwrap(), Duration::from_millis(10));
        let later = START + Duration::from_secs(60);
        assert_eq!(pace.reserve(later, 30_000).unwrap(), Duration::ZERO);
        assert_eq!(pace.reserve(later, 1).unwrap(), Duration::from_millis(10));
    }

    #[test]
    fn a_file_from_before_a_restart_of_the_machine_holds_nobody_up_for_long() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pace");
        std::fs::write(&path, u64::MAX.to_le_bytes()).unwrap();
        let pace = Pace::open(&path, 1_000_000).unwrap();
        assert!(pace.reserve(START, 1).unwrap() <= Duration::from_secs(2));
    }
}
