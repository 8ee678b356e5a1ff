//! Services and hosts die in the middle, hosts are cut off, operators change their minds: one running copy, nothing
//! lost, nothing left.

use anyhow::{Context, Result, bail, ensure};
use haulage_protocol::rpc::Service;
use haulage_protocol::subject::EVENTS_FILTER;
use haulage_tests::fleet::Fleet;
use haulage_tests::resp::Client;
use haulage_tests::scenario::{Redis, nothing_left_on, only_on, run, system};
use haulage_tests::{dirtier, image, wait};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde_json::Value;
use std::fs::File;
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::time::Duration;

/// How long a phase may be in coming.
const PATIENCE: Duration = Duration::from_secs(30);

/// How long a migration may take that a death has disturbed.
const DISTURBED: Duration = Duration::from_secs(60);

/// How long what a cut-off host has to do with may take: every try to reach it waits 10 s for an answer.
const CUT_OFF: Duration = Duration::from_secs(120);

#[test]
fn a_service_that_dies_and_comes_back_costs_at_most_the_migration() -> Result<()> {
    // (is it the source's, which, when). The dead are back at once, with nothing in their memory.
    const DEATHS: [(bool, Service, &str); 14] = [
        (false, Service::Restorer, "create"),
        (true, Service::Syncer, "files"),
        (false, Service::Syncer, "pre_copy"),
        (true, Service::PageShipper, "pre_copy"),
        (false, Service::Restorer, "prepare"),
        (false, Service::Restorer, "freeze"),
        (false, Service::PageShipper, "switch"),
        (true, Service::Checkpointer, "settle"),
        (true, Service::Checkpointer, "freeze"),
        (true, Service::Checkpointer, "switch"),
        (true, Service::Checkpointer, "restore"),
        (false, Service::Restorer, "restore"),
        (false, Service::Restorer, "verify"),
        (true, Service::Checkpointer, "retire"),
    ];
    system(&Fleet::builder(), |fleet| {
        let redis = Redis::start(fleet, 0, "web", 0, &["--restart", "unless-stopped"])?;
        Client::connect(redis.server())?.fill(16)?;
        let mut at = 0;
        for (of_source, service, phase) in DEATHS {
            let to = 1 - at;
            let victim = if of_source { at } else { to };
            let said =
                || format!("{service} of {} died in {phase}", if of_source { "source" } else { "target" });
            let mut events = fleet.nats()?.subscribe(EVENTS_FILTER)?;
            let migration = fleet.start_migration("web", at, to)?;
            events.wait_for_phase(phase, PATIENCE)?;
            fleet.restart_service(victim, service)?;
            let moved = migration.wait(DISTURBED).with_context(said)?;
            match moved.outcome.as_str() {
                "committed" => at = to,
                "rolled_back" => ensure!(!moved.code.is_empty(), "no code: {}", moved.result),
                other => bail!("{}: the outcome is {other:?}: {}", said(), moved.result),
            }
            println!("{}: {} {}", said(), moved.outcome, moved.code);
            fleet.services()?;
            redis.carries_on().with_context(said)?;
            only_on(fleet, "web", at).with_context(said)?;
            for host in fleet.hosts() {
                nothing_left_on(host).with_context(said)?;
            }
            let policy = fleet.host(at).inspect("web")?.pointer("/HostConfig/RestartPolicy/Name").cloned();
            ensure!(policy == Some(Value::from("unless-stopped")), "{}: restart policy {policy:?}", said());
        }
        redis.finish().map(drop)
    })
}

#[test]
fn a_target_that_vanishes_leaves_the_source_running_and_is_cleaned_when_it_returns() -> Result<()> {
    system(&Fleet::builder(), |fleet| {
        let redis = Redis::start(fleet, 0, "web", 0, &[])?;
        let mut events = fleet.nats()?.subscribe(EVENTS_FILTER)?;
        let migration = fleet.start_migration("web", 0, 1)?;
        events.wait_for_phase("track", PATIENCE)?;
        for service in Service::ALL {
            fleet.services()?.kill_service(1, service)?;
        }
        let moved = migration.wait(DISTURBED)?;
        ensure!(moved.outcome == "rolled_back", "not rolled back: {}", moved.result);
        ensure!(!moved.code.is_empty() && moved.answer.code != 0, "no code: {}", moved.result);
        redis.carries_on()?;
        ensure!(fleet.host(0).is_running("web")?);
        nothing_left_on(fleet.host(0))?;

        fleet.revive(1)?;
        wait::until("the removal of what was left on the target", DISTURBED, || {
            Ok((!fleet.host(1).has_container("web")?).then_some(()))
        })?;
        nothing_left_on(fleet.host(1))?;
        fleet.migrate("web", 0, 1)?.committed()?;
        redis.carries_on()?;
        redis.finish().map(drop)
    })
}

