//! The coordinator is killed in every phase; another carries the migration on or undoes it.

use anyhow::{Context, Result, bail};
use haulage_protocol::subject::EVENTS_FILTER;
use haulage_tests::fleet::Fleet;
use haulage_tests::scenario::{Redis, nothing_left_on, only_on, system};
use std::time::Duration;

/// The phases in which a coordinator can die, in their order. Those of undo occur after a death in some of these.
const PHASES: [&str; 20] = [
    // First, because it is gone through only while the target lacks the image.
    "image", "locate", "inspect", "check", "reserve", "create", "open", "files", "track", "pre_copy",
    "prepare", "settle", "freeze", "switch", "ship", "restore", "verify", "commit", "retire", "clean",
];

/// How long a phase may be in coming.
const PATIENCE: Duration = Duration::from_secs(30);

/// How long another coordinator may take to notice the death and bring the migration to an end.
const TAKE_OVER: Duration = Duration::from_secs(60);

#[test]
fn a_coordinator_killed_in_any_phase_is_replaced() -> Result<()> {
    system(&Fleet::builder().without_images(1), |fleet| {
        let redis = Redis::start(fleet, 0, "web", 0, &[])?;
        let (mut at, mut coordinator) = (0, 0);
        for phase in PHASES {
            let to = 1 - at;
            let mut events = fleet.nats()?.subscribe(EVENTS_FILTER)?;
            let migration = fleet.start_migration("web", at, to)?;
            events.wait_for_phase(phase, PATIENCE)?;
            coordinator = fleet.replace_coordinator(coordinator)?;
            let moved = migration.wait(TAKE_OVER).with_context(|| format!("killed in {phase}"))?;
            match moved.outcome.as_str() {
                "committed" => at = to,
                "rolled_back" => {}
                other => bail!("killed in {phase}: the outcome is {other:?}: {}", moved.result),
            }
            println!("killed in {phase}: {}", moved.outcome);
            redis.carries_on().with_context(|| format!("killed in {phase}"))?;
            only_on(fleet, "web", at).with_context(|| format!("killed in {phase}"))?;
            for host in fleet.hosts() {
                nothing_left_on(host).with_context(|| format!("killed in {phase}"))?;
            }
        }
        redis.finish().map(drop)
    })
}
