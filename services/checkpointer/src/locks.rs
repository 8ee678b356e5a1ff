//! Locks of processes on ranges of files (`F_SETLK`): CRIU loses some, so they are written down beside its images, and whoever
//! restores sees to it that they are there ([`haulage_criu::record_locks`]).

use std::io;
use std::path::Path;

use haulage_criu::record_locks::{self, OwnedLock};
use haulage_pages::process::Process;
use haulage_protocol::fault::Fault;
use haulage_sys::record_lock;

use crate::failure::{DUMP, fault};

/// Writes down those of frozen processes. Where they have none, this reads one file of the kernel's.
///
/// # Errors
/// When it is not known what they have.
pub(crate) fn write_down(processes: impl Iterator<Item = Process>, images: &Path) -> Result<(), Fault> {
    let owners = record_lock::owners().map_err(fault(DUMP))?;
    if owners.is_empty() {
        return Ok(());
    }
    let mut all = Vec::new();
    for process in processes {
        let Some(number) = owners.get(&process.pid) else { continue };
        let locks = record_lock::of_process(process.pid).map_err(fault(DUMP))?;
        if locks.len() != *number {
            let process = process.vpid;
            let message = format!("process {process} has {number} locks, {} by its descriptors", locks.len());
            return Err(fault(DUMP)(io::Error::other(message)));
        }
        all.extend(locks.into_iter().map(|lock| OwnedLock::new(process.vpid.0, lock)));
    }
    record_locks::write(images, all).map_err(fault(DUMP))
}
