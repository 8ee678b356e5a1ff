//! Exact copies of directory trees, made in passes while their contents change.
//!
//! ```text
//!  source host                                            target host
//!  ───────────                                            ───────────
//!  Source::pass(None)  ── everything ──────────────────▶  Applier::feed   (the root is emptied first)
//!      │ Base: what the target has now                        │ Targets remember the pass's id
//!  Source::pass(Base)  ── what changed since ──────────▶  Applier::feed   (only upon that very pass)
//!      ⋮
//!  freeze, Source::pass(Base) ── the last changes ─────▶  Applier::feed   ── now both are the same
//! ```
//!
//! A pass is a scan ([`scan`]), a plan made from two snapshots ([`delta`], pure), and the records that carry it
//! out ([`wire`]), gathered into frames of some MiB at most. All of it blocks: it belongs on a thread of its own.
//!
//! The trees are overlay2 upper directories, taken raw (a whiteout is a character device 0:0, an opaque directory
//! an extended attribute), named volumes, and directories of images and logs. Ownership, modes, times, extended
//! attributes, links, devices and holes come over; host-local marks ([`xattrs`]) and access times do not.
//!
//! A container may do anything to its files while they are read, as root of them: no path is followed through a
//! symbolic link or out of the root, on either side.

pub mod delta;
mod entry;
mod error;
mod path;
pub mod scan;
pub mod source;
pub mod target;
mod tree;
pub mod wire;
pub mod xattrs;

pub use entry::{Entry, Kind, Meta, Snapshot, Time, Xattr};
pub use error::FilesError;
pub use path::RelPath;
pub use source::{Base, FrameSink, Pass, SinkClosed, Source};
pub use target::{Applier, Targets};
pub use wire::{PassId, PassReport, RootId, Totals};

#[cfg(test)]
mod tests;
