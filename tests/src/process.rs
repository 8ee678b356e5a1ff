//! Processes which belong to a fleet, and commands run to their end.

use anyhow::{Context, Result, bail};
use std::ffi::OsStr;
use std::fs::File;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

/// The environment variable by which the janitor recognizes a fleet's processes. Its value is the fleet's name.
pub const FLEET_VARIABLE: &str = "HAULAGE_FLEET";

/// A long-running process of a fleet, with its output in a log file.
///
/// Dropping it kills and reaps it; the janitor ends those whose owner never came to that.
#[derive(Debug)]
pub struct Daemon {
    what: String,
    child: Child,
    log: PathBuf,
}

impl Daemon {
    /// Starts `command` in its own process group, so that a terminal's interrupt does not reach it, with its output
    /// appended to `log`.
    ///
    /// # Errors
    /// The log cannot be opened or the program cannot be started.
    pub fn start(what: &str, fleet: &str, mut command: Command, log: &Path) -> Result<Self> {
        let output = File::options()
            .create(true)
            .append(true)
            .open(log)
            .with_context(|| format!("open {}", log.display()))?;
        let child = command
            .env(FLEET_VARIABLE, fleet)
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .process_group(0)
            .spawn()
            .with_context(|| format!("start {what}"))?;
        Ok(Self { what: what.to_owned(), child, log: log.to_owned() })
    }

    /// The process id. It is the program's own: `nsenter` and `unshare` become it.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Where its output goes.
    #[must_use]
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// What it has written so far, or the reason why that cannot be read.
    #[must_use]
    pub fn output(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_else(|e| format!("({}: {e})", self.log.display()))
    }

    /// Fails, with the end of its log, if the process has ended.
    ///
    /// # Errors
    /// The process has ended.
    pub fn check_running(&mut self) -> Result<()> {
        if let Some(status) = self.child.try_wait()? {
            bail!("{} ended with {status}:\n{}", self.what, tail(&self.output(), 20));
        }
        Ok(())
    }

    /// Kills the process with SIGKILL and reaps it. One that has ended already is only reaped.
    ///
    /// # Errors
    /// The process could not be signalled or waited for.
    pub fn kill(&mut self) -> Result<ExitStatus> {
        self.child.kill().with_context(|| format!("kill {}", self.what))?;
        Ok(self.child.wait()?)
    }

    /// Asks the process to end (SIGTERM) and waits for it.
    ///
    /// # Errors
    /// The process could not be signalled, or was still there after `limit`.
    pub fn terminate(&mut self, limit: std::time::Duration) -> Result<ExitStatus> {
        rustix::process::kill_process(
            rustix::process::Pid::from_child(&self.child),
            rustix::process::Signal::TERM,
        )?;
        let Self { what, child, .. } = self;
        crate::wait::until(&format!("end of {what}"), limit, || Ok(child.try_wait()?))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // An error here means that it is gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs a program to its end and gives what it printed, without the last newline.
///
/// # Errors
/// It could not be started, or ended unsuccessfully; the error holds the command and what it said.
pub fn run<S: AsRef<OsStr>>(program: &str, arguments: &[S]) -> Result<String> {
    finish(Command::new(program).args(arguments))
}

/// As [`run`], for a prepared command.
///
/// # Errors
/// As [`run`].
pub fn finish(command: &mut Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("start {command:?}"))?;
    if !output.status.success() {
        bail!("{command:?} ended with {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim_end().to_owned())
}

/// Runs a program to its end with `input` on its standard input.
///
/// # Errors
/// As [`run`].
pub fn feed<S: AsRef<OsStr>>(program: &str, arguments: &[S], input: &[u8]) -> Result<String> {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("start {command:?}"))?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(input).with_context(|| format!("write to {command:?}"))?;
    }
    let output = child.wait_with_output()?;
    if !output.status.success() {
        bail!("{command:?} ended with {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim_end().to_owned())
}

/// The last `count` lines of a text.
#[must_use]
pub fn tail(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines.iter().skip(lines.len().saturating_sub(count)).copied().collect::<Vec<_>>().join("\n")
}
