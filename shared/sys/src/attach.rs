//! A process attaches System V segments ([`crate::ipc`]) where it had them: what lies there makes way.

use rustix::io::Errno;

use crate::error::CallError;
use crate::window::Window;

/// A segment, as a process is to have it attached. Addresses are in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attachment {
    /// The segment.
    pub id: i32,
    /// Where its first byte is.
    pub start: u64,
    /// For reading only, for good.
    pub read_only: bool,
    /// All of it, in address order.
    pub parts: Vec<Part>,
}

/// A part of it that is mapped in one way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// Its first byte.
    pub start: u64,
    /// The byte after its last.
    pub end: u64,
    /// `PROT_…` bits.
    pub prot: u32,
    /// A bit for each advice of `madvise(2)` that is in force.
    pub advice: u64,
}

/// Has the thread in whose place `window` makes calls attach a segment. Nothing of the process's memory is written to.
pub(crate) fn attach_in(window: &mut Window<'_>, attachment: &Attachment) -> Result<(), CallError> {
    let Attachment { id, start, read_only, parts } = attachment;
    let (access, prot) = match read_only {
        true => (libc::SHM_RDONLY, libc::PROT_READ),
        false => (0, libc::PROT_READ | libc::PROT_WRITE),
    };
    let flags = (libc::SHM_REMAP | access) as u64;
    let at = made(
        window,
        "shmat in the process",
        libc::SYS_shmat,
        &[u64::from(id.unsigned_abs()), *start, flags],
    )?;
    if at != *start {
        return Err(CallError::new("shmat in the process, elsewhere", Errno::FAULT));
    }
    for part in parts {
        let length = part.end - part.start;
        if part.prot != prot.unsigned_abs() {
            let arguments = [part.start, length, u64::from(part.prot)];
            made(window, "mprotect in the process", libc::SYS_mprotect, &arguments)?;
        }
        for advice in (0..u64::BITS).filter(|advice| part.advice >> advice & 1 != 0) {
            let arguments = [part.start, length, u64::from(advice)];
            made(window, "madvise in the process", libc::SYS_madvise, &arguments)?;
        }
    }
    Ok(())
}

fn made(
    window: &mut Window<'_>,
    name: &'static str,
    number: libc::c_long,
    arguments: &[u64],
) -> Result<u64, CallError> {
    window.made(name, number, arguments)?.map_err(|errno| CallError::new(name, errno))
}
