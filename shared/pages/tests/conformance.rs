//! One suite for every tracker, against real processes: whatever they do to their memory, and whenever, the sealed
//! store of the target holds exactly what the frozen processes hold, byte for byte.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

#[path = "target/hardship.rs"]
mod hardship;
#[path = "target/shared.rs"]
mod shared;
mod target;

use std::fs::File;
use std::ops::ControlFlow;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use haulage_pages::PageBatch;
use haulage_pages::choice::Compression;
use haulage_pages::codec::Codec;
use haulage_pages::encode::Encoder;
use haulage_pages::frame::Batch;
use haulage_pages::maps::Maps;
use haulage_pages::none::NoTracking;
use haulage_pages::object;
use haulage_pages::owed::{Ask, Errand};
use haulage_pages::policy::{Pace, TransferPolicy};
use haulage_pages::process::{self, Process};
use haulage_pages::range::{PageNo, PageRange, RangeSet};
use haulage_pages::sealed::SealedStore;
use haulage_pages::serve::PageServer;
use haulage_pages::soft_dirty::SoftDirty;
use haulage_pages::source::{RoundReport, SourceEngine, SourceError, SourceOptions};
use haulage_pages::store::StoreLimits;
use haulage_pages::target::TargetEngine;
use haulage_pages::track::{DirtyTracker, Method, Tracking, Untracked};
use haulage_pages::write_protect::WriteProtect;
use haulage_sys::PAGE_BYTES;
use haulage_sys::pagemap::{Entry, Pagemap};
use haulage_sys::standstill;
use target::Target;

/// A migration of a target's memory into a directory.
struct Move {
    target: Target,
    source: SourceEngine,
    store: TargetEngine,
    dir: tempfile::TempDir,
}

impl Move {
    fn begin(target: Target, tracker: Box<dyn DirtyTracker>, policy: TransferPolicy) -> Self {
        let options = SourceOptions { policy };
        let (source, _) = SourceEngine::begin_with(&target.cgroup_procs(), tracker, None, options).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let store = TargetEngine::create(&dir.path().join("store"), StoreLimits::default()).unwrap();
        Self { target, source, store, dir }
    }

    fn round(&mut self) -> RoundReport {
        let store = &mut self.store;
        let pace = Pace { rate: Some(20_000.0), allowance: 100, ..Pace::default() };
        self.source.round(pace, &mut |batch| into(store, &batch)).unwrap()
    }

    /// Makes rounds until one has found so many pages, which is the one that is returned.
    fn round_that_finds(&mut self, pages: u64) -> RoundReport {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let report = self.round();
            if report.dirty_pages >= pages {
                return report;
            }
            assert!(Instant::now() < deadline, "no round finds {pages} pages: {report:?}");
        }
    }

    fn tell(&mut self, commands: &str) {
        self.target.tell(commands);
    }

    /// Freezes, finishes and compares every byte. Returns what the final round did.
    fn finish(self) -> RoundReport {
        self.finish_and(|_| {})
    }

    /// As [`Self::finish`], with a look at what is there then.
    fn finish_and(mut self, look: impl FnOnce(&RoundReport)) -> RoundReport {
        self.target.freeze();
        let store = &mut self.store;
        let (manifest, report) = self.source.final_round(&mut |batch| into(store, &batch)).unwrap();
        let finished = self.store.finish(&manifest).unwrap();
        assert_eq!(finished.pages, manifest.page_count());
        let sealed = SealedStore::open(&self.dir.path().join("store")).unwrap();
        let processes = process::list(&self.target.cgroup_procs()).unwrap();
        let listed: Vec<_> = processes.iter().map(|process| (process.vpid, process.generation)).collect();
        assert_eq!(sealed.processes().collect::<Vec<_>>(), listed);
        for process in &processes {
            compare(*process, &sealed);
        }
        compare_objects(&processes, &sealed);
        look(&report);
        report
    }

    /// As [`Self::finish`], but what the target lacks comes after the store is sealed, part of it because it is asked for.
    fn finish_owing(mut self) {
        self.target.freeze();
        let store = &mut self.store;
        let (manifest, mut owed, report) =
            self.source.final_round_owing(&mut |batch| into(store, &batch)).unwrap();
        let shared = report.data_pages;
        let finished = self.store.finish_owing(&manifest, &owed.manifest()).unwrap();
        assert_eq!((finished.pages, finished.owed_pages), (manifest.page_count(), owed.pages()));
        let sealed = SealedStore::open(&self.dir.path().join("store")).unwrap();
        assert_eq!(sealed.owed(), owed.pages());
        let mut server = PageServer::new(sealed).unwrap();
        let frozen = self.source.frozen();
        let mut encoder = Encoder::new(Compression::Only(Codec::Lz4));
        let mut pay = |errand: Errand| {
            for batch in frozen.read(&errand).unwrap() {
                let bytes = encoder.encode(batch).bytes;
                server.arrive(&Batch::decode(&bytes).unwrap()).unwrap();
            }
        };
        for (vpid, process) in owed.manifest().processes {
            let ask = |pages| Ask { vpid, generation: process.generation, pages };
            for run in process.pages.iter().step_by(3) {
                owed.asked(ask(run)).into_iter().for_each(&mut pay);
            }
        }
        while let Some(errand) = owed.next_errand() {
            pay(errand);
        }
        assert_eq!(server.store().owed(), 0);
        let processes = process::list(&self.target.cgroup_procs()).unwrap();
        for process in &processes {
            compare(*process, server.store());
        }
        assert!(shared > 0, "shared memory does not come later");
        compare_objects(&processes, server.store());
        self.target.freezer().thaw().unwrap();
        let errand = |vpid| {
            let process = owed.manifest().processes.get(&vpid)?.clone();
            let pages = process.pages.iter().next()?;
            owed.asked(Ask { vpid, generation: process.generation, pages })
        };
        let late = manifest.processes.into_keys().find_map(errand);
        let late = late.map(|errand| frozen.read(&errand));
        assert!(matches!(late, None | Some(Err(SourceError::NotFrozen))), "{late:?}");
    }
}

