//! Benchmarks: what a move costs its users, against other ways to do it, side by side in one run.
//!
//! ```text
//!   plan ── cells, the most important first ──▶ runner ── one run after another, contenders in turn ──▶ report
//!                                                 │
//!     a run:   start the load ─ probes on ─ settle ─ move to the other host ─ settle ─ verify
//!              engine: haul | runc | docker | podman          link: tc tbf      wire: packet counters
//! ```
//!
//! A *cell* is one workload on one link. Each of its *contenders* (ways to move it) has a copy of the workload, which
//! travels to and fro between the two hosts of a [`crate::Fleet`]. Contenders take turns, so that what disturbs the
//! machine disturbs all of them; the first run of each is discarded. Figures mean something only side by side.

pub mod about;
pub mod bound;
pub mod cell;
pub mod engine;
pub mod link;
pub mod load;
pub mod marks;
pub mod plan;
pub mod plot;
pub mod probe;
pub mod publish;
pub mod redis;
pub mod report;
pub mod runner;
pub mod sample;
pub mod schedule;
pub mod stats;
pub mod usage;
pub mod wire;
pub mod writer;
