//! `haul-runtime`: an OCI runtime in front of runc.
//!
//! Registered with the engine as a runtime, it gets runc's command line. Where the restorer has armed a container,
//! `create` becomes `runc restore`, and the `start` that follows finds the container running and has nothing to do.
//! Every other call goes to runc, argument for argument.
//!
//! An armed container is never started afresh by mistake: whatever cannot be understood about it is refused.

mod args;
mod cgroup;
mod failure;
mod gate;
mod init;
mod keeper;
mod locks;
mod network;
mod restore;
mod root;
mod worker;

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};
use std::time::Instant;

use args::Call;
use failure::Failure;
use haulage_engine::armed::{ArmedRoot, State, is_container_id};

/// The runtime that does the work, found on `PATH`.
const RUNC: &str = "runc";

fn main() -> ExitCode {
    let called = Instant::now();
    let mut args = std::env::args_os();
    let name = args.next();
    let args: Vec<OsString> = args.collect();
    if gate::is_called(name.as_deref()) {
        return gate::pass(&args);
    }
    match run(&args, called) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            failure.report(&args);
            ExitCode::FAILURE
        }
    }
}

fn run(args: &[OsString], called: Instant) -> Result<(), Failure> {
    let root = ArmedRoot::from_env();
    match args::parse(args) {
        Call::Create(create) if is_container_id(create.id) => match root.state(create.id)? {
            State::Armed(armed) => return restore::restore(&root, &create, &armed, called),
            State::Consumed => return Err(Failure::Consumed(create.id.to_owned())),
            // Restored before and ended since: it starts as any container does.
            State::Restored | State::Absent => {}
        },
        Call::Start { id } if is_container_id(id) && root.take_restored(id)? => return Ok(()),
        Call::Unclear => refuse_if_armed(&root, args)?,
        Call::Create(_) | Call::Start { .. } | Call::Other => {}
    }
    Err(Failure::Runc(Command::new(RUNC).args(args).exec()))
}

/// A call that we cannot read may still be the `create` of an armed container, which runc would start empty.
fn refuse_if_armed(root: &ArmedRoot, args: &[OsString]) -> Result<(), Failure> {
    for id in args.iter().filter_map(|arg| arg.to_str()).filter(|arg| is_container_id(arg)) {
        if matches!(root.state(id)?, State::Armed(_) | State::Consumed) {
            return Err(Failure::Unclear(id.to_owned()));
        }
    }
    Ok(())
}
