//! Several connections into one store, as a source makes them.

use super::*;
use haulage_pages::link::Link;
use haulage_pages::manifest::ManifestProcess;
use haulage_pages::object::Label;
use haulage_pages::owed::{Ask, Word};
use haulage_pages::process::{Generation, Vpid};
use haulage_pages::range::{PageNo, PageRange, RangeSet};
use haulage_pages::store::StoreLimits;
use haulage_protocol::id::{HostId, MigrationId};
use haulage_protocol::secret::Token;
use haulage_service::bulk::{Arrivals, Departure};
use haulage_service::config::{HostConfig, NatsConfig};
use haulage_transport::stream::FrameKind;

use crate::wire::{CARGO, WANTED};

/// A source with two connections, and the target that it talks to.
struct Session {
    first: Departure,
    second: Departure,
    _arrivals: Arrivals,
    dir: tempfile::TempDir,
}

async fn session() -> Session {
    session_in(tempfile::tempdir().unwrap()).await
}

async fn session_in(dir: tempfile::TempDir) -> Session {
    let config = HostConfig {
        nats: NatsConfig { nats: String::new() },
        host: "here".parse::<HostId>().unwrap(),
        state_dir: Default::default(),
        page_dir: Default::default(),
        docker: String::new(),
        bucket: String::new(),
        bulk_listen: ([127, 0, 0, 1], 0).into(),
        bulk_advertise: None,
    };
    let arrivals = Arrivals::bind(&config, CARGO).await.unwrap();
    let (migration, token) = (MigrationId::generate(), Token::generate());
    let engine = TargetEngine::create(&dir.path().join("store"), StoreLimits::default()).unwrap();
    let more = arrivals.more(&migration, &token).unwrap();
    arrivals.open(migration.clone(), &token, Arrival { engine, more, keep: Arc::default() }).unwrap();
    let address = arrivals.address().to_string();
    let stranger = Departure::connect_more(&address, &migration, &Token::generate(), CARGO).await;
    assert_eq!(stranger.unwrap_err().code.as_str(), "wrong_token");
    let first = Departure::connect(&address, &migration, &token, CARGO).await.unwrap();
    let second = Departure::connect_more(&address, &migration, &token, CARGO).await.unwrap();
    Session { first, second, _arrivals: arrivals, dir }
}

/// A batch with one page of zeros.
fn batch(round: u32, page: u64) -> Bytes {
    let mut bytes = b"HPB4\0\0\0\0".to_vec();
    for word in [1, round, 1, 0, 1, 0] {
        bytes.extend(u32::to_le_bytes(word));
    }
    bytes.extend((page | 1 << 36).to_le_bytes());
    bytes.into()
}

/// Pages with data that a batch may have.
const PAGES: u64 = haulage_pages::frame::MAX_DATA_PAGES as u64;

/// As many of them.
fn full_batch(page: u64) -> Bytes {
    let mut bytes = batch(1, 0).to_vec();
    // The last word of the header is the length of the data, and the run comes behind them.
    bytes.truncate(bytes.len() - size_of::<u64>() - size_of::<u32>());
    bytes.extend(((PAGES << 12) as u32).to_le_bytes());
    bytes.resize(bytes.len() + (PAGES << 12) as usize, 7);
    bytes.extend((page | PAGES << 36 | 0b1111 << 56).to_le_bytes());
    bytes.into()
}

fn count(batches: u64) -> Bytes {
    Bytes::copy_from_slice(&batches.to_le_bytes())
}

async fn send(to: &mut Departure, kind: FrameKind, payload: Bytes) {
    to.send_now(kind, payload).await.unwrap();
}

/// A manifest of some pages of one process.
fn manifest(first: u64, count: u64) -> FinalManifest {
    let pages = RangeSet::from_iter(PageRange::with_count(PageNo(first), count));
    let processes =
        [(Vpid(1), ManifestProcess { generation: Generation(1), label: Label::default(), pages })];
    FinalManifest { processes: processes.into() }
}

