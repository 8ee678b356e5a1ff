//! What the link between two hosts carries, for a plan.
//!
//! ```text
//! source                                 sink, on the target
//!   | PROBE*, of a burst                   |   counted and dropped
//!   | PROBE_END -------------------------> |
//!   | <------------------------ OK, u64 |   bytes so far
//!   |   … the next burst is twice as long … |
//! ```
//! The first bursts tell little: windows open, and buffers on the way take what the link does not. The last one is
//! nearly half of all, and its rate counts.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use haulage_protocol::fault::{Fault, code};
use haulage_protocol::id::MigrationId;
use haulage_protocol::page_shipper::{LinkMeasured, MeasureLink, OpenSink, PROBE_BYTES, SinkOpened};
use haulage_protocol::unit::{Bytes as Size, Micros};
use haulage_service::bulk::{Departure, Receive, send_now, stream};
use haulage_transport::stream::BulkConnection;

use crate::PageShipper;
use crate::wire::{CARGO, OK, PROBE, PROBE_END};

/// Nothing is begun that would make a measurement longer than this.
const LONGEST: Duration = Duration::from_millis(200);
/// The first burst, in bytes: half a second on a link of 1 Mbit/s.
const FIRST: u64 = 64 << 10;
/// What a frame holds.
const FRAME: usize = 1 << 20;
/// A measurement that takes longer than this has failed; a sink lasts a little longer.
const GIVEN_UP: Duration = Duration::from_secs(15);
const SINK_LASTS: Duration = Duration::from_secs(20);

pub(crate) async fn open(
    service: Arc<PageShipper>,
    migration: MigrationId,
    ask: OpenSink,
) -> Result<SinkOpened, Fault> {
    service.arrivals.close(&migration).await;
    service.arrivals.open(migration.clone(), &ask.token, Sink)?;
    let address = service.arrivals.address().to_string();
    // Nobody is asked to close it, who may be gone by then.
    tokio::spawn(async move {
        tokio::time::sleep(SINK_LASTS).await;
        service.arrivals.close(&migration).await;
    });
    Ok(SinkOpened { address })
}

/// Counts.
struct Sink;

impl Receive for Sink {
    async fn receive(self, connection: &mut BulkConnection) -> Result<(), Fault> {
        let mut bytes = 0;
        while let Some(frame) = connection.recv().await.map_err(|error| stream(&error))? {
            match frame.kind {
                PROBE => bytes += frame.payload.len() as u64,
                PROBE_END => send_now(connection, OK, Bytes::copy_from_slice(&bytes.to_le_bytes())).await?,
                other => return Err(crate::wire::out_of_place(other)),
            }
            if bytes > PROBE_BYTES.0 {
                let message = format!("more than {PROBE_BYTES} to measure a link with");
                return Err(Fault::new(code::MALFORMED, message));
            }
        }
        Ok(())
    }
}

pub(crate) async fn measure(migration: MigrationId, ask: MeasureLink) -> Result<LinkMeasured, Fault> {
    let measuring = tokio::time::timeout(GIVEN_UP, send_bursts(&migration, &ask));
    measuring.await.map_err(|_| {
        let message = format!("the link did not take {} in {} s", Size(FIRST), GIVEN_UP.as_secs());
        Fault::new(code::UNREACHABLE, message).remedy("give its rate with --rate")
    })?
}

async fn send_bursts(migration: &MigrationId, ask: &MeasureLink) -> Result<LinkMeasured, Fault> {
    let mut to = Departure::connect(&ask.address, migration, &ask.token, CARGO).await?;
    let noise = noise();
    let mut probe = Probe::default();
    while let Some(burst) = probe.next() {
        let began = Instant::now();
        let mut rest = burst;
        while rest > 0 {
            let frame = noise.slice(..noise.len().min(usize::try_from(rest).unwrap_or(usize::MAX)));
            rest = rest.saturating_sub(frame.len() as u64);
            if let Err(error) = to.connection.send(PROBE, frame).await {
                return Err(to.why_it_ended(&error).await);
            }
        }
        to.send_now(PROBE_END, Bytes::new()).await?;
        let counted = to.answer(OK, "what it was sent").await?;
        probe.took(burst, began.elapsed());
        if counted.as_ref() != probe.sent.to_le_bytes() {
            return Err(Fault::new(code::MALFORMED, "the target has counted other bytes than were sent"));
        }
    }
    to.connection.finish().await.map_err(|error| stream(&error))?;
    Ok(probe.measured())
}

/// What cannot be packed.
fn noise() -> Bytes {
    // splitmix64; what comes out need not be the same, or different, each time.
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    };
    (0..FRAME / 8).flat_map(|_| next().to_le_bytes()).collect()
}

/// How far a measurement has come.
#[derive(Debug, Default)]
struct Probe {
    sent: u64,
    elapsed: Duration,
    last: Option<(u64, Duration)>,
}

impl Probe {
    /// The next burst, unless there is no time or there are no bytes for it.
    fn next(&self) -> Option<u64> {
        let Some((bytes, took)) = self.last else { return Some(FIRST) };
        let next = bytes.saturating_mul(2);
        let has_time = self.elapsed.saturating_add(took.saturating_mul(2)) <= LONGEST;
        (has_time && self.sent.saturating_add(next) <= PROBE_BYTES.0).then_some(next)
    }

    fn took(&mut self, bytes: u64, took: Duration) {
        self.sent = self.sent.saturating_add(bytes);
        self.elapsed = self.elapsed.saturating_add(took);
        self.last = Some((bytes, took));
    }

    fn measured(&self) -> LinkMeasured {
        let (bytes, took) = self.last.unwrap_or_default();
        let rate = u128::from(bytes) * 1_000_000_000 / took.as_nanos().max(1);
        LinkMeasured {
            rate: Size(u64::try_from(rate).unwrap_or(u64::MAX)),
            sent: Size(self.sent),
            took: Micros::from_duration(self.elapsed),
        }
    }
}

#[cfg(test)]
#[path = "probe_tests.rs"]
mod tests;
