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
        // A terminal of unknown width is taken for one of the usual width.
        let width = rustix::termios::tcgetwinsize(&err).map_or(0, |size| usize::from(size.ws_col));
        let line = format!("{:>8}  {text}", self.elapsed());
        write!(err, "\r\x1b[2K{}", fitted(&line, if width == 0 { 80 } else { width }))?;
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

/// As much of a line as fits: one that wraps cannot be redrawn. The last column stays free, since some terminals wrap
/// already there.
fn fitted(line: &str, width: usize) -> String {
    let room = width.saturating_sub(1);
    if line.chars().count() <= room {
        return line.to_owned();
    }
    let cut = line.chars().take(room.saturating_sub(1));
    cut.chain((room > 0).then_some('…')).collect()
}

fn round_text(record: &Migration, n: usize) -> String {
    let so_far = record.facts.rounds.get(..=n).unwrap_or_default();
    let Some(report) = so_far.last() else { return String::new() };
    format!(
        "round {}: {} pages, {} sent, {}, {} withheld, predicted downtime {}",
        report.round,
        report.dirty.0,
        report.wire,
        rate(report.wire, report.took),
        report.withheld.0,
        predicted(so_far, record.fixed().cost),
    )
}

/// Bytes per second, for people.
pub(crate) fn rate(bytes: Bytes, took: Micros) -> String {
    let per_second = u128::from(bytes.0).saturating_mul(1_000_000) / u128::from(took.0.max(1));
    format!("{}/s", Bytes(u64::try_from(per_second).unwrap_or(u64::MAX)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_never_reaches_the_last_column() {
        assert_eq!(fitted("12 µs", 6), "12 µs");
        assert_eq!(fitted("12 µs", 5), "12 …");
        assert_eq!(
            (fitted("12", 2), fitted("12", 1), fitted("12", 0)),
            ("…".into(), String::new(), String::new())
        );
    }
}
