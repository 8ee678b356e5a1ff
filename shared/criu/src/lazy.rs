//! The socket on which a lazy restore hands over the memory of its processes, in place of CRIU's own lazy-pages daemon.
//!
//! CRIU connects to [`SOCKET`] in its working directory and says, for each process, its id in the images (an `int`,
//! negative for a zombie, which has no memory) followed by a byte with a userfaultfd; and [`FINISHED`] when everything
//! is restored. After `send_uffd` and `lazy_pages_finish_restore` of `criu/uffd.c`.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use haulage_sys::pass_fd;

/// The socket's name, in the working directory of the restore.
pub const SOCKET: &str = "lazy-pages.socket";
/// `LAZY_PAGES_RESTORE_FINISHED`; no process has such an id.
const FINISHED: u32 = 0x5253_5446;
/// Our own, nor has any this one.
const SEALED: u32 = 0x5345_414c;

/// What a restore says.
#[derive(Debug)]
pub enum Said {
    /// All memory is there, and the restore is about to begin. No restore says so, but whoever stands before it may.
    Sealed,
    /// The memory of the process with this id in the images.
    Memory(u32, OwnedFd),
    /// This process has none.
    Zombie(u32),
    /// All processes are restored and are about to run.
    Finished,
    /// It has closed its end. Before [`Said::Finished`] this means that the restore has failed.
    Closed,
}

/// A restore that has connected.
#[derive(Debug)]
pub struct LazyRestore(UnixStream);

impl LazyRestore {
    /// Over an accepted connection.
    #[must_use]
    pub fn new(stream: UnixStream) -> Self {
        Self(stream)
    }

    /// Waits for the next thing that it says.
    ///
    /// # Errors
    /// When the connection fails, or what comes is not CRIU's.
    pub fn listen(&mut self) -> io::Result<Said> {
        let mut number = [0; 4];
        match self.0.read_exact(&mut number) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(Said::Closed),
            read => read?,
        }
        match u32::from_ne_bytes(number) {
            FINISHED => return Ok(Said::Finished),
            SEALED => return Ok(Said::Sealed),
            _ => {}
        }
        let pid = i32::from_ne_bytes(number);
        if pid <= 0 {
            return Ok(Said::Zombie(pid.unsigned_abs()));
        }
        match pass_fd::receive(&self.0)? {
            Some((_, Some(memory))) => Ok(Said::Memory(pid.unsigned_abs(), memory)),
            _ => Err(io::Error::new(io::ErrorKind::InvalidData, "a process without its memory")),
        }
    }
}

/// Passes on what a restore has said, in its own words.
///
/// # Errors
/// When nobody listens any more.
pub fn pass_on(said: &Said, to: &UnixStream) -> io::Result<()> {
    let number = |number: u32| (&*to).write_all(&number.to_ne_bytes());
    match said {
        Said::Memory(pid, memory) => {
            number(*pid)?;
            pass_fd::send(to, 0, Some(memory.as_fd()))
        }
        Said::Zombie(pid) => number(pid.wrapping_neg()),
        Said::Sealed => number(SEALED),
        Said::Finished => number(FINISHED),
        Said::Closed => to.shutdown(std::net::Shutdown::Write),
    }
}

impl AsFd for LazyRestore {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    #[test]
    fn a_restore_is_understood() {
        let (mut criu, ours) = UnixStream::pair().unwrap();
        let mut restore = LazyRestore::new(ours);
        criu.write_all(&7_i32.to_ne_bytes()).unwrap();
        pass_fd::send(&criu, 0, Some(tempfile::tempfile().unwrap().as_fd())).unwrap();
        criu.write_all(&(-8_i32).to_ne_bytes()).unwrap();
        criu.write_all(&FINISHED.to_ne_bytes()).unwrap();
        assert!(matches!(restore.listen().unwrap(), Said::Memory(7, _)));
        assert!(matches!(restore.listen().unwrap(), Said::Zombie(8)));
        assert!(matches!(restore.listen().unwrap(), Said::Finished));
        drop(criu);
        assert!(matches!(restore.listen().unwrap(), Said::Closed));
    }

    #[test]
    fn what_is_passed_on_is_heard_as_it_was_said() {
        let (here, there) = UnixStream::pair().unwrap();
        let mut restore = LazyRestore::new(there);
        let memory = tempfile::tempfile().unwrap().into();
        for said in [Said::Sealed, Said::Memory(7, memory), Said::Zombie(8), Said::Finished, Said::Closed] {
            pass_on(&said, &here).unwrap();
        }
        assert!(matches!(restore.listen().unwrap(), Said::Sealed));
        assert!(matches!(restore.listen().unwrap(), Said::Memory(7, _)));
        assert!(matches!(restore.listen().unwrap(), Said::Zombie(8)));
        assert!(matches!(restore.listen().unwrap(), Said::Finished));
        assert!(matches!(restore.listen().unwrap(), Said::Closed));
    }

    #[test]
    fn a_process_without_its_memory_is_an_error() {
        let (mut criu, ours) = UnixStream::pair().unwrap();
        criu.write_all(&7_i32.to_ne_bytes()).unwrap();
        pass_fd::send(&criu, 0, None).unwrap();
        assert!(LazyRestore::new(ours).listen().is_err());
        let (mut criu, ours) = UnixStream::pair().unwrap();
        criu.write_all(&7_i32.to_ne_bytes()).unwrap();
        drop(criu);
        assert!(LazyRestore::new(ours).listen().is_err());
    }
}
