//! Removal of a fleet, the same way after success, failure, panic, interrupt and SIGKILL.
//!
//! Each fleet has one small supervising process. It waits on a pipe whose other end only the fleet's process holds:
//! when that end closes, for whatever reason, it removes everything by the fleet's name (`janitor.sh`).

use anyhow::{Context, Result, bail};
use std::ffi::OsStr;
use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

const SCRIPT: &str = include_str!("janitor.sh");

/// The supervising process of one fleet.
#[derive(Debug)]
pub struct Janitor {
    child: Child,
}

impl Janitor {
    /// Starts supervising. Do this before making anything of the fleet.
    ///
    /// # Errors
    /// `name` is not a fleet's, `directory` is not named after it, or the process cannot be started.
    pub fn watch(name: &str, directory: &Path) -> Result<Self> {
        if !is_fleet_name(name) || directory.file_name() != Some(OsStr::new(name)) {
            bail!(
                "{name:?} with {} is not a fleet: such a removal could hit the whole machine",
                directory.display()
            );
        }
        let child = Command::new("/bin/sh")
            .args(["-c", SCRIPT, "haulage-janitor", name])
            .arg(directory)
            .current_dir("/")
            // Out of the reach of a terminal's interrupt and of a test runner's kill of its process group.
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .context("start the janitor")?;
        Ok(Self { child })
    }

    /// Removes the fleet and waits until that is done. A second call does nothing.
    ///
    /// # Errors
    /// Something could not be removed; the error names it.
    pub fn clean(&mut self) -> Result<()> {
        self.end()
    }

    /// Leaves the fleet in place and ends the supervision.
    ///
    /// # Errors
    /// The janitor is not there any more.
    pub fn dismiss(&mut self) -> Result<()> {
        if let Some(pipe) = self.child.stdin.as_mut() {
            pipe.write_all(b"keep\n")?;
        }
        self.end()
    }

    fn end(&mut self) -> Result<()> {
        drop(self.child.stdin.take());
        let mut complaints = String::new();
        if let Some(mut output) = self.child.stdout.take() {
            output.read_to_string(&mut complaints)?;
        }
        self.child.wait()?;
        if !complaints.trim().is_empty() {
            bail!("{}", complaints.trim());
        }
        Ok(())
    }
}

/// Whether this is a fleet's name: `haul-` and four hexadecimal digits. Removal goes by the name alone, so anything
/// shorter or more general must never come so far; `janitor.sh` checks it once more.
#[must_use]
pub fn is_fleet_name(name: &str) -> bool {
    let digits = name.strip_prefix("haul-").unwrap_or_default();
    digits.len() == 4 && digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

#[cfg(test)]
mod tests {
    use super::*;

    // The check alone, never the script: were it broken, the script would be what it protects from.
    #[test]
    fn only_whole_names_are_names_of_fleets() {
        assert!(is_fleet_name("haul-12ab"));
        for other in
            ["", "haul-", "haul-12a", "haul-12abc", "haul-12AB", "haul-*", "haul-12a/", " haul-12ab", "x"]
        {
            assert!(!is_fleet_name(other), "{other:?}");
        }
    }
}
