//! Memory that CRIU was not told of, in the images that it restores: shared memory that we carry, and large private
//! mappings, of which it would look at every page only to find that none is to be dumped.
//!
//! ```text
//!  checkpointer: smaps ─► without ─► haul-shared.img ══► join: mm-<pid>.img + mappings, files.img + one file an object
//!                                                               restore: the file's name is the key of a descriptor
//! ```
//! A mapping of an object becomes one of a regular file that CRIU does not open by its path but inherits as a descriptor
//! (`open_path` of `criu/files-reg.c`): of memory that holds everything already. CRIU opens it anew for each process. So do
//! descriptors of a memfd ([`crate::descriptors`]).

use std::fs::{self, File};
use std::io::{BufReader, ErrorKind};
use std::path::Path;

use prost::Message;

use crate::descriptors::{self, LeftOutDescriptor, LeftOutFile, LeftOutMemfd};
use crate::image::{ImageError, ImageKind, ImageReader, ImageWriter, io_at};
use crate::merge::MergeError;
use crate::mm;
use crate::wire;

/// Ours, among CRIU's images.
const FILE: &str = "haul-shared.img";
const FILES: &str = "files.img";
const MEMFDS: &str = "memfd.img";
/// `O_RDONLY` and `O_RDWR` of `open(2)`.
const READ_ONLY: u32 = 0;
const READ_WRITE: u32 = 2;
/// `MAP_PRIVATE` of `mmap(2)`.
const MAP_PRIVATE: u32 = 0x02;
/// `VMA_AREA_REGULAR` and `VMA_FILE_SHARED` of `criu/include/image.h`.
const SHARED_FILE: u32 = 1 | 1 << 7;
/// `VMA_AREA_REGULAR` and `VMA_ANON_PRIVATE`.
const PRIVATE_MEMORY: u32 = 1 | 1 << 9;
/// `REG` of `fd_types` in `images/fdinfo.proto`.
pub(crate) const REGULAR: i32 = 1;
/// The field of mappings in `images/mm.proto`.
const MAPPINGS: u32 = 14;

/// A mapping, of an object or private. Addresses are in bytes, `end` exclusive.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct LeftOutMapping {
    /// Its first byte.
    #[prost(uint64, required, tag = "1")]
    pub start: u64,
    /// The byte after its last.
    #[prost(uint64, required, tag = "2")]
    pub end: u64,
    /// Where in the object it begins, in bytes.
    #[prost(uint64, required, tag = "3")]
    pub offset: u64,
    /// What tells the object from others on the source, mostly its inode number; nothing, if it is private.
    #[prost(uint64, required, tag = "4")]
    pub object: u64,
    /// `PROT_…` bits.
    #[prost(uint32, required, tag = "5")]
    pub prot: u32,
    /// `MAP_…` bits.
    #[prost(uint32, required, tag = "6")]
    pub flags: u32,
    /// A bit for each advice of `madvise(2)` that is in force.
    #[prost(uint64, optional, tag = "7")]
    pub madv: Option<u64>,
    /// It is of a descriptor that was open for reading only, so that it can never be made writable.
    #[prost(bool, optional, tag = "8")]
    pub read_only: Option<bool>,
}

impl LeftOutMapping {
    /// Whether it is of no object, but of memory of its process's own.
    pub fn is_private(&self) -> bool {
        self.flags & MAP_PRIVATE != 0
    }
}

/// An object.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct SharedObject {
    /// What tells it from others on the source, mostly its inode number.
    #[prost(uint64, required, tag = "1")]
    pub id: u64,
    /// Its length in bytes.
    #[prost(uint64, required, tag = "2")]
    pub size: u64,
    /// If it is a memfd.
    #[prost(message, optional, tag = "3")]
    pub memfd: Option<LeftOutMemfd>,
    /// If it is a System V segment: its id. CRIU finds its memory where the segment is to be attached ([`crate::ipc`]).
    #[prost(int32, optional, tag = "4")]
    pub segment: Option<i32>,
}

