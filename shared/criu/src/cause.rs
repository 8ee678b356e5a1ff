//! From CRIU's log to what went wrong and what to do about it.

use std::fmt;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::Path;

/// The most error lines that are kept of a log.
const MAX_ERRORS: usize = 8;
/// The most that is kept of a line, in characters.
const MAX_LINE: usize = 300;
/// Errors are near the end of a log: no more than this is read, in bytes.
const MAX_LOG: u64 = 8 << 20;

/// Errors that CRIU logs and that mean nothing.
const HARMLESS: &[&str] =
    &["Can't setup RLIMIT_NOFILE", "Dumping FAILED", "Restoring FAILED", "Running FAILED"];

/// A failure that is understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Known {
    /// What CRIU's log says, in part.
    pattern: &'static str,
    /// What it means.
    pub meaning: &'static str,
    /// What to do about it.
    pub remedy: &'static str,
}

/// The texts are those of CRIU 4.1 to 4.2. The first match wins, so the particular stands before the general.
const KNOWN: &[Known] = &[
    known(
        "found while seizing",
        "a process of the container was exiting while it was frozen",
        "try again; if it persists, the container has a process that cannot die",
    ),
    known(
        "in the freezer cgroup",
        "the container's cgroup has a process that is not a descendant of its init, such as an exec session",
        "end exec sessions and try again",
    ),
    known(
        "anon_inode:[userfaultfd]",
        "a process uses userfaultfd, which cannot be dumped",
        "stop the program that uses it, or run it without userfaultfd",
    ),
    known(
        "anon_inode:[io_uring]",
        "a process uses io_uring, which CRIU cannot dump",
        "configure the program not to use io_uring",
    ),
    known(
        "consider using --tcp-established",
        "the container has established TCP connections and the restore was told to refuse them",
        "allow established connections",
    ),
    known(
        "--ext-unix-sk",
        "a unix socket is connected to a process outside the container",
        "close the connection to the host's socket before moving",
    ),
    known(
        "file locks are hold",
        "a process holds file locks and the dump was told to refuse them",
        "allow file locks",
    ),
    known(
        "Can't dump ghost file",
        "a large file was deleted and is still open",
        "have the program close the deleted file, or raise the limit for such files",
    ),
    known(
        "Can't bind inet socket",
        "an address or port that the container had is not free on this host",
        "free the address, or check that the container's network has the same address here",
    ),
    known(
        "has bad size",
        "a file that the container had open has another size here: it changed after it was copied",
        "see that nothing else writes to the container's files, and try again",
    ),
    known(
        "has bad mode",
        "a file that the container had open has another mode here",
        "see that nothing else changes the container's files, and try again",
    ),
    known(
        "Can't open file",
        "a file that the container had open is not here",
        "see that all mounts of the container are declared, and try again",
    ),
    known(
        "Can't lookup mount",
        "a mount of the container is missing here",
        "see that the container was created with the same mounts and mask paths",
    ),
    known(
        "CPU capabilities do not match",
        "this host's CPU lacks features that the source's CPU has",
        "choose another target",
    ),
    known(
        "ins capability mismatch",
        "this host's CPU lacks features that the source's CPU has",
        "choose another target",
    ),
    known("Unexpected rt vDSO", "this CRIU is too old for the kernel", "install CRIU 4.1 or newer"),
    known(
        "vdso: ELF header magic mismatch",
        "the page images do not fit this CRIU",
        "use the same CRIU on both hosts",
    ),
    known(
        "PAGEMAP_SCAN: Inappropriate ioctl",
        "CRIU used its cached knowledge of the kernel in place of the masked pagemap",
        "try again",
    ),
    known(
        "Can't get 1:16 opt",
        "this CRIU cannot dump internet sockets on Linux 6.16 and later",
        "install CRIU 4.2 or newer",
    ),
    known(
        "VMA-s are not sorted in the image file",
        "a program has guard regions of memory, which the target's CRIU does not know",
        "install CRIU 4.2 or newer on the target",
    ),
    known(
        "MADV_GUARD_INSTALL) failed",
        "a program has guard regions of memory, which the target's kernel does not know",
        "choose a target with Linux 6.13 or later",
    ),
    known(
        "wrong aio: ",
        "a program has a queue for asynchronous io, which the kernel makes larger on this host, with its more processors",
        "choose a target with no more processors than the source",
    ),
    known("No space left on device", "the disk is full", "make room for the images"),
    known("Cannot allocate memory", "the host is out of memory", "free memory or choose another target"),
];

