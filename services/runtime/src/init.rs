//! A container that has come to life is killed, unless all agree that it has.

use std::io;
use std::os::fd::OwnedFd;

use haulage_sys::{Pid, pidfd};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Signal, pidfd_send_signal};

use crate::failure::Failure;

/// A killed process is gone within this time, unless the kernel holds it.
const GONE_WITHIN: Timespec = Timespec { tv_sec: 10, tv_nsec: 0 };

/// The first process of the container, while it is not certain that it shall go on. When this is dropped it is killed, and
/// with it all that are below it: runc forgets a container that it cannot restore, without a look at what has come of it.
pub(crate) struct Init {
    process: OwnedFd,
    goes_on: bool,
}

impl Init {
    /// # Errors
    /// When there is no such process, or no descriptor left for it.
    pub(crate) fn of(pid: Pid) -> Result<Self, Failure> {
        let process = pidfd::open(pid).map_err(|error| Failure::Gate(io::Error::other(error)))?;
        Ok(Self { process, goes_on: false })
    }

    /// It is somebody else's to end from here on.
    pub(crate) fn let_go(mut self) {
        self.goes_on = true;
    }

    /// Does not wait for its end.
    pub(crate) fn kill(&self) {
        // One that is gone need not be killed.
        let _ = pidfd_send_signal(&self.process, Signal::KILL);
    }
}

impl Drop for Init {
    fn drop(&mut self) {
        if !self.goes_on {
            self.kill();
            // Of its pid namespace, it is the last one.
            let _ = poll(&mut [PollFd::new(&self.process, PollFlags::IN)], Some(&GONE_WITHIN));
        }
    }
}
