//! The keeper: between runc and CRIU while an armed container is restored, in the process that waits for runc.
//!
//! ```text
//!   restorer ── TAKE ──▶ keeper: the container's packets come here, and are kept
//!            ── descriptors, GO ▶ keeper ── descriptors, GO ──▶ gate; packets get out
//!                                 keeper ◀── READY, CRIU's end ── gate: CRIU, which has waited too, may begin
//!                 runc ◀── messages ──▶ keeper ◀── messages ──▶ CRIU
//!                        pre-resume: recorded; post-resume: locks that CRIU has lost are taken again, segments
//!                        attached; packets get in, those that were kept first, announced
//! ```
//!
//! From GO to the resumption the kernel sends what the connections had to send when they were dumped, and no process adds
//! to it: should the restore fail, the source sends the same again.
//!
//! runc needs some time more after CRIU has resumed the processes. Clients do not wait for that: the network speaks as
//! soon as they run.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use haulage_criu::ipc::IpcState;
use haulage_criu::record_locks::{self, OwnedLock};
use haulage_criu::rpc::{Kind, Notify, Request, Response};
use haulage_engine::armed::{Armed, ArmedRoot, GO, IPC, MEMORY, Outcome, TAKE, TMPFS};
use haulage_sys::Pid;
use haulage_sys::pass_fd;
use haulage_sys::rcu::Expedited;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown};
use rustix::process::{Signal, pidfd_send_signal};

use crate::failure::Failure;
use crate::init::Init;
use crate::locks::HeldBack;
use crate::network::Network;

/// What the gate sends with runc's end of the conversation, and, after the word, with CRIU's, which waits for the request.
pub(crate) const RUNC_END: u8 = b'r';
pub(crate) const READY: u8 = b'c';
/// What it sends before, with a descriptor of CRIU's process.
pub(crate) const PROCESS: u8 = b'p';
/// The stage that CRIU reports when the processes are made, with the id of the first one.
const MADE: &str = "post-restore";
/// That which it reports when they are restored and stand still for the last time.
const RESTORED: &str = "pre-resume";
/// That which it reports when they run.
const RESUMED: &str = "post-resume";
/// runc asks for all that CRIU can say, which costs milliseconds; warnings and errors are what is made use of.
const LOG_LEVEL: u8 = 2;
/// The longest message of either; they are below 16 KiB.
const MAX_MESSAGE: usize = 256 << 10;
/// A container whose packets were called here and that does not come within this time leaves them to whoever answers.
const LETS_GO_AFTER: Duration = Duration::from_secs(10);
/// How long CRIU may take to undo what it has done, when the conversation is cut off.
const UNDONE_WITHIN: Timespec = Timespec { tv_sec: 20, tv_nsec: 0 };

/// See the module.
pub(crate) struct Keeper<'a> {
    pub(crate) armed_root: &'a ArmedRoot,
    pub(crate) id: &'a str,
    pub(crate) armed: &'a Armed,
    /// Made and silent, where it is made before the restore.
    pub(crate) network: Option<Network>,
    /// What is recorded when the processes run.
    pub(crate) outcome: Outcome,
}

/// How it ended, if nothing went wrong.
pub(crate) enum Kept {
    /// The gate has not come, or its word has not.
    Nothing,
    /// The conversation is over, and the processes were never resumed.
    Silent,
    /// They run, which is recorded, and are heard, for as long as runc agrees.
    Speaks(Outcome, Option<Init>),
}

