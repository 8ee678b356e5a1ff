//! A container with many options, captured and created again.

use haulage_engine::{
    CreateOptions, CreateRequest, Docker, Engine, EngineError, HAUL_RUNTIME, RefusalCode, Stage, capture,
    compare, refusals, running_facts, target_facts, target_refusals,
};

use crate::engine::TestEngine;

const OPTIONS: &str = "--domainname test.example -e A=1 -e EMPTY= --label team=x --label odd=a,b -u 1000:1000 -w /tmp \
    --restart on-failure:3 -p 127.0.0.1:18080:80/tcp -p 18081:81/udp --expose 99 --memory 64m --memory-swap 80m \
    --cpus 0.5 --cpuset-cpus 0 --pids-limit 50 --ulimit nofile=512:1024 --cap-add NET_ADMIN --cap-drop CHOWN \
    --security-opt no-new-privileges --read-only --tmpfs /scratch:size=1m --shm-size 8m \
    --sysctl net.core.somaxconn=99 --dns 10.93.0.1 --dns-search x.example --dns-option ndots:2 \
    --add-host other:10.93.0.7 --log-driver json-file --log-opt max-size=1m --oom-score-adj 100 \
    --stop-signal SIGUSR1 --stop-timeout 7 --health-cmd true --health-interval 30s --group-add 5 --ipc private \
    -v data:/data -v /anonymous --mount type=tmpfs,dst=/scratch2,tmpfs-size=65536 \
    --mount type=volume,src=more,dst=/more,readonly --network lan --ip 10.93.0.9 --network-alias web";

fn options(docker: &Docker) -> CreateOptions {
    CreateOptions {
        runtime: Some(HAUL_RUNTIME.into()),
        keep_restart_policy: false,
        image: None,
        api: docker.api_version(),
    }
}

async fn create(docker: &Docker, name: &str, request: &CreateRequest) -> Result<String, EngineError> {
    let id = docker.create(name, &request.body).await?;
    for (network, endpoint) in &request.connect {
        docker.connect_network(network, &id, endpoint).await?;
    }
    Ok(id)
}

#[tokio::test]
async fn a_container_is_created_again_as_it_was() {
    let engine = TestEngine::start();
    let docker = engine.connect().await;
    let mut args = vec!["run", "-d", "--name", "full"];
    args.extend(OPTIONS.split_whitespace());
    args.extend(["probe:1", "-c", "exec sleep 1000"]);
    engine.docker(&args);

    let source = capture(&docker, "full").await.unwrap();
    let mut spec = source.spec.clone();
    assert_eq!(spec.hostname(), spec.id.get(..12), "Docker's default, which must stay");
    assert!(spec.networks[0].mac.is_some());
    assert_eq!(spec.networks[0].aliases, ["web"]);
    let anonymous: Vec<_> =
        spec.volumes().map(|(mount, volume)| (mount.destination.to_str(), volume.anonymous)).collect();
    assert_eq!(
        anonymous,
        [
            (Some("/anonymous"), true),
            (Some("/data"), false),
            (Some("/declared"), true),
            (Some("/more"), false)
        ]
    );
    let json = serde_json::to_string(&spec).unwrap();
    assert_eq!(
        serde_json::from_str::<haulage_engine::ContainerSpec>(&json).unwrap(),
        spec,
        "survives the wire"
    );
    let facts = running_facts(&docker, &source, Default::default()).await.unwrap();
    assert_eq!(refusals(&spec, &facts), [], "this container can be moved");

    // The same engine cannot take it while the original is there.
    let target = target_facts(&docker, &spec).await.unwrap();
    let codes: Vec<_> = target_refusals(&spec, &target.host, &target, Default::default())
        .into_iter()
        .map(|refusal| refusal.code)
        .collect();
    use RefusalCode::*;
    assert_eq!(codes, [NameTaken, VolumeExists, VolumeExists, AddressTaken], "macvlan maps no ports");

    docker.rename("full", "full-old").await.unwrap();
    // A MAC address that no engine makes of the IP address, as a container from elsewhere may have it.
    spec.networks[0].mac = Some("02:aa:bb:cc:dd:01".into());
    let request = spec.create_request(&options(&docker));
    let id = create(&docker, "full", &request).await.unwrap();
    let copy = capture(&docker, &id).await.unwrap();
    assert_eq!(compare(&spec, &copy.spec, Stage::Created), []);
    assert_eq!(copy.spec.runtime(), HAUL_RUNTIME);
    assert!(copy.spec.restart_policy().is_never());
    assert!(copy.spec.layer.unwrap().upper.unwrap().is_dir(), "the layer is there before the start");

    docker.remove(&spec.id).await.unwrap();
    docker.start(&id).await.unwrap();
    docker.set_restart_policy(&id, &spec.restart_policy()).await.unwrap();
    let running = capture(&docker, &id).await.unwrap();
    assert!(running.state.running && running.state.pid > 0);
    assert_eq!(compare(&spec, &running.spec, Stage::Adopted), [], "{} made of {}", running.spec.id, spec.id);
    assert_eq!(running.spec.networks[0].mac, spec.networks[0].mac);
    assert_eq!(engine.docker(&["exec", "full", "/bin/cat", "/etc/hostname"]), format!("{}", &spec.id[..12]));
}