/// The mappings and descriptors of one process.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct LeftOutProcess {
    /// Its id in the images.
    #[prost(uint32, required, tag = "1")]
    pub pid: u32,
    /// In address order.
    #[prost(message, repeated, tag = "2")]
    pub mappings: Vec<LeftOutMapping>,
    /// Of memfds.
    #[prost(message, repeated, tag = "3")]
    pub descriptors: Vec<LeftOutDescriptor>,
}

/// All memory that a dump has left out altogether.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct LeftOut {
    /// The objects.
    #[prost(message, repeated, tag = "1")]
    pub objects: Vec<SharedObject>,
    /// The processes that have some of it mapped, or a descriptor of it.
    #[prost(message, repeated, tag = "2")]
    pub processes: Vec<LeftOutProcess>,
    /// Open files of memfds.
    #[prost(message, repeated, tag = "3")]
    pub files: Vec<LeftOutFile>,
}

impl LeftOut {
    /// Writes it to the images' directory `dir`, beside what CRIU writes.
    ///
    /// # Errors
    /// When there is something of that name.
    pub fn write(&self, dir: &Path) -> Result<(), ImageError> {
        let mut image = ImageWriter::create(&dir.join(FILE), ImageKind::Shared)?;
        image.append(self)?;
        image.finish().map(drop)
    }

    /// What the images in `dir` lack; nothing where it is not said.
    ///
    /// # Errors
    /// When the image is damaged.
    pub fn read(dir: &Path) -> Result<Self, ImageError> {
        let path = dir.join(FILE);
        let file = match File::open(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Self::default()),
            opened => opened.map_err(io_at(&path))?,
        };
        let mut image = ImageReader::new(&path, ImageKind::Shared, BufReader::new(file))?;
        image.read_known()?.ok_or_else(|| image.damaged("it is empty"))
    }

    fn index_of(&self, object: u64) -> Result<usize, MergeError> {
        let index = self.objects.iter().position(|known| known.id == object);
        index.ok_or(MergeError::Shared { object })
    }

    /// The key by which a restore inherits the descriptor of object number `index`.
    pub fn key(index: usize) -> String {
        format!("haul-shared-{index}")
    }
}

/// `reg_file_entry`.
#[derive(Clone, PartialEq, prost::Message)]
struct RegFile {
    #[prost(uint32, required, tag = "1")]
    id: u32,
    #[prost(uint32, required, tag = "2")]
    flags: u32,
    #[prost(uint64, required, tag = "3")]
    pos: u64,
    #[prost(message, required, tag = "5")]
    owner: Owner,
    #[prost(string, required, tag = "6")]
    name: String,
    #[prost(bool, optional, tag = "9")]
    ext: Option<bool>,
}

/// `fown_entry`: nobody.
#[derive(Clone, PartialEq, prost::Message)]
struct Owner {
    #[prost(uint32, required, tag = "1")]
    uid: u32,
    #[prost(uint32, required, tag = "2")]
    euid: u32,
    #[prost(uint32, required, tag = "3")]
    signum: u32,
    #[prost(uint32, required, tag = "4")]
    pid_type: u32,
    #[prost(uint32, required, tag = "5")]
    pid: u32,
}

/// `file_entry`, of a regular file.
#[derive(Clone, PartialEq, prost::Message)]
struct FileEntry {
    #[prost(int32, required, tag = "1")]
    kind: i32,
    #[prost(uint32, required, tag = "2")]
    id: u32,
    #[prost(message, optional, tag = "3")]
    regular: Option<RegFile>,
}

/// `vma_entry`.
#[derive(Clone, PartialEq, prost::Message)]
struct VmaEntry {
    #[prost(uint64, required, tag = "1")]
    start: u64,
    #[prost(uint64, required, tag = "2")]
    end: u64,
    #[prost(uint64, required, tag = "3")]
    offset: u64,
    #[prost(uint64, required, tag = "4")]
    file: u64,
    #[prost(uint32, required, tag = "5")]
    prot: u32,
    #[prost(uint32, required, tag = "6")]
    flags: u32,
    #[prost(uint32, required, tag = "7")]
    status: u32,
    #[prost(sint64, required, tag = "8")]
    fd: i64,
    #[prost(uint64, optional, tag = "9")]
    madv: Option<u64>,
    #[prost(uint32, optional, tag = "10")]
    fdflags: Option<u32>,
}

