//! The command line `haul`, run as an operator would.

use crate::fleet::Fleet;
use crate::process::FLEET_VARIABLE;
use crate::services::program;
use crate::wait;
use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::process::{Child, Command, Output, Stdio};
use std::sync::LazyLock;
use std::time::Duration;

/// How long a migration of a test may take.
const MIGRATION: Duration = Duration::from_secs(120);

/// What a run of `haul` gave.
#[derive(Debug)]
pub struct Answer {
    /// Its exit code; -1 when a signal ended it.
    pub code: i32,
    /// What it printed.
    pub stdout: String,
    /// What it said besides.
    pub stderr: String,
}

impl Answer {
    fn new(output: &Output) -> Self {
        Self {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// The JSON object on the last line of what it printed.
    ///
    /// # Errors
    /// There is none.
    pub fn json(&self) -> Result<Value> {
        let last = self.stdout.lines().last().unwrap_or_default();
        serde_json::from_str(last)
            .with_context(|| format!("no JSON in the answer of haul: {}\n{}", self.stdout, self.stderr))
    }
}

impl Fleet {
    /// Runs the command line `haul` in the root namespace to its end.
    ///
    /// # Errors
    /// It could not be started; an unsuccessful end is an [`Answer`].
    pub fn haul(&self, arguments: &[&str]) -> Result<Answer> {
        let output = self.haul_command()?.args(arguments).output()?;
        Ok(Answer::new(&output))
    }

    /// The command `haul --nats …` to be completed and started by the caller.
    ///
    /// # Errors
    /// The program has not been built.
    pub fn haul_command(&self) -> Result<Command> {
        let mut command = Command::new(program(self.binaries(), "haul")?);
        command.args(["--nats", &self.nats()?.url()]).stdin(Stdio::null());
        command.env(FLEET_VARIABLE, self.name());
        Ok(command)
    }

    /// Migrates a container between hosts, by index, and waits for the end.
    ///
    /// # Errors
    /// `haul` could not be run, printed no result, or took longer than two minutes.
    pub fn migrate(&self, container: &str, from: usize, to: usize) -> Result<Moved> {
        self.start_migration(container, from, to)?.wait(MIGRATION)
    }

    /// As [`Fleet::migrate`], with the hosts by name, which need not exist.
    ///
    /// # Errors
    /// As [`Fleet::migrate`].
    pub fn migrate_named(&self, container: &str, from: &str, to: &str) -> Result<Moved> {
        self.start_named(container, from, to, &[])?.wait(MIGRATION)
    }

    /// Starts a migration and does not wait for its end.
    ///
    /// # Errors
    /// `haul` could not be started.
    pub fn start_migration(&self, container: &str, from: usize, to: usize) -> Result<Pending> {
        self.start_migration_with(container, from, to, &[])
    }

    /// As [`Fleet::start_migration`], with more arguments for `haul migrate`.
    ///
    /// # Errors
    /// As [`Fleet::start_migration`].
    pub fn start_migration_with(
        &self,
        container: &str,
        from: usize,
        to: usize,
        arguments: &[&str],
    ) -> Result<Pending> {
        self.start_named(container, self.host(from).name(), self.host(to).name(), arguments)
    }

    fn start_named(&self, container: &str, from: &str, to: &str, arguments: &[&str]) -> Result<Pending> {
        let mut command = self.haul_command()?;
        command.args(["migrate", container, "--from", from, "--to", to, "--wait", "--json"]).args(arguments);
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().context("start haul")?;
        Ok(Pending(child))
    }
}

/// A migration under way: a running `haul migrate --wait`.
#[derive(Debug)]
pub struct Pending(Child);

impl Pending {
    /// Waits for its end.
    ///
    /// # Errors
    /// It did not end within `limit`, or printed no result.
    pub fn wait(mut self, limit: Duration) -> Result<Moved> {
        let ended = wait::until("end of haul migrate", limit, || Ok(self.0.try_wait()?));
        if ended.is_err() {
            // It is given up, but what it has said so far belongs in the report.
            self.0.kill()?;
        }
        let answer = Answer::new(&self.0.wait_with_output()?);
        ended.with_context(|| format!("it has said: {}\n{}", answer.stdout, answer.stderr))?;
        Moved::new(answer)
    }
}

/// The end of a migration, as `haul migrate --wait --json` tells it.
#[derive(Debug)]
pub struct Moved {
    /// The migration's id.
    pub id: String,
    /// `committed` or `rolled_back`.
    pub outcome: String,
    /// The fault's code; empty after success.
    pub code: String,
    /// The fault's remedy; empty after success.
    pub remedy: String,
    /// The whole object.
    pub result: Value,
    /// The run itself.
    pub answer: Answer,
}

impl Moved {
    fn new(answer: Answer) -> Result<Self> {
        let result = answer.json()?;
        let text =
            |pointer: &str| result.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned();
        let (id, outcome) = (text("/id"), text("/outcome"));
        let (code, remedy) = (text("/fault/code"), text("/fault/remedy"));
        Ok(Self { id, outcome, code, remedy, result, answer })
    }

    /// Fails unless the container is on the target now.
    ///
    /// # Errors
    /// It was not moved; the error holds what `haul` said.
    pub fn committed(&self) -> Result<&Self> {
        if self.outcome != "committed" || self.answer.code != 0 {
            bail!(
                "not migrated (exit code {}): {}\n{}",
                self.answer.code,
                self.answer.stdout,
                self.answer.stderr
            );
        }
        Ok(self)
    }

    /// Fails unless the writes of every process were followed, in the way that this kernel must have.
    ///
    /// # Errors
    /// They were not.
    pub fn tracked(&self) -> Result<&Self> {
        let tracking = self.result.pointer("/facts/tracking").context("nothing is told of tracking")?;
        let tracker = tracking.get("tracker").and_then(Value::as_str);
        let untracked = tracking.get("untracked").and_then(Value::as_array);
        ensure!(tracker == Some(&*TRACKER), "not tracked by {}: {tracking}", *TRACKER);
        ensure!(untracked.is_some_and(Vec::is_empty), "processes are not tracked: {tracking}");
        Ok(self)
    }
}

/// How writes are tracked on this kernel: `HAULAGE_TEST_TRACKER` says so where it is not as on new ones.
static TRACKER: LazyLock<String> =
    LazyLock::new(|| std::env::var("HAULAGE_TEST_TRACKER").unwrap_or_else(|_| "write_protect".to_owned()));
