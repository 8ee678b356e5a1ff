//! What travels on the bulk connection of the pages.
//!
//! ```text
//! source                         target
//!   | BATCH*                       |   applied as they come
//!   | ROUND_END -----------------> |
//!   | <------------------------ OK |   all of the round is stored
//!   |   …                          |
//!   | BATCH*, MANIFEST*            |
//!   | FINISH --------------------> |
//!   | <------------------ FINISHED |   the store holds exactly the manifest's pages, and is sealed
//!   | <-------------------- FAILED |   instead of any answer, and nothing after it
//! ```

use haulage_protocol::unit::Pages;
use haulage_transport::stream::FrameKind;
use serde::{Deserialize, Serialize};

/// The session's role on the bulk listener.
pub(crate) const ROLE: &str = "pages";

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
/// The target gives up: a `Fault`.
pub(crate) const FAILED: FrameKind = own(6);

/// What the sealed store holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Finished {
    pub(crate) pages: Pages,
    pub(crate) dropped: Pages,
}
