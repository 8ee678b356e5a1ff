//! `haul-restorer`: containers that arrive on this host.

use std::process::ExitCode;

use haulage_protocol::rpc::Service;
use haulage_service::{Shell, run_host_service};

fn main() -> ExitCode {
    run_host_service(Service::Restorer, async |shell: &mut Shell| haulage_restorer::serve(shell).await)
}
