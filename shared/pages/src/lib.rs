//! The memory of a container in motion: which pages there are, which were written, how they are carried and where they
//! are kept. No unsafe code; the kernel is reached through `haulage-sys`.
//!
//! ```text
//!  source host                                                        target host
//!  process, maps ─► track (write_protect | soft_dirty | none)
//!  object, contents, given_back ─► shared │ dirty, forgotten
//!                      ▼
//!                    ledger ◄─ policy, adaptive, history
//!                      │ pages to send
//!                      ▼
//!                    gather ─► known ─► encode ═ bytes ══════► frame, codec ─► store ─► sealed ─► serve
//!  [source: SourceEngine]                                      [target: TargetEngine]  [the restorer: PageServer]
//!                    manifest: exactly the pages that exist at the freeze ═════►
//!                    owed: what of them follows when the container runs on the target ═════► link ─► serve
//! ```
//!
//! # What must hold
//! - A page is left out at the freeze only if its mapping is still registered by us, the kernel says it was not written,
//!   and it was sent since it was last protected. Everything else that exists is sent.
//! - After [`target::TargetEngine::finish`] the store holds exactly the pages of the manifest, each with the bytes it
//!   had at the freeze. After [`target::TargetEngine::finish_owing`] it does but for those that are owed, which nobody
//!   can read before they have come.

mod absent;
pub mod adaptive;
mod births;
pub mod choice;
mod chunk;
pub mod codec;
mod contents;
mod direct_io;
pub mod encode;
mod entries;
pub mod frame;
mod gather;
mod given_back;
pub mod history;
pub mod in_flight;
mod index;
pub mod known;
pub mod ledger;
pub mod link;
pub mod manifest;
pub mod maps;
mod named;
pub mod none;
pub mod object;
pub mod obstacle;
pub mod owed;
pub mod policy;
pub mod process;
mod program;
pub mod range;
mod report;
pub mod sealed;
mod segments;
pub mod serve;
mod shared;
pub mod soft_dirty;
pub mod source;
mod space;
pub mod store;
pub mod target;
pub mod track;
pub mod write_protect;

pub use gather::{PageBatch, Sink};
pub use index::IndexError;
