//! System V shared memory moves with its semaphores and messages: by rounds before the freeze where there is much of it, or
//! by CRIU where it has to.

use anyhow::{Context, Result, ensure};
use haulage_tests::cli::Moved;
use haulage_tests::fleet::Fleet;
use haulage_tests::scenario::{break_restores_on, nothing_left_on, only_on, run, system};
use haulage_tests::{dirtier, image};
use serde_json::Value;

/// Memory of the segment, and how much of that is filled. What the program changes all the time is an eighth of it.
const MEBIBYTES: u64 = 96;
const FILLED: u64 = (MEBIBYTES << 20) / 4 * 3;

fn number(moved: &Moved, pointer: &str) -> Result<u64> {
    let found = moved.result.pointer(pointer).and_then(Value::as_u64);
    found.with_context(|| format!("{pointer} is not in {}", moved.result))
}

/// Starts a container of that name with the program.
fn start(fleet: &Fleet, kind: &str) -> Result<dirtier::Verdict> {
    run(fleet, 0, kind, 0, &[image::DIRTIER, "segments", &MEBIBYTES.to_string(), kind])?;
    let verdict = dirtier::verify(fleet.host(0), kind)?;
    ensure!(verdict.bad == 0, "{kind}: bad before any move: {}", fleet.host(0).docker(&["logs", kind])?);
    Ok(verdict)
}

/// Moves a container with the program there and back, and gives what is told of each move.
fn moves(fleet: &Fleet, kind: &str) -> Result<Vec<Moved>> {
    let mut last = start(fleet, kind)?;
    let mut all = Vec::new();
    for (from, to) in [(0, 1), (1, 0)] {
        let moved = fleet.migrate(kind, from, to)?;
        moved.committed().with_context(|| kind.to_owned())?;
        println!("{kind}: {}", fleet.haul(&["show", &moved.id])?.stdout);
        only_on(fleet, kind, to)?;
        for _ in 0..2 {
            let next =
                dirtier::verify(fleet.host(to), kind).with_context(|| format!("{kind}: after a move"))?;
            ensure!(next.bad == 0, "{kind}: {next:?}:\n{}", fleet.host(to).docker(&["logs", kind])?);
            ensure!(next.operations > last.operations, "{kind}: it stands still: {last:?} {next:?}");
            ensure!(next.number == last.number + 1, "{kind}: it was started anew: {last:?} {next:?}");
            last = next;
        }
        all.push(moved);
    }
    fleet.host(0).docker(&["rm", "--force", kind])?;
    Ok(all)
}

#[test]
fn much_system_v_memory_is_sent_before_the_freeze() -> Result<()> {
    system(&Fleet::builder(), |fleet| {
        for moved in moves(fleet, "whole")? {
            let images = number(&moved, "/facts/dumped/bytes")?;
            ensure!(images < FILLED / 8, "CRIU has carried it: {images} bytes of images");
            let last = number(&moved, "/facts/last_round/round/sent")? * 4096;
            ensure!(last < FILLED / 2, "it was sent in the freeze: {last} bytes in the last round");
        }
        fleet.hosts().iter().try_for_each(nothing_left_on)
    })
}

#[test]
fn what_we_cannot_carry_of_system_v_objects_leaves_all_of_them_to_criu() -> Result<()> {
    system(&Fleet::builder(), |fleet| {
        for kind in ["unattached", "behind"] {
            for moved in moves(fleet, kind)? {
                let images = number(&moved, "/facts/dumped/bytes")?;
                ensure!(images > FILLED, "{kind}: CRIU has not carried it: {images} bytes of images");
                let first = number(&moved, "/facts/rounds/0/sent")? * 4096;
                // What lies behind the end is looked at in the freeze alone.
                ensure!(kind == "behind" || first < FILLED / 2, "{kind}: sent in vain: {first} bytes");
            }
        }
        fleet.hosts().iter().try_for_each(nothing_left_on)
    })
}

#[test]
fn a_restore_that_fails_leaves_all_system_v_objects_as_they_were() -> Result<()> {
    system(&Fleet::builder(), |fleet| {
        let kind = "whole";
        let before = start(fleet, kind)?;
        let (pid, target) = (fleet.host(0).init_pid(kind)?, fleet.host(1));
        break_restores_on(target)?;
        let moved = fleet.migrate(kind, 0, 1)?;
        ensure!(moved.outcome == "rolled_back", "not rolled back: {}", moved.result);
        let last = number(&moved, "/facts/last_round/round/sent")? * 4096;
        ensure!(last < FILLED / 2, "it was to be sent in the freeze: {last} bytes in the last round");
        only_on(fleet, kind, 0)?;
        ensure!(fleet.host(0).init_pid(kind)? == pid, "the source was restarted");
        let verdict = dirtier::verify(fleet.host(0), kind)?;
        ensure!(verdict.bad == 0, "{verdict:?}:\n{}", fleet.host(0).docker(&["logs", kind])?);
        ensure!(verdict.number == before.number + 1 && verdict.operations > before.operations);
        fleet.hosts().iter().try_for_each(nothing_left_on)
    })
}