/// The target comes to life and nobody hears of it. The operator says so, the source goes on; when the target is back
/// its copy must be mute until it is gone.
#[test]
fn a_target_that_is_cut_off_in_the_restore_is_given_up_by_an_operator() -> Result<()> {
    system(&Fleet::builder(), |fleet| {
        let redis = Redis::start(fleet, 0, "web", 0, &["--restart", "unless-stopped"])?;
        let (source, target) = (0, 1);
        let pid = fleet.host(source).init_pid("web")?;
        let mut events = fleet.nats()?.subscribe(EVENTS_FILTER)?;
        let migration = fleet.start_migration("web", source, target)?;
        let first = events.next(PATIENCE)?;
        let id = first.get("migration").and_then(Value::as_str).context("an event without its migration")?;
        events.wait_for_phase("restore", PATIENCE)?;
        fleet.cut_off(target)?;

        wait::until("the container on the target", PATIENCE, || {
            Ok(fleet.host(target).is_running("web")?.then_some(()))
        })?;
        ensure!(fleet.host(source).is_frozen("web")?, "the source runs although the target may");
        let too_late = fleet.haul(&["cancel", id])?;
        ensure!(too_late.code != 0 && too_late.stderr.contains("not_cancellable"), "{too_late:?}");
        ensure!(fleet.host(source).is_frozen("web")?, "the source runs although the target may");

        // Nobody can tell it that it may go on, so it must not talk to anybody when the cable is back.
        wait::until("the silence of the target's copy", PATIENCE, || {
            Ok((!answers_itself(fleet.host(target).init_pid("web")?)?).then_some(()))
        })?;
        let buried = fleet.haul(&["cancel", id, "--target-is-dead"])?;
        ensure!(buried.code == 0, "not given up: {buried:?}");
        redis.carries_on().context("on the source, with the target cut off")?;
        ensure!(fleet.host(source).init_pid("web")? == pid, "the source was restarted");
        let moved = migration.wait(CUT_OFF)?;
        ensure!(moved.outcome == "rolled_back" && moved.code == "target_dead", "{}", moved.result);
        let left = moved.result.pointer("/leftovers").and_then(Value::as_array).map_or(0, Vec::len);
        ensure!(left > 0, "nothing is noted as left behind: {}", moved.result);

        fleet.reconnect(target)?;
        wait::until("the removal of what was left on the target", CUT_OFF, || {
            redis.carries_on().context("while the target comes back")?;
            Ok((!fleet.host(target).has_container("web")?).then_some(()))
        })?;
        redis.carries_on().context("after the target came back")?;
        only_on(fleet, "web", source)?;
        let policy = fleet.host(source).inspect("web")?.pointer("/HostConfig/RestartPolicy/Name").cloned();
        ensure!(policy == Some(Value::from("unless-stopped")), "restart policy {policy:?}");
        wait::until("two clean hosts", CUT_OFF, || {
            Ok(fleet.hosts().iter().all(|host| nothing_left_on(host).is_ok()).then_some(()))
        })?;
        redis.finish().map(drop)
    })
}

/// As above, but nobody gives it up: it is silenced meanwhile, and talks again when it is heard of.
#[test]
fn a_target_that_is_cut_off_in_the_restore_and_comes_back_has_the_container() -> Result<()> {
    system(&Fleet::builder(), |fleet| {
        let redis = Redis::start(fleet, 0, "web", 0, &[])?;
        let mut events = fleet.nats()?.subscribe(EVENTS_FILTER)?;
        let migration = fleet.start_migration("web", 0, 1)?;
        events.wait_for_phase("restore", PATIENCE)?;
        fleet.cut_off(1)?;
        wait::until("the silence of the target's copy", DISTURBED, || {
            let runs = fleet.host(1).is_running("web")?;
            Ok((runs && !answers_itself(fleet.host(1).init_pid("web")?)?).then_some(()))
        })?;
        // A restorer that was restarted knows that it is silent, and that it may talk again.
        fleet.restart_service(1, Service::Restorer)?;
        fleet.reconnect(1)?;
        migration.wait(CUT_OFF)?.committed()?;
        redis.carries_on()?;
        only_on(fleet, "web", 1)?;
        fleet.hosts().iter().try_for_each(nothing_left_on)?;
        redis.finish().map(drop)
    })
}

