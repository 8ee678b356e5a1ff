//! Shared anonymous memory, memfds and System V segments, as the objects that lie beneath the mappings of them.
//!
//! An object is memory of the kernel's own tmpfs, known by its inode number. It is carried as if it were a process: its
//! pages are counted from its own beginning, its generation is its inode number, and it has an id that no process has
//! ([`Vpid::is_object`]). Anonymous memory processes come to have mapped by `fork` and in no other way that needs no
//! privilege; no descriptor of it exists. Of a memfd there are descriptors, by which it may be written to
//! ([`crate::contents`]). A segment can be attached and detached at any time.
//!
//! Segments are ours only where they come to [`WORTHWHILE`] bytes, and all of their IPC namespace can be: CRIU carries that
//! whole or not at all.
//!
//! CRIU must see nothing of an object that we carry. So one of which any mapping is of another kind (private, say) is left
//! to CRIU whole; so is a memfd that no process has mapped, or that is sealed against writing. What CRIU may see besides,
//! such as a descriptor on its way through a socket, shows in its images, and the join refuses it there.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Arc, OnceLock};

use haulage_sys::ipc::{self, IpcNamespace, LOCKED, Segment};
use haulage_sys::{PAGE_BYTES, PAGE_SIZE};
use rustix::fs::{MemfdFlags, SealFlags, SeekFrom, fcntl_get_seals, major, memfd_create, minor, seek};
use rustix::io::Errno;

use crate::maps::{ANONYMOUS, Class, MEMFD, Maps, RESTORED, Region, is_segment};
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

/// Before the numbers of a segment in its label, with a byte that no name of a memfd has.
const OF_A_SEGMENT: &[u8] = b"\0SYSV";
/// In an [`ObjectId`], beside what is inode number and id at once: a segment.
const IS_SEGMENT: u64 = 1 << 63;
/// System V segments that are smaller altogether go with CRIU's images.
const WORTHWHILE: u64 = 16 << 20;

