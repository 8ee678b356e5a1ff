//! The self-checking program: it dirties every kind of memory and, asked by a signal, verifies all of it.
//!
//! `workloads/dirtier.c` says what it does. It runs in containers of the image [`crate::image::DIRTIER`].

use crate::host::Host;
use crate::process::finish;
use crate::wait;
use anyhow::{Context, Result, bail};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// The program's source.
pub const SOURCE: &str = include_str!("../workloads/dirtier.c");

/// Another such program, for what is hard to move or cannot be moved: `hardship KIND`, in the same image.
pub const HARDSHIP: &str = include_str!("../workloads/hardship.c");

/// And one for System V shared memory, semaphores and messages: `segments MEBIBYTES KIND`, in the same image.
pub const SEGMENTS: &str = include_str!("../workloads/segments.c");

/// How long a verification of all memory may take.
const VERIFY: Duration = Duration::from_secs(60);

/// Compiles a workload's program, without any library that an image would have to hold.
///
/// # Errors
/// The compiler is missing or refuses.
pub(crate) fn compile(program: &str, to: &Path) -> Result<()> {
    let source = to.with_extension("c");
    std::fs::write(&source, program)?;
    finish(
        Command::new("cc")
            .args(["-static", "-O2", "-pthread", "-Wall", "-Werror", "-o"])
            .arg(to)
            .arg(&source),
    )?;
    Ok(std::fs::remove_file(&source)?)
}

/// One verification by the program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verdict {
    /// Which verification since its start this is, from 1 on.
    pub number: u64,
    /// Changes made to memory since the start, over all processes and threads.
    pub operations: u64,
    /// Pages that did not hold what they should.
    pub bad: u64,
}

/// Asks the program in a container to verify itself and waits for the verdict.
///
/// # Errors
/// The container does not run, or gave no new verdict in time.
pub fn verify(host: &Host, container: &str) -> Result<Verdict> {
    let before = verdicts(&host.docker(&["logs", container])?)?.last().map_or(0, |v| v.number);
    host.docker(&["kill", "--signal", "USR1", container])?;
    wait::until(&format!("the verdict of {container}"), VERIFY, || {
        if !host.is_running(container)? {
            bail!("{container} has ended:\n{}", host.docker(&["logs", container])?);
        }
        Ok(verdicts(&host.docker(&["logs", container])?)?.into_iter().find(|v| v.number > before))
    })
}

/// The verdicts in the program's output: lines `verdict N operations N bad N`.
fn verdicts(output: &str) -> Result<Vec<Verdict>> {
    let lines = output.lines().filter(|line| line.starts_with("verdict "));
    lines
        .map(|line| match *line.split_whitespace().collect::<Vec<_>>().as_slice() {
            ["verdict", number, "operations", operations, "bad", bad] => {
                Ok(Verdict { number: number.parse()?, operations: operations.parse()?, bad: bad.parse()? })
            }
            _ => bail!("not a verdict: {line}"),
        })
        .collect::<Result<_>>()
        .context("read the program's output")
}
