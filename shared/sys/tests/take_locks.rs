//! Real processes that stand frozen take locks and attach segments before they run, or never run.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use haulage_sys::attach::{Attachment, Part};
use haulage_sys::freezer::{Freezer, FreezerState};
use haulage_sys::ipc::{self, IpcNamespace, PRIVATE};
use haulage_sys::record_lock::{RecordLock, missing, of_process, owners};
use haulage_sys::take_locks::{TakeError, Wanted, take_before_they_run};
use haulage_sys::{Errno, PAGE_SIZE, Pid};
use rustix::fs::{FlockOperation, fcntl_lock};

const PATIENCE: Duration = Duration::from_secs(10);
/// The descriptor by which the processes have the file open.
const DESCRIPTOR: i32 = 3;
const LOCKS: [RecordLock; 2] = [
    RecordLock { descriptor: DESCRIPTOR, for_writing: true, start: 120, length: 8 },
    RecordLock { descriptor: DESCRIPTOR, for_writing: false, start: 4096, length: 0 },
];

/// A group of its own with two processes that have a file open, frozen; gone afterwards whatever happens.
struct Frozen {
    freezer: Freezer,
    children: [Child; 2],
    counters: [PathBuf; 2],
    file: PathBuf,
    namespace: IpcNamespace,
    _dir: tempfile::TempDir,
}

impl Frozen {
    /// In each hierarchy of this machine that has a freezer.
    fn all(name: &str) -> Vec<Self> {
        let roots = ["/sys/fs/cgroup/freezer", "/sys/fs/cgroup/unified", "/sys/fs/cgroup"];
        let made = roots.iter().filter_map(|root| Self::make(Path::new(root), name));
        let all: Vec<Self> = made.collect();
        assert!(!all.is_empty(), "this machine has no freezer at all");
        all
    }

    fn make(root: &Path, name: &str) -> Option<Self> {
        let group = root.join(format!("haul-locks-{name}-{}", std::process::id()));
        fs::create_dir(&group).ok()?;
        let Ok(freezer) = Freezer::open(&group) else {
            fs::remove_dir(&group).unwrap();
            return None;
        };
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        let counters = ["a", "b"].map(|name| dir.path().join(name));
        let namespace = IpcNamespace::create().unwrap();
        let children = counters.clone().map(|counter| {
            // Counts for as long as it runs.
            let script = "exec 3<>\"$1\"; n=0; while :; do n=$((n+1)); echo $n >\"$2\"; done";
            let mut shell = Command::new("sh");
            let duplicate: OwnedFd = namespace.as_file().try_clone().unwrap().into();
            IpcNamespace::from(duplicate).enter_on_start(&mut shell);
            shell.args(["-c", script, "sh"]).args([&file, &counter]).spawn().unwrap()
        });
        let frozen = Self { freezer, children, counters, file, namespace, _dir: dir };
        for child in &frozen.children {
            fs::write(group.join("cgroup.procs"), child.id().to_string()).unwrap();
        }
        for counter in &frozen.counters {
            come(|| count(counter) > 0);
        }
        frozen.freezer.freeze(PATIENCE).unwrap();
        Some(frozen)
    }

    fn pids(&self) -> [Pid; 2] {
        [Pid::from_child(&self.children[0]), Pid::from_child(&self.children[1])]
    }

    fn counts(&self) -> [u64; 2] {
        [count(&self.counters[0]), count(&self.counters[1])]
    }

    fn take(&self, locks: &[(Pid, RecordLock)]) -> Result<(), TakeError> {
        self.have(&Wanted { locks: locks.to_vec(), attachments: Vec::new() }, || Ok(()))
    }

    fn have(&self, wanted: &Wanted, follow: impl FnOnce() -> io::Result<()> + Send) -> Result<(), TakeError> {
        take_before_they_run(std::slice::from_ref(&self.freezer), &self.pids(), wanted, follow, PATIENCE)
    }

