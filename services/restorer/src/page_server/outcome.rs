//! What a page server leaves in its working directory.

use std::fs::{self, File, TryLockError};
use std::io::{self, ErrorKind, Read, Write};
use std::path::Path;

use haulage_pages::serve::Served;
use haulage_service::notes;
use haulage_sys::Pid;
use serde::{Deserialize, Serialize};

/// The line with which a page server says that its sockets are there.
pub(crate) const READY: &str = "ready";
/// The socket on which the restorer gets copies of the descriptors.
pub(crate) const GUARD: &str = "guard.socket";
/// How serving ended; absent while it goes on, and after a sudden death.
pub(crate) const FILLED: &str = "filled.json";
/// Errors of the program.
pub(crate) const LOG: &str = "page-server.log";
/// Its process id, in a file that is locked while it lives.
const CLAIM: &str = "page-server.pid";

/// How serving ended.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(crate) struct Outcome {
    /// Why it failed; absent when the container has all its memory.
    pub(crate) error: Option<String>,
    /// It failed because the source, or the way to it, was lost that still owed memory.
    #[serde(default)]
    pub(crate) source_lost: bool,
    /// From the restored processes' start to the last page in place, in microseconds.
    pub(crate) took_us: u64,
    /// Pages that a thread waited for.
    pub(crate) faults: u64,
    /// Pages put in place for those, their neighbours included.
    pub(crate) on_demand: u64,
    /// Pages put in place in the background.
    pub(crate) in_background: u64,
    /// Pages that the source had owed and sent because they were asked for.
    #[serde(default)]
    pub(crate) pulled: u64,
    /// Pages that the source had owed and sent unasked.
    #[serde(default)]
    pub(crate) pushed: u64,
}

impl Outcome {
    pub(crate) fn complete(took: std::time::Duration, served: Served) -> Self {
        let took_us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        let Served { faults, on_demand, in_background, pulled, pushed } = served;
        Self { took_us, faults, on_demand, in_background, pulled, pushed, ..Self::default() }
    }

    pub(crate) fn failed(error: String, source_lost: bool) -> Self {
        Self { error: Some(error), source_lost, ..Self::default() }
    }

    pub(crate) fn write(&self, work: &Path) -> io::Result<()> {
        notes::write(&work.join(FILLED), self)
    }

    pub(crate) fn read(work: &Path) -> io::Result<Option<Self>> {
        notes::read(&work.join(FILLED))
    }
}

/// Writes our process id where others find it, and locks the file for as long as the result lives.
pub(crate) fn claim(work: &Path) -> io::Result<File> {
    let mut file =
        File::options().read(true).write(true).create(true).truncate(false).open(work.join(CLAIM))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::Error(error)) => return Err(error),
        Err(TryLockError::WouldBlock) => {
            return Err(io::Error::new(ErrorKind::AlreadyExists, "another page server is at work here"));
        }
    }
    file.set_len(0)?;
    write!(file, "{}", std::process::id())?;
    Ok(file)
}

/// The page server that is alive in `work`, if there is one.
pub(crate) fn running_in(work: &Path) -> io::Result<Option<Pid>> {
    let mut file = match File::open(work.join(CLAIM)) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        opened => opened?,
    };
    match file.try_lock() {
        // Nobody holds it: its process is gone. Ours is given back when the file is closed.
        Ok(()) => return Ok(None),
        Err(TryLockError::WouldBlock) => {}
        Err(TryLockError::Error(error)) => return Err(error),
    }
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    // Empty for the instant between the lock and the id.
    Ok(text.parse().ok().and_then(Pid::from_raw))
}

/// Removes what an earlier page server has left, so that its end is not taken for that of the next.
pub(crate) fn forget(work: &Path) -> io::Result<()> {
    match fs::remove_file(work.join(FILLED)) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_claim_tells_who_is_alive() {
        let work = tempfile::tempdir().unwrap();
        assert_eq!(running_in(work.path()).unwrap(), None);
        let held = claim(work.path()).unwrap();
        let us = i32::try_from(std::process::id()).unwrap();
        assert_eq!(running_in(work.path()).unwrap(), Pid::from_raw(us));
        assert!(claim(work.path()).is_err());
        drop(held);
        assert_eq!(running_in(work.path()).unwrap(), None);
        drop(claim(work.path()).unwrap());
    }

    #[test]
    fn an_outcome_is_read_as_it_was_written_and_forgotten() {
        let work = tempfile::tempdir().unwrap();
        assert_eq!(Outcome::read(work.path()).unwrap(), None);
        let outcome = Outcome::failed("no memory".to_owned(), false);
        outcome.write(work.path()).unwrap();
        assert_eq!(Outcome::read(work.path()).unwrap(), Some(outcome));
        forget(work.path()).unwrap();
        forget(work.path()).unwrap();
        assert_eq!(Outcome::read(work.path()).unwrap(), None);
    }
}