/// `memfd_inode_entry`, as far as it matters.
#[derive(Clone, PartialEq, prost::Message)]
struct MemfdInode {
    #[prost(uint32, required, tag = "5")]
    inode: u32,
}

/// Adds what was left out to the images of the processes `pids` in `out`, which are links to those in `received`.
///
/// # Errors
/// When CRIU knows of an object or of something in the place of a mapping all the same: then one of both is stale.
pub(crate) fn add(left_out: &LeftOut, received: &Path, out: &Path, pids: &[u32]) -> Result<(), MergeError> {
    if left_out.objects.is_empty() && left_out.processes.is_empty() {
        return Ok(());
    }
    refuse_known(left_out, received)?;
    let first = if left_out.objects.is_empty() { 0 } else { add_files(left_out, received, out)? };
    for LeftOutProcess { pid, mappings, .. } in &left_out.processes {
        if !pids.contains(pid) {
            return Err(MergeError::NoProcess(*pid));
        }
        if !mappings.is_empty() {
            add_mappings(left_out, first, *pid, mappings, received, out)?;
        }
    }
    // There are no more of them than fit their images.
    descriptors::add(left_out, first + left_out.objects.len() as u32, received, out)
}

/// CRIU dumps an object that it sees by a descriptor or another mapping.
fn refuse_known(left_out: &LeftOut, received: &Path) -> Result<(), MergeError> {
    let path = received.join(MEMFDS);
    let mut image = match ImageReader::open(&path, ImageKind::MemfdInode) {
        Err(ImageError::Io { source, .. }) if source.kind() == ErrorKind::NotFound => return Ok(()),
        opened => opened?,
    };
    while let Some(MemfdInode { inode }) = image.read()? {
        // CRIU keeps the lower 32 bits of the number.
        let mut files = left_out.objects.iter().filter(|object| object.segment.is_none());
        if let Some(object) = files.find(|object| object.id as u32 == inode) {
            return Err(MergeError::Shared { object: object.id });
        }
    }
    Ok(())
}

/// One file an object for its mappings, then those of descriptors; the id of the first.
fn add_files(left_out: &LeftOut, received: &Path, out: &Path) -> Result<u32, MergeError> {
    let mut image = ImageReader::open(&received.join(FILES), ImageKind::Files)?;
    let mut last = 0;
    while let Some(FileEntry { id, .. }) = image.read()? {
        last = last.max(id);
    }
    let count = u32::try_from(left_out.objects.len() + left_out.files.len()).ok();
    let first =
        last.checked_add(1).filter(|first| count.and_then(|count| first.checked_add(count)).is_some());
    let first = first.ok_or_else(|| image.unknown("file ids up to the last"))?;
    let mut image = descriptors::to_go_on_with(received, out, FILES)?;
    let mapped = left_out.objects.iter().map(|object| LeftOutFile {
        object: object.id,
        flags: READ_WRITE,
        position: 0,
    });
    for (file, id) in mapped.chain(left_out.files.iter().cloned()).zip(first..) {
        let (name, owner) = (LeftOut::key(left_out.index_of(file.object)?), Owner::default());
        let regular = RegFile { id, flags: file.flags, pos: file.position, owner, name, ext: Some(true) };
        image.append(&FileEntry { kind: REGULAR, id, regular: Some(regular) })?;
    }
    image.finish()?;
    Ok(first)
}

