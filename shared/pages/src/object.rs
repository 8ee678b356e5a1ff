//! Shared anonymous memory and memfds, as the objects that lie beneath the mappings of them.
//!
//! An object is memory of the kernel's own tmpfs, known by its inode number. It is carried as if it were a process: its
//! pages are counted from its own beginning, its generation is its inode number, and it has an id that no process has
//! ([`Vpid::is_object`]). Anonymous memory processes come to have mapped by `fork` and in no other way that needs no
//! privilege; no descriptor of it exists. Of a memfd there are descriptors, by which it may be written to
//! ([`crate::contents`]).
//!
//! CRIU must see nothing of an object that we carry. So one of which any mapping is of another kind (private, say) is left
//! to CRIU whole; so is a memfd that no process has mapped, or that is sealed against writing. What CRIU may see besides,
//! such as a descriptor on its way through a socket, shows in its images, and the join refuses it there.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Arc, OnceLock};

use haulage_sys::{PAGE_BYTES, PAGE_SIZE};
use rustix::fs::{MemfdFlags, SealFlags, SeekFrom, fcntl_get_seals, major, memfd_create, minor, seek};
use rustix::io::Errno;

use crate::maps::{ANONYMOUS, Class, MEMFD, Maps, RESTORED, Region};
use crate::process::{Generation, Process};
use crate::range::{PageNo, PageRange, RangeSet};

/// What anonymous memory is called when we have restored it, or CRIU has.
const NAME: &[u8] = b"/dev/zero";
/// `O_NOATIME` of `open(2)`.
const NO_TRACE: i32 = 0o100_0000;
/// What the kernel puts behind the name of a memfd.
const DELETED: &[u8] = b" (deleted)";
/// Seals that keep nobody from filling a memfd and mapping it for writing.
const HARMLESS: SealFlags =
    SealFlags::SEAL.union(SealFlags::SHRINK).union(SealFlags::GROW).union(SealFlags::EXEC);

/// What a memfd is called, without the kernel's `/memfd:` and ` (deleted)`; nothing, of a process.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Label(Arc<[u8]>);

impl Label {
    pub(crate) fn new(bytes: &[u8]) -> Self {
        Self(bytes.into())
    }

    /// That of anonymous memory.
    pub(crate) fn anonymous() -> Self {
        Self::new(NAME)
    }

    /// Of what is mapped at a link under `map_files`, if it is an object at all.
    fn of_link(target: &[u8]) -> Option<Self> {
        if target == ANONYMOUS.as_bytes() {
            return Some(Self::anonymous());
        }
        let name = target.strip_prefix(MEMFD.as_bytes())?.strip_suffix(DELETED)?;
        u8::try_from(name.len()).ok().map(|_| Self::new(name))
    }

    /// The bytes of the name.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Its length; that of one that is too long is the longest, which no memfd has.
    pub(crate) fn length(&self) -> u8 {
        self.0.len().try_into().unwrap_or(u8::MAX)
    }

    /// Whether it is that of anonymous memory, of which there are no descriptors.
    pub(crate) fn is_anonymous(&self) -> bool {
        self.as_bytes() == NAME
    }
}

/// What a memfd is besides its content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Memfd {
    /// Its name.
    pub label: Label,
    /// Its length in bytes.
    pub size: u64,
    /// `st_mode` of `stat(2)`.
    pub mode: u32,
    /// User and group id that own it.
    pub owner: (u32, u32),
    /// `F_SEAL_…` bits.
    pub seals: u32,
}

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

    /// Opens the object for reading, which leaves no trace in its times.
    ///
    /// # Errors
    /// When the mapping is not there any more, or we may not (`CAP_SYS_ADMIN`).
    pub(crate) fn open(&self, id: ObjectId) -> io::Result<File> {
        let file = open_untraced(self.link().as_ref())?;
        match file.metadata()?.ino() == id.0 {
            true => Ok(file),
            false => Err(io::Error::new(io::ErrorKind::NotFound, "something else is mapped there by now")),
        }
    }

    fn link(&self) -> String {
        let addresses = self.pages.addresses();
        format!("/proc/{}/map_files/{:x}-{:x}", self.process.pid, addresses.start, addresses.end)
    }

    /// The name of what is mapped.
    pub(crate) fn label(&self) -> io::Result<Label> {
        let target = fs::read_link(self.link())?;
        Label::of_link(target.as_os_str().as_bytes()).ok_or_else(|| io::ErrorKind::NotFound.into())
    }
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

