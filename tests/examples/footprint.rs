//! What the services keep of migrations that are over: moves a small Redis to and fro and prints, after every fifth
//! move, the memory of each service, in KiB.
//!
//! `cargo run -p haulage-tests --example footprint -- [MOVES] [MEBIBYTES]`, after `make build`: 20 moves of 8 MiB. A
//! service that grows with every move has its column grow; one that has had its largest move has it stand still.

use anyhow::{Context, Result};
use haulage_tests::fleet::Fleet;
use haulage_tests::image;
use haulage_tests::load::wait_for_server;
use haulage_tests::resp::Client;
use haulage_tests::scenario::{run, system};
use std::fs;

const NAME: &str = "web";

fn main() -> Result<()> {
    let numbers: Vec<u32> =
        std::env::args().skip(1).map(|word| word.parse()).collect::<Result<_, _>>().context("numbers")?;
    let (moves, mebibytes) = match numbers.as_slice() {
        [] => (20, 8),
        [moves] => (*moves, 8),
        [moves, mebibytes, ..] => (*moves, *mebibytes),
    };
    system(&Fleet::builder(), |fleet| {
        let server = run(fleet, 0, NAME, 0, &[image::REDIS])?;
        wait_for_server(server)?;
        Client::connect(server)?.fill(mebibytes)?;
        look(fleet, 0)?;
        let mut at = 0;
        for done in 1..=moves {
            fleet.migrate(NAME, at, 1 - at)?.committed()?;
            at = 1 - at;
            if done.is_multiple_of(5) {
                look(fleet, done)?;
            }
        }
        Ok(())
    })
}

/// Prints resident and peak memory, threads and descriptors of everything that talks to the fleet's NATS.
fn look(fleet: &Fleet, moves: u32) -> Result<()> {
    println!("after {moves} moves: resident KiB, peak KiB, threads, descriptors");
    let url = fleet.nats()?.url();
    let mut lines = Vec::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let dir = entry.path();
        let Ok(line) = fs::read_to_string(dir.join("cmdline")) else { continue };
        let mut words = line.split('\0');
        let program = words.next().and_then(|path| path.rsplit('/').next()).unwrap_or_default().to_owned();
        if !line.contains(&url) || !program.starts_with("haul-") {
            continue;
        }
        let host = words.skip_while(|word| *word != "--host").nth(1).unwrap_or_default();
        let status = fs::read_to_string(dir.join("status")).unwrap_or_default();
        let number = |name: &str| {
            let field = status.lines().find_map(|line| line.strip_prefix(name));
            field.and_then(|field| field.split_whitespace().next()).unwrap_or_default().to_owned()
        };
        let descriptors = fs::read_dir(dir.join("fd")).map_or(0, Iterator::count);
        let (resident, peak, threads) = (number("VmRSS:"), number("VmHWM:"), number("Threads:"));
        lines.push(format!("  {program:18} {host:8} {resident:>8} {peak:>8} {threads:>4} {descriptors:>4}"));
    }
    lines.sort();
    lines.iter().for_each(|line| println!("{line}"));
    Ok(())
}