fn into(store: &mut TargetEngine, batch: &PageBatch) -> ControlFlow<()> {
    let encoded = Encoder::new(Compression::Only(Codec::Lz4)).encode(batch.clone());
    let applied = store.apply(&encoded.bytes).unwrap();
    assert_eq!((applied.data_pages, applied.zero_pages), (batch.data_pages(), batch.zero_pages()));
    ControlFlow::Continue(())
}

/// Holds the store against the frozen process, read page by page through other interfaces than those under test.
fn compare(process: Process, sealed: &SealedStore) {
    let memory = File::open(format!("/proc/{}/mem", process.pid)).unwrap();
    let pagemap = Pagemap::open(process.pid).unwrap();
    let stored = sealed.pages(process.vpid);
    let mapped = Maps::of(process.pid).unwrap().tracked_pages();
    assert!(
        stored.subtract(&mapped).is_empty(),
        "stored pages that are not mapped: {:?}",
        stored.subtract(&mapped)
    );
    let (mut there, mut here) = ([0; PAGE_BYTES], [0; PAGE_BYTES]);
    // In parts, for mappings of many gibibytes.
    const PART: u64 = 1 << 20;
    let parts = |run: PageRange| {
        (run.start().0..run.end().0)
            .step_by(PART as usize)
            .filter_map(move |start| PageRange::new(PageNo(start), PageNo((start + PART).min(run.end().0))))
    };
    let guards = Pagemap::open(process.pid).unwrap().guards().unwrap();
    let guards: RangeSet = guards.into_iter().filter_map(PageRange::of_addresses).collect();
    for run in mapped.iter().flat_map(parts) {
        let mut entries = vec![Entry::default(); run.count() as usize];
        pagemap.read_entries(run.start().0, &mut entries).unwrap();
        for (entry, page) in entries.iter().zip(run.start().0..) {
            let page = PageNo(page);
            if !entry.is_present() && !entry.is_swapped() || guards.contains(page) {
                assert!(!stored.contains(page), "{page:?} is stored and does not exist");
                continue;
            }
            memory.read_exact_at(&mut there, page.address()).unwrap();
            if stored.contains(page) {
                let one = PageRange::with_count(page, 1).unwrap();
                sealed.read_into(process.vpid, one, &mut here).unwrap();
                assert!(there == here, "{page:?} of {} differs", process.vpid);
            } else {
                assert!(there.iter().all(|byte| *byte == 0), "{page:?} of {} is not stored", process.vpid);
            }
        }
    }
}

