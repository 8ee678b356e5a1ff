//! `haul-checkpointer`: the process state of containers that leave this host.

use std::process::ExitCode;

use haulage_protocol::rpc::Service;
use haulage_service::{Shell, run_host_service};

fn main() -> ExitCode {
    run_host_service(Service::Checkpointer, async |shell: &mut Shell| {
        haulage_checkpointer::serve(shell).await
    })
}
