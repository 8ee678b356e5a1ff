//! What every service's process has in common: configuration, logs, connection, announcement, stopping; and what
//! several services of a host do alike: bulk sessions, notes, passing files, faults.

pub mod bulk;
pub mod config;
pub mod failure;
pub mod notes;
mod presence;
mod run;
pub mod scratch;
pub mod shutdown;
pub mod telemetry;

pub use presence::now;
pub use run::{Shell, block_on, chain, connect, run_host_service};
