//! Getting a userfaultfd of another process, without its help and without writing to its memory.
//!
//! ```text
//!  running ── SEIZE, INTERRUPT ──► stopped ── all signals blocked ──► userfaultfd(2) at the vDSO's `syscall`
//!                                                                          │ pidfd_getfd
//!  running ◄── DETACH ── stopped again ◄── registers, signal mask ◄── close(2) of its copy
//! ```
//!
//! Between the second and the last step the thread has foreign registers: were this process killed there, the thread
//! would run on with them and crash. The window is some 50 µs long. Therefore a process that injects should not be
//! the first that a host short of memory kills ([`crate::process::set_oom_score_adj`]).
//!
//! # Why the thread is stopped a second time
//! A system call that the first stop interrupted is finished or restarted by the kernel on the way out of a stop in
//! its signal code, by rules that depend on the signals that have come meanwhile. The stop at the exit of an injected
//! call is elsewhere; leaving from there would let the thread see an internal error number. So it is stopped once more
//! with its own registers, and the kernel goes on from there as if nothing had been.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::io::Errno;

use crate::Pid;
use crate::error::CallError;
use crate::pidfd;
use crate::ptrace::{Stop, Tracee, Waited};
use crate::thread_choice;
use crate::uffd;
use crate::vm_read::VmReader;
use crate::window::{self, CS_64, Window};

/// Attempts before a process is given up whose threads are always in a restartable sequence, or that begins another
/// program all the time.
const ATTEMPTS: u32 = 16;

