//! One bulk connection: frames out, frames in, an orderly end.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use rustix::net::sockopt;
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader, BufWriter};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::time::timeout;

use super::error::StreamError;
use super::frame::{Frame, FrameKind, HEADER_BYTES, Header, MAX_PAYLOAD_BYTES};
use super::hello::{Hello, MAX_HANDSHAKE_BYTES, Refusal, SessionKey};
use super::pace::Pace;

/// How long connecting and being greeted may take.
const CONNECT_DEADLINE: Duration = Duration::from_secs(10);

/// Headers and small payloads gather up to here before they are written; larger payloads pass through uncopied.
const BUFFER_BYTES: usize = 64 << 10;

/// A peer host which vanished is noticed within about this time, by unacknowledged data or unanswered probes.
const DEAD_PEER: Duration = Duration::from_secs(20);
const PROBE_EVERY: Duration = Duration::from_secs(5);

/// An authenticated connection of a session.
#[derive(Debug)]
pub struct BulkConnection {
    session: SessionKey,
    peer: SocketAddr,
    sender: BulkSender,
    receiver: BulkReceiver,
}

/// The sending half of a [`BulkConnection`].
#[derive(Debug)]
pub struct BulkSender {
    socket: BufWriter<OwnedWriteHalf>,
    bytes: u64,
    pace: Option<Arc<Pace>>,
}

/// The receiving half of a [`BulkConnection`].
#[derive(Debug)]
pub struct BulkReceiver {
    socket: BufReader<OwnedReadHalf>,
    bytes: u64,
    ended: bool,
}

impl BulkConnection {
    /// Connects to a listener and joins the session which `hello` names.
    ///
    /// # Errors
    /// [`StreamError::Refused`] with the listener's code; [`StreamError::Timeout`] when connecting and being
    /// greeted takes over ten seconds; else as [`recv`](Self::recv). Nothing is left behind.
    pub async fn connect(addr: SocketAddr, hello: &Hello) -> Result<Self, StreamError> {
        timeout(CONNECT_DEADLINE, Self::greet(addr, hello))
            .await
            .map_err(|_| StreamError::Timeout { what: "accept the connection" })?
    }

    async fn greet(addr: SocketAddr, hello: &Hello) -> Result<Self, StreamError> {
        let socket =
            TcpStream::connect(addr).await.map_err(|e| StreamError::Io { action: "connect", source: e })?;
        let mut connection = Self::over(socket, hello.session.clone())?;
        connection.sender.write(FrameKind::HELLO, 0, &hello.encode()?).await?;
        connection.sender.flush().await?;
        let answer = connection.receiver.read(MAX_HANDSHAKE_BYTES).await?;
        match answer.kind {
            FrameKind::WELCOME => Ok(connection),
            FrameKind::REFUSED => Err(Refusal::decode(&answer.payload)),
            FrameKind(got) => Err(StreamError::UnexpectedFrame { got }),
        }
    }

    /// A connection over a socket whose greeting is still to be exchanged.
    pub(super) fn over(socket: TcpStream, session: SessionKey) -> Result<Self, StreamError> {
        let peer = socket.peer_addr().map_err(|e| StreamError::io("look up the peer", e))?;
        let (receiver, sender) = halves(socket)?;
        Ok(Self { session, peer, sender, receiver })
    }

    /// Puts together what the listener greeted.
    pub(super) fn accepted(
        session: SessionKey,
        peer: SocketAddr,
        sender: BulkSender,
        receiver: BulkReceiver,
    ) -> Self {
        Self { session, peer, sender, receiver }
    }

    /// The session which this connection belongs to.
    pub fn session(&self) -> &SessionKey {
        &self.session
    }

    /// The other end's address.
    pub fn peer(&self) -> SocketAddr {
        self.peer
    }

