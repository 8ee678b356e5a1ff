//! How this service's errors look to the coordinator.

use haulage_files::FilesError;
use haulage_protocol::fault::{Fault, FaultCode};
pub(crate) use haulage_service::failure::{blocking, engine, fault, joined};
use haulage_transport::bucket::BucketError;

/// A file system is mounted inside a directory of the container on the host.
pub(crate) const MOUNTED: FaultCode = FaultCode::known("mounted_inside");
/// A tmpfs of the container cannot be read or made.
pub(crate) const TMPFS: FaultCode = FaultCode::known("tmpfs_failed");
/// The files did not reach the disk.
pub(crate) const NOT_PERSISTED: FaultCode = FaultCode::known("not_persisted");
/// The image that came out of the bucket is not the one that went in.
pub(crate) const IMAGE: FaultCode = FaultCode::known("image_failed");

pub(crate) fn files(error: &FilesError) -> Fault {
    Fault::from_error(FaultCode::new(error.code()), error)
}

pub(crate) fn bucket(error: &BucketError) -> Fault {
    Fault::from_error(FaultCode::new(error.code()), error)
        .remedy("see whether the bucket (--bucket) can be read and written from both hosts")
}
