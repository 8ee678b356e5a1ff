//! A restore that fails on the target: the source goes on with its connections, and the target is clean.

use anyhow::{Context, Result, ensure};
use haulage_protocol::subject::EVENTS_FILTER;
use haulage_tests::fleet::Fleet;
use haulage_tests::scenario::{Redis, break_restores_on, nothing_left_on, only_on, system};
use serde_json::Value;
use std::time::Duration;

#[test]
fn a_failing_restore_leaves_the_source_as_it_was() -> Result<()> {
    system(&Fleet::builder(), |fleet| {
        let redis = Redis::start(fleet, 0, "web", 0, &["--restart", "unless-stopped"])?;
        let (source, target) = (fleet.host(0), fleet.host(1));
        let pid = source.init_pid("web")?;
        let policy = |inspected: Value| inspected.pointer("/HostConfig/RestartPolicy").cloned();
        let before = policy(source.inspect("web")?);
        ensure!(before.is_some(), "no restart policy to compare");
        break_restores_on(target)?;
        let mut events = fleet.nats()?.subscribe(EVENTS_FILTER)?;

        let moved = fleet.migrate("web", 0, 1)?;
        ensure!(
            moved.outcome == "rolled_back" && moved.answer.code != 0,
            "not rolled back: {}",
            moved.result
        );
        ensure!(!moved.code.is_empty() && !moved.remedy.is_empty(), "no code or remedy: {}", moved.result);
        let mut phases = Vec::new();
        while let Ok(event) = events.next(Duration::from_millis(500)) {
            phases.extend(event.pointer("/what/phase").and_then(Value::as_str).map(str::to_owned));
        }
        ensure!(phases.iter().any(|phase| phase == "restore"), "it did not come to the restore: {phases:?}");

        redis.carries_on().context("after the failed restore")?;
        only_on(fleet, "web", 0)?;
        ensure!(source.init_pid("web")? == pid, "the source was restarted");
        ensure!(policy(source.inspect("web")?) == before, "the restart policy has changed");
        for host in fleet.hosts() {
            nothing_left_on(host)?;
        }
        redis.finish().map(drop)
    })
}
