//! A service's life: log, configure, connect, serve, drain, exit.

use std::collections::BTreeMap;
use std::error::Error;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use haulage_protocol::rpc::Service;
use haulage_transport::{CommandServer, Nats, NatsError};

use crate::config::HostConfig;
use crate::presence::Announcer;
use crate::{shutdown, telemetry};

/// For how long a service that starts waits for NATS.
const CONNECT_WITHIN: Duration = Duration::from_secs(30);

/// What a service works with.
pub struct Shell {
    /// Its configuration.
    pub config: HostConfig,
    /// The connection.
    pub nats: Nats,
    /// Where it registers its verbs.
    pub server: CommandServer,
    /// What it announces of itself, for people: versions and the like.
    pub facts: BTreeMap<String, String>,
}

#[derive(Parser)]
#[command(version, about = "A service of Haulage, which moves running Docker containers between hosts.")]
struct HostArgs {
    #[command(flatten)]
    config: HostConfig,
}

/// Runs a service of a host until SIGTERM or SIGINT. `build` registers the verbs; they are announced to the
/// fleet when it has returned. Exit code 0 after a requested stop, 1 after an error, 2 for a wrong command line.
pub fn run_host_service<B>(service: Service, build: B) -> ExitCode
where
    B: AsyncFnOnce(&mut Shell) -> Result<(), Box<dyn Error + Send + Sync>>,
{
    let HostArgs { config } = HostArgs::parse();
    // What is kept of a container is its memory and its files: for nobody else's eyes.
    rustix::process::umask(rustix::fs::Mode::RWXG | rustix::fs::Mode::RWXO);
    block_on(async move || {
        let nats = connect(&config.nats.nats, &format!("haul-{service} {}", config.host)).await?;
        let server = CommandServer::start(&nats, &config.host, service).await?;
        let mut shell = Shell { config, nats, server, facts: BTreeMap::new() };
        build(&mut shell).await?;
        let host = shell.config.host.clone();
        let mut announcer = Announcer::new(&shell.nats, host, service, shell.facts).await?;
        tracing::info!(%service, host = %shell.config.host, "serving");
        let stop = shutdown::requested()?;
        tokio::select! {
            () = stop => {}
            () = announcer.announce() => {}
        }
        announcer.withdraw().await;
        shell.server.stop().await;
        shell.nats.flush().await?;
        Ok(())
    })
}

/// Runs `main` on a runtime with logging, and turns its end into an exit code: 0, or 1 with the error logged.
pub fn block_on<M>(main: M) -> ExitCode
where
    M: AsyncFnOnce() -> Result<(), Box<dyn Error + Send + Sync>>,
{
    telemetry::init();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            tracing::error!(%error, "cannot start");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(main()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error = %chain(error.as_ref()), "stopped");
            ExitCode::FAILURE
        }
    }
}

/// Connects, waiting a while for a server that is still starting, and makes what must exist there.
///
/// # Errors
/// [`NatsError`] of the last try.
pub async fn connect(url: &str, name: &str) -> Result<Nats, NatsError> {
    let began = Instant::now();
    loop {
        let tried = async {
            let nats = Nats::connect(url, name).await?;
            nats.ensure().await?;
            Ok(nats)
        };
        match tried.await {
            Ok(nats) => return Ok(nats),
            Err(error) if began.elapsed() >= CONNECT_WITHIN => return Err(error),
            Err(error) => {
                tracing::warn!(error = %chain(&error), "NATS is not ready, trying again");
                tokio::time::sleep(Duration::from_millis(500)).await;
            }
        }
    }
}

/// An error and its sources in one line.
#[must_use]
pub fn chain(error: &dyn Error) -> String {
    haulage_protocol::fault::chain(error).join(": ")
}
