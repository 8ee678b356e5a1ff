//! One CRIU worker: `criu swrk`, which serves a single request over a socket pair and ends.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use haulage_sys::ipc::IpcNamespace;
use haulage_sys::mount_ns;
use haulage_sys::netns::NetworkNamespace;
use haulage_sys::vm_flags::VmFlags;
use prost::Message;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::mask::Findings;
use crate::rpc::{Kind, Request, Response};

/// The longest answer that is accepted. CRIU's are well below 1 KiB.
const MAX_ANSWER: usize = 64 << 10;
/// How long a worker that has been told to end may take before its exit is no longer waited for.
const LINGER: Duration = Duration::from_secs(20);

/// Has CRIU not come into processes by a descriptor that it makes there, which it would look for in `/proc/<pid>/fd`, but
/// by a mapping: `FI_NO_MEMFD` of `criu/include/fault-injection.h`, with which its own tests do the same.
const WITHOUT_DESCRIPTORS: (&str, &str) = ("CRIU_FAULT", "129");

/// The conversation with CRIU failed.
#[derive(Debug, thiserror::Error)]
pub enum RpcError {
    /// CRIU is not installed where it was looked for.
    #[error("no program named criu is on PATH")]
    NotFound,
    /// It could not be started.
    #[error("cannot start {program}")]
    Start {
        /// Which program.
        program: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The socket failed; a CRIU that has died shows as `EPIPE` or `ECONNRESET`.
    #[error("cannot talk to criu")]
    Socket(#[source] io::Error),
    /// CRIU ended without an answer.
    #[error("criu ended without an answer ({})", .0.map_or_else(|| "still exiting".to_owned(), |s| s.to_string()))]
    Ended(Option<ExitStatus>),
    /// No answer in time.
    #[error("criu did not answer within {0:?}")]
    Timeout(Duration),
    /// The answer is not one of CRIU's.
    #[error("criu's answer cannot be understood")]
    Malformed(#[from] prost::DecodeError),
    /// An answer to something else.
    #[error("criu answered {got:?} where {expected:?} was due")]
    Unexpected {
        /// What was due.
        expected: Kind,
        /// What came.
        got: Kind,
    },
    /// CRIU understood, and failed.
    #[error("criu failed{}", .0.as_deref().map(|text| format!(": {text}")).unwrap_or_default())]
    Refused(Option<String>),
}

/// Where CRIU is.
#[derive(Debug, Clone)]
pub struct Criu {
    program: PathBuf,
    /// For [`crate::mask`].
    pub(crate) findings: Arc<Findings>,
    flags: Arc<OnceLock<Option<VmFlags>>>,
}

impl Criu {
    /// CRIU at a given place.
    pub fn at(program: impl Into<PathBuf>) -> Self {
        Self { program: program.into(), findings: Arc::default(), flags: Arc::default() }
    }

    /// The first `criu` on `PATH`, as runc finds it too.
    ///
    /// # Errors
    /// [`RpcError::NotFound`].
    pub fn find() -> Result<Self, RpcError> {
        let path = std::env::var_os("PATH").ok_or(RpcError::NotFound)?;
        std::env::split_paths(&path)
            .map(|dir| dir.join("criu"))
            .find(|candidate| candidate.is_file())
            .map(Self::at)
            .ok_or(RpcError::NotFound)
    }

    /// The program.
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// What tells the flags of mappings, where the kernel has it. It is loaded once.
    pub(crate) fn vm_flags(&self) -> Option<&VmFlags> {
        let load = || {
            let unfit = |error: &_| tracing::info!(%error, "flags of mappings are read from smaps, which takes longer");
            VmFlags::load().inspect_err(unfit).ok()
        };
        self.flags.get_or_init(load).as_ref()
    }
}

/// Mounts that a worker sees and nobody else.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct WorkerView {
    /// `(source, target)`, in order.
    pub(crate) binds: Vec<(PathBuf, PathBuf)>,
    /// What covers the worker's own `/proc/self/pagemap`.
    pub(crate) over_own_pagemap: Option<PathBuf>,
    /// Some of them cover the descriptors of processes.
    pub(crate) hides_descriptors: bool,
}

/// A running worker. Dropping it closes the connection, which every stage of CRIU takes for a failure and undoes what
/// it did, and waits for its end.
#[derive(Debug)]
pub(crate) struct Worker {
    /// `None` once closed, which tells CRIU that nobody will answer any more.
    socket: Option<OwnedFd>,
    child: Child,
    pidfd: OwnedFd,
}

impl Worker {
    /// Starts a worker with `stderr` for what it says before it has a log file, in namespaces of the network
    /// and of IPC if any are given.
    ///
    /// The worker outlives us only until it next speaks: it then finds the connection closed, and undoes. It gets no
    /// parent-death signal on purpose: a CRIU killed in the middle leaves sockets in repair mode and packets locked out.
    pub(crate) fn start(
        criu: &Criu,
        view: Option<&WorkerView>,
        (network, ipc): (Option<NetworkNamespace>, Option<IpcNamespace>),
        stderr: Option<File>,
    ) -> Result<Self, RpcError> {
        let start = |source| RpcError::Start { program: criu.program.clone(), source };
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .map_err(|errno| start(errno.into()))?;
        let mut cmd = Command::new(&criu.program);
        let number = mount_ns::pass_fd(&mut cmd, theirs);
        cmd.arg("swrk").arg(number.to_string());
        cmd.stdin(Stdio::null()).stdout(Stdio::null());
        cmd.stderr(stderr.map_or_else(Stdio::null, Stdio::from));
        if view.is_some_and(|view| view.hides_descriptors) {
            let (name, value) = WITHOUT_DESCRIPTORS;
            cmd.env(name, value);
        }
        if let Some(network) = network {
            network.enter_on_start(&mut cmd);
        }
        if let Some(ipc) = ipc {
            ipc.enter_on_start(&mut cmd);
        }
        let mut child = match view {
            None => {
                let spawned = cmd.spawn();
                // Our copy of CRIU's end must go, or its death would not be seen.
                drop(cmd);
                spawned
            }
            Some(view) => {
                mount_ns::spawn_in_private_mounts(cmd, &view.binds, view.over_own_pagemap.as_deref())
            }
        }
        .map_err(start)?;
        match pidfd(&child) {
            Ok(pidfd) => Ok(Self { socket: Some(ours), child, pidfd }),
            Err(source) => {
                drop(ours);
                // Reaped at once: it was given nothing to do and finds its connection closed.
                let _ = child.wait();
                Err(start(source))
            }
        }
    }

    pub(crate) fn send(&self, request: &Request) -> Result<(), RpcError> {
        let socket = self.socket.as_ref().ok_or(RpcError::Ended(None))?;
        let bytes = request.encode_to_vec();
        send(socket, &bytes, SendFlags::NOSIGNAL).map_err(|errno| RpcError::Socket(errno.into()))?;
        Ok(())
    }

    /// The next message, until `deadline`.
    pub(crate) fn receive(&mut self, within: Duration) -> Result<Response, RpcError> {
        let socket = self.socket.as_ref().ok_or(RpcError::Ended(None))?;
        if !readable(socket, within).map_err(RpcError::Socket)? {
            return Err(RpcError::Timeout(within));
        }
        let mut buffer = vec![0; MAX_ANSWER];
        let (length, _) = recv(socket, &mut buffer[..], RecvFlags::empty())
            .map_err(|errno| RpcError::Socket(errno.into()))?;
        match buffer.get(..length) {
            Some([]) | None => Err(RpcError::Ended(self.wait(LINGER))),
            Some(bytes) => Ok(Response::decode(bytes)?),
        }
    }

    /// The final answer to a request of `kind`.
    pub(crate) fn answer(&mut self, kind: Kind, within: Duration) -> Result<Response, RpcError> {
        let response = self.receive(within)?;
        if response.kind() != kind && response.kind() != Kind::Empty {
            return Err(RpcError::Unexpected { expected: kind, got: response.kind() });
        }
        if response.success { Ok(response) } else { Err(RpcError::Refused(response.error)) }
    }

    /// Its process.
    pub(crate) fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// Whether the process still runs and its end of the connection is open.
    pub(crate) fn is_alive(&self) -> bool {
        let ended = readable(&self.pidfd, Duration::ZERO).unwrap_or(true);
        let spoke =
            self.socket.as_ref().is_none_or(|socket| readable(socket, Duration::ZERO).unwrap_or(true));
        !ended && !spoke
    }

    /// Waits for the end of the process; `None` when it has not ended by then.
    pub(crate) fn wait(&mut self, within: Duration) -> Option<ExitStatus> {
        if readable(&self.pidfd, within).unwrap_or(true) { self.child.wait().ok() } else { None }
    }

    /// Closes the connection and waits for the end.
    pub(crate) fn close(&mut self) -> Option<ExitStatus> {
        self.socket = None;
        self.wait(LINGER)
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        if self.close().is_none() {
            tracing::warn!(pid = self.child.id(), "criu still runs after its connection was closed");
        }
    }
}

fn pidfd(child: &Child) -> io::Result<OwnedFd> {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::InvalidInput)?;
    Ok(pidfd_open(pid, PidfdFlags::empty())?)
}

/// Whether `fd` has something to read, or has ended, within that time.
fn readable(fd: impl AsFd, within: Duration) -> io::Result<bool> {
    let deadline = Instant::now() + within;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec {
            tv_sec: left.as_secs().try_into().unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        };
        match poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&timeout)) {
            Ok(count) => return Ok(count > 0),
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}
