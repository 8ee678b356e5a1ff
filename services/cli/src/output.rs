//! What reaches the terminal: results on standard output, errors on standard error, and the exit code.

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use haulage_migration::{Migration, timing};
use haulage_protocol::fault::{Fault, chain};
use haulage_protocol::unit::Micros;
use haulage_transport::{NatsError, TableError};
use serde::Serialize;

/// Why a command did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// Refused, or rolled back.
    #[error("{0}")]
    Fault(#[from] Fault),
    #[error(transparent)]
    Nats(#[from] NatsError),
    #[error(transparent)]
    Table(#[from] TableError),
    /// Standard output is gone.
    #[error("cannot write the output")]
    Output(#[from] io::Error),
    #[error("cannot encode the output")]
    Encode(#[from] serde_json::Error),
    /// The migration is over, and its trace is not where it should be.
    #[error("cannot write the trace to {}", path.display())]
    Trace { path: PathBuf, source: io::Error },
}

/// Prints code, cause and remedy, and chooses the exit code.
pub(crate) fn report(failure: &Failure) -> ExitCode {
    let (lines, code) = match failure {
        // `haul show 1 | head` is no error.
        Failure::Output(error) if error.kind() == io::ErrorKind::BrokenPipe => return ExitCode::SUCCESS,
        Failure::Fault(fault) => (fault_lines(fault), if fault.is_unreachable() { 3 } else { 1 }),
        other => {
            let mut told = chain(other).into_iter();
            let mut lines = vec![format!("error: {}", told.next().unwrap_or_default())];
            lines.extend(told.map(|cause| format!("  cause:  {cause}")));
            let remedy = match other {
                Failure::Trace { .. } => "see how it ended with `haul show`, which writes the trace too",
                _ => "see whether the NATS server runs, and name it with --nats or HAUL_NATS",
            };
            lines.push(format!("  remedy: {remedy}"));
            (lines, 3)
        }
    };
    // Nothing can be done when standard error is gone too.
    let _unheard = writeln!(io::stderr(), "{}", lines.join("\n"));
    ExitCode::from(code)
}

/// A fault as people read it.
pub(crate) fn fault_lines(fault: &Fault) -> Vec<String> {
    let mut lines = vec![format!("error: {} [{}]", fault.message, fault.code)];
    lines.extend(fault.causes.iter().map(|cause| format!("  cause:  {cause}")));
    lines.extend(fault.remedy.iter().map(|remedy| format!("  remedy: {remedy}")));
    lines
}

/// Prints a line.
pub(crate) fn line(text: &str) -> Result<(), Failure> {
    Ok(writeln!(io::stdout(), "{text}")?)
}

/// Prints a value as one line of JSON.
pub(crate) fn json(value: &impl Serialize) -> Result<(), Failure> {
    line(&serde_json::to_string(value)?)
}

/// A record for people and programs: without the token that lets one write to the target, and without the opaque
/// descriptions that only the hosts' services read.
pub(crate) fn public(record: &Migration) -> Result<serde_json::Value, Failure> {
    let mut value = serde_json::to_value(record)?;
    if let Some(object) = value.as_object_mut() {
        object.remove("token");
        if let Some(inspected) = object.get_mut("facts").and_then(|facts| facts.get_mut("inspected"))
            && let Some(inspected) = inspected.as_object_mut()
        {
            inspected.remove("spec");
            inspected.remove("host");
        }
        object.insert("id".to_owned(), serde_json::to_value(&record.job.id)?);
        object.insert("freeze".to_owned(), serde_json::to_value(timing::freeze_split(record))?);
    }
    Ok(value)
}

/// This machine's clock.
pub(crate) fn now() -> Micros {
    Micros::from_duration(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default())
}

/// A time of day for people, in UTC.
pub(crate) fn clock(at: Micros) -> String {
    let nanos = i128::from(at.0).saturating_mul(1000);
    match time::OffsetDateTime::from_unix_timestamp_nanos(nanos) {
        Ok(t) => {
            let (year, month, day) = t.to_calendar_date();
            let (hour, minute, second) = t.to_hms();
            format!("{year:04}-{:02}-{day:02} {hour:02}:{minute:02}:{second:02}", u8::from(month))
        }
        Err(_) => "?".to_owned(),
    }
}
