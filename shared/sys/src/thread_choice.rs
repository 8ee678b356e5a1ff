//! Which thread of a process to stop, and where in it a system call can be made.

use std::fs;
use std::path::PathBuf;

use crate::Pid;
use crate::abi::PAGE_BYTES;
use crate::error::CallError;
use crate::vm_read::VmReader;

/// Threads looked at before one is chosen. More would cost time and gain nothing.
const LOOKED_AT: usize = 64;

/// The machine code of `syscall`.
const SYSCALL: [u8; 2] = [0x0f, 0x05];

/// System calls that return `EINTR` when a stop interrupts them although no signal came, which did nothing until
/// then, and can therefore be made again with the same arguments.
///
/// Others restart by themselves. `close` must not be here: it has closed its descriptor when it returns `EINTR`.
const REPEATABLE_AFTER_EINTR: [libc::c_long; 22] = [
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_recvmmsg,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_sendmmsg,
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_semop,
    libc::SYS_semtimedop,
    libc::SYS_msgrcv,
    libc::SYS_msgsnd,
    libc::SYS_io_getevents,
    libc::SYS_io_uring_enter,
];

/// `EINTR` as the kernel leaves it in `rax`.
const MINUS_EINTR: u64 = (-(libc::EINTR as i64)) as u64;

/// Whether a stop of ours made a system call return `EINTR` that would not have.
pub(crate) fn must_repeat(
    pid: Pid,
    tid: libc::pid_t,
    stopped: &libc::user_regs_struct,
) -> Result<bool, CallError> {
    Ok(stopped.rax == MINUS_EINTR
        && REPEATABLE_AFTER_EINTR.contains(&(stopped.orig_rax as libc::c_long))
        && !has_deliverable_signal(pid, tid)?)
}

/// The threads of `pid`, best first: those that run or sleep in a call which restarts by itself, before those whose
/// call must be repeated by us, before those that cannot be stopped now. Dead threads are left out.
///
/// # Errors
/// `ENOENT` when the process is gone.
pub(crate) fn candidates(pid: Pid) -> Result<Vec<libc::pid_t>, CallError> {
    let dir = PathBuf::from(format!("/proc/{pid}/task"));
    let entries = fs::read_dir(&dir).map_err(|error| CallError::from_io("listing of threads", &error))?;
    let mut ranked: Vec<(u8, libc::pid_t)> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter_map(|tid| Some((rank(pid, tid)?, tid)))
        .take(LOOKED_AT)
        .collect();
    ranked.sort_unstable();
    Ok(ranked.into_iter().map(|(_, tid)| tid).collect())
}

/// Whether the thread is there and could run.
pub(crate) fn is_alive(pid: Pid, tid: libc::pid_t) -> bool {
    state(pid, tid).is_some_and(|state| !matches!(state, b'Z' | b'X' | b'x'))
}

fn state(pid: Pid, tid: libc::pid_t) -> Option<u8> {
    let stat = fs::read_to_string(format!("/proc/{pid}/task/{tid}/stat")).ok()?;
    // The name, in parentheses, may itself contain parentheses and spaces.
    stat.rsplit_once(") ")?.1.bytes().next()
}

fn rank(pid: Pid, tid: libc::pid_t) -> Option<u8> {
    match state(pid, tid)? {
        b'Z' | b'X' | b'x' => None,
        b'D' => Some(2),
        _ => {
            let call = fs::read_to_string(format!("/proc/{pid}/task/{tid}/syscall")).unwrap_or_default();
            let number = call.split(' ').next().and_then(|word| word.parse::<libc::c_long>().ok());
            Some(u8::from(number.is_some_and(|number| REPEATABLE_AFTER_EINTR.contains(&number))))
        }
    }
}

/// Whether a signal waits for the thread that it does not block.
pub(crate) fn has_deliverable_signal(pid: Pid, tid: libc::pid_t) -> Result<bool, CallError> {
    let status = fs::read_to_string(format!("/proc/{pid}/task/{tid}/status"))
        .map_err(|error| CallError::from_io("read of a thread's status", &error))?;
    let set = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        u64::from_str_radix(line.trim(), 16).ok()
    };
    match (set("SigPnd:"), set("ShdPnd:"), set("SigBlk:")) {
        (Some(own), Some(shared), Some(blocked)) => Ok((own | shared) & !blocked != 0),
        _ => Err(CallError::new("read of a thread's status", rustix::io::Errno::PROTO)),
    }
}

/// Address of a `syscall` instruction in the process's vDSO, which every 64-bit process has; `None` when not.
///
/// # Errors
/// When the process is gone.
pub(crate) fn syscall_instruction(pid: Pid, memory: &VmReader) -> Result<Option<u64>, CallError> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))
        .map_err(|error| CallError::from_io("read of a process's mappings", &error))?;
    let Some((start, end)) = maps.lines().find(|line| line.ends_with("[vdso]")).and_then(|line| {
        let (start, end) = line.split(' ').next()?.split_once('-')?;
        Some((u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?))
    }) else {
        return Ok(None);
    };
    let mut code = Vec::new();
    // Two pages on today's kernels; anything huge is not a vDSO.
    memory.read(std::slice::from_ref(&(start..end.min(start + 16 * PAGE_BYTES as u64))), &mut code)?;
    Ok(code.windows(SYSCALL.len()).position(|bytes| bytes == SYSCALL).map(|offset| start + offset as u64))
}

/// Whether there is such an instruction at `address` (still).
///
/// # Errors
/// When the process is gone.
pub(crate) fn is_syscall_instruction(address: u64, memory: &VmReader) -> Result<bool, CallError> {
    let mut code = Vec::new();
    memory.read(std::slice::from_ref(&(address..address + SYSCALL.len() as u64)), &mut code)?;
    Ok(code == SYSCALL)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_own_vdso_has_a_syscall_instruction() {
        let us = rustix::process::getpid();
        let memory = VmReader::open(us).unwrap();
        let address = syscall_instruction(us, &memory).unwrap().unwrap();
        let mut code = Vec::new();
        memory.read(std::slice::from_ref(&(address..address + 2)), &mut code).unwrap();
        assert_eq!(code, SYSCALL);
    }

    #[test]
    fn a_sleeping_thread_is_a_candidate_and_has_no_signal() {
        let us = rustix::process::getpid();
        let threads = candidates(us).unwrap();
        assert!(threads.contains(&rustix::thread::gettid().as_raw_pid()));
        assert!(!has_deliverable_signal(us, rustix::thread::gettid().as_raw_pid()).unwrap());
    }
}
