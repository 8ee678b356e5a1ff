//! System V shared memory: whether we carry it, and with it all that is in the container's IPC namespace, or CRIU does.
//!
//! The page-shipper carries segments where there is much in them ([`object::carried`]). CRIU has to be told of all or of
//! nothing, so whatever of the namespace cannot be made elsewhere as it is leaves the whole to CRIU. What of it has gone in
//! rounds is then of no use.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};

use haulage_criu::ipc::{Attached, AttachedPart, IpcState};
use haulage_criu::shared::LeftOutMapping;
use haulage_pages::object::{ObjectId, ObjectMapping};
use haulage_pages::process::Process;
use haulage_sys::ipc::IpcNamespace;
use haulage_sys::{PAGE_SIZE, Pid};

/// Objects with their mappings.
type Objects = BTreeMap<ObjectId, Vec<ObjectMapping>>;

/// What is in the IPC namespace of `processes`, if that goes with the segments among `objects`: nothing, if CRIU is to carry it.
/// True of processes that are frozen; of others at this moment.
pub(crate) fn carried<'a>(
    processes: impl Iterator<Item = &'a Process> + Clone,
    objects: &Objects,
) -> Option<IpcState> {
    let segments = objects.iter().filter_map(|(id, mappings)| Some((id.segment()?, mappings)));
    let segments: BTreeMap<i32, _> = segments.collect();
    if segments.is_empty() {
        return None;
    }
    match state(processes, &segments) {
        Ok(state) => Some(state),
        Err(reason) => {
            tracing::info!(%reason, "System V shared memory is left to criu, which takes longer");
            None
        }
    }
}

/// # Errors
/// Why the namespace cannot be carried.
fn state<'a>(
    mut processes: impl Iterator<Item = &'a Process> + Clone,
    segments: &BTreeMap<i32, &Vec<ObjectMapping>>,
) -> io::Result<IpcState> {
    let refused = |reason: &str| Err(io::Error::other(reason.to_owned()));
    let first = processes.clone().next().ok_or(io::ErrorKind::NotFound)?.pid;
    let state = IpcState::of(&IpcNamespace::of(first)?)?;
    if let Some(reason) = state.obstacle() {
        return refused(reason);
    }
    let namespace = |pid: Pid| fs::metadata(format!("/proc/{pid}/ns/ipc")).map(|namespace| namespace.ino());
    let ours = namespace(first)?;
    if !processes.all(|process| namespace(process.pid).is_ok_and(|theirs| theirs == ours)) {
        return refused("not all processes are in one IPC namespace");
    }
    if segments.values().copied().flatten().any(|mapping| !is_64_bit(mapping.process.pid)) {
        return refused("a process of 32 bits has a segment attached, and cannot be made to attach it again");
    }
    for (id, size) in state.segments() {
        match segments.get(&id) {
            None => return refused("a segment is attached by nobody, or of huge pages"),
            Some(mappings) if !are_whole(mappings, size.div_ceil(PAGE_SIZE)) => {
                return refused("a part of a segment was unmapped");
            }
            Some(mappings) if !ends_with_zeros(mappings, size)? => {
                return refused("there is something behind the end of a segment");
            }
            Some(_) => {}
        }
    }
    match segments.keys().all(|id| state.segments().any(|(known, _)| known == *id)) {
        true => Ok(state),
        false => refused("a segment is of no namespace"),
    }
}

/// Whether a process runs a program of 64 bits, by the class of its file (`elf(5)`: `EI_CLASS`, `ELFCLASS64`).
fn is_64_bit(pid: Pid) -> bool {
    let mut head = [0; 5];
    let read = File::open(format!("/proc/{pid}/exe")).and_then(|exe| exe.read_exact_at(&mut head, 0));
    read.is_ok() && head == *b"\x7fELF\x02"
}

/// Whether each process has a segment of so many pages mapped from its beginning to its end, each time. `mappings` are in the
/// order of their addresses, for each process.
fn are_whole(mappings: &[ObjectMapping], pages: u64) -> bool {
    let mut open: Option<ObjectMapping> = None;
    for mapping in mappings {
        let is_next = |before: ObjectMapping| {
            before.process == mapping.process
                && before.pages.end() == mapping.pages.start()
                && before.first.0 + before.pages.count() == mapping.first.0
        };
        match (open, mapping.first.0) {
            (None, 0) => {}
            (Some(before), 1..) if is_next(before) => {}
            _ => return false,
        }
        let is_last = mapping.first.0 + mapping.pages.count() >= pages;
        open = (!is_last).then_some(*mapping);
    }
    open.is_none()
}

/// Whether there are zeros between the end of a segment and that of its last page, of which the kernel knows nothing.
fn ends_with_zeros(mappings: &[ObjectMapping], size: u64) -> io::Result<bool> {
    let end = size.next_multiple_of(PAGE_SIZE);
    if end == size {
        return Ok(true);
    }
    let last = size / PAGE_SIZE;
    let has_it = |mapping: &&ObjectMapping| mapping.first.0 + mapping.pages.count() > last;
    let mapping = mappings.iter().find(has_it).ok_or(io::ErrorKind::NotFound)?;
    let start = mapping.pages.start().address() + size - mapping.first.address();
    let mut bytes = vec![0; usize::try_from(end - size).unwrap_or_default()];
    File::open(format!("/proc/{}/mem", mapping.process.pid))?.read_exact_at(&mut bytes, start)?;
    Ok(bytes.iter().all(|byte| *byte == 0))
}