    fn are_killed(mut self) {
        for child in &mut self.children {
            assert_eq!(child.wait().unwrap().signal(), Some(9));
        }
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        self.freezer.thaw().ok();
        for child in &mut self.children {
            child.kill().ok();
            child.wait().ok();
        }
        let deadline = Instant::now() + PATIENCE;
        while fs::remove_dir(self.freezer.dir()).is_err() && Instant::now() < deadline {
            std::thread::yield_now();
        }
    }
}

fn count(counter: &Path) -> u64 {
    fs::read_to_string(counter).ok().and_then(|text| text.trim().parse().ok()).unwrap_or_default()
}

fn come(what: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !what() {
        assert!(Instant::now() < deadline, "it does not come");
        std::thread::yield_now();
    }
}

fn maps(pid: Pid) -> String {
    fs::read_to_string(format!("/proc/{pid}/maps")).unwrap()
}

#[test]
fn locks_are_there_and_the_processes_run_on() {
    for frozen in Frozen::all("taken") {
        let [first, second] = frozen.pids();
        let before = [first, second].map(maps);
        let other = RecordLock { descriptor: DESCRIPTOR, for_writing: true, start: 200, length: 1 };
        let wanted = [(first, LOCKS[0]), (second, other), (first, LOCKS[1])];
        assert_eq!(missing(&wanted).unwrap(), wanted);
        frozen.take(&wanted).unwrap();
        assert_eq!(missing(&wanted).unwrap(), []);
        assert_eq!(missing(&[(second, LOCKS[0])]).unwrap().len(), 1);
        assert_eq!(owners().unwrap().get(&first), Some(&2));
        assert_eq!(owners().unwrap().get(&second), Some(&1));
        assert_eq!([first, second].map(maps), before);
        assert_eq!(frozen.freezer.state().unwrap(), FreezerState::Thawed);
        let then = frozen.counts();
        come(|| frozen.counts().iter().zip(then).all(|(now, then)| *now > then + 1));
        frozen.freezer.freeze(PATIENCE).unwrap();
        assert_eq!(of_process(first).unwrap(), LOCKS);
        assert_eq!(of_process(second).unwrap(), [other]);
        // Taken already: nothing changes.
        frozen.take(&wanted).unwrap();
        assert_eq!(missing(&wanted).unwrap(), []);
        assert_eq!(owners().unwrap().get(&first), Some(&2));
    }
}

#[test]
fn whoever_cannot_have_its_lock_never_runs() {
    for frozen in Frozen::all("refused") {
        let ours = File::options().read(true).write(true).open(&frozen.file).unwrap();
        fcntl_lock(&ours, FlockOperation::NonBlockingLockExclusive).unwrap();
        let then = frozen.counts();
        let error = frozen.take(&[(frozen.pids()[1], LOCKS[0])]).unwrap_err();
        assert!(matches!(error, TakeError::Refused { errno: Errno::AGAIN, .. }), "{error:?}");
        assert_eq!(frozen.counts(), then);
        frozen.are_killed();
    }
    for frozen in Frozen::all("no-descriptor") {
        let lock = RecordLock { descriptor: 77, ..LOCKS[0] };
        let error = frozen.take(&[(frozen.pids()[0], lock)]).unwrap_err();
        assert!(matches!(error, TakeError::Refused { errno: Errno::BADF, .. }), "{error:?}");
        frozen.are_killed();
    }
}

#[test]
fn those_that_may_have_run_are_killed() {
    for frozen in Frozen::all("thawed") {
        frozen.freezer.thaw().unwrap();
        let error = frozen.take(&[(frozen.pids()[0], LOCKS[0])]).unwrap_err();
        assert!(matches!(error, TakeError::NotFrozen { .. }), "{error:?}");
        frozen.are_killed();
    }
}

const SEGMENT: i32 = 32_773;
const AT: u64 = 0x7e00_0000_0000;