/// What this kernel must have, best first. `HAULAGE_TEST_TRACKERS` says so where it is not the usual.
fn required() -> Vec<String> {
    let named = std::env::var("HAULAGE_TEST_TRACKERS").unwrap_or_else(|_| "write_protect".into());
    named.split_whitespace().map(str::to_owned).collect()
}

/// Whether a test that is about write protection has nothing to test on this kernel, which it says.
fn cannot_write_protect() -> bool {
    let cannot = !required().iter().any(|name| name == "write_protect");
    if cannot {
        eprintln!("not tested: this kernel need not write-protect");
    }
    cannot
}

fn best_method() -> Method {
    match required()[0].as_str() {
        "write_protect" => Method::WriteProtect,
        "soft_dirty" => Method::SoftDirty,
        other => unreachable!("HAULAGE_TEST_TRACKERS names {other}"),
    }
}

/// A tracker, unless this kernel has it not and need not.
fn maker<T: DirtyTracker + 'static, E: std::fmt::Debug>(
    name: &str,
    make: impl Fn(&Target) -> Result<T, E> + 'static,
) -> Option<MakeTracker> {
    let required = required().iter().any(|required| required == name);
    let target = Target::start();
    (required || make(&target).is_ok())
        .then(|| -> MakeTracker { Box::new(move |target| Box::new(make(target).unwrap())) })
}

type MakeTracker = Box<dyn Fn(&Target) -> Box<dyn DirtyTracker>>;

fn soft_dirty() -> Option<MakeTracker> {
    maker("soft_dirty", |target| SoftDirty::new(&target.cgroup_procs()))
}

fn trackers() -> Vec<MakeTracker> {
    let none = maker("none", |_| Ok::<_, ()>(NoTracking::new("chosen by the test".into())));
    let write_protect = maker("write_protect", |_| WriteProtect::new());
    none.into_iter().chain(write_protect).chain(soft_dirty()).collect()
}

/// The best of this kernel's.
fn best(target: &Target) -> Box<dyn DirtyTracker> {
    match best_method() {
        Method::SoftDirty => Box::new(SoftDirty::new(&target.cgroup_procs()).unwrap()),
        _ => Box::new(WriteProtect::new().unwrap()),
    }
}

/// As [`compare`], of shared memory: by every mapping of it.
fn compare_objects(processes: &[Process], sealed: &SealedStore) {
    let maps: Vec<_> = processes.iter().map(|process| (*process, Maps::of(process.pid).unwrap())).collect();
    let objects = object::carried(&maps).unwrap();
    let stored: Vec<_> = sealed.objects().map(|(_, id, _)| id).collect();
    assert!(stored.len() == objects.len() && stored.iter().all(|id| objects.contains_key(id)));
    let (mut there, mut here) = ([0; PAGE_BYTES], [0; PAGE_BYTES]);
    for (vpid, id, memory) in sealed.objects() {
        let name = std::fs::read_link(format!("/proc/self/fd/{}", memory.as_raw_fd())).unwrap();
        let is = object::memfd(id, &objects[&id]).unwrap();
        let label = is.as_ref().map_or(&b"/dev/zero"[..], |is| is.label.as_bytes());
        match id.segment() {
            Some(_) => assert_eq!(name.as_os_str(), "/SYSV00000000 (deleted)"),
            None => assert_eq!(name.as_os_str().as_bytes(), [b"/memfd:", label, b" (deleted)"].concat()),
        }
        // As whoever maps it would make it, so that what was never sent can be read.
        if id.segment().is_none() {
            memory.set_len(1 << 32).unwrap();
        }
        let pages = sealed.pages(vpid);
        for mapping in &objects[&id] {
            let process = File::open(format!("/proc/{}/mem", mapping.process.pid)).unwrap();
            for (index, page) in (mapping.pages.start().0..mapping.pages.end().0).enumerate() {
                process.read_exact_at(&mut there, PageNo(page).address()).unwrap();
                let page = PageNo(mapping.first.0 + index as u64);
                // What was never sent of a segment, whose length is as it was made.
                match page.address() < memory.metadata().unwrap().len() {
                    true => memory.read_exact_at(&mut here, page.address()).unwrap(),
                    false => here.fill(0),
                }
                assert!(there == here, "{page:?} of {id:?} differs");
                assert!(pages.contains(page) || here.iter().all(|byte| *byte == 0));
            }
        }
    }
}

