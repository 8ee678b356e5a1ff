//! Bulk sessions of a host's service, between two of its kind: the source connects, the target lets one in.
//!
//! ```text
//! source                         target
//!   connect  ------------------> Arrivals::open: one source with the migration's token
//!   frames   ------------------> Receive::receive
//!   answer   <------------------ its answers
//!            <----------- failed   a Fault instead of any answer, and nothing after it
//! ```
//! A session may have further connections, which only carry frames to the target: the source makes them with
//! [`Departure::connect_more`], the target takes them in by [`Arrivals::more`].

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use haulage_protocol::fault::{Fault, FaultCode, code};
use haulage_protocol::id::MigrationId;
use haulage_protocol::secret::Token;
use haulage_protocol::transfer::Rate;
use haulage_transport::stream::{
    BulkConnection, BulkListener, BulkSession, FrameKind, Hello, Pace, SessionKey, StreamError,
};
use tokio::task::JoinHandle;

use crate::config::{HostConfig, NotAnAddress};
use crate::failure::fault;

/// How long the target may take to store what it was sent.
const ANSWER_WITHIN: Duration = Duration::from_secs(120);
/// How long a target that has given up may take to say why.
const REASON_WITHIN: Duration = Duration::from_secs(1);

/// What travels in a service's sessions.
#[derive(Debug, Clone, Copy)]
pub struct Cargo {
    /// The sessions' role: `pages` or `files`.
    pub role: &'static str,
    /// The kind of the frame with which the target gives up: a [`Fault`], in JSON.
    pub failed: FrameKind,
}

/// A service cannot receive.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// The address cannot be listened on.
    #[error(transparent)]
    Listen(#[from] StreamError),
    /// Other hosts could not find it.
    #[error(transparent)]
    Address(#[from] NotAnAddress),
}

/// The connection failed; its own code says how.
#[must_use]
pub fn stream(error: &StreamError) -> Fault {
    Fault::from_error(FaultCode::new(error.code()), error)
        .remedy("see whether the target's bulk address can be reached from the source host")
}

/// What a target does with a source that it has let in.
pub trait Receive: Send + 'static {
    /// Takes in what comes until the source ends the stream.
    fn receive(self, connection: &mut BulkConnection) -> impl Future<Output = Result<(), Fault>> + Send;
}

/// The target role: the sessions that are open on this host, one for a migration.
#[derive(Debug)]
pub struct Arrivals {
    cargo: Cargo,
    listener: BulkListener,
    advertised: SocketAddr,
    sessions: Mutex<HashMap<MigrationId, JoinHandle<()>>>,
}

impl Arrivals {
    /// Listens where the configuration says.
    ///
    /// # Errors
    /// When the address cannot be listened on, or could not be told to others.
    pub async fn bind(config: &HostConfig, cargo: Cargo) -> Result<Self, BindError> {
        let listener = BulkListener::bind(config.bulk_listen).await?;
        let advertised = config.advertised(listener.local_addr())?;
        Ok(Self { cargo, listener, advertised, sessions: Mutex::default() })
    }

    /// Where other hosts find it.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.advertised
    }

    /// Lets one source in, who has the token, and gives what it brings to `receiver`. An earlier session of the
    /// migration must have been closed.
    ///
    /// # Errors
    /// When the token is none, or a session of the migration is open.
    pub fn open(&self, migration: MigrationId, token: &Token, receiver: impl Receive) -> Result<(), Fault> {
        let token = token.reveal().parse().map_err(fault(code::MALFORMED))?;
        let session = self.listener.open(SessionKey::new(migration.as_str(), self.cargo.role), token);
        let session = session.map_err(|error| stream(&error))?;
        let task = tokio::spawn(take_in(session, receiver, self.cargo, migration.clone()));
        self.sessions().insert(migration, task);
        Ok(())
    }

    /// Lets further connections of the migration's source in, who has the token, for as long as what is returned lives.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn more(&self, migration: &MigrationId, token: &Token) -> Result<BulkSession, Fault> {
        let token = token.reveal().parse().map_err(fault(code::MALFORMED))?;
        let key = SessionKey::new(migration.as_str(), more_of(self.cargo));
        self.listener.open(key, token).map_err(|error| stream(&error))
    }

    /// Ends the migration's session, if there is one; afterwards its receiver is gone.
    pub async fn close(&self, migration: &MigrationId) {
        let Some(task) = self.sessions().remove(migration) else { return };
        task.abort();
        if let Err(error) = task.await
            && error.is_panic()
        {
            tracing::error!(role = self.cargo.role, %migration, %error, "a receiver had died");
        }
    }

    fn sessions(&self) -> std::sync::MutexGuard<'_, HashMap<MigrationId, JoinHandle<()>>> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes one source in, until it ends or fails. The session stays open as long, so that nobody else gets in.
