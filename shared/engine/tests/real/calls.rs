//! The engine's calls, one by one.

use std::collections::BTreeMap;

use haulage_engine::{Docker, Engine, EngineErrorKind, RestartPolicy};

use crate::engine::{TestEngine, eventually, mounts_under};

#[tokio::test]
async fn the_engine_tells_about_itself_and_its_things() {
    let engine = TestEngine::start();
    let docker = engine.connect().await;
    let info = docker.info().await.unwrap();
    assert_eq!(info.storage_driver, "overlay2");
    assert_eq!(info.data_root, engine.path("data"));
    assert!(info.runtimes.contains("haul") && info.runtimes.contains("runc"));
    assert!(info.log_drivers.contains("json-file") && info.security.contains("seccomp"), "{info:?}");
    assert_eq!(info.api_version, docker.api_version());
    assert_eq!(engine.docker(&["version", "-f", "{{.Server.APIVersion}}"]), info.api_version.to_string());

    engine.docker(&[
        "run",
        "-d",
        "--name",
        "box",
        "--network",
        "lan",
        "--ip",
        "10.93.0.20",
        "-v",
        "vol:/v",
        "-p",
        "18090:1",
        "probe:1",
        "-c",
        "exec sleep 1000",
    ]);
    let lan = docker.network("lan").await.unwrap();
    assert_eq!(lan.driver, "macvlan");
    assert_eq!(lan.addresses.get(&"10.93.0.20".parse().unwrap()).map(String::as_str), Some("box"));
    assert!(lan.subnets[0].contains("10.93.0.200".parse().unwrap()));
    let listed = docker.containers().await.unwrap();
    assert_eq!(listed.len(), 1);
    assert_eq!((listed[0].name.as_str(), listed[0].state.as_str()), ("box", "running"));
    assert!(listed[0].volumes.contains(&"vol".to_owned()));
    assert!(docker.volume("vol").await.unwrap().mountpoint.is_dir());
    let in_use = docker.remove_volume("vol").await.unwrap_err();
    assert_eq!(in_use.kind(), EngineErrorKind::Conflict, "{in_use:?}");
    docker.remove("box").await.unwrap();
    docker.remove_volume("vol").await.unwrap();
}

#[tokio::test]
async fn failures_have_kinds_and_causes() {
    let engine = TestEngine::start();
    let docker = engine.connect().await;
    let gone = docker.inspect("no/such?thing").await.unwrap_err();
    assert_eq!(gone.kind(), EngineErrorKind::NotFound);
    assert_eq!(gone.to_string(), "cannot inspect the container no/such?thing");
    let cause = std::error::Error::source(&gone).unwrap().to_string();
    assert!(cause.contains("No such container"), "{cause}");
    for kind in [
        docker.remove("ghost").await.unwrap_err().kind(),
        docker.start("ghost").await.unwrap_err().kind(),
        docker.rename("ghost", "other").await.unwrap_err().kind(),
        docker.wait_exit("ghost").await.unwrap_err().kind(),
        docker.image("ghost:1").await.unwrap_err().kind(),
        docker.volume("ghost").await.unwrap_err().kind(),
        docker.network("ghost").await.unwrap_err().kind(),
        docker.set_restart_policy("ghost", &RestartPolicy::never()).await.unwrap_err().kind(),
    ] {
        assert_eq!(kind, EngineErrorKind::NotFound);
    }
    let body = serde_json::json!({"Image": "probe:1"});
    docker.create("one", &body).await.unwrap();
    assert_eq!(docker.create("one", &body).await.unwrap_err().kind(), EngineErrorKind::Conflict);
    let wrong =
        serde_json::json!({"Image": "probe:1", "HostConfig": {"RestartPolicy": {"Name": "sometimes"}}});
    assert_eq!(docker.create("two", &wrong).await.unwrap_err().kind(), EngineErrorKind::Invalid);

    let nobody = Docker::connect(&engine.path("nobody.sock")).await.unwrap_err();
    assert_eq!(nobody.kind(), EngineErrorKind::Unreachable);
    std::os::unix::net::UnixListener::bind(engine.path("dead.sock")).unwrap();
    let dead = Docker::connect(&engine.path("dead.sock")).await.unwrap_err();
    assert_eq!(dead.kind(), EngineErrorKind::Unreachable, "{dead:?}");
}

