//! How this service's errors look to the coordinator.

use haulage_engine::{EngineError, EngineErrorKind, GatherError, Refusal};
use haulage_protocol::fault::{Fault, FaultCode, code};
pub(crate) use haulage_service::failure::{ENGINE, fault, joined};

/// Docker has processes in the container that are not of its tree, such as a `docker exec`.
pub(crate) const EXEC_SESSION: FaultCode = FaultCode::known("exec_session");
/// The cgroup could not be frozen.
pub(crate) const FREEZE: FaultCode = FaultCode::known("freeze_failed");
/// CRIU could not dump.
pub(crate) const DUMP: FaultCode = FaultCode::known("dump_failed");
/// The container could not be ended or let go.
pub(crate) const RELEASE: FaultCode = FaultCode::known("release_failed");

pub(crate) fn engine(error: &EngineError) -> Fault {
    match error.kind() {
        EngineErrorKind::NotFound => {
            Fault::from_error(code::UNKNOWN_CONTAINER, error).remedy("see `docker ps` on the host")
        }
        EngineErrorKind::Unreachable | EngineErrorKind::Timeout => {
            Fault::from_error(ENGINE, error).remedy("see whether dockerd runs on the host")
        }
        _ => Fault::from_error(ENGINE, error),
    }
}

pub(crate) fn gather(error: &GatherError) -> Fault {
    match error {
        GatherError::Engine(error) => engine(error),
        other => Fault::from_error(ENGINE, other),
    }
}

/// The first refusal is the fault; the others are told as its causes, so that all can be mended at once.
pub(crate) fn refused(refusals: &[Refusal]) -> Result<(), Fault> {
    let Some((first, others)) = refusals.split_first() else { return Ok(()) };
    let mut fault =
        Fault::new(FaultCode::new(first.code.as_str()), first.message.clone()).remedy(first.remedy.clone());
    fault.causes = others.iter().map(|other| format!("also refused: {other}")).collect();
    Err(fault)
}