/// The last round cannot end: nobody takes the pages, and no connection breaks for a long time.
#[test]
fn a_container_is_not_left_frozen_when_the_target_is_cut_off_in_the_freeze() -> Result<()> {
    system(&Fleet::builder(), |fleet| {
        let redis = Redis::start(fleet, 0, "web", 0, &[])?;
        let pid = fleet.host(0).init_pid("web")?;
        let mut events = fleet.nats()?.subscribe(EVENTS_FILTER)?;
        let migration = fleet.start_migration_with("web", 0, 1, &["--max-frozen", "3"])?;
        events.wait_for_phase("freeze", PATIENCE)?;
        fleet.cut_off(1)?;
        wait::until("the freeze", PATIENCE, || Ok(fleet.host(0).is_frozen("web")?.then_some(())))?;
        redis.carries_on().context("after the freeze, with the target cut off")?;
        ensure!(fleet.host(0).init_pid("web")? == pid, "the source was restarted");
        fleet.reconnect(1)?;
        let moved = migration.wait(CUT_OFF)?;
        ensure!(moved.outcome == "rolled_back" && moved.code == "frozen_too_long", "{}", moved.result);
        ensure!(!moved.remedy.is_empty(), "no remedy: {}", moved.result);
        redis.carries_on()?;
        wait::until("the removal of what was left on the target", CUT_OFF, || {
            Ok((!fleet.host(1).has_container("web")?).then_some(()))
        })?;
        fleet.hosts().iter().try_for_each(nothing_left_on)?;
        fleet.migrate("web", 0, 1)?.committed()?;
        redis.finish().map(drop)
    })
}

/// Whether a Redis answers in its own network namespace, where no cable is needed.
fn answers_itself(pid: u32) -> Result<bool> {
    let namespace = File::open(format!("/proc/{pid}/ns/net"))?;
    let look = std::thread::spawn(move || -> Result<bool> {
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
        Ok(TcpStream::connect_timeout(&([127, 0, 0, 1], 6379).into(), Duration::from_secs(1)).is_ok())
    });
    look.join().ok().context("the look into a namespace panicked")?
}

#[test]
fn two_coordinators_share_the_work_and_a_job_submitted_twice_runs_once() -> Result<()> {
    system(&Fleet::builder(), |fleet| {
        fleet.add_coordinator(&[])?;
        let names = ["web-0", "web-1", "web-2"];
        let start = |(index, name): (u8, &&str)| Redis::start(fleet, 0, name, index, &["--rm"]);
        let servers: Vec<Redis> = (0..).zip(&names).map(start).collect::<Result<_>>()?;
        let moves: Vec<_> =
            names.iter().map(|name| fleet.start_migration(name, 0, 1)).collect::<Result<_>>()?;
        for (name, migration) in names.iter().zip(moves) {
            migration.wait(DISTURBED)?.committed()?;
            only_on(fleet, name, 1)?;
        }
        let host_b = fleet.host(1).name().to_owned();
        let host_a = fleet.host(0).name().to_owned();
        let back = ["migrate", "web-0", "--from", &host_b, "--to", &host_a, "--id", "same-id", "--json"];
        let (first, second) = (fleet.haul(&back)?, fleet.haul(&back)?);
        ensure!(first.code == 0 && second.code == 0, "{first:?} {second:?}");
        ensure!(first.json()?.get("began") == second.json()?.get("began"), "two migrations of one id");
        let automatic = fleet.host(0).inspect("web-0")?.pointer("/HostConfig/AutoRemove").cloned();
        ensure!(automatic == Some(Value::Bool(true)), "--rm was lost: {automatic:?}");
        for redis in servers {
            redis.carries_on()?;
            redis.finish()?;
        }
        ensure!(records(fleet)? == 4, "records of finished migrations are missing");
        fleet.add_coordinator(&["--keep-records", "0s"])?;
        wait::until("the end of all records", DISTURBED, || Ok((records(fleet)? == 0).then_some(())))?;
        fleet.hosts().iter().try_for_each(nothing_left_on)
    })
}

