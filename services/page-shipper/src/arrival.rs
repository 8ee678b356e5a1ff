//! What comes on a session's connections, and its way into the store.
//!
//! ```text
//!  first connection ══► BATCH ─┐                ┌─► decode ─┐
//!  further ones     ══► BATCH ─┴─► queue ───────┴─► decode ─┴─► store
//!  first connection ══► COMPLETE: waits until that many batches are stored; then whatever follows
//! ```
//! Batches of a round come in any order. The store itself refuses one of an earlier round.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use haulage_pages::frame::Batch;
use haulage_pages::manifest::{FinalManifest, ManifestBuilder};
use haulage_pages::store::Objects;
use haulage_pages::target::{FinishReport, TargetEngine, TargetError};
use haulage_protocol::fault::{Fault, code};
use haulage_protocol::unit::Pages;
use haulage_service::bulk::{Receive, send_now, stream};
use haulage_transport::stream::{BulkConnection, BulkSession, FrameKind};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use crate::failure::{STORE, fault};
use crate::wire::{BATCH, COMPLETE, FINISH, FINISHED, Finished, MANIFEST, NAMED, OK, ROUND_END};

/// Batches (a MiB each, at most 4) that wait to be decoded.
const BATCHES_AHEAD: usize = 4;
/// Threads that decode. The store takes one batch at a time, so that more would mostly wait for it.
const DECODERS: usize = 2;

/// Where what comes is put.
pub(crate) struct Arrival {
    pub(crate) engine: TargetEngine,
    /// Lets the source's further connections in.
    pub(crate) more: BulkSession,
    /// Where the shared memory is kept that came.
    pub(crate) keep: Arc<Kept>,
}

/// The shared memory of a sealed store: it is there until it is closed.
pub(crate) type Kept = Mutex<Option<Objects>>;

/// What all connections of a session share.
struct Hall {
    /// None once it is sealed.
    engine: Mutex<Option<TargetEngine>>,
    /// Batches that are stored.
    stored: watch::Sender<u64>,
    keep: Arc<Kept>,
}

impl Receive for Arrival {
    async fn receive(self, connection: &mut BulkConnection) -> Result<(), Fault> {
        let Self { engine, mut more, keep } = self;
        let hall = Hall { engine: Mutex::new(Some(engine)), stored: watch::Sender::new(0), keep };
        let hall = Arc::new(hall);
        let (batches, waiting) = mpsc::channel(BATCHES_AHEAD);
        let waiting = Arc::new(Mutex::new(waiting));
        let mut decoders = JoinSet::new();
        for _ in 0..DECODERS {
            let (hall, waiting) = (hall.clone(), waiting.clone());
            decoders.spawn_blocking(move || hall.take_in(&waiting));
        }
        drop(waiting);
        tokio::select! {
            done = hall.follow(connection, batches.clone()) => done,
            fault = let_in(&mut more, &batches) => Err(fault),
            fault = first_fault(&mut decoders) => Err(fault),
        }
    }
}

/// The fault of the first decoder that gives up. Without one, they end only when nobody sends batches any more.
async fn first_fault(decoders: &mut JoinSet<Result<(), Fault>>) -> Fault {
    while let Some(ended) = decoders.join_next().await {
        match ended {
            Ok(Ok(())) => {}
            Ok(Err(fault)) => return fault,
            Err(error) => return fault(code::INTERNAL)(error),
        }
    }
    Fault::new(code::INTERNAL, "nobody decodes any more")
}

/// Takes further connections in until one of them fails.
async fn let_in(more: &mut BulkSession, batches: &mpsc::Sender<Bytes>) -> Fault {
    let mut carrying = JoinSet::new();
    loop {
        tokio::select! {
            Some(connection) = more.accept() => {
                carrying.spawn(carry(connection, batches.clone()));
            }
            Some(ended) = carrying.join_next() => match ended {
                Ok(Ok(())) => {}
                Ok(Err(fault)) => return fault,
                Err(error) => return fault(code::INTERNAL)(error),
            },
        }
    }
}

