//! `haul-page-shipper`: the memory of containers, where they leave and where they arrive.

use std::process::ExitCode;

use haulage_protocol::rpc::Service;
use haulage_service::{Shell, run_host_service};

fn main() -> ExitCode {
    haulage_sys::process::keep_freed_memory(haulage_page_shipper::KEPT);
    run_host_service(Service::PageShipper, async |shell: &mut Shell| haulage_page_shipper::serve(shell).await)
}
