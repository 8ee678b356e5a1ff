//! `haul show`: one migration, whole.

use std::fmt::Write;

use haulage_migration::{Convergence, Migration, Outcome, Slowdown, timing};
use haulage_protocol::fault::{Fault, code};
use haulage_protocol::page_shipper::Encoding;
use haulage_protocol::subject;
use haulage_protocol::unit::{Bytes, Micros, Pages};
use haulage_transport::{Nats, Table};

use crate::args;
use crate::list;
use crate::output::{Failure, clock, fault_lines, json, line, now, public};
use crate::progress::rate;
use crate::trace::TraceFile;

pub(crate) async fn run(nats: &Nats, wanted: args::Show) -> Result<(), Failure> {
    let record = find(nats, &wanted.id).await?;
    if let Some(path) = wanted.trace {
        TraceFile::create(path)?.write(&record)?;
    }
    if wanted.json {
        return json(&public(&record)?);
    }
    line(report(&record, now()).trim_end())
}

/// The migration of that id, or of which it is a unique beginning.
pub(crate) async fn find(nats: &Nats, id: &str) -> Result<Migration, Failure> {
    let unknown = |message| Fault::new(code::UNKNOWN_MIGRATION, message).remedy("see `haul ls`");
    let table: Table<Migration> = Table::open(nats, subject::MIGRATIONS).await?;
    if let Ok(id) = id.parse()
        && let Some((record, _)) = table.get(&subject::migration_key(&id)).await?
    {
        return Ok(record);
    }
    let mut matching = list::all(nats).await?;
    matching.retain(|record| record.job.id.as_str().starts_with(id));
    match <[Migration; 1]>::try_from(matching) {
        Ok([record]) => Ok(record),
        Err(several) if several.is_empty() => Err(unknown(format!("no migration is called {id:?}")).into()),
        Err(several) => Err(unknown(format!("{} migrations begin with {id:?}", several.len())).into()),
    }
}

/// One line about how it ended.
pub(crate) fn summary(record: &Migration) -> String {
    let name = record.name();
    let from = record.source().map_or("?", |host| host.as_str());
    let (to, id) = (&record.job.to, &record.job.id);
    match record.outcome {
        Some(Outcome::Committed) => {
            let split = timing::freeze_split(record).unwrap_or_default();
            format!("{name} runs on {to} (from {from}), frozen for {}; see haul show {id}", split.total)
        }
        Some(Outcome::RolledBack) => format!("{name} was not moved to {to}; see haul show {id}"),
        None => format!("{name} is on its way from {from} to {to}: {}", record.phase),
    }
}

/// Everything that a person wants to know. `now` ends the last phase of a migration that goes on.
fn report(record: &Migration, now: Micros) -> String {
    let mut text = String::new();
    // Writing to a string does not fail.
    let _infallible = write_report(&mut text, record, now);
    text
}

fn write_report(out: &mut String, record: &Migration, now: Micros) -> std::fmt::Result {
    writeln!(out, "{}", summary(record))?;
    writeln!(out, "began     {} UTC", clock(record.began))?;
    if let Some(inspected) = &record.facts.inspected {
        writeln!(out, "container {} ({})", inspected.container, inspected.name)?;
        writeln!(out, "image     {}", inspected.image)?;
        writeln!(out, "memory    {}, {} processes", inspected.memory, inspected.processes)?;
    }
    if record.epoch.0 > 1 {
        writeln!(out, "owners    {} coordinators", record.epoch)?;
    }
    let end = record.phases.last().filter(|_| record.is_over()).map_or(now, |(_, at)| *at);
    writeln!(out, "total     {}", end.since(record.began))?;
    writeln!(out, "\nphases")?;
    for (phase, lasted) in timing::phases(record, end) {
        writeln!(out, "  {phase:<10} {lasted}")?;
    }
    write_memory(out, record)?;
    write_files(out, record)?;
    write_freeze(out, record)?;
    writeln!(out, "\noutcome   {}", record.outcome.map_or("under way", Outcome::as_str))?;
    for line in record.fault.iter().flat_map(fault_lines) {
        writeln!(out, "{line}")?;
    }
    for left in &record.leftovers {
        writeln!(out, "left behind: {} failed", left.effect)?;
        for line in fault_lines(&left.fault) {
            writeln!(out, "  {line}")?;
        }
    }
    Ok(())
}

