//! The target role after the store is sealed with pages owed: between the source and the page server, which has the
//! container's memory ([`haulage_pages::link`]).

use std::io;

use bytes::Bytes;
use haulage_pages::owed::WORD;
use haulage_protocol::fault::{Fault, code};
use haulage_service::bulk::stream;
use haulage_transport::stream::{BulkConnection, BulkReceiver, BulkSender};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixListener;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::mpsc;

use crate::failure::{STORE, fault};
use crate::wire::out_of_place;
use crate::wire::{BATCH, WANTED};

/// Where what still comes goes.
pub(crate) struct Relay {
    /// For the page server of the container.
    pub(crate) listener: UnixListener,
    /// Batches of all connections.
    pub(crate) arrived: mpsc::Receiver<Bytes>,
}

impl Relay {
    /// Passes on in both directions until the page server has all that it wants. What comes on the first connection goes
    /// to `batches`, as that of the others does.
    ///
    /// # Errors
    /// When the source is lost. The page server sees its connection closed then.
    pub(crate) async fn run(
        self,
        connection: &mut BulkConnection,
        batches: mpsc::Sender<Bytes>,
    ) -> Result<(), Fault> {
        let (sender, receiver) = connection.halves();
        tokio::select! {
            served = self.serve(sender) => served?,
            fault = bring(receiver, batches) => return Err(fault),
        }
        connection.finish().await.map_err(|error| stream(&error))
    }

    async fn serve(mut self, to_source: &mut BulkSender) -> Result<(), Fault> {
        let (server, _) = self.listener.accept().await.map_err(fault(STORE))?;
        let (words, pages) = server.into_split();
        tokio::select! {
            heard = pass_words(words, to_source) => heard,
            // A page server that takes no more has ended, and the restorer knows why.
            _ = pass_pages(&mut self.arrived, pages) => Ok(()),
        }
    }
}

/// Until the page server closes its end.
async fn pass_words(mut words: OwnedReadHalf, to_source: &mut BulkSender) -> Result<(), Fault> {
    loop {
        let mut word = vec![0; WORD];
        match words.read_exact(&mut word).await {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            Err(error) => return Err(fault(STORE)(error)),
        }
        to_source.send(WANTED, word.into()).await.map_err(|error| stream(&error))?;
        to_source.flush().await.map_err(|error| stream(&error))?;
    }
}

async fn pass_pages(arrived: &mut mpsc::Receiver<Bytes>, mut pages: OwnedWriteHalf) -> io::Result<()> {
    while let Some(batch) = arrived.recv().await {
        let length = u32::try_from(batch.len()).map_err(io::Error::other)?;
        pages.write_all(&length.to_le_bytes()).await?;
        pages.write_all(&batch).await?;
    }
    std::future::pending().await
}

/// What the first connection brings. Ends only with a fault.
async fn bring(receiver: &mut BulkReceiver, batches: mpsc::Sender<Bytes>) -> Fault {
    loop {
        match receiver.recv().await {
            Ok(Some(frame)) if frame.kind == BATCH => {
                if batches.send(frame.payload).await.is_err() {
                    return Fault::new(code::INTERNAL, "nobody passes batches on any more");
                }
            }
            Ok(Some(frame)) => return out_of_place(frame.kind),
            Ok(None) => return Fault::new(code::MALFORMED, "the source ended although it owes pages"),
            Err(error) => return stream(&error),
        }
    }
}
