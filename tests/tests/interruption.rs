//! The demo is killed, and nothing of it stays.

use anyhow::{Context, Result, ensure};
use haulage_protocol::subject::EVENTS_FILTER;
use haulage_tests::leftovers::{Snapshot, left_since};
use haulage_tests::nats::Subscription;
use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

/// How long the janitor may take.
const CLEANING: Duration = Duration::from_secs(15);

/// A running demo, killed when dropped.
struct Demo {
    child: Child,
    output: BufReader<ChildStdout>,
    fleet: String,
    nats: SocketAddr,
}

impl Demo {
    fn start() -> Result<Self> {
        let mut child =
            Command::new(env!("CARGO_BIN_EXE_demo")).stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
        let mut output = BufReader::new(child.stdout.take().context("the demo's output")?);
        let mut line = String::new();
        output.read_line(&mut line)?;
        let fields =
            line.trim_end().strip_prefix("fleet ").and_then(|l| l.split_once(": two Docker hosts, NATS at "));
        let (fleet, nats) = fields.with_context(|| format!("not the first line of a demo: {line}"))?;
        Ok(Self { child, output, fleet: fleet.to_owned(), nats: nats.parse()? })
    }

    fn wait_for_line(&mut self, start: &str) -> Result<()> {
        for line in self.output.by_ref().lines() {
            if line?.starts_with(start) {
                return Ok(());
            }
        }
        anyhow::bail!("the demo ended without a line that starts with {start:?}")
    }

    fn kill_and_check(mut self, before: &Snapshot) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        let left = left_since(before, &self.fleet, CLEANING)?;
        ensure!(left.is_empty(), "left behind:\n{}", left.join("\n"));
        Ok(())
    }
}

impl Drop for Demo {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_demo_killed_at_its_start_leaves_nothing() -> Result<()> {
    let before = Snapshot::take()?;
    let demo = Demo::start()?;
    let link = format!("link {}", demo.fleet);
    ensure!(
        Snapshot::take()?.added_since(&before, &demo.fleet).contains(&link),
        "a snapshot does not see the fleet"
    );
    demo.kill_and_check(&before)
}

#[test]
fn a_demo_killed_with_its_container_frozen_leaves_nothing() -> Result<()> {
    let before = Snapshot::take()?;
    let mut demo = Demo::start()?;
    let mut events = Subscription::new(demo.nats, EVENTS_FILTER)?;
    demo.wait_for_line("$ haul migrate")?;
    events.wait_for_phase("switch", Duration::from_secs(60))?;
    demo.kill_and_check(&before)
}