#[tokio::test]
async fn entrypoint_terminal_and_second_network_survive() {
    let engine = TestEngine::start();
    let docker = engine.connect().await;
    engine.docker(&["network", "create", "--subnet", "10.94.0.0/24", "inner"]);
    engine.docker(&["network", "create", "--subnet", "10.95.0.0/24", "third"]);
    let network = engine.docker(&["network", "inspect", "-f", "{{.Id}}", "inner"]);
    engine.docker(&[
        "create",
        "--name",
        "bare",
        "-t",
        "-i",
        "--rm",
        "-p",
        "18082:82",
        "--entrypoint",
        "",
        "--network",
        &network,
        "--hostname",
        "own",
        "probe:1",
        "/bin/sleep",
        "1000",
    ]);
    engine.docker(&["network", "connect", "--ip", "10.95.0.5", "--alias", "far", "third", "bare"]);
    engine.docker(&["start", "bare"]);

    let source = capture(&docker, "bare").await.unwrap();
    let spec = &source.spec;
    assert_eq!(spec.network_mode(), "inner", "an id means nothing elsewhere");
    assert_eq!(spec.networks.iter().map(|n| n.name.as_str()).collect::<Vec<_>>(), ["inner", "third"]);
    assert!(spec.tty() && spec.open_stdin() && spec.auto_remove());
    let facts = running_facts(&docker, &source, Default::default()).await.unwrap();
    assert_eq!(refusals(spec, &facts).first().unwrap().code, RefusalCode::Tty);

    let target = target_facts(&docker, spec).await.unwrap();
    let found = target_refusals(spec, &target.host, &target, Default::default());
    let ports: Vec<_> = found.iter().filter(|refusal| refusal.code == RefusalCode::PortTaken).collect();
    assert_eq!(ports.len(), 1, "{found:?}");
    assert_eq!(ports[0].message, "the port 18082/tcp of the target is taken by the container bare");

    docker.rename("bare", "bare-old").await.unwrap();
    let request = spec.create_request(&options(&docker));
    let id = create(&docker, "bare", &request).await.unwrap();
    docker.remove(&spec.id).await.unwrap();
    docker.start(&id).await.unwrap();
    let copy = capture(&docker, &id).await.unwrap();
    assert_eq!(compare(spec, &copy.spec, Stage::Adopted), []);

    // The comparison notices what is not equal.
    let mut other = copy.spec.clone();
    other.config.insert("Env".into(), serde_json::json!(["FROM_IMAGE=no"]));
    other.networks[1].ipv4 = None;
    other.mounts.clear();
    let found: Vec<_> =
        compare(spec, &other, Stage::Adopted).into_iter().map(|difference| difference.at).collect();
    assert_eq!(found, ["/config/Env", "/mounts//declared", "/networks/third/ipv4"]);
}

#[tokio::test]
async fn an_address_that_cannot_be_given_is_found_out_before_the_start() {
    let engine = TestEngine::start();
    let docker = engine.connect().await;
    // The engine picks the subnet itself, and then gives no address on request.
    engine.docker(&["network", "create", "chosen"]);
    engine.docker(&["run", "-d", "--name", "box", "--network", "chosen", "probe:1", "-c", "exec sleep 1000"]);
    let spec = capture(&docker, "box").await.unwrap().spec;
    docker.remove("box").await.unwrap();
    let error = create(&docker, "box", &spec.create_request(&options(&docker))).await.unwrap_err();
    let cause = std::error::Error::source(&error).unwrap().to_string();
    assert!(cause.contains("user configured subnets"), "{error}: {cause}");
}
