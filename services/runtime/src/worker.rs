//! The true CRIU, started while there is nothing to restore yet: it has come as far as it can when the request does.
//!
//! ```text
//!   gate: start ──▶ criu swrk, in its own mounts and the container's network: waits for a request
//!         show ──▶ the root, and what the images leave out, in its mounts
//!         hand over ──▶ its connection is the keeper's: the one request reaches it
//!         wait ──▶ its exit status
//! ```
//!
//! Until it is handed over, nobody but the gate has the other end of CRIU's connection: one that is dropped has been asked
//! for nothing, finds its connection closed, and ends; so does one whose gate is killed. Before it has the request it looks
//! at nothing but its arguments, its environment and the machine's own configuration (`main` of `criu/crtools.c` and
//! `cr_service_work` of `criu/cr-service.c`, 4.1 and 4.2).

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command, ExitStatus};

use haulage_criu::shared::LeftOut;
use haulage_sys::ipc::IpcNamespace;
use haulage_sys::netns::NetworkNamespace;
use haulage_sys::{Pid, mount_ns, pass_fd, pidfd};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use crate::keeper::{PROCESS, READY};

/// A CRIU that waits for its request. Dropping it ends it.
pub(crate) struct Worker {
    child: Child,
    /// The other end of its connection; `None` once the keeper has it.
    connection: Option<OwnedFd>,
}

impl Worker {
    /// Starts `criu`, in the container's cgroups, as this process is by now, and in `network` and `ipc` if they are given. It inherits
    /// the container's shared memory, under the names that the images have for it.
    ///
    /// # Errors
    /// When it cannot be started, or does not get its namespaces.
    pub(crate) fn start(
        mut criu: Command,
        network: Option<&OsString>,
        ipc: Option<IpcNamespace>,
        shared: Vec<OwnedFd>,
    ) -> io::Result<Self> {
        let (ours, its) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        // By arguments: CRIU 4.1 reads a configuration twice, and would look twice for a descriptor that it has put away
        // the first time.
        for (index, memory) in shared.into_iter().enumerate() {
            let number = mount_ns::pass_fd(&mut criu, memory);
            criu.args(["--inherit-fd".to_owned(), format!("fd[{number}]:{}", LeftOut::key(index))]);
        }
        let number = mount_ns::pass_fd(&mut criu, its);
        criu.args(["swrk".to_owned(), number.to_string()]);
        mount_ns::enter_private_mounts_on_start(&mut criu);
        if let Some(network) = network {
            NetworkNamespace::at(Path::new(network))?.enter_on_start(&mut criu);
        }
        if let Some(ipc) = ipc {
            ipc.enter_on_start(&mut criu);
        }
        let child = criu.spawn()?;
        // The copies here of what it inherits are closed with the command.
        drop(criu);
        Ok(Self { child, connection: Some(ours) })
    }

    /// Whether it has not ended.
    pub(crate) fn is_alive(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Runs `work` among its mounts.
    ///
    /// # Errors
    /// Those of `work`, and when it has ended.
    pub(crate) fn among_its_mounts<T: Send>(
        &self,
        work: impl FnOnce() -> io::Result<T> + Send,
    ) -> io::Result<T> {
        mount_ns::run_in(Pid::from_child(&self.child), work)
    }

    /// The keeper has its connection from here on, and nobody else, and may end it.
    ///
    /// # Errors
    /// When it or the keeper is gone.
    pub(crate) fn hand_over(&mut self, keeper: impl AsFd) -> io::Result<()> {
        let process = pidfd::open(Pid::from_child(&self.child)).map_err(io::Error::other)?;
        let connection = self.connection.take().ok_or(io::ErrorKind::NotConnected)?;
        pass_fd::send(&keeper, PROCESS, Some(process.as_fd()))?;
        pass_fd::send(&keeper, READY, Some(connection.as_fd()))
    }

    /// Waits for its end. The container's first process, which is a child of this process's too when CRIU has made it, is
    /// left to whom it gets after us.
    ///
    /// # Errors
    /// When it is no child of ours.
    pub(crate) fn wait(mut self) -> io::Result<ExitStatus> {
        self.child.wait()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.connection = None;
        // One that has been waited for says the same again.
        let _ = self.child.wait();
    }
}
