//! How this service's errors look to the coordinator.

use haulage_engine::{EngineError, EngineErrorKind, GatherError};
use haulage_protocol::fault::{Fault, FaultCode};
use haulage_service::failure;
pub(crate) use haulage_service::failure::{ENGINE, blocking, fault, joined, refused};

/// Something of that name appeared on this host after it was checked.
pub(crate) const CONFLICT: FaultCode = FaultCode::known("target_conflict");
/// The container did not come to life.
pub(crate) const RESTORE: FaultCode = FaultCode::known("restore_failed");
/// It came to life and ended.
pub(crate) const NOT_RUNNING: FaultCode = FaultCode::known("not_running");
/// Images and pages do not fit together.
pub(crate) const IMAGES: FaultCode = FaultCode::known("bad_images");
/// A file of this service cannot be read or written.
pub(crate) const STATE: FaultCode = FaultCode::known("state_failed");

pub(crate) fn engine(error: &EngineError) -> Fault {
    match error.kind() {
        EngineErrorKind::Conflict => {
            Fault::from_error(CONFLICT, error).remedy("remove or rename what has that name on the target")
        }
        _ => failure::engine(error),
    }
}

pub(crate) fn gather(error: &GatherError) -> Fault {
    failure::gather(error, engine)
}