fn write_memory(out: &mut String, record: &Migration) -> std::fmt::Result {
    let Some(tracking) = &record.facts.tracking else { return Ok(()) };
    writeln!(out, "\nmemory, tracked by {}, policy {}", tracking.tracker, record.job.options.policy)?;
    if let Some(reason) = &tracking.reason {
        writeln!(out, "  because {reason}")?;
    }
    for process in &tracking.untracked {
        writeln!(out, "  process {} is not tracked: {}", process.pid, process.reason)?;
    }
    let last = record.facts.last_round.iter();
    let rounds = record.facts.rounds.iter().map(|round| (round.round.to_string(), round));
    for (name, round) in rounds.chain(last.clone().map(|last| ("last".to_owned(), &last.round))) {
        writeln!(
            out,
            "  round {name:<5} {:>9} pages dirty {:>9} sent {:>9} zero {:>9} withheld {:>11} in {:>9} ({})",
            round.dirty.0,
            round.sent.0,
            round.zero.0,
            round.withheld.0,
            round.wire.to_string(),
            round.took.to_string(),
            rate(round.wire, round.took),
        )?;
    }
    for Slowdown { after, keep } in &record.facts.slowdowns {
        writeln!(out, "  slowed down to {keep} % of its processor time after {after} rounds")?;
    }
    if let Some(convergence) = &record.facts.convergence {
        let Convergence { why, forecast, wanted, post_copy } = convergence;
        let rate = forecast.rate.map_or("assumed".to_owned(), |rate| format!("measured, {}/s", rate.bytes()));
        writeln!(
            out,
            "  ended because {why}: predicted to stand still for {} ({} pages left, rate {rate}), aimed at {wanted}",
            forecast.downtime, forecast.left.0
        )?;
        writeln!(out, "  of which the switch itself: {}", record.fixed())?;
        if *post_copy {
            writeln!(out, "  post-copy: what is left follows when the container runs on the target")?;
        }
    }
    for last in last {
        let sent: Bytes = record.facts.rounds.iter().chain([&last.round]).map(|round| round.wire).sum();
        writeln!(out, "  {} pages ({}) exist, {sent} sent in all", last.total.0, last.total.bytes())?;
        if last.owed.0 > 0 {
            writeln!(out, "  {} of them ({}) were owed at the freeze", last.owed.0, last.owed.bytes())?;
        }
    }
    let mut encoding = Encoding::default();
    let rounds = record.facts.rounds.iter().chain(record.facts.last_round.iter().map(|last| &last.round));
    let mut wire = Bytes(0);
    for round in rounds {
        encoding += round.encoding;
        wire += round.wire;
    }
    if encoding.raw() > Bytes(0) {
        writeln!(
            out,
            "  {} of pages that are not zero, {wire} on the wire: {}",
            encoding.raw(),
            mix(encoding)
        )?;
    }
    Ok(())
}

/// How pages went, in shares.
fn mix(encoding: Encoding) -> String {
    let Encoding { plain, lz4, zstd, named, unchanged, partial } = encoding;
    let all = (plain + lz4 + zstd + named + unchanged).0.max(1);
    let share = |pages: Pages| pages.0.saturating_mul(100).div_ceil(all);
    let parts = [
        (plain, "as they are"),
        (lz4, "lz4"),
        (zstd, "zstd"),
        (named, "by reference"),
        (unchanged, "unchanged"),
    ];
    let parts = parts.iter().filter(|(pages, _)| pages.0 > 0);
    let all = parts.map(|(pages, how)| format!("{} % {how}", share(*pages))).collect::<Vec<_>>().join(", ");
    match partial {
        Pages(0) => all,
        partial => format!("{all}; of {} % only what had changed", share(partial)),
    }
}

fn write_files(out: &mut String, record: &Migration) -> std::fmt::Result {
    if let (Some(pushed), Some(pulled)) = (&record.facts.pushed, &record.facts.pulled) {
        let (put, present) = (pushed.put, pushed.present);
        writeln!(out, "\nimage: {put} put into the bucket, {present} there already, {} read", pulled.read)?;
    }
    if !record.facts.passes.is_empty() {
        writeln!(out, "\nfiles")?;
    }
    for pass in &record.facts.passes {
        let wire = pass.wire.to_string();
        writeln!(
            out,
            "  {:>6} entries {:>6} sent {:>4} deleted {wire:>11} in {}",
            pass.entries, pass.sent, pass.deleted, pass.took
        )?;
    }
    Ok(())
}

fn write_freeze(out: &mut String, record: &Migration) -> std::fmt::Result {
    let Some(split) = timing::freeze_split(record) else { return Ok(()) };
    writeln!(out, "\nfrozen for {} (dump, last round, files and ship dump overlap)", split.total)?;
    for (part, took) in [
        ("freeze", split.freeze),
        ("dump", split.dump),
        ("last round", split.last_round),
        ("files", split.files),
        ("ship dump", split.ship),
        ("join", split.merge),
        ("start", split.start),
    ] {
        writeln!(out, "  {part:<10} {took}")?;
    }
    if let Some(filled) = &record.facts.filled {
        let (waited, demanded, rest) = (filled.faults.0, filled.on_demand.0, filled.in_background.0);
        writeln!(
            out,
            "memory complete {} after its start: {demanded} pages for {waited} that were waited for, {rest} in the background",
            filled.took
        )?;
        let (pulled, pushed) = (filled.pulled.0, filled.pushed.0);
        if pulled + pushed > 0 {
            writeln!(out, "post-copy: of what was owed, {pulled} pages came on demand and {pushed} unasked")?;
        }
    }
    Ok(())
}
