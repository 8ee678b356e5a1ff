//! Commands, tables and queues against a real NATS server that each test starts and stops.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::path::Path;
use std::process::{Child, Command as Process, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use haulage_protocol::checkpointer::{Confirm, Confirmed, Locate, Located};
use haulage_protocol::fault::{Fault, code};
use haulage_protocol::id::{Epoch, HostId, MigrationId, Step};
use haulage_protocol::job::{CancelAnswer, Job, Options};
use haulage_protocol::rpc::{Command, PENDING_AFTER, Service};
use haulage_protocol::subject;
use haulage_protocol::version::Version;
use haulage_transport::{CommandServer, Nats, Table, TableError};

/// A server on a free port; killed and removed on drop.
struct Server {
    process: Child,
    url: String,
    _dir: tempfile::TempDir,
}

impl Server {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let process = Process::new("nats-server")
            .args(["--addr", "127.0.0.1", "--port", "-1", "--jetstream", "--store_dir"])
            .arg(dir.path())
            .arg("--ports_file_dir")
            .arg(dir.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("nats-server is not installed: run deploy/setup");
        let ports = dir.path().join(format!("nats-server_{}.ports", process.id()));
        let url = read_url(&ports);
        Self { process, url, _dir: dir }
    }

    async fn connect(&self) -> Nats {
        let nats = Nats::connect(&self.url, "test").await.unwrap();
        nats.ensure().await.unwrap();
        nats
    }
}

fn read_url(ports: &Path) -> String {
    let deadline = Instant::now() + Duration::from_secs(10);
    while Instant::now() < deadline {
        let written = std::fs::read(ports).ok().and_then(|raw| serde_json::from_slice(&raw).ok());
        let ports: Option<serde_json::Value> = written;
        if let Some(url) = ports.as_ref().and_then(|ports| ports["nats"][0].as_str()) {
            return url.to_owned();
        }
        std::thread::yield_now();
    }
    panic!("the NATS server did not start");
}

impl Drop for Server {
    fn drop(&mut self) {
        let _gone = self.process.kill();
        let _reaped = self.process.wait();
    }
}

fn host() -> HostId {
    "host-a".parse().unwrap()
}

fn command<R>(epoch: u64, step: u64, body: R) -> Command<R> {
    let (migration, step) = ("m1".parse().unwrap(), Step(step));
    Command { version: Version::CURRENT, migration, epoch: Epoch(epoch), step, floor: step, body }
}

const SILENCE: Duration = Duration::from_millis(300);

#[tokio::test]
async fn a_command_runs_once_however_often_it_is_asked_and_however_long_it_takes() {
    let server = Server::start();
    let nats = server.connect().await;
    let mut serving = CommandServer::start(&nats, &host(), Service::Checkpointer).await.unwrap();
    let runs = Arc::new(AtomicU32::new(0));
    let (seen, gate) = (runs.clone(), Arc::new(tokio::sync::Notify::new()));
    let opened = gate.clone();
    serving
        .answer::<Confirm, _, _>(move |_, _| {
            let (seen, opened) = (seen.clone(), opened.clone());
            async move {
                seen.fetch_add(1, Ordering::SeqCst);
                opened.notified().await;
                Ok(Confirmed {})
            }
        })
        .await
        .unwrap();
    let asked = command(1, 1, Confirm {});
    let (host, patient) = (host(), SILENCE);
    let first = nats.call(&host, &asked, patient);
    let second = nats.call(&host, &asked, patient);
    let open = async {
        // Longer than a service works before it says that it is still at work.
        tokio::time::sleep(PENDING_AFTER + Duration::from_millis(200)).await;
        gate.notify_one();
    };
    let (first, second, ()) = tokio::join!(first, second, open);
    assert_eq!((first, second), (Ok(Confirmed {}), Ok(Confirmed {})));
    assert_eq!(nats.call(&host, &asked, patient).await, Ok(Confirmed {}));
    assert_eq!(runs.load(Ordering::SeqCst), 1);
    let stale = nats.call(&host, &command(0, 2, Confirm {}), patient).await.unwrap_err();
    assert_eq!(stale.code, code::STALE_EPOCH);
    serving.stop().await;
    let gone = nats.call(&host, &command(1, 3, Confirm {}), patient).await.unwrap_err();
    assert_eq!(gone.code, code::UNREACHABLE);
    assert!(gone.remedy.is_some());
}

#[tokio::test]
async fn failures_are_answered_and_tried_again_and_garbage_is_refused() {
    let server = Server::start();
    let nats = server.connect().await;
    let mut serving = CommandServer::start(&nats, &host(), Service::Checkpointer).await.unwrap();
    let tries = Arc::new(AtomicU32::new(0));
    serving
        .answer::<Locate, _, _>(move |_, _| {
            let tries = tries.clone();
            async move {
                match tries.fetch_add(1, Ordering::SeqCst) {
                    0 => Err(Fault::new(code::INTERNAL, "first try").remedy("again")),
                    1 => panic!("second try: a defect"),
                    _ => Ok(Located { container: None, name: None }),
                }
            }
        })
        .await
        .unwrap();
    let asked = command(1, 1, Locate { container: "web".into() });
    assert_eq!(nats.call(&host(), &asked, SILENCE).await.unwrap_err().message, "first try");
    assert_eq!(nats.call(&host(), &asked, SILENCE).await.unwrap_err().code, code::INTERNAL);
    assert_eq!(nats.call(&host(), &asked, SILENCE).await, Ok(Located { container: None, name: None }));
    // What strangers may send, on a plain connection.
    let plain = async_nats::connect(&server.url).await.unwrap();
    let subject = subject::Subject::command::<Locate>(&host()).to_string();
    for garbage in ["", "{", "{\"version\":1}", "{\"version\":77}"] {
        let answer = plain.request(subject.clone(), garbage.into()).await.unwrap();
        let answer: serde_json::Value = serde_json::from_slice(&answer.payload).unwrap();
        let expected = if garbage.contains("77") { "foreign_version" } else { "malformed_message" };
        assert_eq!(answer["fault"]["code"], expected, "{garbage}");
    }
    serving.stop().await;
}

#[tokio::test]
async fn tables_compare_and_set() {
    let server = Server::start();
    let nats = server.connect().await;
    let table: Table<u32> = Table::open(&nats, subject::MIGRATIONS).await.unwrap();
    assert!(table.get("k").await.unwrap().is_none());
    let first = table.create("k", &1).await.unwrap();
    assert!(matches!(table.create("k", &9).await, Err(TableError::Conflict(_))));
    let mut states = table.watch("k").await.unwrap();
    let second = table.update("k", &2, first).await.unwrap();
    assert!(matches!(table.update("k", &9, first).await, Err(TableError::Conflict(_))));
    assert_eq!(table.get("k").await.unwrap(), Some((2, second)));
    table.create("other", &7).await.unwrap();
    let mut all = table.list().await.unwrap();
    all.sort();
    assert_eq!(all, [("k".to_owned(), 2), ("other".to_owned(), 7)]);
    assert!(table.remove("k", first).await.is_err());
    table.remove("k", second).await.unwrap();
    assert!(table.get("k").await.unwrap().is_none());
    table.create("k", &3).await.expect("a removed key can be made again");
    let mut watched = vec![states.next().await.unwrap().unwrap()];
    while watched.last() != Some(&3) {
        watched.push(states.next().await.unwrap().unwrap());
    }
    // A bucket keeps the newest state only, so a watcher may skip older ones; it never goes back.
    assert!(watched.is_sorted(), "{watched:?}");
}

#[tokio::test]
async fn an_entry_is_erased_without_a_trace_unless_it_was_written_since() {
    let server = Server::start();
    let nats = server.connect().await;
    let table: Table<u32> = Table::open(&nats, subject::MIGRATIONS).await.unwrap();
    let (first, other) = (table.create("k", &1).await.unwrap(), table.create("other", &7).await.unwrap());
    let second = table.update("k", &2, first).await.unwrap();
    table.erase("k", first).await.unwrap();
    assert_eq!(table.get("k").await.unwrap(), Some((2, second)));
    table.erase("k", second).await.unwrap();
    assert_eq!(table.revisions().await.unwrap(), [("other".to_owned(), 7, other)]);
    let stream = async_nats::jetstream::new(async_nats::connect(&server.url).await.unwrap())
        .get_stream(format!("KV_{}", subject::MIGRATIONS))
        .await
        .unwrap();
    assert_eq!(stream.cached_info().state.messages, 1, "a trace of it is left");
    table.create("k", &3).await.expect("an erased key can be made again");
}

#[tokio::test]
async fn a_job_is_delivered_until_it_is_done_and_submitted_once() {
    let server = Server::start();
    let nats = server.connect().await;
    let job = Job {
        version: Version::CURRENT,
        id: MigrationId::generate(),
        container: "web".into(),
        from: None,
        to: "b".parse().unwrap(),
        options: Options::default(),
    };
    nats.submit(&job).await.unwrap();
    nats.submit(&job).await.unwrap();
    let mut jobs = nats.jobs().await.unwrap();
    let delivery = jobs.next().await.unwrap().unwrap();
    assert_eq!(delivery.job().unwrap(), job);
    delivery.heartbeat().await.unwrap();
    delivery.give_back().await.unwrap();
    let again = jobs.next().await.unwrap().unwrap();
    assert_eq!(again.job().unwrap(), job);
    again.done().await.unwrap();
    let none = tokio::time::timeout(Duration::from_millis(300), jobs.next()).await;
    assert!(none.is_err(), "delivered after it was done, or queued twice");
}

#[tokio::test]
async fn a_cancellation_reaches_the_owner_or_says_that_there_is_none() {
    let server = Server::start();
    let nats = server.connect().await;
    let id = MigrationId::generate();
    assert_eq!(nats.cancel(&id, false).await.unwrap_err().code, code::UNREACHABLE);
    let mut requests = nats.cancellations(&id).await.unwrap();
    let owner = async {
        let request = requests.next().await.unwrap();
        assert!(request.cancel.clone().unwrap().target_is_dead);
        request.answer(CancelAnswer::Accepted).await;
    };
    let (answer, ()) = tokio::join!(nats.cancel(&id, true), owner);
    assert_eq!(answer, Ok(()));
}
