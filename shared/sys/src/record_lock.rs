//! Locks that a process has on ranges of a file (`F_SETLK` of `fcntl(2)`), as `/proc` tells them.
//!
//! The kernel gives up such locks of a process on a file when the process closes any descriptor of that file.

use std::collections::hash_map::Entry;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::fs;
use std::io;
use std::mem::{offset_of, size_of};

use crate::Pid;

/// Where `l_start` counts from: the beginning.
const FROM_BEGINNING: i16 = libc::SEEK_SET as i16;

/// A lock of a process on a range of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecordLock {
    /// A descriptor of the file in the process, open for what the lock is for.
    pub descriptor: i32,
    /// Nobody else may have one on any of it, not even for reading.
    pub for_writing: bool,
    /// Where the range begins, in bytes.
    pub start: i64,
    /// Its length in bytes, 0 for all that there will ever be.
    pub length: i64,
}

/// A line of `/proc/locks`, or of `/proc/<pid>/fdinfo/<number>` behind `lock:`. Both name a file in the same way.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Told<'a> {
    owner: i32,
    /// Device and inode.
    file: &'a str,
    for_writing: bool,
    start: i64,
    length: i64,
}

impl<'a> Told<'a> {
    /// `None` for locks of other kinds, and for what is only waited for (`->`).
    fn of_line(line: &'a str) -> Option<Self> {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [_, "POSIX", _, kind, owner, file, start, end] = words[..] else { return None };
        let start: i64 = start.parse().ok()?;
        let length = match end {
            "EOF" => 0,
            last => last.parse::<i64>().ok()?.checked_sub(start)?.checked_add(1)?,
        };
        let for_writing = match kind {
            "WRITE" => true,
            "READ" => false,
            _ => return None,
        };
        Some(Self { owner: owner.parse().ok()?, file, for_writing, start, length })
    }

    fn all_of_descriptor(fdinfo: &'a str) -> impl Iterator<Item = Self> {
        fdinfo.lines().filter_map(|line| Self::of_line(line.strip_prefix("lock:")?))
    }
}

/// The processes that have such locks, by their ids as our `/proc` has them, and how many each.
///
/// # Errors
/// When they cannot be read.
pub fn owners() -> io::Result<HashMap<Pid, usize>> {
    let text = fs::read_to_string("/proc/locks")?;
    let mut owners = HashMap::new();
    for told in text.lines().filter_map(Told::of_line) {
        if let Some(pid) = Pid::from_raw(told.owner) {
            *owners.entry(pid).or_default() += 1;
        }
    }
    Ok(owners)
}

/// The locks of one process, each by a descriptor by which it could be taken. The process is not to change them meanwhile.
///
/// # Errors
/// When they cannot be read, or there is none such for one of them.
pub fn of_process(pid: Pid) -> io::Result<Vec<RecordLock>> {
    let mut locks = Vec::new();
    let (mut taken, mut seen) = (BTreeSet::new(), BTreeSet::new());
    for entry in fs::read_dir(format!("/proc/{pid}/fdinfo"))? {
        let entry = entry?;
        let text = fs::read_to_string(entry.path())?;
        let own = Told::all_of_descriptor(&text).filter(|told| told.owner == pid.as_raw_pid());
        for told in own {
            let key = (told.file.to_owned(), told.for_writing, told.start, told.length);
            let descriptor = entry.file_name().to_str().and_then(|name| name.parse().ok());
            let descriptor = descriptor.filter(|_| is_open_for(&text, told.for_writing));
            seen.insert(key.clone());
            if let Some(descriptor) = descriptor.filter(|_| taken.insert(key)) {
                let Told { for_writing, start, length, .. } = told;
                locks.push(RecordLock { descriptor, for_writing, start, length });
            }
        }
    }
    match taken == seen {
        true => Ok(locks),
        false => Err(io::Error::other(format!("process {pid} has a lock by no descriptor that allows it"))),
    }
}

