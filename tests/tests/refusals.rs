//! What cannot be done is refused with a code and a remedy, and the container goes on untouched where it was.

use anyhow::{Context, Result, ensure};
use haulage_protocol::subject::EVENTS_FILTER;
use haulage_tests::cli::Moved;
use haulage_tests::fleet::Fleet;
use haulage_tests::image;
use haulage_tests::resp::Client;
use haulage_tests::scenario::{Redis, nothing_left_on, only_on, run, system};
use std::time::Duration;

/// Fails unless the migration was refused with one of these codes, a remedy and an exit code of failure.
fn refused(moved: &Moved, code: &str) -> Result<()> {
    ensure!(moved.answer.code != 0, "exit code 0 for a refusal: {:?}", moved.answer);
    ensure!(moved.code == code, "the code is {:?}, not {code:?}: {}", moved.code, moved.result);
    ensure!(!moved.remedy.is_empty(), "no remedy: {}", moved.result);
    Ok(())
}

#[test]
fn a_container_with_a_terminal_is_refused_and_untouched() -> Result<()> {
    system(&Fleet::builder(), |fleet| {
        run(
            fleet,
            0,
            "terminal",
            0,
            &["--tty", image::BUSYBOX, "sh", "-c", "while :; do date; sleep 1; done"],
        )?;
        let pid = fleet.host(0).init_pid("terminal")?;
        refused(&fleet.migrate("terminal", 0, 1)?, "tty")?;
        ensure!(fleet.host(0).init_pid("terminal")? == pid, "the container was restarted");
        // It was refused after it had been found, when it goes by its id.
        let id = fleet.host(0).docker(&["inspect", "--format", "{{.Id}}", "terminal"])?;
        refused(&fleet.migrate(&id, 0, 1)?, "tty")?;
        let listed = fleet.haul(&["ls"])?.stdout;
        ensure!(
            listed.matches(" terminal ").count() == 2 && !listed.contains(&id),
            "not by its name:\n{listed}"
        );
        only_on(fleet, "terminal", 0)?;
        fleet.hosts().iter().try_for_each(nothing_left_on)
    })
}

#[test]
fn mistakes_of_the_operator_are_told_by_code() -> Result<()> {
    system(&Fleet::builder(), |fleet| {
        let redis = Redis::start(fleet, 0, "web", 0, &[])?;
        refused(&fleet.migrate("nobody", 0, 1)?, "unknown_container")?;
        refused(&fleet.migrate("web", 0, 0)?, "same_host")?;
        refused(&fleet.migrate_named("web", "host-a", "host-z")?, "unknown_host")?;

        run(fleet, 1, "web", 1, &[image::BUSYBOX, "sleep", "1000"])?;
        refused(&fleet.migrate("web", 0, 1)?, "name_taken")?;
        ensure!(fleet.host(1).is_running("web")?, "the container that had the name is gone");

        redis.carries_on()?;
        redis.finish()?;
        fleet.hosts().iter().try_for_each(nothing_left_on)
    })
}

/// What the target has was made from what the container was.
#[test]
fn a_container_that_is_changed_on_the_way_is_refused_and_stays_as_it_is() -> Result<()> {
    const PATIENCE: Duration = Duration::from_secs(60);
    system(&Fleet::builder(), |fleet| {
        let redis = Redis::start(fleet, 0, "web", 0, &["--memory", "400m"])?;
        Client::connect(redis.server())?.fill(128)?;
        let source = fleet.host(0);
        let pid = source.init_pid("web")?;
        source.docker(&["network", "create", "extra"])?;
        let changes: [&[&str]; 3] = [
            &["update", "--memory", "500m", "--memory-swap", "1g", "web"],
            &["update", "--restart", "always", "web"],
            &["network", "connect", "extra", "web"],
        ];
        for change in changes {
            let said = || format!("docker {}", change.join(" "));
            let mut events = fleet.nats()?.subscribe(EVENTS_FILTER)?;
            let migration = fleet.start_migration("web", 0, 1)?;
            events.wait_for_phase("files", PATIENCE)?;
            source.docker(change)?;
            refused(&migration.wait(PATIENCE)?, "container_changed").with_context(said)?;
            redis.carries_on().with_context(said)?;
            ensure!(source.init_pid("web")? == pid, "{}: restarted", said());
            only_on(fleet, "web", 0).with_context(said)?;
        }
        let policy = source.docker(&["inspect", "--format", "{{.HostConfig.RestartPolicy.Name}}", "web"])?;
        ensure!(policy == "always", "the restart policy is {policy}");
        source.docker(&["network", "disconnect", "extra", "web"])?;
        fleet.migrate("web", 0, 1)?.committed()?;
        redis.carries_on()?;
        redis.finish()?;
        fleet.hosts().iter().try_for_each(nothing_left_on)
    })
}
