//! Injection into real processes that would notice: in a call that a stop interrupts, under a rain of signals, behind
//! a seccomp filter.
//!
//! A target is this test binary started again with [`ROLE`] set.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use haulage_sys::freezer::{Freezer, FreezerState};
use haulage_sys::inject::{InjectError, userfaultfd_of};
use haulage_sys::uffd::WriteTracker;
use haulage_sys::{Pid, pidfd};

const ROLE: &str = "HAULAGE_SYS_TEST_ROLE";
const PATIENCE: Duration = Duration::from_secs(5);

struct Target {
    child: Child,
    stdin: Option<ChildStdin>,
    lines: std::io::Lines<BufReader<std::process::ChildStdout>>,
}

impl Target {
    fn start(role: &str) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "target", "--nocapture", "--ignored"])
            .env(ROLE, role)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let stdin = child.stdin.take();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut target = Self { child, stdin, lines };
        target.line_with("ready");
        target
    }

    fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    fn line_with(&mut self, word: &str) -> String {
        self.lines.by_ref().map(Result::unwrap).find(|line| line.contains(word)).expect("target ended early")
    }

    /// Closes its input, which ends it, and returns its verdict.
    fn finish(mut self) -> String {
        drop(self.stdin.take());
        let verdict = self.line_with("verdict");
        assert!(self.child.wait().unwrap().success());
        verdict
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

static SIGNALS: AtomicU64 = AtomicU64::new(0);

extern "C" fn count_signal(_signal: libc::c_int) {
    SIGNALS.fetch_add(1, Ordering::SeqCst);
}

fn say(line: &str) {
    // Not println: the harness would capture or interleave it.
    std::io::stdout().write_all(format!("\n{line}\n").as_bytes()).unwrap();
}

#[test]
#[ignore = "not a test but the target of the others"]
fn target() {
    let Ok(role) = std::env::var(ROLE) else { return };
    match role.as_str() {
        "epoll" => wait_in_epoll(),
        "signals" => count_signals(),
        "seccomp" => behind_seccomp(),
        "blocked-sigtrap" => with_sigtrap_blocked(),
        _ => unreachable!("role {role}"),
    }
}

/// Waits for the end of its input in `epoll_wait`, which must not fail, beside a thread that never stops computing.
fn wait_in_epoll() {
    std::thread::spawn(|| {
        let mut x = 1_u64;
        loop {
            let next = std::hint::black_box(x).wrapping_mul(6364136223846793005).wrapping_add(1);
            assert_eq!(next, x.wrapping_mul(6364136223846793005).wrapping_add(1));
            x = next;
        }
    });
    // SAFETY: plain system calls on descriptors and memory of our own.
    let result = unsafe {
        let epoll = libc::epoll_create1(0);
        let mut event = libc::epoll_event { events: libc::EPOLLHUP as u32, u64: 0 };
        assert_eq!(libc::epoll_ctl(epoll, libc::EPOLL_CTL_ADD, 0, &raw mut event), 0);
        say("ready");
        libc::epoll_wait(epoll, &raw mut event, 1, -1)
    };
    say(&format!("verdict epoll_wait {result}"));
}

/// Counts real-time signals, which queue and so must all arrive.
fn count_signals() {
    // SAFETY: the handler only touches an atomic.
    unsafe {
        let handler = count_signal as extern "C" fn(libc::c_int);
        libc::signal(libc::SIGRTMIN(), handler as libc::sighandler_t);
    }
    say("ready");
    std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
    say(&format!("verdict signals {}", SIGNALS.load(Ordering::SeqCst)));
}

/// Allows nothing that needs a descriptor: every `userfaultfd` is refused with EPERM.
fn behind_seccomp() {
    let number = libc::SYS_userfaultfd as u32;
    let step = |code: u32, jt: u8, jf: u8, k: u32| libc::sock_filter { code: code as u16, jt, jf, k };
    let refuse = libc::SECCOMP_RET_ERRNO | libc::EPERM as u32;
    let mut filter = [
        step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, number),
        step(libc::BPF_RET | libc::BPF_K, 0, 0, refuse),
        step(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: the kernel copies the program, which outlives the call.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        let all_threads = libc::SECCOMP_FILTER_FLAG_TSYNC;
        let set = libc::SECCOMP_SET_MODE_FILTER;
        assert_eq!(libc::syscall(libc::SYS_seccomp, set, all_threads, &raw const program), 0);
        assert_eq!(libc::syscall(libc::SYS_userfaultfd, 1), -1);
    }
    say("ready");
    std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
    say("verdict done");
}

/// Blocks SIGTRAP and has a handler for it: a debugger's single step would silently undo both.
fn with_sigtrap_blocked() {
    // SAFETY: sets of our own; the handler only touches an atomic.
    let (mask, action) = unsafe {
        let handler = count_signal as extern "C" fn(libc::c_int);
        libc::signal(libc::SIGTRAP, handler as libc::sighandler_t);
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigaddset(&raw mut set, libc::SIGTRAP);
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
        say("ready");
        std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
        let mut action: libc::sigaction = std::mem::zeroed();
        libc::pthread_sigmask(libc::SIG_BLOCK, std::ptr::null(), &raw mut set);
        libc::sigaction(libc::SIGTRAP, std::ptr::null(), &raw mut action);
        (
            libc::sigismember(&raw const set, libc::SIGTRAP),
            action.sa_sigaction == handler as libc::sighandler_t,
        )
    };
    say(&format!("verdict blocked {mask} handler {action}"));
}

#[test]
fn a_call_that_a_stop_interrupts_goes_on_and_no_descriptor_stays() {
    let target = Target::start("epoll");
    let before = descriptors(target.pid());
    for _ in 0..200 {
        let fd = userfaultfd_of(target.pid(), PATIENCE).unwrap();
        assert!(WriteTracker::negotiate(fd).unwrap().is_alive().unwrap());
    }
    assert_eq!(descriptors(target.pid()), before);
    assert!(target.finish().ends_with("epoll_wait 1"));
}

#[test]
fn no_signal_is_lost_or_doubled() {
    let target = Target::start("signals");
    let pid = target.pid();
    let (rounds, per_round) = (100, 20);
    for _ in 0..rounds {
        let rain = std::thread::spawn(move || {
            for _ in 0..per_round {
                // SAFETY: sends a signal to a process of our own, which handles it.
                unsafe { libc::kill(pid.as_raw_pid(), libc::SIGRTMIN()) };
            }
        });
        userfaultfd_of(pid, PATIENCE).unwrap();
        rain.join().unwrap();
    }
    assert!(target.finish().ends_with(&format!("signals {}", rounds * per_round)));
}

/// What was found out of the old program before the stop must not be used on the new one.
#[test]
fn a_process_that_executes_another_program_meanwhile_is_not_harmed() {
    let again = r#"[ "$1" = 0 ] && exit 0; exec sh -c "$0" "$0" $(($1 - 1))"#;
    let mut shell = Command::new("sh").args(["-c", again, again, "1000"]).spawn().unwrap();
    let pid = Pid::from_child(&shell);
    let mut taken = 0;
    let status = loop {
        if let Some(status) = shell.try_wait().unwrap() {
            break status;
        }
        // Refused when it ends, or whenever a program begins anew.
        taken += u32::from(userfaultfd_of(pid, PATIENCE).is_ok());
    };
    assert!(status.success() && taken > 0, "{status}, {taken} times");
}

#[test]
fn a_seccomp_filter_is_no_obstacle() {
    let target = Target::start("seccomp");
    userfaultfd_of(target.pid(), PATIENCE).unwrap();
    assert!(target.finish().ends_with("done"));
}

#[test]
fn a_blocked_sigtrap_stays_blocked_and_handled() {
    let target = Target::start("blocked-sigtrap");
    for _ in 0..20 {
        userfaultfd_of(target.pid(), PATIENCE).unwrap();
    }
    assert!(target.finish().ends_with("blocked 1 handler true"));
}

#[test]
fn a_stopped_process_stays_stopped() {
    let target = Target::start("signals");
    let pid = target.pid();
    rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
    let deadline = std::time::Instant::now() + PATIENCE;
    while state(pid) != 'T' && std::time::Instant::now() < deadline {
        std::thread::yield_now();
    }
    userfaultfd_of(pid, PATIENCE).unwrap();
    while state(pid) != 'T' && std::time::Instant::now() < deadline {
        std::thread::yield_now();
    }
    assert_eq!(state(pid), 'T');
    rustix::process::kill_process(pid, rustix::process::Signal::CONT).unwrap();
    assert!(target.finish().ends_with("signals 0"));
}

#[test]
fn a_traced_and_a_dead_process_are_told_apart() {
    let target = Target::start("signals");
    let pid = target.pid();
    // SAFETY: PTRACE_SEIZE takes numbers only.
    let seized = unsafe { libc::ptrace(libc::PTRACE_SEIZE as libc::c_uint, pid.as_raw_pid(), 0, 0) };
    assert_eq!(seized, 0);
    assert!(matches!(userfaultfd_of(pid, PATIENCE), Err(InjectError::NotTraceable(_))));

    let mut zombie = Command::new("true").spawn().unwrap();
    let pid = Pid::from_child(&zombie);
    let deadline = std::time::Instant::now() + PATIENCE;
    while state(pid) != 'Z' && std::time::Instant::now() < deadline {
        std::thread::yield_now();
    }
    let refused = userfaultfd_of(pid, PATIENCE);
    zombie.wait().unwrap();
    assert!(refused.is_err());
    assert!(pidfd::open(pid).is_err() || pid != target.pid());
}

fn descriptors(pid: Pid) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}

