//! A real container, dumped by CRIU and brought back through `haul-runtime` by real runc.
//!
//! Needs root, criu and runc (`deploy/setup`).

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test"
)]

#[path = "../../../shared/criu/tests/container/mod.rs"]
mod container;
#[path = "../../../shared/criu/tests/container/program.rs"]
mod program;
#[path = "restore/waiting.rs"]
mod waiting;

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use container::{Container, poll};
use haulage_criu::dump::Dump;
use haulage_criu::merge::{Assembly, Fill};
use haulage_criu::swrk::Criu;
use haulage_engine::armed::{Armed, ArmedRoot, State};

const LOG: &str = "runtime.log";
/// The program that is tested.
const RUNTIME: &str = env!("CARGO_BIN_EXE_haul-runtime");

/// Calls the runtime as containerd's shim does; its error output.
fn call(container: &Container, armed: &Path, args: &[&str]) -> Result<(), String> {
    let status = command(container, armed, args).status().unwrap();
    if status.success() { Ok(()) } else { Err(log(container)) }
}

fn command(container: &Container, armed: &Path, args: &[&str]) -> Command {
    let log = container.bundle().join(LOG);
    let _ = fs::remove_file(&log);
    let mut command = Command::new(RUNTIME);
    command.arg("--root").arg(container.runc_root()).arg("--log").arg(&log);
    command.args(["--log-format", "json"]).args(args).arg(&container.id).env("HAUL_ARMED_DIR", armed);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

/// What the runtime and runc have to say.
fn log(container: &Container) -> String {
    fs::read_to_string(container.bundle().join(LOG)).unwrap_or_default()
}

/// Freezes, dumps, assembles and ends the container; the ticks at that moment.
fn take_away(container: &Container) -> u64 {
    let criu = Criu::find().expect("criu is needed: see deploy/setup");
    container.set_frozen(true);
    let (mask, mut stored) = container.mask(&criu);
    let held = Dump::start(&criu, &container.request(), Some(mask)).unwrap();
    let ticks = container.status().0;
    let assembly = Assembly::begin(&container.images(), &container.complete()).unwrap();
    assembly.add_pages(1, &mut stored, Fill::AtRestore).unwrap();
    held.commit().unwrap();
    container.delete();
    ticks
}

#[test]
fn an_armed_container_goes_on_where_it_stood_and_later_starts_afresh() {
    let container = Container::start("b1");
    let armed = container.bundle().join("armed");
    let root = ArmedRoot::new(&armed);
    let ticks = take_away(&container);
    root.arm(&container.id, &Armed::new("m-1", container.complete(), container.work())).unwrap();

    let bundle = container.bundle().to_str().unwrap();
    let pid_file = container.bundle().join("init.pid");
    let create = ["create", "--bundle", bundle, "--pid-file", pid_file.to_str().unwrap()];
    call(&container, &armed, &create).unwrap();
    assert_eq!(fs::read_to_string(&pid_file).unwrap(), container.pid().to_string());
    poll("the first tick after the restore", || container.status().0 > ticks);
    call(&container, &armed, &["start"]).unwrap();
    container.wait_for_progress();
    let outcome = root.outcome(&container.id).unwrap().unwrap();
    assert!(outcome.ok && outcome.restore_us > 0);

    container.delete();
    call(&container, &armed, &create).unwrap();
    call(&container, &armed, &["start"]).unwrap();
    poll("the program to begin again", || (1..ticks).contains(&container.status().0));
}

#[test]
fn a_restore_that_fails_leaves_nothing_running_and_says_why() {
    let container = Container::start("b2");
    let armed = container.bundle().join("armed");
    let root = ArmedRoot::new(&armed);
    take_away(&container);
    // A file that the program has open has changed meanwhile.
    fs::write(container.rootfs().join("shared/status"), "shorter").unwrap();
    root.arm(&container.id, &Armed::new("m-1", container.complete(), container.work())).unwrap();
    let create = ["create", "--bundle", container.bundle().to_str().unwrap()];
    let log = call(&container, &armed, &create).unwrap_err();
    assert!(log.lines().last().unwrap().contains("has bad size"), "{log}");
    assert_eq!(root.state(&container.id).unwrap(), State::Consumed);
    assert!(call(&container, &armed, &create).is_err(), "it was started empty");
    assert!(!container.runc_root().join(&container.id).exists());
}
