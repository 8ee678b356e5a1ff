//! Facts about a process that plain files tell, and what this process does with memory.

use std::fs;
use std::io;

/// Sets how readily the kernel kills this process when memory is short: -1000 (never) to 1000 (first).
///
/// # Errors
/// `EACCES` for a lower value without `CAP_SYS_RESOURCE`, `EINVAL` outside the range. The value is unchanged then.
pub fn set_oom_score_adj(value: i16) -> io::Result<()> {
    fs::write("/proc/self/oom_score_adj", value.to_string())
}

/// What [`set_oom_score_adj`] set.
///
/// # Errors
/// When the file cannot be read or is not a number.
pub fn oom_score_adj() -> io::Result<i16> {
    let text = fs::read_to_string("/proc/self/oom_score_adj")?;
    text.trim().parse().map_err(|source| io::Error::new(io::ErrorKind::InvalidData, source))
}

/// Makes this process deaf to SIGHUP, which the kernel sends to a process that stands stopped when its parent dies.
pub fn ignore_hangup() {
    // SAFETY: ignoring a signal installs no handler; the call cannot fail for a signal that exists.
    unsafe { libc::signal(libc::SIGHUP, libc::SIG_IGN) };
}

/// Blocks of memory from here on are always mapped on their own.
const LARGE: i32 = 8 << 20;

/// Arenas of the allocator. By default threads get arenas of their own, up to 8 for each processor; each keeps what its
/// threads had ever on their way, and none but the first can give it back ([`give_back_freed_memory`]).
const ARENAS: i32 = 1;

/// Makes the allocator keep up to `bytes` of freed memory for what is allocated next rather than give it back at once.
/// Who allocates and frees large buffers all the time else has the kernel clear each page of them every time. Without
/// effect where the C library has no such choice.
///
/// To be called before threads are started: they get arenas of their own otherwise, each of which keeps as much.
pub fn keep_freed_memory(bytes: u32) {
    let bytes = i32::try_from(bytes).unwrap_or(i32::MAX);
    // SAFETY: mallopt takes two numbers and may be called at any time.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, ARENAS);
        libc::mallopt(libc::M_TRIM_THRESHOLD, bytes);
        libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE);
    }
}

/// Gives back what is kept, for when nothing is under way: it is not needed again soon.
pub fn give_back_freed_memory() {
    // SAFETY: the call takes a number and may be made at any time.
    unsafe { libc::malloc_trim(0) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_was_freed_is_there_again() {
        keep_freed_memory(32 << 20);
        // Written once, so that the block is there; a block that was given back would read as zeros.
        let block = vec![7_u8; 3 << 20];
        let place = block.as_ptr() as usize;
        // So that the block is not the last one: the test's thread has an arena that keeps the end of it.
        let above = vec![7_u8; 64 << 10];
        drop(block);
        let is_there = || {
            let mut entries = [crate::pagemap::Entry::default()];
            let page = (place as u64 + (1 << 20)) / crate::abi::PAGE_SIZE;
            let own = crate::pagemap::Pagemap::open(rustix::process::getpid()).unwrap();
            own.read_entries(page, &mut entries).unwrap();
            entries[0].is_present()
        };
        assert!(is_there(), "it was given back at once");
        give_back_freed_memory();
        assert!(!is_there(), "it is kept");
        drop(above);
    }

    #[test]
    fn a_raised_score_reads_back() {
        let before = oom_score_adj().unwrap();
        set_oom_score_adj(before.max(100)).unwrap();
        assert_eq!(oom_score_adj().unwrap(), before.max(100));
        assert!(set_oom_score_adj(2000).is_err());
    }
}
