//! What a service of a host announces of itself, in a KV bucket whose entries expire.

use serde::{Deserialize, Serialize};

use crate::id::HostId;
use crate::rpc::Service;
use crate::unit::Micros;
use crate::version::Version;

/// One service of one host, as announced every few seconds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Presence {
    /// The protocol version it speaks.
    pub version: Version,
    /// The release it is of.
    pub release: String,
    /// The host.
    pub host: HostId,
    /// The service.
    pub service: Service,
    /// Its process id on the host.
    pub pid: u32,
    /// When it announced this, on its own clock, since the Unix epoch.
    pub at: Micros,
    /// What else is worth knowing, such as kernel, engine and CRIU versions; for people.
    #[serde(default)]
    pub facts: std::collections::BTreeMap<String, String>,
}
