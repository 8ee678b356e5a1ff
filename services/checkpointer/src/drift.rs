//! Whether the container is still what was inspected: what the target has was made from that.

use haulage_engine::{ContainerSpec, Stage, compare};
use haulage_protocol::fault::{Fault, FaultCode, code};
use serde::Deserialize;
use serde_json::Value;

/// It was changed while it was being moved.
const CHANGED: FaultCode = FaultCode::known("container_changed");

/// Refuses a container that is not what was `inspected`. One whose freeze was `begun` before, by a checkpointer that
/// has died since, may have lost its restart policy to that.
pub(crate) fn refuse(inspected: &Value, now: &ContainerSpec, begun: bool) -> Result<(), Fault> {
    let inspected = ContainerSpec::deserialize(inspected).map_err(|error| {
        Fault::new(code::MALFORMED, "the description of the container cannot be understood")
            .because(&error)
            .remedy("run the same release of haulage on every host")
    })?;
    let stage = if begun { Stage::Created } else { Stage::Adopted };
    let differences = compare(&inspected, now, stage);
    let Some((first, others)) = differences.split_first() else { return Ok(()) };
    let message = format!("the container was changed while it was being moved: {first}");
    let mut fault = Fault::new(CHANGED, message).remedy("it runs on as it is: start the migration again");
    fault.causes = others.iter().map(|other| format!("also changed: {other}")).collect();
    Err(fault)
}