#[tokio::test]
async fn containers_end_and_restart_policies_change() {
    let engine = TestEngine::start();
    let docker = engine.connect().await;
    engine.docker(&["run", "-d", "--name", "box", "--restart", "always", "probe:1", "-c", "exec sleep 1000"]);
    docker.set_restart_policy("box", &RestartPolicy::never()).await.unwrap();
    let state = docker.inspect("box").await.unwrap().state().unwrap();
    let waiting = tokio::spawn({
        let docker = docker.clone();
        async move { docker.wait_exit("box").await }
    });
    rustix_kill(state.pid);
    assert_eq!(waiting.await.unwrap().unwrap(), 137);
    // With the policy "always" the engine would have started it again.
    let state = docker.inspect("box").await.unwrap().state().unwrap();
    assert_eq!((state.status.as_str(), state.running, state.restarting), ("exited", false, false));

    let policy = RestartPolicy { name: "on-failure".into(), maximum_retry_count: 2 };
    docker.set_restart_policy("box", &policy).await.unwrap();
    assert_eq!(
        engine.docker(&["inspect", "-f", "{{.HostConfig.RestartPolicy.MaximumRetryCount}}", "box"]),
        "2"
    );

    engine.docker(&[
        "run",
        "-d",
        "--rm",
        "--name",
        "brief",
        "-v",
        "/anonymous",
        "probe:1",
        "-c",
        "exec sleep 1000",
    ]);
    let state = docker.inspect("brief").await.unwrap().state().unwrap();
    rustix_kill(state.pid);
    eventually("the removal of the container", async || {
        docker.inspect("brief").await.err().filter(|error| error.is_not_found())
    })
    .await;
}

fn rustix_kill(pid: i32) {
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
}

#[tokio::test]
async fn images_and_volumes_travel() {
    let engine = TestEngine::start();
    let docker = engine.connect().await;
    let image = docker.image("probe:1").await.unwrap();
    assert_eq!(image.tags, ["probe:1"]);
    assert_eq!(image.layers.len(), 1);

    let other = TestEngine::start();
    let elsewhere = other.connect().await;
    other.docker(&["rmi", "probe:1"]);
    elsewhere.import_image(docker.export_image(&image.id)).await.unwrap();
    let arrived = elsewhere.image(&image.id).await.unwrap();
    assert_eq!((&arrived.id, &arrived.layers), (&image.id, &image.layers));
    assert!(arrived.tags.is_empty());
    elsewhere.tag_image(&image.id, "probe:1").await.unwrap();
    assert_eq!(elsewhere.image("probe:1").await.unwrap().id, image.id);
    assert_eq!(other.docker(&["run", "--rm", "probe:1", "-c", "echo $FROM_IMAGE"]), "yes");

    let missing = elsewhere.import_image(docker.export_image("ghost:1")).await.unwrap_err();
    assert_eq!(missing.to_string(), "cannot take in an image", "{missing:?}");
    let nonsense = futures_util::stream::once(async { Ok(bytes::Bytes::from_static(b"not an archive")) });
    assert!(elsewhere.import_image(Box::pin(nonsense)).await.is_err());

    let labels = BTreeMap::from([("keep".to_owned(), "me".to_owned())]);
    let made = elsewhere.create_volume("vol", "local", &BTreeMap::new(), &labels).await.unwrap();
    assert_eq!(made, elsewhere.volume("vol").await.unwrap());
    assert_eq!(made.labels, labels);
    elsewhere.remove_volume("vol").await.unwrap();
    assert!(elsewhere.volume("vol").await.unwrap_err().is_not_found());
}

#[test]
fn a_test_engine_leaves_nothing() {
    let engine = TestEngine::start();
    let dir = engine.path("");
    let id = engine.docker(&["run", "-d", "probe:1", "-c", "exec sleep 1000"]);
    drop(engine);
    assert!(!dir.exists());
    assert_eq!(mounts_under(&dir), Vec::<String>::new());
    for process in std::fs::read_dir("/proc").unwrap().flatten() {
        let command = std::fs::read(process.path().join("cmdline")).unwrap_or_default();
        assert!(!String::from_utf8_lossy(&command).contains(&id), "{:?} is left", process.path());
    }
}
