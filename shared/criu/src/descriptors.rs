//! Descriptors of memfds that CRIU was not told of, in the images that it restores.
//!
//! ```text
//!  checkpointer: /proc/<pid>/fd ─► without ─► haul-shared.img ══► join: fdinfo-<table>.img + numbers, files.img + one
//!                                                                 file an open file of the memfd
//! ```
//! CRIU learns of descriptors by that directory alone (`collect_fds` of `criu/cr-dump.c`), of which one without them takes
//! the place. An open file becomes one of a regular file that CRIU inherits ([`crate::shared`]) and opens anew, by a link
//! under `/proc`, with the flags and at the position that are given here.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use crate::image::{ImageError, ImageKind, ImageReader, ImageWriter, io_at};
use crate::merge::MergeError;
use crate::shared::{LeftOut, REGULAR};

/// An open file of a memfd, which several descriptors may be of.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct LeftOutFile {
    /// The memfd's inode number on the source.
    #[prost(uint64, required, tag = "1")]
    pub object: u64,
    /// `O_…` bits of `open(2)`.
    #[prost(uint32, required, tag = "2")]
    pub flags: u32,
    /// Where it reads and writes next, in bytes.
    #[prost(uint64, required, tag = "3")]
    pub position: u64,
}

/// A descriptor of a process.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct LeftOutDescriptor {
    /// Its number.
    #[prost(uint32, required, tag = "1")]
    pub number: u32,
    /// `FD_CLOEXEC` or nothing.
    #[prost(uint32, required, tag = "2")]
    pub flags: u32,
    /// Which open file, of [`LeftOut::files`].
    #[prost(uint32, required, tag = "3")]
    pub file: u32,
}

/// What a memfd is besides its content.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct LeftOutMemfd {
    /// Its name, without the kernel's `/memfd:`.
    #[prost(bytes = "vec", required, tag = "1")]
    pub name: Vec<u8>,
    /// `st_mode` of `stat(2)`.
    #[prost(uint32, required, tag = "2")]
    pub mode: u32,
    /// Who owns it.
    #[prost(uint32, required, tag = "3")]
    pub uid: u32,
    /// Which group owns it.
    #[prost(uint32, required, tag = "4")]
    pub gid: u32,
    /// `F_SEAL_…` bits of `fcntl(2)`.
    #[prost(uint32, required, tag = "5")]
    pub seals: u32,
}

/// `task_kobj_ids_entry` of `images/core.proto`, as far as it matters.
#[derive(Clone, PartialEq, prost::Message)]
struct Ids {
    #[prost(uint32, required, tag = "2")]
    files: u32,
}

/// `fdinfo_entry`.
#[derive(Clone, PartialEq, prost::Message)]
struct FdInfo {
    #[prost(uint32, required, tag = "1")]
    id: u32,
    #[prost(uint32, required, tag = "2")]
    flags: u32,
    #[prost(int32, required, tag = "3")]
    kind: i32,
    #[prost(uint32, required, tag = "4")]
    number: u32,
}

/// Adds the descriptors to the images in `out`, which are links to those in `received`. The ids of their files begin at
/// `first`.
///
/// # Errors
/// When CRIU has dumped something under the number of one of them: then one of both is stale.
pub(crate) fn add(left_out: &LeftOut, first: u32, received: &Path, out: &Path) -> Result<(), MergeError> {
    let mut tables = BTreeSet::new();
    for process in left_out.processes.iter().filter(|process| !process.descriptors.is_empty()) {
        let pid = process.pid;
        let path = received.join(format!("ids-{pid}.img"));
        let mut image = ImageReader::open(&path, ImageKind::Ids)?;
        let Ids { files: table } = image.read()?.ok_or_else(|| image.damaged("it is empty"))?;
        // Processes may have their descriptors in common (`CLONE_FILES`).
        if !tables.insert(table) {
            continue;
        }
        let name = format!("fdinfo-{table}.img");
        let taken = numbers(&received.join(&name))?;
        let mut image = to_go_on_with(received, out, &name)?;
        for LeftOutDescriptor { number, flags, file } in &process.descriptors {
            let known = left_out.files.get(*file as usize);
            let id = first.checked_add(*file).filter(|_| known.is_some() && !taken.contains(number));
            let id = id.ok_or(MergeError::Descriptor { pid, number: *number })?;
            image.append(&FdInfo { id, flags: *flags, kind: REGULAR, number: *number })?;
        }
        image.finish()?;
    }
    Ok(())
}

fn numbers(fdinfo: &Path) -> Result<BTreeSet<u32>, ImageError> {
    let mut image = ImageReader::open(fdinfo, ImageKind::Fdinfo)?;
    let mut all = BTreeSet::new();
    while let Some(FdInfo { number, .. }) = image.read()? {
        all.insert(number);
    }
    Ok(all)
}