fn add_mappings(
    left_out: &LeftOut,
    first_file: u32,
    pid: u32,
    mappings: &[LeftOutMapping],
    received: &Path,
    out: &Path,
) -> Result<(), MergeError> {
    let (from, to) = (mm::path(received, pid), mm::path(out, pid));
    let mut image = ImageReader::open(&from, ImageKind::Mm)?;
    let whole = image.next_bytes()?.ok_or_else(|| image.damaged("it is empty"))?;
    let fields = wire::fields(&whole).ok_or_else(|| image.damaged("not a message"))?;
    let (mut all, mut guards) = (Vec::new(), Vec::new());
    for field in fields.iter().filter(|field| field.number == MAPPINGS) {
        let mapping = mm::Mapping::decode(field.content).map_err(|error| image.damaged(error))?;
        match mapping.status & mm::GUARD {
            0 => all.push((mapping.start, mapping.end, field.content.to_vec())),
            // They lie within mappings, and come behind them all.
            _ => guards.push(field.content),
        }
    }
    for mapping in mappings {
        let mut entry = VmaEntry {
            start: mapping.start,
            end: mapping.end,
            offset: mapping.offset,
            file: 0,
            prot: mapping.prot,
            flags: mapping.flags,
            status: PRIVATE_MEMORY,
            fd: -1,
            madv: mapping.madv,
            fdflags: None,
        };
        if !mapping.is_private() {
            // Few enough: each has an entry in an image of limited size.
            entry.file = u64::from(first_file) + left_out.index_of(mapping.object)? as u64;
            let flags = if mapping.read_only == Some(true) { READ_ONLY } else { READ_WRITE };
            (entry.status, entry.fdflags) = (SHARED_FILE, Some(flags));
        }
        all.push((mapping.start, mapping.end, entry.encode_to_vec()));
    }
    all.sort_by_key(|(start, ..)| *start);
    let overlap = all.iter().zip(all.iter().skip(1)).find(|((_, end, _), (start, ..))| start < end);
    if let Some((_, (address, ..))) = overlap {
        return Err(MergeError::Overlap { pid, address: *address });
    }
    let mut joined = Vec::with_capacity(whole.len() + mappings.len() * 64);
    // The order among different fields means nothing.
    let others = fields.iter().filter(|field| field.number != MAPPINGS);
    others.for_each(|field| joined.extend_from_slice(field.whole));
    all.iter().for_each(|(_, _, entry)| wire::append(&mut joined, MAPPINGS, entry));
    guards.into_iter().for_each(|entry| wire::append(&mut joined, MAPPINGS, entry));
    fs::remove_file(&to).map_err(io_at(&to))?;
    let mut image = ImageWriter::create(&to, ImageKind::Mm)?;
    image.append_bytes(&joined)?;
    image.finish()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// More of `mm_entry` than we look at.
    #[derive(Clone, PartialEq, prost::Message)]
    struct AnyMm {
        #[prost(uint64, required, tag = "1")]
        start_code: u64,
        #[prost(message, repeated, tag = "14")]
        mappings: Vec<VmaEntry>,
        #[prost(int32, optional, tag = "15")]
        dumpable: Option<i32>,
    }

    fn theirs(start: u64, end: u64) -> VmaEntry {
        VmaEntry { start, end, flags: 0x22, status: 1 << 9 | 1, fd: -1, ..VmaEntry::default() }
    }

    fn ours(start: u64, end: u64) -> LeftOutMapping {
        let (madv, read_only) = (None, None);
        LeftOutMapping { start, end, offset: 0x3000, object: 77, prot: 3, flags: 1, madv, read_only }
    }

    /// Images of process 1, and links to them.
    fn images() -> (tempfile::TempDir, std::path::PathBuf, std::path::PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let (received, out) = (dir.path().join("received"), dir.path().join("out"));
        let image = |name: &str, kind| ImageWriter::create(&received.join(name), kind).unwrap();
        fs::create_dir(&received).unwrap();
        fs::create_dir(&out).unwrap();
        let mappings = vec![theirs(0x1000, 0x2000), theirs(0x9000, 0xa000)];
        let mut mm = image("mm-1.img", ImageKind::Mm);
        mm.append(&AnyMm { start_code: 5, mappings, dumpable: Some(1) }).unwrap();
        mm.finish().unwrap();
        let mut files = image(FILES, ImageKind::Files);
        files.append(&FileEntry { kind: 4, id: 41, regular: None }).unwrap();
        files.finish().unwrap();
        for name in ["mm-1.img", FILES] {
            fs::hard_link(received.join(name), out.join(name)).unwrap();
        }
        (dir, received, out)
    }

    fn left_out(mappings: Vec<LeftOutMapping>) -> LeftOut {
        let object = |id, size| SharedObject { id, size, memfd: None, segment: None };
        let objects = vec![object(76, 0x1000), object(77, 0x10_0000)];
        let processes = vec![LeftOutProcess { pid: 1, mappings, descriptors: Vec::new() }];
        LeftOut { objects, processes, files: Vec::new() }
    }

    #[test]
    fn mappings_join_in_order_and_all_else_stays() {
        let (_dir, received, out) = images();
        let before = fs::read(received.join("mm-1.img")).unwrap();
        let left_out = left_out(vec![ours(0x4000, 0x6000), ours(0xa000, 0xb000)]);
        add(&left_out, &received, &out, &[1]).unwrap();
        assert_eq!(fs::read(received.join("mm-1.img")).unwrap(), before);
        let mm: AnyMm =
            ImageReader::open(&mm::path(&out, 1), ImageKind::Mm).unwrap().read().unwrap().unwrap();
        assert_eq!((mm.start_code, mm.dumpable), (5, Some(1)));
        let starts: Vec<_> = mm.mappings.iter().map(|mapping| mapping.start).collect();
        assert_eq!(starts, [0x1000, 0x4000, 0x9000, 0xa000]);
        // The files' ids follow the last one; the second object is this one.
        assert_eq!(
            (mm.mappings[1].file, mm.mappings[1].offset, mm.mappings[1].status),
            (43, 0x3000, SHARED_FILE)
        );
        assert!(!mm::read(&out, 1).unwrap()[1].is_private());
        let mut files = ImageReader::open(&out.join(FILES), ImageKind::Files).unwrap();
        let mut entries = Vec::new();
        while let Some(entry) = files.read::<FileEntry>().unwrap() {
            entries.push((entry.id, entry.regular.map(|regular| regular.name)));
        }
        assert_eq!(entries, [(41, None), (42, Some(LeftOut::key(0))), (43, Some(LeftOut::key(1)))]);
    }

    #[test]
    fn what_contradicts_criu_s_images_is_refused() {
        let (_dir, received, out) = images();
        let overlap = add(&left_out(vec![ours(0x1000, 0x3000)]), &received, &out, &[1]).unwrap_err();
        assert!(matches!(overlap, MergeError::Overlap { pid: 1, .. }), "{overlap}");
        let (_dir, received, out) = images();
        let stranger = add(&left_out(vec![]), &received, &out, &[2]).unwrap_err();
        assert!(matches!(stranger, MergeError::NoProcess(1)), "{stranger}");
        let (_dir, received, out) = images();
        let nameless = LeftOutMapping { object: 78, ..ours(0x4000, 0x5000) };
        let nameless = add(&left_out(vec![nameless]), &received, &out, &[1]).unwrap_err();
        assert!(matches!(nameless, MergeError::Shared { object: 78 }), "{nameless}");
        let (_dir, received, out) = images();
        let mut memfds = ImageWriter::create(&received.join(MEMFDS), ImageKind::MemfdInode).unwrap();
        memfds.append(&MemfdInode { inode: 76 }).unwrap();
        memfds.finish().unwrap();
        let known = add(&left_out(vec![]), &received, &out, &[1]).unwrap_err();
        assert!(matches!(known, MergeError::Shared { object: 76 }), "{known}");
    }

    #[test]
    fn what_was_left_out_is_read_as_it_was_written() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(LeftOut::read(dir.path()).unwrap(), LeftOut::default());
        let left_out = left_out(vec![LeftOutMapping { madv: Some(1 << 14), ..ours(0x4000, 0x6000) }]);
        left_out.write(dir.path()).unwrap();
        assert_eq!(LeftOut::read(dir.path()).unwrap(), left_out);
        assert!(left_out.write(dir.path()).is_err());
    }
}