/// Every object that is ours to carry, with its mappings, all of which are in `maps`. These are those of all processes of a
/// container.
///
/// # Errors
/// When the kernel's device of such memory cannot be found out.
pub fn carried(maps: &[(Process, Maps)]) -> io::Result<BTreeMap<ObjectId, Vec<ObjectMapping>>> {
    let device = device()?;
    let mut objects = BTreeMap::<ObjectId, Vec<ObjectMapping>>::new();
    let (mut others, mut named) = (BTreeSet::new(), BTreeSet::new());
    for (process, maps) in maps {
        for region in maps.regions().iter().filter(|region| region.device == device && region.inode != 0) {
            let id = ObjectId(region.inode);
            if ![ANONYMOUS, RESTORED].contains(&region.name.as_str()) {
                named.insert(id);
            }
            match mapping(*process, region) {
                Some(mapping) => objects.entry(id).or_default().push(mapping),
                None => {
                    others.insert(id);
                }
            }
        }
    }
    objects.retain(|id, mappings| {
        !others.contains(id) && (!named.contains(id) || can_be_made_anew(*id, mappings))
    });
    Ok(objects)
}

/// Whether an object is one that can be made and filled elsewhere: anonymous, or a memfd without seals against that.
fn can_be_made_anew(id: ObjectId, mappings: &[ObjectMapping]) -> bool {
    // Some may have been given up meanwhile. What a mapping has behind the end of a file would be cut off.
    mappings.iter().find_map(|mapping| memfd_at(id, mapping).ok()).is_some_and(|memfd| match memfd {
        Some(memfd) => {
            memfd.size.is_multiple_of(PAGE_SIZE)
                && HARMLESS.contains(SealFlags::from_bits_retain(memfd.seals))
        }
        None => true,
    })
}

/// What the memfd is besides its content; `None` of anonymous memory, of which nobody has a descriptor.
///
/// # Errors
/// When none of `mappings` is there any more.
pub fn memfd(id: ObjectId, mappings: &[ObjectMapping]) -> io::Result<Option<Memfd>> {
    memfd_at(id, mappings.first().ok_or(io::ErrorKind::NotFound)?)
}

fn memfd_at(id: ObjectId, mapping: &ObjectMapping) -> io::Result<Option<Memfd>> {
    let label = mapping.label()?;
    if label.is_anonymous() {
        return Ok(None);
    }
    let file = mapping.open(id)?;
    let (metadata, seals) = (file.metadata()?, fcntl_get_seals(&file)?.bits());
    let owner = (metadata.uid(), metadata.gid());
    Ok(Some(Memfd { label, size: metadata.len(), mode: metadata.mode(), owner, seals }))
}

/// Opens what is at `path` for reading, which leaves its time of access as it is.
pub(crate) fn open_untraced(path: &Path) -> io::Result<File> {
    File::options().read(true).custom_flags(NO_TRACE).open(path)
}

/// The mapping, if it is one of an object.
fn mapping(process: Process, region: &Region) -> Option<ObjectMapping> {
    if region.class() != Class::Shared || !region.offset.is_multiple_of(PAGE_SIZE) {
        return None;
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

/// The object that a link under `/proc/<pid>/fd` leads to, which reads as `target`, if it is a memfd.
///
/// # Errors
/// When what it leads to cannot be told, or the kernel's device of such memory.
pub fn behind(link: &Path, target: &Path) -> io::Result<Option<ObjectId>> {
    if Label::of_link(target.as_os_str().as_bytes()).is_none() {
        return Ok(None);
    }
    let metadata = fs::metadata(link)?;
    let of_memfds = (major(metadata.dev()), minor(metadata.dev())) == device()?;
    Ok(of_memfds.then(|| ObjectId(metadata.ino())))
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

/// Reads whole pages from `first` on into `buffer`, which has room for that many, and says how many there are before the
/// end. What the last one has behind the end is zeros.
///
/// # Errors
/// What `pread(2)` says.
pub(crate) fn read_pages(file: &File, first: PageNo, buffer: &mut [u8]) -> io::Result<u64> {
    let mut done = 0;
    while let Some(rest) = buffer.get_mut(done..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, first.address() + done as u64) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    let pages = done.div_ceil(PAGE_BYTES);
    buffer.get_mut(done..pages * PAGE_BYTES).unwrap_or_default().fill(0);
    Ok(pages as u64)
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