/// Why no descriptor could be had. The process runs on as before in every case.
#[derive(Debug, thiserror::Error)]
pub enum InjectError {
    /// The process has no thread that could run: it ended, or is a zombie or a kernel thread.
    #[error("the process has no thread to stop")]
    NoThread,
    /// Another tracer has it, or we lack the right to trace it.
    #[error("the process cannot be traced")]
    NotTraceable(#[source] CallError),
    /// No thread stopped, or ran on, in time; frozen, or in an uninterruptible wait (as a parent is during `vfork`).
    #[error("no thread stopped within {within:?}")]
    NoStop {
        /// How long was waited for each.
        within: Duration,
    },
    /// Every attempt met a restartable sequence, or a program that had just begun.
    #[error("every stop was inside a restartable sequence, or at the beginning of another program")]
    NeverInBetween,
    /// It has unmapped its vDSO, or is in the midst of an exec.
    #[error("the process has no 64-bit system call instruction")]
    NoSyscallInstruction,
    /// It runs 32-bit code.
    #[error("the process runs 32-bit code")]
    Not64Bit,
    /// The call was made in the process and refused.
    #[error("userfaultfd in the process failed")]
    Refused(#[source] CallError),
    /// A call of ours failed.
    #[error("injection was cut short")]
    Call(#[from] CallError),
    /// The injecting thread could not be started.
    #[error("no thread could be started to inject from")]
    NoInjector(#[source] std::io::Error),
}

/// How one attempt ended without a descriptor.
enum Miss {
    /// Another attempt may succeed at once.
    Retry,
    /// This thread did not stop; it is still seized until the injecting thread ends.
    NoStop,
    Failed(InjectError),
}

impl From<InjectError> for Miss {
    fn from(error: InjectError) -> Self {
        Self::Failed(error)
    }
}

impl From<CallError> for Miss {
    fn from(error: CallError) -> Self {
        Self::Failed(error.into())
    }
}

/// Makes a userfaultfd in `pid` and takes it over, waiting at most `patience` for a thread to stop.
///
/// Runs on a thread of its own with all signals blocked, since tracing belongs to a thread. Works on processes with
/// seccomp filters and without privileges; needs `CAP_SYS_PTRACE` and `CAP_SYS_ADMIN` here. The process keeps no copy
/// of the descriptor.
///
/// # Errors
/// See [`InjectError`].
pub fn userfaultfd_of(pid: Pid, patience: Duration) -> Result<OwnedFd, InjectError> {
    let injector = std::thread::Builder::new().name("haul-inject".into()).spawn(move || {
        block_signals()?;
        inject(pid, patience)
    });
    match injector.map_err(InjectError::NoInjector)?.join() {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

fn inject(pid: Pid, patience: Duration) -> Result<OwnedFd, InjectError> {
    let process = pidfd::open(pid)?;
    let memory = VmReader::open(pid)?;
    let mut unstoppable = Vec::new();
    for _ in 0..ATTEMPTS {
        let threads = thread_choice::candidates(pid)?;
        let Some(tid) = threads.iter().copied().find(|tid| !unstoppable.contains(tid)) else {
            return Err(match unstoppable.is_empty() {
                true => InjectError::NoThread,
                false => InjectError::NoStop { within: patience },
            });
        };
        let gadget =
            thread_choice::syscall_instruction(pid, &memory)?.ok_or(InjectError::NoSyscallInstruction)?;
        let target = Target { pid, tid, process: process.as_fd(), memory: &memory, gadget };
        match target.attempt(patience) {
            Ok(fd) => return Ok(fd),
            Err(Miss::Retry) => std::thread::yield_now(),
            // Two unstoppable threads will do: a frozen or waiting process has no others.
            Err(Miss::NoStop) if unstoppable.is_empty() => unstoppable.push(tid),
            Err(Miss::NoStop) => return Err(InjectError::NoStop { within: patience }),
            Err(Miss::Failed(error)) => return Err(error),
        }
    }
    Err(InjectError::NeverInBetween)
}

struct Target<'a> {
    pid: Pid,
    tid: libc::pid_t,
    process: BorrowedFd<'a>,
    memory: &'a VmReader,
    gadget: u64,
}

impl Target<'_> {
    fn attempt(&self, patience: Duration) -> Result<OwnedFd, Miss> {
        let tracee = match Tracee::seize(self.tid) {
            Err(CallError { errno: Errno::SRCH, .. }) => return Err(Miss::Retry),
            other => other.map_err(InjectError::NotTraceable)?,
        };
        tracee.interrupt()?;
        stop_by_event(&tracee, Some(Instant::now() + patience))?;
        let saved = tracee.registers()?;
        if saved.cs != CS_64 {
            tracee.detach(0)?;
            return Err(Miss::Failed(InjectError::Not64Bit));
        }
        // Since we looked it may have begun another program, which has its vDSO elsewhere. Now it cannot.
        let moved = !thread_choice::is_syscall_instruction(self.gadget, self.memory)?;
        if moved || window::is_in_restartable_sequence(&tracee, self.memory, saved.rip)? {
            tracee.detach(0)?;
            return Err(Miss::Retry);
        }
        let mut restored = saved;
        if thread_choice::must_repeat(self.pid, self.tid, &saved)? {
            restored.rip = saved.rip.wrapping_sub(2);
            restored.rax = saved.orig_rax;
        }
        let mask = tracee.signal_mask()?;
        tracee.set_signal_mask(u64::MAX)?;
        let mut window = Window::new(&tracee, self.gadget, saved);
        let taken = self.take(&mut window, patience);
        let stop_signal = window.stopped_by();
        tracee.set_registers(&restored)?;
        tracee.set_signal_mask(mask)?;
        tracee.interrupt()?;
        tracee.resume(0)?;
        stop_by_event(&tracee, None)?;
        tracee.detach(0)?;
        if let Some(signal) = stop_signal {
            self.send_again(signal)?;
        }
        Ok(taken?)
    }

    /// The window: makes the descriptor, copies it to us, closes the process's own.
    fn take(&self, window: &mut Window<'_>, patience: Duration) -> Result<OwnedFd, InjectError> {
        let deadline = Some(Instant::now() + patience);
        let number = window
            .call(libc::SYS_userfaultfd, &[uffd::CREATE_FLAGS], deadline)?
            .ok_or(InjectError::NoStop { within: patience })?
            .map_err(|errno| InjectError::Refused(CallError { call: "userfaultfd", errno }))?;
        let ours = pidfd::get_fd(self.process, number as i32);
        // Whatever became of our copy, theirs must not stay behind. Closing a fresh descriptor cannot fail.
        let _closed = window.call(libc::SYS_close, &[number], None)?;
        Ok(ours?)
    }

    /// Sends a stop signal, held back during the window, to the thread again.
    fn send_again(&self, signal: i32) -> Result<(), CallError> {
        // SAFETY: the call takes numbers only.
        let sent = unsafe { libc::syscall(libc::SYS_tgkill, self.pid.as_raw_pid(), self.tid, signal) };
        match if sent == -1 { CallError::last("tgkill") } else { return Ok(()) } {
            error if error.is_gone() => Ok(()),
            error => Err(error),
        }
    }
}

/// Waits until the tracee is stopped by our interrupt; signals that come first are delivered as ever.
fn stop_by_event(tracee: &Tracee, deadline: Option<Instant>) -> Result<(), Miss> {
    loop {
        match tracee.wait(deadline)? {
            Waited::Stopped(Stop::Event) => return Ok(()),
            Waited::Stopped(Stop::Signal(signal)) => tracee.resume(signal)?,
            Waited::Stopped(Stop::Syscall) => tracee.resume(0)?,
            Waited::Ended => return Err(Miss::Retry),
            Waited::TimedOut => return Err(Miss::NoStop),
        }
    }
}

/// Blocks every signal in the calling thread.
pub(crate) fn block_signals() -> Result<(), CallError> {
    // SAFETY: the set is plain memory that sigfillset initialises, and pthread_sigmask only reads it.
    let failed = unsafe {
        let mut all = std::mem::zeroed();
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const all, std::ptr::null_mut())
    };
    match failed {
        0 => Ok(()),
        errno => Err(CallError { call: "pthread_sigmask", errno: Errno::from_raw_os_error(errno) }),
    }
}
