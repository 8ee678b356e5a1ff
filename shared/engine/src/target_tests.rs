use serde_json::json;

use super::*;
use crate::facts::CgroupVersion;
use crate::samples;

fn host() -> HostFacts {
    HostFacts {
        kernel: "6.12.1".into(),
        architecture: "x86_64".into(),
        cpu_model: "x".into(),
        cpu_flags: ["sse2", "avx2"].map(str::to_owned).into(),
        docker_version: "20.10.24".into(),
        storage_driver: "overlay2".into(),
        cgroup_version: CgroupVersion::V1,
    }
}

fn target() -> TargetFacts {
    TargetFacts {
        engine: samples::engine(),
        host: host(),
        containers: Vec::new(),
        volumes: BTreeSet::new(),
        networks: BTreeMap::from([("lan".to_owned(), samples::lan())]),
        ports_taken: BTreeSet::new(),
        reference_names: None,
        image_present: false,
        memory_available: 1 << 30,
        disk_available: 1 << 30,
    }
}

fn codes_of(spec: &ContainerSpec, target: &TargetFacts, need: Need) -> Vec<Code> {
    target_refusals(spec, &host(), target, need).into_iter().map(|refusal| refusal.code).collect()
}

/// The codes that a change of the target leads to, for the sample container.
fn codes(change: impl FnOnce(&mut TargetFacts)) -> Vec<Code> {
    let mut target = target();
    change(&mut target);
    codes_of(&samples::spec(|_| {}), &target, Need::default())
}

fn entry(name: &str, port: Option<u16>) -> ContainerEntry {
    ContainerEntry {
        id: "0123456789abcdef".into(),
        name: name.into(),
        state: "running".into(),
        volumes: Vec::new(),
        ports: port.map(|port| HostPort { ip: None, port, protocol: "tcp".into() }).into_iter().collect(),
    }
}

#[test]
fn a_fitting_target_is_taken() {
    assert_eq!(codes(|_| {}), []);
    assert_eq!(codes(|t| t.containers.push(entry("web-10", Some(8081)))), []);
    assert_eq!(codes(|t| t.host.kernel = "6.13.0".into()), [], "a newer kernel");
    assert_eq!(
        codes(|t| {
            t.host.cpu_flags.insert("amx_tile".into());
        }),
        [],
        "a richer CPU"
    );
}

#[test]
fn machines_must_match() {
    assert_eq!(
        codes(|t| {
            t.host.cpu_flags.remove("avx2");
        }),
        [Code::Cpu]
    );
    assert_eq!(codes(|t| t.host.architecture = "aarch64".into()), [Code::Architecture]);
    assert_eq!(codes(|t| t.host.kernel = "6.1.0".into()), [Code::Kernel]);
    assert_eq!(codes(|t| t.host.cgroup_version = CgroupVersion::V2), [Code::CgroupVersion]);
}

#[test]
fn engines_must_match() {
    assert_eq!(codes(|t| t.engine.storage_driver = "btrfs".into()), [Code::StorageDriver]);
    assert_eq!(
        codes(|t| {
            t.engine.security.insert("userns".into());
        }),
        [Code::UsernsRemap]
    );
    assert_eq!(
        codes(|t| {
            t.engine.security.insert("rootless".into());
        }),
        [Code::Rootless]
    );
    assert_eq!(
        codes(|t| {
            t.engine.runtimes.remove("haul");
        }),
        [Code::RuntimeMissing]
    );
    assert_eq!(
        codes(|t| {
            t.engine.log_drivers.remove("json-file");
        }),
        [Code::LogDriver]
    );
    let confined = samples::spec(|d| d["AppArmorProfile"] = "docker-default".into());
    assert_eq!(codes_of(&confined, &target(), Need::default()), [Code::SecurityModule]);
    let unconfined = samples::spec(|d| d["AppArmorProfile"] = "unconfined".into());
    assert_eq!(codes_of(&unconfined, &target(), Need::default()), []);
}

#[test]
fn names_and_ports_must_be_free() {
    assert_eq!(codes(|t| t.containers.push(entry("web-1", None))), [Code::NameTaken]);
    assert_eq!(
        codes(|t| {
            t.volumes.insert("data".into());
        }),
        [Code::VolumeExists]
    );
    let mut bridged = samples::spec(|_| {});
    bridged.networks[0].driver = "bridge".into();
    let mut target = target();
    target.networks.get_mut("lan").unwrap().driver = "bridge".into();
    assert_eq!(codes_of(&bridged, &target, Need::default()), []);
    target.ports_taken.extend(bridged.fixed_ports());
    assert_eq!(codes_of(&bridged, &target, Need::default()), [Code::PortTaken]);
    target.ports_taken.clear();
    target.containers.push(entry("other", Some(8080)));
    let found = target_refusals(&bridged, &host(), &target, Need::default());
    assert!(found[0].message.contains("8080") && found[0].message.contains("other"), "{found:?}");
}

#[test]
fn networks_must_be_there_and_have_the_address_free() {
    assert_eq!(codes(|t| t.networks.clear()), [Code::NetworkMissing]);
    let change = |change: fn(&mut NetworkFacts)| codes(|t| change(t.networks.get_mut("lan").unwrap()));
    assert_eq!(change(|n| n.driver = "bridge".into()), [Code::NetworkMismatch]);
    assert_eq!(change(|n| n.subnets = vec!["10.78.0.0/24".parse().unwrap()]), [Code::NetworkMismatch]);
    let taken = |n: &mut NetworkFacts| drop(n.addresses.insert("10.77.0.5".parse().unwrap(), "db".into()));
    assert_eq!(change(taken), [Code::AddressTaken]);
}

#[test]
fn a_second_networks_mac_needs_a_newer_engine() {
    let second = |mac: &str| {
        samples::spec(|d| {
            d["NetworkSettings"]["Networks"]["far"] =
                json!({"IPAddress": "10.77.0.9", "MacAddress": mac, "NetworkID": "feed02"});
        })
    };
    let mut target = target();
    target
        .networks
        .insert("far".into(), NetworkFacts { name: "far".into(), driver: String::new(), ..samples::lan() });
    let (own, derived) = (second("02:11:22:33:44:55"), second("02:42:0a:4d:00:09"));
    assert_eq!(codes_of(&own, &target, Need::default()), [Code::MacAddress]);
    assert_eq!(codes_of(&derived, &target, Need::default()), []);
    target.engine.api_version = ApiVersion::ENDPOINT_MAC;
    assert_eq!(codes_of(&own, &target, Need::default()), []);
}

#[test]
fn there_must_be_room() {
    let spec = samples::spec(|_| {});
    let need = |memory, disk| codes_of(&spec, &target(), Need { memory, disk });
    assert_eq!(need(1 << 30, 1 << 30), []);
    assert_eq!(need((1 << 30) + 1, 0), [Code::Memory]);
    assert_eq!(need(0, (1 << 30) + 1), [Code::Disk]);
}