    /// As [`BulkSender::send`].
    ///
    /// # Errors
    /// As there.
    pub async fn send(&mut self, kind: FrameKind, payload: Bytes) -> Result<(), StreamError> {
        self.sender.send(kind, payload).await
    }

    /// As [`BulkSender::flush`].
    ///
    /// # Errors
    /// As there.
    pub async fn flush(&mut self) -> Result<(), StreamError> {
        self.sender.flush().await
    }

    /// As [`BulkSender::finish`].
    ///
    /// # Errors
    /// As there.
    pub async fn finish(&mut self) -> Result<(), StreamError> {
        self.sender.finish().await
    }

    /// Flushes what was sent, then waits as [`BulkReceiver::recv`].
    ///
    /// # Errors
    /// As there.
    pub async fn recv(&mut self) -> Result<Option<Frame>, StreamError> {
        self.sender.flush().await?;
        self.receiver.recv().await
    }

    /// From now on, sends no faster than `pace` allows.
    pub fn keep_pace(&mut self, pace: Arc<Pace>) {
        self.sender.pace = Some(pace);
    }

    /// Bytes sent so far as the wire carries them, headers and greeting included, TCP's own excluded.
    pub fn sent_bytes(&self) -> u64 {
        self.sender.sent_bytes()
    }

    /// Bytes received so far, counted likewise.
    pub fn received_bytes(&self) -> u64 {
        self.receiver.received_bytes()
    }

    /// Both halves, to be used at the same time.
    pub fn halves(&mut self) -> (&mut BulkSender, &mut BulkReceiver) {
        (&mut self.sender, &mut self.receiver)
    }

    /// Both halves, for one task each.
    pub fn split(self) -> (BulkSender, BulkReceiver) {
        (self.sender, self.receiver)
    }
}

impl BulkSender {
    /// Queues a frame; waits while the peer does not take what was sent before.
    ///
    /// Small frames gather until 64 KiB or a [`flush`](Self::flush).
    ///
    /// # Errors
    /// [`StreamError::FrameTooLarge`] over [`MAX_PAYLOAD_BYTES`], with nothing sent;
    /// [`StreamError::UnexpectedFrame`] for a kind below [`FrameKind::FIRST_OWN`], likewise;
    /// [`StreamError::Io`], after which the connection is of no use.
    pub async fn send(&mut self, kind: FrameKind, payload: Bytes) -> Result<(), StreamError> {
        self.send_flagged(kind, 0, payload).await
    }

    /// As [`send`](Self::send), with flags of the session's own.
    ///
    /// # Errors
    /// As there.
    pub async fn send_flagged(
        &mut self,
        kind: FrameKind,
        flags: u16,
        payload: Bytes,
    ) -> Result<(), StreamError> {
        if kind.0 < FrameKind::FIRST_OWN.0 {
            return Err(StreamError::UnexpectedFrame { got: kind.0 });
        }
        self.write(kind, flags, &payload).await
    }

    /// Hands everything queued to the system.
    ///
    /// # Errors
    /// [`StreamError::Io`].
    pub async fn flush(&mut self) -> Result<(), StreamError> {
        self.socket.flush().await.map_err(|e| StreamError::io("send", e))
    }

    /// Says that this direction is complete. The other one stays open, for a last answer.
    ///
    /// # Errors
    /// [`StreamError::Io`].
    pub async fn finish(&mut self) -> Result<(), StreamError> {
        self.write(FrameKind::END, 0, &[]).await?;
        self.flush().await
    }

    /// Bytes sent so far, headers and greeting included.
    pub fn sent_bytes(&self) -> u64 {
        self.bytes
    }

    pub(super) async fn write(
        &mut self,
        kind: FrameKind,
        flags: u16,
        payload: &[u8],
    ) -> Result<(), StreamError> {
        let header = Header::of(kind, flags, payload)?.encode();
        self.write_paced(&header).await.map_err(|e| StreamError::io("send", e))?;
        self.write_paced(payload).await.map_err(|e| StreamError::io("send", e))?;
        self.bytes += (HEADER_BYTES + payload.len()) as u64;
        Ok(())
    }