const fn known(pattern: &'static str, meaning: &'static str, remedy: &'static str) -> Known {
    Known { pattern, meaning, remedy }
}

/// Why CRIU failed, as far as its log tells.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Cause {
    /// The first errors, oldest first, without time stamps.
    pub errors: Vec<String>,
    /// The failure, when it is understood.
    pub known: Option<Known>,
}

impl Cause {
    /// Reads CRIU's log. `said` is what CRIU answered, for when the log has nothing. A log that cannot be read is no
    /// error: the cause then says only what is known otherwise.
    pub fn of_log(log: &Path, said: Option<String>) -> Self {
        let lines = File::open(log).map(error_lines).unwrap_or_default();
        Self::of_errors(lines.into_iter().chain(said))
    }

    /// The cause in error lines that were found elsewhere.
    pub fn of_errors(lines: impl IntoIterator<Item = String>) -> Self {
        let mut errors: Vec<String> = Vec::new();
        let mut known = None;
        for line in lines {
            if HARMLESS.iter().any(|text| line.contains(text)) {
                continue;
            }
            known = known.or_else(|| KNOWN.iter().find(|entry| line.contains(entry.pattern)).copied());
            if errors.len() < MAX_ERRORS && !errors.contains(&line) {
                errors.push(line);
            }
        }
        Self { errors, known }
    }

    /// What to do about it, when that is known.
    pub fn remedy(&self) -> Option<&'static str> {
        self.known.map(|known| known.remedy)
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(known) = self.known {
            write!(f, "{} (remedy: {})", known.meaning, known.remedy)?;
            if let Some(first) = self.errors.first() {
                write!(f, "; criu said: {first}")?;
            }
            return Ok(());
        }
        if self.errors.is_empty() {
            f.write_str("criu's log gives no reason")
        } else {
            f.write_str(&self.errors.join("; "))
        }
    }
}

fn error_lines(mut log: File) -> Vec<String> {
    let length = log.metadata().map_or(0, |meta| meta.len());
    if length > MAX_LOG && log.seek(SeekFrom::Start(length - MAX_LOG)).is_err() {
        return Vec::new();
    }
    BufReader::new(log.take(MAX_LOG))
        .split(b'\n')
        .map_while(Result::ok)
        .filter_map(|line| error_text(&String::from_utf8_lossy(&line)))
        .collect()
}

/// The message of a line such as `(00.012345)      1: Error (criu/mem.c:123): message`.
fn error_text(line: &str) -> Option<String> {
    let (_, rest) = line.split_once("Error (")?;
    let (_, message) = rest.split_once("): ")?;
    Some(message.trim().chars().take(MAX_LINE).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_yields_its_errors_and_the_known_cause() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("restore.log");
        std::fs::write(
            &log,
            "(00.000001) Version: 4.1.1\n\
             (00.000100) Error (criu/rlimit.c:1): Can't setup RLIMIT_NOFILE for self: Operation not permitted\n\
             (00.010000)      1: Error (criu/files-reg.c:2151): File app/data has bad size 5 (expect 6)\n\
             (00.010100) Error (criu/cr-restore.c:2536): Restoring FAILED.\n",
        )
        .unwrap();
        let cause = Cause::of_log(&log, None);
        assert_eq!(cause.errors, ["File app/data has bad size 5 (expect 6)"]);
        assert!(cause.to_string().contains("another size here"));
        assert!(cause.remedy().is_some());
    }

    #[test]
    fn the_unknown_is_quoted_and_silence_is_said() {
        let cause = Cause::of_errors(["odd".to_owned(), "odder".to_owned()]);
        assert_eq!(cause.to_string(), "odd; odder");
        assert_eq!(Cause::of_log(Path::new("/nonexistent"), None).to_string(), "criu's log gives no reason");
        assert_eq!(Cause::of_log(Path::new("/nonexistent"), Some("said".into())).to_string(), "said");
    }
}
