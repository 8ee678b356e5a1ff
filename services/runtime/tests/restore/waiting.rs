//! A restore that is begun before there is anything to restore: CRIU waits too.

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus};
use std::time::{Duration, Instant};

use haulage_engine::armed::{Armed, ArmedRoot, GO, MEMORY, State};
use haulage_sys::{Pid, pass_fd};
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind, mount_change, unmount,
};
use rustix::process::{Signal, WaitOptions, getpid, kill_process, set_child_subreaper, waitpid};

use crate::container::{Container, poll};
use crate::{RUNTIME, command, log, take_away};

const WITHIN: Duration = Duration::from_secs(30);

/// A runtime that waits for the word, and what it has started. All is gone when it is dropped.
struct Waiting<'a> {
    container: &'a Container,
    root: ArmedRoot,
    runtime: Child,
    words: UnixStream,
    runc: Pid,
    gate: Pid,
    criu: Pid,
}

impl<'a> Waiting<'a> {
    /// Arms the container, and calls the runtime, which waits when this returns.
    fn begin(container: &'a Container) -> Self {
        let armed = container.bundle().join("armed");
        let root = ArmedRoot::new(&armed);
        let state = Armed { wait: true, ..Armed::new("m-1", container.complete(), container.work()) };
        root.arm(&container.id, &state).unwrap();
        let listener = root.listen(&container.id).unwrap();
        listener.set_nonblocking(true).unwrap();
        let create = ["create", "--bundle", container.bundle().to_str().unwrap()];
        let mut runtime = command(container, &armed, &create).spawn().unwrap();
        let began = Instant::now();
        let words = loop {
            match listener.accept() {
                Ok((words, _)) => break words,
                Err(_) if runtime.try_wait().unwrap().is_none() && began.elapsed() < WITHIN => {
                    std::thread::sleep(Duration::from_millis(2));
                }
                Err(error) => {
                    let _ = (runtime.kill(), runtime.wait());
                    panic!("the runtime does not wait ({error}): {}", log(container));
                }
            }
        };
        let only = |parent: Pid, what: &str| match &children(parent)[..] {
            [child] => *child,
            other => panic!("{what} has the children {other:?}"),
        };
        let runc = only(Pid::from_child(&runtime), "the runtime");
        let gate = only(runc, "runc");
        let criu = only(gate, "the gate");
        Self { container, root, runtime, words, runc, gate, criu }
    }

    fn go(&mut self) -> ExitStatus {
        pass_fd::send(&self.words, GO, None).unwrap();
        self.end()
    }

