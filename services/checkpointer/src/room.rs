//! How much CRIU's images may come to.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::fd::{AsFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use haulage_engine::BundleFacts;
use haulage_pages::maps::{Class, Maps};
use haulage_pages::object::{self, ObjectId};
use haulage_pages::process::Process;
use haulage_protocol::checkpointer::SourceTmpfs;
use haulage_protocol::unit::Bytes;
use haulage_sys::ipc::{self, IpcNamespace};
use haulage_sys::{Pid, pidfd};

use crate::segments;

/// What is not counted: descriptions, queues of sockets and pipes, deleted files, and what relocation has written to
/// programs' read-only data.
const BESIDES: u64 = 64 << 20;
/// A block of `st_blocks` (stat(2)).
const BLOCK: u64 = 512;

/// What CRIU's images of a running container may come to: whatever it is left to carry, with mappings taken for full. Of
/// tmpfs mounts `carried` go without it. Processes may end meanwhile, and what they have may grow.
///
/// # Errors
/// When mappings cannot be read.
pub(crate) fn of_images(
    processes: &[Process],
    bundle: &BundleFacts,
    carried: &[SourceTmpfs],
) -> io::Result<Bytes> {
    let mut all = Vec::new();
    for process in processes {
        match Maps::of(process.pid) {
            Err(error) if error.is_gone() => {}
            maps => all.push((*process, maps.map_err(io::Error::other)?)),
        }
    }
    let mut objects = object::carried(&all)?;
    if segments::carried(all.iter().map(|(process, _)| process), &objects).is_none() {
        objects.retain(|id, _| id.segment().is_none());
    }
    let objects: BTreeSet<ObjectId> = objects.into_keys().collect();
    let mapped = left_to_criu(&all, &objects);
    let ours = objects.into_iter().map(|id| id.0).collect();
    let mut memfds = Memfds { ours, seen: BTreeSet::new() };
    let memfds: u64 = processes.iter().map(|process| memfds.left_to_criu(*process)).sum();
    let others = bundle.tmpfs.iter().filter(|tmpfs| carried.iter().all(|carried| carried.at != tmpfs.at));
    let tmpfs: u64 = others.map(|tmpfs| used(bundle.init_pid, &tmpfs.at)).sum();
    let init = Pid::from_raw(bundle.init_pid).ok_or(io::ErrorKind::InvalidInput)?;
    let unattached = unattached(&IpcNamespace::of(init)?)?;
    let parts = [mapped, memfds, tmpfs, unattached];
    Ok(Bytes(parts.into_iter().fold(BESIDES, u64::saturating_add)))
}

/// Bytes of System V shared memory that nobody has attached.
fn unattached(namespace: &IpcNamespace) -> io::Result<u64> {
    let segments = namespace.run(ipc::segments)??;
    let unattached = segments.iter().filter(|segment| segment.attached == 0);
    Ok(unattached.fold(0, |bytes, segment| bytes.saturating_add(segment.size)))
}

/// Bytes of mappings, but for those of the shared memory that goes without CRIU.
fn left_to_criu(all: &[(Process, Maps)], carried: &BTreeSet<ObjectId>) -> u64 {
    let (mut bytes, mut shared) = (0_u64, BTreeSet::new());
    for region in all.iter().flat_map(|(_, maps)| maps.regions()) {
        let counts = match (region.class(), region.shared) {
            (Class::Tracked, _) => false,
            (_, false) => region.writable,
            (Class::Shared, true) => {
                let id = ObjectId::of(region);
                !carried.contains(&id) && shared.insert(id)
            }
            // Of huge pages.
            (Class::Criu, true) => region.name.ends_with(" (deleted)") && shared.insert(ObjectId::of(region)),
        };
        if counts {
            bytes = bytes.saturating_add(region.end - region.start);
        }
    }
    bytes
}

/// Memfds, of which each counts once.
struct Memfds {
    /// Mapped, and carried without CRIU unless a descriptor is against it.
    ours: BTreeSet<u64>,
    seen: BTreeSet<u64>,
}

