//! The source role: track, read, send.

use std::net::SocketAddr;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use haulage_pages::PageBatch;
use haulage_pages::source::{self as pages, SourceEngine, SourceError, SourceOptions, TrackerReport};
use haulage_pages::track::Method;
use haulage_protocol::fault::{Fault, code};
use haulage_protocol::id::{MigrationId, Round};
use haulage_protocol::page_shipper::{
    FinalReport, RoundReport, RunRound, StartTracking, TrackingStarted, Untracked,
};
use haulage_protocol::unit::{Bytes as Size, Micros, Pages};
use haulage_transport::stream::{BulkConnection, FrameKind, Hello, SessionKey};
use tokio::sync::mpsc;

use crate::PageShipper;
use crate::failure::{TRACKING, fault, no_session, stream};
use crate::wire::{BATCH, FAILED, FINISH, FINISHED, Finished, MANIFEST, OK, ROLE, ROUND_END};

/// Batches (a MiB each) that wait for the connection: enough to keep it busy while the next is read.
const BATCHES_AHEAD: usize = 4;
/// How long the target may take to store what it was sent.
const ANSWER_WITHIN: Duration = Duration::from_secs(120);

/// A migration's memory, where it leaves.
pub(crate) struct Session {
    engine: SourceEngine,
    connection: BulkConnection,
    rounds: u32,
}

pub(crate) async fn start(
    service: Arc<PageShipper>,
    migration: MigrationId,
    ask: StartTracking,
) -> Result<TrackingStarted, Fault> {
    let address: SocketAddr = ask.address.parse().map_err(fault(code::MALFORMED))?;
    let token = ask.token.reveal().parse().map_err(fault(code::MALFORMED))?;
    let hello = Hello { session: SessionKey::new(migration.as_str(), ROLE), token };
    let connection = BulkConnection::connect(address, &hello).await.map_err(|error| stream(&error))?;
    let procs = ask.cgroup_procs;
    let begun = tokio::task::spawn_blocking(move || {
        SourceEngine::begin(Path::new(&procs), SourceOptions::default()).map_err(fault(TRACKING))
    });
    let (engine, report) = begun.await.map_err(fault(code::INTERNAL))??;
    let mut sources = service.sources.lock().unwrap_or_else(PoisonError::into_inner);
    // A session of an earlier try is dropped, and its trackers with it.
    sources.insert(migration, Session { engine, connection, rounds: 0 });
    Ok(started(report))
}

fn started(report: TrackerReport) -> TrackingStarted {
    let untracked = report.processes.iter().filter_map(|process| {
        let reason = process.untracked()?.to_string();
        Some(Untracked { pid: process.process.pid.as_raw_nonzero().get(), reason })
    });
    TrackingStarted {
        untracked: untracked.collect(),
        tracker: match report.method {
            Method::WriteProtect => "write_protect".to_owned(),
            Method::None => "none".to_owned(),
        },
        reason: report.kernel,
    }
}

impl PageShipper {
    fn take_source(&self, migration: &MigrationId) -> Result<Session, Fault> {
        let mut sources = self.sources.lock().unwrap_or_else(PoisonError::into_inner);
        sources.remove(migration).ok_or_else(|| no_session("source"))
    }

    fn put_source(&self, migration: MigrationId, session: Session) {
        self.sources.lock().unwrap_or_else(PoisonError::into_inner).insert(migration, session);
    }
}

pub(crate) async fn round(
    service: Arc<PageShipper>,
    migration: MigrationId,
    ask: RunRound,
) -> Result<RoundReport, Fault> {
    // A session whose round failed is not put back: its connection is of no more use.
    let Session { engine, mut connection, rounds } = service.take_source(&migration)?;
    let (began, before) = (Instant::now(), traffic(&connection));
    let (engine, report) = ship(engine, &mut connection, SourceEngine::round).await?;
    answered(&mut connection, ROUND_END, OK).await?;
    let report = told(ask.round, &report, traffic(&connection) - before, began.elapsed());
    service.put_source(migration, Session { engine, connection, rounds: rounds.saturating_add(1) });
    Ok(report)
}

