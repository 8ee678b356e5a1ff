//! Containers that are hard to move arrive whole, and those that cannot be moved are refused before anything is touched.

use anyhow::{Context, Result, ensure};
use haulage_protocol::subject::EVENTS_FILTER;
use haulage_tests::fleet::Fleet;
use haulage_tests::resp::Client;
use haulage_tests::scenario::{Redis, nothing_left_on, only_on, run, system};
use haulage_tests::{dirtier, image, process};
use std::path::Path;
use std::time::Duration;

/// How long a phase may be in coming.
const PATIENCE: Duration = Duration::from_secs(30);

/// How long a migration may take that is disturbed.
const DISTURBED: Duration = Duration::from_secs(60);

/// Docker's own profile allows none of what the programs ask for.
const UNCONFINED: [&str; 2] = ["--security-opt", "seccomp=unconfined"];

/// Whether containers are frozen by cgroup version 1, which lets nobody trace a stopped process.
fn frozen_by_v1() -> bool {
    Path::new("/sys/fs/cgroup/freezer").exists()
}

/// Runs the program in a container of the same name.
fn hardship(fleet: &Fleet, kind: &str) -> Result<()> {
    run(fleet, 0, kind, 0, &[&UNCONFINED[..], &[image::DIRTIER, "hardship", kind]].concat())?;
    let verdict = dirtier::verify(fleet.host(0), kind)?;
    ensure!(verdict.bad == 0, "{kind}: bad before any move: {verdict:?}");
    Ok(())
}

#[test]
fn what_is_hard_to_move_arrives_whole() -> Result<()> {
    system(&Fleet::builder(), |fleet| {
        // Where the freeze finds a churn is another moment of its life every time.
        let memfds = ["sealed", "locked", "record_locked", "owned", "described"];
        let mut kinds =
            [&memfds[..], &["sparse", "guard", "churn", "churn", "churn", "direct", "crowd"]].concat();
        if !frozen_by_v1() {
            kinds.push("stopped");
        }
        for kind in kinds {
            hardship(fleet, kind)?;
            let moved = fleet.migrate(kind, 0, 1)?;
            moved.committed().with_context(|| kind.to_owned())?;
            println!("{kind}: {}", fleet.haul(&["show", &moved.id])?.stdout);
            only_on(fleet, kind, 1)?;
            for _ in 0..2 {
                let verdict = dirtier::verify(fleet.host(1), kind).with_context(|| kind.to_owned())?;
                ensure!(verdict.bad == 0, "{kind}: {verdict:?}: {}", fleet.host(1).docker(&["logs", kind])?);
                ensure!(verdict.number > 1, "{kind}: it was started anew: {verdict:?}");
            }
            fleet.host(1).docker(&["rm", "--force", kind])?;
        }
        fleet.hosts().iter().try_for_each(nothing_left_on)
    })
}

#[test]
fn what_cannot_be_dumped_is_refused_before_anything_is_touched() -> Result<()> {
    system(&Fleet::builder(), |fleet| {
        let mut kinds = vec!["userfaultfd", "io_uring", "traced", "leader_exited"];
        if frozen_by_v1() {
            kinds.push("stopped");
        }
        for kind in kinds {
            hardship(fleet, kind)?;
            let pid = fleet.host(0).init_pid(kind)?;
            let mut events = fleet.nats()?.subscribe(EVENTS_FILTER)?;
            let moved = fleet.migrate(kind, 0, 1)?;
            ensure!(moved.code == kind && !moved.remedy.is_empty(), "{kind}: {}", moved.result);
            ensure!(events.wait_for_phase("reserve", Duration::ZERO).is_err(), "{kind}: it went on");
            ensure!(fleet.host(0).init_pid(kind)? == pid, "{kind}: it was restarted");
            ensure!(dirtier::verify(fleet.host(0), kind)?.bad == 0, "{kind}");
            only_on(fleet, kind, 0)?;
            fleet.host(0).docker(&["rm", "--force", kind])?;
        }
        fleet.hosts().iter().try_for_each(nothing_left_on)
    })
}