/// A copy of an image in `out` in place of the link, to be appended to: nothing is written through a link to what was
/// received.
pub(crate) fn to_go_on_with(
    received: &Path,
    out: &Path,
    name: &str,
) -> Result<ImageWriter<File>, ImageError> {
    let (from, to) = (received.join(name), out.join(name));
    fs::remove_file(&to).map_err(io_at(&to))?;
    fs::copy(&from, &to).map_err(io_at(&to))?;
    let file = File::options().append(true).open(&to).map_err(io_at(&to))?;
    Ok(ImageWriter::further(&to, file))
}

/// Descriptors with what they are links to, as CRIU is to see them of a process.
pub(crate) type Shown = [(u32, PathBuf)];

/// Makes a directory that looks like a `/proc/<pid>/fd` with the descriptors of `shown`.
pub(crate) fn make_directory(at: &Path, shown: &Shown) -> std::io::Result<()> {
    fs::create_dir(at)?;
    for (number, target) in shown {
        std::os::unix::fs::symlink(target, at.join(number.to_string()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shared::LeftOutProcess;
    use std::os::unix::fs::MetadataExt;

    fn process(pid: u32, descriptors: &[(u32, u32, u32)]) -> LeftOutProcess {
        let descriptor = |&(number, flags, file): &(u32, u32, u32)| LeftOutDescriptor { number, flags, file };
        let descriptors = descriptors.iter().map(descriptor).collect();
        LeftOutProcess { pid, mappings: Vec::new(), descriptors }
    }

    /// Images of three processes, of which the first two have their descriptors in common, and links to them.
    fn images() -> (tempfile::TempDir, PathBuf, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let (received, out) = (dir.path().join("received"), dir.path().join("out"));
        fs::create_dir(&received).unwrap();
        fs::create_dir(&out).unwrap();
        let image = |name: &str, kind| ImageWriter::create(&received.join(name), kind).unwrap();
        for (pid, table) in [(1, 8), (2, 8), (3, 9)] {
            let mut ids = image(&format!("ids-{pid}.img"), ImageKind::Ids);
            ids.append(&Ids { files: table }).unwrap();
            ids.finish().unwrap();
        }
        for table in [8, 9] {
            let mut fdinfo = image(&format!("fdinfo-{table}.img"), ImageKind::Fdinfo);
            fdinfo.append(&FdInfo { id: 5, flags: 0, kind: 10, number: 2 }).unwrap();
            fdinfo.finish().unwrap();
        }
        for entry in fs::read_dir(&received).unwrap() {
            let entry = entry.unwrap();
            fs::hard_link(entry.path(), out.join(entry.file_name())).unwrap();
        }
        (dir, received, out)
    }

    fn read(out: &Path, table: u32) -> Vec<(u32, u32, u32)> {
        let path = out.join(format!("fdinfo-{table}.img"));
        let mut image = ImageReader::open(&path, ImageKind::Fdinfo).unwrap();
        std::iter::from_fn(|| image.read_known::<FdInfo>().unwrap())
            .map(|entry| (entry.id, entry.flags, entry.number))
            .collect()
    }

    fn left_out(processes: Vec<LeftOutProcess>) -> LeftOut {
        let file = LeftOutFile { object: 7, flags: 2, position: 0 };
        LeftOut { objects: Vec::new(), processes, files: vec![file; 2] }
    }

    #[test]
    fn descriptors_join_those_of_each_table_once() {
        let (_dir, received, out) = images();
        let before = fs::read(received.join("fdinfo-8.img")).unwrap();
        let common = [(7, 1, 0), (9, 0, 1)];
        let left_out = left_out(vec![process(1, &common), process(2, &common), process(3, &[(0, 0, 1)])]);
        add(&left_out, 40, &received, &out).unwrap();
        assert_eq!(read(&out, 8), [(5, 0, 2), (40, 1, 7), (41, 0, 9)]);
        assert_eq!(read(&out, 9), [(5, 0, 2), (41, 0, 0)]);
        assert_eq!(fs::read(received.join("fdinfo-8.img")).unwrap(), before);
        assert_eq!(fs::metadata(received.join("fdinfo-9.img")).unwrap().nlink(), 1);
    }

    #[test]
    fn a_number_that_criu_knows_too_and_a_file_that_nobody_does_are_refused() {
        for wrong in [(2, 0, 0), (3, 0, 2)] {
            let (_dir, received, out) = images();
            let error = add(&left_out(vec![process(3, &[wrong])]), 40, &received, &out).unwrap_err();
            assert!(
                matches!(error, MergeError::Descriptor { pid: 3, number } if number == wrong.0),
                "{error}"
            );
        }
    }

    #[test]
    fn a_directory_shows_what_it_is_to_show() {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().join("fd");
        make_directory(&at, &[(3, "socket:[77]".into()), (12, "/dev/null".into())]).unwrap();
        let names: BTreeSet<_> = fs::read_dir(&at).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names.into_iter().collect::<Vec<_>>(), ["12", "3"]);
        assert_eq!(fs::read_link(at.join("3")).unwrap(), Path::new("socket:[77]"));
    }
}
