//! Our own engine, by its command line.

use super::{Moved, Place, Subject, end_within, other};
use crate::bench::about;
use crate::bench::stats::figure;
use crate::fleet::Fleet;
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::fs;
use std::net::SocketAddr;
use std::process::Stdio;
use std::time::Duration;

/// What this build of `haul` knows.
#[derive(Debug, Clone, Default)]
pub struct Capabilities {
    help: String,
}

impl Capabilities {
    /// Asks it.
    ///
    /// # Errors
    /// `haul` cannot be started.
    pub fn ask(fleet: &Fleet) -> Result<Self> {
        Ok(Self { help: fleet.haul(&["migrate", "--help"])?.stdout })
    }

    /// Whether `haul migrate --policy` takes this policy.
    #[must_use]
    pub fn knows_policy(&self, policy: &str) -> bool {
        policies(&self.help).iter().any(|known| known == policy)
    }
}

/// The words that a help text gives as values of `--policy`; none when there is no such option.
#[must_use]
pub fn policies(help: &str) -> Vec<String> {
    let Some((_, after)) = help.split_once("--policy") else { return Vec::new() };
    // What belongs to the option ends where the next one begins.
    let own = after.split("\n      --").next().unwrap_or_default();
    let is_part = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    own.split(|c| !is_part(c)).filter(|word| !word.is_empty()).map(str::to_owned).collect()
}

/// A container that `haul migrate` moves.
#[derive(Debug)]
pub(super) struct Haul<'f> {
    place: Place<'f>,
    host: usize,
    policy: Option<&'static str>,
    options: &'static [&'static str],
}

impl<'f> Haul<'f> {
    pub(super) fn start(
        place: Place<'f>,
        policy: Option<&'static str>,
        options: &'static [&'static str],
    ) -> Result<Self> {
        place.run()?;
        Ok(Self { place, host: 0, policy, options })
    }
}

