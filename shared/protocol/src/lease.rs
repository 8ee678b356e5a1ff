//! Who has a container: one migration of it at a time.

use serde::{Deserialize, Serialize};

use crate::fault::{Fault, code};
use crate::id::MigrationId;

/// The entry of a container that is being moved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// By whom.
    pub migration: MigrationId,
}

impl Lease {
    /// What is said to others who want the container.
    #[must_use]
    pub fn held(&self) -> Fault {
        let holder = &self.migration;
        Fault::new(code::LEASE_HELD, format!("the container is being moved by migration {holder}"))
            .remedy(format!("wait for it, or cancel it: haul cancel {holder}"))
    }
}
