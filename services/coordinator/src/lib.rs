//! The coordinator: takes jobs from the work queue and drives each migration's state machine. It touches no
//! container and keeps nothing that a restart would lose: the truth is the record in KV.

mod costs;
mod driver;
mod events;
mod journal;
mod lease;
mod perform;
mod registry;
mod sweep;

use std::error::Error;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use haulage_migration::Migration;
use haulage_protocol::id::CoordinatorId;
use haulage_protocol::secret::Token;
use haulage_service::config::NatsConfig;
use haulage_service::{chain, now, shutdown};
use haulage_transport::queue::Delivery;
use haulage_transport::{Nats, TableError};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::costs::CostTable;
use crate::driver::{Driver, End};
use crate::journal::{Journal, Opened};
use crate::lease::Leases;
use crate::registry::Registry;
use crate::sweep::Sweeper;

/// The command line.
#[derive(Debug, clap::Parser)]
#[command(name = "haul-coordinator", version, about = "Carries migrations of Haulage from request to end.")]
pub struct Args {
    #[command(flatten)]
    nats: NatsConfig,
    /// How many migrations this coordinator drives at once; the others wait in the queue.
    #[arg(long, env = "HAUL_MAX_MIGRATIONS", default_value = "32", value_name = "N")]
    max_migrations: NonZeroUsize,
    /// How long the record of a migration is kept after its end: a number and s, m, h or d.
    #[arg(long, env = "HAUL_KEEP_RECORDS", default_value = "30d", value_name = "TIME", value_parser = duration)]
    keep_records: Duration,
}

/// "90s", "15m", "12h", "30d".
fn duration(text: &str) -> Result<Duration, &'static str> {
    const SAY: &str = "not a number with s, m, h or d after it";
    let (number, unit) = text.split_at_checked(text.len().saturating_sub(1)).ok_or(SAY)?;
    let seconds = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 24 * 3600,
        _ => return Err(SAY),
    };
    let number: u64 = number.parse().map_err(|_| SAY)?;
    number.checked_mul(seconds).map(Duration::from_secs).ok_or("too long")
}

/// What all drivers of this process share.
pub(crate) struct Coordinator {
    id: CoordinatorId,
    nats: Nats,
    journal: Journal,
    leases: Leases,
    registry: Registry,
    costs: CostTable,
    sweeper: Sweeper,
}

/// Takes jobs until SIGTERM or SIGINT; then gives those under way back, for another coordinator to carry on.
///
/// # Errors
/// When NATS cannot be used.
pub async fn run(args: Args) -> Result<(), Box<dyn Error + Send + Sync>> {
    let id = CoordinatorId::generate();
    let nats = haulage_service::connect(&args.nats.nats, &format!("haul-coordinator {id}")).await?;
    let coordinator = Arc::new(Coordinator {
        journal: Journal::open(&nats).await?,
        leases: Leases::open(&nats).await?,
        registry: Registry::open(&nats).await?,
        costs: CostTable::open(&nats).await?,
        sweeper: Sweeper::open(&nats).await?,
        id,
        nats,
    });
    let mut jobs = coordinator.nats.jobs().await?;
    let room = Arc::new(Semaphore::new(args.max_migrations.get()));
    let stop = CancellationToken::new();
    let drivers = TaskTracker::new();
    drivers.spawn(sweep::sweep(coordinator.clone(), args.keep_records, stop.clone()));
    let mut shutdown = Box::pin(shutdown::requested()?);
    tracing::info!(coordinator = %coordinator.id, "taking jobs");
    loop {
        // A job is only taken when there is room, so that it does not wait here while others could drive it.
        let next = async {
            let permit = room.clone().acquire_owned().await;
            (permit, jobs.next().await)
        };
        tokio::select! {
            () = &mut shutdown => break,
            (permit, delivery) = next => match delivery {
                Some(Ok(delivery)) => {
                    let (coordinator, stop) = (coordinator.clone(), stop.clone());
                    drivers.spawn(async move {
                        coordinator.handle(delivery, stop).await;
                        drop(permit);
                    });
                }
                Some(Err(error)) => tracing::warn!(error = %chain(&error), "the work queue"),
                None => return Err("the work queue ended".into()),
            },
        }
    }
    stop.cancel();
    drivers.close();
    drivers.wait().await;
    coordinator.nats.flush().await?;
    Ok(())
}

impl Coordinator {
    /// So that they are swept, also when the coordinator that wrote the record died right after.
    pub(crate) async fn remember_leftovers(&self, record: &Migration) -> Result<(), TableError> {
        if record.leftovers.is_empty() { Ok(()) } else { self.sweeper.remember(record).await }
    }

    async fn handle(self: Arc<Self>, delivery: Delivery, stop: CancellationToken) {
        let job = match delivery.job() {
            Ok(job) => job,
            Err(fault) => {
                tracing::warn!(%fault, "a job that nobody can understand was taken off the queue");
                if let Err(error) = delivery.refuse().await {
                    tracing::warn!(error = %chain(&error), "and will come again");
                }
                return;
            }
        };
        let id = job.id.clone();
        let fresh = Migration::accept(job, Token::generate(), self.id.clone(), now());
        let ended = match self.journal.open_record(&id, fresh, &self.id).await {
            Ok(Opened::Over(record)) => self.remember_leftovers(&record).await.map(|()| End::Over),
            Ok(Opened::Ours(owned)) => {
                tracing::info!(migration = %id, epoch = %owned.record.epoch, phase = %owned.record.phase, "driving");
                Driver::new(self.clone(), owned).run(&delivery, stop).await
            }
            Err(error) => Err(error),
        };
        let settled = match ended {
            Ok(End::Over) => delivery.done().await,
            Ok(End::Stopped) => delivery.give_back().await,
            // To give back what is no longer ours would have the queue deliver it to a third.
            Ok(End::TakenOver) => return,
            Err(error) => {
                tracing::warn!(migration = %id, error = %chain(&error), "the record cannot be used for now");
                delivery.give_back().await
            }
        };
        if let Err(error) = settled {
            tracing::debug!(migration = %id, error = %chain(&error), "the job will be delivered again");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::{CommandFactory, Parser};

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
        let args = Args::try_parse_from(["haul-coordinator"]).unwrap();
        assert_eq!(args.keep_records, Duration::from_secs(30 * 24 * 3600));
    }

    #[test]
    fn times_are_understood_or_refused() {
        for (text, seconds) in [("0s", 0), ("90s", 90), ("15m", 900), ("12h", 43_200), ("2d", 172_800)] {
            assert_eq!(duration(text), Ok(Duration::from_secs(seconds)), "{text}");
        }
        for text in
            ["", "5", "d", "-1d", "1w", "1.5h", "5µ", "99999999999999999999d", "18446744073709551615d"]
        {
            assert!(duration(text).is_err(), "{text}");
        }
    }
}
