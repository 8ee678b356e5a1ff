//! The benchmarks: what a move costs its users, against other ways to do it.
//!
//! `bench` runs all cells, `bench --quick` the most telling ones with fewer runs, `bench --only CELL` one of them,
//! `bench --engine ENGINE` one contender of each, `bench --runs MOST` no more runs of each than that. With `--publish`
//! the summary also goes to `deploy/BENCHMARKS.md`. It is meant to be built in release mode: it runs the programs that
//! lie beside it.

use anyhow::{Context, Result, bail};
use haulage_tests::bench::about::{self, About};
use haulage_tests::bench::marks;
use haulage_tests::bench::plan::{self, Plan};
use haulage_tests::bench::runner::Runner;
use haulage_tests::bench::sample::Results;
use haulage_tests::bench::{publish, report};
use haulage_tests::fleet::Fleet;
use std::process::ExitCode;
use std::time::Instant;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("bench: failed: {e:#}");
            ExitCode::FAILURE
        }
    }
}

/// What the command line says.
struct Wanted {
    plan: Plan,
    publish: bool,
}

fn wanted() -> Result<Wanted> {
    let mut wanted = Wanted { plan: plan::full(), publish: false };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--quick" => wanted.plan = plan::quick(),
            "--publish" => wanted.publish = true,
            "--only" => {
                let name = arguments.next().context("--only wants the name of a cell")?;
                wanted.plan.cells.retain(|cell| cell.name == name);
                wanted.plan.name = "partial";
            }
            "--engine" => {
                let name = arguments.next().context("--engine wants the name of an engine")?;
                for cell in &mut wanted.plan.cells {
                    cell.contenders.retain(|contender| contender.engine.to_string() == name);
                }
                wanted.plan.name = "partial";
            }
            "--runs" => {
                let most = arguments.next().context("--runs wants a number")?.parse()?;
                for contender in wanted.plan.cells.iter_mut().flat_map(|cell| &mut cell.contenders) {
                    contender.runs = contender.runs.min(most);
                }
                wanted.plan.name = "partial";
            }
            _ => bail!("usage: bench [--quick] [--only CELL] [--engine ENGINE] [--runs MOST] [--publish]"),
        }
    }
    if wanted.plan.cells.is_empty() {
        let all: Vec<&str> = plan::full().cells.iter().map(|cell| cell.name).collect();
        bail!("no such cell; there are {}", all.join(", "));
    }
    Ok(wanted)
}

fn run() -> Result<()> {
    let Wanted { plan, publish } = wanted()?;
    let deadline = Instant::now() + plan.budget;
    let directory = about::workspace()?.join("target/bench");
    let busy = about::busy()?;
    if busy > 10 {
        eprintln!("bench: the machine is {busy} % busy with other work, which will show in every figure");
    }
    let mut fleet = Fleet::builder().experimental().start()?;
    fleet.start_services()?;
    let about = Some(About::ask(&fleet, plan.name, busy)?);
    let mut results = Results { about, cells: Vec::new(), not_run: Vec::new(), vm_readv: None };
    results.vm_readv = Some(about::vm_readv(&fleet)?);
    let runner = Runner::new(&fleet, deadline)?;
    for cell in &plan.cells {
        match runner.cell(cell) {
            Some(outcome) => results.cells.push(outcome),
            None => results.not_run.push(cell.name.to_owned()),
        }
        // What there is so far survives whatever comes.
        report::write(&results, &directory)?;
    }
    drop(runner);
    println!("{}", report::figures(&results));
    println!("{}", report::marks_table(&marks::all(&results)));
    println!("all of it: {}", directory.join("results.md").display());
    if publish {
        publish::write(&results)?;
    }
    fleet.stop()
}
