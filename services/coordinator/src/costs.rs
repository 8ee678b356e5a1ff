//! What switches have cost, for each pair of hosts: what the forecast of the next migration between them starts from.
//! Nothing but forecasts depends on it.

use haulage_migration::Migration;
use haulage_migration::fixed::{Costs, Fixed, Shape, cost_of};
use haulage_protocol::id::HostId;
use haulage_protocol::subject;
use haulage_service::chain;
use haulage_transport::{Nats, NatsError, Table, TableError};

pub(crate) struct CostTable {
    table: Table<Costs>,
}

impl CostTable {
    pub(crate) async fn open(nats: &Nats) -> Result<Self, NatsError> {
        Ok(Self { table: Table::open(nats, subject::COSTS).await? })
    }

    /// What is known of moves from one host to another, if anything is.
    pub(crate) async fn known(&self, from: &HostId, to: &HostId) -> Option<Fixed> {
        match self.table.get(&subject::cost_key(from, to)).await {
            Ok(found) => found.map(|(costs, _)| costs.fixed()),
            Err(error) => {
                tracing::warn!(error = %chain(&error), "what a switch costs is not known");
                None
            }
        }
    }

    /// Notes what a migration that is over has cost.
    pub(crate) async fn note(&self, record: &Migration) {
        let Some((cost, from)) = cost_of(record).zip(record.source()) else { return };
        let Some(inspected) = record.facts.inspected.as_ref().map(Shape::from) else { return };
        // There may have been others by then.
        let processes = record.facts.frozen.as_ref().map_or(inspected.processes, |frozen| frozen.processes);
        let shape = Shape { processes, ..inspected };
        let key = subject::cost_key(from, &record.job.to);
        let noted = async {
            match self.table.get(&key).await? {
                Some((mut costs, revision)) => {
                    costs.note(cost, shape);
                    self.table.update(&key, &costs, revision).await.map(drop)
                }
                None => {
                    let mut costs = Costs::default();
                    costs.note(cost, shape);
                    self.table.create(&key, &costs).await.map(drop)
                }
            }
        };
        match noted.await {
            // Of two that ended at once one will do.
            Ok(()) | Err(TableError::Conflict(_)) => {}
            Err(error) => tracing::warn!(error = %chain(&error), "what a switch has cost was not noted"),
        }
    }
}
