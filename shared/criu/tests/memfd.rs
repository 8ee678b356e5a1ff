//! A memfd that CRIU is told nothing of, neither of mappings nor of descriptors, on the installed CRIU, this kernel and
//! runc: the processes that use it find it as it was, by each of them, and so again after a second move.
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
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, fchown};
use std::path::Path;

use container::{Container, Stored, poll};
use haulage_criu::descriptors::{LeftOutDescriptor, LeftOutFile, LeftOutMemfd};
use haulage_criu::dump::Dump;
use haulage_criu::mask::{DEFAULT_PARENT, PagemapMask};
use haulage_criu::merge::{Assembly, Fill};
use haulage_criu::shared::{LeftOut, LeftOutProcess, SharedObject};
use haulage_criu::swrk::Criu;
use haulage_sys::{Pid, pidfd};
use rustix::fs::{MemfdFlags, Mode, fchmod, fcntl_add_seals, fcntl_get_seals, memfd_create};

const LINK: &str = "/memfd:some work (deleted)";

/// A copy of the memfd, all but its descriptors, and what is to be written of it.
fn copy(link: &Path) -> (File, SharedObject) {
    let mut object = File::open(link).unwrap();
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let mut copy: File = memfd_create("some work", flags).unwrap().into();
    let size = std::io::copy(&mut object, &mut copy).unwrap();
    let is = object.metadata().unwrap();
    fchown(&copy, Some(is.uid()), Some(is.gid())).unwrap();
    fchmod(&copy, Mode::from_raw_mode(is.mode())).unwrap();
    let seals = fcntl_get_seals(&object).unwrap();
    fcntl_add_seals(&copy, seals).unwrap();
    let (mode, uid, gid, seals) = (is.mode(), is.uid(), is.gid(), seals.bits());
    let memfd = Some(LeftOutMemfd { name: b"some work".to_vec(), mode, uid, gid, seals });
    (copy, SharedObject { id: is.ino(), size, memfd, segment: None })
}

/// What CRIU is to see of a process's descriptors, and those of the memfd.
fn descriptors(
    pid: i32,
    files: &mut Vec<(LeftOutFile, (Pid, i32))>,
) -> (Vec<(u32, std::path::PathBuf)>, Vec<LeftOutDescriptor>) {
    let (mut shown, mut left_out) = (Vec::new(), Vec::new());
    let process = Pid::from_raw(pid).unwrap();
    for entry in fs::read_dir(format!("/proc/{pid}/fd")).unwrap() {
        let path = entry.unwrap().path();
        let number: u32 = path.file_name().unwrap().to_str().unwrap().parse().unwrap();
        let target = fs::read_link(&path).unwrap();
        if target != Path::new(LINK) {
            shown.push((number, target));
            continue;
        }
        let text = fs::read_to_string(format!("/proc/{pid}/fdinfo/{number}")).unwrap();
        let value = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim();
        let flags = u32::from_str_radix(value("flags:"), 8).unwrap();
        let (closes, flags) = (u32::from(flags & 0o200_0000 != 0), flags & !0o200_0000);
        let here = (process, number as i32);
        let known = files.iter().position(|(_, first)| pidfd::are_same_file(*first, here).unwrap());
        let index = known.unwrap_or_else(|| {
            let object = path.metadata().unwrap().ino();
            files.push((LeftOutFile { object, flags, position: value("pos:").parse().unwrap() }, here));
            files.len() - 1
        });
        left_out.push(LeftOutDescriptor { number, flags: closes, file: index as u32 });
    }
    (shown, left_out)
}

