//! What we rely on in CRIU, checked on the installed one, this kernel and runc: a masked dump leaves tracked memory out,
//! can be undone without a trace, and together with our pages restores what was there.
//!
//! Needs root, criu and runc (`deploy/setup`).

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test"
)]

mod container;
#[path = "container/program.rs"]
mod program;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use container::{Container, Stored, poll};
use haulage_criu::dump::{Dump, DumpError, Ipc, Network};
use haulage_criu::held::{HeldDump, HoldError};
use haulage_criu::mask::{DEFAULT_PARENT, PagemapMask};
use haulage_criu::merge::{Assembly, Fill, Merged, PageSource};
use haulage_criu::pagemap::PagemapReader;
use haulage_criu::swrk::Criu;
use haulage_criu::version::Version;
use rustix::process::{Pid, Signal, kill_process};

fn criu() -> Criu {
    Criu::find().expect("criu is needed: see deploy/setup")
}

/// Calls CRIU, freezes, hides the tracked memory, dumps.
fn dump(container: &Container) -> (HeldDump, Stored) {
    dump_by(container, call_criu(container))
}

fn call_criu(container: &Container) -> PagemapMask {
    let mut mask = PagemapMask::prepare(&criu(), Path::new(DEFAULT_PARENT)).unwrap();
    mask.call_criu(container.pid(), (Network::Empty, Ipc::Dumped), false, &container.work()).unwrap();
    mask
}

fn dump_by(container: &Container, mut mask: PagemapMask) -> (HeldDump, Stored) {
    container.set_frozen(true);
    let stored = container.hide(&mut mask);
    let held = Dump::start(&criu(), &container.request(), Some(mask)).unwrap();
    (held, stored)
}

/// Our only child.
fn child() -> Pid {
    let children: Vec<String> = std::fs::read_dir("/proc/self/task")
        .unwrap()
        .flat_map(|task| {
            let children = std::fs::read_to_string(task.unwrap().path().join("children")).unwrap();
            children.split_whitespace().map(ToOwned::to_owned).collect::<Vec<_>>()
        })
        .collect();
    assert_eq!(children.len(), 1, "{children:?}");
    Pid::from_raw(children[0].parse().unwrap()).unwrap()
}

#[test]
fn the_criu_that_waits_dumps() {
    let container = Container::start("a8");
    let mask = call_criu(&container);
    let waiting = child();
    let (held, stored) = dump_by(&container, mask);
    assert_eq!(tracer(container.pid()), Some(waiting));
    assert_eq!(assemble(&container, stored.clone()).stored, stored.pages());
    held.roll_back().unwrap();
}

#[test]
fn a_criu_that_died_waiting_is_replaced_and_one_that_is_not_needed_ends() {
    let container = Container::start("a9");
    let mask = call_criu(&container);
    kill_process(child(), Signal::KILL).unwrap();
    let exists = |pid: Pid| Path::new(&format!("/proc/{}/ns/mnt", pid.as_raw_nonzero())).exists();
    poll("its end", || !exists(child()));
    let (held, stored) = dump_by(&container, mask);
    assert_eq!(assemble(&container, stored.clone()).stored, stored.pages());
    held.roll_back().unwrap();
    let mask = call_criu(&container);
    let waiting = child();
    drop(mask);
    assert!(!exists(waiting));
}

/// As every CRIU does that finds it stale, or cannot keep it where it is.
#[test]
fn another_criu_may_remove_what_the_mask_covers() {
    let container = Container::start("a10");
    let called = AtomicBool::new(false);
    let removed = std::thread::scope(|scope| {
        let remover = scope.spawn(|| {
            let mut removed = 0;
            while removed < 5 && !called.load(Ordering::Acquire) {
                removed += u32::from(std::fs::remove_file("/run/criu.kdat").is_ok());
            }
            removed
        });
        let mut mask = PagemapMask::prepare(&criu(), Path::new(DEFAULT_PARENT)).unwrap();
        let namespaces = (Network::Empty, Ipc::Dumped);
        let outcome = mask.call_criu(container.pid(), namespaces, false, &container.work());
        called.store(true, Ordering::Release);
        outcome.unwrap();
        let removed = remover.join().unwrap();
        // Also while it waits: it would find one of its own then, and that of the host is no better.
        let waiting = child();
        std::fs::remove_file("/run/criu.kdat").ok();
        let (held, stored) = dump_by(&container, mask);
        assert_ne!(tracer(container.pid()), Some(waiting));
        assert_eq!(assemble(&container, stored.clone()).stored, stored.pages());
        held.roll_back().unwrap();
        removed
    });
    assert!(removed > 0);
}

fn assemble(container: &Container, mut stored: Stored) -> Merged {
    let assembly = Assembly::begin(&container.images(), &container.complete()).unwrap();
    assert_eq!(assembly.processes(), [1]);
    assembly.add_pages(1, &mut stored, Fill::AtRestore).unwrap()
}

#[test]
fn the_installed_criu_is_fit() {
    let dir = tempfile::tempdir().unwrap();
    let version = criu().fit(dir.path()).unwrap();
    assert_eq!(version, criu().version().unwrap());
    assert!(version >= Version::OLDEST);
}

