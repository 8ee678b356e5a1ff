//! On real memory of this process, whose faults and calls come from other threads.

use std::io::Write;

use super::*;
use crate::abi::{PAGE_BYTES, PAGE_SIZE};

const PAGES: usize = 8;
const EVENTS: u64 = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 6; // UFFD_FEATURE_EVENT_FORK, _REMAP, _REMOVE, _UNMAP
const MISSING: u64 = 1;

/// Memory of which nothing is there, and its descriptor. Never unmapped: a mapping is cheap, a test process short.
struct Missing {
    start: u64,
    memory: MissingMemory,
}

fn missing() -> Missing {
    let anonymous = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a new mapping, a new descriptor that we own, and ioctls on structures of the right type.
    unsafe {
        let len = PAGES * PAGE_BYTES;
        let start =
            libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, anonymous, -1, 0);
        assert_ne!(start, libc::MAP_FAILED);
        let fd = libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK);
        let fd = OwnedFd::from_raw_fd(i32::try_from(fd).unwrap());
        let mut api = abi::UffdioApi { api: abi::UFFD_API, features: EVENTS, ioctls: 0 };
        assert_eq!(libc::ioctl(fd.as_raw_fd(), abi::UFFDIO_API, &raw mut api), 0);
        let range = abi::UffdioRange { start: start as u64, len: len as u64 };
        let mut register = abi::UffdioRegister { range, mode: MISSING, ioctls: 0 };
        assert_eq!(libc::ioctl(fd.as_raw_fd(), abi::UFFDIO_REGISTER, &raw mut register), 0);
        Missing { start: start as u64, memory: MissingMemory::adopt(fd) }
    }
}

impl Missing {
    fn page(&self, number: usize) -> u64 {
        self.start + (number * PAGE_BYTES) as u64
    }
}

fn byte_at(address: u64) -> u8 {
    // SAFETY: the callers read within their own mapping; another thread fills it, which is the point.
    unsafe { std::ptr::read_volatile(address as *const u8) }
}

/// The next event, for which it waits.
fn next(memory: &MissingMemory) -> Event {
    loop {
        let mut fds = [rustix::event::PollFd::new(memory, rustix::event::PollFlags::IN)];
        rustix::event::poll(&mut fds, None).unwrap();
        let mut events = memory.read().unwrap();
        assert!(events.len() <= 1, "one thread causes one event at a time");
        if let Some(event) = events.pop() {
            return event;
        }
    }
}

fn source() -> FileSource {
    let mut file = tempfile::tempfile().unwrap();
    for page in 0..PAGES {
        file.write_all(&[page as u8 + 1; PAGE_BYTES]).unwrap();
    }
    FileSource::map(&file, (PAGES * PAGE_BYTES) as u64).unwrap()
}

#[test]
fn a_touched_page_is_told_and_served() {
    let (missing, source) = (missing(), source());
    let address = missing.page(3) + 17;
    let reader = std::thread::spawn(move || byte_at(address));
    let Event::Fault { address } = next(&missing.memory) else { panic!("not a fault") };
    assert_eq!(address, missing.page(3));
    let two = 2 * PAGE_SIZE;
    assert_eq!(missing.memory.copy(address, &source, 3 * PAGE_SIZE, two).unwrap(), Filled::Bytes(two));
    assert_eq!(reader.join().unwrap(), 4);
    assert_eq!(byte_at(missing.page(4)), 5, "its neighbour came along");
}

#[test]
fn what_is_there_stays_and_what_is_beyond_is_an_error() {
    let (missing, source) = (missing(), source());
    assert_eq!(missing.memory.zero(missing.page(1), PAGE_SIZE).unwrap(), Filled::Bytes(PAGE_SIZE));
    assert_eq!(missing.memory.copy(missing.page(1), &source, 0, PAGE_SIZE).unwrap(), Filled::Present);
    assert_eq!(byte_at(missing.page(1)), 0);
    let all = missing.memory.copy(missing.page(0), &source, 0, 3 * PAGE_SIZE).unwrap();
    assert_eq!(all, Filled::Bytes(PAGE_SIZE), "up to what is there");
    let beyond = missing.memory.copy(missing.page(2), &source, PAGES as u64 * PAGE_SIZE, PAGE_SIZE);
    assert_eq!(beyond.unwrap_err().errno, Errno::FAULT);
    assert_eq!(missing.memory.copy(PAGE_SIZE, &source, 0, PAGE_SIZE).unwrap(), Filled::Unmapped);
}

#[test]
fn dropped_unmapped_and_moved_memory_is_told_and_stops_filling() {
    let (missing, source) = (missing(), source());
    let (second, len) = (missing.page(2), PAGE_BYTES);
    // SAFETY: the calls change the test's own mapping, of which nobody holds a reference.
    let caller = std::thread::spawn(move || unsafe {
        let at = second as *mut libc::c_void;
        assert_eq!(libc::madvise(at, len, libc::MADV_DONTNEED), 0);
        assert_eq!(libc::munmap(at, len), 0);
        let moved = libc::mremap(
            (second + PAGE_SIZE) as *mut libc::c_void,
            len,
            len,
            libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED,
            at,
        );
        assert_eq!(moved, at);
    });
    let mut fds = [rustix::event::PollFd::new(&missing.memory, rustix::event::PollFlags::IN)];
    rustix::event::poll(&mut fds, None).unwrap();
    let stopped = missing.memory.copy(missing.page(0), &source, 0, PAGE_SIZE).unwrap();
    assert_eq!(stopped, Filled::Stopped, "an event waits to be read");
    let Event::Remove { start, end } = next(&missing.memory) else { panic!("not a removal") };
    assert_eq!((start, end), (second, second + PAGE_SIZE));
    let Event::Unmap { start, end } = next(&missing.memory) else { panic!("not an unmapping") };
    assert_eq!((start, end), (second, second + PAGE_SIZE));
    let Event::Remap { from, to, len } = next(&missing.memory) else { panic!("not a move") };
    assert_eq!((from, to, len), (second + PAGE_SIZE, second, PAGE_SIZE));
    let Event::Unmap { start, .. } = next(&missing.memory) else { panic!("not an unmapping") };
    assert_eq!(start, second + PAGE_SIZE, "where it was");
    caller.join().unwrap();
}

#[test]
fn a_childs_memory_comes_with_its_fork_and_ends_with_it() {
    let (missing, source) = (missing(), source());
    let address = missing.page(5);
    let child = std::thread::spawn(move || {
        // SAFETY: the child makes no call but a read of its memory, _exit, and shares nothing that it could leave locked.
        unsafe {
            let pid = libc::fork();
            if pid == 0 {
                libc::_exit(i32::from(byte_at(address)));
            }
            let mut status = 0;
            assert_eq!(libc::waitpid(pid, &raw mut status, 0), pid);
            libc::WEXITSTATUS(status)
        }
    });
    let Event::Fork(theirs) = next(&missing.memory) else { panic!("not a fork") };
    let Event::Fault { address } = next(&theirs) else { panic!("not a fault") };
    assert_eq!(address, missing.page(5));
    assert_eq!(theirs.copy(address, &source, 5 * PAGE_SIZE, PAGE_SIZE).unwrap(), Filled::Bytes(PAGE_SIZE));
    assert_eq!(child.join().unwrap(), 6);
    assert_eq!(theirs.copy(missing.page(6), &source, 0, PAGE_SIZE).unwrap(), Filled::Gone);
}
