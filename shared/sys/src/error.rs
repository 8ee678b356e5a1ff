//! The error of one system call, with what it was asked for.

use rustix::io::Errno;

/// A system call failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{call} failed")]
pub struct CallError {
    /// What was called, as a reader of the manual pages would spell it.
    pub call: &'static str,
    /// What the kernel answered.
    #[source]
    pub errno: Errno,
}

impl CallError {
    pub(crate) fn new(call: &'static str, errno: Errno) -> Self {
        Self { call, errno }
    }

    /// The error that the thread's `errno` holds after a call of `libc` returned -1.
    pub(crate) fn last(call: &'static str) -> Self {
        let raw = std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO);
        Self { call, errno: Errno::from_raw_os_error(raw) }
    }

    /// Of a call that the standard library made.
    pub fn from_io(call: &'static str, error: &std::io::Error) -> Self {
        Self { call, errno: Errno::from_raw_os_error(error.raw_os_error().unwrap_or(libc::EIO)) }
    }

    /// Whether it failed because the process or thread is gone.
    pub fn is_gone(&self) -> bool {
        matches!(self.errno, Errno::SRCH | Errno::NOENT)
    }
}
