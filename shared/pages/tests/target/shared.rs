//! Shared memory: without a name, memfds, and System V segments.

use std::time::{Duration, Instant};

use super::*;

/// Longer than it takes until nothing counts any more that may have been done while a segment was attached.
const LATE: Duration = Duration::from_millis(2500);

#[test]
fn shared_memory_that_processes_fork_into_map_elsewhere_and_give_up() {
    on_all("shared 0 700; write 0 0 400; shared 1 50; write 1 0 50; shared 2 20", |moving| {
        moving.round();
        moving.tell("write 0 30 20; zero 0 60 5; write 2 3 1; fork; brief 0 100 50");
        moving.round();
        moving.tell("readonly 0 200 10; unmap 0 300 50; punch 0 10 10; double 1 3; write 3 7 3");
        moving.target.signal_children();
        moving.round();
        // What the child has still mapped, the first one has not.
        moving.tell("onto 2 3; write 3 1 2; protect 0 220 10; unmap 1 0 50; shared 4 30; write 4 0 30");
        moving.round();
        moving.target.signal_children();
        moving.tell("brief 0 400 20; write 0 650 3; punch 4 2 2; file 5 2; shared 6 9; write 6 8 1; exec");
    });
}

#[test]
fn mappings_of_shared_memory_that_come_and_go_where_no_process_does() {
    if cannot_write_protect() {
        return;
    }
    // So that nothing but what page tables say decides what is sent.
    for policy in [TransferPolicy::All, TransferPolicy::Adaptive] {
        let mut target = Target::start_apart();
        target.tell("shared 0 700; write 0 0 400; shared 1 50; write 1 0 50; fork; fork");
        let mut moving = Move::begin(target, Box::new(WriteProtect::new().unwrap()), policy);
        moving.round();
        for _ in 0..3 {
            moving.target.signal_children();
            moving.tell(
                "write 0 30 20; zero 0 60 5; unmap 0 300 9; readonly 0 200 10; double 0 2; write 2 350 30",
            );
            moving.round();
            moving.tell("write 2 360 3; unmap 2 0 700; punch 0 12 3; write 1 3 3");
            moving.round();
            moving.tell("write 0 100 1; resize 1 60; shared 3 20; write 3 2 7");
            moving.round();
            moving.tell("write 0 13 1; unmap 3 0 20; write 0 399 1; resize 1 50; write 1 4 1");
        }
        moving.target.signal_children();
        moving.tell("double 0 2; write 2 380 2; onto 1 2; write 2 9 1");
        let last = moving.finish();
        // The first process has given up most of it, so most was looked at again, and some is certainly not sent.
        assert!(last.data_pages > 0, "{last:?}");
    }
}

#[test]
fn shared_memory_written_to_in_the_last_moment_by_one_that_is_gone() {
    if cannot_write_protect() {
        return;
    }
    for _ in 0..3 {
        let mut target = Target::start_apart();
        target.tell("shared 0 600; write 0 0 600");
        let mut moving =
            Move::begin(target, Box::new(WriteProtect::new().unwrap()), TransferPolicy::default());
        moving.round();
        moving.tell("fork");
        moving.round();
        moving.target.signal_children();
        moving.tell("brief 0 300 40; write 0 500 5");
        moving.finish();
    }
}

#[test]
fn shared_memory_written_to_by_a_process_whose_first_thread_has_ended() {
    if cannot_write_protect() {
        return;
    }
    for rounds in [1, 3] {
        let mut target = Target::start_apart();
        target.tell("shared 0 600; write 0 0 600; orphans");
        let mut moving =
            Move::begin(target, Box::new(WriteProtect::new().unwrap()), TransferPolicy::default());
        for _ in 0..rounds {
            moving.round();
        }
        moving.target.signal_children();
        moving.tell("write 0 500 1; write 0 500 1");
        moving.finish();
    }
}

#[test]
fn memfds_that_are_written_to_by_mappings_and_descriptors() {
    on_all("memfd 0 700; write 0 0 300; pwrite 0 300 100; memfd 1 50; pwrite 1 0 50; reader 2 1", |moving| {
        moving.round();
        moving.tell(
            "pwrite 0 30 20; write 0 40 20; zero 0 60 5; cut 1 40; hollow 0 70 5; fork; brief 0 100 50",
        );
        moving.round();
        moving.target.signal_children();
        moving.tell("putter 0 200 30; restore 0 10 5; pwrite 0 500 10; glance 0 600 20; readonly 0 250 10; unmap 0 300 50");
        moving.round();
        moving.tell("pwrite 0 320 3; double 1 3; write 3 7 3; pwrite 1 9 1; memfd 4 30; pwrite 4 0 30");
        moving.round();
        moving.target.signal_children();
        moving.tell("glance 0 620 4; restore 0 32 3; putter 1 3 4; brief 0 400 20; pwrite 0 650 3; hollow 4 2 2; seal 4 6");
    });
}

