//! Can this host take the container? Changes nothing.

use std::sync::Arc;

use haulage_criu::version::UnfitError;
use haulage_engine::{ContainerSpec, HostFacts, Need, target_facts, target_refusals};
use haulage_protocol::fault::{Fault, FaultCode, code};
use haulage_protocol::id::MigrationId;
use haulage_protocol::restorer::{Check, Checked};
use haulage_protocol::unit::Bytes;
use haulage_service::notes;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::Restorer;
use crate::failure::{self, STATE, fault, joined};

const CHECK: &str = "check";
const CRIU: FaultCode = FaultCode::known("criu");

pub(crate) fn decode<T: DeserializeOwned>(what: &str, value: Value) -> Result<T, Fault> {
    serde_json::from_value(value).map_err(|error| {
        Fault::new(code::MALFORMED, format!("the description of {what} cannot be understood"))
            .because(&error)
            .remedy("run the same release of haulage on both hosts")
    })
}

pub(crate) async fn check(
    service: Arc<Restorer>,
    migration: MigrationId,
    ask: Check,
) -> Result<Checked, Fault> {
    let spec: ContainerSpec = decode("the container", ask.spec)?;
    let source: HostFacts = decode("the source host", ask.source)?;
    let worker = service.clone();
    joined(tokio::task::spawn_blocking(move || criu_is_fit(&worker, &migration)).await)?;
    let facts = target_facts(&service.docker, &spec).await.map_err(|error| failure::gather(&error))?;
    let image = if facts.image_present { Bytes(0) } else { ask.image_size };
    let need = Need { memory: ask.memory.0, disk: (ask.disk + image).0 };
    failure::refused(&target_refusals(&spec, &source, &facts, need))?;
    Ok(Checked { image_present: facts.image_present })
}

fn criu_is_fit(service: &Restorer, migration: &MigrationId) -> Result<(), Fault> {
    // CRIU wants a directory for its log; nothing of it is kept.
    let dir = service.dir(migration).join(CHECK);
    std::fs::create_dir_all(&dir).map_err(fault(STATE))?;
    let fit = service.criu.fit(&dir);
    notes::remove(&service.dir(migration), &[CHECK]).map_err(fault(STATE))?;
    match fit {
        Ok(_) => Ok(()),
        Err(error @ UnfitError::TooOld { .. }) => {
            Err(Fault::from_error(CRIU, &error).remedy("run deploy/setup on the target host"))
        }
        Err(error) => Err(Fault::from_error(CRIU, &error)
            .remedy("run `criu check` on the target host, and deploy/setup if it is not installed")),
    }
}
