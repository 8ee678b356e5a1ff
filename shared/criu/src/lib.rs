//! CRIU, driven through its RPC and never through its command line: dump and hold a process tree, and join its
//! images with memory that came another way. Beside it, the silence ([`quiet`]) that outlives CRIU's own.
//!
//! ```text
//!   source                                                target
//!   PagemapMask::prepare   before the freeze              Assembly::begin   images as received, linked
//!   PagemapMask::cover     hide the tracked memory        Assembly::add_pages   ours joins CRIU's
//!   LeftOut::write         what it was not told of        Assembly::add_shared  and so do our mappings
//!   Dump::start  ───────▶  HeldDump                       runc restore
//!        commit: the tree is killed
//!        roll_back, drop, our death: the tree goes on
//! ```
//!
//! All calls block; none belongs on an async executor.

pub mod cause;
pub mod companion;
pub mod descriptors;
pub mod dump;
pub mod guard;
pub mod held;
pub mod image;
pub mod inventory;
pub mod ipc;
pub mod lazy;
pub mod mask;
pub mod merge;
pub mod mm;
pub mod packets;
pub mod pagemap;
pub mod pstree;
pub mod quiet;
pub mod record_locks;
pub mod rpc;
pub mod shared;
pub mod smaps;
pub mod swrk;
pub mod tmpfs;
pub mod version;
mod wire;
