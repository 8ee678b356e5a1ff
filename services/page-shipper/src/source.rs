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
    Encoding, FinalReport, FinalRound, RoundReport, RunRound, StartTracking, TrackingStarted, Untracked,
};
use haulage_protocol::policy::Policy;
use haulage_protocol::secret::Token;
use haulage_protocol::unit::{Bytes as Size, Micros, Pages};
use haulage_service::bulk::{Departure, pace};
use haulage_transport::stream::Pace as Limit;

use crate::PageShipper;
use crate::debt::Debt;
use crate::failure::{TRACKING, fault, no_session};
use crate::lanes::Lanes;
use crate::watched::Watch;
use crate::wire::{CARGO, FINISH, FINISHED, Finished, MANIFEST, OK, OWED, ROUND_END};

/// A migration's memory, where it leaves.
pub(crate) struct Session {
    engine: SourceEngine,
    lanes: Lanes,
    rounds: u32,
    way: Way,
    /// After the engine: what it tracks is free when this is gone.
    watch: Watch,
}

/// How a further connection to the target is made.
struct Way {
    address: String,
    token: Token,
    pace: Option<Arc<Limit>>,
}

impl Way {
    async fn connect(&self, migration: &MigrationId) -> Result<Departure, Fault> {
        let mut to = Departure::connect_more(&self.address, migration, &self.token, CARGO).await?;
        if let Some(pace) = &self.pace {
            to.connection.keep_pace(pace.clone());
        }
        Ok(to)
    }
}

pub(crate) async fn start(
    service: Arc<PageShipper>,
    migration: MigrationId,
    ask: StartTracking,
) -> Result<TrackingStarted, Fault> {
    let pace = pace(&service.config, &migration, ask.transfer.bandwidth).await?;
    let lanes = Lanes::connect(&migration, &ask, pace.clone()).await?;
    let way = Way { address: ask.address, token: ask.token, pace };
    let (procs, policy) = (ask.cgroup_procs, transfer(ask.policy));
    let (watched, id) = (service.watched.clone(), migration.clone());
    let begun = tokio::task::spawn_blocking(move || {
        let watch = watched.migrate(&procs, id);
        let begun = SourceEngine::begin(Path::new(&procs), SourceOptions { policy });
        let begun = begun.and_then(|(mut engine, report)| engine.watch().map(|()| (watch, engine, report)));
        begun.map_err(fault(TRACKING))
    });
    let (watch, engine, report) = begun.await.map_err(fault(code::INTERNAL))??;
    let mut sources = service.sources.lock().unwrap_or_else(PoisonError::into_inner);
    // A session of an earlier try is dropped, and its trackers with it.
    sources.insert(migration, Session { engine, lanes, rounds: 0, way, watch });
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
        tracker: name_of(report.method).to_owned(),
        reason: report.kernel,
    }
}

pub(crate) fn name_of(method: Method) -> &'static str {
    match method {
        Method::WriteProtect => "write_protect",
        Method::SoftDirty => "soft_dirty",
        Method::None => "none",
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

    fn owe(&self, migration: MigrationId, debt: Debt) {
        self.debts.lock().unwrap_or_else(PoisonError::into_inner).insert(migration, debt);
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
    let Session { engine, mut lanes, rounds, way, watch } = service.take_source(&migration)?;
    let (began, before) = (Instant::now(), lanes.traffic());
    #[allow(clippy::cast_precision_loss, reason = "an estimate")]
    let rate = ask.rate.map(|pages| pages.0 as f64);
    let interval = Duration::from_micros(ask.interval.0);
    let within = ask.within.map(|within| Duration::from_micros(within.since(ask.pause).0));
    let pace = Pace { rate, allowance: ask.allowance.0, last: ask.last, interval, within };
    // A round that is to last has no haste.
    let modest = !ask.last && ask.interval > Micros(0);
    let shipped = lanes.ship(engine, modest, move |engine, sink| engine.round(pace, sink));
    let (engine, report, encoding) = shipped.await?;
    lanes.settle().await?;
    lanes.first()?.send_now(ROUND_END, Bytes::new()).await?;
    lanes.first()?.answer(OK, "the pages").await?;
    let wire = lanes.traffic().saturating_sub(before);
    let report = told(ask.round, &report, encoding, wire, began.elapsed());
    service.put_source(migration, Session { engine, lanes, rounds: rounds.saturating_add(1), way, watch });
    Ok(report)
}

pub(crate) async fn final_round(
    service: Arc<PageShipper>,
    migration: MigrationId,
    ask: FinalRound,
) -> Result<FinalReport, Fault> {
    let Session { engine, mut lanes, rounds, way, watch } = service.take_source(&migration)?;
    let (began, before) = (Instant::now(), lanes.traffic());
    let shipped = lanes.ship(engine, false, move |engine, sink| match ask.post_copy {
        true => engine.final_round_owing(sink).map(|(manifest, owed, report)| (manifest, Some(owed), report)),
        false => engine.final_round(sink).map(|(manifest, report)| (manifest, None, report)),
    });
    let further = async { if ask.post_copy { way.connect(&migration).await.map(Some) } else { Ok(None) } };
    let (shipped, further) = tokio::join!(shipped, further);
    let (engine, (manifest, owed, report), encoding) = shipped?;
    // Where nothing is owed after all, this stays open until the target has all: a connection that ends is an error there.
    let (further, owed) = (further?, owed.filter(|owed| owed.pages() > 0));
    lanes.settle().await?;
    for part in manifest.encode() {
        lanes.send(MANIFEST, part.into()).await?;
    }
    if let Some(owed) = &owed {
        for part in owed.manifest().encode() {
            lanes.send(OWED, part.into()).await?;
        }
    }
    lanes.first()?.send_now(FINISH, Bytes::new()).await?;
    let finished = lanes.first()?.answer(FINISHED, "all pages").await?;
    let finished: Finished = serde_json::from_slice(&finished).map_err(fault(code::MALFORMED))?;
    let wire = lanes.traffic().saturating_sub(before);
    let round = told(Round(rounds), &report, encoding, wire, began.elapsed());
    let (total, dropped) = (finished.pages, finished.dropped);
    let due = owed.as_ref().map_or(0, |owed| owed.pages());
    match owed.zip(further) {
        Some((owed, urgent)) => service.owe(migration, Debt::new(engine, watch, owed, lanes, urgent)),
        None => service.put_source(migration, Session { engine, lanes, rounds, way, watch }),
    }
    Ok(FinalReport { round, total, dropped, owed: Pages(due) })
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
