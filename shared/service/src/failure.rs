//! Errors of a service's work, as the coordinator is told of them.

#[cfg(feature = "engine")]
mod engine;

use std::error::Error;

use haulage_protocol::fault::{Fault, FaultCode, code};
use tokio::task::JoinError;

#[cfg(feature = "engine")]
pub use engine::{engine, gather, refused};

/// The container engine could not do what was asked.
pub const ENGINE: FaultCode = FaultCode::known("engine_failed");

/// Turns an error and its sources into a fault of this code, for `map_err`.
pub fn fault<E: Error>(code: FaultCode) -> impl Fn(E) -> Fault {
    move |error| Fault::from_error(code.clone(), &error)
}

/// Does what blocks on a thread that is for such.
///
/// # Errors
/// The work's own fault, or `internal` when it panicked.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Fault> + Send + 'static,
) -> Result<T, Fault> {
    joined(tokio::task::spawn_blocking(work).await)
}

/// The result of work on another thread, whose panic is a defect of the service.
///
/// # Errors
/// The work's own fault, or `internal`.
pub fn joined<T>(result: Result<Result<T, Fault>, JoinError>) -> Result<T, Fault> {
    result.unwrap_or_else(|error| {
        Err(Fault::new(code::INTERNAL, "a worker of this service died").because(&error))
    })
}
