//! The fleet's NATS server, and a view of what is said on it.

use crate::process::Daemon;
use crate::wait::{self, limit};
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

const PORT: u16 = 4222;

/// How long the server may take to answer after its start.
const START: Duration = Duration::from_secs(10);

/// The server configuration that a fleet in production has too.
const CONFIGURATION: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../nats/server.conf");

/// A NATS server with JetStream.
#[derive(Debug)]
pub struct NatsServer {
    daemon: Daemon,
    address: SocketAddr,
}

impl NatsServer {
    /// Starts a server in the root namespace that keeps its data in `directory`, and waits until it answers.
    ///
    /// # Errors
    /// It could not be started or does not answer.
    pub(crate) fn start(fleet: &str, address: Ipv4Addr, directory: &Path) -> Result<Self> {
        std::fs::create_dir_all(directory)?;
        let mut command = Command::new("nats-server");
        command.args([
            "--config",
            CONFIGURATION,
            "--addr",
            &address.to_string(),
            "--port",
            &PORT.to_string(),
        ]);
        command.arg("--store_dir").arg(directory.join("store"));
        let daemon = Daemon::start("nats-server", fleet, command, &directory.join("nats-server.log"))?;
        let mut server = Self { daemon, address: SocketAddr::from((address, PORT)) };
        wait::until("an answer of the NATS server", START, || {
            server.daemon.check_running()?;
            Ok(Connection::open(server.address).ok())
        })?;
        Ok(server)
    }

    /// The URL for services and the command line.
    #[must_use]
    pub fn url(&self) -> String {
        format!("nats://{}", self.address)
    }

    /// The server's address.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Publishes bytes of any kind on a subject, as a stranger might.
    ///
    /// # Errors
    /// The server does not answer.
    pub fn publish(&self, subject: &str, payload: &[u8]) -> Result<()> {
        let mut connection = Connection::open(self.address)?;
        write!(connection.writer, "PUB {subject} {}\r\n", payload.len())?;
        connection.writer.write_all(payload)?;
        connection.writer.write_all(b"\r\nPING\r\n")?;
        while connection.line()? != "PONG" {}
        Ok(())
    }

    /// Sends a request of any kind, as a stranger might, and gives the first answer.
    ///
    /// # Errors
    /// None comes within `limit`, or it is not JSON.
    pub fn request(&self, subject: &str, payload: &[u8], limit: Duration) -> Result<Value> {
        let inbox = format!("_INBOX.{}", std::process::id());
        let mut answers = self.subscribe(&inbox)?;
        write!(answers.0.writer, "PUB {subject} {inbox} {}\r\n", payload.len())?;
        answers.0.writer.write_all(payload)?;
        answers.0.writer.write_all(b"\r\n")?;
        answers.next(limit).with_context(|| format!("no answer to a request on {subject}"))
    }

    /// Subscribes to a subject; messages published from now on are seen.
    ///
    /// # Errors
    /// The server does not answer.
    pub fn subscribe(&self, subject: &str) -> Result<Subscription> {
        Subscription::new(self.address, subject)
    }
}

/// Messages on a subject, which are JSON.
pub struct Subscription(Connection);

impl Subscription {
    /// Subscribes at a server that may belong to another process.
    ///
    /// # Errors
    /// The server does not answer.
    pub fn new(server: SocketAddr, subject: &str) -> Result<Self> {
        let mut connection = Connection::open(server)?;
        write!(connection.writer, "SUB {subject} 1\r\nPING\r\n")?;
        while connection.line()? != "PONG" {}
        Ok(Self(connection))
    }

    /// Waits until a migration enters a phase.
    ///
    /// # Errors
    /// It does not within `limit` after the event before.
    pub fn wait_for_phase(&mut self, phase: &str, limit: Duration) -> Result<()> {
        loop {
            let event = self.next(limit).with_context(|| format!("phase {phase} does not come"))?;
            if event.pointer("/what/phase").and_then(Value::as_str) == Some(phase) {
                return Ok(());
            }
        }
    }

    /// The next message.
    ///
    /// # Errors
    /// None comes within `limit`, it is not JSON, or the connection is lost.
    pub fn next(&mut self, limit: Duration) -> Result<Value> {
        let deadline = Instant::now() + self::limit(limit);
        loop {
            let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
            self.0.writer.set_read_timeout(Some(left))?;
            let line = self.0.line().context("wait for a message")?;
            if let Some(message) = self.0.message(&line)? {
                return Ok(message);
            }
        }
    }
}

/// The few words of the NATS protocol that a view of the events needs.
struct Connection {
    reader: BufReader<TcpStream>,
    writer: TcpStream,
}

impl Connection {
    fn open(address: SocketAddr) -> Result<Self> {
        let writer = TcpStream::connect_timeout(&address, limit(Duration::from_secs(2)))?;
        writer.set_read_timeout(Some(limit(Duration::from_secs(2))))?;
        let mut connection = Self { reader: BufReader::new(writer.try_clone()?), writer };
        let greeting = connection.line()?;
        if !greeting.starts_with("INFO ") || !greeting.contains("\"jetstream\":true") {
            bail!("no NATS server with JetStream: {greeting}");
        }
        connection.writer.write_all(b"CONNECT {\"verbose\":false,\"pedantic\":false}\r\nPING\r\n")?;
        while connection.line()? != "PONG" {}
        Ok(connection)
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        if self.reader.read_line(&mut line)? == 0 {
            bail!("the NATS server closed the connection");
        }
        Ok(line.trim_end().to_owned())
    }

    /// The payload that follows the line of a message; of another line, nothing. The server's PING is answered.
    fn message(&mut self, line: &str) -> Result<Option<Value>> {
        if line == "PING" {
            self.writer.write_all(b"PONG\r\n")?;
        }
        // MSG subject sid [reply] size, or HMSG subject sid [reply] header-size total-size.
        let fields: Vec<&str> = line.split(' ').collect();
        let number = |text: Option<&&str>| -> Result<usize> {
            text.context("a message without its size")?.parse().context("a message's size")
        };
        let (skip, size) = match fields.as_slice() {
            ["MSG", .., size] => (0, number(Some(size))?),
            ["HMSG", .., header, size] => (number(Some(header))?, number(Some(size))?),
            _ => return Ok(None),
        };
        let mut payload = vec![0; size + 2];
        self.reader.read_exact(&mut payload)?;
        Ok(Some(serde_json::from_slice(payload.get(skip..size).unwrap_or_default())?))
    }
}
