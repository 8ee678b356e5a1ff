//! How much CRIU's images may come to.

use std::collections::BTreeSet;

use haulage_pages::maps::{Class, Maps};
use haulage_pages::object;
use haulage_pages::process::Process;
use haulage_protocol::fault::Fault;
use haulage_protocol::unit::Bytes;

use crate::failure::{FREEZE, fault};

/// What is not counted: descriptions, queues of sockets and pipes, small files, and what relocation has written to
/// programs' read-only data.
const BESIDES: u64 = 64 << 20;

/// What CRIU's images of the processes may come to, nearly, above which there is no bound: mappings that it is left to carry,
/// which are mostly far from full. Processes may end meanwhile.
///
/// # Errors
/// When mappings cannot be read.
pub(crate) fn of_images(processes: &[Process]) -> Result<Bytes, Fault> {
    let mut all = Vec::new();
    for process in processes {
        match Maps::of(process.pid) {
            Err(error) if error.is_gone() => {}
            maps => all.push((*process, maps.map_err(fault(FREEZE))?)),
        }
    }
    left_to_criu(&all).map_err(fault(FREEZE))
}

fn left_to_criu(all: &[(Process, Maps)]) -> std::io::Result<Bytes> {
    let carried = object::carried(all)?;
    let carried: BTreeSet<u64> = carried.keys().map(|id| id.0).collect();
    let mut bytes = BESIDES;
    let mut shared = BTreeSet::new();
    for region in all.iter().flat_map(|(_, maps)| maps.regions()) {
        let counts = match (region.class(), region.shared) {
            (Class::Tracked, _) => false,
            (_, false) => region.writable,
            (Class::Shared, true) => !carried.contains(&region.inode) && shared.insert(region.inode),
            // Of System V, and of huge pages.
            (Class::Criu, true) => region.name.ends_with(" (deleted)") && shared.insert(region.inode),
        };
        if counts {
            bytes = bytes.saturating_add(region.end - region.start);
        }
    }
    Ok(Bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use haulage_pages::process::{Generation, Vpid};

    #[test]
    fn what_criu_is_left_to_carry_counts_and_shared_memory_once() {
        let process =
            |vpid| Process { pid: rustix::process::getpid(), vpid: Vpid(vpid), generation: Generation(1) };
        let maps = Maps::parse(
            "10000-20000 rw-p 00000000 00:00 0 \n\
             20000-30000 r-xp 00000000 08:01 5 /bin/program\n\
             30000-31000 rw-p 00010000 08:01 5 /bin/program\n\
             40000-80000 rw-s 00000000 00:01 7 /SYSV00000000 (deleted)\n\
             90000-91000 rw-s 00000000 08:01 9 /data/mapped\n",
        )
        .unwrap();
        let all = [(process(1), maps.clone()), (process(2), maps)];
        assert_eq!(left_to_criu(&all).unwrap(), Bytes(BESIDES + 2 * 0x1000 + 0x40000));
    }
}