impl Keeper<'_> {
    /// Waits for the gate and for the words, and keeps the conversation until it ends. The listener is to be connected to
    /// and left when runc has ended, lest this wait for a gate that never comes.
    ///
    /// # Errors
    /// The conversation is cut off then: CRIU has undone, and runc fails.
    pub(crate) fn keep(mut self, listener: &UnixListener) -> Result<Kept, Failure> {
        let (gate, _) = listener.accept().map_err(Failure::Gate)?;
        let end = |expected| match pass_fd::receive(&gate) {
            Ok(Some((byte, fd))) if byte == expected => Ok(fd),
            Ok(_) => Ok(None),
            Err(error) => Err(Failure::Gate(error)),
        };
        let Some(runc) = end(RUNC_END)? else { return Ok(Kept::Nothing) };
        let words = self.armed_root.connect(self.id)?;
        let Some(handed) = self.hear(&words, &runc, &gate)? else { return Ok(Kept::Nothing) };
        // From here on the container stands still for us. Where it cannot be had everything takes longer.
        let _expedited = Expedited::begin();
        // Noted before anything else, so that the time is known of which it counts.
        self.armed_root.note_go(self.id)?;
        let passed = handed.iter().try_for_each(|(what, fd)| pass_fd::send(&gate, *what, Some(fd.as_fd())));
        passed.and_then(|()| pass_fd::send(&gate, GO, None)).map_err(Failure::Gate)?;
        drop(handed);
        self.network.as_mut().map_or(Ok(()), Network::send)?;
        // Beside the images, where they are by now.
        let locks = record_locks::read(&self.armed.images).map_err(|error| Failure::Locks(error.into()))?;
        let ipc = IpcState::read(&self.armed.images).map_err(|error| Failure::Locks(error.into()))?;
        let Some(process) = end(PROCESS)? else { return Ok(Kept::Silent) };
        let Some(criu) = end(READY)? else { return Ok(Kept::Silent) };
        let mut init = None;
        let spoke = self.relay(&runc, &criu, &gate, (&locks, ipc), &mut init);
        if let (Err(_) | Ok(None), Some(init)) = (&spoke, &init) {
            init.kill();
            // It would wait for the first thread of one that was killed, which the kernel keeps until it has waited for the
            // others. There is nothing to undo: all that it has made of the container goes with the first process.
            let _ = pidfd_send_signal(&process, Signal::KILL);
        }
        see_off(&criu);
        Ok(spoke?.map_or(Kept::Silent, |outcome| Kept::Speaks(outcome, init)))
    }

    /// Waits for the word to go on, and gives the descriptors that came before it; `None` when the word does not come.
    fn hear(
        &mut self,
        words: &UnixStream,
        runc: &OwnedFd,
        gate: &UnixStream,
    ) -> Result<Option<Vec<(u8, OwnedFd)>>, Failure> {
        let mut handed = Vec::new();
        let mut until_let_go = None;
        loop {
            // What runc has sent stays where it is; only its end matters, and the gate's.
            let end_of_runc = PollFd::new(runc, PollFlags::empty());
            let mut polled = [PollFd::new(words, PollFlags::IN), end_of_runc, end_of(gate)];
            match poll(&mut polled, until_let_go.as_ref()) {
                Err(Errno::INTR) => continue,
                Err(errno) => return Err(Failure::Gate(errno.into())),
                Ok(0) => {
                    until_let_go = None;
                    self.network.as_ref().map_or(Ok(()), Network::stop_answering)?;
                    continue;
                }
                Ok(_) => {}
            }
            let [_, others @ ..] = &polled;
            if others.iter().any(|other| !other.revents().is_empty()) {
                return Ok(None);
            }
            match pass_fd::receive(words) {
                Ok(Some((GO, None))) => return Ok(Some(handed)),
                Ok(Some((what @ (MEMORY | TMPFS | IPC), Some(fd)))) => handed.push((what, fd)),
                Ok(Some((TAKE, None))) => {
                    if let Some(network) = &mut self.network {
                        network.take(&self.armed.addresses)?;
                        until_let_go = Timespec::try_from(LETS_GO_AFTER).ok();
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                _ => return Ok(None),
            }
        }
    }

    /// Passes messages on, whole as they come, until one side ends, or the gate. What is recorded of processes that run and
    /// are heard.
    fn relay(
        mut self,
        runc: &OwnedFd,
        criu: &OwnedFd,
        gate: &UnixStream,
        (locks, mut ipc): (&[OwnedLock], Option<IpcState>),
        init: &mut Option<Init>,
    ) -> Result<Option<Outcome>, Failure> {
        let mut buffer = vec![0; MAX_MESSAGE];
        let (mut spoke, mut first, mut held_back) = (None, None, None);
        loop {
            let mut polled =
                [PollFd::new(runc, PollFlags::IN), PollFd::new(criu, PollFlags::IN), end_of(gate)];
            match poll(&mut polled, None) {
                Err(Errno::INTR) => continue,
                Err(errno) => return Err(Failure::Gate(errno.into())),
                Ok(_) => {}
            }
            let [runc_s, criu_s, gate_s] = polled.map(|end| !end.revents().is_empty());
            if criu_s {
                let Some(message) = receive(criu, &mut buffer)? else { return Ok(spoke) };
                let notify = notify(message);
                match notify.stage.as_deref() {
                    Some(MADE) => {
                        first = notify.pid.and_then(Pid::from_raw);
                        *init = first.map(Init::of).transpose()?;
                    }
                    Some(RESTORED) => {
                        held_back = hold_back(first, locks, ipc.take())?;
                        self.record()?;
                    }
                    Some(RESUMED) if spoke.is_none() => {
                        held_back.take().map_or(Ok(()), HeldBack::run)?;
                        spoke = Some(self.speak()?);
                    }
                    _ => {}
                }
                if !pass(runc, message)? {
                    return Ok(spoke);
                }
            } else if runc_s {
                let Some(message) = receive(runc, &mut buffer)? else { return Ok(spoke) };
                let request = Request::with_log_level(message, LOG_LEVEL);
                if !pass(criu, request.as_deref().unwrap_or(message))? {
                    return Ok(spoke);
                }
            } else if gate_s {
                // It would have waited for CRIU: to runc, it is CRIU that is gone.
                return Ok(spoke);
            }
        }
    }

    /// The processes are there and are about to run. That is recorded before they do: a container that runs unknown to the
    /// restorer could run twice.
    fn record(&mut self) -> Result<(), Failure> {
        self.outcome.ok = true;
        self.outcome.restore_us = self.took();
        self.armed_root.record(self.id, &self.outcome).map_err(Failure::Record)
    }

    /// The processes run.
    fn speak(&mut self) -> Result<Outcome, Failure> {
        let mut outcome = self.outcome.clone();
        if let Some(network) = self.network.take() {
            let (put_back, lost) = network.open(&self.armed.images, &self.armed.addresses)?;
            outcome.put_back = put_back;
            outcome.packets_lost = lost.map(|error| error.to_string());
            outcome.start_us = self.took();
            // It is recorded as restored; this says only how long it took.
            let _ = self.armed_root.record_time(self.id, &outcome);
        }
        Ok(outcome)
    }

    /// Since the word to go on, in microseconds.
    fn took(&self) -> u64 {
        // How long it took is worth no failure.
        micros(self.armed_root.since_go(self.id).ok().flatten().unwrap_or_default())
    }
}

pub(crate) fn micros(duration: Duration) -> u64 {
    duration.as_micros().try_into().unwrap_or(u64::MAX)
}

/// The processes below `init`, if they lack locks or segments.
fn hold_back(
    init: Option<Pid>,
    locks: &[OwnedLock],
    ipc: Option<IpcState>,
) -> Result<Option<HeldBack>, Failure> {
    match init {
        Some(init) => HeldBack::if_lacking(init, locks, ipc),
        None if locks.is_empty() && ipc.is_none() => Ok(None),
        None => Err(Failure::Locks("criu has not told which process is the first".into())),
    }
}

/// Whether there still is somebody, whatever comes from there.
fn end_of(gate: &UnixStream) -> PollFd<'_> {
    PollFd::new(gate, PollFlags::empty())
}

