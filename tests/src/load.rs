//! Clients that use a Redis while it moves, check every answer, and measure the longest wait.

use crate::resp::{Answer, Client};
use crate::wait;
use anyhow::{Context, Result, bail};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Time between an answer and the next command.
const PAUSE: Duration = Duration::from_millis(1);

/// What a client has seen. Each has one connection, which it never makes anew: losing it is an error.
#[derive(Debug, Clone)]
pub struct Report {
    /// Answers that came and were right.
    pub answers: u64,
    /// The first thing that was wrong, if any. The client stops at it.
    pub error: Option<String>,
    /// The longest wait for an answer.
    pub longest_gap: Duration,
}

impl Report {
    /// Fails if something was wrong.
    ///
    /// # Errors
    /// The first thing that was wrong.
    pub fn check(&self) -> Result<&Self> {
        match &self.error {
            Some(error) => bail!("after {} right answers: {error}", self.answers),
            None => Ok(self),
        }
    }
}

/// A client in a thread of its own.
#[derive(Debug)]
struct Load {
    stop: Arc<AtomicBool>,
    answers: Arc<AtomicU64>,
    thread: Option<JoinHandle<Report>>,
}

impl Load {
    /// Connects, then repeats `step` with a running number from 1 on until stopped or until it fails.
    fn start(
        server: SocketAddr,
        mut step: impl FnMut(&mut Client, u64) -> Result<()> + Send + 'static,
    ) -> Result<Self> {
        let mut client = Client::connect(server)?;
        let stop = Arc::new(AtomicBool::new(false));
        let answers = Arc::new(AtomicU64::new(0));
        let (stopped, counter) = (Arc::clone(&stop), Arc::clone(&answers));
        let thread = std::thread::spawn(move || {
            let mut report = Report { answers: 0, error: None, longest_gap: Duration::ZERO };
            while !stopped.load(Ordering::Relaxed) {
                let asked = Instant::now();
                if let Err(e) = step(&mut client, report.answers + 1) {
                    report.error = Some(format!("{e:#}, after a wait of {:?}", asked.elapsed()));
                    break;
                }
                report.longest_gap = report.longest_gap.max(asked.elapsed());
                report.answers += 1;
                counter.store(report.answers, Ordering::Relaxed);
                std::thread::sleep(PAUSE);
            }
            report
        });
        Ok(Self { stop, answers, thread: Some(thread) })
    }

    /// Waits until `more` answers have come since now. A client that has stopped at an error fails this.
    fn progress(&self, more: u64) -> Result<()> {
        let goal = self.answers.load(Ordering::Relaxed) + more;
        wait::until("answers to a load client", crate::resp::PATIENCE, || {
            if self.answers.load(Ordering::Relaxed) >= goal {
                return Ok(Some(()));
            }
            if self.thread.as_ref().is_none_or(JoinHandle::is_finished) {
                bail!("the load client has stopped at an error");
            }
            Ok(None)
        })
    }

    fn stop(mut self) -> Result<Report> {
        self.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take().context("a load client stopped twice")?;
        thread.join().ok().context("a load client panicked")
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Increments a counter and checks that each answer is the previous one plus one.
#[derive(Debug)]
pub struct Counter(Load);

impl Counter {
    /// Connects and starts counting.
    ///
    /// # Errors
    /// The server cannot be reached.
    pub fn start(server: SocketAddr, key: &str) -> Result<Self> {
        let key = key.to_owned();
        Load::start(server, move |client, number| match client.call(&[b"INCR", key.as_bytes()])? {
            Answer::Number(n) if u64::try_from(n) == Ok(number) => Ok(()),
            other => bail!("INCR number {number} was answered with {other:?}"),
        })
        .map(Self)
    }

    /// Waits until `more` right answers have come since now.
    ///
    /// # Errors
    /// The client has stopped at an error, or is too slow.
    pub fn progress(&self, more: u64) -> Result<()> {
        self.0.progress(more)
    }

    /// Stops it and gives what it has seen.
    ///
    /// # Errors
    /// Its thread panicked.
    pub fn stop(self) -> Result<Report> {
        self.0.stop()
    }
}

/// Writes keys of 1 KiB, each once, and remembers which of them were acknowledged.
#[derive(Debug)]
pub struct Writer {
    load: Load,
    server: SocketAddr,
    prefix: String,
}

impl Writer {
    /// Connects and starts writing `<prefix>:1`, `<prefix>:2`, ….
    ///
    /// # Errors
    /// The server cannot be reached.
    pub fn start(server: SocketAddr, prefix: &str) -> Result<Self> {
        let keys = prefix.to_owned();
        let load = Load::start(server, move |client, number| {
            match client.call(&[b"SET", key(&keys, number).as_bytes(), &value(number)])? {
                Answer::Status(status) if status == "OK" => Ok(()),
                other => bail!("SET number {number} was answered with {other:?}"),
            }
        })?;
        Ok(Self { load, server, prefix: prefix.to_owned() })
    }

    /// Waits until `more` writes have been acknowledged since now.
    ///
    /// # Errors
    /// The client has stopped at an error, or is too slow.
    pub fn progress(&self, more: u64) -> Result<()> {
        self.load.progress(more)
    }

    /// Stops it, then reads every acknowledged write back, and gives the number of those missing or wrong.
    ///
    /// # Errors
    /// Its thread panicked, or the server does not answer.
    pub fn stop(self) -> Result<(Report, u64)> {
        let Self { load, server, prefix } = self;
        let report = load.stop()?;
        let mut client = Client::connect(server)?;
        let mut missing = 0;
        for number in 1..=report.answers {
            let answer = client.call(&[b"GET", key(&prefix, number).as_bytes()])?;
            if answer != Answer::Value(Some(value(number))) {
                missing += 1;
            }
        }
        Ok((report, missing))
    }
}

fn key(prefix: &str, number: u64) -> String {
    format!("{prefix}:{number}")
}

fn value(number: u64) -> Vec<u8> {
    number.to_le_bytes().repeat(128)
}

/// Waits until a Redis server answers.
///
/// # Errors
/// It does not within ten seconds.
pub fn wait_for_server(server: SocketAddr) -> Result<()> {
    wait::until("an answer of the Redis server", Duration::from_secs(10), || {
        let pong = Client::connect(server).and_then(|mut client| client.call(&[b"PING"]));
        Ok(matches!(pong, Ok(Answer::Status(_))).then_some(()))
    })
}
