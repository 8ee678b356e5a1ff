use serde_json::json;

use super::*;
use crate::samples;

fn facts() -> RunningFacts {
    RunningFacts {
        state: RunState {
            status: "running".into(),
            running: true,
            paused: false,
            restarting: false,
            pid: 4242,
            exit_code: 0,
            error: String::new(),
            health: None,
        },
        engine: samples::engine(),
        volume_users: BTreeMap::new(),
        shared_binds: BTreeSet::new(),
    }
}

fn codes(spec: &ContainerSpec, facts: &RunningFacts) -> Vec<Code> {
    refusals(spec, facts)
        .into_iter()
        .map(|refusal| {
            assert!(!refusal.message.is_empty() && !refusal.remedy.is_empty(), "{refusal:?}");
            refusal.code
        })
        .collect()
}

/// The one code that a change of Docker's description, of the facts or of neither leads to.
#[track_caller]
fn expect(code: impl Into<Option<Code>>, change: impl FnOnce(&mut Value)) {
    assert_eq!(codes(&samples::spec(change), &facts()), Vec::from_iter(code.into()));
}

#[test]
fn an_ordinary_container_can_be_moved() {
    expect(None, |_| {});
    expect(None, |d| d["HostConfig"]["AutoRemove"] = true.into());
    expect(None, |d| d["HostConfig"]["IpcMode"] = "private".into());
    expect(None, |d| d["HostConfig"]["Runtime"] = "haul".into());
    expect(None, |d| d["HostConfig"]["Tmpfs"] = json!({"/tmp": ""}));
}

#[test]
fn each_way_of_not_running_is_named() {
    let spec = samples::spec(|_| {});
    let with = |change: fn(&mut RunState)| {
        let mut facts = facts();
        change(&mut facts.state);
        codes(&spec, &facts)
    };
    assert_eq!(with(|s| s.paused = true), [Code::Paused]);
    assert_eq!(with(|s| s.restarting = true), [Code::Restarting]);
    assert_eq!(with(|s| (s.running, s.pid) = (false, 0)), [Code::NotRunning]);
    assert_eq!(with(|s| s.pid = 0), [Code::NotRunning]);
}

#[test]
fn what_ties_a_container_to_its_host_is_refused() {
    expect(Code::Tty, |d| d["Config"]["Tty"] = true.into());
    expect(None, |d| d["Config"]["OpenStdin"] = true.into());
    expect(Code::AttachedStdin, |d| {
        d["Config"]["OpenStdin"] = true.into();
        d["Config"]["AttachStdin"] = true.into();
    });
    expect(Code::Swarm, |d| d["Config"]["Labels"] = json!({"com.docker.swarm.service.name": "s"}));
    expect(Code::Privileged, |d| d["HostConfig"]["Privileged"] = true.into());
    expect(Code::Devices, |d| d["HostConfig"]["Devices"] = json!([{"PathOnHost": "/dev/fuse"}]));
    expect(Code::Devices, |d| d["HostConfig"]["DeviceCgroupRules"] = json!(["c 1:3 rwm"]));
    expect(Code::DeviceRequests, |d| d["HostConfig"]["DeviceRequests"] = json!([{"Count": -1}]));
    for mode in ["host", "container:other"] {
        expect(Code::PidMode, |d| d["HostConfig"]["PidMode"] = mode.into());
        expect(Code::IpcMode, |d| d["HostConfig"]["IpcMode"] = mode.into());
    }
    expect(Code::IpcMode, |d| d["HostConfig"]["IpcMode"] = "shareable".into());
    expect(Code::UtsMode, |d| d["HostConfig"]["UTSMode"] = "host".into());
    expect(Code::NetworkMode, |d| {
        d["HostConfig"]["NetworkMode"] = "container:other".into();
        d["NetworkSettings"]["Networks"] = json!({});
    });
    expect(Code::LogDriver, |d| d["HostConfig"]["LogConfig"]["Type"] = "vendor/plugin:1".into());
    expect(Code::Runtime, |d| d["HostConfig"]["Runtime"] = "kata".into());
}