/// How many migrations `haul ls` knows.
fn records(fleet: &Fleet) -> Result<usize> {
    fleet.haul(&["ls", "--json"])?.json()?.as_array().map(Vec::len).context("no list")
}

#[test]
fn a_cancelled_migration_is_rolled_back() -> Result<()> {
    system(&Fleet::builder(), |fleet| {
        let redis = Redis::start(fleet, 0, "web", 0, &[])?;
        Client::connect(redis.server())?.fill(128)?;
        let mut events = fleet.nats()?.subscribe(EVENTS_FILTER)?;
        let migration = fleet.start_migration("web", 0, 1)?;
        let first = events.next(PATIENCE)?;
        let id = first.get("migration").and_then(Value::as_str).context("an event without its migration")?;
        events.wait_for_phase("files", PATIENCE)?;
        let cancelled = fleet.haul(&["cancel", id])?;
        ensure!(cancelled.code == 0, "not cancelled: {cancelled:?}");
        let moved = migration.wait(DISTURBED)?;
        ensure!(moved.outcome == "rolled_back" && moved.code == "cancelled", "{}", moved.result);
        let late = fleet.haul(&["cancel", id])?;
        ensure!(late.code != 0 && late.stderr.contains("remedy"), "a late cancel: {late:?}");
        redis.carries_on()?;
        only_on(fleet, "web", 0)?;
        fleet.hosts().iter().try_for_each(nothing_left_on)?;
        redis.finish().map(drop)
    })
}

/// What a freeze needs is at hand by then, and the container is untouched. A cancellation that comes too late changes
/// nothing.
#[test]
fn a_migration_that_is_cancelled_just_before_the_freeze_leaves_nothing() -> Result<()> {
    system(&Fleet::builder(), |fleet| {
        let mut at = 0;
        run(fleet, at, "memory", 0, &["--restart", "unless-stopped", image::DIRTIER, "dirtier", "64", "20"])?;
        for _ in 0..3 {
            let to = 1 - at;
            let mut events = fleet.nats()?.subscribe(EVENTS_FILTER)?;
            let migration = fleet.start_migration("memory", at, to)?;
            let first = events.next(PATIENCE)?;
            let id =
                first.get("migration").and_then(Value::as_str).context("an event without its migration")?;
            events.wait_for_phase("settle", PATIENCE)?;
            let cancelled = fleet.haul(&["cancel", id])?.code == 0;
            let moved = migration.wait(DISTURBED)?;
            println!("cancelled: {cancelled}, {} {}", moved.outcome, moved.code);
            match moved.outcome.as_str() {
                "committed" if !cancelled => at = to,
                "rolled_back" if cancelled => ensure!(moved.code == "cancelled", "{}", moved.result),
                _ => bail!("cancelled: {cancelled}: {}", moved.result),
            }
            only_on(fleet, "memory", at)?;
            let verdict = dirtier::verify(fleet.host(at), "memory")?;
            ensure!(verdict.bad == 0, "{verdict:?}");
            fleet.hosts().iter().try_for_each(nothing_left_on)?;
        }
        Ok(())
    })
}

#[test]
fn nobody_can_start_the_container_on_the_target_before_it_has_arrived() -> Result<()> {
    system(&Fleet::builder(), |fleet| {
        let redis = Redis::start(fleet, 0, "web", 0, &[])?;
        Client::connect(redis.server())?.fill(128)?;
        let mut events = fleet.nats()?.subscribe(EVENTS_FILTER)?;
        let migration = fleet.start_migration("web", 0, 1)?;
        events.wait_for_phase("open", PATIENCE)?;
        let started = fleet.host(1).docker(&["start", "web"]);
        ensure!(
            started.is_err(),
            "an empty container was started beside the one that is coming: {started:?}"
        );
        let moved = migration.wait(DISTURBED)?;
        redis.carries_on().with_context(|| format!("after {}", moved.result))?;
        only_on(fleet, "web", usize::from(moved.outcome == "committed"))?;
        fleet.hosts().iter().try_for_each(nothing_left_on)?;
        redis.finish().map(drop)
    })
}