    async fn write_paced(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        let Some(pace) = &self.pace else { return self.socket.write_all(bytes).await };
        for piece in bytes.chunks(pace.piece()) {
            pace.take(piece.len()).await?;
            self.socket.write_all(piece).await?;
        }
        Ok(())
    }

    /// Tells the peer that nothing more will come, at the level of TCP.
    pub(super) async fn shut_down(&mut self) -> Result<(), StreamError> {
        self.socket.shutdown().await.map_err(|e| StreamError::io("close", e))
    }
}

impl BulkReceiver {
    /// The next frame, or `None` once the peer has said that it is complete.
    ///
    /// Not cancel-safe: when the future is dropped before it is done, so must the connection be.
    ///
    /// # Errors
    /// [`StreamError::Truncated`] when the stream stops without being complete, [`StreamError::BadMagic`],
    /// [`StreamError::FrameTooLarge`], [`StreamError::ChecksumMismatch`], [`StreamError::Io`].
    pub async fn recv(&mut self) -> Result<Option<Frame>, StreamError> {
        if self.ended {
            return Ok(None);
        }
        let frame = self.read(MAX_PAYLOAD_BYTES).await?;
        if frame.kind == FrameKind::END {
            self.ended = true;
            return Ok(None);
        }
        if frame.kind.0 < FrameKind::FIRST_OWN.0 {
            return Err(StreamError::UnexpectedFrame { got: frame.kind.0 });
        }
        Ok(Some(frame))
    }

    /// Bytes received so far, headers and greeting included.
    pub fn received_bytes(&self) -> u64 {
        self.bytes
    }

    pub(super) async fn read(&mut self, limit: usize) -> Result<Frame, StreamError> {
        let mut header = [0; HEADER_BYTES];
        self.socket.read_exact(&mut header).await.map_err(|e| StreamError::io("receive", e))?;
        let header = Header::decode(&header, limit)?;
        let length = header.payload_bytes();
        let mut payload = BytesMut::with_capacity(length);
        let mut rest = (&mut self.socket).take(length as u64);
        while payload.len() < length {
            if rest.read_buf(&mut payload).await.map_err(|e| StreamError::io("receive", e))? == 0 {
                return Err(StreamError::Truncated);
            }
        }
        self.bytes += (HEADER_BYTES + length) as u64;
        header.accept(payload.freeze())
    }

    /// Reads and forgets what the peer still sends, so that closing does not destroy an answer on its way.
    pub(super) async fn discard(&mut self, most: u64) {
        let mut rest = (&mut self.socket).take(most);
        // A peer that is being refused may end however it likes.
        let _ = tokio::io::copy(&mut rest, &mut tokio::io::sink()).await;
    }
}

/// Both halves of a socket, set up for bulk: no delay for small frames, dead peers noticed.
pub(super) fn halves(socket: TcpStream) -> Result<(BulkReceiver, BulkSender), StreamError> {
    set_options(&socket).map_err(|e| StreamError::io("set options", e.into()))?;
    let (read, write) = socket.into_split();
    Ok((
        BulkReceiver { socket: BufReader::with_capacity(BUFFER_BYTES, read), bytes: 0, ended: false },
        BulkSender { socket: BufWriter::with_capacity(BUFFER_BYTES, write), bytes: 0, pace: None },
    ))
}

fn set_options(socket: &TcpStream) -> rustix::io::Result<()> {
    sockopt::set_tcp_nodelay(socket, true)?;
    sockopt::set_socket_keepalive(socket, true)?;
    sockopt::set_tcp_keepidle(socket, PROBE_EVERY)?;
    sockopt::set_tcp_keepintvl(socket, PROBE_EVERY)?;
    sockopt::set_tcp_user_timeout(socket, DEAD_PEER.as_millis() as u32)
}
