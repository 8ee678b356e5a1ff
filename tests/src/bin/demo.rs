//! The demonstration: two hosts, a Redis in use, a live migration there and one back.
//!
//! `demo` runs it and removes everything; `demo --keep` leaves the fleet running and says how to play with it.
//! `demo --remove NAME` takes such a fleet down.

use anyhow::{Context, Result, bail, ensure};
use haulage_tests::fleet::{self, Fleet};
use haulage_tests::image;
use haulage_tests::load::{Counter, Writer, wait_for_server};
use haulage_tests::resp::{Answer, Client};
use haulage_tests::scenario::{only_on, run};
use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::Instant;

const CONTAINER: &str = "web-1";

/// Mebibytes of data in the Redis, and the keys of 1 KiB that makes.
const DATA: u32 = 256;
const KEYS: i64 = DATA as i64 * 1024;

/// Answers that each client must get between two steps.
const ENOUGH: u64 = 300;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match arguments.as_slice() {
        [] => demo(false),
        ["--keep"] => demo(true),
        ["--remove", name] => fleet::remove(name),
        _ => Err(anyhow::anyhow!("usage: demo [--keep | --remove NAME]")),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("demo: failed: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn demo(keep: bool) -> Result<()> {
    let started = Instant::now();
    let mut fleet = Fleet::start()?;
    println!("fleet {}: two Docker hosts, NATS at {}", fleet.name(), fleet.nats()?.address());
    println!("started in {:.1} s", started.elapsed().as_secs_f32());
    if let Err(e) = fleet.start_services().and_then(|()| there_and_back(&fleet)) {
        let logs = fleet.services().map(|services| services.logs(20)).unwrap_or_default();
        eprintln!("{logs}");
        return Err(e);
    }
    if keep {
        return leave(fleet);
    }
    fleet.stop()?;
    println!("everything removed; it took {:.1} s in all", started.elapsed().as_secs_f32());
    Ok(())
}

fn there_and_back(fleet: &Fleet) -> Result<()> {
    let server = run(fleet, 0, CONTAINER, 0, &["--restart", "unless-stopped", image::REDIS])?;
    wait_for_server(server)?;
    Client::connect(server)?.fill(DATA)?;
    println!("{CONTAINER} runs on host-a at {server} with {DATA} MiB of data");

    let counter = Counter::start(server, "count")?;
    let writer = Writer::start(server, "written")?;
    let in_use = || -> Result<()> {
        counter.progress(ENOUGH).context("the counting client")?;
        writer.progress(ENOUGH).context("the writing client")
    };
    in_use()?;
    println!("one client counts and checks every answer, another writes keys; neither ever reconnects");
    for (from, to) in [(0, 1), (1, 0)] {
        migrate(fleet, from, to)?;
        in_use()?;
        only_on(fleet, CONTAINER, to)?;
    }

    let counted = counter.stop()?;
    counted.check().context("the counting client")?;
    let (written, missing) = writer.stop()?;
    written.check().context("the writing client")?;
    ensure!(missing == 0, "{missing} of {} acknowledged writes are missing", written.answers);
    check_data(server)?;
    println!("\nboth clients kept their connection through both migrations, without an error:");
    println!("  counter  {} answers, all right; longest gap {:?}", counted.answers, counted.longest_gap);
    println!(
        "  writer   {} writes acknowledged, none missing; longest gap {:?}",
        written.answers, written.longest_gap
    );
    println!("  data     all {KEYS} keys there");
    Ok(())
}

fn migrate(fleet: &Fleet, from: usize, to: usize) -> Result<()> {
    let (from_name, to_name) = (fleet.host(from).name(), fleet.host(to).name());
    println!("\n$ haul migrate {CONTAINER} --from {from_name} --to {to_name}");
    let moved = fleet.migrate(CONTAINER, from, to)?;
    let shown = fleet.haul(&["show", &moved.id])?;
    print!("{}", shown.stdout);
    moved.committed()?;
    ensure!(shown.code == 0, "haul show {} failed: {}", moved.id, shown.stderr);
    Ok(())
}

/// Counts the keys that were there before the first migration.
fn check_data(server: SocketAddr) -> Result<()> {
    let mut client = Client::connect(server)?;
    let names: Vec<String> = (0..KEYS).map(|number| format!("fill:{number}")).collect();
    let mut found = 0;
    for part in names.chunks(1024) {
        let command: Vec<&[u8]> =
            [b"EXISTS".as_slice()].into_iter().chain(part.iter().map(String::as_bytes)).collect();
        match client.call(&command)? {
            Answer::Number(count) => found += count,
            other => bail!("EXISTS was answered with {other:?}"),
        }
    }
    ensure!(found == KEYS, "{} of {KEYS} keys are missing", KEYS - found);
    Ok(())
}

fn leave(fleet: Fleet) -> Result<()> {
    let binaries = fleet.binaries().display().to_string();
    println!("\nThe fleet keeps running. Try:");
    println!("  export HAUL_NATS={}", fleet.nats()?.url());
    println!("  {binaries}/haul hosts");
    println!("  {binaries}/haul migrate {CONTAINER} --to host-b");
    for host in fleet.hosts() {
        println!("  docker -H unix://{} ps", host.socket().display());
    }
    println!("  tail -f {}/*/*.log", fleet.directory().display());
    println!("Remove it with:\n  {binaries}/demo --remove {}", fleet.name());
    fleet.keep()
}
