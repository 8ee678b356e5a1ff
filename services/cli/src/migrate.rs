//! `haul migrate`.

use std::time::{Duration, Instant};

use futures_util::StreamExt;
use haulage_migration::{Migration, Outcome};
use haulage_protocol::fault::{Fault, code};
use haulage_protocol::id::MigrationId;
use haulage_protocol::job::{Job, Options};
use haulage_protocol::subject;
use haulage_protocol::transfer::Transfer;
use haulage_protocol::version::Version;
use haulage_transport::{Nats, Table};

use crate::args;
use crate::output::{Failure, json, line, public};
use crate::progress::Progress;
use crate::show;
use crate::trace::TraceFile;

pub(crate) async fn run(nats: &Nats, wanted: args::Migrate) -> Result<(), Failure> {
    let id = wanted.id.unwrap_or_else(MigrationId::generate);
    let job = Job {
        version: Version::CURRENT,
        id: id.clone(),
        container: wanted.container,
        from: wanted.from,
        to: wanted.to,
        options: Options {
            policy: wanted.policy,
            max_downtime_ms: wanted.max_downtime,
            deadline_ms: wanted.deadline.map(|seconds| seconds.saturating_mul(1000)),
            max_rounds: wanted.max_rounds,
            round_interval_ms: wanted.round_interval,
            max_tax_percent: wanted.max_tax,
            auto_converge: wanted.auto_converge,
            post_copy: wanted.post_copy,
            max_frozen_ms: wanted.max_frozen.saturating_mul(1000),
            shared_binds: wanted.shared,
            transfer: Transfer {
                compress: wanted.compress,
                connections: wanted.connections,
                bandwidth: wanted.bandwidth,
            },
        },
    };
    // A file that cannot be written is a reason not to begin.
    let trace = wanted.trace.map(TraceFile::create).transpose()?;
    nats.submit(&job).await?;
    if wanted.detach {
        return if wanted.json { json(&serde_json::json!({ "id": id })) } else { line(id.as_str()) };
    }
    let record = follow(nats, &id, Progress::new(wanted.json)).await?;
    if wanted.json {
        json(&public(&record)?)?;
    } else {
        line(&show::summary(&record))?;
    }
    if let Some(trace) = trace {
        trace.write(&record)?;
    }
    match (record.outcome, record.fault) {
        (Some(Outcome::Committed), _) => Ok(()),
        (_, Some(fault)) => Err(fault.into()),
        (_, None) => Err(Fault::new(code::INTERNAL, "rolled back without a reason").into()),
    }
}

/// How long NATS may be away before following is given up.
const NATS_AWAY: Duration = Duration::from_secs(15);

/// How often the record is read anew, beside following its changes.
const LOOK_AGAIN: Duration = Duration::from_secs(2);

/// Shows progress until the migration is over.
async fn follow(nats: &Nats, id: &MigrationId, mut progress: Progress) -> Result<Migration, Failure> {
    let table: Table<Migration> = Table::open(nats, subject::MIGRATIONS).await?;
    let mut states = table.watch(&subject::migration_key(id)).await?;
    let mut tick = tokio::time::interval(Duration::from_millis(100));
    let mut look = tokio::time::interval(LOOK_AGAIN);
    let mut current: Option<Migration> = None;
    let mut seen = Instant::now();
    loop {
        tokio::select! {
            state = states.next() => {
                let Some(state) = state else {
                    let fault = Fault::new(code::UNREACHABLE, "the record can no longer be followed");
                    return Err(fault.remedy(format!("see `haul show {id}`")).into());
                };
                let record = state?;
                progress.update(&record)?;
                if record.is_over() {
                    progress.finish()?;
                    return Ok(record);
                }
                current = Some(record);
            }
            // A change that was missed among many must not be waited for until the next, which may never come.
            _ = look.tick() => {
                if let Ok(Some((record, _))) = table.get(&subject::migration_key(id)).await
                    && record.is_over()
                {
                    progress.update(&record)?;
                    progress.finish()?;
                    return Ok(record);
                }
            }
            _ = tick.tick() => {
                progress.tick(current.as_ref())?;
                if nats.is_connected() {
                    seen = Instant::now();
                } else if seen.elapsed() > NATS_AWAY {
                    let fault = Fault::new(code::UNREACHABLE, "NATS can no longer be reached");
                    return Err(fault.remedy(format!("the migration goes on: see `haul show {id}`")).into());
                }
            }
        }
    }
}