/// Those of `wanted` that the processes have not.
///
/// # Errors
/// When what they have cannot be read; `NotFound` also when one has not the descriptor.
pub fn missing(wanted: &[(Pid, RecordLock)]) -> io::Result<Vec<(Pid, RecordLock)>> {
    // A descriptor tells all locks on its file, of which there may be thousands.
    let mut held = HashMap::new();
    for (pid, lock) in wanted {
        if let Entry::Vacant(place) = held.entry((*pid, lock.descriptor)) {
            let path = format!("/proc/{pid}/fdinfo/{}", lock.descriptor);
            let text = fs::read_to_string(&path);
            let text = text.map_err(|error| io::Error::new(error.kind(), format!("{path}: {error}")))?;
            let all = Told::all_of_descriptor(&text);
            let all = all.map(|told| (told.for_writing, told.start, told.length));
            place.insert(all.collect::<HashSet<_>>());
        }
    }
    let has = |(pid, lock): &&(Pid, RecordLock)| {
        let held = held.get(&(*pid, lock.descriptor));
        held.is_some_and(|held| held.contains(&(lock.for_writing, lock.start, lock.length)))
    };
    Ok(wanted.iter().filter(|wanted| !has(wanted)).copied().collect())
}

/// Whether what `/proc/<pid>/fdinfo/<number>` tells is open for writing, or for reading.
fn is_open_for(fdinfo: &str, writing: bool) -> bool {
    let flags = fdinfo.lines().find_map(|line| line.strip_prefix("flags:"));
    let flags = flags.and_then(|flags| i32::from_str_radix(flags.trim(), 8).ok());
    match flags.map(|flags| flags & libc::O_ACCMODE) {
        Some(libc::O_RDWR) => true,
        Some(libc::O_WRONLY) => writing,
        Some(libc::O_RDONLY) => !writing,
        _ => false,
    }
}

impl RecordLock {
    /// As `fcntl` takes it.
    pub(crate) fn to_bytes(self) -> [u8; size_of::<libc::flock>()] {
        let kind = if self.for_writing { libc::F_WRLCK } else { libc::F_RDLCK } as i16;
        let mut bytes = [0; size_of::<libc::flock>()];
        let mut put = |at: usize, value: &[u8]| {
            let places = bytes.iter_mut().skip(at);
            places.zip(value).for_each(|(place, byte)| *place = *byte);
        };
        put(offset_of!(libc::flock, l_type), &kind.to_ne_bytes());
        put(offset_of!(libc::flock, l_whence), &FROM_BEGINNING.to_ne_bytes());
        put(offset_of!(libc::flock, l_start), &self.start.to_ne_bytes());
        put(offset_of!(libc::flock, l_len), &self.length.to_ne_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locks_are_told_from_others_and_from_waits() {
        let told =
            |owner, file, for_writing, start, length| Some(Told { owner, file, for_writing, start, length });
        assert_eq!(
            Told::of_line("1: POSIX  ADVISORY  WRITE 7 00:2d:1033 0 EOF"),
            told(7, "00:2d:1033", true, 0, 0)
        );
        assert_eq!(
            Told::of_line("\t12: POSIX  ADVISORY  READ  4711 fe:01:9 120 127"),
            told(4711, "fe:01:9", false, 120, 8)
        );
        for other in [
            "1: -> POSIX  ADVISORY  WRITE 7 00:2d:1033 0 EOF",
            "1: OFDLCK ADVISORY  WRITE -1 00:2d:1033 0 EOF",
            "1: FLOCK  ADVISORY  WRITE 7 00:2d:1033 0 EOF",
            "1: LEASE  ACTIVE    WRITE 7 00:2d:1033 0 EOF",
            "1: POSIX  ADVISORY  UNLCK 7 00:2d:1033 0 EOF",
            "1: POSIX  ADVISORY  WRITE 7 00:2d:1033 0",
            "1: POSIX  ADVISORY  WRITE 7 00:2d:1033 9 -9223372036854775808",
            "",
        ] {
            assert_eq!(Told::of_line(other), None, "{other}");
        }
    }

    #[test]
    fn a_descriptor_is_open_for_what_it_says() {
        let open = |flags: &str| {
            let text = format!("pos:\t0\nflags:\t{flags}\nmnt_id:\t9\n");
            [true, false].map(|writing| is_open_for(&text, writing))
        };
        assert_eq!(open("02100002"), [true, true]);
        assert_eq!(open("0100001"), [true, false]);
        assert_eq!(open("0100000"), [false, true]);
        assert_eq!(open("x"), [false, false]);
    }
}
