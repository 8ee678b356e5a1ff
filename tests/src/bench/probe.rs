//! What a client feels: two probes that ask about every millisecond and note their longest wait.

use anyhow::{Context, Result, bail};
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Between an answer and the next question.
const PAUSE: Duration = Duration::from_millis(1);

/// How long the reconnecting probe waits for a connection and for an answer before it starts again. A server that is
/// not there for a moment may have swallowed the first packet, which the kernel would repeat only after a second.
const TRY: Duration = Duration::from_millis(50);

/// How long the other one waits for an answer before it gives up its connection.
const PATIENCE: Duration = Duration::from_secs(100);

/// What a probe has seen since it began, or since [`Probe::mark`].
#[derive(Debug, Clone, Default)]
pub struct Seen {
    /// Answers.
    pub answers: u64,
    /// The longest wait for one.
    pub longest: Duration,
    /// Why it has stopped, if it has. Only the probe that keeps its connection ever does by itself.
    pub error: Option<String>,
}

#[derive(Debug)]
struct Shared {
    stop: AtomicBool,
    seen: Mutex<(Seen, Instant)>,
}

impl Shared {
    fn answered(&self, asked: Instant) {
        let mut guard = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let (seen, since) = &mut *guard;
        seen.answers += 1;
        seen.longest = seen.longest.max(asked.max(*since).elapsed());
    }

    fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

/// A probe in a thread of its own.
#[derive(Debug)]
pub struct Probe {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Probe {
    /// Connects once, then increments a counter of its own again and again, and checks every answer. A lost connection
    /// or a wrong number ends it.
    ///
    /// # Errors
    /// The server cannot be reached.
    pub fn steady(server: SocketAddr) -> Result<Self> {
        let mut connection = Connection::open(server, Duration::from_secs(2), PATIENCE)?;
        let mut last = None;
        let mut step = move || -> Result<()> {
            let number = connection.ask("INCR steady")?;
            let number: u64 =
                number.strip_prefix(':').and_then(|n| n.parse().ok()).with_context(|| number.clone())?;
            if last.is_some_and(|last| last + 1 != number) {
                bail!("{number} after {last:?}");
            }
            last = Some(number);
            Ok(())
        };
        Self::start(move |shared| {
            let asked = Instant::now();
            match step() {
                Ok(()) => shared.answered(asked),
                Err(e) => {
                    let mut guard = shared.seen.lock().unwrap_or_else(PoisonError::into_inner);
                    guard.0.error = Some(format!("{e:#}"));
                    return false;
                }
            }
            true
        })
    }

    /// Makes a new connection for every question, and tries until it has the answer.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn reconnecting(server: SocketAddr) -> Result<Self> {
        Self::start(move |shared| {
            let asked = Instant::now();
            while !shared.is_stopped() {
                let answer = Connection::open(server, TRY, TRY).and_then(|mut c| c.ask("PING"));
                if answer.is_ok_and(|answer| answer == "+PONG") {
                    shared.answered(asked);
                    break;
                }
                std::thread::sleep(PAUSE);
            }
            true
        })
    }

    fn start(mut step: impl FnMut(&Shared) -> bool + Send + 'static) -> Result<Self> {
        let seen = Mutex::new((Seen::default(), Instant::now()));
        let shared = Arc::new(Shared { stop: AtomicBool::new(false), seen });
        let own = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("probe".into()).spawn(move || {
            while !own.is_stopped() && step(&own) {
                std::thread::sleep(PAUSE);
            }
        })?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// From here on waits count; a wait that goes on counts from now.
    pub fn mark(&self) {
        let mut guard = self.shared.seen.lock().unwrap_or_else(PoisonError::into_inner);
        guard.0.longest = Duration::ZERO;
        guard.1 = Instant::now();
    }

    /// What it has seen.
    #[must_use]
    pub fn seen(&self) -> Seen {
        self.shared.seen.lock().unwrap_or_else(PoisonError::into_inner).0.clone()
    }

    /// Waits until `more` answers have come since now, or it has stopped by itself.
    ///
    /// # Errors
    /// Not within `limit`.
    pub fn progress(&self, more: u64, limit: Duration) -> Result<()> {
        let goal = self.seen().answers + more;
        crate::wait::until("answers to a probe", limit, || {
            let seen = self.seen();
            Ok((seen.answers >= goal || seen.error.is_some()).then_some(()))
        })
    }
}

impl Probe {
    /// Stops it, and waits until its connection is gone.
    ///
    /// # Errors
    /// It panicked.
    pub fn stop(mut self) -> Result<()> {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.thread.take().map_or(Ok(()), JoinHandle::join).ok().context("a probe panicked")
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
    }
}

/// A connection on which lines are asked and answered: Redis' inline commands.
#[derive(Debug)]
pub struct Connection(BufReader<TcpStream>);

impl Connection {
    /// Connects.
    ///
    /// # Errors
    /// No connection within `connect`.
    pub fn open(server: SocketAddr, connect: Duration, answer: Duration) -> Result<Self> {
        let stream = TcpStream::connect_timeout(&server, connect)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(answer))?;
        stream.set_write_timeout(Some(answer))?;
        Ok(Self(BufReader::new(stream)))
    }

    /// Asks a line and gives the answer's, without its end.
    ///
    /// # Errors
    /// The connection failed.
    pub fn ask(&mut self, line: &str) -> Result<String> {
        self.0.get_mut().write_all(format!("{line}\r\n").as_bytes()).context("ask")?;
        let mut answer = String::new();
        if self.0.read_line(&mut answer).context("wait for an answer")? == 0 {
            bail!("the server closed the connection");
        }
        Ok(answer.trim_end().to_owned())
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // Reset, not closed: a thousand closed connections a second would use up all ports.
        let _ignored = rustix::net::sockopt::set_socket_linger(self.0.get_ref(), Some(Duration::ZERO));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    /// Answers every line on every connection, and stands still for `pause` once the first `before` are answered.
    fn server(before: u64, pause: Duration) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            let mut number = 0;
            for stream in listener.incoming() {
                let mut reader = BufReader::new(stream.unwrap());
                let mut line = String::new();
                while reader.read_line(&mut line).is_ok_and(|n| n > 0) {
                    number += 1;
                    if number == before {
                        std::thread::sleep(pause);
                    }
                    let answer =
                        if line.starts_with("PING") { "+PONG\r\n".into() } else { format!(":{number}\r\n") };
                    line.clear();
                    if reader.get_mut().write_all(answer.as_bytes()).is_err() {
                        break;
                    }
                }
            }
        });
        address
    }

    #[test]
    fn both_probes_notice_a_standstill() {
        let pause = Duration::from_millis(300);
        for open in [Probe::steady, Probe::reconnecting] {
            let probe = open(server(50, pause)).unwrap();
            probe.mark();
            probe.progress(100, Duration::from_secs(20)).unwrap();
            let seen = probe.seen();
            assert!(seen.error.is_none() && seen.longest >= pause, "{seen:?}");
        }
    }

    #[test]
    fn the_steady_probe_notices_a_lost_count() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            let mut reader = BufReader::new(stream);
            let mut line = String::new();
            for answer in [":1\r\n", ":2\r\n", ":2\r\n"] {
                reader.read_line(&mut line).unwrap();
                reader.get_mut().write_all(answer.as_bytes()).unwrap();
            }
        });
        let probe = Probe::steady(address).unwrap();
        probe.progress(3, Duration::from_secs(20)).unwrap();
        assert_eq!(probe.seen().error.as_deref(), Some("2 after Some(2)"));
    }
}
