//! Processes that make it hard: that never stand still, that are large in one way or another, that others hold on to.

use std::fs;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use haulage_pages::in_flight::Rings;
use haulage_pages::obstacle::{self, Obstacle};
use haulage_pages::track::Untracked;

use super::*;

fn tracked(target: Target) -> Move {
    Move::begin(target, Box::new(WriteProtect::new().unwrap()), TransferPolicy::All)
}

fn processes(target: &Target) -> Vec<Process> {
    process::list(&target.cgroup_procs()).unwrap()
}

fn until(come: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !come() {
        assert!(Instant::now() < deadline, "what was waited for did not come");
    }
}

#[test]
fn processes_that_fork_exec_map_and_exit_all_the_time() {
    for rounds in [1, 12] {
        for tracker in trackers() {
            let mut target = Target::start();
            target.tell("map 0 300; write 0 0 300; churn; churn; churn");
            let tracker = tracker(&target);
            let mut moving = Move::begin(target, tracker, TransferPolicy::All);
            for _ in 0..rounds {
                moving.round();
            }
            moving.finish();
        }
    }
}

/// A kibibyte for each page of it would be 16 GiB.
#[test]
fn a_sparse_mapping_of_64_gib_costs_what_is_in_it() {
    if cannot_write_protect() {
        return;
    }
    let mut target = Target::start();
    target.tell("map 0 16777216; write 0 0 10; write 0 8000000 10; write 0 16777206 10");
    let mut moving = tracked(target);
    let began = Instant::now();
    let first = moving.round();
    moving.tell("write 0 5 3; write 0 12000000 10; dontneed 0 8000000 5");
    let second = moving.round();
    let took = began.elapsed();
    assert!((30..300).contains(&first.dirty_pages) && second.dirty_pages < 30, "{first:?} {second:?}");
    let status = fs::read_to_string(format!("/proc/{}/status", moving.target.pid())).unwrap();
    let tables = status.lines().find_map(|line| line.strip_prefix("VmPTE:")).unwrap();
    let tables: u64 = tables.trim().strip_suffix(" kB").unwrap().parse().unwrap();
    assert!(tables < 1024, "{tables} KiB of page tables");
    // A debug build on a busy machine; 0.1 ms is normal.
    assert!(took < Duration::from_secs(5), "{took:?} for two rounds");
    let dir = moving.dir.path().join("store");
    moving.tell("write 0 3 1");
    let last = moving.finish_and(|_| {
        let stored: u64 =
            fs::read_dir(&dir).unwrap().map(|file| file.unwrap().metadata().unwrap().blocks()).sum();
        assert!(stored * 512 < 2 << 20, "{stored} blocks of 512 bytes are stored");
    });
    assert!(last.scan < Duration::from_secs(5), "{last:?}");
}

#[test]
fn a_process_of_2000_threads() {
    if cannot_write_protect() {
        return;
    }
    let mut target = Target::start();
    target.tell("map 0 500; write 0 0 500; crowd 2000");
    let began = Instant::now();
    let mut moving = tracked(target);
    let tracking = began.elapsed();
    let report = moving.round();
    assert!(report.processes[0].untracked().is_none(), "{report:?}");
    moving.tell("write 0 100 20; crowd 10");
    moving.round();
    let took = moving.target.freezer().freeze(Duration::from_secs(5)).unwrap();
    println!("2000 threads: tracked in {tracking:?}, frozen in {took:?}");
    let last = moving.finish();
    assert!(last.data_pages < 500, "{last:?}");
}

#[test]
fn guards_are_no_pages() {
    if !haulage_sys::pagemap::tells_guards() {
        println!("this kernel does not tell guards");
        return;
    }
    on_all("map 0 600; write 0 0 600; guard 0 100 20", |moving| {
        moving.round();
        moving.tell("write 0 0 100; guard 0 300 5; map 1 50; guard 1 0 1; write 1 1 49");
        moving.round();
        moving.tell("guard 0 320 40");
    });
}

#[test]
fn memory_that_another_userfaultfd_holds_is_sent_in_the_end() {
    if cannot_write_protect() {
        return;
    }
    let mut target = Target::start();
    target.tell("map 0 300; write 0 0 300; map 1 50; write 1 0 50; userfaultfd 1");
    let mut moving = tracked(target);
    let report = moving.round();
    assert_eq!(report.processes[0].refused().len(), 1, "{report:?}");
    moving.tell("write 0 30 30; write 1 10 10");
    let last = moving.finish();
    assert!((50..200).contains(&last.data_pages), "{last:?}");
}

