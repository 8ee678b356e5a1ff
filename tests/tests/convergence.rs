//! Transfer policies and downtimes that are kept, or refused, on a real container.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use haulage_tests::fleet::Fleet;
use haulage_tests::host::Host;
use haulage_tests::resp::Client;
use haulage_tests::scenario::{Redis, nothing_left_on, only_on, system};
use haulage_tests::wait;
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(120);

#[test]
fn a_redis_moves_whole_under_every_policy() -> Result<()> {
    system(&Fleet::builder(), |fleet| {
        let redis = Redis::start(fleet, 0, "web", 0, &[])?;
        Client::connect(redis.server())?.fill(64)?;
        let mut at = 0;
        for policy in ["phaul", "history:3,1", "all", "adaptive"] {
            let options = ["--policy", policy];
            let moved = fleet.start_migration_with("web", at, 1 - at, &options)?.wait(LIMIT)?;
            moved.committed().with_context(|| policy.to_owned())?;
            at = 1 - at;
            redis.carries_on().with_context(|| policy.to_owned())?;
            only_on(fleet, "web", at)?;
            ensure!(moved.result.pointer("/job/options/policy") == Some(&Value::from(policy)));
            let why = moved.result.pointer("/facts/convergence/why").and_then(Value::as_str);
            ensure!(
                if policy == "phaul" { why == Some("phaul") } else { why.is_some() },
                "{policy}: {why:?}"
            );
            let told = fleet.haul(&["show", &moved.id])?.stdout;
            ensure!(told.contains(&format!("policy {policy}")) && told.contains("withheld"), "{told}");
            println!("{told}");
        }
        println!("longest gap {:?}", redis.finish()?);
        Ok(())
    })
}

#[test]
fn a_downtime_that_cannot_be_kept_by_the_deadline_is_refused_and_nothing_is_touched() -> Result<()> {
    system(&Fleet::builder(), |fleet| {
        let redis = Redis::start(fleet, 0, "web", 0, &[])?;
        let options = ["--max-downtime", "1", "--deadline", "2"];
        let moved = fleet.start_migration_with("web", 0, 1, &options)?.wait(LIMIT)?;
        ensure!(moved.code == "cannot_converge" && !moved.remedy.is_empty(), "{}", moved.result);
        ensure!(moved.result.pointer("/facts/frozen") == Some(&Value::Null), "it was frozen");
        redis.carries_on()?;
        only_on(fleet, "web", 0)?;
        for host in fleet.hosts() {
            nothing_left_on(host)?;
        }
        // The deadline alone refuses nothing.
        fleet.start_migration_with("web", 0, 1, &["--deadline", "1"])?.wait(LIMIT)?.committed()?;
        redis.carries_on()?;
        redis.finish().map(drop)
    })
}

/// A downtime that leaves no time for memory, and a policy that withholds whatever was written lately: something always
/// remains of a server that is in use.
const SHORT: [&str; 5] = ["--auto-converge", "--max-downtime", "100", "--policy", "history:8,1"];

#[test]
fn a_container_that_is_slowed_down_has_its_limit_back_on_either_host() -> Result<()> {
    system(&Fleet::builder(), |fleet| {
        let redis = Redis::start(fleet, 0, "web", 0, &["--cpus", "1.5"])?;
        let before = quota(fleet.host(0))?;
        ensure!(before.starts_with("150000"), "not the limit that it was given: {before}");

        let id = "c0ffee00c0ffee00c0ffee00c0ffee00";
        let options = [&SHORT[..], &["--deadline", "60", "--id", id]].concat();
        let cancelled = fleet.start_migration_with("web", 0, 1, &options)?;
        wait::until("a container that is slowed down", LIMIT, || {
            let host = fleet.host(0);
            ensure!(host.is_running("web")?, "it is gone without having been slowed down");
            Ok((quota(host)? != before).then_some(()))
        })?;
        let answer = fleet.haul(&["cancel", id])?;
        ensure!(answer.code == 0, "{}", answer.stderr);
        let cancelled = cancelled.wait(LIMIT)?;
        ensure!(cancelled.code == "cancelled" && slowdowns(&cancelled.result) > 0, "{}", cancelled.result);
        ensure!(quota(fleet.host(0))? == before, "still slowed down: {}", quota(fleet.host(0))?);
        redis.carries_on()?;

        let moved = fleet.start_migration_with("web", 0, 1, &SHORT)?.wait(LIMIT)?;
        moved.committed()?;
        ensure!(slowdowns(&moved.result) > 0, "{}", moved.result);
        ensure!(quota(fleet.host(1))? == before, "slowed down on the target: {}", quota(fleet.host(1))?);
        redis.carries_on()?;
        fleet.hosts().iter().try_for_each(nothing_left_on)?;
        redis.finish().map(drop)
    })
}

#[test]
fn a_plan_touches_nothing_and_says_what_it_assumes() -> Result<()> {
    system(&Fleet::builder(), |fleet| {
        let redis = Redis::start(fleet, 0, "web", 0, &[])?;
        Client::connect(redis.server())?.fill(64)?;
        let to = fleet.host(1).name().to_owned();
        let plan = fleet.haul(&["plan", "web", "--to", &to, "--sample", "2", "--json"])?.json()?;
        let plans = plan["plans"].as_array().context("no plans")?;
        ensure!(plans.len() == 4, "{plan}");
        for plan in plans {
            let bytes = plan["prediction"]["bytes"].as_u64().context("no bytes")?;
            ensure!(bytes > 64 << 20, "less than was put into it: {plan}");
        }
        ensure!(plan["assumed"]["rate_measured"] == false, "{plan}");
        let told = fleet.haul(&["plan", "web", "--to", &to, "--sample", "1", "--rate", "100"])?;
        ensure!(
            told.code == 0 && told.stdout.contains("Assumed: a link of"),
            "{}{}",
            told.stdout,
            told.stderr
        );
        println!("{}", told.stdout);
        redis.carries_on()?;
        only_on(fleet, "web", 0)?;
        for host in fleet.hosts() {
            nothing_left_on(host)?;
        }
        redis.finish().map(drop)
    })
}

fn slowdowns(record: &Value) -> usize {
    record.pointer("/facts/slowdowns").and_then(Value::as_array).map_or(0, Vec::len)
}

/// The container's limit of processor time, as its cgroup has it.
fn quota(host: &Host) -> Result<String> {
    let cgroups = std::fs::read_to_string(format!("/proc/{}/cgroup", host.init_pid("web")?))?;
    let path = |controllers: &str| {
        let line = cgroups.lines().find(|line| line.split(':').nth(1) == Some(controllers))?;
        Some(line.splitn(3, ':').nth(2)?.trim_start_matches('/').to_owned())
    };
    let v1 = ["cpu", "cpu,cpuacct"].into_iter().find_map(path);
    let file = match v1 {
        Some(path) => PathBuf::from("/sys/fs/cgroup/cpu").join(path).join("cpu.cfs_quota_us"),
        None => PathBuf::from("/sys/fs/cgroup").join(path("").context("no cgroup")?).join("cpu.max"),
    };
    Ok(std::fs::read_to_string(&file).with_context(|| file.display().to_string())?.trim().to_owned())
}