/// What of the `mappings` of a process, in the order of their addresses, are attached segments.
pub(crate) fn attached(pid: u32, mappings: &[LeftOutMapping]) -> Vec<Attached> {
    let mut all: Vec<Attached> = Vec::new();
    for mapping in mappings {
        let Some(id) = ObjectId(mapping.object).segment() else { continue };
        let LeftOutMapping { start, end, prot, madv, .. } = *mapping;
        let part = AttachedPart { start, end, prot, advice: madv.unwrap_or(0) };
        match all.last_mut() {
            Some(before) if mapping.offset != 0 => before.parts.push(part),
            _ => {
                let read_only = mapping.read_only == Some(true);
                all.push(Attached { pid, id, start, read_only, parts: vec![part] });
            }
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use haulage_pages::process::{Generation, Vpid};
    use haulage_pages::range::{PageNo, PageRange};

    fn mapping(vpid: u32, at: u64, first: u64, pages: u64) -> ObjectMapping {
        let process = Process { pid: rustix::process::getpid(), vpid: Vpid(vpid), generation: Generation(1) };
        let pages = PageRange::with_count(PageNo(at), pages).unwrap();
        ObjectMapping { process, pages, first: PageNo(first) }
    }

    #[test]
    fn a_segment_is_whole_where_every_part_of_it_is_mapped_where_it_belongs() {
        let whole =
            [mapping(1, 100, 0, 4), mapping(1, 104, 4, 6), mapping(1, 300, 0, 10), mapping(2, 100, 0, 10)];
        assert!(are_whole(&whole, 10));
        assert!(!are_whole(&whole, 11), "the end is missing");
        assert!(!are_whole(&whole[1..], 10), "the beginning is missing");
        assert!(!are_whole(&[mapping(1, 100, 0, 4), mapping(1, 105, 5, 5)], 10), "the middle is missing");
        assert!(!are_whole(&[mapping(1, 100, 0, 4), mapping(2, 104, 4, 6)], 10), "it is another's");
        assert!(!are_whole(&[mapping(1, 100, 0, 4), mapping(1, 105, 4, 6)], 10), "it was moved");
    }

    #[test]
    fn we_are_of_64_bits_and_nobody_is_not() {
        assert!(is_64_bit(rustix::process::getpid()));
        assert!(!is_64_bit(Pid::from_raw(i32::MAX).unwrap()));
    }

    #[test]
    fn what_lies_behind_the_end_is_looked_at() {
        let page = vec![0_u8; 3 * PAGE_SIZE as usize];
        let at = (page.as_ptr() as u64).next_multiple_of(PAGE_SIZE);
        let here = [mapping(1, at / PAGE_SIZE, 0, 2)];
        assert!(ends_with_zeros(&here, 2 * PAGE_SIZE).unwrap());
        assert!(ends_with_zeros(&here, PAGE_SIZE + 7).unwrap());
        let memory = File::options().write(true).open("/proc/self/mem").unwrap();
        memory.write_all_at(b"x", at + PAGE_SIZE + 6).unwrap();
        assert!(ends_with_zeros(&here, PAGE_SIZE + 7).unwrap());
        memory.write_all_at(b"x", at + PAGE_SIZE + 7).unwrap();
        assert!(!ends_with_zeros(&here, PAGE_SIZE + 7).unwrap());
        assert_eq!(page.iter().filter(|byte| **byte == b'x').count(), 2);
    }

    #[test]
    fn parts_of_a_segment_are_attached_together() {
        let mapping = |start, end, offset, object, prot, madv| {
            let read_only = (object == ObjectId::of_segment(7).0).then_some(true);
            LeftOutMapping { start, end, offset, object, prot, flags: 1, madv, read_only }
        };
        let (zero, seven) = (ObjectId::of_segment(0).0, ObjectId::of_segment(7).0);
        let mappings = [
            mapping(0x1000, 0x3000, 0, zero, 3, None),
            mapping(0x3000, 0x4000, 0x2000, zero, 1, Some(1 << 16)),
            mapping(0x5000, 0x6000, 0, 77, 3, None),
            mapping(0x8000, 0x9000, 0, seven, 1, None),
            mapping(0x9000, 0xc000, 0, zero, 3, None),
        ];
        let attached = attached(4, &mappings);
        let found: Vec<_> =
            attached.iter().map(|is| (is.id, is.start, is.read_only, is.parts.len())).collect();
        assert_eq!(found, [(0, 0x1000, false, 2), (7, 0x8000, true, 1), (0, 0x9000, false, 1)]);
        let part = AttachedPart { start: 0x3000, end: 0x4000, prot: 1, advice: 1 << 16 };
        assert_eq!(attached[0].parts[1], part);
    }
}
