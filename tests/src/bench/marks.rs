//! The marks: what the figures should be, what they are, and whether that will do.

use crate::bench::cell::{Engine, Kind, Workload, Writer};
use crate::bench::plan::{
    FIXED, GROWTH, LIMIT, LIMITED, LIMITED_BY, POLICIES, READ_MOSTLY, REDIS, TAX, UNSHAPED,
};
use crate::bench::sample::{Results, Runs, Sample};
use crate::bench::stats::{Summary, figure};
use serde::Serialize;

/// Ours, as it is when nothing is said.
const OURS: Engine = Engine::Haul(None);

/// Whether a mark is met.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// It is.
    Met,
    /// It is not.
    Missed,
    /// There is no figure; `figure` says why.
    NotMeasured,
}

/// A line of the table.
#[derive(Debug, Clone, Serialize)]
pub struct Mark {
    /// What.
    pub name: String,
    /// What it should be.
    pub goal: String,
    /// What it is.
    pub figure: String,
    /// Whether that will do.
    pub verdict: Verdict,
}

impl Mark {
    fn new(name: impl Into<String>, goal: impl Into<String>, found: Result<(String, bool), String>) -> Self {
        let (figure, verdict) = match found {
            Ok((figure, true)) => (figure, Verdict::Met),
            Ok((figure, false)) => (figure, Verdict::Missed),
            Err(why) => (why, Verdict::NotMeasured),
        };
        Self { name: name.into(), goal: goal.into(), figure, verdict }
    }
}

/// All marks.
#[must_use]
pub fn all(results: &Results) -> Vec<Mark> {
    let mut marks = redis(results);
    marks.push(growth(results));
    marks.push(bound(results));
    marks.extend(policies(results));
    marks.push(amplification(results));
    marks.push(page_path(results));
    marks.push(bandwidth(results));
    marks.push(tax(results));
    marks.push(memory(results));
    marks
}

/// A contender's runs in a cell, or why there are none.
fn runs<'r>(results: &'r Results, cell: &str, engine: Engine) -> Result<&'r Runs, String> {
    let Some(outcome) = results.cell(cell) else {
        let why =
            if results.not_run.iter().any(|name| name == cell) { "no time left" } else { "not in this plan" };
        return Err(format!("{cell}: {why}"));
    };
    let runs = outcome.of(engine).ok_or_else(|| format!("{cell}: {engine} does not take part"))?;
    match (&runs.skipped, runs.samples.is_empty()) {
        (Some(why), _) => Err(format!("{cell}: {why}")),
        (None, true) => Err(format!("{cell}: no run of {engine} succeeded that counts")),
        (None, false) => Ok(runs),
    }
}

fn summary(
    results: &Results,
    cell: &str,
    engine: Engine,
    what: impl Fn(&Sample) -> Option<f64>,
) -> Result<Summary, String> {
    runs(results, cell, engine)?.of(what).ok_or_else(|| format!("{cell}: {engine} gives no such figure"))
}

fn gap(results: &Results, cell: &str, engine: Engine) -> Result<Summary, String> {
    summary(results, cell, engine, |sample| Some(sample.gap()))
}

fn redis(results: &Results) -> Vec<Mark> {
    let name = "gap, Redis 1 GiB, 20 MB/s of writes, 1 Gbit/s";
    let ours = gap(results, REDIS, OURS);
    let of = |value: fn(&Summary) -> f64, most: f64| {
        let ours = ours.clone();
        ours.map(|gap| (format!("{:.0} ms (n = {})", value(&gap), gap.n), value(&gap) <= most))
    };
    let rivals = [Engine::Docker, Engine::Runc, Engine::Podman];
    let best = rivals.into_iter().filter_map(|rival| Some((gap(results, REDIS, rival).ok()?, rival)));
    let best = best.min_by(|(a, _), (b, _)| a.median.total_cmp(&b.median));
    let times = best.ok_or_else(|| format!("{REDIS}: no baseline succeeded")).and_then(|(best, rival)| {
        let ours = ours.clone()?;
        let times = best.median / ours.median;
        let what = format!("{times:.1} times below {rival} ({:.0} ms, n = {})", best.median, best.n);
        Ok((what, times >= 20.0))
    });
    vec![
        Mark::new(format!("{name}: median"), "at most 100 ms", of(|gap| gap.median, 100.0)),
        Mark::new(format!("{name}: p95"), "at most 200 ms", of(|gap| gap.p95, 200.0)),
        Mark::new(format!("{name}: against the best baseline"), "at least 20 times below", times),
    ]
}

fn growth(results: &Results) -> Mark {
    let [small, .., large] = GROWTH;
    let found = gap(results, small, OURS).and_then(|small| {
        let large = gap(results, large, OURS)?;
        let times = large.median / small.median;
        Ok((format!("{times:.2} times ({:.0} ms to {:.0} ms)", small.median, large.median), times <= 1.3))
    });
    Mark::new("gap as memory grows from 64 MiB to 4 GiB, idle", "at most 1.3 times", found)
}