/// Runs a scenario with every tracker and with every policy.
fn on_all(before: &str, scenario: impl Fn(&mut Move)) {
    let history = TransferPolicy::History { window: 4, threshold: 2 };
    for policy in [TransferPolicy::All, history, TransferPolicy::Adaptive] {
        for make in trackers() {
            let mut target = Target::start();
            target.tell(before);
            let tracker = make(&target);
            let mut moving = Move::begin(target, tracker, policy);
            scenario(&mut moving);
            moving.finish();
        }
    }
}

#[test]
fn a_process_that_writes_between_rounds() {
    on_all("map 0 2000; write 0 0 1500", |moving| {
        moving.round();
        for round in 0..5 {
            moving.tell(&format!("write 0 {} 300; zero 0 {} 20", round * 200, round * 7));
            moving.round();
        }
        moving.tell("write 0 1900 10");
    });
}

#[test]
fn what_a_round_leaves_is_what_the_freeze_finds() {
    for policy in [TransferPolicy::All, TransferPolicy::Adaptive] {
        for tracker in trackers() {
            let mut target = Target::start();
            target.tell("map 0 2000; write 0 0 1500; map 1 600; write 1 0 600; shared 2 100; write 2 0 100");
            let tracker = tracker(&target);
            let method = tracker.method();
            let mut moving = Move::begin(target, tracker, policy);
            moving.round();
            moving.tell("write 0 0 100");
            // Written before they are read, while they are read, and where nothing was when the round looked.
            let mut meanwhile =
                Some("write 0 50 300; map 3 80; write 3 0 80; dontneed 1 0 200; read 1 0 100; write 2 7 9");
            let Move { target, source, store, .. } = &mut moving;
            let round = source.round(
                Pace { rate: Some(20_000.0), allowance: 100, ..Pace::default() },
                &mut |batch| {
                    meanwhile.take().into_iter().for_each(|commands| target.tell(commands));
                    into(store, &batch)
                },
            );
            let left = round.unwrap().left_pages;
            let last = moving.finish();
            let found = (method != Method::None).then_some(last.data_pages + last.zero_pages);
            assert_eq!(left, found, "{method:?}, {policy:?}");
            assert!(left.is_none_or(|left| left >= 300 + 80 + 9), "{left:?}");
        }
    }
}

#[test]
fn a_round_whose_time_is_up_leaves_the_rest_whatever_the_policy() {
    let history = TransferPolicy::History { window: 3, threshold: 2 };
    // On a way that takes 1.2 s for what is sent between two looks at the time, or at once.
    for (policy, seconds, most) in [
        (TransferPolicy::All, 1, 1024),
        (TransferPolicy::All, 0, 0),
        (history, 0, 0),
        (TransferPolicy::Adaptive, 0, 0),
    ] {
        let mut target = Target::start();
        target.tell("map 0 9000; write 0 0 9000");
        let tracker = best(&target);
        let mut moving = Move::begin(target, tracker, policy);
        let pace = Pace { within: Some(Duration::from_secs(seconds)), ..Pace::default() };
        let Move { source, store, .. } = &mut moving;
        let round = source.round(pace, &mut |batch| {
            std::thread::sleep(Duration::from_millis(150 * seconds));
            into(store, &batch)
        });
        let round = round.unwrap();
        assert!(round.data_pages <= most && round.pending_pages >= 9000 - most, "{policy:?}: {round:?}");
        assert!((round.data_pages > 0) == (most > 0), "{policy:?}: {round:?}");
        let round = moving.round();
        assert!(round.data_pages >= 5000, "{policy:?}: {round:?}");
        moving.finish();
    }
}

#[test]
fn what_is_owed_at_the_freeze_and_comes_later_is_what_was_frozen() {
    for policy in [TransferPolicy::All, TransferPolicy::Adaptive] {
        for tracker in trackers() {
            let mut target = Target::start();
            // Shared memory has pages of the same numbers as private memory at low addresses.
            target.tell("low 4 400; write 4 0 400; shared 5 2000; write 5 0 2000");
            target.tell("map 0 2000; write 0 0 1500; fork; map 1 300; write 1 0 300; zero 1 0 40");
            let tracker = tracker(&target);
            let mut moving = Move::begin(target, tracker, policy);
            moving.round();
            moving.tell("write 4 20 300; write 5 100 900");
            moving.tell("write 0 100 400; zero 0 300 20; dontneed 0 1000 100; write 1 250 10");
            moving.round();
            moving.tell("write 0 200 700; map 2 100; write 2 0 100");
            moving.finish_owing();
        }
    }
}

