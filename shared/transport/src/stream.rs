//! Bulk data between two hosts: token-authenticated, framed, checksummed TCP.
//!
//! ```text
//!  connecting side                              BulkListener (one per service)
//!  ───────────────                              ──────────────────────────────
//!  TCP connect ───────────────────────────────▶ accept
//!  HELLO {version, session, role, token} ─────▶ within the handshake deadline, bounded
//!                                               │ token right and the session open
//!  ◀──────────────────────────────── WELCOME ───┤──▶ BulkConnection to the session's owner
//!                                               │ anything else
//!  ◀──────────────── REFUSED {code, message} ───┘──▶ counted, closed; nothing else is affected
//!
//!  frames of the session's own kinds, both ways
//!  END ───────────────────────────────────────▶ `recv` returns None: this direction is complete
//! ```
//!
//! A stream which stops without `END` was cut off: the reader gets [`StreamError::Truncated`], never a quiet end.
//! After any error a connection is of no further use and is to be dropped; what its frames already delivered
//! stays delivered.

mod connection;
mod error;
mod frame;
mod hello;
mod listener;
mod pace;

pub use connection::{BulkConnection, BulkReceiver, BulkSender};
pub use error::StreamError;
pub use frame::{Frame, FrameKind, HEADER_BYTES, MAX_PAYLOAD_BYTES};
pub use hello::{Hello, SessionKey, Token, VERSION};
pub use listener::{BulkListener, BulkSession, Refusals};
pub use pace::Pace;

#[cfg(test)]
mod tests;