impl Subject for Haul<'_> {
    fn server(&self) -> SocketAddr {
        self.place.server()
    }

    fn host(&self) -> usize {
        self.host
    }

    fn keeps_connections(&self) -> bool {
        true
    }

    fn prepare(&mut self) -> Result<()> {
        Ok(())
    }

    fn go(&mut self, limit: Duration) -> Result<Moved> {
        let (fleet, to) = (self.place.fleet, other(self.host));
        let name = self.place.name();
        let mut command = fleet.haul_command()?;
        command.args(["migrate", &name, "--from", fleet.host(self.host).name()]);
        command.args(["--to", fleet.host(to).name(), "--wait", "--json"]).args(self.options);
        if let Some(policy) = self.policy {
            command.args(["--policy", policy]);
        }
        let mut child =
            command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().context("start haul")?;
        end_within(&mut child, "end of haul migrate", limit)?;
        let output = child.wait_with_output()?;
        let said = String::from_utf8_lossy(&output.stdout);
        let record: Value = serde_json::from_str(said.lines().last().unwrap_or_default())
            .with_context(|| format!("no record: {}", String::from_utf8_lossy(&output.stderr)))?;
        if record.get("outcome").and_then(Value::as_str) != Some("committed") {
            bail!("not migrated: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        self.host = to;
        keep(&record)?;
        read(record)
    }

    fn remove(&mut self) -> Result<()> {
        self.place.remove()
    }
}

/// Writes a migration's record down, for whoever wants to know more than the tables say.
fn keep(record: &Value) -> Result<()> {
    let records = about::workspace()?.join("target/bench/records");
    fs::create_dir_all(&records)?;
    let id = record.get("id").and_then(Value::as_str).context("the record has no id")?;
    fs::write(records.join(id).with_extension("json"), record.to_string()).context("keep a record")
}

/// Takes the figures out of a migration's record.
fn read(record: Value) -> Result<Moved> {
    let number = |pointer: &str| record.pointer(pointer).and_then(Value::as_u64);
    let began = number("/began").context("the record does not say when it began")?;
    let entered = |wanted: &str| -> Option<u64> {
        let phases = record.get("phases")?.as_array()?;
        phases.iter().find(|phase| phase.get(0).and_then(Value::as_str) == Some(wanted))?.get(1)?.as_u64()
    };
    let committed = entered("commit").context("the record does not say when it was committed")?;
    let parts = record.get("freeze").and_then(Value::as_object);
    let split = parts.into_iter().flatten().filter(|(part, _)| *part != "total");
    let split = split.filter_map(|(part, took)| Some((part.clone(), millis(took.as_u64()?)))).collect();

    let rounds = record.pointer("/facts/rounds").and_then(Value::as_array);
    // A page of zeros that is written later, or the other way about, is missed here: few are.
    let zero = rounds.and_then(|all| all.first()?.get("zero")?.as_u64()).unwrap_or_default();
    let first = rounds.and_then(|all| all.first());
    let page_path = first.and_then(|round| {
        let sent = round.get("sent")?.as_u64()?.saturating_sub(zero);
        Some(figure(sent * 4096) / (figure(round.get("took")?.as_u64()?) / 1e6))
    });
    let pre_copy = entered("pre_copy").zip(entered("prepare"));
    Ok(Moved {
        total: millis(committed.saturating_sub(began)),
        freeze: number("/freeze/total").map(millis),
        split,
        pages: number("/facts/last_round/total").map(|total| total.saturating_sub(zero)),
        rounds: rounds.and_then(|all| u64::try_from(all.len()).ok()),
        page_path,
        pre_copy,
        repeated: pre_copy
            .and_then(|(_, to)| Some((first_copy(&record)?, to)))
            .filter(|(from, to)| from < to),
        pace: pre_copy.and_then(|window| pace(&record, window)),
        report: record,
    })
}

/// When the rounds had sent as many pages as there were in the end.
fn first_copy(record: &Value) -> Option<u64> {
    let pages = record.pointer("/facts/last_round/total")?.as_u64()?;
    let rounds = record.pointer("/facts/rounds")?.as_array()?.iter();
    let sent = rounds.scan(0, |sum, round| {
        *sum += round.get("sent")?.as_u64()?;
        Some(*sum)
    });
    let spans = record.get("spans")?.as_array()?.iter();
    let ends = spans.filter(|span| span.pointer("/effect/run_round").is_some());
    let (_, last) = sent.zip(ends).find(|(sent, _)| *sent >= pages)?;
    last.get("to")?.as_u64()
}

/// Rounds a second, of those that were begun in this time.
fn pace(record: &Value, (from, to): (u64, u64)) -> Option<f64> {
    let spans = record.get("spans")?.as_array()?;
    let rounds = spans.iter().filter(|span| {
        let began = span.get("from").and_then(Value::as_u64);
        span.pointer("/effect/run_round").is_some() && began.is_some_and(|began| (from..to).contains(&began))
    });
    let seconds = figure(to.checked_sub(from).filter(|lasted| *lasted > 0)?) / 1e6;
    Some(figure(u64::try_from(rounds.count()).ok()?) / seconds)
}

fn millis(micros: u64) -> f64 {
    figure(micros) / 1e3
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn policies_are_read_from_the_help() {
        let help = "Options:\n      --max-rounds <N>  all of them\n      --policy <POLICY>\n          Which pages \
                    [possible values: all, phaul]\n      --shared <PATH>  history\n";
        let known = policies(help);
        assert!(known.iter().any(|p| p == "phaul") && known.iter().any(|p| p == "all"));
        assert!(!known.iter().any(|p| p == "history"));
        assert!(policies("Options:\n      --shared <PATH>  phaul").is_empty());
    }

    #[test]
    fn a_record_gives_its_figures() {
        let record = json!({
            "began": 1_000_000, "phases": [["pre_copy", 1_100_000], ["prepare", 1_400_000], ["commit", 2_500_000]],
            "spans": [
                { "effect": { "run_round": 0 }, "from": 1_100_000, "to": 1_340_000 }, { "effect": "prepare", "from": 1_400_000 },
                { "effect": { "run_round": 1 }, "from": 1_350_000 }, { "effect": { "run_round": 2 }, "from": 1_500_000 },
            ],
            "freeze": { "total": 80_000, "dump": 30_000 },
            "facts": { "rounds": [{ "zero": 24, "sent": 1024, "took": 500_000 }, { "zero": 9 }], "last_round": { "total": 1024 } },
        });
        let moved = read(record).unwrap();
        assert_eq!(
            (moved.total, moved.freeze, moved.pages, moved.rounds),
            (1500.0, Some(80.0), Some(1000), Some(2))
        );
        assert_eq!(moved.split, [("dump".to_owned(), 30.0)]);
        assert_eq!(moved.pre_copy, Some((1_100_000, 1_400_000)));
        assert_eq!(moved.repeated, Some((1_340_000, 1_400_000)));
        assert_eq!(moved.pace, Some(2.0 / 0.3));
        assert_eq!(moved.page_path, Some(1000.0 * 4096.0 / 0.5));
        assert!(read(json!({ "began": 1 })).is_err());
    }
}