async fn take_in(mut session: BulkSession, receiver: impl Receive, cargo: Cargo, migration: MigrationId) {
    let Some(mut connection) = session.accept().await else { return };
    let role = cargo.role;
    tracing::debug!(role, %migration, peer = %connection.peer(), "a source has come");
    let Err(fault) = receiver.receive(&mut connection).await else { return };
    tracing::warn!(role, %migration, %fault, "what came is refused");
    let told = async {
        connection.send(cargo.failed, serde_json::to_vec(&fault).unwrap_or_default().into()).await?;
        connection.flush().await
    };
    if let Err(error) = told.await {
        tracing::debug!(role, %migration, %error, "and the source is gone");
    }
}

/// The role of a session's further connections.
fn more_of(cargo: Cargo) -> String {
    format!("{}-more", cargo.role)
}

/// What all senders of a migration on this host together may send, kept in its directory as [`PACE`]. Whoever closes a
/// session of the source removes it ([`crate::notes::remove`]).
///
/// # Errors
/// Of the file system.
pub async fn pace(
    config: &HostConfig,
    migration: &MigrationId,
    rate: Option<Rate>,
) -> Result<Option<Arc<Pace>>, Fault> {
    let Some(rate) = rate else { return Ok(None) };
    let dir = config.migration_dir(migration);
    let opened = tokio::task::spawn_blocking(move || {
        std::fs::create_dir_all(&dir)?;
        Pace::open(&dir.join(PACE), rate.bytes_per_second())
    });
    let opened = opened.await.map_err(fault(code::INTERNAL))?;
    opened.map(|pace| Some(Arc::new(pace))).map_err(fault(code::INTERNAL))
}

/// The file of [`pace`] in a migration's directory.
pub const PACE: &str = "pace";

/// What a connection has taken, since somebody asked last.
#[derive(Debug, Default)]
pub struct Meter(Mutex<(u64, Duration)>);

impl Meter {
    fn add(&self, bytes: u64, busy: Duration) {
        let mut sum = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *sum = (sum.0.saturating_add(bytes), sum.1.saturating_add(busy));
    }