pub(crate) async fn final_round(
    service: Arc<PageShipper>,
    migration: MigrationId,
) -> Result<FinalReport, Fault> {
    let Session { engine, mut connection, rounds } = service.take_source(&migration)?;
    let (began, before) = (Instant::now(), traffic(&connection));
    let (engine, (manifest, report)) = ship(engine, &mut connection, SourceEngine::final_round).await?;
    for part in manifest.encode() {
        connection.send(MANIFEST, part.into()).await.map_err(|error| stream(&error))?;
    }
    let finished = answered(&mut connection, FINISH, FINISHED).await?;
    let finished: Finished = serde_json::from_slice(&finished).map_err(fault(code::MALFORMED))?;
    let round = told(Round(rounds), &report, traffic(&connection) - before, began.elapsed());
    service.put_source(migration, Session { engine, connection, rounds });
    Ok(FinalReport { round, total: finished.pages, dropped: finished.dropped })
}

fn traffic(connection: &BulkConnection) -> u64 {
    connection.sent_bytes() + connection.received_bytes()
}

fn told(round: Round, report: &pages::RoundReport, wire: u64, took: Duration) -> RoundReport {
    RoundReport {
        round,
        dirty: Pages(report.dirty_pages),
        sent: Pages(report.data_pages.saturating_add(report.zero_pages)),
        zero: Pages(report.zero_pages),
        withheld: Pages(report.pending_pages),
        wire: Size(wire),
        scan: Micros::from_duration(report.scan),
        took: Micros::from_duration(took),
    }
}

/// Runs `work` of the engine on a thread of its own and sends what it reads, with backpressure: the reader waits
/// for the connection, never the other way round for long.
async fn ship<T, W>(
    mut engine: SourceEngine,
    connection: &mut BulkConnection,
    work: W,
) -> Result<(SourceEngine, T), Fault>
where
    T: Send + 'static,
    W: FnOnce(&mut SourceEngine, &mut dyn FnMut(PageBatch) -> ControlFlow<()>) -> Result<T, SourceError>
        + Send
        + 'static,
{
    let (batches, mut ready) = mpsc::channel::<Vec<u8>>(BATCHES_AHEAD);
    let reading = tokio::task::spawn_blocking(move || {
        let mut sink = |batch: PageBatch| match batches.blocking_send(batch.bytes) {
            Ok(()) => ControlFlow::Continue(()),
            Err(_) => ControlFlow::Break(()),
        };
        let done = work(&mut engine, &mut sink);
        (engine, done)
    });
    let mut sent = Ok(());
    while let Some(batch) = ready.recv().await {
        sent = connection.send(BATCH, Bytes::from(batch)).await;
        if sent.is_err() {
            break;
        }
    }
    // Lets a reader that still has something see that nobody takes it.
    drop(ready);
    let (engine, done) = reading.await.map_err(fault(code::INTERNAL))?;
    if let Err(error) = sent {
        return Err(why_it_ended(connection, &error).await);
    }
    Ok((engine, done.map_err(fault(TRACKING))?))
}

/// A target that gives up says why before it closes.
async fn why_it_ended(
    connection: &mut BulkConnection,
    error: &haulage_transport::stream::StreamError,
) -> Fault {
    match connection.expect(FAILED, Duration::from_secs(1)).await {
        Ok(payload) => refused(&payload),
        Err(_) => stream(error),
    }
}

fn refused(payload: &[u8]) -> Fault {
    serde_json::from_slice(payload)
        .unwrap_or_else(|error| Fault::new(code::MALFORMED, "the target gave up, unreadably").because(&error))
}

/// Sends an empty frame of `kind` and waits for the answer.
async fn answered(
    connection: &mut BulkConnection,
    kind: FrameKind,
    answer: FrameKind,
) -> Result<Bytes, Fault> {
    connection.send(kind, Bytes::new()).await.map_err(|error| stream(&error))?;
    let frame = tokio::time::timeout(ANSWER_WITHIN, connection.recv()).await;
    let frame =
        frame.map_err(|_| Fault::new(code::UNREACHABLE, "the target does not say that it has the pages"))?;
    match frame.map_err(|error| stream(&error))? {
        Some(frame) if frame.kind == answer => Ok(frame.payload),
        Some(frame) if frame.kind == FAILED => Err(refused(&frame.payload)),
        Some(frame) => {
            Err(Fault::new(code::MALFORMED, format!("the target answered with a frame {}", frame.kind.0)))
        }
        None => Err(Fault::new(code::MALFORMED, "the target ended the connection")),
    }
}
