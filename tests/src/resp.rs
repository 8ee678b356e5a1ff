//! The Redis protocol, as far as the load clients need it, over one connection that is never made anew.

use crate::wait::limit;
use anyhow::{Context, Result, bail};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// How long a client waits for one answer. Far beyond any acceptable pause: a pause is measured, not punished.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// An answer of the server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// A status such as `OK`.
    Status(String),
    /// An error of the server.
    Error(String),
    /// A number.
    Number(i64),
    /// A value; `None` when there is none.
    Value(Option<Vec<u8>>),
}

/// One TCP connection to a Redis server.
#[derive(Debug)]
pub struct Client {
    reader: BufReader<TcpStream>,
    writer: TcpStream,
}

impl Client {
    /// Connects.
    ///
    /// # Errors
    /// No connection within two seconds (see [`limit`]).
    pub fn connect(address: SocketAddr) -> Result<Self> {
        let writer = TcpStream::connect_timeout(&address, limit(Duration::from_secs(2)))
            .with_context(|| format!("connect to {address}"))?;
        writer.set_nodelay(true)?;
        writer.set_read_timeout(Some(limit(PATIENCE)))?;
        writer.set_write_timeout(Some(limit(PATIENCE)))?;
        Ok(Self { reader: BufReader::new(writer.try_clone()?), writer })
    }

    /// Sends a command and waits for its answer.
    ///
    /// # Errors
    /// The connection failed, or the answer is not of the protocol.
    pub fn call(&mut self, command: &[&[u8]]) -> Result<Answer> {
        self.send(command)?;
        self.receive()
    }

    /// Sends a command without waiting, for pipelining; [`Client::receive`] takes the answers in order.
    ///
    /// # Errors
    /// The connection failed.
    pub fn send(&mut self, command: &[&[u8]]) -> Result<()> {
        let mut bytes = Vec::new();
        frame(&mut bytes, command);
        self.send_frames(&bytes)
    }

    /// Sends commands that [`frame`] has put together.
    ///
    /// # Errors
    /// The connection failed.
    pub fn send_frames(&mut self, frames: &[u8]) -> Result<()> {
        self.writer.write_all(frames).context("send commands")
    }

    /// Waits for the next answer.
    ///
    /// # Errors
    /// The connection failed, or the answer is not of the protocol.
    pub fn receive(&mut self) -> Result<Answer> {
        let mut line = String::new();
        if self.reader.read_line(&mut line).context("wait for an answer")? == 0 {
            bail!("the server closed the connection");
        }
        let line = line.trim_end();
        let (kind, rest) = line.split_at_checked(1).context("an empty answer")?;
        Ok(match kind {
            "+" => Answer::Status(rest.to_owned()),
            "-" => Answer::Error(rest.to_owned()),
            ":" => Answer::Number(rest.parse().context("a number")?),
            "$" if rest == "-1" => Answer::Value(None),
            "$" => {
                let size: usize = rest.parse().context("a length")?;
                let mut value = vec![0; size + 2];
                self.reader.read_exact(&mut value)?;
                value.truncate(size);
                Answer::Value(Some(value))
            }
            _ => bail!("not an answer of Redis: {line}"),
        })
    }

    /// Fills the server with about `mebibytes` of data that does not compress to nothing: keys `fill:N` of 1 KiB each.
    ///
    /// # Errors
    /// The connection failed or the server refused.
    pub fn fill(&mut self, mebibytes: u32) -> Result<()> {
        const AT_ONCE: u32 = 512;
        let mut random = Random::new(0x5eed);
        for start in (0..mebibytes * 1024).step_by(AT_ONCE as usize) {
            for number in start..start + AT_ONCE {
                let value: Vec<u8> = (0..128).flat_map(|_| random.next().to_le_bytes()).collect();
                self.send(&[b"SET", format!("fill:{number}").as_bytes(), &value])?;
            }
            for _ in 0..AT_ONCE {
                match self.receive()? {
                    Answer::Status(_) => {}
                    other => bail!("SET was answered with {other:?}"),
                }
            }
        }
        Ok(())
    }
}

/// Appends a command as it goes over the wire.
pub fn frame(to: &mut Vec<u8>, command: &[&[u8]]) {
    to.reserve(64 + command.iter().map(|part| part.len() + 16).sum::<usize>());
    to.extend_from_slice(format!("*{}\r\n", command.len()).as_bytes());
    for part in command {
        to.extend_from_slice(format!("${}\r\n", part.len()).as_bytes());
        to.extend_from_slice(part);
        to.extend_from_slice(b"\r\n");
    }
}

/// A small generator (xorshift): test data must be the same in every run.
#[derive(Debug)]
pub struct Random(u64);

impl Random {
    /// A generator whose numbers depend on `seed` only.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(2).wrapping_add(1))
    }

    /// The next number.
    #[expect(clippy::should_implement_trait, reason = "it never ends, so it is not an iterator")]
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}
