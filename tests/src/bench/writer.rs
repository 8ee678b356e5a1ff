//! The synthetic writer: `workloads/writer.c` in a container.

use crate::bench::cell::Writer;
use crate::bench::probe::Connection;
use anyhow::{Context, Result, bail};
use std::net::SocketAddr;
use std::time::Duration;

/// The program's source.
pub const SOURCE: &str = include_str!("../../workloads/writer.c");

/// How long a command may take: a verification reads all memory.
const COMMAND: Duration = Duration::from_secs(120);

/// Its command line.
#[must_use]
pub fn command_line(writer: &Writer) -> Vec<String> {
    let Writer { mebibytes, processes, pattern, hot_permille, fill, kind, .. } = writer;
    [
        "writer".to_owned(),
        mebibytes.to_string(),
        processes.to_string(),
        pattern.word().to_owned(),
        hot_permille.to_string(),
        fill.word().to_owned(),
        kind.word().to_owned(),
    ]
    .into()
}

/// Sets how many pages it writes per second.
///
/// # Errors
/// It does not answer.
pub fn set_rate(server: SocketAddr, pages: u64) -> Result<()> {
    match ask(server, &format!("RATE {pages}"))?.as_str() {
        "+OK" => Ok(()),
        other => bail!("RATE was answered with {other}"),
    }
}

/// How many writes there were since its start.
///
/// # Errors
/// It does not answer.
pub fn writes(server: SocketAddr) -> Result<u64> {
    number(server, "WRITES")
}

/// Lets it compare all its memory with what it should hold, byte for byte, and gives the number of bad pages.
///
/// # Errors
/// It does not answer.
pub fn verify(server: SocketAddr) -> Result<u64> {
    number(server, "VERIFY")
}

fn number(server: SocketAddr, command: &str) -> Result<u64> {
    let answer = ask(server, command)?;
    answer.strip_prefix(':').and_then(|n| n.parse().ok()).with_context(|| format!("{command}: {answer}"))
}

fn ask(server: SocketAddr, command: &str) -> Result<String> {
    Connection::open(server, Duration::from_secs(2), COMMAND)
        .and_then(|mut c| c.ask(command))
        .with_context(|| format!("ask the writer for {command}"))
}
