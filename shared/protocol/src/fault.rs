//! The wire error: a stable code that programs match on, and what a person needs: what happened, why, and
//! what to do about it.

use std::borrow::Cow;
use std::error::Error;
use std::fmt;

use serde::{Deserialize, Serialize};

/// A stable code in `snake_case`. The catalogue of those that this crate's users match on is in [`code`];
/// a service may send others, and a reader keeps what it does not know.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct FaultCode(Cow<'static, str>);

impl FaultCode {
    /// A code of the catalogue.
    #[must_use]
    pub const fn known(code: &'static str) -> Self {
        Self(Cow::Borrowed(code))
    }

    /// A code that was made elsewhere, such as a refusal's.
    #[must_use]
    pub fn new(code: impl Into<String>) -> Self {
        Self(Cow::Owned(code.into()))
    }

    /// The code as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for FaultCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The codes that the control plane itself gives and reacts to. Refusals of a pre-flight have their own.
pub mod code {
    use super::FaultCode;

    /// Nobody serves the subject, or no answer came in time: the effect may or may not have happened.
    pub const UNREACHABLE: FaultCode = FaultCode::known("unreachable");
    /// The host is not registered, or its registration has expired.
    pub const UNKNOWN_HOST: FaultCode = FaultCode::known("unknown_host");
    /// No engine that was asked has the container.
    pub const UNKNOWN_CONTAINER: FaultCode = FaultCode::known("unknown_container");
    /// Several hosts have a container of that name.
    pub const AMBIGUOUS_CONTAINER: FaultCode = FaultCode::known("ambiguous_container");
    /// Source and target are the same host.
    pub const SAME_HOST: FaultCode = FaultCode::known("same_host");
    /// Another migration of this container is under way.
    pub const LEASE_HELD: FaultCode = FaultCode::known("lease_held");
    /// The lease is no longer this migration's.
    pub const LEASE_LOST: FaultCode = FaultCode::known("lease_lost");
    /// The message could not be understood.
    pub const MALFORMED: FaultCode = FaultCode::known("malformed_message");
    /// The message is of a protocol version that this service does not speak.
    pub const FOREIGN_VERSION: FaultCode = FaultCode::known("foreign_version");
    /// The command comes from a coordinator that no longer owns the migration.
    pub const STALE_EPOCH: FaultCode = FaultCode::known("stale_epoch");
    /// The command was given up on before it arrived.
    pub const SUPERSEDED: FaultCode = FaultCode::known("superseded");
    /// An operator cancelled the migration.
    pub const CANCELLED: FaultCode = FaultCode::known("cancelled");
    /// An operator vouched that the target host is dead.
    pub const TARGET_DEAD: FaultCode = FaultCode::known("target_dead");
    /// The migration is over, or past the point where it can be cancelled.
    pub const NOT_CANCELLABLE: FaultCode = FaultCode::known("not_cancellable");
    /// No migration has that id.
    pub const UNKNOWN_MIGRATION: FaultCode = FaultCode::known("unknown_migration");
    /// The hold on the frozen source was lost, so its dump no longer matches it.
    pub const HOLD_LOST: FaultCode = FaultCode::known("hold_lost");
    /// The verb was asked before what it builds on.
    pub const OUT_OF_ORDER: FaultCode = FaultCode::known("out_of_order");
    /// A defect of the service itself.
    pub const INTERNAL: FaultCode = FaultCode::known("internal");
}

/// What went wrong, in a form that crosses hosts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    /// Stable, for programs.
    pub code: FaultCode,
    /// What happened: lowercase, no full stop.
    pub message: String,
    /// What a person can do about it, when anything is known to help.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
    /// Why, outermost first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub causes: Vec<String>,
}

impl Fault {
    /// A fault with neither remedy nor cause.
    #[must_use]
    pub fn new(code: FaultCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), remedy: None, causes: Vec::new() }
    }

    /// A fault from an error and the chain of its sources.
    #[must_use]
    pub fn from_error(code: FaultCode, error: &dyn Error) -> Self {
        Self::new(code, error.to_string()).because_chain(error.source())
    }

    /// Adds what to do about it.
    #[must_use]
    pub fn remedy(mut self, remedy: impl Into<String>) -> Self {
        self.remedy = Some(remedy.into());
        self
    }

    /// Adds an error and the chain of its sources as causes.
    #[must_use]
    pub fn because(self, error: &dyn Error) -> Self {
        self.because_chain(Some(error))
    }

    fn because_chain(mut self, mut next: Option<&dyn Error>) -> Self {
        while let Some(error) = next {
            self.causes.push(error.to_string());
            next = error.source();
        }
        self
    }

    /// Whether the effect may have happened although no answer says so.
    #[must_use]
    pub fn is_unreachable(&self) -> bool {
        self.code == code::UNREACHABLE
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.message, self.code)?;
        self.causes.iter().try_for_each(|cause| write!(f, ": {cause}"))
    }
}

impl Error for Fault {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chain_of_sources_is_kept_in_order() {
        let inner = std::io::Error::other("disk on fire");
        let outer = std::io::Error::other(inner);
        let fault = Fault::new(code::INTERNAL, "cannot write").because(&outer).remedy("put it out");
        assert_eq!(fault.causes, ["disk on fire"]);
        let wire = serde_json::to_string(&fault).unwrap();
        assert_eq!(serde_json::from_str::<Fault>(&wire).unwrap(), fault);
        assert_eq!(fault.to_string(), "cannot write (internal): disk on fire");
    }

    #[test]
    fn an_unknown_code_survives() {
        let fault: Fault = serde_json::from_str(r#"{"code":"from_the_future","message":"m"}"#).unwrap();
        assert_eq!(fault.code.as_str(), "from_the_future");
    }
}
