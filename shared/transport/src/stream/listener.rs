//! The listening side: open sessions, and the greeting of whoever connects.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{sleep, timeout};
use tracing::{debug, warn};

use super::connection::{BulkConnection, BulkReceiver, BulkSender, halves};
use super::error::StreamError;
use super::frame::FrameKind;
use super::hello::{Hello, MAX_HANDSHAKE_BYTES, Refusal, SessionKey, Token};

/// How long a connecting peer has for its greeting.
const GREETING_DEADLINE: Duration = Duration::from_secs(5);

/// How long, and for how many bytes, a refused peer is listened to so that its refusal reaches it.
const PARTING_DEADLINE: Duration = Duration::from_secs(1);
const PARTING_BYTES: u64 = 64 << 10;

/// How many peers may be in their greeting at once; further ones wait in the socket's backlog.
const GREETINGS_AT_ONCE: usize = 64;

/// The pause after `accept` failed, which it does when file descriptors run out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How many connections may wait for a session's owner.
const WAITING_CONNECTIONS: usize = 16;

/// How many connections were refused, by [`StreamError::code`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Refusals(BTreeMap<String, u64>);

impl Refusals {
    /// How many were refused with this code.
    pub fn of(&self, code: &str) -> u64 {
        self.0.get(code).copied().unwrap_or(0)
    }

    /// How many were refused for any reason.
    pub fn total(&self) -> u64 {
        self.0.values().sum()
    }

    /// Every code that occurred, with its count, in alphabetical order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, u64)> {
        self.0.iter().map(|(code, count)| (code.as_str(), *count))
    }
}

/// Listens for bulk connections and hands each to the session it may join.
///
/// Dropping it stops listening; connections which were handed over live on.
#[derive(Debug)]
pub struct BulkListener {
    addr: SocketAddr,
    shared: Arc<Shared>,
    accepting: JoinHandle<()>,
}

/// An open session: the connections that joined it. Dropping it closes the session to further ones.
#[derive(Debug)]
pub struct BulkSession {
    key: SessionKey,
    shared: Arc<Shared>,
    connections: mpsc::Receiver<BulkConnection>,
}

#[derive(Debug, Default)]
struct Shared {
    sessions: Mutex<HashMap<SessionKey, Open>>,
    refusals: Mutex<Refusals>,
}

#[derive(Debug)]
struct Open {
    token: Token,
    connections: mpsc::Sender<BulkConnection>,
}

impl BulkListener {
    /// Listens on `addr` (port 0: any free one) and greets peers from then on, on tasks of the current runtime.
    ///
    /// # Errors
    /// [`StreamError::Io`] when the address cannot be listened on.
    pub async fn bind(addr: SocketAddr) -> Result<Self, StreamError> {
        let listener = TcpListener::bind(addr).await.map_err(|e| StreamError::io("listen", e))?;
        let addr = listener.local_addr().map_err(|e| StreamError::io("look up the own address", e))?;
        let shared = Arc::<Shared>::default();
        let accepting = tokio::spawn(accept(listener, Arc::clone(&shared)));
        Ok(Self { addr, shared, accepting })
    }

    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.addr
    }

    /// Opens a session: from now on, who names it with `token` is let in.
    ///
    /// # Errors
    /// [`StreamError::SessionExists`]; the session that is open already is not touched.
    pub fn open(&self, key: SessionKey, token: Token) -> Result<BulkSession, StreamError> {
        let mut sessions = lock(&self.shared.sessions);
        if sessions.contains_key(&key) {
            return Err(StreamError::SessionExists { session: key.to_string() });
        }
        let (sender, connections) = mpsc::channel(WAITING_CONNECTIONS);
        sessions.insert(key.clone(), Open { token, connections: sender });
        Ok(BulkSession { key, shared: Arc::clone(&self.shared), connections })
    }

    /// What has been refused so far.
    pub fn refusals(&self) -> Refusals {
        lock(&self.shared.refusals).clone()
    }
}