#[test]
fn networks_that_cannot_keep_an_address_are_refused() {
    let mut spec = samples::spec(|_| {});
    let mut with = |name: &str, driver: &str| {
        (spec.networks[0].name, spec.networks[0].driver) = (name.into(), driver.into());
        codes(&spec, &facts())
    };
    assert_eq!(with("bridge", "bridge"), [Code::DefaultBridge]);
    assert_eq!(with("mesh", "overlay"), [Code::NetworkDriver]);
    for (name, driver) in [("lan", "macvlan"), ("lan", "ipvlan"), ("inner", "bridge"), ("none", "null")] {
        assert_eq!(with(name, driver), [], "{driver}");
    }
}

#[test]
fn engines_we_cannot_work_with_are_refused() {
    let spec = samples::spec(|_| {});
    let with = |change: fn(&mut EngineInfo)| {
        let mut facts = facts();
        change(&mut facts.engine);
        codes(&spec, &facts)
    };
    assert_eq!(with(|e| e.storage_driver = "overlayfs".into()), [Code::StorageDriver]);
    assert_eq!(
        with(|e| {
            e.security.insert("userns".into());
        }),
        [Code::UsernsRemap]
    );
    assert_eq!(
        with(|e| {
            e.security.insert("rootless".into());
        }),
        [Code::Rootless]
    );
    let mut facts = facts();
    facts.engine.security.insert("userns".into());
    let exempt = samples::spec(|d| d["HostConfig"]["UsernsMode"] = "host".into());
    assert_eq!(codes(&exempt, &facts), []);
    // The engine's default counts where the container names no runtime.
    facts.engine = samples::engine();
    facts.engine.default_runtime = "crun".into();
    let unnamed = samples::spec(|d| d["HostConfig"]["Runtime"] = "".into());
    assert_eq!(codes(&unnamed, &facts), [Code::Runtime]);
    assert_eq!(codes(&spec, &facts), []);
}

#[test]
fn binds_are_refused_unless_declared_shared() {
    let bind = |d: &mut Value| {
        d["Mounts"] = json!([{"Type": "bind", "Source": "/srv/nfs", "Destination": "/nfs", "RW": true}]);
    };
    expect(Code::BindMount, bind);
    expect(None, |d| {
        bind(d);
        d["Config"]["Labels"] = json!({SHARED_BINDS_LABEL: "/other, /srv/nfs"});
    });
    let mut facts = facts();
    facts.shared_binds.insert("/srv/nfs".into());
    assert_eq!(codes(&samples::spec(bind), &facts), []);
    facts.shared_binds = BTreeSet::from(["/srv".into()]);
    assert_eq!(codes(&samples::spec(bind), &facts), [Code::BindMount], "only the path itself is declared");
}

#[test]
fn volumes_must_be_local_plain_and_its_own() {
    let spec = samples::spec(|_| {});
    let with = |change: fn(&mut crate::spec::VolumeSpec)| {
        let mut spec = spec.clone();
        let volume =
            spec.mounts.iter_mut().filter_map(|m| m.volume.as_mut()).find(|v| v.name == "data").unwrap();
        change(volume);
        codes(&spec, &facts())
    };
    assert_eq!(with(|v| v.driver = "nfs-plugin".into()), [Code::VolumeDriver]);
    assert_eq!(
        with(|v| {
            v.options.insert("device".into(), ":/export".into());
        }),
        [Code::VolumeOptions]
    );
    assert_eq!(
        with(|v| {
            v.options.insert("size".into(), "1G".into());
        }),
        []
    );
    let mut shared = facts();
    shared.volume_users.insert("data".into(), vec!["backup".into()]);
    let found = refusals(&spec, &shared);
    assert_eq!(found[0].code, Code::VolumeShared);
    assert!(found[0].message.contains("backup"), "{found:?}");
    expect(Code::VolumesFrom, |d| d["HostConfig"]["VolumesFrom"] = json!(["other"]));
    expect(Code::MountType, |d| d["Mounts"] = json!([{"Type": "cluster", "Destination": "/c"}]));
}

#[test]
fn every_reason_is_told_at_once() {
    let spec = samples::spec(|d| {
        d["Config"]["Tty"] = true.into();
        d["HostConfig"]["Privileged"] = true.into();
    });
    assert_eq!(codes(&spec, &facts()), [Code::Tty, Code::Privileged]);
}
