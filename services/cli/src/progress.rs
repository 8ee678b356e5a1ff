//! Progress of a migration: one line that is redrawn on a terminal, plain lines elsewhere, nothing with JSON.

use std::io::{self, IsTerminal, Write};
use std::time::Instant;

use haulage_migration::{Migration, Phase, predicted};
use haulage_protocol::unit::{Bytes, Micros};

use crate::output::Failure;

enum Mode {
    Silent,
    Plain,
    Redrawn,
}

pub(crate) struct Progress {
    mode: Mode,
    began: Instant,
    phases_seen: usize,
    rounds_seen: usize,
}

impl Progress {
    pub(crate) fn new(json: bool) -> Self {
        let mode = match (json, io::stderr().is_terminal()) {
            (true, _) => Mode::Silent,
            (false, true) => Mode::Redrawn,
            (false, false) => Mode::Plain,
        };
        Self { mode, began: Instant::now(), phases_seen: 0, rounds_seen: 0 }
    }

    /// The record has changed.
    pub(crate) fn update(&mut self, record: &Migration) -> Result<(), Failure> {
        if matches!(self.mode, Mode::Plain) {
            for n in self.rounds_seen..record.facts.rounds.len() {
                writeln!(io::stderr(), "{:>8}    {}", self.elapsed(), round_text(record, n))?;
            }
            for (phase, _) in record.phases.iter().skip(self.phases_seen) {
                if *phase != Phase::Done {
                    writeln!(io::stderr(), "{:>8}  {phase}", self.elapsed())?;
                }
            }
        }
        self.phases_seen = record.phases.len();
        self.rounds_seen = record.facts.rounds.len();
        self.tick(Some(record))
    }

    /// Time has passed.
    pub(crate) fn tick(&self, record: Option<&Migration>) -> Result<(), Failure> {
        if !matches!(self.mode, Mode::Redrawn) {
            return Ok(());
        }
        let text = match record {
            None => "waiting for a coordinator".to_owned(),
            Some(record) => {
                let last = record.facts.rounds.len().checked_sub(1);
                let rounds = last.map_or_else(String::new, |n| format!("  {}", round_text(record, n)));
                let undoing = if record.fault.is_some() { "undoing: " } else { "" };
                format!("{undoing}{}{rounds}", record.phase)
            }
        };
        let mut err = io::stderr().lock();
        write!(err, "\r\x1b[2K{:>8}  {text}", self.elapsed())?;
        Ok(err.flush()?)
    }

    /// Leaves the terminal as it was.
    pub(crate) fn finish(&self) -> Result<(), Failure> {
        if matches!(self.mode, Mode::Redrawn) {
            write!(io::stderr(), "\r\x1b[2K")?;
        }
        Ok(())
    }

    fn elapsed(&self) -> String {
        format!("{:.1} s", self.began.elapsed().as_secs_f64())
    }
}

fn round_text(record: &Migration, n: usize) -> String {
    let so_far = record.facts.rounds.get(..=n).unwrap_or_default();
    let Some(report) = so_far.last() else { return String::new() };
    format!(
        "round {}: {} pages, {} sent, {}, predicted downtime for pages {}",
        report.round,
        report.dirty.0,
        report.wire,
        rate(report.wire, report.took),
        predicted(so_far),
    )
}

/// Bytes per second, for people.
pub(crate) fn rate(bytes: Bytes, took: Micros) -> String {
    let per_second = u128::from(bytes.0).saturating_mul(1_000_000) / u128::from(took.0.max(1));
    format!("{}/s", Bytes(u64::try_from(per_second).unwrap_or(u64::MAX)))
}
