//! Tmpfs mounts: on the source read beside whatever lies over them, on the target filled before they are mounted.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use haulage_protocol::checkpointer::SourceTmpfs;
use haulage_protocol::fault::Fault;
use haulage_protocol::syncer::TargetRoot;
use haulage_sys::Pid;
use haulage_sys::mount_ns::mounted_alone;
use haulage_sys::tmpfs::detached;
use rustix::fs::{fstat, major, minor};

use crate::failure::{TMPFS, fault};

/// Makes them, mounted nowhere, and tells where they can be reached. They are gone with their descriptors.
pub(crate) fn make(all: &[SourceTmpfs]) -> Result<(Vec<OwnedFd>, Vec<TargetRoot>), Fault> {
    let mut made = Vec::with_capacity(all.len());
    let mut places = Vec::with_capacity(all.len());
    for tmpfs in all {
        let open = detached(&tmpfs.options).map_err(fault(TMPFS))?;
        // Of this process, so that another one can go there.
        let path = format!("/proc/{}/fd/{}", std::process::id(), open.as_raw_fd());
        places.push(TargetRoot { root: tmpfs.root(), path });
        made.push(open);
    }
    Ok((made, places))
}

/// Opens one of a container's, alone, if it is still there.
pub(crate) fn open(tmpfs: &SourceTmpfs) -> Result<OwnedFd, Fault> {
    let gone = || {
        let message = format!("the tmpfs at {} is not there any more", tmpfs.at);
        Fault::new(TMPFS, message)
            .remedy("see whether the container was restarted, and start the migration again")
    };
    let process = Pid::from_raw(tmpfs.process).ok_or_else(gone)?;
    let root = mounted_alone(process, Path::new(&tmpfs.at)).map_err(|error| gone().because(&error))?;
    let device = fstat(&root).map_err(fault(TMPFS))?.st_dev;
    match format!("{}:{}", major(device), minor(device)) == tmpfs.device {
        true => Ok(root),
        false => Err(gone()),
    }
}

/// Where one is reached while it is open.
pub(crate) fn path(open: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", open.as_raw_fd()))
}
