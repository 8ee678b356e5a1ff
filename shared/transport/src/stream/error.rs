//! Why a bulk connection failed.

use std::io;

use super::frame::MAX_PAYLOAD_BYTES;

/// Why a bulk connection could not be made or did not carry a frame.
///
/// The connection it came from is of no further use.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StreamError {
    /// The peer's bytes are not frames of this protocol.
    #[error("the peer's bytes are not a bulk frame")]
    BadMagic,
    /// The peer speaks another version of the bulk protocol.
    #[error("the peer speaks version {peer} of the bulk protocol, this side {ours}")]
    BadVersion {
        /// What the peer said.
        peer: u16,
        /// What this side speaks.
        ours: u16,
    },
    /// The first frame was no greeting, or one which cannot be read.
    #[error("the peer's greeting cannot be read")]
    BadHello,
    /// The token is not the session's.
    #[error("the token is not the session's")]
    WrongToken,
    /// No session of this name is open here.
    #[error("no session {session} is open here")]
    UnknownSession {
        /// Migration and role, as asked for.
        session: String,
    },
    /// The session's owner has more connections waiting than it takes.
    #[error("session {session} has too many connections waiting")]
    SessionBusy {
        /// Migration and role, as asked for.
        session: String,
    },
    /// A session of this name is open already.
    #[error("session {session} is open already")]
    SessionExists {
        /// Migration and role, as asked for.
        session: String,
    },
    /// A frame announces more payload than is allowed at this point.
    #[error("a frame of {length} bytes is over the limit of {limit}")]
    FrameTooLarge {
        /// Announced payload bytes.
        length: u64,
        /// Allowed payload bytes: [`MAX_PAYLOAD_BYTES`], less in the handshake.
        limit: u64,
    },
    /// A frame's checksum does not match its header and payload.
    #[error("a frame's checksum does not match")]
    ChecksumMismatch,
    /// The stream stopped without its end being announced.
    #[error("the stream was cut off")]
    Truncated,
    /// A frame of another kind was due.
    #[error("a frame of kind {got:#06x} came where another was due")]
    UnexpectedFrame {
        /// The kind which came.
        got: u16,
    },
    /// The peer did not do its part in time.
    #[error("the peer did not {what} in time")]
    Timeout {
        /// What the peer was to do.
        what: &'static str,
    },
    /// The listening side refused this connection.
    #[error("the peer refused the connection ({code}): {message}")]
    Refused {
        /// The listening side's [`StreamError::code`].
        code: String,
        /// Its message.
        message: String,
    },
    /// The system's random source failed.
    #[error("no random bytes for a token")]
    NoRandomness,
    /// The socket failed.
    #[error("bulk socket: {action}")]
    Io {
        /// What was being done.
        action: &'static str,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
}

impl StreamError {
    /// The stable code of this error, for faults and counters. A refusal has the code which the peer gave.
    pub fn code(&self) -> &str {
        match self {
            Self::BadMagic => "bad_magic",
            Self::BadVersion { .. } => "bad_version",
            Self::BadHello => "bad_hello",
            Self::WrongToken => "wrong_token",
            Self::UnknownSession { .. } => "unknown_session",
            Self::SessionBusy { .. } => "session_busy",
            Self::SessionExists { .. } => "session_exists",
            Self::FrameTooLarge { .. } => "frame_too_large",
            Self::ChecksumMismatch => "checksum_mismatch",
            Self::Truncated => "truncated",
            Self::UnexpectedFrame { .. } => "unexpected_frame",
            Self::Timeout { .. } => "timeout",
            Self::Refused { code, .. } => code,
            Self::NoRandomness | Self::Io { .. } => "io",
        }
    }

    /// An [`io::Error`] met while doing `action`: a cut-off stream is [`Truncated`](Self::Truncated).
    pub(super) fn io(action: &'static str, source: io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::UnexpectedEof => Self::Truncated,
            io::ErrorKind::TimedOut => Self::Timeout { what: "answer" },
            _ => Self::Io { action, source },
        }
    }

    pub(super) fn too_large(length: usize) -> Self {
        Self::FrameTooLarge { length: length as u64, limit: MAX_PAYLOAD_BYTES as u64 }
    }
}
