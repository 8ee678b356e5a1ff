//! Processes that stand frozen take locks ([`crate::record_lock`]) and attach System V segments ([`crate::attach`]) before they
//! run.
//!
//! Whoever makes a process anew, and maps its files by descriptors of the moment, has it lose its locks on them; and nobody
//! else can take them in its name, nor attach a segment in it.
//!
//! ```text
//!  frozen ── SEIZE, INTERRUPT each thread ── thaw ──► stopped, before an instruction of its own is executed
//!                                                        │ a thread of each owner: shmat…, mmap, fcntl(F_SETLK)…,
//!                                                        │ munmap
//!  running ◄── DETACH each thread ◄── are all there? ◄───┘
//! ```
//! Until the last step the kernel kills the threads when this process ends (`PTRACE_O_EXITKILL`), and so does every error:
//! nothing runs without its locks and segments.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::process::{Signal, kill_process};

use crate::Pid;
use crate::abi::PAGE_SIZE;
use crate::attach::{Attachment, attach_in};
use crate::error::CallError;
use crate::freezer::{Freezer, FreezerError, FreezerState};
use crate::inject::block_signals;
use crate::ptrace::{Stop, Tracee, Waited};
use crate::record_lock::{self, RecordLock};
use crate::standstill::{self, StandstillError};
use crate::thread_choice;
use crate::vm_read::VmReader;
use crate::window::{CS_64, Window, is_in_restartable_sequence};

const LOOK_EVERY: Duration = Duration::from_micros(100);