/// CRIU is answered no more, which it takes for a failure and undoes what it has done. Waits for that, so that whoever
/// cleans up finds nothing in the middle; one that takes longer than [`UNDONE_WITHIN`] is left to it.
fn see_off(criu: &OwnedFd) {
    // One that has ended needs nothing to be told.
    let _ = shutdown(criu, Shutdown::Write);
    let mut buffer = vec![0; MAX_MESSAGE];
    while let Ok(1..) = poll(&mut [PollFd::new(criu, PollFlags::IN)], Some(&UNDONE_WITHIN)) {
        if !matches!(recv(criu, &mut buffer[..], RecvFlags::empty()), Ok((1.., _))) {
            return;
        }
    }
}

/// What the message reports; nothing where it does not.
fn notify(message: &[u8]) -> Notify {
    let response = Response::decode_bytes(message).ok();
    let response = response.filter(|response| response.kind == Kind::Notify as i32);
    response.and_then(|response| response.notify).unwrap_or_default()
}

/// The next message; `None` at the end.
fn receive(from: impl AsFd, buffer: &mut [u8]) -> Result<Option<&[u8]>, Failure> {
    match recv(from, &mut *buffer, RecvFlags::TRUNC) {
        Ok((_, 0)) | Err(Errno::CONNRESET) => Ok(None),
        Ok((_, length)) => match buffer.get(..length) {
            Some(message) => Ok(Some(message)),
            None => Err(Failure::Gate(io::Error::other("a message longer than is understood"))),
        },
        Err(errno) => Err(Failure::Gate(errno.into())),
    }
}

/// False when the other side has gone.
fn pass(to: impl AsFd, message: &[u8]) -> Result<bool, Failure> {
    match send(to, message, SendFlags::NOSIGNAL) {
        Ok(_) => Ok(true),
        Err(Errno::PIPE | Errno::CONNRESET) => Ok(false),
        Err(errno) => Err(Failure::Gate(errno.into())),
    }
}
