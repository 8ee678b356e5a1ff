//! `/proc/<pid>/maps`, and which part of a process's memory is ours to carry.
//!
//! The rule of who carries a mapping lives in [`Region::class`] and nowhere else: what is [`Class::Tracked`] is hidden
//! from CRIU and sent by us, and so is what is [`Class::Shared`] if all of its object is ([`crate::object`]); everything
//! else is CRIU's.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::PathBuf;

use haulage_sys::{ADDRESS_END, Pid};

use crate::range::{PageRange, RangeSet};

/// Who carries a mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Class {
    /// Private anonymous memory: we do.
    Tracked,
    /// Shared anonymous memory, memfds and System V segments: we do, object by object, unless there is more to an object than
    /// we can carry.
    Shared,
    /// The stack, files, what the kernel maps: CRIU does.
    Criu,
}

/// Nothing is mapped below (`vm.mmap_min_addr` of the kernel is no higher on any distribution).
const LOWEST: u64 = 1 << 16;
/// A stack grows down to `RLIMIT_STACK`, 8 MiB by default, and keeps a gap of 1 MiB below itself.
const ROOM_FOR_A_STACK: u64 = 64 << 20;

/// The kernel's name of shared memory that was mapped without a file.
pub(crate) const ANONYMOUS: &str = "/dev/zero (deleted)";
/// What the kernel puts before the name of a memfd.
pub(crate) const MEMFD: &str = "/memfd:";
/// What the kernel puts before the key of a System V segment.
const SEGMENT: &str = "/SYSV";
/// What the kernel puts behind the name of all such memory.
const DELETED: &str = " (deleted)";
/// Shared memory that was mapped without a file, after a restore by CRIU or by us: a memfd of that name, and no descriptor of
/// it.
pub(crate) const RESTORED: &str = "/memfd:/dev/zero (deleted)";

/// Whether a System V segment is called so.
pub(crate) fn is_segment(name: &[u8]) -> bool {
    name.starts_with(SEGMENT.as_bytes()) && name.ends_with(DELETED.as_bytes())
}

/// The span of `group`, no less than the group itself.
fn span_of(group: Vec<PageRange>, below: u64, above: u64) -> Option<(PageRange, Vec<PageRange>)> {
    let (first, last) = (group.first()?.addresses().start, group.last()?.addresses().end);
    Some((PageRange::of_addresses(below.min(first)..above.max(last))?, group))
}

/// One mapping.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Region {
    /// First address.
    pub start: u64,
    /// One past the last address.
    pub end: u64,
    /// May be written.
    pub writable: bool,
    /// Writes are seen by others that map the same.
    pub shared: bool,
    /// Where in what is mapped it begins, in bytes.
    pub offset: u64,
    /// Major and minor number of the device of what is mapped, zeros when it is no file.
    pub device: (u32, u32),
    /// Inode of what is mapped, 0 when it is no file.
    pub inode: u64,
    /// Path or label, empty when it has none. Escapes of the kernel's (`\012` for a newline) are undone.
    pub name: String,
}

impl Region {
    /// Who carries it: private mappings of no file that are unnamed, the heap, or named by the program itself
    /// (`[anon:…]`), below the end of ordinary user memory, are tracked. So are shared ones of memory that is no file's: of
    /// none that has a path, at least, and what a memfd of huge pages is only its device tells.
    pub fn class(&self) -> Class {
        let ours = self.name.is_empty() || self.name == "[heap]" || self.name.starts_with("[anon:");
        let pathless = self.name == ANONYMOUS || self.name.starts_with(MEMFD) || self.is_shared_by_label();
        match self.shared {
            _ if self.end > ADDRESS_END => Class::Criu,
            false if self.inode == 0 && ours => Class::Tracked,
            true if self.inode != 0 && pathless || self.is_segment() => Class::Shared,
            _ => Class::Criu,
        }
    }

    /// Whether it is shared memory of a name that the program has given the mapping, and so of any kind.
    pub fn is_shared_by_label(&self) -> bool {
        self.name.starts_with("[anon_shmem:")
    }

    /// Whether it is one of a System V segment, by its name. Its inode number is the segment's id then, 0 perhaps.
    pub fn is_segment(&self) -> bool {
        self.shared && is_segment(self.name.as_bytes())
    }

    /// Its pages, unless it lies beyond the end of ordinary user memory.
    pub fn pages(&self) -> Option<PageRange> {
        PageRange::of_addresses(self.start..self.end)
    }
}

/// The mappings of one process at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Maps {
    regions: Vec<Region>,
}

