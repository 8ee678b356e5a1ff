//! Results as JSON and as tables.

use crate::bench::about::About;
use crate::bench::marks::{self, Mark, Verdict};
use crate::bench::plot;
use crate::bench::sample::{Outcome, Results, Runs, Sample};
use crate::bench::stats::{Summary, figure};
use anyhow::{Context, Result};
use serde_json::json;
use std::fmt::Write;
use std::fs;
use std::path::Path;

/// Writes everything into a directory: `results.json`, `results.md` and the plots.
///
/// # Errors
/// A file could not be written or a plot not be drawn.
pub fn write(results: &Results, directory: &Path) -> Result<()> {
    fs::create_dir_all(directory)?;
    let marks = marks::all(results);
    let all = json!({ "results": results, "marks": marks });
    fs::write(directory.join("results.json"), serde_json::to_vec_pretty(&all)?)?;
    fs::write(directory.join("results.md"), markdown(results))?;
    plot::all(results, directory).context("draw the plots")
}

/// The whole report.
#[must_use]
pub fn markdown(results: &Results) -> String {
    let mut out = String::from("# Benchmarks\n\n");
    // Writing to a string does not fail.
    let _infallible = write_all(&mut out, results);
    out
}

fn write_all(out: &mut String, results: &Results) -> std::fmt::Result {
    if let Some(about) = &results.about {
        write_about(out, about)?;
    }
    writeln!(out, "\n## Marks\n\n{}", marks_table(&marks::all(results)))?;
    writeln!(out, "## Figures\n\n{LEGEND}\n")?;
    out.push_str(&figures(results));
    write_failures(out, results)?;
    if !results.not_run.is_empty() {
        writeln!(out, "\nNot run, for want of time: {}.", results.not_run.join(", "))?;
    }
    Ok(())
}

const LEGEND: &str = "Median / p95 of the counted runs (`n`), with the number of runs that failed; the first run of \
each contender is discarded. Figures mean something only against others of the same run. *gap*: the longest wait of a \
client that keeps its connection (of one that connects anew each time where connections do not survive: docker, \
counted from the request). *new*: of one that connects anew each time. *freeze*: by the engine's own account. *wire*: \
bytes between the hosts, both ways. *amp.*: wire by the pages that existed and were not zeros. *tax*: loss of \
throughput in pre-copy. *CPU*, *peak*: our services on the source, without the shared memory of the container that one of them has mapped. *D\\**: the clairvoyant bound of the downtime.";

fn write_about(out: &mut String, about: &About) -> std::fmt::Result {
    writeln!(out, "`{}` plan, {} UTC, commit `{}`.\n", about.plan, about.date, about.commit)?;
    writeln!(out, "- machine: {}", about.machine)?;
    writeln!(out, "- busy with other work before the run: {} %", about.busy)?;
    for (name, version) in &about.versions {
        writeln!(out, "- {name}: {version}")?;
    }
    Ok(())
}

/// The table of marks.
#[must_use]
pub fn marks_table(marks: &[Mark]) -> String {
    let mut out = String::from("| mark | goal | figure | |\n| --- | --- | --- | --- |\n");
    for mark in marks {
        let verdict = match mark.verdict {
            Verdict::Met => "met",
            Verdict::Missed => "missed",
            Verdict::NotMeasured => "not measured",
        };
        let _infallible =
            writeln!(out, "| {} | {} | {} | **{verdict}** |", mark.name, mark.goal, mark.figure);
    }
    out
}

/// The table of figures.
#[must_use]
pub fn figures(results: &Results) -> String {
    let mut out = String::from(
        "| cell | link | engine | n | failed | gap ms | new ms | freeze ms | total s | wire MB | amp. | rounds | tax % \
         | CPU s | peak MiB | D* ms |\n| --- | --- | --- | --: | --: | --: | --: | --: | --: | --: | --: | --: | --: \
         | --: | --: | --: |\n",
    );
    for outcome in &results.cells {
        for runs in &outcome.runs {
            let _infallible = writeln!(out, "{}", row(outcome, runs));
        }
    }
    out
}

