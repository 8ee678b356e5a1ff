//! What a source owes a container that runs on its target already, and how it goes.
//!
//! ```text
//!  target ══ WANTED ══► begin ──► hottest first ─► read ─► encode ─► first connection ════► target
//!                       pages ──► read ───────────────────────────► one of their own ════►
//! ```
//! What somebody waits for does not queue behind what nobody has asked for: it has a connection of its own. The container
//! is read for as long as it stands still; should it be let go, or anything else go wrong, all connections are closed,
//! and the target knows that it will never have what is missing.

use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use haulage_pages::encode::Encoder;
use haulage_pages::owed::{Ask, Errand, Frozen, Owed, Word};
use haulage_pages::source::{SourceEngine, SourceError};
use haulage_protocol::fault::{Fault, code};
use haulage_protocol::id::MigrationId;
use haulage_service::bulk::{Departure, stream};
use haulage_transport::stream::{BulkReceiver, BulkSender};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use crate::failure::{TRACKING, fault};
use crate::lanes::Lanes;
use crate::watched::Watch;
use crate::wire::{BATCH, WANTED};

/// Encoded errands (256 KiB at most) that wait for the first connection.
const ERRANDS_AHEAD: usize = 2;
/// Asks that wait: more than threads that a target would let wait at once.
const ASKS_AHEAD: usize = 1 << 16;

/// A migration's memory after the freeze, until nothing is owed.
pub(crate) struct Debt {
    paying: JoinHandle<Result<(), Fault>>,
    /// Nothing of it is needed any more; closing it takes time that belongs after the freeze.
    engine: SourceEngine,
    /// After the engine: what it tracks is free when this is gone.
    watch: Watch,
}

impl Debt {
    /// Begins to pay when the target asks for it.
    pub(crate) fn new(
        engine: SourceEngine,
        watch: Watch,
        owed: Owed,
        lanes: Lanes,
        urgent: Departure,
    ) -> Self {
        let debtor = Arc::new(Debtor { frozen: engine.frozen(), owed: Mutex::new(owed) });
        Self { paying: tokio::spawn(debtor.pay(lanes, urgent)), engine, watch }
    }

    /// Ends it, and gives what is to be dropped where that may take its time.
    pub(crate) async fn call_off(self, migration: &MigrationId) -> (SourceEngine, Watch) {
        self.paying.abort();
        match self.paying.await {
            Ok(Err(fault)) => tracing::warn!(%migration, %fault, "what the target was owed has not gone"),
            Err(error) if error.is_panic() => tracing::error!(%migration, %error, "a debtor had died"),
            Ok(Ok(())) | Err(_) => {}
        }
        (self.engine, self.watch)
    }
}

struct Debtor {
    frozen: Frozen,
    owed: Mutex<Owed>,
}

impl Debtor {
    async fn pay(self: Arc<Self>, lanes: Lanes, urgent: Departure) -> Result<(), Fault> {
        let mut connections = lanes.into_connections().into_iter();
        let first = connections.next();
        let (first, encoder) = first.ok_or_else(|| Fault::new(code::INTERNAL, "no connection is left"))?;
        // The further ones carry nothing more, and closing them would end the session.
        let _idle: Vec<_> = connections.collect();
        let (sender, receiver) = first.connection.split();
        let (begin, begun) = oneshot::channel();
        let (asks, asked) = mpsc::channel(ASKS_AHEAD);
        let paid = tokio::select! {
            ended = listen(receiver, begin, asks) => ended,
            fault = self.clone().push(sender, encoder, begun) => Err(fault),
            fault = self.answer(urgent, asked) => Err(fault),
        };
        if let Err(fault) = &paid {
            tracing::warn!(%fault, "what a target is owed cannot go");
        }
        paid
    }

    /// Sends what is owed, hottest first, once that is wanted. Ends only with a fault.
    async fn push(
        self: Arc<Self>,
        mut sender: BulkSender,
        encoder: Encoder,
        begun: oneshot::Receiver<()>,
    ) -> Fault {
        if begun.await.is_err() {
            return std::future::pending().await;
        }
        let (frames, mut ready) = mpsc::channel(ERRANDS_AHEAD);
        let reading = tokio::task::spawn_blocking(move || self.read_on(encoder, &frames));
        while let Some(frame) = ready.recv().await {
            let sent = sender.send(BATCH, frame).await;
            let sent = if sent.is_ok() { sender.flush().await } else { sent };
            if let Err(error) = sent {
                return stream(&error);
            }
        }
        match reading.await {
            Ok(Ok(())) => std::future::pending().await,
            Ok(Err(error)) => fault(TRACKING)(error),
            Err(error) => fault(code::INTERNAL)(error),
        }
    }

    fn read_on(&self, mut encoder: Encoder, frames: &mpsc::Sender<Bytes>) -> Result<(), SourceError> {
        loop {
            let errand = self.owed.lock().unwrap_or_else(PoisonError::into_inner).next_errand();
            let Some(errand) = errand else { return Ok(()) };
            for batch in self.frozen.read(&errand)? {
                if frames.blocking_send(encoder.encode(batch).bytes.into()).is_err() {
                    return Ok(());
                }
            }
        }
    }

    /// Sends what is asked for. Ends only with a fault.
    async fn answer(&self, mut urgent: Departure, mut asked: mpsc::Receiver<Ask>) -> Fault {
        while let Some(ask) = asked.recv().await {
            let errand = self.owed.lock().unwrap_or_else(PoisonError::into_inner).asked(ask);
            let Some(errand) = errand else { continue };
            let frames = match self.read_now(errand).await {
                Ok(frames) => frames,
                Err(fault) => return fault,
            };
            for frame in frames {
                if let Err(fault) = urgent.send_now(BATCH, frame).await {
                    return fault;
                }
            }
        }
        std::future::pending().await
    }

    async fn read_now(&self, errand: Errand) -> Result<Vec<Bytes>, Fault> {
        let frozen = self.frozen.clone();
        let read = tokio::task::spawn_blocking(move || frozen.read(&errand)).await;
        let batches = read.map_err(fault(code::INTERNAL))?.map_err(fault(TRACKING))?;
        Ok(batches.into_iter().map(|batch| batch.into_frame().into()).collect())
    }
}

/// Takes in what the target wants, until it wants no more.
async fn listen(
    mut receiver: BulkReceiver,
    begin: oneshot::Sender<()>,
    asks: mpsc::Sender<Ask>,
) -> Result<(), Fault> {
    let mut begin = Some(begin);
    while let Some(frame) = receiver.recv().await.map_err(|error| stream(&error))? {
        let word = Word::decode(&frame.payload).filter(|_| frame.kind == WANTED);
        match word {
            // Nobody listens to it when all has gone.
            Some(Word::Begin) => drop(begin.take().map(|begin| begin.send(()))),
            Some(Word::Ask(ask)) => {
                asks.send(ask).await.map_err(fault(code::INTERNAL))?;
            }
            None => return Err(Fault::new(code::MALFORMED, "the target wants what is not understood")),
        }
    }
    Ok(())
}