/// Why processes did not get their locks or segments. They are killed in every case, and have not run.
#[derive(Debug, thiserror::Error)]
pub enum TakeError {
    /// They did not stand still when this began.
    #[error("the control group {} is not frozen", dir.display())]
    NotFrozen {
        /// Of the group.
        dir: PathBuf,
    },
    /// The group could not be asked or thawed.
    #[error(transparent)]
    Freezer(#[from] FreezerError),
    /// A thread could not be stopped.
    #[error("a process cannot be stopped before it runs")]
    Stop(#[from] StandstillError),
    /// It runs 32-bit code, or all its threads are in restartable sequences.
    #[error("no thread of process {pid} can take a lock")]
    NoThread {
        /// The process.
        pid: Pid,
    },
    /// Somebody else has such a lock, or the file system refuses.
    #[error("process {pid} does not get its lock by descriptor {} from {} on", lock.descriptor, lock.start)]
    Refused {
        /// The process.
        pid: Pid,
        /// The lock.
        lock: RecordLock,
        /// What the kernel says.
        #[source]
        errno: Errno,
    },
    /// It was taken, and the process has not got it.
    #[error("process {pid} has not its lock by descriptor {} from {} on", lock.descriptor, lock.start)]
    NotThere {
        /// The process.
        pid: Pid,
        /// The lock.
        lock: RecordLock,
    },
    /// It does not get a segment.
    #[error("process {pid} does not get the System V segment {segment}")]
    NotAttached {
        /// The process.
        pid: Pid,
        /// The segment.
        segment: i32,
        /// Why.
        #[source]
        source: CallError,
    },
    /// What was to be done when all had theirs failed.
    #[error("what was to follow on locks and segments failed")]
    NotFinished(#[source] io::Error),
    /// What a process has cannot be read.
    #[error("locks cannot be read")]
    Unreadable(#[source] io::Error),
    /// Another call failed.
    #[error("the taking of locks was cut short")]
    Call(#[from] CallError),
    /// The thread that does it could not be started.
    #[error("no thread could be started to take locks from")]
    NoThreadOfOurs(#[source] io::Error),
}

/// What processes are to have before they run.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Locks. One that the process has already stays as it is.
    pub locks: Vec<(Pid, RecordLock)>,
    /// Segments.
    pub attachments: Vec<(Pid, Attachment)>,
}

/// Has processes take and attach what is `wanted`, each for itself, does what is to `follow`, and lets them run on. `processes` are all that stand frozen by
/// the groups `frozen`, which are thawed. Each thread stops within `patience`, before it executes anything of its own.
///
/// Needs `CAP_SYS_PTRACE` and `CAP_SYS_ADMIN`.
///
/// # Errors
/// See [`TakeError`]; all the processes are killed.
pub fn take_before_they_run(
    frozen: &[Freezer],
    processes: &[Pid],
    wanted: &Wanted,
    follow: impl FnOnce() -> io::Result<()> + Send,
    patience: Duration,
) -> Result<(), TakeError> {
    std::thread::scope(|scope| {
        let taker = std::thread::Builder::new().name("haul-lock".into());
        let taker = taker.spawn_scoped(scope, move || {
            let taken = take(frozen, processes, wanted, follow, patience);
            if taken.is_err() {
                kill(frozen, processes);
            }
            taken
        });
        match taker
            .map_err(|error| {
                kill(frozen, processes);
                TakeError::NoThreadOfOurs(error)
            })?
            .join()
        {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

/// Ends processes that stand frozen by `frozen` and have not run; the groups are thawed by it.
pub fn kill(frozen: &[Freezer], processes: &[Pid]) {
    for pid in processes {
        // One that is gone need not be killed.
        let _ = kill_process(*pid, Signal::KILL);
    }
    for group in frozen {
        // A group without processes may be gone.
        let _ = group.thaw();
    }
}

fn take(
    frozen: &[Freezer],
    processes: &[Pid],
    wanted: &Wanted,
    follow: impl FnOnce() -> io::Result<()>,
    patience: Duration,
) -> Result<(), TakeError> {
    block_signals()?;
    let mut threads: HashMap<Pid, Vec<Tracee>> = HashMap::new();
    for pid in processes {
        let all = standstill::threads(*pid);
        if all.is_empty() {
            return Err(TakeError::NoThread { pid: *pid });
        }
        for tid in all {
            let seized = Tracee::seize_for_life(tid).and_then(|tracee| tracee.interrupt().map(|()| tracee));
            let tracee = seized.map_err(|source| StandstillError::NotTraceable { tid, source })?;
            threads.entry(*pid).or_default().push(tracee);
        }
    }
    // Whoever had thawed them meanwhile would have let them run without their locks.
    let deadline = Instant::now() + patience;
    frozen.iter().try_for_each(|group| is_frozen(group, deadline))?;
    frozen.iter().try_for_each(Freezer::thaw)?;
    for tracee in threads.values().flatten() {
        match standstill::wait(tracee, deadline)? {
            Waited::Stopped(_) => {}
            Waited::Ended => return Err(CallError::new("wait for a thread to stop", Errno::SRCH).into()),
            Waited::TimedOut => {
                return Err(StandstillError::NoStop { tid: tracee.tid(), within: patience }.into());
            }
        }
    }
    let mut by_owner: HashMap<Pid, (Vec<RecordLock>, Vec<&Attachment>)> = HashMap::new();
    for (pid, lock) in &wanted.locks {
        by_owner.entry(*pid).or_default().0.push(*lock);
    }
    for (pid, attachment) in &wanted.attachments {
        by_owner.entry(*pid).or_default().1.push(attachment);
    }
    for (pid, (locks, attachments)) in &by_owner {
        let own = threads.get(pid).map(Vec::as_slice).unwrap_or_default();
        let signal = take_by_one_of(*pid, own, locks, attachments)?;
        // It was held back while the thread had other registers.
        if let Some(signal) = signal.and_then(Signal::from_named_raw) {
            kill_process(*pid, signal).map_err(|errno| CallError::new("kill", errno))?;
        }
    }
    if let Some((pid, lock)) = record_lock::missing(&wanted.locks).map_err(TakeError::Unreadable)?.first() {
        return Err(TakeError::NotThere { pid: *pid, lock: *lock });
    }
    follow().map_err(TakeError::NotFinished)?;
    for tracee in threads.into_values().flatten() {
        tracee.detach(0)?;
    }
    Ok(())
}

/// A thread that its tracer has just let go counts as frozen only when it has come to the freezer again, before which it
/// executes nothing.
fn is_frozen(group: &Freezer, deadline: Instant) -> Result<(), TakeError> {
    loop {
        match group.state()? {
            FreezerState::Frozen => return Ok(()),
            FreezerState::Freezing if Instant::now() < deadline => std::thread::sleep(LOOK_EVERY),
            _ => return Err(TakeError::NotFrozen { dir: group.dir().to_owned() }),
        }
    }
}

/// By the first thread that can. A stop signal that came for it meanwhile.
fn take_by_one_of(
    pid: Pid,
    threads: &[Tracee],
    locks: &[RecordLock],
    attachments: &[&Attachment],
) -> Result<Option<i32>, TakeError> {
    let memory = VmReader::open(pid)?;
    let gadget = thread_choice::syscall_instruction(pid, &memory)?.ok_or(TakeError::NoThread { pid })?;
    for tracee in threads {
        let own = tracee.registers()?;
        if own.cs != CS_64 || is_in_restartable_sequence(tracee, &memory, own.rip)? {
            continue;
        }
        let mask = tracee.signal_mask()?;
        tracee.set_signal_mask(u64::MAX)?;
        let mut window = Window::new(tracee, gadget, own);
        let taken = attachments.iter().try_for_each(|attachment| {
            let segment = attachment.id;
            let attached = attach_in(&mut window, attachment);
            attached.map_err(|source| TakeError::NotAttached { pid, segment, source })
        });
        let taken = taken.and_then(|()| take_in(&mut window, pid, locks));
        let signal = window.stopped_by();
        tracee.set_registers(&own)?;
        tracee.set_signal_mask(mask)?;
        // Stopped once more where it was, as after any injection.
        tracee.interrupt()?;
        tracee.resume(0)?;
        stop_again(tracee)?;
        return taken.map(|()| signal);
    }
    Err(TakeError::NoThread { pid })
}

/// The locks are described in a page of their own: nothing of the process's memory is written to.
fn take_in(window: &mut Window<'_>, pid: Pid, locks: &[RecordLock]) -> Result<(), TakeError> {
    if locks.is_empty() {
        return Ok(());
    }
    let readable = (libc::PROT_READ | libc::PROT_WRITE) as u64;
    let anonymous = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
    let page = window.made("mmap", libc::SYS_mmap, &[0, PAGE_SIZE, readable, anonymous, u64::MAX, 0])?;
    let page = page.map_err(|errno| CallError::new("mmap in the process", errno))?;
    let memory = File::options().write(true).open(format!("/proc/{pid}/mem"));
    let memory = memory.map_err(|error| CallError::from_io("open of a process's memory", &error))?;
    for lock in locks {
        let written = memory.write_all_at(&lock.to_bytes(), page);
        written.map_err(|error| CallError::from_io("write to a process's memory", &error))?;
        let arguments = [lock.descriptor as u64, libc::F_SETLK as u64, page];
        let taken = window.made("fcntl", libc::SYS_fcntl, &arguments)?;
        taken.map_err(|errno| TakeError::Refused { pid, lock: *lock, errno })?;
    }
    let gone = window.made("munmap", libc::SYS_munmap, &[page, PAGE_SIZE])?;
    gone.map_err(|errno| CallError::new("munmap in the process", errno))?;
    Ok(())
}

fn stop_again(tracee: &Tracee) -> Result<(), CallError> {
    loop {
        match tracee.wait(None)? {
            Waited::Stopped(Stop::Event) => return Ok(()),
            Waited::Stopped(Stop::Signal(signal)) => tracee.resume(signal)?,
            Waited::Stopped(Stop::Syscall) => tracee.resume(0)?,
            Waited::Ended | Waited::TimedOut => return Err(CallError::new("waitpid", Errno::SRCH)),
        }
    }
}
