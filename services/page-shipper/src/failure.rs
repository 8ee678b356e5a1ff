//! How this service's errors look to the coordinator.

use std::error::Error;
use std::io;

use haulage_pages::target::TargetError;
use haulage_protocol::fault::{Fault, FaultCode, code};
pub(crate) use haulage_service::failure::{fault, joined};

/// Writes cannot be tracked, or memory cannot be read.
pub(crate) const TRACKING: FaultCode = FaultCode::known("tracking_failed");
/// The page store of the target cannot be made, filled or sealed.
pub(crate) const STORE: FaultCode = FaultCode::known("page_store_failed");

/// What to do about a store that is full.
pub(crate) const MAKE_ROOM: &str =
    "make room on the target under its --page-dir or --state-dir, or choose another target";

/// The store could not take something in.
pub(crate) fn not_stored(error: &TargetError) -> Fault {
    let fault = Fault::from_error(STORE, error);
    match is_full(error) {
        true => fault.remedy(MAKE_ROOM),
        false => fault,
    }
}

/// Whether a file system without room, or a limit on its use, is at the bottom of it.
fn is_full(error: &(dyn Error + 'static)) -> bool {
    let mut cause = Some(error);
    while let Some(error) = cause {
        let kind = error.downcast_ref::<io::Error>().map(io::Error::kind);
        if matches!(kind, Some(io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)) {
            return true;
        }
        cause = error.source();
    }
    false
}

pub(crate) fn no_session(what: &str) -> Fault {
    Fault::new(code::OUT_OF_ORDER, format!("this page-shipper has no {what} session of the migration"))
        .remedy("it was restarted in between: the migration is rolled back, start it again")
}
