//! `haul`: what an operator types.

mod args;
mod hosts;
mod list;
mod migrate;
mod output;
mod plan;
mod progress;
mod show;
mod trace;
mod watch;

use std::process::ExitCode;

use clap::Parser;
use haulage_protocol::fault::{Fault, code};
use haulage_transport::Nats;

use crate::args::{Args, Verb};
use crate::output::{Failure, report};

fn main() -> ExitCode {
    let args = Args::parse();
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return report(&Failure::Output(error)),
    };
    match runtime.block_on(run(args)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => report(&failure),
    }
}

async fn run(args: Args) -> Result<(), Failure> {
    let nats = Nats::connect(&args.nats, "haul").await?;
    nats.ensure().await?;
    match args.verb {
        Verb::Migrate(wanted) => migrate::run(&nats, wanted).await,
        Verb::Plan(wanted) => plan::run(&nats, wanted).await,
        Verb::Ls(wanted) => list::run(&nats, wanted).await,
        Verb::Show(wanted) => show::run(&nats, wanted).await,
        Verb::Watch(wanted) => watch::run(&nats, wanted).await,
        Verb::Cancel(wanted) => {
            let record = show::find(&nats, &wanted.id).await?;
            let id = record.job.id.clone();
            if record.is_over() {
                let message = format!("migration {id} is over");
                return Err(Fault::new(code::NOT_CANCELLABLE, message)
                    .remedy(format!("see haul show {id}"))
                    .into());
            }
            nats.cancel(&id, wanted.target_is_dead).await?;
            output::line(&format!("migration {id} will be rolled back"))
        }
        Verb::Hosts(wanted) => hosts::run(&nats, wanted).await,
    }
}
