//! What a migration had to leave behind, because a host did not answer, is removed when the host is back. Records of
//! migrations that are long over are removed too.

use std::sync::Arc;
use std::time::{Duration, Instant};

use haulage_migration::Migration;
use haulage_protocol::id::MigrationId;
use haulage_protocol::subject;
use haulage_protocol::unit::Micros;
use haulage_service::{chain, now};
use haulage_transport::{Nats, NatsError, Table, TableError};
use tokio_util::sync::CancellationToken;

use crate::{Coordinator, perform};

/// Between looks at what is left.
const EVERY: Duration = Duration::from_secs(10);

/// The longest time between looks at what is long over.
const ERASE_EVERY: Duration = Duration::from_secs(600);

/// Remembers which migrations have left something behind.
pub(crate) struct Sweeper {
    table: Table<String>,
}

impl Sweeper {
    pub(crate) async fn open(nats: &Nats) -> Result<Self, NatsError> {
        Ok(Self { table: Table::open(nats, subject::LEFTOVERS).await? })
    }

    pub(crate) async fn remember(&self, record: &Migration) -> Result<(), TableError> {
        self.table.put(&subject::migration_key(&record.job.id), &record.phase.to_string()).await
    }
}

/// Sweeps now and again until `stop`. Several coordinators may do so at once: the services tell repetitions by
/// their step numbers, and the record is written with compare-and-set.
pub(crate) async fn sweep(coordinator: Arc<Coordinator>, keep: Duration, stop: CancellationToken) {
    let mut every = tokio::time::interval(EVERY);
    let mut erased: Option<Instant> = None;
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = every.tick() => {}
        }
        let swept = tokio::select! {
            () = stop.cancelled() => return,
            swept = sweep_once(&coordinator) => swept,
        };
        if let Err(error) = swept {
            tracing::warn!(error = %chain(&error), "leftovers were not swept, trying again");
        }
        if erased.is_some_and(|last| last.elapsed() < keep.min(ERASE_EVERY)) {
            continue;
        }
        erased = Some(Instant::now());
        let until = Micros(now().0.saturating_sub(Micros::from_duration(keep).0));
        match coordinator.journal.erase_ended(until).await {
            Ok(0) => {}
            Ok(count) => tracing::info!(count, "records of migrations that are long over were erased"),
            Err(error) => tracing::warn!(error = %chain(&error), "old records were not erased, trying again"),
        }
    }
}

async fn sweep_once(coordinator: &Coordinator) -> Result<(), TableError> {
    for (key, _) in coordinator.sweeper.table.list().await? {
        let id = key.parse::<MigrationId>().ok();
        let found = match &id {
            Some(id) => match coordinator.journal.read(id).await {
                // Of another release, say; the others are swept all the same.
                Err(error @ TableError::Malformed { .. }) => {
                    tracing::warn!(error = %chain(&error), "not swept");
                    continue;
                }
                found => found?,
            },
            None => None,
        };
        let Some((mut record, revision)) = found else {
            coordinator.sweeper.table.forget(&key).await?;
            continue;
        };
        let retries = record.retry_leftovers();
        let revision = match coordinator.journal.write(&record, revision).await {
            Ok(revision) => revision,
            // Another coordinator sweeps it.
            Err(TableError::Conflict(_)) => continue,
            Err(error) => return Err(error),
        };
        for (step, effect) in retries {
            match perform::perform(coordinator, &record, step, effect).await {
                Ok(_) => {
                    tracing::info!(migration = %record.job.id, %effect, "a leftover is gone");
                    record.leftovers.retain(|left| left.effect != effect);
                }
                Err(fault) => tracing::debug!(migration = %record.job.id, %effect, %fault, "still left"),
            }
        }
        match coordinator.journal.write(&record, revision).await {
            Ok(_) if record.leftovers.is_empty() => coordinator.sweeper.table.forget(&key).await?,
            Ok(_) | Err(TableError::Conflict(_)) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
