//! The descriptors of memfds that the page-shipper carries: CRIU is not to see them, and the images say instead what they
//! are.
//!
//! What CRIU carries with a descriptor and we do not is a lock, or an owner that is to be told of what happens to it. A memfd
//! with a descriptor that has either is CRIU's: with all its mappings and descriptors, in every process, and its content,
//! whatever of it has gone in rounds.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};

use haulage_criu::descriptors::{LeftOutDescriptor, LeftOutFile};
use haulage_pages::object::{self, ObjectId};
use haulage_pages::process::Process;
use haulage_protocol::fault::Fault;
use haulage_sys::{Pid, pidfd};

use crate::failure::{DUMP, fault};

/// `FD_CLOEXEC` of `fcntl(2)`.
const CLOSE_ON_EXEC: u32 = 1;
/// `O_CLOEXEC` of `open(2)`, which is a descriptor's and no open file's.
const CLOEXEC: u32 = 0o200_0000;
/// `O_PATH` of `open(2)`.
const PATH_ONLY: u32 = 0o1000_0000;

/// The open descriptors of one frozen process, as they are.
#[derive(Default)]
pub(crate) struct Table {
    all: Vec<Open>,
}

/// An open descriptor.
struct Open {
    number: u32,
    target: PathBuf,
    memfd: Option<OpenMemfd>,
}

/// What it is of, if that is a memfd.
struct OpenMemfd {
    id: ObjectId,
    position: u64,
    flags: u32,
    is_criu_s: bool,
}

impl Table {
    /// That of `process`. Of `memfds`, and of no others, it says what they are open as.
    ///
    /// # Errors
    /// When that cannot be known.
    pub(crate) fn read(process: Process, memfds: &BTreeSet<ObjectId>) -> Result<Self, Fault> {
        let mut all = Vec::new();
        let directory = PathBuf::from(format!("/proc/{}/fd", process.pid));
        let opened = pidfd::open(process.pid).map_err(fault(DUMP))?;
        for entry in fs::read_dir(&directory).map_err(fault(DUMP))? {
            let path = entry.map_err(fault(DUMP))?.path();
            let number = number_of(&path).ok_or_else(|| unreadable(&path))?;
            let target = fs::read_link(&path).map_err(fault(DUMP))?;
            let id = object::behind(&path, &target).map_err(fault(DUMP))?.filter(|id| memfds.contains(id));
            let memfd = id.map(|id| open_memfd(process, &opened, number, id)).transpose()?;
            all.push(Open { number, target, memfd });
        }
        Ok(Self { all })
    }

    /// The memfds that only CRIU can carry with all that this process has of them.
    pub(crate) fn criu_s(&self) -> impl Iterator<Item = ObjectId> {
        let memfds = self.all.iter().filter_map(|open| open.memfd.as_ref());
        memfds.filter(|memfd| memfd.is_criu_s).map(|memfd| memfd.id)
    }
}

fn open_memfd(process: Process, opened: &OwnedFd, number: u32, id: ObjectId) -> Result<OpenMemfd, Fault> {
    let path = PathBuf::from(format!("/proc/{}/fdinfo/{number}", process.pid));
    let text = fs::read_to_string(&path).map_err(fault(DUMP))?;
    let FdInfo { position, flags, is_locked } = FdInfo::parse(&text).ok_or_else(|| unreadable(&path))?;
    let mut is_criu_s = is_locked;
    if flags & PATH_ONLY == 0 {
        let number = RawFd::try_from(number).map_err(fault(DUMP))?;
        let ours = pidfd::get_fd(opened.as_fd(), number).map_err(fault(DUMP))?;
        is_criu_s |= pidfd::has_owner(&ours).map_err(fault(DUMP))?;
    }
    Ok(OpenMemfd { id, position, flags, is_criu_s })
}

/// Open files of memfds, over all processes, and the first descriptor that was found of each.
#[derive(Default)]
pub(crate) struct OpenFiles {
    files: Vec<(LeftOutFile, (Pid, RawFd))>,
}

/// The descriptors of one process.
#[derive(Default)]
pub(crate) struct Descriptors {
    /// What CRIU may see, with what each is a link to.
    pub(crate) shown: Vec<(u32, PathBuf)>,
    /// What it may not.
    pub(crate) left_out: Vec<LeftOutDescriptor>,
}

impl OpenFiles {
    /// The descriptors of a frozen process, of which those of `memfds` are left out.
    ///
    /// # Errors
    /// When it cannot be known which are of one open file.
    pub(crate) fn descriptors(
        &mut self,
        process: Process,
        table: Table,
        memfds: &BTreeSet<ObjectId>,
    ) -> Result<Descriptors, Fault> {
        let mut all = Descriptors::default();
        for Open { number, target, memfd } in table.all {
            match memfd.filter(|memfd| memfds.contains(&memfd.id)) {
                Some(memfd) => all.left_out.push(self.leave_out(process, number, &memfd)?),
                None => all.shown.push((number, target)),
            }
        }
        Ok(all)
    }

    fn leave_out(
        &mut self,
        process: Process,
        number: u32,
        memfd: &OpenMemfd,
    ) -> Result<LeftOutDescriptor, Fault> {
        let here = (process.pid, RawFd::try_from(number).map_err(fault(DUMP))?);
        let object = memfd.id.0;
        let mut index = None;
        for (at, (_, first)) in self.files.iter().enumerate().filter(|(_, (file, _))| file.object == object) {
            if pidfd::are_same_file(*first, here).map_err(fault(DUMP))? {
                index = Some(at);
                break;
            }
        }
        let index = index.unwrap_or_else(|| {
            let (flags, position) = (memfd.flags & !CLOEXEC, memfd.position);
            self.files.push((LeftOutFile { object, flags, position }, here));
            self.files.len() - 1
        });
        let flags = if memfd.flags & CLOEXEC == 0 { 0 } else { CLOSE_ON_EXEC };
        let file = u32::try_from(index).map_err(fault(DUMP))?;
        Ok(LeftOutDescriptor { number, flags, file })
    }

    /// All that were found, in the order of their numbers.
    pub(crate) fn into_files(self) -> Vec<LeftOutFile> {
        self.files.into_iter().map(|(file, _)| file).collect()
    }
}

/// What `/proc/<pid>/fdinfo` says.
struct FdInfo {
    position: u64,
    flags: u32,
    is_locked: bool,
}

impl FdInfo {
    fn parse(text: &str) -> Option<Self> {
        let value = |name: &str| {
            text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim)
        };
        let flags = u32::from_str_radix(value("flags")?, 8).ok()?;
        let is_locked = text.lines().any(|line| line.starts_with("lock:"));
        Some(Self { position: value("pos")?.parse().ok()?, flags, is_locked })
    }
}

fn number_of(path: &Path) -> Option<u32> {
    path.file_name()?.to_str()?.parse().ok()
}

fn unreadable(path: &Path) -> Fault {
    fault(DUMP)(io::Error::other(format!("{} is not understood", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_of_a_descriptor_is_understood() {
        let about = FdInfo::parse("pos:\t4097\nflags:\t02100002\nmnt_id:\t15\nino:\t1033\n").unwrap();
        assert_eq!((about.position, about.flags, about.is_locked), (4097, CLOEXEC | 0o10_0002, false));
        let locked = "pos:\t0\nflags:\t0100000\nlock:\t1: POSIX  ADVISORY  WRITE 7 00:01:1033 0 EOF\n";
        assert!(FdInfo::parse(locked).unwrap().is_locked);
        assert!(FdInfo::parse("pos:\t0\n").is_none());
    }
}
