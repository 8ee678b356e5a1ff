//! `haul ls`.

use haulage_migration::{Migration, Phase};
use haulage_protocol::subject;
use haulage_transport::{Nats, Table};

use crate::args;
use crate::output::{Failure, clock, json, line, public};

/// Every migration, oldest first.
pub(crate) async fn all(nats: &Nats) -> Result<Vec<Migration>, Failure> {
    let table: Table<Migration> = Table::open(nats, subject::MIGRATIONS).await?;
    let mut records: Vec<Migration> = table.list().await?.into_iter().map(|(_, record)| record).collect();
    records.sort_by(|a, b| (a.began, &a.job.id).cmp(&(b.began, &b.job.id)));
    Ok(records)
}

pub(crate) async fn run(nats: &Nats, wanted: args::Json) -> Result<(), Failure> {
    let records = all(nats).await?;
    if wanted.json {
        let public: Result<Vec<_>, _> = records.iter().map(public).collect();
        return json(&public?);
    }
    line(&row("ID", "BEGAN (UTC)", "CONTAINER", "STATE", "FROM -> TO"))?;
    for record in &records {
        let state = match (record.phase, record.outcome) {
            (Phase::Done, Some(outcome)) => outcome.as_str(),
            (phase, _) => phase.as_str(),
        };
        let way = format!("{} -> {}", record.source().map_or("?", |host| host.as_str()), record.job.to);
        line(&row(record.job.id.as_str(), &clock(record.began), record.name(), state, &way))?;
    }
    Ok(())
}

fn row(id: &str, began: &str, container: &str, state: &str, way: &str) -> String {
    format!("{id:<33} {began:<20} {container:<24} {state:<12} {way}")
}
