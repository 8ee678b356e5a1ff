//! How fast pages go from a process of this machine into a store on it, over connections of this machine, beside what
//! reading alone reaches on one core. Both ends share the machine's cores, which two hosts do not.
//!
//! ```sh
//! cargo run --release -p haulage-page-shipper --example page_path -- 1024 noise auto 1
//! ```
//! MiB, `noise` or `text`, how to pack, connections, and optionally a limit (`50MB/s`). As root: a freezer group of
//! version 1 is made for the process. With `sink` for a sixth word what comes is counted and dropped, not stored.
//!
//! Before it measures it uses as much memory as it will need, and frees it: on a virtual machine a page that the machine
//! uses for the first time takes its host several times as long as all that is measured here.

#![allow(
    dead_code,
    unused_imports,
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::single_range_in_vec_init,
    reason = "a program for measuring, which borrows the service's own files"
)]

#[path = "../src/arrival.rs"]
mod arrival;
#[path = "../src/failure.rs"]
mod failure;
#[path = "../src/lanes.rs"]
mod lanes;
#[path = "../src/modest.rs"]
mod modest;
#[path = "../src/relay.rs"]
mod relay;
#[path = "../src/wire.rs"]
mod wire;

use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use haulage_pages::maps::Maps;
use haulage_pages::policy::TransferPolicy;
use haulage_pages::source::{SourceEngine, SourceOptions};
use haulage_pages::store::StoreLimits;
use haulage_pages::target::TargetEngine;
use haulage_protocol::id::MigrationId;
use haulage_protocol::page_shipper::StartTracking;
use haulage_protocol::secret::Token;
use haulage_protocol::transfer::{Rate, Transfer};
use haulage_protocol::unit;
use haulage_service::bulk::{Receive, send_now};
use haulage_sys::Pid;
use haulage_sys::vm_read::VmReader;
use haulage_transport::stream::{BulkListener, Pace, SessionKey};

const MIB: usize = 1 << 20;

/// A process full of pages, in a group of its own.
struct Full {
    child: Child,
    group: PathBuf,
}

impl Full {
    fn start(mib: &str, fill: &str) -> Self {
        let group = PathBuf::from(format!("/sys/fs/cgroup/freezer/page-path-{}", std::process::id()));
        std::fs::create_dir(&group).unwrap();
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["hold", mib, fill])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        std::fs::write(group.join("cgroup.procs"), child.id().to_string()).unwrap();
        child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
        Self { child, group }
    }
}

impl Drop for Full {
    fn drop(&mut self) {
        drop((self.child.kill(), self.child.wait()));
        drop(std::fs::remove_dir(&self.group));
    }
}

fn hold(mib: &str, fill: &str) {
    let mut state = 88_172_645_463_325_252_u64;
    let mut memory = vec![0_u8; mib.parse::<usize>().unwrap() * MIB];
    for (n, word) in memory.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        // Text: words of which most repeat.
        *word = if fill == "noise" || n % 6 == 0 { state.to_le_bytes() } else { *b"haulage " };
    }
    std::io::stdout().write_all(b"x").unwrap();
    std::io::stdout().flush().unwrap();
    drop(std::io::stdin().read(&mut [0]));
    assert!(!memory.is_empty());
}

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    if let ["hold", mib, fill] = words[..] {
        return hold(mib, fill);
    }
    haulage_sys::process::keep_freed_memory(32 << 20);
    warm_up(words[0].parse().unwrap());
    let full = Full::start(words[0], words[1]);
    let pid = Pid::from_child(&full.child);
    let mib = words[0].parse::<f64>().unwrap();
    let gb = mib * MIB as f64 / 1e9;
    println!("process_vm_readv   {:5.2} GB/s", gb / read_alone(pid));
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(path(&full, &words, gb));
}

fn warm_up(mib: usize) {
    let mut file = tempfile::tempfile_in("/dev/shm").unwrap();
    for _ in 0..mib * 5 / 2 {
        file.write_all(&[1; MIB]).unwrap();
    }
}

