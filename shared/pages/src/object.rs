//! Shared anonymous memory, as the objects that lie beneath the mappings of it.
//!
//! An object is memory of the kernel's own tmpfs, known by its inode number. Processes come to have it mapped by `fork`
//! and in no other way that needs no privilege; no descriptor of it exists. It is carried as if it were a process: its
//! pages are counted from its own beginning, its generation is its inode number, and it has an id that no process has
//! ([`Vpid::is_object`]).
//!
//! CRIU must see nothing of an object that we carry. So one of which any mapping is of another kind (private, or of a
//! memfd that has a name) is left to CRIU whole. What CRIU may see besides, such as a descriptor, shows in its images,
//! and the join refuses it there.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::OnceLock;

use haulage_sys::PAGE_SIZE;
use rustix::fs::{MemfdFlags, SeekFrom, major, memfd_create, minor, seek};
use rustix::io::Errno;

use crate::maps::{ANONYMOUS, Class, Maps, RESTORED, Region};
use crate::process::{Generation, Process};
use crate::range::{PageNo, PageRange, RangeSet};

/// What an object of ours is called, and was called by CRIU; the kernel adds `/memfd:` and ` (deleted)`.
pub(crate) const NAME: &str = "/dev/zero";

/// An object: its inode number. No other of this host has it as long as one mapping of it exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectId(pub u64);

impl ObjectId {
    /// As it goes with its pages.
    pub fn generation(self) -> Generation {
        Generation(self.0)
    }
}

/// A mapping of an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ObjectMapping {
    /// Whose.
    pub process: Process,
    /// Where, in the process.
    pub pages: PageRange,
    /// Which page of the object its first one is.
    pub first: PageNo,
}

impl ObjectMapping {
    /// Whether both map the object so that a page has the same place in the process, if both have it.
    pub(crate) fn is_aligned_with(&self, other: &Self) -> bool {
        self.process == other.process
            && self.pages.start().0.wrapping_sub(self.first.0)
                == other.pages.start().0.wrapping_sub(other.first.0)
    }

    /// Pages of the object, of those of the process that lie in this mapping.
    pub(crate) fn of_object(&self, pages: &RangeSet) -> RangeSet {
        let here = pages.iter().filter_map(|run| run.intersect(self.pages));
        here.filter_map(|run| {
            let first = run.start().0 - self.pages.start().0 + self.first.0;
            PageRange::with_count(PageNo(first), run.count())
        })
        .collect()
    }

    /// Opens the object for reading.
    ///
    /// # Errors
    /// When the mapping is not there any more, or we may not (`CAP_SYS_ADMIN`).
    pub(crate) fn open(&self, id: ObjectId) -> io::Result<File> {
        let file = File::open(self.link())?;
        match file.metadata()?.ino() == id.0 {
            true => Ok(file),
            false => Err(io::Error::new(io::ErrorKind::NotFound, "something else is mapped there by now")),
        }
    }

    fn link(&self) -> String {
        link_of(self.process, self.pages.addresses().start, self.pages.addresses().end)
    }
}

fn link_of(process: Process, start: u64, end: u64) -> String {
    format!("/proc/{}/map_files/{start:x}-{end:x}", process.pid)
}

/// Where an object of a store can be had: a descriptor of the process that took it in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) pid: u32,
    pub(crate) descriptor: u32,
    pub(crate) device: u64,
    pub(crate) inode: u64,
}

impl Place {
    /// Of an object that this process has open, and will keep so.
    pub(crate) fn of(object: &File) -> io::Result<Self> {
        let metadata = object.metadata()?;
        let descriptor = object.as_raw_fd().unsigned_abs();
        Ok(Self { pid: std::process::id(), descriptor, device: metadata.dev(), inode: metadata.ino() })
    }