/// The worst of several figures, with what they belong to.
fn worst(all: Vec<(f64, String)>, else_: &str) -> Result<(f64, String), String> {
    all.into_iter().max_by(|(a, _), (b, _)| a.total_cmp(b)).ok_or_else(|| else_.to_owned())
}

/// Whether the fixed cost is that of [`FIXED`]: more processes, and memory that they share, cost more.
fn costs_the_same(workload: &Workload) -> bool {
    matches!(workload, Workload::Writer(Writer { processes: 1, kind: Kind::Private, .. }))
}

fn bound(results: &Results) -> Mark {
    let freeze = |cell: &str| summary(results, cell, OURS, |sample| sample.moved.freeze);
    let found = freeze(FIXED).and_then(|fixed| {
        let all = results.cells.iter().filter(|outcome| costs_the_same(&outcome.cell.workload));
        let all = all.filter_map(|outcome| {
            let (bound, name) = (outcome.bound?, outcome.cell.name);
            let found = freeze(name).ok()?.median;
            let what = format!("{name}: {found:.0} ms against {bound:.0} + {:.0} ms", fixed.median);
            Some((found / (bound + fixed.median), what))
        });
        let (times, what) = worst(all.collect(), "no cell with a bound was run")?;
        Ok((format!("{times:.2} times at worst ({what})"), times <= 1.5))
    });
    let name = format!("freeze against D* plus the fixed cost (the freeze of {FIXED})");
    Mark::new(name, "at most 1.5 times", found)
}

fn policies(results: &Results) -> Vec<Mark> {
    let (history, phaul) = (Engine::Haul(Some("history")), Engine::Haul(Some("phaul")));
    let compare = |cell: &str, what: fn(&Sample) -> Option<f64>| {
        let phaul = summary(results, cell, phaul, what)?;
        let history = summary(results, cell, history, what)?;
        Ok::<_, String>((history.median, phaul.median))
    };
    let mut marks = Vec::new();
    for cell in POLICIES {
        // All memory must go once: no policy can save that, and with a small hot set it is most of all bytes.
        let again = compare(cell, |s| s.moved.pages.map(|pages| figure(s.wire.hosts) - figure(pages * 4096)));
        let again = again.map_or_else(
            |_| String::new(),
            |(history, phaul)| format!("; beyond one copy {:.0} and {:.0} MB", history / 1e6, phaul / 1e6),
        );
        let bytes = compare(cell, |sample| Some(figure(sample.wire.hosts))).map(|(history, phaul)| {
            let change = 100.0 * (history / phaul - 1.0);
            let what =
                format!("{change:+.0} % ({:.0} MB, phaul {:.0} MB{again})", history / 1e6, phaul / 1e6);
            (what, change <= -30.0)
        });
        let freeze = compare(cell, |sample| sample.moved.freeze)
            .map(|(history, phaul)| (format!("{history:.0} ms, phaul {phaul:.0} ms"), history <= phaul));
        marks.push(Mark::new(format!("{cell}: bytes, history against phaul"), "-30 % or better", bytes));
        marks.push(Mark::new(format!("{cell}: freeze, history against phaul"), "no longer", freeze));
    }
    marks
}

fn amplification(results: &Results) -> Mark {
    let all = READ_MOSTLY.iter().filter_map(|cell| {
        let median = summary(results, cell, OURS, Sample::amplification).ok()?.median;
        Some((median, (*cell).to_owned()))
    });
    let found = worst(all.collect(), "no read-mostly cell was run");
    let found = found.map(|(value, cell)| (format!("{value:.3} at worst ({cell})"), value <= 1.1));
    Mark::new("amplification, read-mostly workloads", "at most 1.1", found)
}

fn page_path(results: &Results) -> Mark {
    let found = summary(results, UNSHAPED, OURS, |sample| sample.moved.page_path).and_then(|path| {
        let most = results.vm_readv.ok_or("process_vm_readv was not measured")?;
        let share = 100.0 * path.median / most;
        let what = format!("{share:.0} % ({:.2} of {:.2} GB/s)", path.median / 1e9, most / 1e9);
        Ok((what, share >= 60.0))
    });
    Mark::new(
        "unshaped throughput of the page path, by process_vm_readv's on one core",
        "at least 60 %",
        found,
    )
}

fn bandwidth(results: &Results) -> Mark {
    let found = summary(results, LIMITED, LIMITED_BY, |sample| sample.moved.page_path).map(|path| {
        let off = 100.0 * (path.median / LIMIT - 1.0);
        (format!("{off:+.1} % ({:.1} of {:.1} MB/s)", path.median / 1e6, LIMIT / 1e6), off.abs() <= 5.0)
    });
    Mark::new("memory under --bandwidth, against the limit", "within 5 %", found)
}

