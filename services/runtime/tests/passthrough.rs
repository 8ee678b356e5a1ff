//! What reaches runc, seen by a runc that only writes down how it was called.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test"
)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, Output};

use haulage_engine::armed::{Armed, ArmedRoot, Outcome, State};
use proptest::prelude::*;

const ID: &str = "0123456789abcdef";

/// A directory with a `runc` that appends its arguments, one a line and an empty line after them, to `calls`, and
/// exits with what `code` says.
struct Stand {
    dir: tempfile::TempDir,
}

impl Stand {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let runc = dir.path().join("runc");
        let script =
            "#!/bin/sh\nprintf '%s\\n' \"$@\" '' >>\"${0%/*}/calls\"\nexit $(cat \"${0%/*}/code\")\n";
        fs::write(&runc, script).unwrap();
        fs::set_permissions(&runc, fs::Permissions::from_mode(0o755)).unwrap();
        fs::write(dir.path().join("code"), "0").unwrap();
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn root(&self) -> ArmedRoot {
        ArmedRoot::new(self.path("armed"))
    }

    fn arm(&self) {
        fs::create_dir_all(self.path("work")).unwrap();
        self.root().arm(ID, &Armed::new("m-1", self.path("images"), self.path("work"))).unwrap();
    }

    fn call<S: AsRef<std::ffi::OsStr>>(&self, args: &[S]) -> Output {
        let path = format!("{}:{}", self.dir.path().display(), std::env::var("PATH").unwrap());
        let mut cmd = Command::new(env!("CARGO_BIN_EXE_haul-runtime"));
        cmd.args(args).env("PATH", path).env("HAUL_ARMED_DIR", self.path("armed")).output().unwrap()
    }

    /// The calls so far, each as its arguments.
    fn calls(&self) -> Vec<Vec<String>> {
        let text = fs::read_to_string(self.path("calls")).unwrap_or_default();
        let calls = text.split_terminator("\n\n");
        calls.map(|call| call.lines().map(ToOwned::to_owned).collect()).collect()
    }

    fn create(&self) -> Output {
        let log = self.path("log.json");
        self.call(&["--log", log.to_str().unwrap(), "--log-format", "json", "create", "--bundle", "/b", ID])
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn what_is_not_armed_reaches_runc_unchanged(
        args in prop::collection::vec("create|start|state|delete|--root|--bundle|/x|0123456789abcdef|fedc|[a-z -]{1,5}", 1..7),
        code in 0u8..4,
    ) {
        let stand = Stand::new();
        fs::write(stand.path("code"), code.to_string()).unwrap();
        let output = stand.call(&args);
        prop_assert_eq!(output.status.code(), Some(code.into()));
        prop_assert_eq!(stand.calls(), [args]);
    }
}

#[test]
fn a_create_of_an_armed_container_restores_once_and_start_is_then_nothing() {
    let stand = Stand::new();
    stand.arm();
    assert!(stand.create().status.success());
    let [restore] = &stand.calls()[..] else { panic!("{:?}", stand.calls()) };
    assert!(restore.contains(&"restore".to_owned()) && restore.contains(&"--tcp-established".to_owned()));
    assert_eq!(stand.root().state(ID).unwrap(), State::Restored);
    let outcome = stand.root().outcome(ID).unwrap().unwrap();
    assert!(matches!(outcome, Outcome { ok: true, exit_code: Some(0), error: None, .. }));

    assert!(stand.call(&["start", ID]).status.success());
    assert_eq!(stand.calls().len(), 1, "start of a running container is not runc's business");
    stand.call(&["start", ID]);
    stand.create();
    let calls = stand.calls();
    assert_eq!(calls[1], ["start", ID], "from then on it is a container like any other");
    assert!(calls[2].contains(&"create".to_owned()));
}

#[test]
fn a_failed_restore_is_explained_and_bars_a_fresh_start() {
    let stand = Stand::new();
    stand.arm();
    fs::write(stand.path("code"), "1").unwrap();
    let line = "(00.1)      1: Error (criu/files-reg.c:2): File data has bad size 5 (expect 6)\n";
    fs::write(stand.path("work/restore.log"), line).unwrap();
    let output = stand.create();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("has bad size"));
    let log = fs::read_to_string(stand.path("log.json")).unwrap();
    let last: serde_json::Value = serde_json::from_str(log.lines().last().unwrap()).unwrap();
    assert_eq!(last["level"], "error");
    assert!(last["msg"].as_str().unwrap().contains("another size here"), "{last}");
    let outcome = stand.root().outcome(ID).unwrap().unwrap();
    assert!(!outcome.ok && outcome.exit_code == Some(1) && outcome.error.unwrap().contains("bad size"));

    fs::write(stand.path("code"), "0").unwrap();
    assert!(!stand.create().status.success());
    let calls = stand.calls();
    assert!(calls.iter().all(|call| !call.contains(&"create".to_owned())), "it was started empty: {calls:?}");
    let ended = ["delete", "--force", ID].map(ToOwned::to_owned);
    assert!(calls.last().unwrap().ends_with(&ended), "what may run is ended: {calls:?}");
    stand.root().disarm(ID).unwrap();
    assert!(stand.create().status.success());
}

#[test]
fn runc_s_own_reason_is_passed_on_where_criu_has_none() {
    let stand = Stand::new();
    stand.arm();
    fs::write(stand.path("code"), "1").unwrap();
    fs::write(stand.path("log.json"), "{\"level\":\"error\",\"msg\":\"no such bundle\",\"time\":\"t\"}\n")
        .unwrap();
    assert!(String::from_utf8_lossy(&stand.create().stderr).contains("no such bundle"));
}

#[test]
fn an_armed_container_is_never_started_by_a_call_that_cannot_be_read() {
    let stand = Stand::new();
    stand.arm();
    for args in [&["create", "--unknown", "x", ID][..], &["--unknown", "create", ID], &["create", ID, "more"]]
    {
        assert_eq!(stand.call(args).status.code(), Some(1), "{args:?}");
    }
    fs::write(stand.path("armed").join(ID).join("armed.json"), "{").unwrap();
    assert_eq!(stand.create().status.code(), Some(1));
    assert!(stand.calls().is_empty());
}

#[test]
fn a_machine_without_runc_is_said_so() {
    let stand = Stand::new();
    let mut cmd = Command::new(env!("CARGO_BIN_EXE_haul-runtime"));
    let output = cmd.args(["state", "x"]).env("PATH", stand.path("empty")).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("cannot run runc"));
}
