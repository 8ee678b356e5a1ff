//! Refuses a container whose processes do what no dump can carry, while it still runs.

use std::time::{Duration, Instant};

use haulage_engine::facts::CgroupVersion;
use haulage_pages::obstacle::{self, Found, Obstacle};
use haulage_pages::process::Process;
use haulage_protocol::fault::{Fault, FaultCode};

const TRACED: FaultCode = FaultCode::known("traced");
const USERFAULTFD: FaultCode = FaultCode::known("userfaultfd");
const IO_URING: FaultCode = FaultCode::known("io_uring");
const RDMA: FaultCode = FaultCode::known("rdma");
const LEADER_EXITED: FaultCode = FaultCode::known("leader_exited");
const STOPPED: FaultCode = FaultCode::known("stopped");

/// How long an obstacle must last: the page-shipper's own injection, for a plan or for this migration, looks like one
/// for less than a millisecond.
const LASTS: Duration = Duration::from_millis(50);
const LOOK_AGAIN_AFTER: Duration = Duration::from_millis(5);

/// Refuses `processes`, to be frozen by that version, if one of them has an obstacle that lasts. Failures are told
/// under `code`.
pub(crate) fn refuse(processes: &[Process], freezer: CgroupVersion, code: &FaultCode) -> Result<(), Fault> {
    let began = Instant::now();
    let first = || match stopped(processes, freezer, code)? {
        None => obstacle::first(processes).map_err(crate::failure::fault(code.clone())),
        found => Ok(found),
    };
    while let Some(found) = first()? {
        if began.elapsed() >= LASTS {
            return Err(refusal(&found));
        }
        std::thread::sleep(LOOK_AGAIN_AFTER);
    }
    Ok(())
}

/// Refuses processes that are frozen if one was stopped just before.
pub(crate) fn refuse_stopped(
    processes: &[Process],
    freezer: CgroupVersion,
    code: &FaultCode,
) -> Result<(), Fault> {
    stopped(processes, freezer, code)?.map_or(Ok(()), |found| Err(refusal(&found)))
}

fn stopped(processes: &[Process], freezer: CgroupVersion, code: &FaultCode) -> Result<Option<Found>, Fault> {
    match freezer {
        CgroupVersion::V1 => obstacle::first_stopped(processes).map_err(crate::failure::fault(code.clone())),
        CgroupVersion::V2 => Ok(None),
    }
}

fn refusal(found: &Found) -> Fault {
    let (code, remedy) = match found.obstacle {
        Obstacle::Traced { .. } => (TRACED, "end the tracer (strace, gdb, a profiler), or have it detach"),
        Obstacle::Userfaultfd => {
            (USERFAULTFD, "stop the program that uses it, or run it without userfaultfd")
        }
        Obstacle::IoUring => (IO_URING, "configure the program not to use io_uring"),
        Obstacle::LeaderExited => {
            (LEADER_EXITED, "have the program's first thread wait for the others (no pthread_exit in main)")
        }
        Obstacle::Stopped => {
            (STOPPED, "have it go on (kill -CONT), or move it from a host with cgroup version 2")
        }
        Obstacle::Rdma => {
            (RDMA, "configure the program to use TCP, and create the container without the device")
        }
    };
    let pid = found.process.pid.as_raw_nonzero();
    Fault::new(code, format!("process {pid} ({}) {}", found.name, found.obstacle)).remedy(remedy)
}

#[cfg(test)]
mod tests {
    use super::*;
    use haulage_sys::uffd::WriteTracker;

    #[test]
    fn a_process_with_a_userfaultfd_is_refused_until_it_is_closed() {
        let us = haulage_pages::process::describe(rustix::process::getpid()).unwrap().unwrap();
        let refuse = || refuse(&[us], CgroupVersion::V1, &crate::failure::FREEZE);
        refuse().unwrap();
        let held = WriteTracker::of_self().unwrap();
        let fault = refuse().unwrap_err();
        assert!(fault.code.as_str() == "userfaultfd" && fault.remedy.is_some(), "{fault:?}");
        // Gone before it has lasted.
        let soon = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(5));
            drop(held);
        });
        refuse().unwrap();
        soon.join().unwrap();
    }
}
