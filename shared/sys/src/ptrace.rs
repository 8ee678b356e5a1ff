//! One traced thread: the `ptrace` requests that injection needs, typed.
//!
//! A tracee belongs to the thread that seized it. When that thread ends, the kernel detaches what it still traces;
//! this is how a tracee that does not stop in time is let go.

use std::time::{Duration, Instant};

use rustix::io::Errno;

use crate::abi;
use crate::error::CallError;

/// Kernel-side size of a signal set, as the signal-mask requests want it.
const SIGSET_BYTES: usize = 8;
/// `PTRACE_EVENT_STOP` as it appears above the low half of a wait status.
const EVENT_STOP: i32 = libc::PTRACE_EVENT_STOP;

/// How a traced thread has stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stop {
    /// By `PTRACE_INTERRUPT`, or because its whole process is stopped.
    Event,
    /// At the entry to or the exit from a system call.
    Syscall,
    /// About to receive this signal.
    Signal(i32),
}

/// What a wait for a tracee gave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Waited {
    /// It stopped.
    Stopped(Stop),
    /// It ended.
    Ended,
    /// It did not stop in time.
    TimedOut,
}

/// A thread that the calling thread traces.
#[derive(Debug)]
pub(crate) struct Tracee {
    tid: libc::pid_t,
}

impl Tracee {
    /// Starts tracing without stopping the thread. System-call stops are told from signals, and seccomp filters are
    /// suspended while it is traced.
    pub(crate) fn seize(tid: libc::pid_t) -> Result<Self, CallError> {
        Self::seize_with(tid, 0)
    }

    /// The same, and the kernel kills the thread's process when the calling thread ends before it has let go of it.
    pub(crate) fn seize_for_life(tid: libc::pid_t) -> Result<Self, CallError> {
        Self::seize_with(tid, libc::PTRACE_O_EXITKILL)
    }

    fn seize_with(tid: libc::pid_t, further: libc::c_int) -> Result<Self, CallError> {
        let options = libc::PTRACE_O_TRACESYSGOOD | libc::PTRACE_O_SUSPEND_SECCOMP | further;
        let tracee = Self { tid };
        // SAFETY: PTRACE_SEIZE takes its options by value.
        unsafe {
            tracee.request("ptrace PTRACE_SEIZE", libc::PTRACE_SEIZE as libc::c_uint, 0, options as usize)?
        };
        Ok(tracee)
    }

    /// Its id.
    pub(crate) fn tid(&self) -> libc::pid_t {
        self.tid
    }

    pub(crate) fn interrupt(&self) -> Result<(), CallError> {
        // SAFETY: PTRACE_INTERRUPT ignores address and data.
        unsafe { self.request("ptrace PTRACE_INTERRUPT", libc::PTRACE_INTERRUPT as libc::c_uint, 0, 0) }
    }

    /// Lets it run on, delivering `signal` if it is not 0.
    pub(crate) fn resume(&self, signal: i32) -> Result<(), CallError> {
        // SAFETY: PTRACE_CONT takes a signal number by value.
        unsafe { self.request("ptrace PTRACE_CONT", libc::PTRACE_CONT as libc::c_uint, 0, signal as usize) }
    }

    /// Lets it run to the next entry to or exit from a system call.
    pub(crate) fn resume_to_syscall(&self) -> Result<(), CallError> {
        // SAFETY: PTRACE_SYSCALL takes a signal number by value.
        unsafe { self.request("ptrace PTRACE_SYSCALL", libc::PTRACE_SYSCALL as libc::c_uint, 0, 0) }
    }

    /// Stops tracing; the stopped thread runs on, receiving `signal` if it is not 0.
    pub(crate) fn detach(self, signal: i32) -> Result<(), CallError> {
        // SAFETY: PTRACE_DETACH takes a signal number by value.
        unsafe {
            self.request("ptrace PTRACE_DETACH", libc::PTRACE_DETACH as libc::c_uint, 0, signal as usize)
        }
    }

    pub(crate) fn registers(&self) -> Result<libc::user_regs_struct, CallError> {
        // SAFETY: the structure is plain numbers, for which zero is valid.
        let mut registers: libc::user_regs_struct = unsafe { std::mem::zeroed() };
        let data = &raw mut registers as usize;
        // SAFETY: PTRACE_GETREGS writes one `struct user_regs_struct`.
        unsafe { self.request("ptrace PTRACE_GETREGS", libc::PTRACE_GETREGS as libc::c_uint, 0, data)? };
        Ok(registers)
    }

    pub(crate) fn set_registers(&self, registers: &libc::user_regs_struct) -> Result<(), CallError> {
        let data = std::ptr::from_ref(registers) as usize;
        // SAFETY: PTRACE_SETREGS reads one `struct user_regs_struct`.
        unsafe { self.request("ptrace PTRACE_SETREGS", libc::PTRACE_SETREGS as libc::c_uint, 0, data) }
    }

