//! Shared memory that CRIU is not told of, on the installed CRIU, this kernel and runc: processes that share memory find
//! all of it, and go on sharing it, in a restore that inherits it; and so again after a second move.
//!
//! Needs root, criu and runc (`deploy/setup`), and a C compiler.

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

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use container::{Container, Stored, poll};
use haulage_criu::dump::Dump;
use haulage_criu::image::ImageError;
use haulage_criu::mask::{DEFAULT_PARENT, PagemapMask};
use haulage_criu::merge::{Assembly, Fill};
use haulage_criu::shared::{LeftOut, LeftOutProcess, SharedObject};
use haulage_criu::swrk::Criu;
use rustix::fs::{MemfdFlags, memfd_create};

/// What the tests take for the page store.
struct Carried {
    private: BTreeMap<u32, Stored>,
    left_out: LeftOut,
    memory: Vec<File>,
}

/// Freezes, hides private and shared memory, dumps, and ends the container.
fn take(container: &Container) -> Carried {
    let criu = Criu::find().expect("criu is needed: see deploy/setup");
    container.set_frozen(true);
    let mut mask = PagemapMask::prepare(&criu, Path::new(DEFAULT_PARENT)).unwrap();
    let mut carried = Carried { private: BTreeMap::new(), left_out: LeftOut::default(), memory: Vec::new() };
    for pid in container.pids() {
        let (private, shared) = (container::tracked(pid), shared(pid));
        assert!(!shared.is_empty(), "process {pid} shares nothing");
        let mappings = mask.cover_shared(pid, &private, &shared, &[]).unwrap();
        for mapping in &mappings {
            if carried.left_out.objects.iter().all(|object| object.id != mapping.object) {
                let link = format!("/proc/{pid}/map_files/{:x}-{:x}", mapping.start, mapping.end);
                let mut object = File::open(link).unwrap();
                let mut copy: File = memfd_create("/dev/zero", MemfdFlags::CLOEXEC).unwrap().into();
                let size = std::io::copy(&mut object, &mut copy).unwrap();
                assert_eq!(object.metadata().unwrap().ino(), mapping.object);
                carried.left_out.objects.push(SharedObject {
                    id: mapping.object,
                    size,
                    memfd: None,
                    segment: None,
                });
                carried.memory.push(copy);
            }
        }
        let vpid = container::vpid(pid);
        carried.private.insert(vpid, Stored::read(pid, &private));
        carried.left_out.processes.push(LeftOutProcess { pid: vpid, mappings, descriptors: Vec::new() });
    }
    carried.left_out.write(&container.images()).unwrap();
    let held = Dump::start(&criu, &container.request(), Some(mask)).unwrap();
    held.commit().unwrap();
    poll("the processes to be gone", || !container.is_running());
    container.delete();
    carried
}

/// The shared mappings of memory without a name.
fn shared(pid: i32) -> Vec<Range<u64>> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let nameless = maps.lines().filter(|line| line.contains("s 0") && line.ends_with("/dev/zero (deleted)"));
    let range = |line: &str| {
        let (start, end) = line.split_once(' ').unwrap().0.split_once('-').unwrap();
        u64::from_str_radix(start, 16).unwrap()..u64::from_str_radix(end, 16).unwrap()
    };
    nameless.map(range).collect()
}

fn assemble(container: &Container, carried: &Carried) -> Assembly {
    let assembly = Assembly::begin(&container.images(), &container.complete()).unwrap();
    for (pid, stored) in &carried.private {
        assembly.add_pages(*pid, &mut stored.clone(), Fill::AtRestore).unwrap();
    }
    assembly
}

#[test]
fn processes_that_share_memory_share_it_after_the_restore() {
    let container = Container::start_c("b1", include_str!("container/shares.c"));
    for _ in 0..2 {
        let carried = take(&container);
        assert_eq!(carried.left_out.objects.len(), 2);
        let ticks = container.status().0;
        let read = LeftOut::read(&container.images()).unwrap();
        assert_eq!(read, carried.left_out);
        assemble(&container, &carried).add_shared(&read).unwrap();
        let inherited: Vec<_> = carried.memory.iter().map(|memory| memory.as_raw_fd()).collect();
        container.restore_inheriting(&container.complete(), &inherited);
        drop(carried);
        container.wait_until_moved(ticks);
    }
}

#[test]
fn what_criu_has_dumped_too_is_refused() {
    let container = Container::start_c("b2", include_str!("container/shares.c"));
    let criu = Criu::find().unwrap();
    container.set_frozen(true);
    // Of the first process nothing is hidden, so CRIU dumps the object that all have.
    let mut mask = PagemapMask::prepare(&criu, Path::new(DEFAULT_PARENT)).unwrap();
    let mut left_out = LeftOut::default();
    for pid in container.pids().into_iter().skip(1) {
        let mappings = mask.cover_shared(pid, &[], &shared(pid), &[]).unwrap();
        let ids = mappings.iter().map(|mapping| mapping.object);
        left_out.objects.extend(ids.map(|id| SharedObject { id, size: 1 << 20, memfd: None, segment: None }));
        let (pid, descriptors) = (container::vpid(pid), Vec::new());
        left_out.processes.push(LeftOutProcess { pid, mappings, descriptors });
    }
    let held = Dump::start(&criu, &container.request(), Some(mask)).unwrap();
    let assembly = Assembly::begin(&container.images(), &container.complete()).unwrap();
    let error = assembly.add_shared(&left_out).unwrap_err();
    assert!(error.to_string().contains("shared memory"), "{error}");
    held.roll_back().unwrap();
    container.set_frozen(false);
    container.wait_for_progress();
    assert!(matches!(LeftOut::read(&container.images()), Ok(left_out) if left_out.objects.is_empty()));
    fs::write(container.images().join("haul-shared.img"), "damage").unwrap();
    assert!(matches!(LeftOut::read(&container.images()), Err(ImageError::Magic { .. })));
}
