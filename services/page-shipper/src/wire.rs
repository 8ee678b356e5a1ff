//! What travels on the bulk connections of the pages. Batches may go on any of them, all else on the first.
//!
//! ```text
//! source                         target
//!   | BATCH*                       |   stored as they come, in any order
//!   | COMPLETE ------------------> |   waits for all batches that were ever sent: how many, u64
//!   | NAMED*                       |   pages that equal others, copied from these
//!   | ROUND_END -----------------> |
//!   | <------------------------ OK |   all of the round is stored
//!   |   …                          |
//!   | BATCH*, COMPLETE, NAMED*,    |
//!   | MANIFEST*                    |
//!   | FINISH --------------------> |
//!   | <------------------ FINISHED |   the store holds exactly the manifest's pages, and is sealed
//!   | <-------------------- FAILED |   instead of any answer, and nothing after it
//! ```
//! With OWED* after MANIFEST*, pages are still to come after FINISHED; the container runs on the target meanwhile:
//!
//! ```text
//!   | <------------------- WANTED* |   what somebody waits for, and once: send the rest
//!   | BATCH* --------------------> |   what is wanted on a connection of its own, the rest on the first one
//!   | <----------------------- end |   nothing is missing
//! ```

use haulage_protocol::fault::{Fault, code};
use haulage_protocol::unit::Pages;
use haulage_service::bulk::Cargo;
use haulage_transport::stream::FrameKind;
use serde::{Deserialize, Serialize};

/// What the sessions are for.
pub(crate) const CARGO: Cargo = Cargo { role: "pages", failed: own(6) };

const fn own(n: u16) -> FrameKind {
    FrameKind(FrameKind::FIRST_OWN.0 + n)
}

/// A batch of pages.
pub(crate) const BATCH: FrameKind = own(0);
/// The round is complete.
pub(crate) const ROUND_END: FrameKind = own(1);
/// A part of the final manifest.
pub(crate) const MANIFEST: FrameKind = own(2);
/// The manifest is complete.
pub(crate) const FINISH: FrameKind = own(3);
/// The target has stored the round.
pub(crate) const OK: FrameKind = own(4);
/// The target has sealed its store: a [`Finished`].
pub(crate) const FINISHED: FrameKind = own(5);
/// How many batches have been sent on all connections, since the beginning.
pub(crate) const COMPLETE: FrameKind = own(7);
/// Pages as names of others.
pub(crate) const NAMED: FrameKind = own(8);
/// A part of the manifest of what is owed.
pub(crate) const OWED: FrameKind = own(9);
/// A word of the page server's: [`haulage_pages::owed::Word`].
pub(crate) const WANTED: FrameKind = own(10);

/// Bytes to measure the link with ([`crate::probe`]).
pub(crate) const PROBE: FrameKind = own(9);
/// All bytes of a burst.
pub(crate) const PROBE_END: FrameKind = own(10);

/// What is said to who sends another.
pub(crate) fn out_of_place(kind: FrameKind) -> Fault {
    Fault::new(code::MALFORMED, format!("a frame of kind {} does not belong here", kind.0))
}

/// What the sealed store holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Finished {
    pub(crate) pages: Pages,
    pub(crate) dropped: Pages,
}