#[test]
fn a_process_that_never_stops_writing() {
    on_all("map 0 4000; write 0 0 4000; race 0", |moving| {
        for _ in 0..8 {
            moving.round();
        }
    });
}

#[test]
fn mappings_that_come_go_move_and_are_replaced() {
    on_all("map 0 600; map 1 600; map 2 600; write 0 0 600; write 1 0 600; write 2 0 600", |moving| {
        moving.round();
        moving.tell("map 3 700; write 3 10 500; unmap 0 100 200; replace 1; write 1 5 30");
        moving.round();
        // What was clean at one address is now at another, and the address holds something else.
        moving.tell("onto 2 3; resize 1 1200; write 1 700 100");
        moving.round();
        moving.tell("resize 1 300; replace 3; write 3 0 9; map 5 50; write 5 0 50");
    });
}

#[test]
fn a_mapping_replaced_just_before_the_freeze() {
    on_all("map 0 500; write 0 0 500; map 1 500; write 1 0 500", |moving| {
        moving.round();
        moving.round();
        moving.tell("replace 0; onto 1 0");
    });
}

#[test]
fn whole_page_tables_that_move() {
    // 2 MiB each, aligned: the kernel moves the table and looks at no entry.
    on_all("aligned 0 1024; aligned 1 1024; aligned 2 512; write 0 0 1024; write 1 0 1024", |moving| {
        moving.round();
        moving.round();
        moving.tell("onto 0 1; write 2 5 5");
        moving.round();
        moving.round();
        moving.tell("aligned 3 1024; write 3 0 1024");
        moving.round();
        moving.round();
        moving.tell("onto 1 3");
    });
}

#[test]
fn huge_pages_of_zeros_and_pages_that_were_discarded_and_read() {
    on_all("thp 0 2048; write 0 0 1024; read 0 1024 1024; thp 1 1024; read 1 0 1024", |moving| {
        moving.round();
        moving.round();
        moving.tell("dontneed 0 0 512; read 0 0 512; write 0 1030 3; dontneed 0 600 8; read 0 600 8");
        moving.round();
        moving.round();
        moving.tell("dontneed 0 0 1024; read 0 0 1024; write 1 700 1");
    });
}

#[test]
fn discarded_zero_and_protected_pages() {
    on_all("map 0 3000; write 0 0 3000; map 1 100; read 1 0 100", |moving| {
        moving.round();
        moving.tell("dontneed 0 100 500; read 0 100 50; write 0 200 30; zero 0 700 100; protect 0 1000 64");
        moving.round();
        moving.tell("dontneed 0 800 100; read 0 800 100; write 1 7 3; protect 0 1500 10; dontneed 0 2000 10");
    });
}

#[test]
fn heap_threads_huge_pages_and_mappings_that_are_not_ours() {
    on_all(
        "brk 300; thp 0 1536; write 0 0 1536; thread; file 1 2; write 1 0 2; shared 2 64; write 2 0 64",
        |moving| {
            moving.round();
            moving.tell("brk 200; write 0 700 3; dontneed 0 512 512; thread; write 2 3 4; write 1 0 1");
            moving.round();
            moving.tell("write 0 600 1; brk 10; thread");
        },
    );
}

#[test]
fn children_have_memory_of_their_own() {
    on_all("map 0 800; write 0 0 800", |moving| {
        moving.round();
        moving.tell("fork; write 0 100 50");
        moving.round();
        moving.tell("fork; write 0 300 50");
        moving.target.signal_children();
        moving.round();
        moving.target.signal_children();
        moving.tell("fork");
    });
}

#[test]
fn exec_replaces_everything() {
    on_all("map 0 800; write 0 0 800", |moving| {
        moving.round();
        moving.tell("exec; map 1 500; write 1 0 500");
        moving.round();
        moving.tell("write 1 20 20; exec; map 0 900; write 0 3 3");
    });
}