/// What another process traces cannot be tracked, runs on, and can be once it is let go.
#[test]
fn a_traced_process_is_told_and_not_touched() {
    if cannot_write_protect() {
        return;
    }
    let mut target = Target::start();
    target.tell("map 0 300; write 0 0 300; traced");
    let found = obstacle::first(&processes(&target)).unwrap().unwrap();
    let Obstacle::Traced { by, name } = &found.obstacle else { panic!("{found:?}") };
    let child = target.pids().into_iter().find(|pid| *pid != target.pid()).unwrap();
    assert_eq!((found.process.pid, found.name.as_str()), (target.pid(), "target"));
    assert_eq!((*by, name.as_str()), (child.as_raw_nonzero().get() as u32, "target"));
    let mut moving = tracked(target);
    let report = moving.round();
    let one = report.processes.iter().find(|one| one.process.pid == moving.target.pid()).unwrap();
    assert!(matches!(one.untracked(), Some(Untracked::Injection { .. })), "{one:?}");
    moving.tell("write 0 10 10");
    rustix::process::kill_process(child, rustix::process::Signal::KILL).unwrap();
    until(|| obstacle::first(&processes(&moving.target)).unwrap().is_none());
    let report = moving.round();
    assert!(report.processes.iter().any(|one| one.untracked().is_none()), "{report:?}");
    moving.finish();
}

#[test]
fn what_cannot_be_dumped_is_noticed() {
    let mut target = Target::start();
    target.tell("map 0 50");
    assert_eq!(obstacle::first(&processes(&target)).unwrap(), None);
    let found = |target: &Target| obstacle::first(&processes(target)).unwrap().map(|found| found.obstacle);
    target.tell("userfaultfd 0");
    assert_eq!(found(&target), Some(Obstacle::Userfaultfd));
    let mut target = Target::start();
    target.tell("io_uring");
    assert_eq!(found(&target), Some(Obstacle::IoUring));
    let mut target = Target::start();
    target.tell("map 0 50; shared 1 50; orphans");
    until(|| found(&target) == Some(Obstacle::LeaderExited));
}

/// While it is frozen it is told from those that wait for the kernel.
#[test]
fn a_stopped_process_is_noticed_frozen_or_not() {
    let mut target = Target::start();
    target.tell("map 0 50");
    let stopped = || obstacle::first_stopped(&processes(&target)).unwrap().map(|found| found.obstacle);
    let frozen = || {
        target.freeze();
        let found = stopped();
        target.freezer().thaw().unwrap();
        found
    };
    assert_eq!((stopped(), frozen()), (None, None));
    rustix::process::kill_process(target.pid(), rustix::process::Signal::STOP).unwrap();
    until(|| stopped().is_some());
    assert_eq!((stopped(), frozen()), (Some(Obstacle::Stopped), Some(Obstacle::Stopped)));
    rustix::process::kill_process(target.pid(), rustix::process::Signal::CONT).unwrap();
    until(|| stopped().is_none());
    assert_eq!(frozen(), None);
}

/// A device writes to the pages all the time, and nobody else does.
#[test]
fn pages_that_a_device_fills() {
    if cannot_write_protect() {
        return;
    }
    let mut target = Target::start();
    target.tell("map 0 200; write 0 0 200; direct 0");
    let mut moving = tracked(target);
    for _ in 0..20 {
        moving.round();
    }
    moving.target.freeze();
    let (rings, settled) = Rings::settled(&processes(&moving.target)).unwrap();
    assert!(settled);
    let last = moving.finish_and(|_| assert!(!rings.have_moved().unwrap()));
    assert!(last.dirty_pages >= 200, "{last:?}");
}

#[test]
fn requests_that_end_while_all_stands_still_are_waited_for_and_noticed() {
    let mut target = Target::start();
    target.tell("requests 6");
    target.freeze();
    let mut ends: Vec<_> = (100..106).map(|descriptor| target.writable(descriptor)).collect();
    let late = ends.pop().unwrap();
    let began = Instant::now();
    let slowly = std::thread::spawn(move || {
        for mut end in ends {
            std::thread::sleep(Duration::from_millis(5));
            end.write_all(b"x").unwrap();
        }
        Instant::now()
    });
    let (rings, settled) = Rings::settled(&processes(&target)).unwrap();
    let (over, last) = (Instant::now(), slowly.join().unwrap());
    assert!(settled && over > last, "{:?} against {:?}", over - began, last - began);
    assert!(!rings.have_moved().unwrap());
    (&late).write_all(b"x").unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    while !rings.have_moved().unwrap() {
        assert!(Instant::now() < deadline, "an event was not noticed");
    }
}
