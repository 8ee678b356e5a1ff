//! The source role: track, read, send.

use std::path::Path;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use haulage_pages::policy::{Pace, TransferPolicy};
use haulage_pages::source::{self as pages, SourceEngine, SourceOptions, TrackerReport};
use haulage_pages::track::Method;
use haulage_protocol::fault::{Fault, code};
use haulage_protocol::id::{MigrationId, Round};
use haulage_protocol::page_shipper::{
    Encoding, FinalReport, RoundReport, RunRound, StartTracking, TrackingStarted, Untracked,
};
use haulage_protocol::policy::Policy;
use haulage_protocol::unit::{Bytes as Size, Micros, Pages};
use haulage_service::bulk::{pace, send_now};

use crate::PageShipper;
use crate::failure::{TRACKING, fault, no_session};
use crate::lanes::Lanes;
use crate::wire::{FINISH, FINISHED, Finished, MANIFEST, OK, ROUND_END};

/// A migration's memory, where it leaves.
pub(crate) struct Session {
    engine: SourceEngine,
    lanes: Lanes,
    rounds: u32,
}

pub(crate) async fn start(
    service: Arc<PageShipper>,
    migration: MigrationId,
    ask: StartTracking,
) -> Result<TrackingStarted, Fault> {
    let pace = pace(&service.config, &migration, ask.transfer.bandwidth).await?;
    let lanes = Lanes::connect(&migration, &ask, pace).await?;
    let (procs, policy) = (ask.cgroup_procs, transfer(ask.policy));
    let begun = tokio::task::spawn_blocking(move || {
        let options = SourceOptions { policy };
        let (mut engine, report) =
            SourceEngine::begin(Path::new(&procs), options).map_err(fault(TRACKING))?;
        engine.watch().map_err(fault(TRACKING))?;
        Ok::<_, Fault>((engine, report))
    });
    let (engine, report) = begun.await.map_err(fault(code::INTERNAL))??;
    let mut sources = service.sources.lock().unwrap_or_else(PoisonError::into_inner);
    // A session of an earlier try is dropped, and its trackers with it.
    sources.insert(migration, Session { engine, lanes, rounds: 0 });
    Ok(started(report))
}

/// The rule by which rounds end is the coordinator's; here `phaul` is `all`.
fn transfer(policy: Policy) -> TransferPolicy {
    match policy {
        Policy::All | Policy::Phaul => TransferPolicy::All,
        Policy::History { window, threshold } => TransferPolicy::History { window, threshold },
        Policy::Adaptive => TransferPolicy::Adaptive,
    }
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
    // Before the session is taken: what ends a migration need not wait for this.
    tokio::time::sleep(Duration::from_micros(ask.pause.0)).await;
    // A session whose round failed is not put back: its connection is of no more use.
    let Session { engine, mut lanes, rounds } = service.take_source(&migration)?;
    let (began, before) = (Instant::now(), lanes.traffic());
    #[allow(clippy::cast_precision_loss, reason = "an estimate")]
    let rate = ask.rate.map(|pages| pages.0 as f64);
    let pace = Pace { rate, allowance: ask.allowance.0, last: ask.last };
    let (engine, report, encoding) = lanes.ship(engine, move |engine, sink| engine.round(pace, sink)).await?;
    lanes.settle().await?;
    send_now(&mut lanes.first()?.connection, ROUND_END, Bytes::new()).await?;
    lanes.first()?.answer(OK, "the pages").await?;
    let wire = lanes.traffic().saturating_sub(before);
    let report = told(ask.round, &report, encoding, wire, began.elapsed());
    service.put_source(migration, Session { engine, lanes, rounds: rounds.saturating_add(1) });
    Ok(report)
}

pub(crate) async fn final_round(
    service: Arc<PageShipper>,
    migration: MigrationId,
) -> Result<FinalReport, Fault> {
    let Session { engine, mut lanes, rounds } = service.take_source(&migration)?;
    let (began, before) = (Instant::now(), lanes.traffic());
    let (engine, (manifest, report), encoding) = lanes.ship(engine, SourceEngine::final_round).await?;
    lanes.settle().await?;
    for part in manifest.encode() {
        lanes.send(MANIFEST, part.into()).await?;
    }
    send_now(&mut lanes.first()?.connection, FINISH, Bytes::new()).await?;
    let finished = lanes.first()?.answer(FINISHED, "all pages").await?;
    let finished: Finished = serde_json::from_slice(&finished).map_err(fault(code::MALFORMED))?;
    let wire = lanes.traffic().saturating_sub(before);
    let round = told(Round(rounds), &report, encoding, wire, began.elapsed());
    service.put_source(migration, Session { engine, lanes, rounds });
    Ok(FinalReport { round, total: finished.pages, dropped: finished.dropped })
}

fn told(
    round: Round,
    report: &pages::RoundReport,
    encoding: Encoding,
    wire: u64,
    took: Duration,
) -> RoundReport {
    RoundReport {
        round,
        dirty: Pages(report.dirty_pages),
        sent: Pages(report.data_pages.saturating_add(report.zero_pages)),
        zero: Pages(report.zero_pages),
        withheld: Pages(report.pending_pages),
        left: report.left_pages.map(Pages),
        wire: Size(wire),
        scan: Micros::from_duration(report.scan),
        took: Micros::from_duration(took),
        encoding,
    }
}
