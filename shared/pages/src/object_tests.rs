//! What counts as an object, and which are carried.

use super::*;
use crate::process::Vpid;
use rustix::fs::{FallocateFlags, fallocate, ftruncate};
use std::os::fd::OwnedFd;

fn process(vpid: u32) -> Process {
    Process { pid: rustix::process::getpid(), vpid: Vpid(vpid), generation: Generation(1) }
}

#[test]
fn segments_are_ours_together_and_only_when_they_are_worth_it() {
    let (major, minor) = device().unwrap();
    let line = |at: u64, pages: u64, offset: u64, inode: u64| {
        let end = at + pages * PAGE_SIZE;
        format!("{at:x}-{end:x} rw-s {offset:08x} {major:02x}:{minor:02x} {inode} /SYSV0000000a (deleted)\n")
    };
    let namespace = IpcNamespace::create().unwrap();
    let mut sleeper = std::process::Command::new("sleep");
    let there = namespace.as_file().try_clone().unwrap();
    IpcNamespace::from(OwnedFd::from(there)).enter_on_start(&mut sleeper);
    let mut sleeper = sleeper.arg("60").spawn().unwrap();
    let pid = haulage_sys::Pid::from_child(&sleeper);
    let of = |text: &str| {
        let maps = [(Process { pid, ..process(1) }, Maps::parse(text).unwrap())];
        carried(&maps).unwrap().into_keys().collect::<Vec<_>>()
    };
    // One of them is known by two mappings, which say nothing of its length together.
    let make = |id| namespace.run(move || ipc::make_segment(id, 10 + id, PAGE_SIZE)).unwrap().unwrap();
    let _memory = [make(0), make(9)];
    let few = line(0x1000_0000, 2048, 0, 0) + &line(0x2000_0000, 1023, 0x40_0000, 9);
    let enough = few.clone() + &line(0x3000_0000, 2048, 0, 9);
    let found = [of(&few), of(&enough)];
    // Another one that nobody has attached.
    let _other = make(5);
    let with_another = of(&enough);
    sleeper.kill().unwrap();
    sleeper.wait().unwrap();
    assert_eq!(found, [vec![], vec![ObjectId::of_segment(0), ObjectId::of_segment(9)]]);
    assert_eq!(with_another, []);
    assert_eq!(ObjectId::of_segment(9).segment(), Some(9));
    assert_eq!(ObjectId(9).segment(), None);
    let label = Label::of_segment(9, -7, 1 << 40);
    assert_eq!(label.segment(), Some((9, -7, 1 << 40)));
    assert_eq!(Label::new(b"SYSV a memfd").segment(), None);
}

#[test]
fn an_object_is_ours_only_if_every_mapping_of_it_is() {
    let (major, minor) = device().unwrap();
    let line = |at: u64, mode: &str, offset: u64, inode: u64, name: &str| {
        format!("{at:x}-{:x} {mode} {offset:08x} {major:02x}:{minor:02x} {inode} {name}\n", at + 0x4000)
    };
    let one = line(0x10_0000, "rw-s", 0, 7, ANONYMOUS)
        + &line(0x20_0000, "rw-s", 0, 8, ANONYMOUS)
        + &line(0x30_0000, "rw-s", 0, 9, "/memfd:x (deleted)")
        + &line(0x40_0000, "rw-s", 0, 10, "/SYSV00000000 (deleted)")
        + &line(0x50_0000, "rw-s", 0, 0, "/SYSV00000001 (deleted)")
        + "580000-584000 rw-s 00000000 ff:ff 11 /dev/zero (deleted)\n"
        + &line(0x60_0000, "rw-s", 0, 12, "[anon_shmem:not there]");
    let two = line(0x10_0000, "r--s", 0x2000, 7, RESTORED) + &line(0x20_0000, "r--p", 0, 8, ANONYMOUS);
    let maps = [(process(1), Maps::parse(&one).unwrap()), (process(2), Maps::parse(&two).unwrap())];
    let objects = carried(&maps).unwrap();
    assert_eq!(objects.keys().collect::<Vec<_>>(), [&ObjectId(7)]);
    let [first, second] = objects[&ObjectId(7)][..] else { panic!("{objects:?}") };
    assert_eq!((first.first, second.first), (PageNo(0), PageNo(2)));
    let touched = RangeSet::from_iter(PageRange::with_count(PageNo(0x101), 9));
    assert_eq!(second.of_object(&touched).runs(), [PageRange::with_count(PageNo(3), 3).unwrap()]);
    assert!(first.is_aligned_with(&ObjectMapping {
        first: PageNo(1),
        pages: PageRange::with_count(PageNo(0x101), 1).unwrap(),
        ..first
    }));
    assert!(!first.is_aligned_with(&second));
}

#[test]
fn extents_are_what_was_written_and_not_taken_out_again() {
    let file = File::from(memfd_create("x", MemfdFlags::CLOEXEC).unwrap());
    ftruncate(&file, 100 * PAGE_SIZE).unwrap();
    assert!(extents(&file).unwrap().is_empty());
    for page in [3, 4, 5, 50, 99] {
        file.write_all_at(&[1], page * PAGE_SIZE + 7).unwrap();
    }
    fallocate(&file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 4 * PAGE_SIZE, PAGE_SIZE)
        .unwrap();
    let pages: Vec<_> = extents(&file).unwrap().pages().map(|page| page.0).collect();
    assert_eq!(pages, [3, 5, 50, 99]);
}