#[test]
fn a_masked_dump_leaves_out_what_is_tracked_and_nothing_else() {
    let container = Container::start("a1");
    let (held, stored) = dump(&container);
    assert!(stored.pages() >= program::PAGES as u64);
    let mut pagemap = PagemapReader::open(&container.images(), 1).unwrap();
    let mut runs = stored.clone();
    let mut tracked = Vec::new();
    while let Some(run) = runs.next_run().unwrap() {
        tracked.push(run.start);
    }
    let mut dumped = 0;
    while let Some((run, _)) = pagemap.next_run().unwrap() {
        dumped += run.pages;
        assert!(!tracked.iter().any(|address| (run.start..run.end()).contains(address)));
    }
    assert!(dumped > 0, "the stack and changed pages of files are CRIU's");
    held.roll_back().unwrap();
}

#[test]
fn a_roll_back_leaves_the_container_frozen_and_whole() {
    let container = Container::start("a2");
    let (held, stored) = dump(&container);
    let ticks = container.status().0;
    assert!(held.is_alive());
    assert_eq!(assemble(&container, stored.clone()).stored, stored.pages());
    assert!(held.is_alive());
    held.roll_back().unwrap();
    assert!(container.is_frozen());
    assert_eq!(container.status().0, ticks, "it ran before it was thawed");
    container.set_frozen(false);
    container.wait_for_progress();
}

#[test]
fn a_dropped_hold_is_a_roll_back() {
    let container = Container::start("a3");
    let (held, _) = dump(&container);
    let ticks = container.status().0;
    drop(held);
    assert!(container.is_frozen());
    assert_eq!(container.status().0, ticks, "it ran before it was thawed");
    container.set_frozen(false);
    container.wait_for_progress();
}

#[test]
fn the_death_of_the_holder_is_a_roll_back() {
    let container = Container::start("a7");
    let mut holder = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "hold_until_killed", "--nocapture"])
        .env("BUNDLE", container.bundle())
        .env("ID", &container.id)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let held = container.work().join("held");
    poll("the hold", || held.exists());
    let ticks = container.status().0;
    assert!(tracer(container.pid()).is_some());
    holder.kill().unwrap();
    holder.wait().unwrap();
    poll("criu to let go", || tracer(container.pid()).is_none());
    assert!(container.is_frozen());
    assert_eq!(container.status().0, ticks, "it ran before it was thawed");
    container.set_frozen(false);
    container.wait_for_progress();
    // The next mask sweeps what the holder left.
    drop(PagemapMask::prepare(&criu(), Path::new(DEFAULT_PARENT)).unwrap());
    assert!(!Path::new(DEFAULT_PARENT).join(format!("haul-mask-{}-0", holder.id())).exists());
}

#[test]
#[ignore = "not a test but the holder that dies"]
fn hold_until_killed() {
    let bundle = PathBuf::from(std::env::var_os("BUNDLE").unwrap());
    let container = Container::attach(&bundle, &std::env::var("ID").unwrap());
    let held = dump(&container);
    std::fs::write(container.work().join("held"), "").unwrap();
    // Ends by being killed, or with the test that waits for it.
    std::thread::sleep(Duration::from_secs(60));
    drop(held);
}

#[test]
fn a_committed_container_is_gone_and_restores_where_it_stood() {
    let container = Container::start("a4");
    let (held, stored) = dump(&container);
    let ticks = container.status().0;
    let merged = assemble(&container, stored.clone());
    assert_eq!(merged.stored, stored.pages());
    assert!(container.is_running());
    held.commit().unwrap();
    poll("the processes to be gone", || !container.is_running());
    container.delete();
    assert_eq!(container.status().0, ticks);
    container.restore(&container.complete());
    poll("the first tick after the restore", || container.status().0 > ticks);
    container.wait_for_progress();
}

#[test]
fn a_hold_that_criu_loses_is_noticed() {
    let container = Container::start("a5");
    let (held, _) = dump(&container);
    let criu = tracer(container.pid()).expect("criu traces the container");
    // The cgroup as the checkpointer keeps it during a hold: nothing runs, whatever becomes of CRIU.
    container.set_frozen(true);
    kill_process(criu, Signal::KILL).unwrap();
    poll("the loss to be noticed", || !held.is_alive());
    assert!(matches!(held.commit(), Err(HoldError::Lost)));
    let ticks = container.status().0;
    assert!(container.is_frozen() && container.is_running());
    assert_eq!(container.status().0, ticks);
}

#[test]
fn a_dump_that_fails_says_why_and_changes_nothing() {
    let container = Container::start("a6");
    let mut request = container.request();
    // A mount that is neither dumped nor external.
    request.external_mounts.clear();
    container.set_frozen(true);
    let error = Dump::start(&criu(), &request, None).unwrap_err();
    let DumpError::Failed { cause } = error else { panic!("{error}") };
    assert!(!cause.errors.is_empty(), "no reason given");
    assert!(container.is_frozen());
    container.set_frozen(false);
    container.wait_for_progress();
}

/// The process that traces `pid`.
fn tracer(pid: i32) -> Option<Pid> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let tracer = status.lines().find_map(|line| line.strip_prefix("TracerPid:")).unwrap();
    Pid::from_raw(tracer.trim().parse().unwrap())
}