/// A segment of three pages, the last of which cannot be written to, from `start` on.
fn attachment(start: u64, read_only: bool) -> Attachment {
    let part = |first: u64, last: u64, prot, advice| Part {
        start: start + first * PAGE_SIZE,
        end: start + last * PAGE_SIZE,
        prot,
        advice,
    };
    // Not to be in a core file.
    let parts = vec![part(0, 2, if read_only { 1 } else { 3 }, 1 << 16), part(2, 3, 1, 0)];
    Attachment { id: SEGMENT, start, read_only, parts }
}

#[test]
fn segments_are_attached_before_the_processes_run() {
    for frozen in Frozen::all("attached") {
        let make = || ipc::make_segment(SEGMENT, PRIVATE, 2 * PAGE_SIZE + 9);
        let memory = frozen.namespace.run(make).unwrap().unwrap();
        memory.write_all_at(b"there", PAGE_SIZE).unwrap();
        let [first, second] = frozen.pids();
        let attachments = vec![
            (first, attachment(AT, false)),
            (second, attachment(AT, true)),
            // Twice, and the second time in place of the end of the first one.
            (first, attachment(AT + 2 * PAGE_SIZE, false)),
        ];
        let wanted = Wanted { locks: vec![(second, LOCKS[0])], attachments };
        let then = frozen.counts();
        let mut seen = None;
        let follow = || {
            seen = Some((frozen.counts(), frozen.namespace.run(ipc::segments)??));
            Ok(())
        };
        frozen.have(&wanted, follow).unwrap();
        let (counts, segments) = seen.unwrap();
        assert_eq!(counts, then, "nobody has run");
        // Each part of it is one.
        assert_eq!(segments[0].attached, 5);
        let lines = |pid| {
            let all = maps(pid);
            let found = all.lines().filter(|line| line.contains("/SYSV00000000")).map(|line| {
                let words: Vec<_> = line.split_ascii_whitespace().collect();
                assert_eq!(words[4], SEGMENT.to_string());
                format!("{} {}", words[0], words[1])
            });
            found.collect::<Vec<_>>()
        };
        assert_eq!(
            lines(first),
            [
                "7e0000000000-7e0000002000 rw-s",
                "7e0000002000-7e0000004000 rw-s",
                "7e0000004000-7e0000005000 r--s"
            ]
        );
        assert_eq!(lines(second), ["7e0000000000-7e0000002000 r--s", "7e0000002000-7e0000003000 r--s"]);
        for (pid, at) in [(first, AT), (first, AT + 2 * PAGE_SIZE), (second, AT)] {
            let mut found = [0; 5];
            let process = File::open(format!("/proc/{pid}/mem")).unwrap();
            process.read_exact_at(&mut found, at + PAGE_SIZE).unwrap();
            assert_eq!(&found, b"there");
        }
        let smaps = fs::read_to_string(format!("/proc/{second}/smaps")).unwrap();
        let about = smaps.split("7e0000000000-").nth(1).unwrap();
        let flags = about.lines().find(|line| line.starts_with("VmFlags:")).unwrap();
        assert!(flags.contains(" dd ") && !flags.contains(" mw "), "{flags}");
        come(|| frozen.counts().iter().zip(then).all(|(now, then)| *now > then + 1));
    }
}

#[test]
fn whoever_cannot_have_its_segment_never_runs() {
    for frozen in Frozen::all("segment-refused") {
        let wanted =
            Wanted { attachments: vec![(frozen.pids()[0], attachment(AT, false))], ..Wanted::default() };
        let then = frozen.counts();
        let error = frozen.have(&wanted, || Ok(())).unwrap_err();
        assert!(matches!(error, TakeError::NotAttached { segment: SEGMENT, .. }), "{error:?}");
        assert_eq!(frozen.counts(), then);
        frozen.are_killed();
    }
    for frozen in Frozen::all("not-finished") {
        let then = frozen.counts();
        let error = frozen.have(&Wanted::default(), || Err(io::ErrorKind::NotFound.into())).unwrap_err();
        assert!(matches!(error, TakeError::NotFinished(_)), "{error:?}");
        assert_eq!(frozen.counts(), then);
        frozen.are_killed();
    }
}
