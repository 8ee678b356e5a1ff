//! The clients of a Redis: they write at a rate, or count as fast as it goes, and remember what was acknowledged.

use crate::bench::cell::RedisLoad;
use crate::bench::stats::{figure, whole};
use crate::resp::{Answer, Client, Random, frame};
use anyhow::{Context, Result, bail};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Resident bytes for each value of 1 KiB, allocator and key included, about.
const BYTES_PER_KEY: u32 = 1250;

/// Between two batches of writes.
const TICK: Duration = Duration::from_millis(5);

/// Answers taken together when values are read back.
const AT_ONCE: usize = 512;

/// How many answers had come at which time.
#[derive(Debug, Clone, Default)]
pub struct Timeline(Vec<(u64, u64)>);

impl Timeline {
    fn note(&mut self, answers: u64) {
        /// Ten milliseconds are fine enough.
        const STEP: u64 = 10_000;
        let now = now_micros();
        if self.0.last().is_none_or(|(at, _)| now > at + STEP) {
            self.0.push((now, answers));
        }
    }

    /// Answers per second between two times (microseconds since 1970), if enough is known of that time.
    #[must_use]
    pub fn rate(&self, from: u64, to: u64) -> Option<f64> {
        let mut within = self.0.iter().filter(|(at, _)| (from..=to).contains(at));
        let (first, last) = (within.next()?, within.next_back()?);
        let seconds = figure(last.0 - first.0) / 1e6;
        (seconds >= 0.1).then(|| figure(last.1 - first.1) / seconds)
    }
}

/// The machine's clock, in microseconds since 1970: the clock of a migration's record.
#[must_use]
pub fn now_micros() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_micros()).unwrap_or(u64::MAX)
}

/// What was written last under a key.
#[derive(Debug, Clone, Copy, Default)]
struct Written {
    sent: u32,
    acknowledged: u32,
    /// Since the last verification.
    is_fresh: bool,
}

#[derive(Debug, Default)]
struct State {
    timeline: Timeline,
    answers: u64,
    keys: Vec<Written>,
    error: Option<String>,
}

/// The clients.
#[derive(Debug)]
pub struct Clients {
    server: SocketAddr,
    load: RedisLoad,
    choice: Arc<Choice>,
    state: State,
    running: Option<(Arc<AtomicBool>, JoinHandle<State>)>,
    runs: u64,
}

impl Clients {
    /// Fills the server until it takes about `mebibytes`.
    ///
    /// # Errors
    /// The server cannot be reached or refuses.
    pub fn fill(server: SocketAddr, mebibytes: u32, load: RedisLoad) -> Result<Self> {
        let keys = u64::from(mebibytes) * (1 << 20) / u64::from(BYTES_PER_KEY);
        let fill = u32::try_from(keys / 1024)?;
        Client::connect(server)?.fill(fill).context("fill the Redis")?;
        let keys = usize::try_from(fill)? * 1024;
        let choice = Choice::new(keys, matches!(load, RedisLoad::Set { zipf: true, .. }));
        let state = State { keys: vec![Written::default(); keys], ..State::default() };
        Ok(Self { server, load, choice: Arc::new(choice), state, running: None, runs: 0 })
    }

    /// Starts them.
    ///
    /// # Errors
    /// The server cannot be reached.
    pub fn begin(&mut self) -> Result<()> {
        self.runs += 1;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let mut client = Client::connect(self.server)?;
        let (load, choice, seed) = (self.load, Arc::clone(&self.choice), self.runs);
        let mut state = std::mem::take(&mut self.state);
        state.timeline = Timeline::default();
        state.error = None;
        let thread = std::thread::Builder::new().name("redis-clients".into()).spawn(move || {
            let done = match load {
                RedisLoad::Set { megabytes, .. } => {
                    write(&mut client, &mut state, &choice, f64::from(megabytes) * 1e6, seed, &stopped)
                }
                RedisLoad::Incr => count(&mut client, &mut state, &stopped),
            };
            state.error = done.err().map(|e| format!("{e:#}"));
            state
        })?;
        self.running = Some((stop, thread));
        Ok(())
    }

    /// Stops them, and gives what they have seen and what went wrong, if anything.
    ///
    /// # Errors
    /// They do not run.
    pub fn end(&mut self) -> Result<(Timeline, Option<String>)> {
        let (stop, thread) = self.running.take().context("the clients of the Redis do not run")?;
        stop.store(true, Ordering::Relaxed);
        self.state = thread.join().ok().context("the clients of the Redis panicked")?;
        Ok((self.state.timeline.clone(), self.state.error.clone()))
    }

    /// Reads back every value that was written since the last time, and one in sixteen of the others, and gives the
    /// number of those that are missing or wrong.
    ///
    /// # Errors
    /// The server does not answer.
    pub fn verify(&mut self) -> Result<u64> {
        let mut client = Client::connect(self.server)?;
        let due = self.state.keys.iter().enumerate();
        let due: Vec<(usize, Written)> = due
            .filter(|(key, written)| written.sent > 0 && (written.is_fresh || key % 16 == 0))
            .map(|(key, written)| (key, *written))
            .collect();
        let mut bad = 0;
        for part in due.chunks(AT_ONCE) {
            let mut frames = Vec::new();
            part.iter().for_each(|(key, _)| frame(&mut frames, &[b"GET", name(*key).as_bytes()]));
            client.send_frames(&frames)?;
            for (key, written) in part {
                let Answer::Value(Some(got)) = client.receive()? else {
                    bad += 1;
                    continue;
                };
                // Of a write that was sent and not acknowledged, both outcomes are right.
                let number = got.get(8..12).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes);
                let is_known = (written.acknowledged..=written.sent).contains(&number);
                let is_right = is_known && got == value(*key, number);
                // Where no write was acknowledged, what the server was filled with is right too.
                bad += u64::from(!is_right && written.acknowledged > 0);
            }
        }
        self.state.keys.iter_mut().for_each(|written| written.is_fresh = false);
        Ok(bad)
    }
}

