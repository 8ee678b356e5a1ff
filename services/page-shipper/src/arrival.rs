//! What comes on a session's connections, and its way into the store.
//!
//! ```text
//!  first connection ══► BATCH ─┐                ┌─► decode ─┐
//!  further ones     ══► BATCH ─┴─► queue ───────┴─► decode ─┴─► store
//!  first connection ══► COMPLETE: waits until that many batches are stored; then whatever follows
//! ```
//! Batches of a round come in any order. The store itself refuses one of an earlier round. Batches that come after the
//! store was sealed with pages owed go to the page server as they are ([`crate::relay`]).

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use haulage_pages::frame::Batch;
use haulage_pages::link;
use haulage_pages::manifest::{FinalManifest, ManifestBuilder};
use haulage_pages::store::Objects;
use haulage_pages::target::{FinishReport, TargetEngine, TargetError};
use haulage_protocol::fault::{Fault, code};
use haulage_protocol::unit::Pages;
use haulage_service::bulk::{Receive, send_now, stream};
use haulage_transport::stream::{BulkConnection, BulkSession};
use tokio::net::UnixListener;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use crate::failure::{STORE, fault, not_stored};
use crate::relay::Relay;
use crate::wire::{
    BATCH, COMPLETE, FINISH, FINISHED, Finished, MANIFEST, NAMED, OK, OWED, ROUND_END, out_of_place,
};

/// Batches (256 KiB each, and some runs) that wait to be decoded.
const BATCHES_AHEAD: usize = 8;
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
    way: Mutex<Way>,
    /// Batches that are stored.
    stored: watch::Sender<u64>,
    keep: Arc<Kept>,
}

/// Where batches go.
enum Way {
    Store(TargetEngine),
    /// It is sealed.
    Closed,
    /// It is sealed, and the page server waits for what is owed.
    Server(mpsc::Sender<Bytes>),
}

impl Receive for Arrival {
    async fn receive(self, connection: &mut BulkConnection) -> Result<(), Fault> {
        let Self { engine, mut more, keep } = self;
        let way = Mutex::new(Way::Store(engine));
        let hall = Arc::new(Hall { way, stored: watch::Sender::new(0), keep });
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

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Hall {
    /// Decodes and stores batches, on a thread of its own, until no more can come.
    fn take_in(&self, waiting: &Mutex<mpsc::Receiver<Bytes>>) -> Result<(), Fault> {
        loop {
            let Some(bytes) = locked(waiting).blocking_recv() else { return Ok(()) };
            let server = match &*locked(&self.way) {
                Way::Server(server) => Some(server.clone()),
                Way::Store(_) | Way::Closed => None,
            };
            if let Some(server) = server {
                // A page server that takes no more has all that it wants, or has died, which the restorer sees.
                let _ = server.blocking_send(bytes);
                continue;
            }
            let batch = Batch::decode(&bytes).map_err(fault(STORE))?;
            self.with(|engine| engine.store(&batch))?;
            self.stored.send_modify(|count| *count = count.saturating_add(1));
        }
    }

    fn with<T>(&self, work: impl FnOnce(&mut TargetEngine) -> Result<T, TargetError>) -> Result<T, Fault> {
        match &mut *locked(&self.way) {
            Way::Store(engine) => work(engine).map_err(|error| not_stored(&error)),
            Way::Closed | Way::Server(_) => Err(sealed()),
        }
    }

    /// The first connection, in the order in which it comes.
    async fn follow(
        &self,
        connection: &mut BulkConnection,
        batches: mpsc::Sender<Bytes>,
    ) -> Result<(), Fault> {
        let (mut manifest, mut owed) = (ManifestBuilder::default(), ManifestBuilder::default());
        while let Some(frame) = connection.recv().await.map_err(|error| stream(&error))? {
            match frame.kind {
                BATCH => {
                    if batches.send(frame.payload).await.is_err() {
                        // Nobody decodes any more, and why is for the decoders to say: that ends this.
                        return std::future::pending().await;
                    }
                }
                COMPLETE => self.wait_for(&frame.payload).await?,
                NAMED => {
                    let copied = || self.with(|engine| engine.copy(&frame.payload));
                    tokio::task::block_in_place(copied)?;
                }
                ROUND_END => send_now(connection, OK, Bytes::new()).await?,
                MANIFEST => manifest.push(&frame.payload).map_err(fault(code::MALFORMED))?,
                OWED => owed.push(&frame.payload).map_err(fault(code::MALFORMED))?,
                FINISH => {
                    let manifest = std::mem::take(&mut manifest).finish().map_err(fault(code::MALFORMED))?;
                    let owed = std::mem::take(&mut owed).finish().map_err(fault(code::MALFORMED))?;
                    let (report, relay) = tokio::task::block_in_place(|| self.finish(&manifest, &owed))?;
                    let FinishReport { pages, dropped_pages, objects, .. } = report;
                    *locked(&self.keep) = Some(objects);
                    let finished = Finished { pages: Pages(pages), dropped: Pages(dropped_pages) };
                    let payload = serde_json::to_vec(&finished).map_err(fault(code::INTERNAL))?;
                    send_now(connection, FINISHED, payload.into()).await?;
                    return match relay {
                        Some(relay) => relay.run(connection, batches).await,
                        None => Ok(()),
                    };
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

    /// Seals the store. With pages owed, what comes from here on goes to the page server.
    fn finish(
        &self,
        manifest: &FinalManifest,
        owed: &FinalManifest,
    ) -> Result<(FinishReport, Option<Relay>), Fault> {
        let mut way = locked(&self.way);
        let Way::Store(engine) = std::mem::replace(&mut *way, Way::Closed) else { return Err(sealed()) };
        let report = engine.finish_owing(manifest, owed).map_err(|error| not_stored(&error))?;
        if report.owed_pages == 0 {
            return Ok((report, None));
        }
        let listener = link::listen(&report.dir).map_err(fault(STORE))?;
        listener.set_nonblocking(true).map_err(fault(STORE))?;
        let listener = UnixListener::from_std(listener).map_err(fault(STORE))?;
        let (server, arrived) = mpsc::channel(BATCHES_AHEAD);
        *way = Way::Server(server);
        Ok((report, Some(Relay { listener, arrived })))
    }
}

fn sealed() -> Fault {
    Fault::new(code::OUT_OF_ORDER, "the store is sealed")
}

#[cfg(test)]
#[path = "arrival_tests.rs"]
mod tests;
