//! Stops every thread of several processes for a moment, by `ptrace`.
//!
//! ```text
//!  list ──► SEIZE, INTERRUPT, wait for each ──► list again: anybody new? ──► work ──► DETACH
//!              ▲                                        │ yes
//!              └────────────────────────────────────────┘
//! ```
//! A thread that has stopped is outside of the kernel's and its own code and makes no other, so when a list names nobody
//! new, all stand still. Were this process killed meanwhile, the kernel would let go of them, which a freezer does not.
//!
//! Threads are let go as they were: a system call that this has made end with `EINTR` is repeated, as in
//! [`crate::inject`].

use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, Instant};

use rustix::io::Errno;

use crate::Pid;
use crate::error::CallError;
use crate::ptrace::{Stop, Tracee, Waited};
use crate::thread_choice;

/// Why processes could not be stopped. They run on as before.
#[derive(Debug, thiserror::Error)]
pub enum StandstillError {
    /// The processes to stop cannot be listed.
    #[error("the processes cannot be listed")]
    NoList,
    /// A thread cannot be traced: another tracer has it, or it is one of the kernel's.
    #[error("thread {tid} cannot be traced")]
    NotTraceable {
        /// The thread.
        tid: i32,
        /// What the kernel says.
        #[source]
        source: CallError,
    },
    /// A thread did not stop in time; frozen, or in an uninterruptible wait (as a parent is during `vfork`).
    #[error("thread {tid} did not stop within {within:?}")]
    NoStop {
        /// The thread.
        tid: i32,
        /// How long was waited for all.
        within: Duration,
    },
    /// Another call failed.
    #[error("the stop was cut short")]
    Call(#[from] CallError),
    /// The stopping thread could not be started.
    #[error("no thread could be started to stop others from")]
    NoStopper(#[source] std::io::Error),
}

/// Does `work` while all threads of the processes that `list` names stand still. `list` is asked until it names nobody
/// new. All of them are stopped within `patience` or none stays stopped.
///
/// Needs `CAP_SYS_PTRACE`. `work` runs on a thread of its own, since tracing belongs to a thread, and threads which did
/// not stop in time are let go by its end.
///
/// # Errors
/// See [`StandstillError`]. `work` has not been begun then; threads that had stopped run on within a moment.
pub fn while_still<R: Send>(
    list: &(dyn Fn() -> Option<Vec<Pid>> + Sync),
    patience: Duration,
    work: impl FnOnce() -> R + Send,
) -> Result<R, StandstillError> {
    std::thread::scope(|scope| {
        let stopper = std::thread::Builder::new().name("haul-stop".into());
        let stopper = stopper.spawn_scoped(scope, move || {
            let mut stopped = Stopped::default();
            stopped.stop_all(list, Instant::now() + patience, patience)?;
            let result = work();
            stopped.release();
            Ok(result)
        });
        match stopper.map_err(StandstillError::NoStopper)?.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

#[derive(Default)]
struct Stopped {
    /// `None` for a thread that has ended.
    threads: BTreeMap<libc::pid_t, (Pid, Option<Tracee>)>,
}

impl Drop for Stopped {
    fn drop(&mut self) {
        self.release();
    }
}

impl Stopped {
    fn stop_all(
        &mut self,
        list: &dyn Fn() -> Option<Vec<Pid>>,
        deadline: Instant,
        within: Duration,
    ) -> Result<(), StandstillError> {
        loop {
            let mut new = Vec::new();
            for pid in list().ok_or(StandstillError::NoList)? {
                for tid in threads(pid) {
                    if self.threads.contains_key(&tid) {
                        continue;
                    }
                    match seize(pid, tid) {
                        Ok(tracee) => new.extend(tracee.map(|tracee| (pid, tid, tracee))),
                        Err(error) => {
                            self.keep_stopped(new);
                            return Err(error);
                        }
                    }
                }
            }
            if new.is_empty() {
                return Ok(());
            }
            let mut new = new.into_iter();
            while let Some((pid, tid, tracee)) = new.next() {
                let failed = match wait(&tracee, deadline) {
                    Ok(Waited::Stopped(_)) => {
                        self.threads.insert(tid, (pid, Some(tracee)));
                        continue;
                    }
                    Ok(Waited::Ended) => {
                        self.threads.insert(tid, (pid, None));
                        continue;
                    }
                    Ok(Waited::TimedOut) => StandstillError::NoStop { tid, within },
                    Err(error) => error,
                };
                self.keep_stopped(new);
                return Err(failed);
            }
        }
    }

    /// Those that have stopped by now are let go like the others; the rest are by the end of this thread, running.
    fn keep_stopped(&mut self, asked: impl IntoIterator<Item = (Pid, libc::pid_t, Tracee)>) {
        for (pid, tid, tracee) in asked {
            if matches!(wait(&tracee, Instant::now()), Ok(Waited::Stopped(_))) {
                self.threads.insert(tid, (pid, Some(tracee)));
            }
        }
    }

    /// A thread that cannot be let go has ended.
    fn release(&mut self) {
        for (tid, (pid, tracee)) in std::mem::take(&mut self.threads) {
            let Some(tracee) = tracee else { continue };
            repeat_interrupted_call(pid, tid, &tracee).ok();
            tracee.detach(0).ok();
        }
    }
}

/// The living threads of a process; none when it is gone or a zombie.
pub(crate) fn threads(pid: Pid) -> Vec<libc::pid_t> {
    let Ok(entries) = fs::read_dir(format!("/proc/{pid}/task")) else { return Vec::new() };
    let tids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    tids.filter(|tid| thread_choice::is_alive(pid, *tid)).collect()
}

fn seize(pid: Pid, tid: libc::pid_t) -> Result<Option<Tracee>, StandstillError> {
    let seized = Tracee::seize(tid).and_then(|tracee| tracee.interrupt().map(|()| tracee));
    match seized {
        Ok(tracee) => Ok(Some(tracee)),
        Err(CallError { errno: Errno::SRCH, .. }) => Ok(None),
        // Also what the kernel says of a thread that is about to end.
        Err(_) if !thread_choice::is_alive(pid, tid) => Ok(None),
        Err(source) => Err(StandstillError::NotTraceable { tid, source }),
    }
}

/// Waits for the stop that was asked for; signals that come first are delivered as ever.
pub(crate) fn wait(tracee: &Tracee, deadline: Instant) -> Result<Waited, StandstillError> {
    loop {
        match tracee.wait(Some(deadline))? {
            Waited::Stopped(Stop::Signal(signal)) => resume(tracee, signal)?,
            Waited::Stopped(Stop::Syscall) => resume(tracee, 0)?,
            other => return Ok(other),
        }
    }
}

/// A thread that was killed meanwhile is noticed by the next wait.
fn resume(tracee: &Tracee, signal: i32) -> Result<(), CallError> {
    match tracee.resume(signal) {
        Err(error) if error.is_gone() => Ok(()),
        other => other,
    }
}

fn repeat_interrupted_call(pid: Pid, tid: libc::pid_t, tracee: &Tracee) -> Result<(), CallError> {
    let mut registers = tracee.registers()?;
    if thread_choice::must_repeat(pid, tid, &registers)? {
        registers.rip = registers.rip.wrapping_sub(2);
        registers.rax = registers.orig_rax;
        tracee.set_registers(&registers)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command};

    fn state(pid: Pid) -> char {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        stat.rsplit_once(") ").unwrap().1.chars().next().unwrap()
    }

    struct Busy(Child);

    impl Busy {
        fn start() -> Self {
            Self(Command::new("sh").args(["-c", "while :; do :; done"]).spawn().unwrap())
        }

        fn pid(&self) -> Pid {
            Pid::from_child(&self.0)
        }
    }

    impl Drop for Busy {
        fn drop(&mut self) {
            self.0.kill().ok();
            self.0.wait().ok();
        }
    }

    const PATIENCE: Duration = Duration::from_secs(10);

    /// The kernel lets go of threads a moment after the one that has stopped them has ended.
    fn come_to_run(pids: &[Pid]) {
        let deadline = Instant::now() + PATIENCE;
        while pids.iter().any(|pid| state(*pid) != 'R') && Instant::now() < deadline {
            std::thread::yield_now();
        }
        assert!(pids.iter().all(|pid| state(*pid) == 'R'));
    }

    #[test]
    fn all_stand_still_during_the_work_and_run_on_after_it() {
        let busy = [Busy::start(), Busy::start()];
        let pids: Vec<Pid> = busy.iter().map(Busy::pid).collect();
        let during = while_still(&|| Some(pids.clone()), PATIENCE, || {
            pids.iter().map(|pid| state(*pid)).collect::<String>()
        });
        assert_eq!(during.unwrap(), "tt");
        come_to_run(&pids);
    }

    #[test]
    fn one_that_cannot_be_had_leaves_the_others_running() {
        let (busy, other) = (Busy::start(), Busy::start());
        let pids = [busy.pid(), other.pid()];
        // Held by us already, on another thread.
        let inner = while_still(&|| Some(vec![other.pid()]), PATIENCE, || {
            while_still(&|| Some(pids.to_vec()), PATIENCE, || ()).unwrap_err()
        });
        assert!(matches!(inner.unwrap(), StandstillError::NotTraceable { .. }));
        come_to_run(&pids);
    }

    const WAITER: &str = "HAULAGE_TEST_WAITER";

    /// What a server does: waits in `epoll_wait`, which does not restart by itself, and ends when that returns.
    fn wait_for_ever() {
        // SAFETY: a new descriptor; the call writes at most one event to the one that is given.
        unsafe {
            let epoll = libc::epoll_create1(0);
            let mut event = libc::epoll_event { events: 0, u64: 0 };
            libc::epoll_wait(epoll, &raw mut event, 1, -1);
        }
    }

    #[test]
    fn a_call_that_the_stop_interrupts_goes_on() {
        if std::env::var_os(WAITER).is_some() {
            return wait_for_ever();
        }
        let name = "standstill::tests::a_call_that_the_stop_interrupts_goes_on";
        let waiter =
            Command::new(std::env::current_exe().unwrap()).args(["--exact", name]).env(WAITER, "1").spawn();
        let mut waiter = Busy(waiter.unwrap());
        let pid = waiter.pid();
        let waiting = || {
            let wait = format!("{} ", libc::SYS_epoll_wait);
            let in_it = |tid: &libc::pid_t| {
                let call = fs::read_to_string(format!("/proc/{pid}/task/{tid}/syscall")).unwrap_or_default();
                call.starts_with(&wait)
            };
            threads(pid).iter().any(in_it)
        };
        let come = |what: &dyn Fn() -> bool| {
            let deadline = Instant::now() + PATIENCE;
            while !what() && Instant::now() < deadline {
                std::thread::yield_now();
            }
            what()
        };
        assert!(come(&waiting));
        for _ in 0..20 {
            while_still(&|| Some(vec![pid]), PATIENCE, || ()).unwrap();
            assert!(come(&waiting), "it has not gone on waiting");
        }
        assert!(waiter.0.try_wait().unwrap().is_none());
    }
}
