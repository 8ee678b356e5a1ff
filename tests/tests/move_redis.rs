//! A Redis moves there and back while clients use it, and stays an ordinary container.

use anyhow::{Context, Result, bail, ensure};
use haulage_tests::Host;
use haulage_tests::bench::probe::Probe;
use haulage_tests::fleet::Fleet;
use haulage_tests::image;
use haulage_tests::load::wait_for_server;
use haulage_tests::resp::{Answer, Client, PATIENCE};
use haulage_tests::scenario::{Redis, nothing_left_on, only_on, system};
use haulage_tests::wait::until;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::time::Duration;

#[test]
fn a_redis_moves_there_and_back_under_load() -> Result<()> {
    system(&Fleet::builder(), |fleet| {
        let redis = Redis::start(fleet, 0, "web", 0, &[])?;
        Client::connect(redis.server())?.fill(64)?;
        for (from, to) in [(0, 1), (1, 0), (0, 1)] {
            fleet.migrate("web", from, to)?.committed()?.tracked()?;
            redis.carries_on().with_context(|| format!("after the move from {from} to {to}"))?;
            only_on(fleet, "web", to)?;
            for host in fleet.hosts() {
                nothing_left_on(host)?;
            }
        }
        let size = Client::connect(redis.server())?.call(&[b"EXISTS", b"fill:0", b"fill:65535"])?;
        ensure!(size == Answer::Number(2), "the data is not whole: {size:?}");
        println!("longest gap {:?}", redis.finish()?);
        Ok(())
    })
}

#[test]
fn clients_that_connect_all_the_time_do_not_stop_a_move() -> Result<()> {
    system(&Fleet::builder(), |fleet| {
        let redis = Redis::start(fleet, 0, "web", 0, &[])?;
        // Some of its connections always wait to be accepted when the container is frozen.
        let newcomer = Probe::reconnecting(redis.server())?;
        newcomer.progress(100, PATIENCE)?;
        fleet.migrate("web", 0, 1)?.committed()?;
        newcomer.progress(100, PATIENCE)?;
        redis.carries_on()?;
        redis.finish().map(drop)
    })
}

/// What must be the same after a move, as places in the answer of `docker inspect`.
const KEPT: [&str; 12] = [
    "/Name",
    "/Image",
    "/Config/Env",
    "/Config/Cmd",
    "/Config/Labels",
    "/Config/User",
    "/Config/Hostname",
    "/HostConfig/RestartPolicy",
    "/HostConfig/Memory",
    "/HostConfig/LogConfig",
    "/NetworkSettings/Networks/lan/IPAddress",
    "/NetworkSettings/Networks/lan/MacAddress",
];

#[test]
fn a_moved_container_is_an_ordinary_container() -> Result<()> {
    system(&Fleet::builder(), |fleet| {
        let arguments =
            ["--label", "tier=cache", "--env", "COLOUR=blue", "--hostname", "cache-1", "--memory", "300m"];
        let arguments: Vec<&str> = arguments.into_iter().chain(["--restart", "unless-stopped"]).collect();
        let redis = Redis::start(fleet, 0, "web", 0, &arguments)?;
        let before = fleet.host(0).inspect("web")?;
        let logged = fleet.host(0).docker(&["logs", "web"])?;
        ensure!(logged.contains("Ready to accept connections"), "no log before the move: {logged}");

        fleet.migrate("web", 0, 1)?.committed()?;
        redis.carries_on()?;
        let target = fleet.host(1);
        let after = target.inspect("web")?;
        for place in KEPT {
            let (was, is) = (before.pointer(place), after.pointer(place));
            ensure!(was.is_some_and(|v| *v != Value::Null), "{place} is not in the answer");
            ensure!(was == is, "{place} was {was:?} and is {is:?}");
        }
        ensure!(target.docker(&["logs", "web"])?.starts_with(&logged), "the log has not come along");
        ensure!(target.docker(&["exec", "web", "sh", "-c", "echo $COLOUR; hostname"])? == "blue\ncache-1");
        redis.finish()?;
        in_its_own_cgroup(target, "web")?;

        its_end_is_told(target, "web")?;
        let pid = target.init_pid("web")?;
        target.docker(&["restart", "--time", "5", "web"])?;
        ensure!(target.init_pid("web")? != pid, "restart did not start a new process");
        let server = std::net::SocketAddr::from((fleet.container_address(0), 6379));
        wait_for_server(server)?;
        let fresh = Client::connect(server)?.call(&[b"GET", b"count"])?;
        ensure!(fresh == Answer::Value(None), "a restart brought the moved state back: {fresh:?}");
        target.docker(&["stop", "--time", "5", "web"])?;
        ensure!(!target.is_running("web")?);
        target.docker(&["rm", "web"])?;
        ensure!(!target.has_container("web")?);
        Ok(())
    })
}

/// Kills the container's first process, which is the one that was restored: the engine must know how it ended, and do what
/// the restart policy says.
fn its_end_is_told(host: &Host, container: &str) -> Result<()> {
    let pid = host.init_pid(container)?;
    kill_process(Pid::from_raw(pid.try_into()?).context("no process")?, Signal::KILL)?;
    until("the restart by its policy", Duration::from_secs(20), || {
        let count = host.inspect(container)?.pointer("/RestartCount").and_then(Value::as_u64);
        Ok((count == Some(1) && host.init_pid(container).is_ok_and(|new| new != pid)).then_some(()))
    })?;
    let died = ["--filter", "event=die", "--format", "{{.Actor.Attributes.exitCode}}"];
    let filter = format!("container={container}");
    // Since the first second of 1970, and until this one is over.
    let events = ["events", "--since", "1", "--until", "-1s", "--filter", &filter];
    let codes = host.docker(&[&events[..], &died].concat())?;
    ensure!(codes.lines().last() == Some("137"), "it ended with {codes:?}");
    Ok(())
}