impl Drop for BulkListener {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

impl BulkSession {
    /// Which session this is.
    pub fn key(&self) -> &SessionKey {
        &self.key
    }

    /// The next connection that joins. Waits for ever: callers set their own deadline. Cancel-safe.
    ///
    /// `None` never comes while the session is open.
    pub async fn accept(&mut self) -> Option<BulkConnection> {
        self.connections.recv().await
    }
}

impl Drop for BulkSession {
    fn drop(&mut self) {
        lock(&self.shared.sessions).remove(&self.key);
    }
}

impl Shared {
    /// The place in the session's queue which the greeting entitles to.
    fn admit(&self, hello: &Hello) -> Result<mpsc::OwnedPermit<BulkConnection>, StreamError> {
        let sessions = lock(&self.sessions);
        let session = || hello.session.to_string();
        let open =
            sessions.get(&hello.session).ok_or_else(|| StreamError::UnknownSession { session: session() })?;
        if !open.token.matches(&hello.token) {
            return Err(StreamError::WrongToken);
        }
        open.connections
            .clone()
            .try_reserve_owned()
            .map_err(|_| StreamError::SessionBusy { session: session() })
    }

    fn count_refusal(&self, error: &StreamError) {
        *lock(&self.refusals).0.entry(error.code().to_owned()).or_default() += 1;
    }
}

/// The maps behind these locks are whole after every statement, so a panic elsewhere does not spoil them.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    let slots = Arc::new(Semaphore::new(GREETINGS_AT_ONCE));
    // Aborted with this task, so that no greeting outlives the listener.
    let mut greetings = JoinSet::new();
    loop {
        while greetings.try_join_next().is_some() {}
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((socket, peer)) => {
                let shared = Arc::clone(&shared);
                greetings.spawn(async move {
                    greet(socket, peer, &shared).await;
                    drop(slot);
                });
            }
            Err(error) => {
                warn!(%error, "a bulk connection could not be accepted");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Lets one peer in, or refuses it. What goes wrong concerns that peer alone.
async fn greet(socket: TcpStream, peer: SocketAddr, shared: &Shared) {
    let (mut receiver, mut sender) = match halves(socket) {
        Ok(halves) => halves,
        Err(error) => return debug!(%peer, %error, "a bulk connection vanished"),
    };
    let admitted = match read_hello(&mut receiver).await {
        Ok(hello) => shared.admit(&hello).map(|place| (hello, place)),
        Err(error) => Err(error),
    };
    match admitted {
        Ok((hello, place)) => match welcome(&mut sender).await {
            Ok(()) => {
                place.send(BulkConnection::accepted(hello.session, peer, sender, receiver));
            }
            Err(error) => debug!(%peer, %error, "a welcomed bulk connection vanished"),
        },
        Err(error) => {
            warn!(%peer, code = error.code(), %error, "bulk connection refused");
            shared.count_refusal(&error);
            refuse(sender, receiver, &error).await;
        }
    }
}

async fn read_hello(receiver: &mut BulkReceiver) -> Result<Hello, StreamError> {
    let frame = timeout(GREETING_DEADLINE, receiver.read(MAX_HANDSHAKE_BYTES))
        .await
        .map_err(|_| StreamError::Timeout { what: "send its greeting" })??;
    match frame.kind {
        FrameKind::HELLO => Hello::decode(&frame.payload),
        _ => Err(StreamError::BadHello),
    }
}

async fn welcome(sender: &mut BulkSender) -> Result<(), StreamError> {
    sender.write(FrameKind::WELCOME, 0, &[]).await?;
    sender.flush().await
}

async fn refuse(mut sender: BulkSender, mut receiver: BulkReceiver, error: &StreamError) {
    let parting = async {
        sender.write(FrameKind::REFUSED, 0, &Refusal::of(error).encode()).await?;
        sender.shut_down().await?;
        receiver.discard(PARTING_BYTES).await;
        Ok::<_, StreamError>(())
    };
    // The peer may be gone, or not listen; it is refused either way.
    let _ = timeout(PARTING_DEADLINE, parting).await;
}