    /// Waits for the runtime's end.
    fn end(&mut self) -> ExitStatus {
        let began = Instant::now();
        loop {
            match self.runtime.try_wait().unwrap() {
                Some(status) => return status,
                None => assert!(began.elapsed() < WITHIN, "the runtime does not end"),
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// The word is given, and the container has to go on.
    fn goes_on(mut self, ticks: u64) {
        let status = self.go();
        assert!(status.success(), "{}", log(self.container));
        assert_eq!(self.root.state(&self.container.id).unwrap(), State::Restored);
        poll("the first tick after the restore", || self.container.status().0 > ticks);
        self.container.wait_for_progress();
        let init = Pid::from_raw(self.container.pid()).unwrap();
        let left = [self.runc, self.gate, self.criu].into_iter().filter(|pid| *pid != init && is_alive(*pid));
        assert_eq!(left.collect::<Vec<_>>(), [], "they end with the restore");
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let _ = (self.runtime.kill(), self.runtime.wait());
        // What a failure has left of them would hold what is mounted.
        for pid in [self.criu, self.gate, self.runc].into_iter().filter(|_| std::thread::panicking()) {
            let _ = kill_process(pid, Signal::KILL);
        }
        let dir = self.container.runc_root().join(&self.container.id);
        if dir.join("state.json").exists() {
            return;
        }
        // What a runc that was killed leaves.
        let _ = unmount(dir.join("criu-root"), UnmountFlags::DETACH);
        let _ = fs::remove_dir_all(dir);
        for hierarchy in fs::read_dir("/sys/fs/cgroup").unwrap() {
            let group = hierarchy.unwrap().path().join(format!("haul-criu-test-{}", self.container.id));
            let _ = fs::remove_dir(group);
        }
    }
}

fn children(parent: Pid) -> Vec<Pid> {
    let mut found = Vec::new();
    for thread in fs::read_dir(format!("/proc/{parent}/task")).into_iter().flatten().flatten() {
        let listed = fs::read_to_string(thread.path().join("children")).unwrap_or_default();
        found.extend(listed.split_whitespace().map(|child| Pid::from_raw(child.parse().unwrap()).unwrap()));
    }
    found
}

/// One that has ended is none, whether or not its parent knows.
fn is_alive(pid: Pid) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    status.lines().any(|line| line.starts_with("State:") && !line.contains('Z') && !line.contains('X'))
}

fn program_of(pid: Pid) -> PathBuf {
    fs::read_link(format!("/proc/{pid}/exe")).unwrap()
}

/// An overlay over the container's root, as engines have it, on a mount of its own. Gone when it is dropped.
struct Overlay(PathBuf);

impl Overlay {
    fn on(container: &Container, propagation: MountPropagationFlags) -> Self {
        let dir = container.bundle();
        mount_bind(dir, dir).unwrap();
        let overlay = Self(dir.to_owned());
        mount_change(dir, propagation).unwrap();
        let (root, upper, work) = (container.rootfs(), dir.join("upper"), dir.join("overlay"));
        fs::create_dir(&upper).unwrap();
        fs::create_dir(&work).unwrap();
        let options =
            format!("lowerdir={},upperdir={},workdir={}", root.display(), upper.display(), work.display());
        let options = std::ffi::CString::new(options).unwrap();
        mount("overlay", &root, "overlay", MountFlags::empty(), options.as_c_str()).unwrap();
        overlay
    }

    fn is_on(&self) -> usize {
        let root = format!(" {} ", self.0.join("rootfs").display());
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
        table.lines().filter(|line| line.contains(&root) && line.contains(" - overlay ")).count()
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        let _ = unmount(self.0.join("rootfs"), UnmountFlags::DETACH);
        let _ = unmount(&self.0, UnmountFlags::DETACH);
    }
}

#[test]
fn criu_waits_for_the_word_in_a_mount_namespace_of_its_own() {
    let container = Container::start("c1");
    let ticks = take_away(&container);
    let waiting = Waiting::begin(&container);
    let runtime = Path::new(RUNTIME).canonicalize().unwrap();
    assert_eq!(program_of(waiting.gate), runtime);
    assert_ne!(program_of(waiting.criu), runtime, "it is CRIU already");
    let arguments = fs::read_to_string(format!("/proc/{}/cmdline", waiting.criu)).unwrap();
    assert!(arguments.contains("\0swrk\0"), "{arguments}");
    let mounts = |pid| fs::read_link(format!("/proc/{pid}/ns/mnt")).unwrap();
    assert_eq!(mounts(waiting.gate), fs::read_link("/proc/self/ns/mnt").unwrap());
    assert_ne!(mounts(waiting.criu), mounts(waiting.gate));
    waiting.goes_on(ticks);
}

#[test]
fn a_root_that_is_mounted_after_criu_has_started_is_seen_by_it() {
    for (name, propagation) in [("c2", MountPropagationFlags::PRIVATE), ("c3", MountPropagationFlags::SHARED)]
    {
        let container = Container::start(name);
        let ticks = take_away(&container);
        let overlay = Overlay::on(&container, propagation);
        let waiting = Waiting::begin(&container);
        assert_eq!(overlay.is_on(), 0, "it is off as long as CRIU waits");
        // What has come meanwhile.
        let late = overlay.0.join("upper/late");
        fs::write(&late, "late").unwrap();
        waiting.goes_on(ticks);
        assert_eq!(overlay.is_on(), 1);
        let inside = format!("/proc/{}/root", container.pid());
        assert_eq!(fs::read_to_string(Path::new(&inside).join("late")).unwrap(), "late");
        assert_eq!(fs::read_to_string(container.rootfs().join("late")).unwrap(), "late");
        container.delete();
    }
}

#[test]
fn a_criu_that_has_died_while_it_waited_is_replaced() {
    let container = Container::start("c4");
    let ticks = take_away(&container);
    let waiting = Waiting::begin(&container);
    kill_process(waiting.criu, Signal::KILL).unwrap();
    poll("its end", || !is_alive(waiting.criu));
    waiting.goes_on(ticks);
}

#[test]
fn one_that_has_to_inherit_memory_is_started_with_it() {
    let container = Container::start("c5");
    let ticks = take_away(&container);
    let waiting = Waiting::begin(&container);
    pass_fd::send(&waiting.words, MEMORY, Some(tempfile::tempfile().unwrap().as_fd())).unwrap();
    // The one that waits cannot restore anything.
    kill_process(waiting.criu, Signal::STOP).unwrap();
    let (root, criu) = (waiting.root.clone(), waiting.criu);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let began = Instant::now();
            while root.outcome(&container.id).unwrap().is_none() && began.elapsed() < WITHIN {
                std::thread::sleep(Duration::from_millis(2));
            }
            let restored = root.outcome(&container.id).unwrap();
            kill_process(criu, Signal::CONT).unwrap();
            assert!(restored.is_some_and(|outcome| outcome.ok), "by another");
        });
        waiting.goes_on(ticks);
    });
}

