//! What the services of Haulage say to one another: ids, subjects, requests, replies, faults, versions.
//!
//! Nothing here does any IO. A migration as these messages see it (S: source host, T: target host):
//!
//! ```text
//! coordinator                S: checkpointer  page-shipper  syncer     T: restorer  page-shipper  syncer
//!   |-- Inspect ------------------>|               |           |            |            |           |
//!   |-- Check --------------------------------------------------------------->|            |           |
//!   |   (lease)                    |               |           |            |            |           |
//!   |-- PushImage ------------------------------------------->|== bucket ==================>| PullImage |
//!   |-- Create -------------------------------------------------------------->|            |           |
//!   |-- OpenPages, OpenFiles ------------------------------------------------------------->|---------->|
//!   |-- SyncFiles -------------------------------------------->|== stream ===========================>|
//!   |-- StartTracking, RunRound* ----------------->|== stream ===========================>|           |
//!   |-- PrepareFreeze, Freeze ---->|               |           |            |            |           |
//!   |-- Dump, FinalRound, SyncFiles (in parallel)->|==========>|            |            |           |
//!   |-- SyncFiles (images) ----------------------------------->|== stream ===========================>|
//!   |-- Restore, Verify ------------------------------------------------------>|            |           |
//!   |   (the commit is recorded)   |               |           |            |            |           |
//!   |-- Adopt, PersistFiles -------------------------------------------------->|------------------------>|
//!   |-- Commit ------------------->|               |           |            |            |           |
//!   |-- ClosePages, CloseFiles ------------------->|---------->|----------------------------->|---------->|
//! ```
//!
//! Undo, at any point before the record: `Undo` on T, then `RollBack` on S.

pub mod checkpointer;
pub mod event;
pub mod fault;
pub mod host;
pub mod id;
pub mod job;
pub mod lease;
pub mod page_shipper;
pub mod policy;
pub mod restorer;
pub mod rpc;
pub mod secret;
pub mod subject;
pub mod syncer;
pub mod transfer;
pub mod unit;
pub mod version;
