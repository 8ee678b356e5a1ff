//! A real process in a control group of its own, that changes its memory as it is told.

use std::fs;
use std::io::{BufRead, BufReader, Lines, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use haulage_sys::Pid;
use haulage_sys::freezer::Freezer;
use haulage_sys::ipc::IpcNamespace;
use rustix::process::{Signal, kill_process};

static NEXT: AtomicU32 = AtomicU32::new(0);

/// The process, its group and its program. All gone afterwards, whatever happens.
pub(crate) struct Target {
    group: PathBuf,
    child: Child,
    /// The program, where the child is only what keeps it.
    program: Option<Pid>,
    stdin: ChildStdin,
    lines: Lines<BufReader<ChildStdout>>,
    _program: tempfile::TempDir,
}

impl Target {
    pub(crate) fn start() -> Self {
        Self::start_by(&[])
    }

    /// In a pid namespace of its own, as in a container.
    pub(crate) fn start_apart() -> Self {
        let mut target = Self::start_by(&["unshare", "--pid", "--fork", "--kill-child"]);
        // Its answer says that it is there.
        target.tell("brk 0");
        let children = format!("/proc/{0}/task/{0}/children", target.child.id());
        let program = fs::read_to_string(children).unwrap().trim().parse().unwrap();
        fs::write(target.group.join("cgroup.procs"), format!("{program}")).unwrap();
        // The other one has no part in this.
        let outside = target.group.parent().unwrap().join("cgroup.procs");
        fs::write(outside, target.child.id().to_string()).unwrap();
        target.program = Pid::from_raw(program);
        target
    }

    fn start_by(wrapper: &[&str]) -> Self {
        let program = tempfile::tempdir().unwrap();
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/target/target.c");
        let binary = program.path().join("target");
        let compiled = Command::new("cc").args(["-O1", "-pthread", "-o"]).arg(&binary).arg(source).status();
        assert!(compiled.unwrap().success());
        let group = make_group();
        let mut words = wrapper.iter().map(std::ffi::OsStr::new).chain([binary.as_os_str()]);
        let mut command = Command::new(words.next().unwrap());
        // Segments of others would count.
        IpcNamespace::create().unwrap().enter_on_start(&mut command);
        let mut child = command
            .args(words)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .process_group(0)
            .spawn()
            .unwrap();
        fs::write(group.join("cgroup.procs"), child.id().to_string()).unwrap();
        let stdin = child.stdin.take().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Self { group, child, program: None, stdin, lines, _program: program }
    }

    /// Gives commands, separated by semicolons, and waits until each is done.
    pub(crate) fn tell(&mut self, commands: &str) {
        for command in commands.split(';').map(str::trim).filter(|command| !command.is_empty()) {
            writeln!(self.stdin, "{command}").unwrap();
            assert_eq!(self.lines.next().unwrap().unwrap(), "ok", "{command}");
        }
    }

    pub(crate) fn cgroup_procs(&self) -> PathBuf {
        self.group.join("cgroup.procs")
    }

    pub(crate) fn pid(&self) -> Pid {
        self.program.unwrap_or(Pid::from_child(&self.child))
    }

    pub(crate) fn freezer(&self) -> Freezer {
        Freezer::open(&self.group).unwrap()
    }

    pub(crate) fn freeze(&self) {
        self.freezer().freeze(Duration::from_secs(10)).unwrap();
    }

    /// What the process calls by this descriptor, to be written to.
    pub(crate) fn writable(&self, descriptor: u32) -> fs::File {
        fs::File::options().write(true).open(format!("/proc/{}/fd/{descriptor}", self.pid())).unwrap()
    }

    pub(crate) fn pids(&self) -> Vec<Pid> {
        let text = fs::read_to_string(self.cgroup_procs()).unwrap_or_default();
        text.lines().filter_map(|line| Pid::from_raw(line.parse().ok()?)).collect()
    }

    /// Lets every process but the first change its memory.
    pub(crate) fn signal_children(&self) {
        let children = self.pids().into_iter().filter(|pid| *pid != self.pid());
        children.for_each(|pid| kill_process(pid, Signal::USR1).unwrap());
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        self.freezer().thaw().ok();
        let deadline = Instant::now() + Duration::from_secs(10);
        while Instant::now() < deadline {
            for pid in self.pids() {
                kill_process(pid, Signal::KILL).ok();
            }
            self.child.try_wait().ok();
            if fs::remove_dir(&self.group).is_ok() {
                break;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// A new group in whichever hierarchy of this machine has a freezer.
fn make_group() -> PathBuf {
    let name = format!("haul-pages-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    for root in ["/sys/fs/cgroup/freezer", "/sys/fs/cgroup", "/sys/fs/cgroup/unified"] {
        let dir = Path::new(root).join(&name);
        if fs::create_dir(&dir).is_err() {
            continue;
        }
        if Freezer::open(&dir).is_ok() {
            return dir;
        }
        fs::remove_dir(&dir).ok();
    }
    unreachable!("this machine has no freezer, or we are not root");
}