    /// Opens it for reading and writing.
    ///
    /// # Errors
    /// `NotFound` when whoever held it is gone.
    pub(crate) fn open(&self) -> io::Result<File> {
        let path = format!("/proc/{}/fd/{}", self.pid, self.descriptor);
        let object = File::options().read(true).write(true).open(path)?;
        let metadata = object.metadata()?;
        match (metadata.dev(), metadata.ino()) == (self.device, self.inode) {
            true => Ok(object),
            false => {
                Err(io::Error::new(io::ErrorKind::NotFound, "the process that held shared memory is gone"))
            }
        }
    }
}

/// Every object of which all mappings in `maps` are ours to carry, with these mappings. `maps` are those of all processes
/// of a container.
///
/// # Errors
/// When the kernel's device of such memory cannot be found out.
pub fn carried(maps: &[(Process, Maps)]) -> io::Result<BTreeMap<ObjectId, Vec<ObjectMapping>>> {
    let device = device()?;
    let (mut objects, mut others) = (BTreeMap::<ObjectId, Vec<ObjectMapping>>::new(), BTreeSet::new());
    for (process, maps) in maps {
        for region in maps.regions().iter().filter(|region| region.device == device && region.inode != 0) {
            let id = ObjectId(region.inode);
            match mapping(*process, region) {
                Some(mapping) => objects.entry(id).or_default().push(mapping),
                None => {
                    others.insert(id);
                }
            }
        }
    }
    objects.retain(|id, _| !others.contains(id));
    Ok(objects)
}

/// The mapping, if it is one of anonymous memory.
fn mapping(process: Process, region: &Region) -> Option<ObjectMapping> {
    if region.class() != Class::Shared || !region.offset.is_multiple_of(PAGE_SIZE) {
        return None;
    }
    if region.is_shared_by_label() {
        let target = fs::read_link(link_of(process, region.start, region.end)).ok()?;
        if ![ANONYMOUS, RESTORED].iter().any(|name| target == Path::new(name)) {
            return None;
        }
    }
    let (pages, first) = (region.pages()?, PageNo(region.offset / PAGE_SIZE));
    // All its pages have a number.
    PageRange::with_count(first, pages.count())?;
    Some(ObjectMapping { process, pages, first })
}

/// The length of an object in bytes.
///
/// # Errors
/// When none of `mappings` is there any more.
pub fn size(id: ObjectId, mappings: &[ObjectMapping]) -> io::Result<u64> {
    let opened = mappings.first().ok_or(io::ErrorKind::NotFound)?.open(id)?;
    Ok(opened.metadata()?.len())
}

/// The device of the kernel's own tmpfs, of which shared anonymous memory and memfds are.
fn device() -> io::Result<(u32, u32)> {
    static DEVICE: OnceLock<(u32, u32)> = OnceLock::new();
    if let Some(device) = DEVICE.get() {
        return Ok(*device);
    }
    let device = File::from(memfd_create("haul-probe", MemfdFlags::CLOEXEC)?).metadata()?.dev();
    Ok(*DEVICE.get_or_init(|| (major(device), minor(device))))
}

/// The pages of an object that hold something, in memory or in swap. All others are zeros.
///
/// # Errors
/// What `lseek(2)` says.
pub(crate) fn extents(file: &File) -> io::Result<RangeSet> {
    let mut found = RangeSet::new();
    let mut at = 0;
    loop {
        let data = match seek(file, SeekFrom::Data(at)) {
            Ok(data) => data,
            // Nothing but a hole up to the end.
            Err(Errno::NXIO) => return Ok(found),
            Err(errno) => return Err(errno.into()),
        };
        let hole = seek(file, SeekFrom::Hole(data))?;
        let end = PageNo(hole.div_ceil(PAGE_SIZE));
        PageRange::new(PageNo::containing(data), end).into_iter().for_each(|run| found.insert(run));
        if hole <= data {
            return Ok(found);
        }
        at = hole;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::Vpid;
    use rustix::fs::{FallocateFlags, fallocate, ftruncate};
    use std::os::unix::fs::FileExt;

    fn process(vpid: u32) -> Process {
        Process { pid: rustix::process::getpid(), vpid: Vpid(vpid), generation: Generation(1) }
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
            + "500000-504000 rw-s 00000000 ff:ff 11 /dev/zero (deleted)\n"
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
}
