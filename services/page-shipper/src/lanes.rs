//! The connections of a source, and the way of its pages onto them.
//!
//! ```text
//!                        ┌─► encode ─► send ══ first connection, which also carries all else and the answers
//!  read ─► sift ─► queue ┼─► encode ─► send ══ further connection
//!                        └─► encode ─► send ══ …
//! ```
//! Reading and each encoding have a thread, each connection a task; between them are queues of a batch or two, so that
//! the slowest sets the pace and memory is bounded: some 1 MiB, and 2 MiB for each connection. Batches of a round go in
//! any order; [`Lanes::settle`] ends the round, after which the next one may begin.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc as threads};

use bytes::Bytes;
use futures_util::future::join_all;
use haulage_pages::PageBatch;
use haulage_pages::choice::Compression;
use haulage_pages::codec::Codec;
use haulage_pages::encode::{Encoded, Encoder};
use haulage_pages::known::{Known, Sifted};
use haulage_pages::source::{SourceEngine, SourceError};
use haulage_protocol::fault::{Fault, code};
use haulage_protocol::id::MigrationId;
use haulage_protocol::page_shipper::{Encoding, StartTracking};
use haulage_protocol::transfer::{Compress, MAX_CONNECTIONS};
use haulage_protocol::unit::Pages;
use haulage_service::bulk::{Departure, Meter, stream};
use haulage_transport::stream::{FrameKind, Pace};
use tokio::sync::mpsc;

use crate::failure::{TRACKING, fault};
use crate::modest::Modest;
use crate::wire::{BATCH, CARGO, COMPLETE, NAMED};

/// Batches (256 KiB each, at most) that wait for an encoder.
const BATCHES_AHEAD: usize = 2;
/// Encoded batches that wait for each connection.
const FRAMES_AHEAD: usize = 1;

/// Bytes in a second from which on pages are not compared with what the target has: hashing takes a core for 1 s per
/// 2 GB or so, and reading is to stay ahead of a link that carries packed pages.
const SLOW: u64 = 500_000_000;

/// A migration's connections, where its memory leaves. After any error they are of no more use.
pub(crate) struct Lanes {
    lanes: Vec<Lane>,
    /// Batches sent since the beginning, on all of them.
    batches: u64,
    /// What the target has. None while a round is on its way.
    known: Option<Known>,
}

struct Lane {
    to: Departure,
    encoder: Encoder,
    meter: Arc<Meter>,
    /// Bytes in a second that it takes, zero while that is not known: for the reader.
    rate: Arc<AtomicU64>,
}

type Queue = Arc<Mutex<threads::Receiver<PageBatch>>>;

impl Lanes {
    pub(crate) async fn connect(
        migration: &MigrationId,
        ask: &StartTracking,
        pace: Option<Arc<Pace>>,
    ) -> Result<Self, Fault> {
        let wanted = match ask.transfer.compress {
            Compress::Auto => Compression::Auto,
            Compress::None => Compression::Only(Codec::Raw),
            Compress::Lz4 => Compression::Only(Codec::Lz4),
            Compress::Zstd => Compression::Only(Codec::Zstd),
        };
        let mut lanes = Vec::new();
        for n in 0..ask.transfer.connections.clamp(1, MAX_CONNECTIONS) {
            let mut to = if n == 0 {
                Departure::connect(&ask.address, migration, &ask.token, CARGO).await?
            } else {
                Departure::connect_more(&ask.address, migration, &ask.token, CARGO).await?
            };
            if let Some(pace) = &pace {
                to.connection.keep_pace(pace.clone());
            }
            let (meter, rate) = (Arc::default(), Arc::default());
            lanes.push(Lane { to, encoder: Encoder::new(wanted), meter, rate });
        }
        Ok(Self { lanes, batches: 0, known: Some(Known::new(ask.memory.0)) })
    }

    /// Bytes sent and received so far, headers included.
    pub(crate) fn traffic(&self) -> u64 {
        self.lanes.iter().map(|lane| lane.to.traffic()).sum()
    }

    /// The first connection.
    pub(crate) fn first(&mut self) -> Result<&mut Departure, Fault> {
        let first = self.lanes.first_mut().map(|lane| &mut lane.to);
        first.ok_or_else(|| Fault::new(code::INTERNAL, "the connections of an earlier round are lost"))
    }

    /// Sends something other than batches, after what was sent on the first connection before.
    pub(crate) async fn send(&mut self, kind: FrameKind, payload: Bytes) -> Result<(), Fault> {
        self.first()?.connection.send(kind, payload).await.map_err(|error| stream(&error))
    }