#[test]
fn a_process_that_shares_memory_is_reported_and_whole() {
    let mut target = Target::start();
    target.tell("map 0 300; write 0 0 300; clonevm");
    let tracker = best(&target);
    let mut moving = Move::begin(target, tracker, TransferPolicy::All);
    let report = moving.round();
    let shares = |report: &haulage_pages::source::ProcessReport| {
        matches!(report.tracking, Tracking::Untracked(Untracked::SharesMemory { .. }))
    };
    assert_eq!(
        (report.processes.len(), report.processes.iter().filter(|process| shares(process)).count()),
        (2, 1)
    );
    moving.tell("write 0 30 30");
    moving.round();
    moving.finish();
}

#[test]
fn a_round_finds_exactly_what_was_written() {
    let mut target = Target::start();
    target.tell("map 0 3000; write 0 0 2000; read 0 2500 100");
    let (mut source, report) = SourceEngine::begin(&target.cgroup_procs(), SourceOptions::default()).unwrap();
    assert_eq!(report.method, best_method());
    assert_eq!(report.kernel.is_some(), best_method() != Method::WriteProtect, "{report:?}");
    assert!(
        report.processes.iter().all(|process| process.untracked().is_none() && process.refused().is_empty())
    );
    let mut round = |target: &mut Target, commands: &str| {
        target.tell(commands);
        let report = source.round(Pace::default(), &mut |_| ControlFlow::Continue(())).unwrap();
        assert_eq!(report.dirty_pages, report.data_pages + report.zero_pages);
        report.dirty_pages
    };
    let first = round(&mut target, "");
    assert!((2000..2300).contains(&first), "{first}");
    // The target's own input and output dirty a few pages of its heap and of the C library's.
    let own = 8;
    let idle = round(&mut target, "");
    assert!(idle <= own, "{idle}");
    let written = round(&mut target, "write 0 100 37; write 0 1500 1; zero 0 1998 10");
    assert!((48..=48 + own).contains(&written), "{written}");
    let idle = round(&mut target, "read 0 0 2000");
    assert!(idle <= own, "{idle}");
}

#[test]
fn a_look_tells_pages_that_are_written_from_those_at_rest() {
    let mut target = Target::start();
    target.tell("map 0 3000; write 0 0 3000");
    let (mut source, _) = SourceEngine::begin(&target.cgroup_procs(), SourceOptions::default()).unwrap();
    for _ in 0..5 {
        source.look().unwrap();
        target.tell("write 0 100 400");
    }
    let seen = source.seen();
    let written: u64 = seen.iter().filter(|(writes, _)| *writes > 0.0).map(|(_, pages)| pages).sum();
    let rest: u64 = seen.iter().filter(|(writes, _)| *writes == 0.0).map(|(_, pages)| pages).sum();
    assert!((400..440).contains(&written) && (2560..3000).contains(&rest), "{seen:?}");
}

#[test]
fn only_a_frozen_container_has_a_final_round_and_a_thawed_one_goes_on() {
    let mut target = Target::start();
    target.tell("map 0 500; write 0 0 500");
    let tracker = best(&target);
    let mut moving = Move::begin(target, tracker, TransferPolicy::All);
    moving.round();
    let ignore = &mut |_| ControlFlow::Continue(());
    assert!(matches!(moving.source.final_round(ignore), Err(SourceError::NotFrozen)));
    moving.target.freeze();
    let (manifest, report) = moving.source.final_round(ignore).unwrap();
    assert!(manifest.page_count() >= 500 && report.data_pages < 50, "{report:?}");
    moving.target.freezer().thaw().unwrap();
    moving.tell("write 0 10 10");
    let store = &mut moving.store;
    moving.source.round(Pace::default(), &mut |batch| into(store, &batch)).unwrap();
    let last = moving.finish();
    assert!(last.data_pages < 50, "{last:?}");
}

#[test]
fn a_process_that_does_not_stop_is_reported_and_tried_again() {
    let mut target = Target::start();
    target.tell("map 0 300; write 0 0 300");
    // A frozen process of version 1 cannot be stopped for injection; one of version 2 does not run the injected call.
    target.freeze();
    let began = SourceEngine::begin(&target.cgroup_procs(), SourceOptions::default());
    target.freezer().thaw().unwrap();
    let (mut source, report) = began.unwrap();
    assert!(matches!(report.processes[0].untracked(), Some(Untracked::Injection { .. })), "{report:?}");
    target.tell("write 0 30 30");
    let report = source.round(Pace::default(), &mut |_| ControlFlow::Continue(())).unwrap();
    assert!(report.processes[0].untracked().is_none() && report.dirty_pages >= 300, "{report:?}");
    target.tell("write 0 30 30");
}

