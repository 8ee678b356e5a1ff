//! The lease per container: one migration of it at a time.
//!
//! A lease does not expire. It belongs to a migration, not to a coordinator, and every migration is driven to
//! its end by some coordinator, which gives the lease back there.

use haulage_protocol::fault::{Fault, code};
use haulage_protocol::id::{ContainerId, MigrationId};
use haulage_protocol::lease::Lease;
use haulage_protocol::subject;
use haulage_transport::{Nats, NatsError, Table, TableError};

pub(crate) struct Leases {
    table: Table<Lease>,
}

fn unreadable(error: &TableError) -> Fault {
    Fault::new(code::UNREACHABLE, "the lease cannot be read or written").because(error)
}

impl Leases {
    pub(crate) async fn open(nats: &Nats) -> Result<Self, NatsError> {
        Ok(Self { table: Table::open(nats, subject::LEASES).await? })
    }

    /// Takes the lease; holding it already is fine.
    pub(crate) async fn acquire(&self, container: &ContainerId, us: &MigrationId) -> Result<(), Fault> {
        let lease = Lease { migration: us.clone() };
        match self.table.create(&subject::lease_key(container), &lease).await {
            Ok(_) => Ok(()),
            Err(TableError::Conflict(_)) => {
                match self.holder(container).await? {
                    Some(holder) if holder == *us => Ok(()),
                    Some(migration) => Err(Lease { migration }.held()),
                    // It was released in between.
                    None => Err(Fault::new(code::LEASE_HELD, "the container was just being moved")
                        .remedy("try again")),
                }
            }
            Err(error) => Err(unreadable(&error)),
        }
    }

    /// Is it still ours?
    pub(crate) async fn confirm(&self, container: &ContainerId, us: &MigrationId) -> Result<(), Fault> {
        match self.holder(container).await? {
            Some(holder) if holder == *us => Ok(()),
            Some(holder) => {
                Err(Fault::new(code::LEASE_LOST, format!("the lease belongs to migration {holder} now")))
            }
            None => Err(Fault::new(code::LEASE_LOST, "the lease is gone")),
        }
    }

    /// Gives it back; fine when it is not ours.
    pub(crate) async fn release(&self, container: &ContainerId, us: &MigrationId) -> Result<(), Fault> {
        let key = subject::lease_key(container);
        match self.table.get(&key).await.map_err(|error| unreadable(&error))? {
            Some((lease, revision)) if lease.migration == *us => {
                self.table.remove(&key, revision).await.map_err(|error| unreadable(&error))
            }
            _ => Ok(()),
        }
    }

    async fn holder(&self, container: &ContainerId) -> Result<Option<MigrationId>, Fault> {
        let found = self.table.get(&subject::lease_key(container)).await;
        Ok(found.map_err(|error| unreadable(&error))?.map(|(lease, _)| lease.migration))
    }
}
