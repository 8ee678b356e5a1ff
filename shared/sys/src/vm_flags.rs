//! The flags of mappings, without a look at their pages.
//!
//! `/proc/<pid>/smaps` tells them (`VmFlags`) together with counts of pages, which cost some 27 ms per GiB of memory. A
//! BPF program that the kernel runs for each mapping ([`crate::mapping_iterator`]) tells them in microseconds.
//!
//! Which bit is which flag is the kernel's own affair, and differs at the upper end. So a program counts as good only
//! after it and `smaps` have told the same about this process, among whose mappings there is one for each flag that an
//! image has, but for huge pages of a pool, which a host need not have.
//!
//! # References
//! `include/linux/mm.h`, and `show_smap_vma_flags` of `fs/proc/task_mmu.c`.

use std::io::{self, ErrorKind};
use std::ptr;

use crate::Pid;
use crate::abi::PAGE_BYTES;
use crate::mapping_iterator::MappingIterator;

/// What `smaps` calls each of the lower 32 bits, the first one first. Nothing where it has no name.
const WORDS: [&str; 32] = [
    "rd", "wr", "ex", "sh", "mr", "mw", "me", "ms", "gd", "um", "pf", "", "uw", "lo", "io", "sr", "rr", "dc",
    "de", "", "ac", "nr", "ht", "sf", "ar", "wf", "dd", "sd", "mm", "hg", "nh", "mg",
];
/// Flags above those that must not go unseen: a shadow stack, and memory that the kernel may drop. Of the latter, which
/// C libraries keep random numbers in, this process learns the bit.
const WEIGHTY: [&str; 2] = ["ss", DROPPABLE];
const DROPPABLE: &str = "dp";
/// `MAP_DROPPABLE` of `linux/mman.h`, since 6.11.
const MAP_DROPPABLE: libc::c_int = 0x08;
/// The program is tried so often before it counts as bad: other threads map and unmap.
const ATTEMPTS: usize = 3;
/// Advice that sets a flag.
const ADVICE: [libc::c_int; 8] = [
    libc::MADV_SEQUENTIAL,
    libc::MADV_RANDOM,
    libc::MADV_DONTFORK,
    libc::MADV_DONTDUMP,
    libc::MADV_MERGEABLE,
    libc::MADV_HUGEPAGE,
    libc::MADV_NOHUGEPAGE,
    libc::MADV_WIPEONFORK,
];

/// One mapping.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Flagged {
    /// Its first address.
    pub start: u64,
    /// One past its last.
    pub end: u64,
    /// Its flags as `smaps` has them, e.g. `rd wr mr mw me ac`. Of those above the 32nd bit only `dp` is named.
    pub words: String,
}

/// A program that tells flags, loaded.
#[derive(Debug)]
pub struct VmFlags {
    iterator: MappingIterator,
    upper: Upper,
}

/// What this process's mappings tell of the bits above the 32nd.
#[derive(Debug, Clone, Copy, Default)]
struct Upper {
    /// Those of mappings that have none of [`WEIGHTY`].
    harmless: u64,
    /// Those that only a mapping has which is [`DROPPABLE`].
    droppable: u64,
}

impl VmFlags {
    /// Loads the program and tries it on this process. Takes some 50 ms, most of it to read the kernel's types.
    ///
    /// # Errors
    /// Where the kernel (before 6.1, without type information or locked down) or a missing `CAP_BPF` or `CAP_PERFMON`
    /// does not allow it, and when it does not tell what `smaps` does.
    pub fn load() -> io::Result<Self> {
        let mut loaded = Self { iterator: MappingIterator::load()?, upper: Upper::default() };
        let mut left = ATTEMPTS;
        loaded.upper = loop {
            left -= 1;
            match loaded.compare() {
                Err(error) if error.kind() == ErrorKind::InvalidData && left > 0 => {}
                compared => break compared?,
            }
        };
        Ok(loaded)
    }

    /// All mappings of `pid`, ascending; none when there is no such process. Of one that runs, they may be of different
    /// moments.
    ///
    /// # Errors
    /// `Unsupported` when one has a flag that is not known; `InvalidData` when they are not in order, as those of a
    /// process that runs may be.
    pub fn of(&self, pid: Pid) -> io::Result<Vec<Flagged>> {
        self.iterator
            .tell(pid)?
            .into_iter()
            .map(|(start, end, flags)| {
                let words = words(flags, self.upper).ok_or(ErrorKind::Unsupported)?;
                Ok(Flagged { start, end, words })
            })
            .collect()
    }

