//! How this service's errors look to the coordinator.

use haulage_engine::{EngineError, EngineErrorKind, GatherError};
use haulage_protocol::fault::{Fault, FaultCode, code};
use haulage_service::failure;
pub(crate) use haulage_service::failure::{ENGINE, blocking, fault, joined, refused};

/// Docker has processes in the container that are not of its tree, such as a `docker exec`.
pub(crate) const EXEC_SESSION: FaultCode = FaultCode::known("exec_session");
/// The cgroup could not be frozen.
pub(crate) const FREEZE: FaultCode = FaultCode::known("freeze_failed");
/// CRIU could not dump.
pub(crate) const DUMP: FaultCode = FaultCode::known("dump_failed");
/// Asynchronous IO has ended after the container was frozen.
pub(crate) const IO_IN_FLIGHT: FaultCode = FaultCode::known("io_in_flight");
/// The container could not be ended or let go.
pub(crate) const RELEASE: FaultCode = FaultCode::known("release_failed");

pub(crate) fn engine(error: &EngineError) -> Fault {
    match error.kind() {
        EngineErrorKind::NotFound => {
            Fault::from_error(code::UNKNOWN_CONTAINER, error).remedy("see `docker ps` on the host")
        }
        _ => failure::engine(error),
    }
}

pub(crate) fn gather(error: &GatherError) -> Fault {
    failure::gather(error, engine)
}
