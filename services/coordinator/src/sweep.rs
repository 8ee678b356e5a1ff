//! What a migration had to leave behind, because a host did not answer, is removed when the host is back.

use std::sync::Arc;
use std::time::Duration;

use haulage_migration::Migration;
use haulage_protocol::id::MigrationId;
use haulage_protocol::subject;
use haulage_service::chain;
use haulage_transport::{Nats, NatsError, Table, TableError};
use tokio_util::sync::CancellationToken;

use crate::{Coordinator, perform};

/// Between looks at what is left.
const EVERY: Duration = Duration::from_secs(10);

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
pub(crate) async fn sweep(coordinator: Arc<Coordinator>, stop: CancellationToken) {
    let mut every = tokio::time::interval(EVERY);
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
