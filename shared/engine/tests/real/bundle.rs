//! The OCI side of running containers.

use std::collections::BTreeSet;

use haulage_engine::{BundleError, BundleFacts, capture};

use crate::engine::TestEngine;

#[tokio::test]
async fn a_running_containers_bundle_is_found() {
    let engine = TestEngine::start();
    let docker = engine.connect().await;
    let shared = engine.path("shared dir");
    std::fs::create_dir(&shared).unwrap();
    let bind = format!("{}:/var/run/with space", shared.display());
    engine.docker(&[
        "run",
        "-d",
        "--name",
        "box",
        "-v",
        &bind,
        "-v",
        "data:/data",
        "probe:1",
        "-c",
        "exec sleep 1000",
    ]);
    let captured = capture(&docker, "box").await.unwrap();
    let facts = BundleFacts::read(&captured.spec.id, captured.state.pid).unwrap();

    assert!(facts.bundle.join("config.json").is_file(), "{facts:?}");
    assert!(facts.state_path.is_file() && facts.state_path.starts_with(&facts.runc_root));
    assert_eq!(Some(&facts.rootfs), captured.spec.layer.as_ref().unwrap().merged.as_ref());
    let pids = std::fs::read_to_string(&facts.cgroup.procs_file).unwrap();
    assert_eq!(pids.trim(), captured.state.pid.to_string());
    let freezer = ["freezer.state", "cgroup.freeze"].map(|file| facts.cgroup.freezer_dir.join(file));
    assert!(freezer.iter().any(|file| file.exists()), "{facts:?}");

    let mountinfo = std::fs::read_to_string(format!("/proc/{}/mountinfo", facts.init_pid)).unwrap();
    let places: BTreeSet<String> =
        mountinfo.lines().map(|line| line.split(' ').nth(4).unwrap().replace("\\040", " ")).collect();
    for mount in facts.external_mounts.iter().chain(&facts.masked_null) {
        assert!(places.contains(mount), "{mount} is no mount of the container: {places:?}");
    }
    for expected in
        ["/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/data", "/declared", "/run/with space"]
    {
        assert!(facts.external_mounts.iter().any(|mount| mount == expected), "{expected} in {facts:?}");
    }
    let masked: BTreeSet<&str> = mountinfo
        .lines()
        .filter_map(|line| {
            let fields: Vec<&str> = line.split(' ').collect();
            (fields[3] == "/null" && fields[4].starts_with("/proc/")).then_some(fields[4])
        })
        .collect();
    assert!(!masked.is_empty(), "Docker masks files of /proc");
    assert_eq!(facts.masked_null.iter().map(String::as_str).collect::<BTreeSet<_>>(), masked);
    assert_eq!(facts.external_descriptors.len(), 3);
    assert_eq!(facts.external_descriptors[0], "/dev/null");
    assert!(facts.external_descriptors[1].starts_with("pipe:["));
    // Every bind of something outside must be named, or CRIU refuses to dump it.
    let named: BTreeSet<&str> =
        facts.external_mounts.iter().chain(&facts.masked_null).map(String::as_str).collect();
    let unnamed: Vec<&str> = mountinfo
        .lines()
        .filter(|line| {
            let fields: Vec<&str> = line.split(' ').collect();
            let place = fields[4].replace("\\040", " ");
            let kind = fields[fields.iter().position(|f| *f == "-").unwrap() + 1];
            let own = matches!(kind, "proc" | "tmpfs" | "devpts" | "mqueue" | "sysfs") || place == "/";
            let own = own || (kind == "cgroup2" && place == "/sys/fs/cgroup");
            !own && !named.contains(place.as_str())
        })
        .collect();
    assert_eq!(unnamed, Vec::<&str>::new());
}

#[tokio::test]
async fn other_processes_are_told_apart() {
    let engine = TestEngine::start();
    let docker = engine.connect().await;
    engine.docker(&["run", "-d", "--name", "box", "probe:1", "-c", "sleep 1000; true"]);
    let captured = capture(&docker, "box").await.unwrap();
    let own = i32::try_from(std::process::id()).unwrap();
    assert!(matches!(BundleFacts::read(&captured.spec.id, own), Err(BundleError::NoShim { .. })));
    assert!(matches!(BundleFacts::read(&captured.spec.id, i32::MAX), Err(BundleError::Read { .. })));
    let unknown = BundleFacts::read("0123456789ab", captured.state.pid).unwrap_err();
    assert!(matches!(&unknown, BundleError::NoState { tried, .. } if !tried.is_empty()), "{unknown:?}");
}