#[test]
fn dropping_the_engine_leaves_nothing_in_the_target() {
    let mut target = Target::start();
    target.tell("map 0 300; write 0 0 300");
    let descriptors =
        |target: &Target| std::fs::read_dir(format!("/proc/{}/fd", target.pid())).unwrap().count();
    let before = descriptors(&target);
    let (mut source, _) = SourceEngine::begin(&target.cgroup_procs(), SourceOptions::default()).unwrap();
    source.round(Pace::default(), &mut |_| ControlFlow::Continue(())).unwrap();
    let registered = |target: &Target| {
        let smaps = std::fs::read_to_string(format!("/proc/{}/smaps", target.pid())).unwrap();
        smaps.lines().any(|line| line.starts_with("VmFlags:") && line.contains(" uw"))
    };
    assert!(registered(&target));
    drop(source);
    assert!(!registered(&target));
    assert_eq!(descriptors(&target), before);
    target.tell("write 0 0 300");
}

#[test]
fn marks_that_are_read_by_others_are_left_alone() {
    let Some(make) = soft_dirty() else { return };
    let mut target = Target::start();
    target.tell("map 0 300; write 0 0 300");
    let tracker = make(&target);
    let mut moving = Move::begin(target, tracker, TransferPolicy::All);
    assert!(moving.round().processes[0].untracked().is_none());
    moving.tell("marks; write 0 30 30");
    let report = moving.round();
    assert!(matches!(report.processes[0].untracked(), Some(Untracked::KernelCannot { .. })), "{report:?}");
    let page = moving.target.pid();
    let marked = |pid| {
        let mapped = Maps::of(pid).unwrap().tracked_pages();
        let pagemap = Pagemap::open(pid).unwrap();
        let entry = |page: PageNo| {
            let mut entries = [Entry::default()];
            pagemap.read_entries(page.0, &mut entries).unwrap();
            entries[0].is_soft_dirty()
        };
        mapped.pages().filter(|page| entry(*page)).count()
    };
    assert!(marked(page) >= 30);
    moving.finish();
}

#[test]
fn two_that_follow_soft_dirty_marks_do_not_take_each_others_away() {
    let Some(make) = soft_dirty() else { return };
    let mut target = Target::start();
    target.tell("map 0 900; write 0 0 900");
    let (tracker, second) = (make(&target), make(&target));
    let procs = target.cgroup_procs();
    let mut moving = Move::begin(target, tracker, TransferPolicy::All);
    moving.round();
    let (mut other, _) = SourceEngine::begin_with(&procs, second, None, SourceOptions::default()).unwrap();
    for turn in 0..4 {
        moving.tell(&format!("write 0 {} 40; map {} 50; write {} 0 50", turn * 50, turn + 1, turn + 1));
        other.round(Pace::default(), &mut |_| ControlFlow::Continue(())).unwrap();
        moving.tell(&format!("write 0 {} 40", turn * 50 + 300));
        moving.round();
        moving.tell(&format!("write 0 {} 40", turn * 50 + 500));
        other.round(Pace::default(), &mut |_| ControlFlow::Continue(())).unwrap();
    }
    drop(other);
    moving.finish();
}

#[test]
fn a_round_that_could_not_stop_all_threads_loses_nothing() {
    let Some(make) = soft_dirty() else { return };
    let mut target = Target::start();
    target.tell("map 0 500; write 0 0 500");
    let tracker = make(&target);
    let mut moving = Move::begin(target, tracker, TransferPolicy::All);
    moving.round();
    moving.tell("write 0 100 100; race 0");
    let pids = [moving.target.pid()];
    // Traced by us meanwhile, on another thread.
    let report = standstill::while_still(&|| Some(pids.to_vec()), std::time::Duration::from_secs(10), || {
        moving.round()
    });
    assert!(report.unwrap().dirty_pages >= 100);
    moving.tell("stop; write 0 300 10");
    assert!(moving.round().dirty_pages >= 110);
    moving.finish();
}
