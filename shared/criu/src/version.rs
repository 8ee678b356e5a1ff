//! Which CRIU is installed, and whether it can work on this kernel.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::sockopt::socket_passcred;
use rustix::net::{AddressFamily, SocketType, socket};

use crate::cause::Cause;
use crate::rpc::{Kind, Options, Request};
use crate::swrk::{Criu, RpcError, Worker};

/// Both questions are answered in well under a second; a `check` that loads kernel modules takes longer.
const PATIENCE: Duration = Duration::from_secs(30);
const CHECK_LOG: &str = "criu-check.log";

/// A release of CRIU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version {
    /// 4 of 4.1.1.
    pub major: u32,
    /// 1 of 4.1.1.
    pub minor: u32,
    /// The last 1 of 4.1.1.
    pub sublevel: u32,
}

impl Version {
    /// The oldest release that restores on current kernels (older ones fail on the vDSO of Linux 6.16 and later).
    pub const OLDEST: Self = Self { major: 4, minor: 1, sublevel: 0 };
    /// The oldest release that dumps internet sockets on Linux 6.16 and later, where `SO_PASSCRED` and `SO_PASSSEC`
    /// are refused on them: 4.1 asks all sockets for these and fails, which its own check does not notice.
    pub const OLDEST_WITHOUT_PASSCRED: Self = Self { major: 4, minor: 2, sublevel: 0 };
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.sublevel)
    }
}

/// CRIU is there, but cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum UnfitError {
    /// It could not be asked.
    #[error("cannot ask criu what it can do")]
    Rpc(#[from] RpcError),
    /// Too old.
    #[error("criu {found} is too old for this kernel, {needed} or newer is needed")]
    TooOld {
        /// What is installed.
        found: Version,
        /// What would do.
        needed: Version,
    },
    /// CRIU's own check says no.
    #[error("criu cannot work on this kernel: {cause}")]
    Kernel {
        /// What it said.
        cause: Cause,
    },
    /// A working file could not be made.
    #[error("cannot use the working directory")]
    WorkDir(#[source] io::Error),
}

impl Criu {
    /// The installed release.
    ///
    /// # Errors
    /// When CRIU cannot be started or does not answer.
    pub fn version(&self) -> Result<Version, RpcError> {
        let mut worker = Worker::start(self, None, (None, None), None)?;
        worker.send(&Request { kind: Kind::Version.into(), ..Request::default() })?;
        let response = worker.answer(Kind::Version, PATIENCE)?;
        let numbers = response.version.unwrap_or_default();
        let number = |value: i32| u32::try_from(value).unwrap_or(0);
        Ok(Version {
            major: number(numbers.major),
            minor: number(numbers.minor),
            sublevel: number(numbers.sublevel.unwrap_or(0)),
        })
    }

    /// The release, if it is new enough and passes CRIU's own check of this kernel. `work_dir` gets its log.
    ///
    /// # Errors
    /// Why it cannot be used. Nothing was changed.
    pub fn fit(&self, work_dir: &Path) -> Result<Version, UnfitError> {
        let found = self.version()?;
        let needed = if passcred_is_refused() { Version::OLDEST_WITHOUT_PASSCRED } else { Version::OLDEST };
        if found < needed {
            return Err(UnfitError::TooOld { found, needed });
        }
        let dir = File::open(work_dir).map_err(UnfitError::WorkDir)?;
        let mut worker = Worker::start(self, None, (None, None), None)?;
        let dir_fd = dir.as_raw_fd();
        worker.send(&Request {
            kind: Kind::Check.into(),
            options: Some(Options {
                images_dir_fd: dir_fd,
                work_dir_fd: Some(dir_fd),
                log_level: Some(2),
                log_file: Some(CHECK_LOG.to_owned()),
                ..Options::default()
            }),
            ..Request::default()
        })?;
        match worker.answer(Kind::Check, PATIENCE) {
            Ok(_) => Ok(found),
            Err(RpcError::Refused(said)) => {
                Err(UnfitError::Kernel { cause: Cause::of_log(&work_dir.join(CHECK_LOG), said) })
            }
            Err(error) => Err(error.into()),
        }
    }
}

/// Whether this kernel has no credentials on internet sockets. One that cannot be asked is taken for one that has.
fn passcred_is_refused() -> bool {
    socket(AddressFamily::INET, SocketType::STREAM, None)
        .and_then(|socket| socket_passcred(&socket))
        .is_err_and(|errno| errno == Errno::OPNOTSUPP)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_are_ordered() {
        let v = |major, minor, sublevel| Version { major, minor, sublevel };
        assert!(v(3, 17, 1) < Version::OLDEST);
        assert!(v(4, 1, 1) > Version::OLDEST && v(4, 1, 1) < v(4, 2, 0));
        assert_eq!(v(4, 1, 1).to_string(), "4.1.1");
    }
}