/// A process's mappings could not be read.
#[derive(Debug, thiserror::Error)]
pub enum MapsError {
    /// The file could not be read; `NotFound` when the process is gone.
    #[error("read of the mappings of process {pid} failed")]
    Read {
        /// The process.
        pid: Pid,
        /// What happened.
        #[source]
        source: io::Error,
    },
    /// A line is not as `proc_pid_maps(5)` says.
    #[error("mapping {line:?} is not understood")]
    Line {
        /// The line.
        line: String,
    },
}

impl MapsError {
    /// Whether there is no such process any more.
    pub fn is_gone(&self) -> bool {
        let Self::Read { source, .. } = self else { return false };
        let gone = rustix::io::Errno::SRCH.raw_os_error();
        source.kind() == io::ErrorKind::NotFound || source.raw_os_error() == Some(gone)
    }
}

impl Maps {
    /// The mappings of `pid` now.
    ///
    /// # Errors
    /// See [`MapsError`]. A zombie has no mappings, which is no error.
    pub fn of(pid: Pid) -> Result<Self, MapsError> {
        let text = fs::read(format!("/proc/{pid}/maps")).map_err(|source| MapsError::Read { pid, source })?;
        Self::parse(&String::from_utf8_lossy(&text))
    }

    /// Reads the text of a maps file.
    ///
    /// # Errors
    /// [`MapsError::Line`].
    pub fn parse(text: &str) -> Result<Self, MapsError> {
        let regions = text
            .lines()
            .map(|line| parse_line(line).ok_or_else(|| MapsError::Line { line: line.to_owned() }));
        Ok(Self { regions: regions.collect::<Result<_, _>>()? })
    }

    /// All mappings, ascending.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// Each tracked mapping's pages, ascending. Adjacent mappings are not merged: the kernel registers one at a time.
    pub fn tracked(&self) -> impl Iterator<Item = PageRange> + '_ {
        self.regions.iter().filter(|region| region.class() == Class::Tracked).filter_map(Region::pages)
    }

    /// The mappings of one class in groups between which lies something else, each with the span of addresses that is the
    /// group's: from what lies below it to what lies above, except for the room that a stack may grow into.
    pub fn spans_of(&self, class: Class) -> Vec<(PageRange, Vec<PageRange>)> {
        let mut spans = Vec::new();
        let mut below = LOWEST;
        let mut group: Vec<PageRange> = Vec::new();
        for region in &self.regions {
            match region.pages().filter(|_| region.class() == class) {
                Some(pages) => group.push(pages),
                None => {
                    let above = region.start.saturating_sub(ROOM_FOR_A_STACK);
                    spans.extend(span_of(std::mem::take(&mut group), below, above));
                    below = region.end;
                }
            }
        }
        spans.extend(span_of(group, below, ADDRESS_END));
        spans
    }

    /// All pages of tracked mappings.
    pub fn tracked_pages(&self) -> RangeSet {
        self.tracked().collect()
    }

    /// Files that a writer changes by writing to memory, which no file timestamp need show: those mapped shared and
    /// writable. Paths are as the process sees them; deleted files are left out.
    pub fn shared_writable_files(&self) -> BTreeSet<PathBuf> {
        self.regions
            .iter()
            .filter(|region| region.shared && region.writable && region.inode != 0)
            .filter(|region| region.name.starts_with('/') && !region.name.ends_with(" (deleted)"))
            .map(|region| PathBuf::from(&region.name))
            .collect()
    }
}