/// Freezes, hides private memory and the memfd, dumps, and ends the container. What the page store would hold is returned.
fn take(container: &Container) -> (BTreeMap<u32, Stored>, File) {
    let criu = Criu::find().expect("criu is needed: see deploy/setup");
    container.set_frozen(true);
    let mut mask = PagemapMask::prepare(&criu, Path::new(DEFAULT_PARENT)).unwrap();
    let (mut private, mut memfd, mut left_out) = (BTreeMap::new(), None, LeftOut::default());
    let mut files = Vec::new();
    for pid in container.pids() {
        let hidden = container::tracked(pid);
        let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
        let lines = maps.lines().filter(|line| line.ends_with(LINK));
        let ranges = lines.map(|line| line.split_once(' ').unwrap().0.split_once('-').unwrap());
        let address = |text| u64::from_str_radix(text, 16).unwrap();
        let shared: Vec<_> = ranges.map(|(start, end)| address(start)..address(end)).collect();
        assert_eq!(shared.len(), 2);
        let mappings = mask.cover_shared(pid, &hidden, &shared, &[]).unwrap();
        let first = mappings.first().unwrap();
        let link = format!("/proc/{pid}/map_files/{:x}-{:x}", first.start, first.end);
        memfd.get_or_insert_with(|| copy(Path::new(&link)));
        let (shown, descriptors) = descriptors(pid, &mut files);
        mask.cover_descriptors(pid, &shown).unwrap();
        let pid_there = container::vpid(pid);
        private.insert(pid_there, Stored::read(pid, &hidden));
        left_out.processes.push(LeftOutProcess { pid: pid_there, mappings, descriptors });
    }
    let (memory, object) = memfd.unwrap();
    left_out.objects.push(object);
    left_out.files.extend(files.into_iter().map(|(file, _)| file));
    assert_eq!(left_out.files.len(), 3);
    left_out.write(&container.images()).unwrap();
    let held = Dump::start(&criu, &container.request(), Some(mask)).unwrap();
    held.commit().unwrap();
    poll("the processes to be gone", || !container.is_running());
    container.delete();
    (private, memory)
}

#[test]
fn a_memfd_is_as_it_was_by_mappings_and_descriptors() {
    let container = Container::start_c("b3", include_str!("container/memfd.c"));
    for _ in 0..2 {
        let (private, memory) = take(&container);
        let dumped = fs::read_dir(container.images()).unwrap().map(|entry| entry.unwrap().file_name());
        let known = dumped.filter(|name| name == "memfd.img").count();
        assert_eq!(known, 0, "criu has seen the memfd");
        let ticks = container.status().0;
        let left_out = LeftOut::read(&container.images()).unwrap();
        let assembly = Assembly::begin(&container.images(), &container.complete()).unwrap();
        assembly.add_shared(&left_out).unwrap();
        for (pid, stored) in private {
            assembly.add_pages(pid, &mut stored.clone(), Fill::AtRestore).unwrap();
        }
        container.restore_inheriting(&container.complete(), &[memory.as_raw_fd()]);
        drop(memory);
        container.wait_until_moved(ticks);
    }
}

#[test]
fn descriptors_are_as_before_when_a_dump_is_undone() {
    let container = Container::start_c("b4", include_str!("container/memfd.c"));
    let criu = Criu::find().unwrap();
    container.set_frozen(true);
    let mut mask = PagemapMask::prepare(&criu, Path::new(DEFAULT_PARENT)).unwrap();
    let mut files = Vec::new();
    for pid in container.pids() {
        let (shown, left_out) = descriptors(pid, &mut files);
        assert!(!left_out.is_empty());
        mask.cover_shared(pid, &[], &[], &[]).unwrap();
        mask.cover_descriptors(pid, &shown).unwrap();
    }
    let held = Dump::start(&criu, &container.request(), Some(mask)).unwrap();
    // CRIU sees the memfd in mappings all the same, so that nobody may take its images for those without it.
    let assembly = Assembly::begin(&container.images(), &container.complete()).unwrap();
    let objects = files
        .iter()
        .map(|(file, _)| SharedObject { id: file.object, size: 1 << 20, memfd: None, segment: None })
        .collect();
    let error = assembly.add_shared(&LeftOut { objects, ..LeftOut::default() }).unwrap_err();
    assert!(error.to_string().contains("shared memory"), "{error}");
    held.roll_back().unwrap();
    container.set_frozen(false);
    container.wait_for_progress();
}
