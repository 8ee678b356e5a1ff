//! Descriptions for tests, in the form that Docker 20.10 and 28 give them.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use crate::facts::{ApiVersion, CgroupVersion, EngineInfo, NetworkFacts, VolumeFacts};
use crate::inspect::Inspect;
use crate::spec::ContainerSpec;

pub(crate) const ID: &str = "4f5a2e6b7c8d9e0f112233445566778899aabbccddeeff00112233445566778a";

pub(crate) fn engine() -> EngineInfo {
    EngineInfo {
        server_version: "20.10.24".into(),
        api_version: ApiVersion { major: 1, minor: 41 },
        storage_driver: "overlay2".into(),
        data_root: "/var/lib/docker".into(),
        runtimes: ["runc", "haul"].map(str::to_owned).into(),
        default_runtime: "runc".into(),
        cgroup_driver: "cgroupfs".into(),
        cgroup_version: CgroupVersion::V1,
        security: BTreeSet::from(["seccomp".to_owned()]),
        log_drivers: ["json-file", "local", "syslog"].map(str::to_owned).into(),
        kernel: "6.1.0".into(),
        architecture: "x86_64".into(),
    }
}

/// An ordinary running container on a macvlan network, with a named and an anonymous volume.
pub(crate) fn inspect() -> Value {
    json!({
        "Id": ID,
        "Name": "/web-1",
        "Image": "sha256:aaaa",
        "State": {"Status": "running", "Running": true, "Paused": false, "Restarting": false, "Pid": 4242,
                  "ExitCode": 0, "Error": ""},
        "LogPath": format!("/var/lib/docker/containers/{ID}/{ID}-json.log"),
        "ResolvConfPath": format!("/var/lib/docker/containers/{ID}/resolv.conf"),
        "AppArmorProfile": "",
        "ProcessLabel": "",
        "GraphDriver": {"Name": "overlay2", "Data": {"UpperDir": "/var/lib/docker/overlay2/u/diff"}},
        "Mounts": [
            {"Type": "volume", "Name": "data", "Source": "/v/data/_data", "Destination": "/data",
             "Driver": "local", "Mode": "z", "RW": true, "Propagation": ""},
            {"Type": "volume", "Name": "0123abcd", "Source": "/v/0123abcd/_data", "Destination": "/cache",
             "Driver": "local", "Mode": "", "RW": true, "Propagation": ""},
        ],
        "Config": {
            "Hostname": "4f5a2e6b7c8d", "Image": "redis:7", "Tty": false, "OpenStdin": false,
            "Env": ["A=1"], "Cmd": ["serve"], "Entrypoint": null, "Labels": {"team": "x"},
            "Volumes": {"/cache": {}, "/data": {}},
        },
        "HostConfig": {
            "Binds": ["data:/data"], "NetworkMode": "lan",
            "PortBindings": {"80/tcp": [{"HostIp": "", "HostPort": "8080"}], "81/udp": [{"HostIp": "", "HostPort": ""}]},
            "RestartPolicy": {"Name": "always", "MaximumRetryCount": 0},
            "AutoRemove": false, "Privileged": false, "Runtime": "runc", "LogConfig": {"Type": "json-file", "Config": {}},
            "PidMode": "", "IpcMode": "private", "UTSMode": "", "UsernsMode": "",
            "Devices": [], "DeviceCgroupRules": null, "DeviceRequests": null, "VolumesFrom": null, "Memory": 268_435_456,
        },
        "NetworkSettings": {"Networks": {"lan": {
            "IPAMConfig": null, "Links": null, "Aliases": ["web", "4f5a2e6b7c8d"], "NetworkID": "feed01",
            "Gateway": "10.77.0.1", "IPAddress": "10.77.0.5", "IPPrefixLen": 24, "GlobalIPv6Address": "",
            "MacAddress": "02:42:0a:4d:00:05", "DriverOpts": null,
        }}},
    })
}

pub(crate) fn lan() -> NetworkFacts {
    NetworkFacts {
        id: "feed01".into(),
        name: "lan".into(),
        driver: "macvlan".into(),
        options: BTreeMap::from([("parent".to_owned(), "eth0".to_owned())]),
        subnets: vec!["10.77.0.0/24".parse().unwrap()],
        addresses: BTreeMap::new(),
    }
}

pub(crate) fn volume(name: &str) -> VolumeFacts {
    VolumeFacts {
        name: name.into(),
        driver: "local".into(),
        mountpoint: format!("/v/{name}/_data").into(),
        options: BTreeMap::new(),
        labels: BTreeMap::new(),
    }
}

/// The sample, with changes to Docker's description of it.
pub(crate) fn spec(change: impl FnOnce(&mut Value)) -> ContainerSpec {
    let mut answer = inspect();
    change(&mut answer);
    let volumes = ["data", "0123abcd"].map(|name| (name.to_owned(), volume(name))).into();
    let networks = BTreeMap::from([("lan".to_owned(), lan())]);
    ContainerSpec::capture(&Inspect::new(answer), &volumes, &networks).unwrap()
}
