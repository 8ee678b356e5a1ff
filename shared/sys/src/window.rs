//! A stopped thread makes system calls for us, with registers that are not its own.

use std::time::Instant;

use rustix::io::Errno;

use crate::abi;
use crate::error::CallError;
use crate::ptrace::{Stop, Tracee, Waited};
use crate::vm_read::VmReader;

/// Code segment of 64-bit user code. A thread elsewhere runs 32-bit code now and has another register layout.
pub(crate) const CS_64: u64 = 0x33;

/// The time in which the thread has foreign registers.
pub(crate) struct Window<'a> {
    tracee: &'a Tracee,
    gadget: u64,
    own: libc::user_regs_struct,
    /// A stop signal that came, which cannot be blocked and is sent again afterwards.
    stopped_by: Option<i32>,
}

impl<'a> Window<'a> {
    /// Of a stopped thread with the registers `own`, which makes calls at `gadget`, the address of a `syscall`
    /// instruction. Its signals are to be blocked, and its registers to be set again afterwards.
    pub(crate) fn new(tracee: &'a Tracee, gadget: u64, own: libc::user_regs_struct) -> Self {
        Self { tracee, gadget, own, stopped_by: None }
    }

    /// The stop signal that came meanwhile.
    pub(crate) fn stopped_by(self) -> Option<i32> {
        self.stopped_by
    }

    /// Makes a call that is waited for, however long it is not begun; `name` is for the error then. What the call says is in
    /// the inner result.
    pub(crate) fn made(
        &mut self,
        name: &'static str,
        number: libc::c_long,
        arguments: &[u64],
    ) -> Result<Result<u64, Errno>, CallError> {
        self.call(number, arguments, None)?.ok_or_else(|| CallError::new(name, Errno::TIMEDOUT))
    }

    /// Makes a system call with up to six arguments in the thread. Until the call is begun, not later, it can be given up.
    /// `None` when it was not begun by the deadline: a thread in a frozen version 2 group stops for us, and does not run.
    pub(crate) fn call(
        &mut self,
        number: libc::c_long,
        arguments: &[u64],
        deadline: Option<Instant>,
    ) -> Result<Option<Result<u64, Errno>>, CallError> {
        let mut registers = self.own;
        registers.rip = self.gadget;
        registers.rax = number as u64;
        registers.orig_rax = u64::MAX;
        let places = [
            &mut registers.rdi,
            &mut registers.rsi,
            &mut registers.rdx,
            &mut registers.r10,
            &mut registers.r8,
            &mut registers.r9,
        ];
        for (place, argument) in places.into_iter().zip(arguments) {
            *place = *argument;
        }
        self.tracee.set_registers(&registers)?;
        if !self.run_to_syscall_stop(deadline)? {
            return Ok(None);
        }
        self.run_to_syscall_stop(None)?;
        let result = self.tracee.registers()?.rax as i64;
        Ok(Some(match i32::try_from(result) {
            Ok(errno) if errno < 0 => Err(Errno::from_raw_os_error(-errno)),
            _ => Ok(result as u64),
        }))
    }

    /// Whether it has come there; if not, it is stopped where it was.
    fn run_to_syscall_stop(&mut self, mut deadline: Option<Instant>) -> Result<bool, CallError> {
        let mut given_up = false;
        self.tracee.resume_to_syscall()?;
        loop {
            match self.tracee.wait(deadline)? {
                Waited::Stopped(Stop::Syscall) => return Ok(true),
                Waited::Stopped(Stop::Signal(signal)) => self.stopped_by = Some(signal),
                Waited::Stopped(Stop::Event) if given_up => return Ok(false),
                Waited::Stopped(Stop::Event) => {}
                Waited::TimedOut => {
                    self.tracee.interrupt()?;
                    (given_up, deadline) = (true, None);
                    continue;
                }
                Waited::Ended => {
                    return Err(CallError { call: "injected system call", errno: Errno::SRCH });
                }
            }
            self.tracee.resume_to_syscall()?;
        }
    }
}

/// Whether the thread's instruction pointer, `rip`, is inside a critical section that the kernel would abort.
pub(crate) fn is_in_restartable_sequence(
    tracee: &Tracee,
    memory: &VmReader,
    rip: u64,
) -> Result<bool, CallError> {
    let rseq = tracee.rseq_address()?;
    if rseq == 0 {
        return Ok(false);
    }
    let Some([section]) = words(memory, rseq + abi::RSEQ_CS_OFFSET)? else { return Ok(false) };
    if section == 0 {
        return Ok(false);
    }
    // struct rseq_cs: version and flags, start, length, abort address.
    let Some([_, start, length, _]) = words(memory, section)? else { return Ok(false) };
    Ok(rip.wrapping_sub(start) < length)
}

fn words<const N: usize>(memory: &VmReader, address: u64) -> Result<Option<[u64; N]>, CallError> {
    let mut bytes = Vec::new();
    memory.read(std::slice::from_ref(&(address..address + 8 * N as u64)), &mut bytes)?;
    let mut words = [0; N];
    let (found, _) = bytes.as_chunks::<8>();
    for (word, bytes) in words.iter_mut().zip(found) {
        *word = u64::from_ne_bytes(*bytes);
    }
    Ok((found.len() == N).then_some(words))
}
