use serde_json::json;

use crate::compare::{Stage, compare};
use crate::facts::ApiVersion;
use crate::recreate::CreateOptions;
use crate::samples;
use crate::spec::ContainerSpec;

fn options(minor: u32) -> CreateOptions {
    CreateOptions {
        runtime: Some("haul".into()),
        keep_restart_policy: false,
        image: None,
        api: ApiVersion { major: 1, minor },
    }
}

#[test]
fn a_description_is_captured() {
    let spec = samples::spec(|_| {});
    assert_eq!((spec.name.as_str(), spec.id.as_str()), ("web-1", samples::ID));
    assert_eq!(spec.networks[0].aliases, ["web"], "not its own id, which belongs to one engine");
    assert_eq!(spec.networks[0].ipv4, Some("10.77.0.5".parse().unwrap()));
    let volumes: Vec<_> =
        spec.volumes().map(|(_, volume)| (volume.name.as_str(), volume.anonymous)).collect();
    assert_eq!(volumes, [("0123abcd", true), ("data", false)]);
    assert_eq!(spec.host_config["Memory"], 268_435_456);
    assert!(spec.engine_dir.unwrap().ends_with(samples::ID));
    assert_eq!(spec.layer.unwrap().upper.unwrap(), std::path::Path::new("/var/lib/docker/overlay2/u/diff"));
}

#[test]
fn fixed_ports_are_those_asked_for_by_number() {
    let mut spec = samples::spec(|_| {});
    assert_eq!(spec.fixed_ports(), [], "macvlan maps no ports");
    spec.networks[0].driver = "bridge".into();
    let ports: Vec<String> = spec.fixed_ports().iter().map(ToString::to_string).collect();
    assert_eq!(ports, ["8080/tcp"]);
}

#[test]
fn a_network_mode_by_id_becomes_a_name() {
    for mode in ["feed01", "feed", "lan"] {
        assert_eq!(samples::spec(|d| d["HostConfig"]["NetworkMode"] = mode.into()).network_mode(), "lan");
    }
    assert_eq!(samples::spec(|d| d["HostConfig"]["NetworkMode"] = "".into()).network_mode(), "default");
}

#[test]
fn a_description_without_the_essentials_is_an_error() {
    for field in ["Id", "Name", "Image", "Config", "HostConfig"] {
        let mut answer = samples::inspect();
        answer.as_object_mut().unwrap().remove(field);
        let inspect = crate::Inspect::new(answer);
        let error = ContainerSpec::capture(&inspect, &Default::default(), &Default::default()).unwrap_err();
        assert!(error.field.contains(field), "{error}");
    }
}

#[test]
fn what_was_implicit_is_asked_for() {
    let spec = samples::spec(|_| {});
    let request = spec.create_request(&options(41));
    let body = &request.body;
    assert_eq!(body["Entrypoint"], json!([""]), "or the image's would be taken");
    assert_eq!(body["Hostname"], "4f5a2e6b7c8d");
    assert_eq!(body["MacAddress"], "02:42:0a:4d:00:05");
    assert_eq!(body["HostConfig"]["RestartPolicy"]["Name"], "no");
    assert_eq!(body["HostConfig"]["Runtime"], "haul");
    let endpoint = &body["NetworkingConfig"]["EndpointsConfig"]["lan"];
    assert_eq!(endpoint["IPAMConfig"]["IPv4Address"], "10.77.0.5");
    assert_eq!(endpoint["MacAddress"], json!(null));

    let request = spec.create_request(&CreateOptions { keep_restart_policy: true, ..options(44) });
    assert_eq!(request.body["MacAddress"], json!(null));
    assert_eq!(request.body["NetworkingConfig"]["EndpointsConfig"]["lan"]["MacAddress"], "02:42:0a:4d:00:05");
    assert_eq!(request.body["HostConfig"]["RestartPolicy"]["Name"], "always");
}

#[test]
fn fields_this_crate_does_not_know_stay() {
    let spec = samples::spec(|d| {
        d["Config"]["FromTheFuture"] = json!({"a": [1]});
        d["HostConfig"]["AlsoNew"] = json!(7);
    });
    let request = spec.create_request(&options(44));
    assert_eq!(request.body["FromTheFuture"], json!({"a": [1]}));
    assert_eq!(request.body["HostConfig"]["AlsoNew"], 7);
}

#[test]
fn the_second_network_is_connected_later_on_older_engines() {
    let spec = samples::spec(|d| d["NetworkSettings"]["Networks"]["b"] = json!({"IPAddress": "10.78.0.2"}));
    let older = spec.create_request(&options(43));
    assert_eq!(older.body["NetworkingConfig"]["EndpointsConfig"].as_object().unwrap().len(), 1);
    let names: Vec<&str> = older.connect.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["lan", "b"], "the first once more, to have its address checked");
    assert_eq!(older.connect[1].1, json!({"IPAMConfig": {"IPv4Address": "10.78.0.2"}}));
    let newer = spec.create_request(&options(44));
    assert_eq!(newer.body["NetworkingConfig"]["EndpointsConfig"].as_object().unwrap().len(), 2);
    assert!(newer.connect.is_empty());
}

#[test]
fn differences_are_found_wherever_they_are() {
    let source = samples::spec(|_| {});
    let at = |change: fn(&mut ContainerSpec)| {
        let mut target = source.clone();
        change(&mut target);
        let there = compare(&source, &target, Stage::Adopted);
        let back = compare(&target, &source, Stage::Adopted);
        let places: Vec<String> = there.iter().map(|difference| difference.at.clone()).collect();
        assert_eq!(places, back.iter().map(|difference| difference.at.clone()).collect::<Vec<_>>());
        places
    };
    assert_eq!(at(|_| {}), Vec::<String>::new());
    assert_eq!(at(|s| s.name.push('x')), ["/name"]);
    assert_eq!(at(|s| s.image.id.push('b')), ["/image/id"]);
    assert_eq!(at(|s| drop(s.config.insert("New".into(), json!("x")))), ["/config/New"]);
    assert_eq!(at(|s| drop(s.config.insert("Env".into(), json!(["A=2"])))), ["/config/Env"]);
    assert_eq!(at(|s| drop(s.host_config.insert("Memory".into(), json!(1)))), ["/host_config/Memory"]);
    assert_eq!(
        at(|s| drop(s.host_config.insert("RestartPolicy".into(), json!({"Name": "no"})))),
        ["/host_config/RestartPolicy"]
    );
    assert_eq!(at(|s| s.networks[0].ipv4 = None), ["/networks/lan/ipv4"]);
    assert_eq!(at(|s| s.networks[0].mac = Some("02:00:00:00:00:01".into())), ["/networks/lan/mac"]);
    assert_eq!(at(|s| s.mounts[1].writable = false), ["/mounts//data/writable"]);
    assert_eq!(at(|s| drop(s.mounts.pop())), ["/mounts//data"]);
}

#[test]
fn what_belongs_to_one_engine_is_no_difference() {
    let source = samples::spec(|_| {});
    let mut target = source.clone();
    target.id = "b".repeat(64);
    target.mounts[0].volume.as_mut().unwrap().name = "fedc".into();
    target.mounts[0].source = None;
    target.host_config.insert("Runtime".into(), json!("haul"));
    target.host_config.insert("NewButEmpty".into(), json!([]));
    target.config.insert("OnBuild".into(), json!(null));
    target.config.remove("Tty");
    assert_eq!(compare(&source, &target, Stage::Adopted), []);
}
