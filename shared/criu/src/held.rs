//! A dump that is complete and can still be undone.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::cause::Cause;
use crate::dump::answer;
use crate::mask::PagemapMask;
use crate::rpc::Kind;
use crate::swrk::{RpcError, Worker};

/// Killing or resuming a tree takes milliseconds; a host in trouble may take longer.
const PATIENCE: Duration = Duration::from_secs(60);

/// CRIU did not confirm what it was told. Whether the tasks live has to be found out otherwise.
#[derive(Debug, thiserror::Error)]
pub enum HoldError {
    /// The hold was lost before: CRIU is gone, and the tasks run on if nothing else stopped them.
    #[error("criu no longer holds the container")]
    Lost,
    /// CRIU was told, and did not confirm.
    #[error("criu did not confirm the end of the hold")]
    Unconfirmed(#[source] RpcError),
    /// CRIU was told to kill the tasks, and says that it failed.
    #[error("criu could not end the container: {cause}")]
    Failed {
        /// Why.
        cause: Cause,
    },
}

/// A tree that is dumped, stopped and locked, waiting for the verdict.
///
/// Dropping it is [`HeldDump::roll_back`] without the confirmation, and so is the death of this process: CRIU sees the
/// connection close, resumes the tasks with their connections alive and ends. Tasks that were frozen when the dump began
/// are frozen again first, so they do not run before their cgroup is thawed. Only the death of CRIU itself lets them go
/// unordered: stopped no longer, sockets left in repair mode.
#[derive(Debug)]
pub struct HeldDump {
    worker: Worker,
    log: PathBuf,
    /// Goes only after the worker: its mounts show these files.
    _mask: Option<PagemapMask>,
}

impl HeldDump {
    pub(crate) fn new(worker: Worker, mask: Option<PagemapMask>, log: PathBuf) -> Self {
        Self { worker, log, _mask: mask }
    }

    /// Whether CRIU still holds the tree: it lives, waits and has said nothing.
    pub fn is_alive(&self) -> bool {
        self.worker.is_alive()
    }

    /// CRIU's log of this dump.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Ends the hold by killing every task of the tree. On success they are dead and reaped.
    ///
    /// The cgroup must not be frozen (cgroup v1): the killed tasks could not die, and this would wait for them.
    ///
    /// # Errors
    /// The tasks may live: see [`HoldError`].
    pub fn commit(mut self) -> Result<(), HoldError> {
        self.decide(true)?;
        match self.last_answer() {
            Ok(true) => Ok(()),
            Ok(false) => Err(HoldError::Failed { cause: Cause::of_log(&self.log, None) }),
            Err(error) => Err(HoldError::Unconfirmed(error)),
        }
    }

    /// Ends the hold by letting every task go on, connections and all; they are frozen if they were so when the dump
    /// began. The images are worthless from then on.
    ///
    /// # Errors
    /// [`HoldError::Lost`] and [`HoldError::Unconfirmed`]: CRIU died, and the tasks' connections may be locked.
    pub fn roll_back(mut self) -> Result<(), HoldError> {
        self.decide(false)?;
        // CRIU reports the dump as failed, as it was told to.
        self.last_answer().map(drop).map_err(HoldError::Unconfirmed)
    }

    fn decide(&mut self, success: bool) -> Result<(), HoldError> {
        if !self.is_alive() {
            return Err(HoldError::Lost);
        }
        self.worker.send(&answer(success)).map_err(|_| HoldError::Lost)
    }

    /// Answers the notifications of the way out and waits for CRIU's end; whether it reports success.
    fn last_answer(&mut self) -> Result<bool, RpcError> {
        loop {
            let response = self.worker.receive(PATIENCE)?;
            match response.kind() {
                Kind::Notify => self.worker.send(&answer(true))?,
                Kind::Dump => {
                    self.worker.wait(PATIENCE).ok_or(RpcError::Timeout(PATIENCE))?;
                    return Ok(response.success);
                }
                got => return Err(RpcError::Unexpected { expected: Kind::Dump, got }),
            }
        }
    }
}