/// CRIU takes such locks before it maps the file and loses them by that; nobody is to find them free for a moment.
#[test]
fn locks_of_a_process_on_files_arrive() -> Result<()> {
    system(&Fleet::builder(), |fleet| {
        for kind in ["unmapped_locked", "file_locked"] {
            hardship(fleet, kind)?;
            // What was taken again is there for the next dump.
            for (from, to) in [(0, 1), (1, 0)] {
                fleet.migrate(kind, from, to)?.committed().with_context(|| kind.to_owned())?;
                only_on(fleet, kind, to)?;
                for _ in 0..2 {
                    let verdict = dirtier::verify(fleet.host(to), kind).with_context(|| kind.to_owned())?;
                    let log = fleet.host(to).docker(&["logs", kind])?;
                    ensure!(verdict.bad == 0, "{kind}: {verdict:?}: {log}");
                    ensure!(verdict.number > 1, "{kind}: it was started anew: {verdict:?}");
                }
            }
            fleet.host(0).docker(&["rm", "--force", kind])?;
        }
        fleet.hosts().iter().try_for_each(nothing_left_on)
    })
}

/// What is more than a memfd's content and descriptors, and than CRIU carries, is seen by whoever joins them.
#[test]
fn a_memfd_that_cannot_be_carried_whole_stays_where_it_is() -> Result<()> {
    system(&Fleet::builder(), |fleet| {
        let kind = "passed";
        hardship(fleet, kind)?;
        let pid = fleet.host(0).init_pid(kind)?;
        let moved = fleet.migrate(kind, 0, 1)?;
        ensure!(moved.outcome == "rolled_back" && moved.code == "bad_images", "{}", moved.result);
        ensure!(fleet.host(0).init_pid(kind)? == pid, "it was restarted");
        ensure!(dirtier::verify(fleet.host(0), kind)?.bad == 0);
        only_on(fleet, kind, 0)?;
        fleet.host(0).docker(&["rm", "--force", kind])?;
        fleet.hosts().iter().try_for_each(nothing_left_on)
    })
}

/// The target's tmpfs has room for what the container needs when it is looked at, and shrinks under it.
#[test]
fn a_target_that_runs_out_of_room_refuses_and_the_container_goes_on() -> Result<()> {
    system(&Fleet::builder(), |fleet| {
        let redis = Redis::start(fleet, 0, "web", 0, &[])?;
        Client::connect(redis.server())?.fill(64)?;
        let resize = |fleet: &Fleet, size: &str| {
            let mut command = fleet.host(1).command(Path::new("mount"));
            process::finish(command.args(["-o", &format!("remount,size={size}"), "/run"]))
        };
        let mut events = fleet.nats()?.subscribe(EVENTS_FILTER)?;
        // Some seconds for the first round.
        let migration = fleet.start_migration_with("web", 0, 1, &["--bandwidth", "16MB/s"])?;
        events.wait_for_phase("pre_copy", PATIENCE)?;
        resize(fleet, "32m")?;
        let moved = migration.wait(DISTURBED)?;
        ensure!(moved.outcome == "rolled_back" && moved.code == "page_store_failed", "{}", moved.result);
        ensure!(moved.remedy.contains("room"), "no remedy: {}", moved.result);
        redis.carries_on()?;
        only_on(fleet, "web", 0)?;
        fleet.hosts().iter().try_for_each(nothing_left_on)?;
        // The same on the disk, where the images of all but memory come to where memory has room for the pages only, with
        // the container standing still.
        resize(fleet, "128m")?;
        let disk = fleet.host(1).state_dir().join("migrations");
        let mut mount = fleet.host(1).command(Path::new("mount"));
        process::finish(mount.args(["-t", "tmpfs", "-o", "size=128k", "none"]).arg(&disk))?;
        let moved = fleet.migrate("web", 0, 1)?;
        process::finish(fleet.host(1).command(Path::new("umount")).arg(&disk))?;
        ensure!(moved.outcome == "rolled_back" && moved.code == "disk_full", "{}", moved.result);
        redis.carries_on()?;
        only_on(fleet, "web", 0)?;
        fleet.hosts().iter().try_for_each(nothing_left_on)?;
        resize(fleet, "50%")?;
        fleet.migrate("web", 0, 1)?.committed()?;
        redis.carries_on()?;
        redis.finish().map(drop)
    })
}