/// Fails unless the container's first process is in the cgroup that the host's engine has made for it, with the limit
/// that it was run with.
fn in_its_own_cgroup(host: &Host, container: &str) -> Result<()> {
    let id = host.docker(&["container", "inspect", "--format", "{{.Id}}", container])?;
    let groups = std::fs::read_to_string(format!("/proc/{}/cgroup", host.init_pid(container)?))?;
    let path_in = |hierarchy: &str| groups.lines().find_map(|line| Some(line.split_once(hierarchy)?.1));
    let (path, limit) = match (path_in(":memory:"), path_in("0::")) {
        (Some(path), _) => (path, format!("/sys/fs/cgroup/memory{path}/memory.limit_in_bytes")),
        (None, Some(path)) => (path, format!("/sys/fs/cgroup{path}/memory.max")),
        (None, None) => bail!("no cgroup: {groups}"),
    };
    ensure!(path.contains(&id), "{container} ({id}) is in other cgroups:\n{groups}");
    let limit = std::fs::read_to_string(limit)?;
    ensure!(limit.trim() == (300 << 20).to_string(), "the limit is {limit}");
    Ok(())
}

#[test]
fn a_confined_container_moves_and_stays_confined() -> Result<()> {
    system(&Fleet::builder(), |fleet| {
        let arguments = ["--cap-drop", "ALL", "--security-opt", "no-new-privileges"];
        let redis = Redis::start(fleet, 0, "web", 0, &arguments)?;
        let confined = ["Seccomp:\t2", "CapEff:\t0000000000000000", "NoNewPrivs:\t1"];
        ensure_status(fleet, 0, &confined)?;
        let profile = apparmor_profile(fleet, 0)?;
        fleet.migrate("web", 0, 1)?.committed()?;
        redis.carries_on()?;
        ensure_status(fleet, 1, &confined)?;
        let after = apparmor_profile(fleet, 1)?;
        ensure!(after == profile, "confined by {after:?}, before the move by {profile:?}");
        println!("AppArmor profile: {profile:?}");
        redis.finish().map(drop)
    })
}

/// A container of another user than root. CRIU reads its resource limits, for which the kernel wants
/// `CAP_SYS_RESOURCE`: where this machine does not have it, the container must be refused and go on.
#[test]
fn a_non_root_container_moves_or_is_refused_for_want_of_a_capability() -> Result<()> {
    system(&Fleet::builder(), |fleet| {
        let redis = Redis::start(fleet, 0, "web", 0, &["--user", "999:999", "--cap-drop", "ALL"])?;
        let confined = ["Uid:\t999\t", "Seccomp:\t2", "CapEff:\t0000000000000000"];
        ensure_status(fleet, 0, &confined)?;
        let moved = fleet.migrate("web", 0, 1)?;
        let at = if has_sys_resource()? {
            moved.committed()?;
            1
        } else {
            ensure!(
                moved.code == "lacks_capability" && !moved.remedy.is_empty(),
                "not refused: {}",
                moved.result
            );
            println!("refused: this machine lacks CAP_SYS_RESOURCE");
            0
        };
        redis.carries_on()?;
        only_on(fleet, "web", at)?;
        ensure_status(fleet, at, &confined)?;
        redis.finish().map(drop)
    })
}

fn ensure_status(fleet: &Fleet, host: usize, lines: &[&str]) -> Result<()> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", fleet.host(host).init_pid("web")?))?;
    ensure!(lines.iter().all(|line| status.contains(line)), "not confined by {lines:?}:\n{status}");
    Ok(())
}

/// The AppArmor profile that confines the container; none where the machine has no AppArmor.
fn apparmor_profile(fleet: &Fleet, host: usize) -> Result<Option<String>> {
    let file = format!("/proc/{}/attr/apparmor/current", fleet.host(host).init_pid("web")?);
    // Without AppArmor the file is not there, or cannot be read.
    Ok(std::fs::read_to_string(file).ok().map(|profile| profile.trim_end().to_owned()))
}

fn has_sys_resource() -> Result<bool> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:")).context("no CapEff")?;
    Ok(u64::from_str_radix(effective.trim(), 16)? & (1 << 24) != 0)
}

#[test]
fn an_image_that_the_target_lacks_comes_along() -> Result<()> {
    system(&Fleet::builder().without_images(1), |fleet| {
        let target = fleet.host(1);
        ensure!(
            target.docker(&["image", "ls", "--quiet"])?.is_empty(),
            "the target has images to begin with"
        );
        let redis = Redis::start(fleet, 0, "web", 0, &[])?;
        fleet.migrate("web", 0, 1)?.committed()?;
        redis.carries_on()?;
        let id =
            |host: usize| fleet.host(host).docker(&["image", "inspect", "--format", "{{.Id}}", image::REDIS]);
        ensure!(id(0)? == id(1)?, "the image has another id on the target");
        redis.finish().map(drop)
    })
}
