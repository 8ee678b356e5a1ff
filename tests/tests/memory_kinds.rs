//! A program that dirties every kind of memory moves, and finds all of it as it must be.

use anyhow::{Context, Result, ensure};
use haulage_tests::fleet::Fleet;
use haulage_tests::scenario::{nothing_left_on, only_on, run, system};
use haulage_tests::{dirtier, image};

#[test]
fn every_kind_of_memory_arrives_whole() -> Result<()> {
    moves_there_and_back(&[image::DIRTIER, "dirtier", "64", "40"])
}

/// Where short-lived processes come and go, nothing is taken for unwritten that page tables do not show.
#[test]
fn every_kind_of_memory_arrives_whole_where_no_process_comes_or_goes() -> Result<()> {
    moves_there_and_back(&[image::DIRTIER, "dirtier", "64", "40", "childless"])
}

fn moves_there_and_back(program: &[&str]) -> Result<()> {
    system(&Fleet::builder(), |fleet| {
        run(fleet, 0, "memory", 0, program)?;
        let mut last = dirtier::verify(fleet.host(0), "memory")?;
        ensure!(last.bad == 0, "bad before any move: {last:?}");
        for (from, to) in [(0, 1), (1, 0)] {
            fleet.migrate("memory", from, to)?.committed()?;
            only_on(fleet, "memory", to)?;
            for _ in 0..2 {
                let next = dirtier::verify(fleet.host(to), "memory").context("after a move")?;
                ensure!(
                    next.bad == 0,
                    "{} bad pages:\n{}",
                    next.bad,
                    fleet.host(to).docker(&["logs", "memory"])?
                );
                ensure!(next.operations > last.operations, "it stands still: {last:?} {next:?}");
                ensure!(next.number == last.number + 1, "it was started anew: {last:?} {next:?}");
                last = next;
            }
        }
        fleet.hosts().iter().try_for_each(nothing_left_on)
    })
}