#[test]
fn a_memfd_that_is_written_to_by_descriptors_is_sent_no_more_than_that() {
    if cannot_write_protect() {
        return;
    }
    let mut target = Target::start_apart();
    target.tell("memfd 0 9000; write 0 0 5000; pwrite 0 5000 1000; fork; map 1 10; write 1 0 10; reader 2 0");
    let mut moving = Move::begin(target, Box::new(WriteProtect::new().unwrap()), TransferPolicy::All);
    let first = moving.round().dirty_pages;
    assert!((6010..6400).contains(&first), "{first}");
    // The target's own input and output dirty a few pages.
    let own = 8;
    for _ in 0..2 {
        let idle = moving.round();
        assert!(idle.dirty_pages <= own && idle.left_pages.is_some_and(|left| left <= own), "{idle:?}");
    }
    moving.tell("pwrite 0 100 37; read 0 0 5000; pwrite 0 8500 5; write 0 3000 3; restore 0 10 50");
    // What page tables tell is found at once, and the rest when there is time to compare.
    let told = moving.round().dirty_pages;
    assert!((8..45 + own).contains(&told), "{told}");
    if told < 45 {
        let rest = moving.round_that_finds(37).dirty_pages;
        assert!(rest <= 37 + own, "{rest}");
    }
    // A process that came and went may have written anything by mappings, which a comparison shows as well.
    moving.tell("putter 0 400 7; brief 0 500 9");
    let written = moving.round_that_finds(16).dirty_pages;
    assert!(written <= 16 + 3 * own, "{written}");
    moving.tell("pwrite 0 700 9");
    let last = moving.finish();
    assert!(last.data_pages <= 9 + 2 * own, "{last:?}");
}

#[test]
fn a_memfd_that_others_carry_is_none_of_ours() {
    let mut target = Target::start();
    // Sealed against writing once it is mapped; of which there is a private mapping; and nobody's mapping at all.
    target.tell(
        "memfd 0 20; write 0 0 9; seal 0 16; memfd 1 20; write 1 0 9; copy 1 2; memfd 3 20; unmap 3 0 20",
    );
    target.tell("memfd 4 20; pwrite 4 3 4");
    let tracker = best(&target);
    let mut moving = Move::begin(target, tracker, TransferPolicy::default());
    moving.round();
    let processes = process::list(&moving.target.cgroup_procs()).unwrap();
    let maps: Vec<_> = processes.iter().map(|process| (*process, Maps::of(process.pid).unwrap())).collect();
    assert_eq!(object::carried(&maps).unwrap().len(), 1);
    // One that is given up, and one that is taken over.
    moving.tell("pwrite 4 1 1; copy 4 5");
    moving.round();
    moving.tell("unmap 2 0 20");
    moving.finish();
}

#[test]
fn shared_memory_that_nobody_writes_to_is_not_sent_again() {
    if cannot_write_protect() {
        return;
    }
    let mut target = Target::start_apart();
    target.tell("shared 0 2000; write 0 0 1000; fork; map 1 10; write 1 0 10");
    let mut moving = Move::begin(target, Box::new(WriteProtect::new().unwrap()), TransferPolicy::All);
    let first = moving.round().dirty_pages;
    assert!((1010..1400).contains(&first), "{first}");
    // The target's own input and output dirty a few pages.
    let own = 8;
    for _ in 0..2 {
        let idle = moving.round();
        assert!(idle.dirty_pages <= own && idle.left_pages.is_some_and(|left| left <= own), "{idle:?}");
    }
    moving.tell("write 0 100 37; read 0 0 1000; write 0 1500 5");
    let written = moving.round().dirty_pages;
    assert!((42..42 + own).contains(&written), "{written}");
    moving.target.signal_children();
    moving.tell("write 0 700 9");
    let last = moving.finish();
    assert!(last.data_pages <= 16 + 9 + 2 * own, "{last:?}");
}

#[test]
fn shared_memory_is_not_sent_again_as_threads_start_or_as_numbers_of_processes_are_taken() {
    if cannot_write_protect() {
        return;
    }
    let mut target = Target::start_apart();
    target.tell("shared 0 2000; write 0 0 1000; fork; map 1 10; write 1 0 10");
    let mut moving = Move::begin(target, Box::new(WriteProtect::new().unwrap()), TransferPolicy::All);
    moving.round();
    // That of a thread is a page or two.
    moving.tell("crowd 30; write 0 100 7");
    let written = moving.round().dirty_pages;
    assert!((37..120).contains(&written), "{written}");
    // From here on the numbers are lower again, until those of the threads are passed over.
    moving.tell("numbers 1");
    assert!(moving.round().dirty_pages >= 1000);
    for _ in 0..3 {
        let idle = moving.round();
        assert!(idle.dirty_pages < 20, "{idle:?}");
    }
    moving.finish();
}