    /// Runs `work` of the engine and sends what it reads, packed as each connection finds best. If it is to be `modest`, its
    /// threads give way to the container.
    pub(crate) async fn ship<T, W>(
        &mut self,
        mut engine: SourceEngine,
        modest: bool,
        work: W,
    ) -> Result<(SourceEngine, T, Encoding), Fault>
    where
        T: Send + 'static,
        W: FnOnce(&mut SourceEngine, &mut dyn FnMut(PageBatch) -> ControlFlow<()>) -> Result<T, SourceError>
            + Send
            + 'static,
    {
        let (batches, ready) = threads::sync_channel(BATCHES_AHEAD);
        let rates: Vec<Arc<AtomicU64>> = self.lanes.iter().map(|lane| lane.rate.clone()).collect();
        let lost = || Fault::new(code::INTERNAL, "the account of an earlier round is lost");
        let mut known = self.known.take().ok_or_else(lost)?;
        let reading = tokio::task::spawn_blocking(move || {
            // Not before there is something to send: until then threads of the container may stand still for this one.
            let mut giving_way = None;
            let mut spared = Encoding::default();
            let mut sink = |batch: PageBatch| {
                giving_way.get_or_insert_with(|| Modest::if_wanted(modest));
                let batch = if is_slow(&rates) {
                    let Sifted { batch, unchanged, named } = known.sift(batch);
                    spared.unchanged += Pages(unchanged);
                    spared.named += Pages(named);
                    spared.partial += Pages(batch.partial_pages());
                    batch
                } else {
                    known.pass(&batch);
                    batch
                };
                if batch.is_empty() || batches.send(batch).is_ok() {
                    ControlFlow::Continue(())
                } else {
                    ControlFlow::Break(())
                }
            };
            let done = work(&mut engine, &mut sink);
            (engine, done, known, spared)
        });
        let queue: Queue = Arc::new(Mutex::new(ready));
        let lanes = std::mem::take(&mut self.lanes);
        let carried = join_all(lanes.into_iter().map(|lane| lane.carry(queue.clone(), modest)));
        // Whoever waits for a lane that has failed sees that nobody takes its batches any more.
        drop(queue);
        let (mut encoding, mut lost) = (Encoding::default(), None);
        for carried in carried.await {
            let (lane, done) = carried?;
            self.lanes.push(lane);
            match done {
                Ok(load) => {
                    self.batches = self.batches.saturating_add(load.batches);
                    encoding += load.encoding;
                }
                Err(error) => lost = Some(error),
            }
        }
        let (engine, done, known, spared) = reading.await.map_err(fault(code::INTERNAL))?;
        encoding += spared;
        self.known = Some(known);
        if let Some(error) = lost {
            return Err(self.first()?.why_it_ended(&error).await);
        }
        Ok((engine, done.map_err(fault(TRACKING))?, encoding))
    }

    /// The connections with what packs for each, the first one first: no more rounds go on them.
    pub(crate) fn into_connections(self) -> Vec<(Departure, Encoder)> {
        self.lanes.into_iter().map(|lane| (lane.to, lane.encoder)).collect()
    }

    /// Tells the target that all batches so far have been sent: what follows on the first connection comes after them.
    /// Then names the pages that equal others.
    pub(crate) async fn settle(&mut self) -> Result<(), Fault> {
        let count = Bytes::copy_from_slice(&self.batches.to_le_bytes());
        self.send(COMPLETE, count).await?;
        for named in self.known.as_mut().map(Known::take_named).unwrap_or_default() {
            self.send(NAMED, named.into()).await?;
        }
        Ok(())
    }
}

/// What a connection has carried in a round.
#[derive(Default)]
struct Load {
    batches: u64,
    encoding: Encoding,
}

impl Load {
    fn add(&mut self, encoded: &Encoded) {
        self.batches += 1;
        let pages = Pages(encoded.data_pages);
        match encoded.codec {
            Codec::Raw => self.encoding.plain += pages,
            Codec::Lz4 => self.encoding.lz4 += pages,
            Codec::Zstd => self.encoding.zstd += pages,
        }
    }
}

impl Lane {
    /// Takes batches out of the queue until there are no more, and sees them off.
    async fn carry(
        mut self,
        queue: Queue,
        modest: bool,
    ) -> Result<(Self, Result<Load, haulage_transport::stream::StreamError>), Fault> {
        let (frames, ready) = mpsc::channel(FRAMES_AHEAD);
        let (mut encoder, meter, rate) = (self.encoder, self.meter.clone(), self.rate.clone());
        let encoding = tokio::task::spawn_blocking(move || {
            let _modest = Modest::if_wanted(modest);
            let mut load = Load::default();
            while let Some(batch) = next(&queue) {
                let (bytes, busy) = meter.take();
                encoder.sent(bytes, busy);
                rate.store(encoder.link_rate().unwrap_or(0), Ordering::Relaxed);
                let encoded = encoder.encode(batch);
                load.add(&encoded);
                if frames.blocking_send(Bytes::from(encoded.bytes)).is_err() {
                    break;
                }
            }
            encoder.rested();
            (encoder, load)
        });
        let mut sent = self.to.send_metered(BATCH, ready, &self.meter).await;
        if sent.is_ok() {
            sent = self.to.connection.flush().await;
        }
        let (encoder, load) = encoding.await.map_err(fault(code::INTERNAL))?;
        self.encoder = encoder;
        Ok((self, sent.map(|()| load)))
    }
}

/// Whether the connections together are slow enough for a look at every page to be worth it, as far as is known.
fn is_slow(rates: &[Arc<AtomicU64>]) -> bool {
    rates.iter().map(|rate| rate.load(Ordering::Relaxed)).sum::<u64>() < SLOW
}

fn next(queue: &Queue) -> Option<PageBatch> {
    queue.lock().unwrap_or_else(PoisonError::into_inner).recv().ok()
}