impl Memfds {
    /// Bytes of those that a process has open. What it closes meanwhile does not count.
    fn left_to_criu(&mut self, process: Process) -> u64 {
        let mut bytes = 0_u64;
        let open = fs::read_dir(format!("/proc/{}/fd", process.pid)).into_iter().flatten();
        for path in open.flatten().map(|entry| entry.path()) {
            let is_memfd = fs::read_link(&path)
                .is_ok_and(|to| to.as_os_str().as_encoded_bytes().starts_with(b"/memfd:"));
            let Some(found) = fs::metadata(&path).ok().filter(|_| is_memfd) else { continue };
            let number = path.file_name().and_then(|name| name.to_str()?.parse().ok());
            let is_ours = self.ours.contains(&found.ino()) && number.is_some_and(|n| is_plain(process, n));
            if !is_ours && self.seen.insert(found.ino()) {
                bytes = bytes.saturating_add(found.blocks().saturating_mul(BLOCK));
            }
        }
        bytes
    }
}

/// Whether a descriptor has neither a lock nor an owner for signals, with which the page-shipper's memfds become CRIU's
/// ([`crate::descriptors`]).
fn is_plain(process: Process, number: RawFd) -> bool {
    let text = fs::read_to_string(format!("/proc/{}/fdinfo/{number}", process.pid)).unwrap_or_default();
    let owner = || {
        let opened = pidfd::open(process.pid).ok()?;
        let ours = pidfd::get_fd(opened.as_fd(), number).ok()?;
        pidfd::has_owner(&ours).ok()
    };
    !text.contains("lock:") && owner() == Some(false)
}

/// Bytes in the file system at `at` of the container; none where nothing is found.
fn used(init: i32, at: &str) -> u64 {
    let path = Path::new("/proc").join(init.to_string()).join("root").join(at.trim_start_matches('/'));
    let space = rustix::fs::statvfs(&path);
    space.map_or(0, |space| space.f_blocks.saturating_sub(space.f_bfree).saturating_mul(space.f_frsize))
}

#[cfg(test)]
mod tests {
    use super::*;
    use haulage_pages::process::{Generation, Vpid};
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    fn process(vpid: u32) -> Process {
        Process { pid: rustix::process::getpid(), vpid: Vpid(vpid), generation: Generation(1) }
    }

    #[test]
    fn what_criu_is_left_to_carry_counts_and_shared_memory_once() {
        let maps = Maps::parse(
            "10000-20000 rw-p 00000000 00:00 0 \n\
             20000-30000 r-xp 00000000 08:01 5 /bin/program\n\
             30000-31000 rw-p 00010000 08:01 5 /bin/program\n\
             40000-80000 rw-s 00000000 00:01 7 /SYSV00000000 (deleted)\n\
             90000-91000 rw-s 00000000 08:01 9 /data/mapped\n",
        )
        .unwrap();
        let all = [(process(1), maps.clone()), (process(2), maps)];
        let segment = ObjectId::of_segment(7);
        assert_eq!(left_to_criu(&all, &BTreeSet::new()), 2 * 0x1000 + 0x40000);
        assert_eq!(left_to_criu(&all, &BTreeSet::from([segment])), 2 * 0x1000);
    }

    #[test]
    fn system_v_memory_that_nobody_has_attached_counts() {
        let namespace = IpcNamespace::create().unwrap();
        let _memory = namespace.run(|| ipc::make_segment(3, ipc::PRIVATE, 5 << 20)).unwrap().unwrap();
        assert_eq!(unattached(&namespace).unwrap(), 5 << 20);
        assert_eq!(unattached(&IpcNamespace::create().unwrap()).unwrap(), 0);
    }

    #[test]
    fn of_memfds_those_count_that_nobody_has_mapped_or_that_are_locked() {
        let make = |name: &str| {
            let file = fs::File::from(memfd_create(name, MemfdFlags::CLOEXEC).unwrap());
            ftruncate(&file, 1 << 30).unwrap();
            std::os::unix::fs::FileExt::write_all_at(&file, &[1; 1 << 20], 0).unwrap();
            file
        };
        let (unmapped, ours) = (make("unmapped"), make("ours"));
        let _second = unmapped.try_clone().unwrap();
        let inode = ours.metadata().unwrap().ino();
        let bytes = |process| {
            let mut memfds = Memfds { ours: BTreeSet::from([inode]), seen: BTreeSet::new() };
            memfds.left_to_criu(process)
        };
        assert_eq!(bytes(process(1)), 1 << 20);
        ours.lock().unwrap();
        assert_eq!(bytes(process(1)), 2 << 20);
    }
}