#[test]
fn a_final_round_that_came_to_nothing_leaves_the_account_of_a_memfd_as_it_was() {
    if cannot_write_protect() {
        return;
    }
    let mut target = Target::start_apart();
    target.tell("memfd 0 300; write 0 0 300");
    let mut moving = Move::begin(target, Box::new(WriteProtect::new().unwrap()), TransferPolicy::All);
    moving.round();
    moving.tell("pwrite 0 20 10");
    moving.target.freeze();
    // The target takes nothing of it.
    moving.source.final_round(&mut |_| ControlFlow::Continue(())).unwrap();
    moving.target.freezer().thaw().unwrap();
    let store = &mut moving.store;
    moving.source.round(Pace::default(), &mut |batch| into(store, &batch)).unwrap();
    moving.finish();
}

#[test]
fn shared_memory_that_is_given_back_and_then_read() {
    if cannot_write_protect() {
        return;
    }
    let ways = [(TransferPolicy::All, 0), (TransferPolicy::All, 2), (TransferPolicy::Adaptive, 1)];
    // Two segments are ours together only if they are large enough.
    for (kind, (policy, rounds)) in
        ways.map(|way| ("shared", way)).into_iter().chain(ways.map(|way| ("segment", way)))
    {
        let mut target = Target::start_apart();
        target.tell(&format!("{kind} 0 5000; write 0 0 2500; {kind} 1 50; write 1 0 50; fork"));
        let mut moving = Move::begin(target, Box::new(WriteProtect::new().unwrap()), policy);
        // Until what was attached is so no longer of late, and pages are not compared for that.
        let began = Instant::now();
        moving.round();
        moving.round();
        while kind == "segment" && began.elapsed() < LATE {
            moving.round();
        }
        moving.round();
        // What is read then is zeros, by the table of pages as the kernel keeps it still protected.
        moving.tell("punch 0 100 50; read 0 100 50; write 0 2000 9; punch 1 7 1; read 1 7 1");
        for _ in 0..rounds {
            moving.round();
        }
        moving.finish();
    }
}

#[test]
fn segments_that_processes_attach_write_to_and_detach() {
    on_all("segment 0 4000; write 0 0 300; segment 1 200; write 1 0 50; attach 0 2 1", |moving| {
        moving.round();
        moving.tell("write 0 30 20; zero 0 60 5; fork; brief 0 100 50; attach 1 3; write 3 7 3");
        moving.round();
        moving
            .tell("readonly 0 200 10; punch 0 10 10; glimpse 0 500 20; detach 3; segment 4 30; write 4 0 30");
        moving.target.signal_children();
        moving.round();
        moving.tell("attach 0 5; detach 0; write 5 70 3; detach 4; segment 6 9; write 6 8 1; protect 5 20 4");
        moving.target.signal_children();
        moving.round();
        moving.tell("glimpse 1 30 9; brief 5 400 20; write 5 3999 1");
    });
}

#[test]
fn segments_where_no_process_comes_or_goes_are_sent_no_more_than_was_written() {
    if cannot_write_protect() {
        return;
    }
    let mut target = Target::start_apart();
    target.tell("segment 0 9000; write 0 0 6000; fork; map 1 10; write 1 0 10; attach 0 2 1");
    let mut moving = Move::begin(target, Box::new(WriteProtect::new().unwrap()), TransferPolicy::All);
    let first = moving.round().dirty_pages;
    assert!((6010..6400).contains(&first), "{first}");
    // The target's own input and output dirty a few pages.
    let own = 8;
    for _ in 0..2 {
        let idle = moving.round();
        assert!(idle.dirty_pages <= own && idle.left_pages.is_some_and(|left| left <= own), "{idle:?}");
    }
    moving.tell("write 0 100 37; read 0 0 6000; write 0 8500 5");
    let written = moving.round().dirty_pages;
    assert!((42..42 + own).contains(&written), "{written}");
    // By a mapping that was made after one round and is gone before the next.
    moving.tell("glimpse 0 3000 16");
    let written = moving.round_that_finds(16).dirty_pages;
    assert!((16..16 + 3 * own).contains(&written), "{written}");
    moving.tell("glimpse 0 4000 7; write 0 5000 9");
    let last = moving.finish();
    assert!(last.data_pages <= 16 + 16 + 2 * own, "{last:?}");
}

#[test]
fn small_segments_are_none_of_ours_and_a_large_one_makes_them_so() {
    let mut target = Target::start();
    target.tell("segment 0 400; write 0 0 400; segment 1 100; write 1 0 9");
    let tracker = best(&target);
    let mut moving = Move::begin(target, tracker, TransferPolicy::default());
    moving.round();
    let ours = |moving: &Move| {
        let processes = process::list(&moving.target.cgroup_procs()).unwrap();
        let maps = processes.iter().map(|process| (*process, Maps::of(process.pid).unwrap()));
        object::carried(&maps.collect::<Vec<_>>()).unwrap().len()
    };
    assert_eq!(ours(&moving), 0);
    moving.tell("segment 2 4096; write 2 4000 96");
    assert_eq!(ours(&moving), 3);
    moving.round();
    moving.tell("detach 2; write 0 3 3");
    assert_eq!(ours(&moving), 0);
    moving.finish();
}
