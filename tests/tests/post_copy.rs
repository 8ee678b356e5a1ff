//! A container that writes faster than its link runs on the target before it has its memory: all of it arrives, and a
//! source that is lost before costs what the copy has done, and nothing else.

use anyhow::{Context, Result, ensure};
use haulage_protocol::rpc::Service;
use haulage_protocol::subject::EVENTS_FILTER;
use haulage_tests::cli::Moved;
use haulage_tests::fleet::Fleet;
use haulage_tests::load::wait_for_server;
use haulage_tests::resp::Client;
use haulage_tests::scenario::{nothing_left_on, only_on, run, system};
use haulage_tests::{dirtier, image, wait};
use serde_json::Value;
use std::time::{Duration, Instant};

/// How long a phase may be in coming.
const PATIENCE: Duration = Duration::from_secs(60);

/// How long a migration may take over a link like this.
const SLOW: Duration = Duration::from_secs(120);

/// How long the target is cut off: longer than a round trip, shorter than it takes for a connection to count as lost.
const OUTAGE: Duration = Duration::from_secs(3);

fn number(moved: &Moved, pointer: &str) -> u64 {
    moved.result.pointer(pointer).and_then(Value::as_u64).unwrap_or_default()
}

#[test]
fn a_container_that_outruns_its_link_gets_its_memory_on_the_target() -> Result<()> {
    system(&Fleet::builder(), |fleet| {
        run(fleet, 0, "memory", 0, &[image::DIRTIER, "dirtier", "16", "200"])?;
        let before = dirtier::verify(fleet.host(0), "memory")?;
        ensure!(before.bad == 0, "bad before any move: {before:?}");
        let mut events = fleet.nats()?.subscribe(EVENTS_FILTER)?;
        let options = ["--max-downtime", "300", "--deadline", "2", "--post-copy"];
        let options = [&options[..], &["--bandwidth", "20MB/s", "--compress", "none"]].concat();
        let migration = fleet.start_migration_with("memory", 0, 1, &options)?;
        events.wait_for_phase("verify", PATIENCE)?;
        ensure!(fleet.host(0).is_frozen("memory")?, "the source runs although it owes memory");
        fleet.cut_off(1)?;
        let cut = Instant::now();
        wait::until("the end of the outage", SLOW, || Ok((cut.elapsed() >= OUTAGE).then_some(())))?;
        fleet.reconnect(1)?;
        let moved = migration.wait(SLOW)?;
        moved.committed()?;
        let told = fleet.haul(&["show", &moved.id])?.stdout;
        println!("{told}");
        only_on(fleet, "memory", 1)?;
        let mut last = before;
        for _ in 0..2 {
            let next = dirtier::verify(fleet.host(1), "memory").context("after the move")?;
            ensure!(next.bad == 0, "{next:?}:\n{}", fleet.host(1).docker(&["logs", "memory"])?);
            ensure!(next.operations > last.operations && next.number > last.number, "{last:?} {next:?}");
            last = next;
        }
        ensure!(
            moved.result.pointer("/facts/convergence/post_copy") == Some(&Value::Bool(true)),
            "it did not outrun its link: {}",
            moved.result
        );
        let owed = number(&moved, "/facts/last_round/owed");
        let (pulled, pushed) =
            (number(&moved, "/facts/filled/pulled"), number(&moved, "/facts/filled/pushed"));
        ensure!(owed > 0 && pulled > 0 && pushed > 0 && pulled + pushed <= owed, "{owed} {pulled} {pushed}");
        ensure!(told.contains("owed at the freeze") && told.contains("on demand"), "{told}");
        fleet.hosts().iter().try_for_each(nothing_left_on)
    })
}

#[test]
fn a_source_that_dies_while_it_owes_memory_ends_the_copy_and_the_source_goes_on() -> Result<()> {
    system(&Fleet::builder(), |fleet| {
        // No client meanwhile: what the target's copy answers is lost with it.
        let server = run(fleet, 0, "web", 0, &[image::REDIS])?;
        wait_for_server(server)?;
        let mut client = Client::connect(server)?;
        client.fill(96)?;
        let pid = fleet.host(0).init_pid("web")?;
        let mut events = fleet.nats()?.subscribe(EVENTS_FILTER)?;
        let options = ["--max-downtime", "300", "--deadline", "1", "--post-copy"];
        let options = [&options[..], &["--bandwidth", "8MB/s", "--compress", "none"]].concat();
        let migration = fleet.start_migration_with("web", 0, 1, &options)?;
        events.wait_for_phase("verify", PATIENCE)?;
        fleet.restart_service(0, Service::PageShipper)?;
        let moved = migration.wait(SLOW)?;
        ensure!(moved.outcome == "rolled_back" && moved.code == "post_copy_failed", "{}", moved.result);
        ensure!(!moved.remedy.is_empty(), "{}", moved.result);
        ensure!(number(&moved, "/facts/last_round/owed") > 0, "{}", moved.result);
        ensure!(fleet.host(0).init_pid("web")? == pid, "the source was restarted");
        client.fill(1)?;
        only_on(fleet, "web", 0)?;
        fleet.hosts().iter().try_for_each(nothing_left_on)?;
        fleet.migrate("web", 0, 1)?.committed()?;
        only_on(fleet, "web", 1)
    })
}