/// A further connection, which brings batches and nothing else.
async fn carry(mut connection: BulkConnection, batches: mpsc::Sender<Bytes>) -> Result<(), Fault> {
    while let Some(frame) = connection.recv().await.map_err(|error| stream(&error))? {
        if frame.kind != BATCH {
            return Err(out_of_place(frame.kind));
        }
        if batches.send(frame.payload).await.is_err() {
            break;
        }
    }
    Ok(())
}

fn out_of_place(kind: FrameKind) -> Fault {
    Fault::new(code::MALFORMED, format!("a frame of kind {} does not belong here", kind.0))
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Hall {
    /// Decodes and stores batches, on a thread of its own, until no more can come.
    fn take_in(&self, waiting: &Mutex<mpsc::Receiver<Bytes>>) -> Result<(), Fault> {
        loop {
            let Some(bytes) = locked(waiting).blocking_recv() else { return Ok(()) };
            let batch = Batch::decode(&bytes).map_err(fault(STORE))?;
            self.with(|engine| engine.store(&batch))?;
            self.stored.send_modify(|count| *count = count.saturating_add(1));
        }
    }

    fn with<T>(&self, work: impl FnOnce(&mut TargetEngine) -> Result<T, TargetError>) -> Result<T, Fault> {
        let mut engine = locked(&self.engine);
        let engine = engine.as_mut().ok_or_else(|| Fault::new(code::OUT_OF_ORDER, "the store is sealed"))?;
        work(engine).map_err(fault(STORE))
    }

    /// The first connection, in the order in which it comes.
    async fn follow(
        &self,
        connection: &mut BulkConnection,
        batches: mpsc::Sender<Bytes>,
    ) -> Result<(), Fault> {
        let mut manifest = ManifestBuilder::default();
        while let Some(frame) = connection.recv().await.map_err(|error| stream(&error))? {
            match frame.kind {
                BATCH => {
                    let gone = |_| Fault::new(code::INTERNAL, "nobody decodes any more");
                    batches.send(frame.payload).await.map_err(gone)?;
                }
                COMPLETE => self.wait_for(&frame.payload).await?,
                NAMED => {
                    let copied = || self.with(|engine| engine.copy(&frame.payload));
                    tokio::task::block_in_place(copied)?;
                }
                ROUND_END => send_now(connection, OK, Bytes::new()).await?,
                MANIFEST => manifest.push(&frame.payload).map_err(fault(code::MALFORMED))?,
                FINISH => {
                    let manifest = std::mem::take(&mut manifest).finish().map_err(fault(code::MALFORMED))?;
                    let FinishReport { pages, dropped_pages, objects, .. } =
                        tokio::task::block_in_place(|| self.finish(&manifest))?;
                    *locked(&self.keep) = Some(objects);
                    let finished = Finished { pages: Pages(pages), dropped: Pages(dropped_pages) };
                    let payload = serde_json::to_vec(&finished).map_err(fault(code::INTERNAL))?;
                    return send_now(connection, FINISHED, payload.into()).await;
                }
                other => return Err(out_of_place(other)),
            }
        }
        Ok(())
    }

    /// Waits until as many batches are stored as the source has sent.
    async fn wait_for(&self, count: &[u8]) -> Result<(), Fault> {
        let count = count.try_into().map(u64::from_le_bytes);
        let count = count.map_err(|_| Fault::new(code::MALFORMED, "a count of batches is no number"))?;
        let mut stored = self.stored.subscribe();
        let reached = stored.wait_for(|stored| *stored >= count).await.map_err(fault(code::INTERNAL))?;
        if *reached > count {
            return Err(Fault::new(code::MALFORMED, "more batches have come than were sent"));
        }
        Ok(())
    }

    fn finish(&self, manifest: &FinalManifest) -> Result<FinishReport, Fault> {
        let engine = locked(&self.engine).take();
        let engine = engine.ok_or_else(|| Fault::new(code::OUT_OF_ORDER, "the store is sealed"))?;
        engine.finish(manifest).map_err(fault(STORE))
    }
}

#[cfg(test)]
#[path = "arrival_tests.rs"]
mod tests;