fn row(outcome: &Outcome, runs: &Runs) -> String {
    let (cell, engine) = (&outcome.cell, runs.contender.engine);
    let head = format!("| {} | {} | {engine} |", cell.name, cell.link);
    if let Some(why) = &runs.skipped {
        return format!("{head} 0 | | skipped: {why} | | | | | | | | | | |");
    }
    let cell = |digits: usize, scale: f64, what: &dyn Fn(&Sample) -> Option<f64>| {
        runs.of(what).map(|found| both(found, digits, scale)).unwrap_or_default()
    };
    let one = |digits: usize, scale: f64, what: &dyn Fn(&Sample) -> Option<f64>| {
        runs.of(what).map(|found| format!("{:.digits$}", found.median * scale)).unwrap_or_default()
    };
    let columns = [
        runs.samples.len().to_string(),
        runs.failures.len().to_string(),
        cell(0, 1.0, &|s| Some(s.gap())),
        cell(0, 1.0, &|s| Some(s.gap_reconnecting)),
        cell(0, 1.0, &|s| s.moved.freeze),
        one(1, 1e-3, &|s| Some(s.moved.total)),
        one(1, 1e-6, &|s| Some(figure(s.wire.hosts))),
        one(2, 1.0, &Sample::amplification),
        one(0, 1.0, &|s| s.moved.rounds.map(figure)),
        one(1, 100.0, &Sample::tax),
        one(2, 1.0, &|s| s.source.map(|usage| usage.cpu)),
        one(0, 1.0 / f64::from(1 << 20), &|s| s.source.map(|usage| figure(usage.peak))),
        outcome.bound.map(|bound| format!("{bound:.0}")).unwrap_or_default(),
    ];
    format!("{head} {} |", columns.join(" | "))
}

fn both(found: Summary, digits: usize, scale: f64) -> String {
    format!("{:.digits$} / {:.digits$}", found.median * scale, found.p95 * scale)
}

fn write_failures(out: &mut String, results: &Results) -> std::fmt::Result {
    let all = results.cells.iter().flat_map(|outcome| outcome.runs.iter().map(move |runs| (outcome, runs)));
    let failed: Vec<_> = all.filter(|(_, runs)| !runs.failures.is_empty()).collect();
    if failed.is_empty() {
        return writeln!(out, "\nNo run failed.");
    }
    writeln!(out, "\n## Failures\n")?;
    for (outcome, runs) in failed {
        for failure in &runs.failures {
            // One line each; the whole text is in the JSON.
            let first: String = failure.lines().next().unwrap_or_default().chars().take(300).collect();
            writeln!(out, "- {}, {}: {first}", outcome.cell.name, runs.contender.engine)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::cell::{Contender, Engine};
    use crate::bench::plan;

    #[test]
    fn failures_and_what_was_skipped_are_told() {
        let cell = plan::quick().cells.remove(0);
        let contender = |engine| Contender { engine, runs: 3 };
        let mut failed = Runs::new(contender(Engine::Runc));
        failed.failures.push("criu said no\nand more".to_owned());
        let mut skipped = Runs::new(contender(Engine::Podman));
        skipped.skipped = Some("it is not installed".to_owned());
        let outcome = Outcome { cell, runs: vec![failed, skipped], seconds: 1.0, bound: None };
        let results = Results {
            about: None,
            cells: vec![outcome],
            not_run: vec!["grow-4g".to_owned()],
            vm_readv: None,
        };
        let text = markdown(&results);
        for expected in ["runc: criu said no\n", "skipped: it is not installed", "want of time: grow-4g"] {
            assert!(text.contains(expected), "{expected} is not in {text}");
        }
        let columns = |line: &str| line.matches('|').count();
        let table = figures(&results);
        assert!(table.lines().all(|line| columns(line) == 17), "{table}");
    }
}
