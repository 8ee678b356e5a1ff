//! How this service's errors look to the coordinator.

use haulage_engine::{EngineError, EngineErrorKind};
use haulage_files::FilesError;
use haulage_protocol::fault::{Fault, FaultCode, code};
pub(crate) use haulage_service::failure::{ENGINE, fault, joined};
use haulage_transport::bucket::BucketError;
use haulage_transport::stream::StreamError;

/// A file system is mounted inside a directory of the container on the host.
pub(crate) const MOUNTED: FaultCode = FaultCode::known("mounted_inside");
/// The files did not reach the disk.
pub(crate) const NOT_PERSISTED: FaultCode = FaultCode::known("not_persisted");
/// The image that came out of the bucket is not the one that went in.
pub(crate) const IMAGE: FaultCode = FaultCode::known("image_failed");

pub(crate) fn engine(error: &EngineError) -> Fault {
    match error.kind() {
        EngineErrorKind::Unreachable | EngineErrorKind::Timeout => {
            Fault::from_error(ENGINE, error).remedy("see whether dockerd runs on the host")
        }
        _ => Fault::from_error(ENGINE, error),
    }
}

pub(crate) fn stream(error: &StreamError) -> Fault {
    Fault::from_error(FaultCode::new(error.code()), error)
        .remedy("see whether the target's bulk address can be reached from the source host")
}

pub(crate) fn files(error: &FilesError) -> Fault {
    Fault::from_error(FaultCode::new(error.code()), error)
}

pub(crate) fn bucket(error: &BucketError) -> Fault {
    Fault::from_error(FaultCode::new(error.code()), error)
        .remedy("see whether the bucket (--bucket) can be read and written from both hosts")
}

pub(crate) fn no_answer(what: &str) -> Fault {
    Fault::new(code::UNREACHABLE, format!("the target does not say that it has {what}"))
}