#[test]
fn whoever_dies_while_criu_waits_leaves_no_criu() {
    let container = Container::start("c6");
    take_away(&container);
    type Victim = fn(&Waiting<'_>) -> Pid;
    let victims: [(&str, Victim); 3] = [
        ("runc", |waiting| waiting.runc),
        ("the runtime", |waiting| Pid::from_child(&waiting.runtime)),
        ("the gate", |waiting| waiting.gate),
    ];
    for (name, victim) in victims {
        let mut waiting = Waiting::begin(&container);
        kill_process(victim(&waiting), Signal::KILL).unwrap();
        assert!(!waiting.end().success(), "after the death of {name}");
        let all = [waiting.runc, waiting.gate, waiting.criu];
        poll(&format!("all to end after {name}"), || !all.into_iter().any(is_alive));
        assert!(matches!(waiting.root.state(&container.id).unwrap(), State::Armed(_)), "{name}");
        waiting.root.disarm(&container.id).unwrap();
    }
}

#[test]
fn the_container_s_end_is_told_to_who_started_the_runtime() {
    set_child_subreaper(Some(getpid())).unwrap();
    let container = Container::start("cc");
    let ticks = take_away(&container);
    Waiting::begin(&container).goes_on(ticks);
    let init = Pid::from_raw(container.pid()).unwrap();
    kill_process(init, Signal::KILL).unwrap();
    let (_, status) = waitpid(Some(init), WaitOptions::empty()).unwrap().unwrap();
    assert_eq!(status.terminating_signal(), Some(Signal::KILL.as_raw()));
}

/// Whoever runs in a group of the container's, in any hierarchy.
fn members(container: &Container) -> Vec<String> {
    let hierarchies = fs::read_dir("/sys/fs/cgroup").unwrap().map(|entry| entry.unwrap().path());
    let groups = hierarchies.chain([PathBuf::from("/sys/fs/cgroup")]);
    let procs = groups.map(|dir| dir.join(format!("haul-criu-test-{}/cgroup.procs", container.id)));
    procs.filter_map(|procs| fs::read_to_string(procs).ok()).filter(|procs| !procs.is_empty()).collect()
}

/// Whether a restore has come to some point.
type Moment = fn(&Waiting<'_>) -> bool;

#[test]
fn a_gate_that_dies_in_the_middle_leaves_nothing_running() {
    let moments: [(&str, Moment); 4] = [
        ("c8", |waiting| !matches!(waiting.root.state(&waiting.container.id).unwrap(), State::Armed(_))),
        ("c9", |waiting| waiting.container.work().join("restore.log").exists()),
        ("ca", |waiting| !children(waiting.gate).into_iter().all(|child| child == waiting.criu)),
        ("cb", |waiting| waiting.root.outcome(&waiting.container.id).unwrap().is_some()),
    ];
    for (name, moment) in moments {
        assert!((0..10).any(|_| dies_in_time(name, moment)), "{name}: the restore was over each time");
    }
}

/// Kills the gate at `moment`, and looks at what is left; false if the restore was over by then.
fn dies_in_time(name: &str, moment: Moment) -> bool {
    let container = Container::start(name);
    take_away(&container);
    let mut waiting = Waiting::begin(&container);
    pass_fd::send(&waiting.words, GO, None).unwrap();
    let began = Instant::now();
    while !moment(&waiting) {
        assert!(began.elapsed() < WITHIN, "{name}: it does not come to that");
    }
    let killed = kill_process(waiting.gate, Signal::KILL);
    if waiting.end().success() || killed.is_err() {
        return false;
    }
    assert_eq!(waiting.root.state(&container.id).unwrap(), State::Consumed, "{name}");
    assert!(!is_alive(waiting.criu), "{name}: CRIU still works when the runtime has given up");
    assert_eq!(members(&container), [""; 0], "{name}");
    true
}

#[test]
fn one_that_is_called_off_ends_with_all_that_waits() {
    let container = Container::start("c7");
    take_away(&container);
    let mut waiting = Waiting::begin(&container);
    waiting.words.shutdown(std::net::Shutdown::Both).unwrap();
    assert!(!waiting.end().success());
    let left = [waiting.runc, waiting.gate, waiting.criu].into_iter().filter(|pid| is_alive(*pid));
    assert_eq!(left.collect::<Vec<_>>(), []);
    assert!(matches!(waiting.root.state(&container.id).unwrap(), State::Armed(_)));
}