/// A session in which one page has come and one is owed, and its page server's end.
async fn owing() -> (Session, Link) {
    let mut session = session().await;
    let first = &mut session.first;
    send(first, BATCH, batch(1, 10)).await;
    send(first, COMPLETE, count(1)).await;
    for (kind, manifest) in [(MANIFEST, manifest(10, 2)), (OWED, manifest(11, 1))] {
        for part in manifest.encode() {
            send(first, kind, part.into()).await;
        }
    }
    send(first, FINISH, Bytes::new()).await;
    first.answer(FINISHED, "all pages").await.unwrap();
    let link = Link::connect(&session.dir.path().join("store")).unwrap();
    (session, link)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_owed_goes_to_the_page_server_whatever_connection_it_comes_on() {
    let (Session { mut first, mut second, _arrivals, dir: _dir }, mut link) = owing().await;
    let ask = Ask {
        vpid: Vpid(1),
        generation: Generation(1),
        pages: PageRange::with_count(PageNo(11), 1).unwrap(),
    };
    for word in [Word::Ask(ask), Word::Begin] {
        link.say(word).unwrap();
        let frame = first.connection.recv().await.unwrap().unwrap();
        assert_eq!((frame.kind, Word::decode(&frame.payload)), (WANTED, Some(word)));
    }
    for to in [&mut first, &mut second] {
        send(to, BATCH, batch(1, 11)).await;
        let received = tokio::task::block_in_place(|| link.receive().unwrap());
        assert_eq!(received, batch(1, 11));
    }
    drop(link);
    assert!(first.connection.recv().await.unwrap().is_none(), "the source is told that nothing is missing");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_is_lost_while_it_owes_pages_closes_the_page_servers_end() {
    for lost in 0..2 {
        let (Session { first, second, _arrivals, dir: _dir }, mut link) = owing().await;
        let kept = if lost == 0 { (drop(first), second).1 } else { (drop(second), first).1 };
        let error = tokio::task::block_in_place(|| link.receive().unwrap_err());
        use std::io::ErrorKind::{ConnectionReset, UnexpectedEof};
        assert!(matches!(error.kind(), UnexpectedEof | ConnectionReset), "{error}");
        drop(kept);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_round_is_stored_when_the_batches_of_all_connections_are() {
    let Session { mut first, mut second, _arrivals, dir: _dir } = session().await;
    send(&mut first, BATCH, batch(1, 10)).await;
    send(&mut first, COMPLETE, count(3)).await;
    send(&mut first, ROUND_END, Bytes::new()).await;
    let early = std::time::Duration::from_millis(50);
    assert!(tokio::time::timeout(early, first.connection.recv()).await.is_err(), "two batches have not come");
    // That receive was given up before anything came, so nothing of a frame is lost.
    send(&mut second, BATCH, batch(1, 12)).await;
    send(&mut second, BATCH, batch(1, 11)).await;
    first.answer(OK, "the pages").await.unwrap();

    send(&mut second, BATCH, batch(2, 13)).await;
    send(&mut first, COMPLETE, count(4)).await;
    for part in manifest(10, 4).encode() {
        send(&mut first, MANIFEST, part.into()).await;
    }
    send(&mut first, FINISH, Bytes::new()).await;
    let finished = first.answer(FINISHED, "all pages").await.unwrap();
    assert_eq!(serde_json::from_slice::<Finished>(&finished).unwrap().pages, Pages(4));
}

/// What the first connection is told after the second one has brought this.
async fn told_after(kind: FrameKind, payload: Bytes) -> String {
    let Session { mut first, mut second, _arrivals, dir: _dir } = session().await;
    send(&mut second, kind, payload).await;
    first.answer(OK, "the pages").await.unwrap_err().code.as_str().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_on_any_connection_ends_the_session_and_the_source_is_told_why() {
    assert_eq!(told_after(BATCH, Bytes::from_static(b"no batch")).await, STORE.as_str());
    assert_eq!(told_after(ROUND_END, Bytes::new()).await, code::MALFORMED.as_str());
    assert_eq!(told_after(NAMED, Bytes::new()).await, code::MALFORMED.as_str());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_is_lost_ends_the_session() {
    let Session { mut first, second, _arrivals, dir: _dir } = session().await;
    drop(second);
    assert_eq!(first.answer(OK, "the pages").await.unwrap_err().code.as_str(), "truncated");
}

#[tokio::test(flavor = "multi_thread")]
async fn more_batches_than_were_counted_and_names_of_nothing_are_refused() {
    for (kind, payload, code) in [
        (COMPLETE, count(0), code::MALFORMED.as_str().to_owned()),
        (COMPLETE, Bytes::from_static(b"many"), code::MALFORMED.as_str().to_owned()),
        (NAMED, Bytes::from_static(b"no names"), STORE.as_str().to_owned()),
    ] {
        let Session { mut first, second: _second, _arrivals, dir: _dir } = session().await;
        send(&mut first, BATCH, batch(1, 10)).await;
        send(&mut first, COMPLETE, count(1)).await;
        send(&mut first, kind, payload).await;
        assert_eq!(first.answer(OK, "the pages").await.unwrap_err().code.as_str(), code);
    }
}

/// A file system of 640 KiB, unmounted when this is dropped.
struct Small(std::path::PathBuf);

impl Small {
    fn mount(dir: &std::path::Path) -> Self {
        let args = ["-t", "tmpfs", "-o", "size=640k", "none"];
        let mounted = std::process::Command::new("mount").args(args).arg(dir).status().unwrap();
        assert!(mounted.success(), "this test needs root");
        Self(dir.to_owned())
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_without_room_is_told_to_the_source_with_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let small = Small::mount(dir.path());
    let Session { mut first, second: _second, _arrivals, dir: _dir } = session_in(dir).await;
    // Dropped before the directory that it is mounted on.
    let _small = small;
    for n in 0..3 {
        send(&mut first, BATCH, full_batch(n * PAGES)).await;
    }
    send(&mut first, COMPLETE, count(3)).await;
    let fault = first.answer(OK, "the pages").await.unwrap_err();
    assert_eq!((fault.code, fault.remedy.as_deref()), (STORE, Some(crate::failure::MAKE_ROOM)));
    assert!(fault.causes.iter().any(|cause| cause.contains("No space left")), "{:?}", fault.causes);
}