    /// Compares what both say about this process; the upper bits. Other threads may map and unmap meanwhile, so
    /// mappings that only one of both knows are passed over; those made here must be among the others.
    fn compare(&self) -> io::Result<Upper> {
        let samples = Samples::make()?;
        let told = self.iterator.tell(rustix::process::getpid())?;
        let smaps = std::fs::read_to_string("/proc/self/smaps")?;
        let (mut upper, mut seen) = (Upper::default(), 0);
        for (range, said) in flags_of(&smaps) {
            let Some((start, _, flags)) = told.iter().find(|(start, end, _)| (*start, *end) == range) else {
                continue;
            };
            let bits = flags >> 32 << 32;
            match said.iter().find(|word| WEIGHTY.contains(word)) {
                None => upper.harmless |= bits,
                Some(word) if *word == DROPPABLE => upper.droppable |= bits,
                Some(_) => {}
            }
            let named = words(*flags, Upper { harmless: u64::MAX, droppable: 0 }).unwrap_or_default();
            // Those of the upper bits have names that are not ours to know.
            let is_same = named.split_ascii_whitespace().all(|word| said.contains(&word))
                && said.iter().filter(|word| WORDS.contains(*word)).all(|word| named.contains(*word));
            if !is_same {
                let message = format!("smaps says {said:?} of a mapping with the flags {flags:#x}");
                return Err(io::Error::new(ErrorKind::InvalidData, message));
            }
            seen += usize::from(samples.all.contains(start));
        }
        upper.droppable &= !upper.harmless;
        match seen == samples.all.len() {
            true => Ok(upper),
            false => Err(io::Error::new(ErrorKind::InvalidData, "it does not tell all mappings")),
        }
    }
}

/// The ranges and flags of a `smaps`.
fn flags_of(smaps: &str) -> impl Iterator<Item = ((u64, u64), Vec<&str>)> {
    let mut range = None;
    smaps.lines().filter_map(move |line| match line.strip_prefix("VmFlags:") {
        Some(words) => Some((range.take()?, words.split_ascii_whitespace().collect())),
        None => {
            let (start, end) = line.split(' ').next()?.split_once('-')?;
            range = Some((u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?));
            None
        }
    })
}

/// Nothing when there is a bit of which nothing is known.
fn words(flags: u64, upper: Upper) -> Option<String> {
    let told: Vec<_> =
        (0u32..).zip(WORDS).filter(|(bit, word)| !word.is_empty() && flags >> bit & 1 == 1).collect();
    let named = told.iter().fold(0, |all, (bit, _)| all | 1 << bit);
    // A lock on fault (bit 19) comes with a lock. The other one without a name is not in use.
    let known = named | (upper.harmless | upper.droppable) >> 32 << 32 | 1 << 19;
    let droppable = (flags & upper.droppable != 0).then_some(DROPPABLE);
    let words = told.into_iter().map(|(_, word)| word).chain(droppable);
    (flags & !known == 0).then(|| words.collect::<Vec<_>>().join(" "))
}

/// Mappings of this process, each with another flag.
struct Samples {
    /// Where each begins.
    all: Vec<u64>,
}

