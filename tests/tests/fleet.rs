//! The fleet by itself, without Haulage's services: it stands, carries load, and goes without a trace.

use anyhow::{Context, Result, ensure};
use haulage_tests::fleet::Fleet;
use haulage_tests::leftovers::{Snapshot, left_since};
use haulage_tests::load::{Counter, Writer, wait_for_server};
use haulage_tests::process::finish;
use haulage_tests::scenario::Redis;
use haulage_tests::{dirtier, image};
use std::fs::File;
use std::net::SocketAddr;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

#[test]
fn a_fleet_carries_load_and_leaves_nothing() -> Result<()> {
    let before = Snapshot::take()?;
    let started = Instant::now();
    let fleet = Fleet::start()?;
    println!("fleet {} started in {:?}", fleet.name(), started.elapsed());

    let (a, b) = (fleet.host(0), fleet.host(1));
    for name in [image::REDIS, image::BUSYBOX, image::DIRTIER] {
        let id = |host: &haulage_tests::Host| host.docker(&["image", "inspect", "--format", "{{.Id}}", name]);
        ensure!(id(a)? == id(b)?, "{name} differs between the hosts");
    }

    let ip = fleet.container_address(0).to_string();
    a.docker(&["run", "--detach", "--name", "web", "--network", "lan", "--ip", &ip, image::REDIS])?;
    let server = SocketAddr::new(ip.parse()?, 6379);
    wait_for_server(server)?;
    let counter = Counter::start(server, "count")?;
    let writer = Writer::start(server, "w")?;
    counter.progress(300)?;
    writer.progress(300)?;
    let counted = counter.stop()?;
    counted.check()?;
    let (written, missing) = writer.stop()?;
    written.check()?;
    ensure!(missing == 0, "{missing} of {} writes are missing", written.answers);
    ensure!(a.docker(&["exec", "web", "sh", "-c", "echo $PWD"])? == "/data");

    b.docker(&["run", "--detach", "--name", "memory", image::DIRTIER, "dirtier", "16", "20"])?;
    let first = dirtier::verify(b, "memory")?;
    let second = dirtier::verify(b, "memory")?;
    ensure!(
        first.number == 1 && second.number == 2 && first.bad == 0 && second.bad == 0,
        "{first:?} {second:?}"
    );
    ensure!(second.operations > first.operations, "the program stands still: {first:?} {second:?}");

    let name = fleet.name().to_owned();
    let stopping = Instant::now();
    fleet.stop()?;
    println!("fleet {name} stopped in {:?}", stopping.elapsed());
    let left = left_since(&before, &name, Duration::from_secs(3))?;
    ensure!(left.is_empty(), "left behind:\n{}", left.join("\n"));
    Ok(())
}

/// The load clients must be able to fail: a server that forgets makes them say so.
#[test]
fn load_clients_notice_what_is_lost() -> Result<()> {
    let fleet = Fleet::builder().hosts(1).start()?;
    let ip = fleet.container_address(0).to_string();
    fleet.host(0).docker(&[
        "run",
        "--detach",
        "--name",
        "web",
        "--network",
        "lan",
        "--ip",
        &ip,
        image::REDIS,
    ])?;
    let server = SocketAddr::new(ip.parse()?, 6379);
    wait_for_server(server)?;

    let counter = Counter::start(server, "count")?;
    let writer = Writer::start(server, "w")?;
    counter.progress(20)?;
    writer.progress(20)?;
    fleet.host(0).docker(&[
        "exec",
        "web",
        "sh",
        "-c",
        "printf 'SET count 5\\r\\nDEL w:7\\r\\n' | nc -w 1 127.0.0.1 6379",
    ])?;
    let (written, missing) = writer.stop()?;
    written.check()?;
    ensure!(missing == 1, "one write was removed, {missing} were missed");
    ensure!(counter.stop()?.check().is_err(), "the counter did not notice");

    let counter = Counter::start(server, "other")?;
    counter.progress(20)?;
    fleet.host(0).docker(&["kill", "web"])?;
    ensure!(counter.progress(1).is_err(), "the counter did not notice that its connection broke");
    ensure!(counter.stop()?.check().is_err());
    fleet.stop()
}

/// The machine's CRIU, as `deploy/setup` leaves it, dumps a server in use and lets it go on. `criu check` says "looks
/// good" of versions that fail at this.
#[test]
fn criu_dumps_a_redis_in_use() -> Result<()> {
    let fleet = Fleet::builder().hosts(1).start()?;
    let host = fleet.host(0);
    let redis = Redis::start(&fleet, 0, "web", 0, &[])?;
    let id = host.docker(&["inspect", "--format", "{{.Id}}", "web"])?;
    let mut runc = host.command(Path::new("runc"));
    runc.arg("--root").arg(host.directory().join("exec/runtime-runc").join(host.name()));
    runc.args(["checkpoint", "--leave-running", "--tcp-established", "--empty-ns", "network"]);
    runc.arg("--image-path").arg(host.directory().join("images"));
    runc.arg("--work-path").arg(host.directory().join("work")).arg(id);
    finish(&mut runc)?;
    ensure!(host.directory().join("images/inventory.img").exists(), "no images");
    redis.carries_on()?;
    redis.finish()?;
    fleet.stop()
}

/// The dirtier must be able to fail: memory changed behind its back is found.
#[test]
fn the_dirtier_notices_changed_memory() -> Result<()> {
    let fleet = Fleet::builder().hosts(1).start()?;
    let host = fleet.host(0);
    host.docker(&["run", "--detach", "--name", "memory", image::DIRTIER, "dirtier", "32", "1"])?;
    ensure!(dirtier::verify(host, "memory")?.bad == 0);

    let pid = host.init_pid("memory")?;
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let ranges = maps.lines().filter(|line| line.contains(" rw-p 00000000 00:00 0")).filter_map(|line| {
        let (start, end) = line.split(' ').next()?.split_once('-')?;
        Some((u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?))
    });
    let (start, end) = ranges.max_by_key(|(start, end)| end - start).context("no private memory")?;
    let memory = File::options().write(true).open(format!("/proc/{pid}/mem"))?;
    memory.write_all_at(&[0xA5; 64 * 4096], start.midpoint(end) & !4095)?;

    let verdict = dirtier::verify(host, "memory")?;
    ensure!((60..=64).contains(&verdict.bad), "64 pages were changed, {verdict:?}");
    fleet.stop()
}
