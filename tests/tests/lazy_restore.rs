//! The container runs on the target before it has its memory, and its page server dies, or the restorer that guards it.

use anyhow::{Context, Result, ensure};
use haulage_protocol::rpc::Service;
use haulage_protocol::subject::EVENTS_FILTER;
use haulage_tests::fleet::Fleet;
use haulage_tests::load::wait_for_server;
use haulage_tests::resp::Client;
use haulage_tests::scenario::{Redis, nothing_left_on, only_on, run, system};
use haulage_tests::wait;
use haulage_tests::{dirtier, image};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open, pidfd_send_signal};
use std::fs;
use std::time::Duration;

/// How long a phase may be in coming.
const PATIENCE: Duration = Duration::from_secs(30);

/// How long a migration may take that a death has disturbed.
const DISTURBED: Duration = Duration::from_secs(60);

/// So much memory that it is not in place when the test comes to know that the container runs.
const MEBIBYTES: u32 = 768;

/// The one page server of a fleet.
fn page_server(fleet: &Fleet) -> Result<Pid> {
    wait::until("a page server", PATIENCE, || {
        for entry in fs::read_dir("/proc")? {
            let dir = entry?.path();
            let is_one = fs::read_link(dir.join("exe")).is_ok_and(|exe| exe.ends_with("haul-page-server"))
                && fs::read_link(dir.join("cwd")).is_ok_and(|cwd| cwd.starts_with(fleet.directory()));
            if is_one {
                let name = dir.file_name().and_then(|name| name.to_str());
                return Ok(name.and_then(|name| name.parse().ok()).and_then(Pid::from_raw));
            }
        }
        Ok(None)
    })
}

/// Migrates the container `web` from the first host to the second, and kills the page server in `phase`: the code of the
/// fault.
fn kill_in(fleet: &Fleet, phase: &str) -> Result<String> {
    let mut events = fleet.nats()?.subscribe(EVENTS_FILTER)?;
    let migration = fleet.start_migration("web", 0, 1)?;
    events.wait_for_phase("settle", PATIENCE)?;
    let server = page_server(fleet)?;
    events.wait_for_phase(phase, PATIENCE)?;
    kill_process(server, Signal::KILL).context("it has done its work before the test could kill it")?;
    let moved = migration.wait(DISTURBED)?;
    ensure!(moved.outcome == "rolled_back", "{}", moved.result);
    only_on(fleet, "web", 0)?;
    for host in fleet.hosts() {
        nothing_left_on(host)?;
    }
    Ok(moved.code)
}

#[test]
fn a_page_server_that_dies_before_the_restore_costs_only_the_migration() -> Result<()> {
    system(&Fleet::builder(), |fleet| {
        let redis = Redis::start(fleet, 0, "web", 0, &[])?;
        let code = kill_in(fleet, "freeze")?;
        ensure!(code == "restore_failed", "{code}");
        redis.carries_on()?;
        redis.finish().map(drop)
    })
}

#[test]
fn a_page_server_that_dies_with_pages_missing_ends_the_copy_and_the_source_goes_on() -> Result<()> {
    system(&Fleet::builder(), |fleet| {
        // No client: what the target's copy has answered by then is lost with it.
        let server = run(fleet, 0, "web", 0, &[image::REDIS])?;
        wait_for_server(server)?;
        let mut client = Client::connect(server)?;
        client.fill(MEBIBYTES)?;
        let pid = fleet.host(0).init_pid("web")?;
        let code = kill_in(fleet, "verify")?;
        ensure!(code == "memory_lost", "{code}");
        ensure!(fleet.host(0).init_pid("web")? == pid, "the source was restarted");
        client.fill(1)
    })
}

/// In the restore it may be early or late; when all is in place nobody needs it any more. Whenever it is, one copy runs,
/// and it has all its memory.
#[test]
fn a_page_server_that_dies_at_any_other_moment_leaves_one_whole_copy() -> Result<()> {
    system(&Fleet::builder(), |fleet| {
        let mut at = 0;
        run(fleet, at, "memory", 0, &[image::DIRTIER, "dirtier", "64", "20"])?;
        for (phase, wait) in
            [("restore", 0), ("restore", 100), ("restore", 300), ("verify", 0), ("commit", 0)]
        {
            let to = 1 - at;
            let mut events = fleet.nats()?.subscribe(EVENTS_FILTER)?;
            let migration = fleet.start_migration("memory", at, to)?;
            events.wait_for_phase("settle", PATIENCE)?;
            let server = pidfd_open(page_server(fleet)?, PidfdFlags::empty())?;
            events.wait_for_phase(phase, PATIENCE)?;
            // Not for anything to happen, but to hit another moment.
            std::thread::sleep(Duration::from_millis(wait));
            let killed = pidfd_send_signal(&server, Signal::KILL);
            let moved = migration.wait(DISTURBED)?;
            println!("{phase} and {wait} ms: {killed:?}, {} {}", moved.outcome, moved.code);
            match moved.outcome.as_str() {
                "committed" => at = to,
                "rolled_back" => ensure!(
                    ["restore_failed", "memory_lost"].contains(&moved.code.as_str()),
                    "in {phase}: {}",
                    moved.result
                ),
                _ => anyhow::bail!("in {phase}: {}", moved.result),
            }
            only_on(fleet, "memory", at)?;
            let verdict = dirtier::verify(fleet.host(at), "memory")?;
            ensure!(verdict.bad == 0, "in {phase}: {verdict:?}");
            fleet.hosts().iter().try_for_each(nothing_left_on)?;
        }
        Ok(())
    })
}

#[test]
fn a_restorer_that_dies_while_pages_are_missing_costs_nothing() -> Result<()> {
    system(&Fleet::builder(), |fleet| {
        let redis = Redis::start(fleet, 0, "web", 0, &[])?;
        Client::connect(redis.server())?.fill(MEBIBYTES)?;
        let mut events = fleet.nats()?.subscribe(EVENTS_FILTER)?;
        let migration = fleet.start_migration("web", 0, 1)?;
        events.wait_for_phase("settle", PATIENCE)?;
        let server = page_server(fleet)?;
        events.wait_for_phase("verify", PATIENCE)?;
        kill_process(server, Signal::STOP).context("it has done its work before the test could stop it")?;
        fleet.restart_service(1, Service::Restorer)?;
        kill_process(server, Signal::CONT)?;
        let moved = migration.wait(DISTURBED)?;
        ensure!(moved.outcome == "committed", "{}", moved.result);
        redis.carries_on()?;
        only_on(fleet, "web", 1)?;
        for host in fleet.hosts() {
            nothing_left_on(host)?;
        }
        redis.finish().map(drop)
    })
}
