//! `haul-syncer`: the files of containers, where they leave and where they arrive.

use std::process::ExitCode;

use haulage_protocol::rpc::Service;
use haulage_service::{Shell, run_host_service};

fn main() -> ExitCode {
    run_host_service(Service::Syncer, async |shell: &mut Shell| haulage_syncer::serve(shell).await)
}