/// `start-end perms offset major:minor inode [spaces name]`
fn parse_line(line: &str) -> Option<Region> {
    let (addresses, rest) = line.split_once(' ')?;
    let (start, end) = addresses.split_once('-')?;
    let (permissions, rest) = rest.split_once(' ')?;
    let (offset, rest) = rest.split_once(' ')?;
    let (device, rest) = rest.split_once(' ')?;
    let (major, minor) = device.split_once(':')?;
    let (inode, name) = rest.split_once(' ').unwrap_or((rest, ""));
    let &[_read, write, _execute, sharing] = permissions.as_bytes() else { return None };
    let (start, end) = (u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?);
    let region = Region {
        start,
        end,
        writable: write == b'w',
        shared: match sharing {
            b's' => true,
            b'p' => false,
            _ => return None,
        },
        offset: u64::from_str_radix(offset, 16).ok()?,
        device: (u32::from_str_radix(major, 16).ok()?, u32::from_str_radix(minor, 16).ok()?),
        inode: inode.parse().ok()?,
        name: name.trim_start_matches(' ').replace("\\012", "\n"),
    };
    (start < end).then_some(region)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
555555554000-555555556000 r--p 00000000 08:01 1234                       /usr/bin/some thing
555555560000-555555581000 rw-p 00000000 00:00 0                          [heap]
7ffff0000000-7ffff0021000 rw-p 00000000 00:00 0 
7ffff0021000-7ffff4000000 ---p 00000000 00:00 0 
7ffff5000000-7ffff5001000 rw-s 00000000 00:01 77                         /dev/zero (deleted)
7ffff6000000-7ffff6001000 rw-s 00001000 08:01 99                         /var/lib/db/log
7ffff6100000-7ffff6101000 r--s 00001000 08:01 98                         /var/lib/db/read
7ffff7000000-7ffff7001000 rw-p 00000000 00:00 0                          [anon:jemalloc]
7ffff7100000-7ffff7101000 rw-s 00000000 00:01 5                          [anon_shmem:x]
7ffff7200000-7ffff7201000 rw-s 00000000 00:01 6                          /memfd:x (deleted)
7ffff7300000-7ffff7301000 rw-p 00000000 00:01 6                          /memfd:x (deleted)
7ffff7400000-7ffff7401000 rw-s 00000000 00:01 0                          /SYSV00001234 (deleted)
7ffff7500000-7ffff7501000 rw-s 00000000 08:01 4                          /SYSV00001234
7ffff7fbd000-7ffff7fc1000 r--p 00000000 00:00 0                          [vvar]
7ffff7fc1000-7ffff7fc3000 r-xp 00000000 00:00 0                          [vdso]
7ffffffde000-7ffffffff000 rw-p 00000000 00:00 0                          [stack]
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]
";

    #[test]
    fn private_anonymous_memory_is_ours_and_the_rest_is_not() {
        let maps = Maps::parse(TEXT).unwrap();
        let tracked: Vec<_> = maps.tracked().map(|range| range.start().address()).collect();
        assert_eq!(tracked, [0x5555_5556_0000, 0x7fff_f000_0000, 0x7fff_f002_1000, 0x7fff_f700_0000]);
        let shared: Vec<_> = maps.regions().iter().filter(|region| region.class() == Class::Shared).collect();
        assert_eq!(shared.iter().map(|region| region.inode).collect::<Vec<_>>(), [77, 5, 6, 0]);
        assert_eq!((shared[0].device, maps.regions()[5].offset), ((0, 1), 0x1000));
        assert_eq!(maps.regions().len(), 17);
        assert_eq!(maps.regions()[0].name, "/usr/bin/some thing");
    }

    #[test]
    fn files_that_change_through_memory_are_listed() {
        let files: Vec<_> = Maps::parse(TEXT).unwrap().shared_writable_files().into_iter().collect();
        assert_eq!(files, [PathBuf::from("/SYSV00001234"), PathBuf::from("/var/lib/db/log")]);
    }

    #[test]
    fn a_line_that_is_not_understood_is_an_error() {
        for line in ["", "x", "1000-2000 rw-p", "2000-1000 rw-p 0 00:00 0", "1000-2000 rw-q 0 00:00 0"] {
            assert!(Maps::parse(&format!("{line}\n")).is_err(), "{line:?}");
        }
    }

    #[test]
    fn our_own_mappings_are_understood() {
        let maps = Maps::of(rustix::process::getpid()).unwrap();
        assert!(maps.regions().iter().any(|region| region.name == "[stack]"));
        assert!(maps.tracked_pages().page_count() > 0);
    }

    #[test]
    fn spans_reach_from_neighbour_to_neighbour() {
        let maps = Maps::parse(
            "20000-30000 rw-p 00000000 00:00 0 \n\
             40000-50000 r--p 00000000 00:00 7 /file\n\
             60000-70000 rw-p 00000000 00:00 0 \n\
             90000-a0000 rw-p 00000000 00:00 0 [heap]\n\
             7ffd00000000-7ffd00100000 rw-p 00000000 00:00 0 [stack]\n",
        )
        .unwrap();
        let spans: Vec<_> = maps
            .spans_of(Class::Tracked)
            .into_iter()
            .map(|(span, group)| (span.addresses(), group.len()))
            .collect();
        // Below the file there is no room for a stack, so the span ends with its mapping.
        assert_eq!(spans, [(LOWEST..0x30000, 1), (0x50000..0x7ffd00000000 - ROOM_FOR_A_STACK, 2)]);
    }
}