    /// Bytes, and the time for which the connection was busy with them.
    pub fn take(&self) -> (u64, Duration) {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Sends a frame at once.
///
/// # Errors
/// As [`stream`] tells.
pub async fn send_now(connection: &mut BulkConnection, kind: FrameKind, payload: Bytes) -> Result<(), Fault> {
    connection.send(kind, payload).await.map_err(|error| stream(&error))?;
    connection.flush().await.map_err(|error| stream(&error))
}

/// The source role: a session with the target's service.
#[derive(Debug)]
pub struct Departure {
    /// The connection, for frames that need no answer.
    pub connection: BulkConnection,
    cargo: Cargo,
}

impl Departure {
    /// Connects to `address`, as the target told it.
    ///
    /// # Errors
    /// When there is nobody, or one that does not know the token.
    pub async fn connect(
        address: &str,
        migration: &MigrationId,
        token: &Token,
        cargo: Cargo,
    ) -> Result<Self, Fault> {
        Self::join(address, migration, token, cargo, cargo.role.to_owned()).await
    }

    /// Makes a further connection of the session.
    ///
    /// # Errors
    /// As [`Self::connect`].
    pub async fn connect_more(
        address: &str,
        migration: &MigrationId,
        token: &Token,
        cargo: Cargo,
    ) -> Result<Self, Fault> {
        Self::join(address, migration, token, cargo, more_of(cargo)).await
    }

    async fn join(
        address: &str,
        migration: &MigrationId,
        token: &Token,
        cargo: Cargo,
        role: String,
    ) -> Result<Self, Fault> {
        let address: SocketAddr = address.parse().map_err(fault(code::MALFORMED))?;
        let token = token.reveal().parse().map_err(fault(code::MALFORMED))?;
        let hello = Hello { session: SessionKey::new(migration.as_str(), role), token };
        let connection = BulkConnection::connect(address, &hello).await.map_err(|error| stream(&error))?;
        Ok(Self { connection, cargo })
    }

    /// Bytes sent and received so far, headers included.
    #[must_use]
    pub fn traffic(&self) -> u64 {
        self.connection.sent_bytes().saturating_add(self.connection.received_bytes())
    }

    /// Sends what `batches` gives, as frames of `kind`, until it ends: with backpressure, since the giver waits for
    /// the connection. The giver sees by the closed channel that nobody takes any more.
    ///
    /// # Errors
    /// When the connection fails, or the target gives up; then as it says.
    pub async fn send_all(
        &mut self,
        kind: FrameKind,
        batches: tokio::sync::mpsc::Receiver<Bytes>,
    ) -> Result<(), Fault> {
        let sent = self.send_metered(kind, batches, &Meter::default()).await;
        match sent {
            Ok(()) => Ok(()),
            Err(error) => Err(self.why_it_ended(&error).await),
        }
    }

    /// As [`Self::send_all`], and tells `meter` what the connection takes; why it ended, the target may still say.
    ///
    /// # Errors
    /// When the connection fails.
    pub async fn send_metered(
        &mut self,
        kind: FrameKind,
        mut batches: tokio::sync::mpsc::Receiver<Bytes>,
        meter: &Meter,
    ) -> Result<(), StreamError> {
        while let Some(batch) = batches.recv().await {
            let (bytes, started) = (batch.len() as u64, Instant::now());
            self.connection.send(kind, batch).await?;
            meter.add(bytes, started.elapsed());
        }
        Ok(())
    }

    /// Sends a frame at once.
    ///
    /// # Errors
    /// When the connection fails, or the target has given up; then as it says.
    pub async fn send_now(&mut self, kind: FrameKind, payload: Bytes) -> Result<(), Fault> {
        let sent = self.connection.send(kind, payload).await;
        let sent = if sent.is_ok() { self.connection.flush().await } else { sent };
        match sent {
            Ok(()) => Ok(()),
            Err(error) => Err(self.why_it_ended(&error).await),
        }
    }

    /// Waits for an answer of kind `wanted`; `what` is that which the target is to have, for people.
    ///
    /// # Errors
    /// The target's own when it gives up; `unreachable` when it says nothing for two minutes.
    pub async fn answer(&mut self, wanted: FrameKind, what: &str) -> Result<Bytes, Fault> {
        let frame = tokio::time::timeout(ANSWER_WITHIN, self.connection.recv()).await.map_err(|_| {
            Fault::new(code::UNREACHABLE, format!("the target does not say that it has {what}"))
        })?;
        match frame {
            Ok(Some(frame)) if frame.kind == wanted => Ok(frame.payload),
            Ok(Some(frame)) if frame.kind == self.cargo.failed => Err(reason(&frame.payload)),
            Ok(Some(frame)) => {
                let message = format!("the target answered with a frame {}", frame.kind.0);
                Err(Fault::new(code::MALFORMED, message))
            }
            Ok(None) => Err(Fault::new(code::MALFORMED, "the target ended the connection")),
            Err(error) => Err(self.why_it_ended(&error).await),
        }
    }

    /// A target that gives up says why before it closes: that, or else `error`. Nothing more can be sent by then, so
    /// that this only listens.
    pub async fn why_it_ended(&mut self, error: &StreamError) -> Fault {
        let (_, receiver) = self.connection.halves();
        match tokio::time::timeout(REASON_WITHIN, receiver.recv()).await {
            Ok(Ok(Some(frame))) if frame.kind == self.cargo.failed => reason(&frame.payload),
            _ => stream(error),
        }
    }
}

fn reason(payload: &[u8]) -> Fault {
    serde_json::from_slice(payload)
        .unwrap_or_else(|error| Fault::new(code::MALFORMED, "the target gave up, unreadably").because(&error))
}

#[cfg(test)]
#[path = "bulk_tests.rs"]
mod tests;