    /// The signals that the thread blocks, one bit each.
    pub(crate) fn signal_mask(&self) -> Result<u64, CallError> {
        let mut mask = 0_u64;
        let data = &raw mut mask as usize;
        // SAFETY: PTRACE_GETSIGMASK writes a signal set of the size given, which `mask` has.
        unsafe { self.request("ptrace PTRACE_GETSIGMASK", libc::PTRACE_GETSIGMASK, SIGSET_BYTES, data)? };
        Ok(mask)
    }

    pub(crate) fn set_signal_mask(&self, mask: u64) -> Result<(), CallError> {
        let data = &raw const mask as usize;
        // SAFETY: PTRACE_SETSIGMASK reads a signal set of the size given, which `mask` has.
        unsafe { self.request("ptrace PTRACE_SETSIGMASK", libc::PTRACE_SETSIGMASK, SIGSET_BYTES, data) }
    }

    /// Address of the thread's `struct rseq`, or 0 when it has none.
    pub(crate) fn rseq_address(&self) -> Result<u64, CallError> {
        let mut found = abi::RseqConfiguration::default();
        let data = &raw mut found as usize;
        let size = size_of::<abi::RseqConfiguration>();
        // SAFETY: PTRACE_GET_RSEQ_CONFIGURATION writes at most `size` bytes, which `found` has.
        let asked = unsafe {
            self.request(
                "ptrace PTRACE_GET_RSEQ_CONFIGURATION",
                abi::PTRACE_GET_RSEQ_CONFIGURATION,
                size,
                data,
            )
        };
        match asked {
            Ok(()) => Ok(found.rseq_abi_pointer),
            // A kernel without restartable sequences does not know the request.
            Err(CallError { errno: Errno::IO, .. }) => Ok(0),
            Err(error) => Err(error),
        }
    }

    /// Waits for the next stop, until `deadline` or for ever.
    pub(crate) fn wait(&self, deadline: Option<Instant>) -> Result<Waited, CallError> {
        let options = libc::__WALL | libc::__WNOTHREAD | if deadline.is_some() { libc::WNOHANG } else { 0 };
        let mut pause = Duration::from_micros(5);
        loop {
            let mut status = 0;
            // SAFETY: waitpid writes one int.
            let waited = unsafe { libc::waitpid(self.tid, &raw mut status, options) };
            match waited {
                -1 => match CallError::last("waitpid") {
                    CallError { errno: Errno::INTR, .. } => {}
                    CallError { errno: Errno::CHILD, .. } => return Ok(Waited::Ended),
                    error => return Err(error),
                },
                0 if deadline.is_some_and(|deadline| Instant::now() >= deadline) => {
                    return Ok(Waited::TimedOut);
                }
                0 => {
                    // Waiting with a deadline has no system call of its own; the stop mostly takes a few µs.
                    std::thread::sleep(pause);
                    pause = (pause * 2).min(Duration::from_millis(1));
                }
                _ => return Ok(classify(status)),
            }
        }
    }

    /// # Safety
    /// `address` and `data` must be what `request` wants; pointers among them must be valid for its reads and writes.
    unsafe fn request(
        &self,
        call: &'static str,
        request: libc::c_uint,
        address: usize,
        data: usize,
    ) -> Result<(), CallError> {
        // SAFETY: the caller vouches for address and data.
        let done = unsafe { libc::ptrace(request, self.tid, address, data) };
        if done == -1 { Err(CallError::last(call)) } else { Ok(()) }
    }
}

fn classify(status: i32) -> Waited {
    if !libc::WIFSTOPPED(status) {
        return Waited::Ended;
    }
    let signal = libc::WSTOPSIG(status);
    Waited::Stopped(if status >> 16 == EVENT_STOP {
        Stop::Event
    } else if signal == libc::SIGTRAP | 0x80 {
        Stop::Syscall
    } else {
        Stop::Signal(signal)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stops_are_told_apart() {
        let stopped = |signal: i32, event: i32| (event << 16) | (signal << 8) | 0x7f;
        assert_eq!(classify(stopped(libc::SIGTRAP, EVENT_STOP)), Waited::Stopped(Stop::Event));
        assert_eq!(classify(stopped(libc::SIGSTOP, EVENT_STOP)), Waited::Stopped(Stop::Event));
        assert_eq!(classify(stopped(libc::SIGTRAP | 0x80, 0)), Waited::Stopped(Stop::Syscall));
        assert_eq!(classify(stopped(libc::SIGUSR1, 0)), Waited::Stopped(Stop::Signal(libc::SIGUSR1)));
        assert_eq!(classify(libc::SIGKILL), Waited::Ended);
    }
}