fn state(pid: Pid) -> char {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    stat.rsplit_once(") ").unwrap().1.chars().next().unwrap()
}

#[test]
fn our_copy_is_close_on_exec() {
    let target = Target::start("signals");
    let fd = userfaultfd_of(target.pid(), PATIENCE).unwrap();
    assert!(rustix::io::fcntl_getfd(&fd).unwrap().contains(rustix::io::FdFlags::CLOEXEC));
    assert!(fd.as_raw_fd() > 2);
}

#[test]
fn a_frozen_process_is_left_as_it_is() {
    for root in ["/sys/fs/cgroup/freezer", "/sys/fs/cgroup/unified", "/sys/fs/cgroup"] {
        let group = Path::new(root).join(format!("haul-sys-inject-{}", std::process::id()));
        if std::fs::create_dir(&group).is_err() {
            continue;
        }
        let Ok(freezer) = Freezer::open(&group) else {
            std::fs::remove_dir(&group).unwrap();
            continue;
        };
        // It waits in a call that restarts by itself: others end with `EINTR` in a freezer, whoever freezes.
        let target = Target::start("signals");
        let (pid, before) = (target.pid(), descriptors(target.pid()));
        std::fs::write(group.join("cgroup.procs"), pid.to_string()).unwrap();
        freezer.freeze(PATIENCE).unwrap();
        let refused = userfaultfd_of(pid, Duration::from_millis(50));
        // It is on its way back into the freezer.
        let deadline = std::time::Instant::now() + PATIENCE;
        while freezer.state().unwrap() != FreezerState::Frozen && std::time::Instant::now() < deadline {
            std::thread::yield_now();
        }
        let state = freezer.state().unwrap();
        freezer.thaw().unwrap();
        let again = userfaultfd_of(pid, PATIENCE);
        let after = descriptors(pid);
        let verdict = target.finish();
        let deadline = std::time::Instant::now() + PATIENCE;
        while std::fs::remove_dir(&group).is_err() && std::time::Instant::now() < deadline {
            std::thread::yield_now();
        }
        // Version 1 may let a thread run that it has frozen in its sleep.
        let version_1 = root.ends_with("freezer") && refused.is_ok();
        assert!(version_1 || matches!(refused, Err(InjectError::NoStop { .. })), "{root}: {refused:?}");
        assert_eq!(state, FreezerState::Frozen, "{root}");
        assert!(again.is_ok() && after == before, "{root}: {again:?}");
        assert!(verdict.ends_with("signals 0"), "{root}: {verdict}");
    }
}
