//! Several connections into one store, as a source makes them.

use super::*;
use haulage_pages::manifest::ManifestProcess;
use haulage_pages::process::{Generation, Vpid};
use haulage_pages::range::{PageNo, PageRange, RangeSet};
use haulage_pages::store::StoreLimits;
use haulage_protocol::id::{HostId, MigrationId};
use haulage_protocol::secret::Token;
use haulage_service::bulk::{Arrivals, Departure};
use haulage_service::config::{HostConfig, NatsConfig};

use crate::wire::CARGO;

/// A source with two connections, and the target that it talks to.
struct Session {
    first: Departure,
    second: Departure,
    _arrivals: Arrivals,
    _dir: tempfile::TempDir,
}

async fn session() -> Session {
    let dir = tempfile::tempdir().unwrap();
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
    Session { first, second, _arrivals: arrivals, _dir: dir }
}

/// A batch with one page of zeros.
fn batch(round: u32, page: u64) -> Bytes {
    let mut bytes = b"HPB2\0\0\0\0".to_vec();
    for word in [1, round, 1, 0, 1, 0] {
        bytes.extend(u32::to_le_bytes(word));
    }
    bytes.extend((page | 1 << 36 | 1 << 63).to_le_bytes());
    bytes.into()
}

fn count(batches: u64) -> Bytes {
    Bytes::copy_from_slice(&batches.to_le_bytes())
}

async fn send(to: &mut Departure, kind: FrameKind, payload: Bytes) {
    send_now(&mut to.connection, kind, payload).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_round_is_stored_when_the_batches_of_all_connections_are() {
    let Session { mut first, mut second, _arrivals, _dir } = session().await;
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
    let mut manifest = FinalManifest::default();
    let pages = RangeSet::from_iter(PageRange::with_count(PageNo(10), 4));
    manifest.processes.insert(Vpid(1), ManifestProcess { generation: Generation(1), pages });
    for part in manifest.encode() {
        send(&mut first, MANIFEST, part.into()).await;
    }
    send(&mut first, FINISH, Bytes::new()).await;
    let finished = first.answer(FINISHED, "all pages").await.unwrap();
    assert_eq!(serde_json::from_slice::<Finished>(&finished).unwrap().pages, Pages(4));
}

/// What the first connection is told after the second one has brought this.
async fn told_after(kind: FrameKind, payload: Bytes) -> String {
    let Session { mut first, mut second, _arrivals, _dir } = session().await;
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
    let Session { mut first, second, _arrivals, _dir } = session().await;
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
        let Session { mut first, second: _second, _arrivals, _dir } = session().await;
        send(&mut first, BATCH, batch(1, 10)).await;
        send(&mut first, COMPLETE, count(1)).await;
        send(&mut first, kind, payload).await;
        assert_eq!(first.answer(OK, "the pages").await.unwrap_err().code.as_str(), code);
    }
}