/// What a memfd is called, without the kernel's `/memfd:` and ` (deleted)`, or what a segment is; nothing, of a process.
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

    /// That of a segment with this id, key and length in bytes.
    pub(crate) fn of_segment(id: i32, key: i32, size: u64) -> Self {
        let (id, key, size) = (id.to_le_bytes(), key.to_le_bytes(), size.to_le_bytes());
        Self([OF_A_SEGMENT, &id, &key, &size].concat().into())
    }

    /// The id, key and length of the segment that it is one of, if it is.
    pub(crate) fn segment(&self) -> Option<(i32, i32, u64)> {
        let (id, rest) = self.0.strip_prefix(OF_A_SEGMENT)?.split_first_chunk()?;
        let (key, size) = rest.split_first_chunk()?;
        let size = u64::from_le_bytes(size.try_into().ok()?);
        Some((i32::from_le_bytes(*id), i32::from_le_bytes(*key), size))
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

/// An object: its inode number, or the id of a segment in the container's IPC namespace, told apart from those. No other has
/// it as long as one mapping of it exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectId(pub u64);

impl ObjectId {
    /// That of a segment.
    pub fn of_segment(id: i32) -> Self {
        Self(IS_SEGMENT | u64::from(id.unsigned_abs()))
    }

    /// That of what a mapping is one of; nothing that means anything, of a mapping of no object.
    pub fn of(region: &Region) -> Self {
        if region.is_segment() { Self(IS_SEGMENT | region.inode) } else { Self(region.inode) }
    }

    /// The id of the segment that it is, if it is one.
    pub fn segment(self) -> Option<i32> {
        (self.0 & IS_SEGMENT != 0).then(|| i32::try_from(self.inode()).ok()).flatten()
    }

    fn inode(self) -> u64 {
        self.0 & !IS_SEGMENT
    }

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
        match file.metadata()?.ino() == id.inode() {
            true => Ok(file),
            false => Err(io::Error::new(io::ErrorKind::NotFound, "something else is mapped there by now")),
        }
    }

    fn link(&self) -> String {
        let addresses = self.pages.addresses();
        format!("/proc/{}/map_files/{:x}-{:x}", self.process.pid, addresses.start, addresses.end)
    }

    /// What the segment is of which it is a mapping.
    fn segment(&self) -> io::Result<Label> {
        let inode = fs::metadata(self.link())?.ino();
        let segments = IpcNamespace::of(self.process.pid)?.run(ipc::segments)??;
        let found = segments.into_iter().find(|segment| u64::from(segment.id.unsigned_abs()) == inode);
        let Segment { id, key, size, .. } = found.ok_or(io::ErrorKind::NotFound)?;
        Ok(Label::of_segment(id, key, size))
    }

    /// The name of what is mapped.
    pub(crate) fn label(&self) -> io::Result<Label> {
        let target = fs::read_link(self.link())?;
        if is_segment(target.as_os_str().as_bytes()) {
            return self.segment();
        }
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
        self.open_with(File::options().read(true).write(true))
    }

    /// Opens it for reading alone.
    ///
    /// # Errors
    /// As there.
    pub(crate) fn open_to_read(&self) -> io::Result<File> {
        self.open_with(File::options().read(true))
    }

    fn open_with(&self, options: &OpenOptions) -> io::Result<File> {
        let object = options.open(format!("/proc/{}/fd/{}", self.pid, self.descriptor))?;
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
        for region in
            maps.regions().iter().filter(|region| region.device == device && ObjectId::of(region).0 != 0)
        {
            let id = ObjectId::of(region);
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
    let segments = objects.iter().filter(|(id, _)| id.segment().is_some());
    let bytes = segments.fold(0, |bytes: u64, (_, mappings)| bytes.saturating_add(reach(mappings)));
    if bytes < WORTHWHILE || !are_all(&objects) {
        objects.retain(|id, _| id.segment().is_none());
    }
    Ok(objects)
}

/// Whether no other segments are in the namespace of those among `objects`, and none is locked into memory.
fn are_all(objects: &BTreeMap<ObjectId, Vec<ObjectMapping>>) -> bool {
    let segments = objects.iter().filter(|(id, _)| id.segment().is_some());
    // Some processes may have ended meanwhile.
    let mut namespaces = segments
        .flat_map(|(_, mappings)| mappings)
        .filter_map(|mapping| IpcNamespace::of(mapping.process.pid).ok());
    let known = namespaces.next().and_then(|namespace| namespace.run(ipc::segments).ok()?.ok());
    let is_ours = |segment: &Segment| {
        segment.permissions.mode & LOCKED == 0 && objects.contains_key(&ObjectId::of_segment(segment.id))
    };
    known.is_some_and(|known| known.iter().all(is_ours))
}

/// How much of an object is mapped at least once, in bytes, as far as that begins at its beginning.
fn reach(mappings: &[ObjectMapping]) -> u64 {
    let ends = mappings.iter().map(|mapping| (mapping.first.0 + mapping.pages.count()) * PAGE_SIZE);
    ends.max().unwrap_or(0)
}

/// Whether an object is one that can be made and filled elsewhere: anonymous, a segment, or a memfd without seals against
/// that.
fn can_be_made_anew(id: ObjectId, mappings: &[ObjectMapping]) -> bool {
    if id.segment().is_some() {
        return true;
    }
    // Some may have been given up meanwhile. What a mapping has behind the end of a file would be cut off.
    mappings.iter().find_map(|mapping| memfd_at(id, mapping).ok()).is_some_and(|memfd| match memfd {
        Some(memfd) => {
            memfd.size.is_multiple_of(PAGE_SIZE)
                && HARMLESS.contains(SealFlags::from_bits_retain(memfd.seals))
        }
        None => true,
    })
}

/// What the memfd is besides its content; `None` of anonymous memory and segments, of which nobody has a descriptor.
///
/// # Errors
/// When none of `mappings` is there any more.
pub fn memfd(id: ObjectId, mappings: &[ObjectMapping]) -> io::Result<Option<Memfd>> {
    memfd_at(id, mappings.first().ok_or(io::ErrorKind::NotFound)?)
}

fn memfd_at(id: ObjectId, mapping: &ObjectMapping) -> io::Result<Option<Memfd>> {
    // A segment's label takes a look at all of its namespace.
    if id.segment().is_some() {
        return Ok(None);
    }
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
#[path = "object_tests.rs"]
mod tests;
