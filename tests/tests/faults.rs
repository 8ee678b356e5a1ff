//! Services and hosts die in the middle, operators change their minds, strangers talk nonsense: one running copy,
//! nothing lost, nothing left.

use anyhow::{Context, Result, bail, ensure};
use haulage_protocol::rpc::Service;
use haulage_protocol::subject::{EVENTS_FILTER, JOBS_FILTER};
use haulage_tests::fleet::Fleet;
use haulage_tests::resp::Client;
use haulage_tests::scenario::{Redis, nothing_left_on, only_on, system};
use haulage_tests::wait;
use serde_json::Value;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

/// How long a phase may be in coming.
const PATIENCE: Duration = Duration::from_secs(30);

/// How long a migration may take that a death has disturbed.
const DISTURBED: Duration = Duration::from_secs(60);

#[test]
fn a_service_that_dies_and_comes_back_costs_at_most_the_migration() -> Result<()> {
    // (is it the source's, which, when). The dead are back at once, with nothing in their memory.
    const DEATHS: [(bool, Service, &str); 10] = [
        (false, Service::Restorer, "create"),
        (true, Service::Syncer, "files"),
        (false, Service::Syncer, "pre_copy"),
        (true, Service::PageShipper, "pre_copy"),
        (false, Service::PageShipper, "switch"),
        (true, Service::Checkpointer, "freeze"),
        (true, Service::Checkpointer, "switch"),
        (true, Service::Checkpointer, "restore"),
        (false, Service::Restorer, "restore"),
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

#[test]
fn two_coordinators_share_the_work_and_a_job_submitted_twice_runs_once() -> Result<()> {
    system(&Fleet::builder(), |fleet| {
        fleet.add_coordinator()?;
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
        fleet.hosts().iter().try_for_each(nothing_left_on)
    })
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

#[test]
fn strangers_and_damage_are_refused_and_harm_nothing() -> Result<()> {
    system(&Fleet::builder().hosts(3).without_images(2), |fleet| {
        let redis = Redis::start(fleet, 0, "web", 0, &[])?;
        for nonsense in [&b"{}"[..], b"{\"version\":99}", b"\xff\x00", b""] {
            fleet.nats()?.publish(JOBS_FILTER, nonsense)?;
        }
        let hosts = fleet.haul(&["hosts", "--json"])?.json()?;
        for (host, services) in hosts.as_object().context("hosts")? {
            let facts = services.as_array().into_iter().flatten().filter_map(|service| service.get("facts"));
            for fact in facts.flat_map(|facts| [facts.get("pages"), facts.get("files")]).flatten() {
                let address = fact.as_str().context("a bulk address")?;
                babble_at(address).with_context(|| format!("{host} at {address}"))?;
            }
        }
        fleet.migrate("web", 0, 1)?.committed()?;
        redis.carries_on()?;

        damage_the_largest_object(&fleet.directory().join("bucket"), fleet, &redis)?;
        redis.carries_on()?;
        only_on(fleet, "web", 1)?;
        fleet.hosts().iter().try_for_each(nothing_left_on)?;
        redis.finish().map(drop)
    })
}

/// Garbage, and a beginning that never goes on: both connections are closed by the listener, which lives.
fn babble_at(address: &str) -> Result<()> {
    for nonsense in [&b"GET / HTTP/1.1\r\n\r\n and so on, longer than any header could be"[..], b"HAUL"] {
        let mut stream = TcpStream::connect(address)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(nonsense)?;
        let mut answer = Vec::new();
        // A reset is as good an end as a close.
        if let Err(error) = stream.read_to_end(&mut answer) {
            ensure!(error.kind() == std::io::ErrorKind::ConnectionReset, "not closed: {error}");
        }
    }
    Ok(())
}

/// The image reaches a host that lacks it through the bucket; an object that was changed there must not.
fn damage_the_largest_object(bucket: &std::path::Path, fleet: &Fleet, redis: &Redis) -> Result<()> {
    // Puts the image into the bucket: nothing else has needed it there yet.
    let first = fleet.migrate("web", 1, 2)?;
    first.committed()?;
    redis.carries_on()?;
    let back = fleet.migrate("web", 2, 1)?;
    back.committed()?;
    fleet.host(2).docker(&["image", "rm", "--force", haulage_tests::image::REDIS])?;
    let mut objects: Vec<_> = walk(&bucket.join("sha256"))?;
    objects.sort_by_key(|(_, size)| *size);
    let (largest, _) = objects.pop().context("an empty bucket")?;
    let mut content = std::fs::read(&largest)?;
    let middle = content.len() / 2;
    *content.get_mut(middle).context("an empty object")? ^= 1;
    std::fs::write(&largest, content)?;
    let moved = fleet.migrate("web", 1, 2)?;
    ensure!(moved.code == "digest_mismatch" && !moved.remedy.is_empty(), "not refused: {}", moved.result);
    Ok(())
}

fn walk(dir: &std::path::Path) -> Result<Vec<(std::path::PathBuf, u64)>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        if metadata.is_dir() {
            found.extend(walk(&entry.path())?);
        } else {
            found.push((entry.path(), metadata.len()));
        }
    }
    Ok(found)
}
