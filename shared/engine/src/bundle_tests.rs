use super::*;

fn mount(root: &str, at: &str) -> MountPoint {
    MountPoint {
        root: root.into(),
        at: at.into(),
        flags: "rw".into(),
        propagates: false,
        device: format!("0:{at}"),
        kind: "ext4".into(),
        options: "rw".into(),
    }
}

fn state(text: &str) -> RuncState {
    serde_json::from_str(text).unwrap()
}

const STATE: &str = r#"{
    "init_process_pid": 42, "external_descriptors": ["/dev/null", "pipe:[1]", "pipe:[2]"],
    "cgroup_paths": {"freezer": "/sys/fs/cgroup/freezer/docker/x", "": "/sys/fs/cgroup/unified/docker/x"},
    "config": {
        "rootfs": "/data/merged",
        "mounts": [
            {"device": "proc", "destination": "/proc"},
            {"device": "tmpfs", "destination": "/dev"},
            {"device": "cgroup", "destination": "/sys/fs/cgroup"},
            {"device": "bind", "destination": "/data"},
            {"device": "bind", "destination": "/data/merged/etc/hosts"}
        ],
        "mask_paths": ["/proc/kcore", "/proc/acpi", "/proc/absent"],
        "namespaces": [{"type": "NEWNS"}, {"type": "NEWPID"}]
    }
}"#;

#[test]
fn mounts_get_the_names_that_runc_gives_them() {
    let mut state = state(STATE);
    let mounts = [
        mount("/", "/"),
        mount("/v", "/data"),
        mount("/h", "/etc/hosts"),
        mount("/docker/x", "/sys/fs/cgroup/cpu"),
        mount("/docker/x", "/sys/fs/cgroup/freezer"),
        mount("/null", "/proc/kcore"),
        mount("/", "/proc/acpi"),
    ];
    let root = Path::new("/no/such/root");
    assert_eq!(
        external_mounts(&state.config, &mounts, root),
        ["/sys/fs/cgroup/cpu", "/sys/fs/cgroup/freezer", "/data", "/etc/hosts"]
    );
    assert_eq!(
        masked_null(&state.config, &mounts),
        ["/proc/kcore"],
        "a masked directory is no bind of /dev/null"
    );
    state.config.namespaces = Some(vec![RuncNamespace { kind: "NEWCGROUP".into() }]);
    assert_eq!(external_mounts(&state.config, &mounts, root), ["/data", "/etc/hosts"], "cgroups of its own");
}

#[test]
fn the_freezer_is_v1s_where_it_exists() {
    let facts = cgroup_facts(state(STATE).cgroup_paths, false).unwrap();
    assert_eq!(facts.version, CgroupVersion::V1);
    assert_eq!(facts.procs_file, Path::new("/sys/fs/cgroup/freezer/docker/x/cgroup.procs"));
    let unified =
        BTreeMap::from([(String::new(), PathBuf::from("/sys/fs/cgroup/system.slice/docker-x.scope"))]);
    let facts = cgroup_facts(unified, true).unwrap();
    assert_eq!(facts.version, CgroupVersion::V2);
    assert_eq!(facts.freezer_dir, Path::new("/sys/fs/cgroup/system.slice/docker-x.scope"));
    assert!(matches!(cgroup_facts(BTreeMap::new(), false), Err(BundleError::NoFreezer)));
}

#[test]
fn cgroups_are_plain_without_others_below_and_without_a_namespace() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("cgroup.procs"), "1\n").unwrap();
    let paths = || BTreeMap::from([(String::new(), dir.path().to_owned())]);
    assert!(cgroup_facts(paths(), false).unwrap().plain);
    assert!(!cgroup_facts(paths(), true).unwrap().plain);
    fs::create_dir(dir.path().join("below")).unwrap();
    assert!(!cgroup_facts(paths(), false).unwrap().plain);
}

#[test]
fn only_a_tmpfs_that_is_seen_once_is_its_own() {
    let tmpfs = |at: &str, device: &str| MountPoint {
        kind: "tmpfs".into(),
        device: device.into(),
        options: "rw,size=64k".into(),
        ..mount("/", at)
    };
    let mut mounts = vec![
        mount("/", "/"),
        tmpfs("/dev", "0:1"),
        tmpfs("/twice", "0:2"),
        tmpfs("/again", "0:2"),
        tmpfs("/covered", "0:3"),
        mount("/v", "/covered"),
        MountPoint { propagates: true, ..tmpfs("/shared", "0:4") },
        MountPoint { root: "/part".into(), ..tmpfs("/part", "0:5") },
        tmpfs("/dev/shm", "0:6"),
    ];
    let expected =
        TmpfsFacts { at: "/dev".into(), device: "0:1".into(), writable: true, options: "rw,size=64k".into() };
    assert_eq!(own_tmpfs(&mounts, &["/dev/shm".into()]), [expected]);
    mounts.clear();
    assert_eq!(own_tmpfs(&mounts, &[]), []);
}

#[test]
fn null_lists_in_the_state_are_empty() {
    let state = state(
        r#"{"init_process_pid": 1, "cgroup_paths": {}, "external_descriptors": null,
            "config": {"rootfs": "/r", "mounts": null, "mask_paths": null, "namespaces": null}}"#,
    );
    assert!(external_mounts(&state.config, &[], Path::new("/")).is_empty());
    assert!(masked_null(&state.config, &[]).is_empty());
}

#[test]
fn the_state_is_where_the_options_say_in_either_spelling() {
    let dir = tempfile::tempdir().unwrap();
    let (bundle, root) = (dir.path().join("bundle"), dir.path().join("runtime-haul"));
    fs::create_dir(&bundle).unwrap();
    fs::create_dir_all(root.join("ns/c1")).unwrap();
    fs::write(root.join("ns/c1/state.json"), "{}").unwrap();
    assert!(matches!(find_state("c1", "ns", &bundle), Err(BundleError::NoState { .. })), "no options at all");
    for key in ["root", "Root"] {
        let options = serde_json::json!({ "binary_name": "runc", key: root });
        fs::write(bundle.join("options.json"), options.to_string()).unwrap();
        let (found, state) = find_state("c1", "ns", &bundle).unwrap();
        assert_eq!((found.as_path(), state), (root.as_path(), root.join("ns/c1/state.json")));
    }
    fs::write(bundle.join("options.json"), "[").unwrap();
    assert!(matches!(find_state("c1", "ns", &bundle), Err(BundleError::Malformed { .. })));
}
