//! Transfer policies and downtimes that are kept, or refused, on a real container.

use std::path::PathBuf;
use std::process::Stdio;
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
        for (policy, moves) in [("phaul", 0), ("history:3,1", 0), ("all", 1), ("adaptive", 1)] {
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
            // Of moves the other way nothing is taken over.
            let fixed = moved.result.pointer("/facts/fixed/moves").and_then(Value::as_u64).unwrap_or(0);
            ensure!(fixed == moves, "{policy}: {}", moved.result);
            let told = fleet.haul(&["show", &moved.id])?.stdout;
            let origin = if moves > 0 { "by the last move between these hosts" } else { "assumed" };
            ensure!(told.contains(origin), "{told}");
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
        // In the first round already, whose end nobody waits for.
        Client::connect(redis.server())?.fill(64)?;
        for policy in ["all", "phaul", "adaptive"] {
            let limits =
                ["--max-downtime", "500", "--deadline", "2", "--bandwidth", "4MB/s", "--compress", "none"];
            let options = [&limits[..], &["--policy", policy]].concat();
            let moved = fleet.start_migration_with("web", 0, 1, &options)?.wait(LIMIT)?;
            ensure!(moved.code == "cannot_converge", "{policy}: {}", moved.result);
            let rounds = moved.result.pointer("/facts/rounds").and_then(Value::as_array);
            let sent = rounds
                .into_iter()
                .flatten()
                .filter_map(|round| Some(round["sent"].as_u64()? - round["zero"].as_u64()?));
            let sent: u64 = sent.sum();
            ensure!((1..4 << 10).contains(&sent), "{policy}: {sent} pages: {}", moved.result);
            redis.carries_on()?;
            only_on(fleet, "web", 0)?;
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
        ensure!(plan["assumed"]["rate_measured"] == true, "{plan}");
        ensure!(plan["assumed"]["probe"]["sent"].as_u64() <= Some(64 << 20), "{plan}");
        ensure!(plan["assumed"]["pages_per_second"].as_u64() > Some(1000), "{plan}");
        let told = fleet.haul(&["plan", "web", "--to", &to, "--sample", "1", "--rate", "100"])?;
        ensure!(
            told.code == 0 && told.stdout.contains("(rate given)") && told.stdout.contains("assumed"),
            "{}{}",
            told.stdout,
            told.stderr
        );
        println!("{}", told.stdout);
        let measured = fleet.haul(&["plan", "web", "--to", &to, "--sample", "1"])?;
        ensure!(measured.stdout.contains("(rate measured, with "), "{}{}", measured.stdout, measured.stderr);
        redis.carries_on()?;
        only_on(fleet, "web", 0)?;
        a_plan_gives_way_to_a_migration(fleet, &redis)?;
        for host in fleet.hosts() {
            nothing_left_on(host)?;
        }
        redis.finish().map(drop)
    })
}

/// A plan on a container that is being moved is refused; one that looks at it when a migration begins is given up. The
/// migration tracks all of its writes, keeps its rounds apart, and leaves a trace.
fn a_plan_gives_way_to_a_migration(fleet: &Fleet, redis: &Redis) -> Result<()> {
    let to = fleet.host(1).name().to_owned();
    let mut plan = fleet.haul_command()?;
    plan.args(["plan", "web", "--to", &to, "--sample", "30"]);
    let plan = plan.stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
    let trace = fleet.directory().join("trace.json");
    let trace_file = trace.to_str().context("no text")?;
    // Five rounds that leave no less than others, a second apart.
    let id = "c0ffee00c0ffee00c0ffee00c0ffee01";
    let options = ["--max-downtime", "1", "--round-interval", "1000", "--trace", trace_file, "--id", id];
    let moving = fleet.start_migration_with("web", 0, 1, &options)?;
    let rounds =
        |record: &Value| record.pointer("/facts/rounds").and_then(Value::as_array).map_or(0, Vec::len);
    wait::until("a round", LIMIT, || {
        let shown = fleet.haul(&["show", id, "--json"])?;
        Ok((shown.code == 0 && rounds(&shown.json()?) > 0).then_some(()))
    })?;
    let refused = fleet.haul(&["plan", "web", "--to", &to, "--sample", "1"])?;
    ensure!(refused.code == 1 && refused.stderr.contains("[lease_held]"), "{}", refused.stderr);
    let moved = moving.wait(LIMIT)?;
    moved.committed()?;
    ensure!(
        moved.result.pointer("/facts/tracking/untracked") == Some(&Value::Array(Vec::new())),
        "{}",
        moved.result
    );
    let given_up = plan.wait_with_output()?;
    let said = String::from_utf8_lossy(&given_up.stderr).into_owned();
    ensure!(given_up.status.code() == Some(1) && said.contains("[lease_held]"), "{said}");
    redis.carries_on()?;
    only_on(fleet, "web", 1)?;

    let phases = moved.result.pointer("/phases").and_then(Value::as_array).context("no phases")?;
    let prepared = phases.iter().find(|phase| phase[0] == "prepare").and_then(|phase| phase[1].as_u64());
    let spans = moved.result.pointer("/spans").and_then(Value::as_array).context("no spans")?;
    let paced = spans.iter().filter(|span| span["from"].as_u64() < prepared);
    let rounds = paced.filter(|span| span.pointer("/effect/run_round").is_some());
    let took = moved.result.pointer("/facts/rounds").and_then(Value::as_array).context("no rounds")?;
    let began: Option<Vec<u64>> = rounds
        .zip(took)
        .map(|(span, round)| span["to"].as_u64()?.checked_sub(round["took"].as_u64()?))
        .collect();
    let began = began.context("rounds without times")?;
    ensure!(began.len() >= 5, "no rounds to keep apart: {began:?}");
    let close = began.iter().zip(began.iter().skip(1)).filter(|(one, next)| *next - *one < 999_000).count();
    ensure!(close == 0, "rounds less than a second apart: {began:?}");

    let events: Vec<Value> = serde_json::from_str(&std::fs::read_to_string(&trace)?)?;
    for name in ["pre_copy", "round 0", "freeze", "dump", "join", "start", "fill"] {
        ensure!(
            events.iter().any(|event| event["name"] == name && event["ph"] == "X"),
            "no {name} in the trace"
        );
    }
    Ok(())
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