impl Samples {
    fn make() -> io::Result<Self> {
        let mut samples = Self { all: Vec::new() };
        samples.map(libc::MAP_PRIVATE | libc::MAP_NORESERVE)?;
        samples.map(libc::MAP_SHARED)?;
        // Older kernels have no such kind of mapping.
        if let Err(error) = samples.map(MAP_DROPPABLE)
            && ![ErrorKind::InvalidInput, ErrorKind::Unsupported].contains(&error.kind())
        {
            return Err(error);
        }
        for advice in ADVICE {
            let at = samples.map(libc::MAP_PRIVATE)?;
            // SAFETY: the range is one that was mapped above, which nobody reads or writes.
            match unsafe { libc::madvise(at, PAGE_BYTES, advice) } {
                0 => {}
                // A kernel without huge pages or without merging has no such flag.
                _ if io::Error::last_os_error().kind() == ErrorKind::InvalidInput => {}
                _ => return Err(io::Error::last_os_error()),
            }
        }
        let at = samples.map(libc::MAP_PRIVATE)?;
        // SAFETY: as above.
        match unsafe { libc::mlock(at, PAGE_BYTES) } {
            0 => Ok(samples),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn map(&mut self, flags: libc::c_int) -> io::Result<*mut libc::c_void> {
        // Each with a page between it and the next, which keeps mappings of the same flags apart.
        // SAFETY: a new mapping at an address of the kernel's choice; it touches no memory of ours.
        let at = unsafe {
            libc::mmap(
                ptr::null_mut(),
                2 * PAGE_BYTES,
                libc::PROT_READ | libc::PROT_WRITE,
                flags | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        self.all.push(at as u64);
        // SAFETY: the second page of what was mapped just now, which nobody uses.
        match unsafe { libc::munmap(at.byte_add(PAGE_BYTES), PAGE_BYTES) } {
            0 => Ok(at),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Drop for Samples {
    fn drop(&mut self) {
        for at in &self.all {
            // SAFETY: mapped by `map`, and nobody uses it. A failure leaves a page mapped.
            unsafe { libc::munmap(*at as *mut libc::c_void, PAGE_BYTES) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::process::{Child, Command, Stdio};

    /// Ended on drop.
    struct Sleeper(Child);

    impl Drop for Sleeper {
        fn drop(&mut self) {
            self.0.kill().unwrap();
            self.0.wait().unwrap();
        }
    }

    #[test]
    fn it_tells_what_smaps_does() {
        let flags = VmFlags::load().unwrap();
        let mut child = Command::new("sh");
        child.args(["-c", "echo ready; read line"]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut sleeper = Sleeper(child.spawn().unwrap());
        sleeper.0.stdout.as_mut().unwrap().read_exact(&mut [0; 6]).unwrap();
        let pid = Pid::from_child(&sleeper.0);
        let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
        let expected: Vec<_> =
            flags_of(&smaps).filter(|((start, _), _)| *start < crate::abi::ADDRESS_END).collect();
        let told = flags.of(pid).unwrap();
        assert_eq!(told.len(), expected.len());
        for (told, (range, words)) in told.iter().zip(&expected) {
            let words: Vec<_> = words.iter().copied().filter(|word| WORDS.contains(word)).collect();
            assert_eq!((told.start, told.end), *range);
            assert_eq!(told.words.split(' ').collect::<Vec<_>>(), words);
        }
    }

    #[test]
    fn more_mappings_than_one_read_tells_are_all_told() {
        const PAGES: usize = 4000;
        let (length, flags) = (PAGES * PAGE_BYTES, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping; every other page of it gets another protection, and all of it goes in the end.
        let start = unsafe { libc::mmap(ptr::null_mut(), length, libc::PROT_READ, flags, -1, 0) };
        assert_ne!(start, libc::MAP_FAILED);
        for page in (1..PAGES).step_by(2) {
            // SAFETY: as above.
            let changed = unsafe {
                libc::mprotect(
                    start.byte_add(page * PAGE_BYTES),
                    PAGE_BYTES,
                    libc::PROT_READ | libc::PROT_WRITE,
                )
            };
            assert_eq!(changed, 0);
        }
        let told = VmFlags::load().unwrap().of(rustix::process::getpid()).unwrap();
        let address = |page: usize| start as u64 + (page * PAGE_BYTES) as u64;
        let inner: Vec<_> = told
            .iter()
            .map(|told| told.start)
            .filter(|at| (address(1)..address(PAGES)).contains(at))
            .collect();
        assert_eq!(inner, (1..PAGES).map(address).collect::<Vec<_>>());
        // SAFETY: as above.
        unsafe { libc::munmap(start, length) };
    }

    #[test]
    fn nobody_has_no_mappings() {
        // Above the highest id that the kernel gives.
        let nobody = Pid::from_raw(1 << 23).unwrap();
        assert_eq!(VmFlags::load().unwrap().of(nobody).unwrap(), []);
    }

    #[test]
    fn a_flag_that_is_not_known_is_not_passed_over() {
        let upper = Upper { harmless: 1 << 40, droppable: 1 << 41 };
        assert_eq!(words(0x10_0073, Upper::default()).as_deref(), Some("rd wr mr mw me ac"));
        assert_eq!(words(1 << 40 | 1, Upper::default()), None);
        assert_eq!(words(1 << 40 | 1, upper).as_deref(), Some("rd"));
        assert_eq!(words(1 << 41 | 1, upper).as_deref(), Some("rd dp"));
        assert_eq!(words(1 << 42, upper), None);
        assert_eq!(words(1 << 11, Upper { harmless: u64::MAX, droppable: 0 }), None);
    }
}
