//! `haul-coordinator`: carries migrations from their request to their end. Any number may run.

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let args = haulage_coordinator::Args::parse();
    haulage_service::block_on(async move || haulage_coordinator::run(args).await)
}
