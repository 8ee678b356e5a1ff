//! The socket in a store's directory on which the page-shipper, which has the connection to the source, hands over what the
//! source owed, and the page server says what it wants.
//!
//! ```text
//! page server                    page-shipper ══ source
//!   | ASK* , BEGIN, ASK* --------> |   words, 24 bytes each
//!   | <----------------- batch*    |   length u32, little-endian, and a batch as it came
//!   | closes --------------------> |   nothing is missing
//!   | <------------------- closes  |   the source, or the way to it, is lost
//! ```

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use crate::frame::MAX_FRAME;
use crate::owed::Word;

/// The socket's name.
const SOCKET: &str = "owed.socket";
/// Of a batch that has begun to come, the rest comes within this time: it is in the page-shipper's memory.
const REST_WITHIN: Duration = Duration::from_secs(20);

/// Listens in the directory of a store.
///
/// # Errors
/// When there is a socket already, or none can be made.
pub fn listen(store: &Path) -> io::Result<UnixListener> {
    // The path of a deep directory is longer than a socket's name may be.
    let dir = File::open(store)?;
    UnixListener::bind(format!("/proc/self/fd/{}/{SOCKET}", dir.as_raw_fd()))
}

/// The page server's end.
#[derive(Debug)]
pub struct Link(UnixStream);

impl Link {
    /// Connects to who listens in the directory of a store.
    ///
    /// # Errors
    /// When nobody does.
    pub fn connect(store: &Path) -> io::Result<Self> {
        let dir = File::open(store)?;
        let stream = UnixStream::connect(format!("/proc/self/fd/{}/{SOCKET}", dir.as_raw_fd()))?;
        stream.set_read_timeout(Some(REST_WITHIN))?;
        Ok(Self(stream))
    }

    /// Says something to the source.
    ///
    /// # Errors
    /// When nobody listens any more.
    pub fn say(&mut self, word: Word) -> io::Result<()> {
        self.0.write_all(&word.encode())
    }

    /// The next batch, encoded. To be called when there is something to be read.
    ///
    /// # Errors
    /// When the other end has closed, or what comes is no batch.
    pub fn receive(&mut self) -> io::Result<Vec<u8>> {
        let mut length = [0; 4];
        self.0.read_exact(&mut length)?;
        let length = u32::from_le_bytes(length) as usize;
        if length > MAX_FRAME {
            return Err(io::Error::new(ErrorKind::InvalidData, "longer than a batch may be"));
        }
        let mut bytes = vec![0; length];
        self.0.read_exact(&mut bytes)?;
        Ok(bytes)
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
