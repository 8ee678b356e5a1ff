//! How this service's errors look to the coordinator.

use haulage_protocol::fault::{Fault, FaultCode, code};
pub(crate) use haulage_service::failure::{fault, joined};

/// Writes cannot be tracked, or memory cannot be read.
pub(crate) const TRACKING: FaultCode = FaultCode::known("tracking_failed");
/// The page store of the target cannot be made, filled or sealed.
pub(crate) const STORE: FaultCode = FaultCode::known("page_store_failed");

pub(crate) fn no_session(what: &str) -> Fault {
    Fault::new(code::OUT_OF_ORDER, format!("this page-shipper has no {what} session of the migration"))
        .remedy("it was restarted in between: the migration is rolled back, start it again")
}