fn tax(results: &Results) -> Mark {
    let found = summary(results, TAX, OURS, Sample::repeated_tax).and_then(|tax| {
        let all = summary(results, TAX, OURS, Sample::tax)?;
        let pace = summary(results, TAX, OURS, |sample| sample.moved.pace)?;
        // The last one, which is the reason to go on, is not followed by a pause.
        if !(0.5..=1.5).contains(&pace.median) {
            return Err(format!("{TAX}: {:.1} rounds a second", pace.median));
        }
        let percent = 100.0 * tax.median;
        let what = format!(
            "{percent:.1} % once all memory has gone (n = {}, {:.1} rounds a second; {:.1} % with the first copy)",
            tax.n,
            pace.median,
            100.0 * all.median
        );
        Ok((what, percent <= 5.0))
    });
    Mark::new("tax on Redis at one round a second", "at most 5 %", found)
}

fn memory(results: &Results) -> Mark {
    const MIB: f64 = 1024.0 * 1024.0;
    let all = results.cells.iter().filter_map(|outcome| {
        let runs = runs(results, outcome.cell.name, OURS).ok()?;
        let peak = runs.of(|sample| sample.source.map(|usage| figure(usage.peak)))?.p95 / MIB;
        let most = 64.0 + figure(outcome.cell.workload.mebibytes()) / 100.0;
        Some((peak / most, format!("{peak:.0} MiB, {most:.0} MiB allowed, {}", outcome.cell.name)))
    });
    let found = worst(all.collect(), "no cell was run").map(|(share, what)| (what, share <= 1.0));
    Mark::new("our services' memory on the source, worst case", "64 MiB plus 1 % of the container's", found)
}

/// Every cell that a mark asks for by name must be in the full plan.
#[must_use]
pub fn cells() -> Vec<&'static str> {
    let single = [REDIS, FIXED, UNSHAPED, TAX, LIMITED];
    single.iter().chain(&GROWTH).chain(&POLICIES).chain(&READ_MOSTLY).copied().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::cell::Contender;
    use crate::bench::engine::Moved;
    use crate::bench::plan;
    use crate::bench::sample::Outcome;
    use crate::bench::wire::Wire;

    #[test]
    fn every_cell_of_a_mark_is_in_the_full_plan() {
        let plan = plan::full();
        for name in cells() {
            assert!(plan.cells.iter().any(|cell| cell.name == name), "{name}");
        }
    }

    fn sample(gap: f64) -> Sample {
        Sample {
            gap_steady: Some(gap),
            gap_reconnecting: gap,
            gap_before: 1.0,
            moved: Moved::default(),
            wire: Wire::default(),
            throughput: None,
            repeated: None,
            source: None,
            target: None,
        }
    }

    fn results(gaps: [(Engine, f64); 2]) -> Results {
        let cell = plan::full().cells.into_iter().find(|cell| cell.name == REDIS).unwrap();
        let runs = gaps.map(|(engine, gap)| Runs {
            samples: vec![sample(gap)],
            ..Runs::new(Contender { engine, runs: 1 })
        });
        let outcome = Outcome { cell, runs: runs.into(), seconds: 1.0, bound: None };
        Results { about: None, cells: vec![outcome], not_run: vec![FIXED.to_owned()], vm_readv: None }
    }

    fn verdicts(results: &Results) -> Vec<Verdict> {
        all(results).iter().take(3).map(|mark| mark.verdict).collect()
    }

    #[test]
    fn the_gap_is_judged_by_itself_and_against_the_best_baseline() {
        let met = results([(OURS, 50.0), (Engine::Runc, 1000.0)]);
        assert_eq!(verdicts(&met), [Verdict::Met; 3]);
        let missed = results([(OURS, 201.0), (Engine::Runc, 1000.0)]);
        assert_eq!(verdicts(&missed), [Verdict::Missed; 3]);
    }

    #[test]
    fn a_tax_counts_only_at_about_a_round_a_second() {
        let with = |pace| {
            let cell = plan::full().cells.into_iter().find(|cell| cell.name == TAX).unwrap();
            let moved = Moved { pace: Some(pace), ..Moved::default() };
            let sample =
                Sample { throughput: Some((1000.0, 700.0)), repeated: Some(980.0), moved, ..sample(1.0) };
            let runs = Runs { samples: vec![sample], ..Runs::new(Contender { engine: OURS, runs: 1 }) };
            let outcome = Outcome { cell, runs: vec![runs], seconds: 1.0, bound: None };
            tax(&Results { about: None, cells: vec![outcome], not_run: Vec::new(), vm_readv: None })
        };
        assert_eq!(with(1.1).verdict, Verdict::Met, "{:?}", with(1.1));
        assert_eq!(with(10.0).verdict, Verdict::NotMeasured, "{:?}", with(10.0));
    }

    #[test]
    fn what_was_not_measured_says_why() {
        let marks = all(&results([(OURS, 50.0), (Engine::Runc, 1000.0)]));
        let bound = marks.iter().find(|mark| mark.name.starts_with("freeze against")).unwrap();
        assert_eq!(bound.verdict, Verdict::NotMeasured);
        assert_eq!(bound.figure, format!("{FIXED}: no time left"));
        assert!(marks.iter().all(|mark| mark.verdict != Verdict::NotMeasured || !mark.figure.is_empty()));
    }
}