/// Processor time of this process so far, in seconds.
fn processor() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// Seconds to read all of it by 1 MiB, the best of three times.
fn read_alone(pid: Pid) -> f64 {
    let ranges = Maps::of(pid).unwrap().tracked_pages();
    let reader = VmReader::open(pid).unwrap();
    let mut buffer = Vec::with_capacity(MIB);
    let mut once = || {
        let started = Instant::now();
        for range in ranges.iter() {
            for start in range.addresses().step_by(MIB) {
                buffer.clear();
                let end = range.addresses().end.min(start + MIB as u64);
                reader.read(&[start..end], &mut buffer).unwrap();
            }
        }
        started.elapsed().as_secs_f64()
    };
    once().min(once()).min(once())
}

async fn path(full: &Full, words: &[&str], gb: f64) {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let listener = BulkListener::bind(([127, 0, 0, 1], 0).into()).await.unwrap();
    let (migration, token) = (MigrationId::generate(), Token::generate());
    let open = |role: &str| {
        let key = SessionKey::new(migration.as_str(), role);
        listener.open(key, token.reveal().parse().unwrap()).unwrap()
    };
    let (mut first, mut more) = (open("pages"), open("pages-more"));
    let store = dir.path().join("store");
    let engine = TargetEngine::create(&store, StoreLimits::default()).unwrap();
    let sink = words.contains(&"sink");
    let receiving = tokio::spawn(async move {
        let mut connection = first.accept().await.unwrap();
        if !sink {
            return drop(
                arrival::Arrival { engine, more, keep: Default::default() }.receive(&mut connection).await,
            );
        }
        tokio::spawn(async move {
            while let Some(mut connection) = more.accept().await {
                tokio::spawn(async move { while let Ok(Some(_)) = connection.recv().await {} });
            }
        });
        while let Ok(Some(frame)) = connection.recv().await {
            if frame.kind == wire::ROUND_END {
                send_now(&mut connection, wire::OK, Bytes::new()).await.unwrap();
            }
        }
    });
    let rate = words.get(4).and_then(|word| word.parse::<Rate>().ok());
    let transfer = Transfer {
        compress: words[2].parse().unwrap(),
        connections: words[3].parse().unwrap(),
        bandwidth: rate,
    };
    let ask = StartTracking {
        cgroup_procs: String::new(),
        address: listener.local_addr().to_string(),
        token,
        transfer,
        policy: Default::default(),
        memory: unit::Bytes((gb * 1e9) as u64),
    };
    let pace =
        rate.map(|rate| Arc::new(Pace::open(&dir.path().join("pace"), rate.bytes_per_second()).unwrap()));
    let mut lanes = lanes::Lanes::connect(&migration, &ask, pace).await.unwrap();
    // The default would end a first round after a second.
    let options = SourceOptions { policy: TransferPolicy::All };
    let procs = full.group.join("cgroup.procs");
    let (engine, report) = SourceEngine::begin(&procs, options).unwrap();
    println!("tracked by {:?}", report.method);
    let (started, used) = (Instant::now(), processor());
    let (engine, report, encoding) =
        lanes.ship(engine, false, |engine, sink| engine.round(Default::default(), sink)).await.unwrap();
    lanes.settle().await.unwrap();
    lanes.first().unwrap().send_now(wire::ROUND_END, Bytes::new()).await.unwrap();
    lanes.first().unwrap().answer(wire::OK, "the pages").await.unwrap();
    let (took, used) = (started.elapsed().as_secs_f64(), processor() - used);
    let wire = lanes.traffic() as f64 / 1e9;
    println!("whole path         {:5.2} GB/s, {took:.3} s", gb / took);
    println!("processor time     {:5.3} s for each GB, both ends together", used / gb);
    println!("on the wire        {:5.2} GB/s, {wire:.3} GB of {gb:.3} GB", wire / took);
    println!("scan {:?}, read {:?}, sink {:?}", report.scan, report.read, report.sink);
    println!("{encoding:?}");
    drop((lanes, engine));
    receiving.await.unwrap();
}
