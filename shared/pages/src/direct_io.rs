//! Whether devices may write to a process's memory behind the back of its page tables.
//!
//! For direct and asynchronous IO the kernel marks a page written when it pins it, and the device fills it later. A
//! round in between sees the mark, protects the page, reads it too early, and nothing ever says that it has changed.
//! Pages of such a process are therefore read once more, when such a transfer must long be over ([`crate::ledger`]).

use std::fs;

use haulage_sys::Pid;

use crate::maps::Maps;

/// `O_DIRECT` of x86-64, as `fdinfo` shows it in octal.
const O_DIRECT: u32 = 0o40000;

/// Whether `pid` has a file open for direct IO, or a queue for asynchronous IO. A process that is gone has not.
pub(crate) fn in_use(pid: Pid, maps: &Maps) -> bool {
    if maps.regions().iter().any(|region| region.name.starts_with("/[aio]")) {
        return true;
    }
    let Ok(entries) = fs::read_dir(format!("/proc/{pid}/fd")) else { return false };
    entries.flatten().any(|entry| {
        let Ok(link) = fs::read_link(entry.path()) else { return false };
        let Some(link) = link.to_str() else { return true };
        match link {
            "anon_inode:[io_uring]" => true,
            // Sockets, pipes and the like have no direct IO.
            _ if !link.starts_with('/') => false,
            _ => entry.file_name().to_str().is_some_and(|number| is_direct(pid, number)),
        }
    })
}

fn is_direct(pid: Pid, number: &str) -> bool {
    let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{number}")).unwrap_or_default();
    let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
    flags
        .and_then(|flags| u32::from_str_radix(flags.trim(), 8).ok())
        .is_some_and(|flags| flags & O_DIRECT != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::OpenOptionsExt;

    #[test]
    fn a_file_open_for_direct_io_is_noticed() {
        let us = rustix::process::getpid();
        let maps = Maps::of(us).unwrap();
        assert!(!in_use(us, &maps));
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let mut options = fs::File::options();
        options.read(true).write(true).create(true).truncate(true).custom_flags(O_DIRECT as i32);
        let _file = options.open(dir.path().join("direct")).unwrap();
        assert!(in_use(us, &maps));
    }
}