impl Drop for Clients {
    fn drop(&mut self) {
        if let Some((stop, _)) = &self.running {
            stop.store(true, Ordering::Relaxed);
        }
    }
}

fn write(
    client: &mut Client,
    state: &mut State,
    choice: &Choice,
    bytes_per_second: f64,
    seed: u64,
    stop: &AtomicBool,
) -> Result<()> {
    let per_tick = usize::try_from(whole(bytes_per_second / 1024.0 * TICK.as_secs_f64()))?;
    let mut random = Random::new(seed);
    let mut next = Instant::now();
    while !stop.load(Ordering::Relaxed) {
        let mut frames = Vec::new();
        let mut batch = Vec::with_capacity(per_tick);
        for _ in 0..per_tick {
            let key = choice.next(&mut random);
            let written = state.keys.get_mut(key).context("a key out of range")?;
            written.sent += 1;
            written.is_fresh = true;
            batch.push((key, written.sent));
            frame(&mut frames, &[b"SET", name(key).as_bytes(), &value(key, written.sent)]);
        }
        client.send_frames(&frames)?;
        for (key, number) in batch {
            match client.receive()? {
                Answer::Status(_) => {}
                other => bail!("SET was answered with {other:?}"),
            }
            state.answers += 1;
            if let Some(written) = state.keys.get_mut(key) {
                written.acknowledged = number;
            }
        }
        state.timeline.note(state.answers);
        // What a standstill has swallowed is not made up for: it would be a burst.
        next = (next + TICK).max(Instant::now());
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    Ok(())
}

fn count(client: &mut Client, state: &mut State, stop: &AtomicBool) -> Result<()> {
    let mut last = None;
    while !stop.load(Ordering::Relaxed) {
        match (client.call(&[b"INCR", b"load"])?, last) {
            (Answer::Number(n), None) => last = Some(n),
            (Answer::Number(n), Some(before)) if n == before + 1 => last = Some(n),
            (other, _) => bail!("INCR was answered with {other:?} after {last:?}"),
        }
        state.answers += 1;
        state.timeline.note(state.answers);
    }
    Ok(())
}

fn name(key: usize) -> String {
    format!("fill:{key}")
}

/// 1 KiB that does not compress, with the key and the number of the write in front.
fn value(key: usize, number: u32) -> Vec<u8> {
    let key = u64::try_from(key).unwrap_or_default();
    let mut random = Random::new(key << 32 | u64::from(number));
    let mut bytes = Vec::with_capacity(1024);
    bytes.extend_from_slice(&key.to_le_bytes());
    bytes.extend_from_slice(&u64::from(number).to_le_bytes());
    (0..126).for_each(|_| bytes.extend_from_slice(&random.next().to_le_bytes()));
    bytes
}

/// How keys are chosen.
#[derive(Debug)]
struct Choice {
    keys: u64,
    /// The shares of the most frequent key, of the two most frequent, and so on; empty when all are alike.
    shares: Vec<f64>,
}

impl Choice {
    fn new(keys: usize, zipf: bool) -> Self {
        let mut sum = 0.0;
        let count = u64::try_from(keys).unwrap_or(u64::MAX);
        let mut shares: Vec<f64> = (1..=if zipf { count } else { 0 })
            .map(|rank| {
                sum += figure(rank).powf(-0.99);
                sum
            })
            .collect();
        shares.iter_mut().for_each(|share| *share /= sum);
        Self { keys: count, shares }
    }

    fn next(&self, random: &mut Random) -> usize {
        let number = random.next();
        let rank = if self.shares.is_empty() {
            number % self.keys
        } else {
            let point = figure(number >> 11) / figure(1 << 53);
            let rank = self.shares.partition_point(|share| *share < point);
            // Frequent keys lie all over the memory, not side by side.
            u64::try_from(rank).unwrap_or_default().wrapping_mul(0x9E37_79B9_7F4A_7C15) % self.keys
        };
        usize::try_from(rank).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zipf_prefers_few_keys_and_uniform_none() {
        let share_of_most_frequent = |zipf| {
            let choice = Choice::new(1000, zipf);
            let mut random = Random::new(1);
            let mut counts = vec![0; 1000];
            (0..100_000).for_each(|_| counts[choice.next(&mut random)] += 1);
            *counts.iter().max().unwrap()
        };
        assert!(share_of_most_frequent(true) > 10_000);
        assert!(share_of_most_frequent(false) < 200);
    }

    #[test]
    fn a_rate_needs_enough_of_the_time() {
        let timeline = Timeline((0..100).map(|i| (i * 10_000, i * 50)).collect());
        assert_eq!(timeline.rate(0, 990_000), Some(5000.0));
        assert_eq!(timeline.rate(0, 50_000), None);
        assert_eq!(timeline.rate(2_000_000, 3_000_000), None);
    }

    #[test]
    fn a_value_tells_its_key_and_number() {
        assert_eq!(value(7, 3).len(), 1024);
        assert_ne!(value(7, 3), value(7, 4));
        assert_eq!(value(7, 3).get(8..12).unwrap(), 3u32.to_le_bytes());
    }
}
