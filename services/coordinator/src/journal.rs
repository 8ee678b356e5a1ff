//! The records of migrations, in KV, written with compare-and-set.

use haulage_migration::{Effect, Event, Migration, Transition};
use haulage_protocol::id::{CoordinatorId, MigrationId, Step};
use haulage_protocol::subject;
use haulage_protocol::unit::Micros;
use haulage_service::now;
use haulage_transport::{Nats, NatsError, Revision, Table, TableError};

/// All records.
pub(crate) struct Journal {
    table: Table<Migration>,
}

/// A record that this coordinator owns, and what is to be done now.
pub(crate) struct Owned {
    pub(crate) record: Migration,
    pub(crate) revision: Revision,
    pub(crate) effects: Vec<(Step, Effect)>,
    /// The record as it was before, when it was taken over.
    pub(crate) before: Option<Migration>,
}

/// What was found under a migration's id.
pub(crate) enum Opened {
    /// It is over: nothing to do.
    Over(Box<Migration>),
    /// It is new, or was taken over.
    Ours(Box<Owned>),
}

impl Journal {
    pub(crate) async fn open(nats: &Nats) -> Result<Self, NatsError> {
        Ok(Self { table: Table::open(nats, subject::MIGRATIONS).await? })
    }

    /// Creates the record, or takes over the one that exists. When several coordinators try, one succeeds and
    /// the others get a conflict.
    pub(crate) async fn open_record(
        &self,
        id: &MigrationId,
        fresh: Transition,
        us: &CoordinatorId,
    ) -> Result<Opened, TableError> {
        let key = subject::migration_key(id);
        let Some((before, revision)) = self.table.get(&key).await? else {
            let revision = self.table.create(&key, &fresh.next).await?;
            let Transition { next: record, effects } = fresh;
            return Ok(Opened::Ours(Box::new(Owned { record, revision, effects, before: None })));
        };
        if before.is_over() {
            return Ok(Opened::Over(Box::new(before)));
        }
        let taken = before.step(Event::TakenOver(us.clone()), now());
        let Ok(Transition { next: record, effects }) = taken else {
            return Ok(Opened::Over(Box::new(before)));
        };
        let revision = self.table.update(&key, &record, revision).await?;
        Ok(Opened::Ours(Box::new(Owned { record, revision, effects, before: Some(before) })))
    }

    /// A record, whoever owns it.
    pub(crate) async fn read(&self, id: &MigrationId) -> Result<Option<(Migration, Revision)>, TableError> {
        self.table.get(&subject::migration_key(id)).await
    }

    /// Erases the records of migrations that were over before `until` and left nothing behind; gives how many.
    pub(crate) async fn erase_ended(&self, until: Micros) -> Result<usize, TableError> {
        let mut erased = 0;
        for (key, record, revision) in self.table.revisions().await? {
            if record.ended().is_some_and(|ended| ended < until) && record.leftovers.is_empty() {
                self.table.erase(&key, revision).await?;
                erased += 1;
            }
        }
        Ok(erased)
    }

    /// Replaces the record. A write whose acknowledgement was lost is recognised and counts.
    pub(crate) async fn write(&self, record: &Migration, revision: Revision) -> Result<Revision, TableError> {
        let key = subject::migration_key(&record.job.id);
        match self.table.update(&key, record, revision).await {
            Err(TableError::Conflict(key)) => match self.table.get(&key).await? {
                Some((found, revision)) if found == *record => Ok(revision),
                _ => Err(TableError::Conflict(key)),
            },
            result => result,
        }
    }
}
