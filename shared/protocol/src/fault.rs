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
    /// The container had stood still for too long before the target could be asked to restore it.
    pub const FROZEN_TOO_LONG: FaultCode = FaultCode::known("frozen_too_long");
    /// The container would stand still for longer than it may: it writes faster than its memory can be sent.
    pub const CANNOT_CONVERGE: FaultCode = FaultCode::known("cannot_converge");
    /// The container runs on the target and lacks memory yet: to be asked again.
    pub const MEMORY_INCOMPLETE: FaultCode = FaultCode::known("memory_incomplete");
    /// The container ran on the target, and the source that owed it memory, or the way to it, was lost.
    pub const POST_COPY_FAILED: FaultCode = FaultCode::known("post_copy_failed");
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
        let mut told = chain(error).into_iter();
        let message = told.next().unwrap_or_default();
        Self { causes: told.collect(), ..Self::new(code, message) }
    }

    /// Adds what to do about it.
    #[must_use]
    pub fn remedy(mut self, remedy: impl Into<String>) -> Self {
        self.remedy = Some(remedy.into());
        self
    }

    /// Adds an error and the chain of its sources as causes.
    #[must_use]
    pub fn because(mut self, error: &dyn Error) -> Self {
        self.causes.extend(chain(error));
        self
    }

    /// Whether the effect may have happened although no answer says so.
    #[must_use]
    pub fn is_unreachable(&self) -> bool {
        self.code == code::UNREACHABLE
    }
}

/// What an error and its sources say, outermost first, each thing once: many an error of other crates ends with what
/// its source says.
#[must_use]
pub fn chain(error: &dyn Error) -> Vec<String> {
    let mut told: Vec<String> = Vec::new();
    let mut next = Some(error);
    while let Some(error) = next {
        let text = error.to_string();
        for said in &mut told {
            if let Some(own) = said.strip_suffix(&text).and_then(|own| own.strip_suffix(": ")) {
                *said = own.to_owned();
            }
        }
        if told.last() != Some(&text) {
            told.push(text);
        }
        next = error.source();
    }
    told
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

    /// An error that says what its source says.
    #[derive(Debug)]
    struct Talkative(&'static str, Option<Box<Talkative>>);

    impl fmt::Display for Talkative {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str(self.0)?;
            self.1.iter().try_for_each(|source| write!(f, ": {source}"))
        }
    }

    impl Error for Talkative {
        fn source(&self) -> Option<&(dyn Error + 'static)> {
            self.1.as_deref().map(|source| source as _)
        }
    }

    #[test]
    fn nothing_is_told_twice() {
        let talkative = |texts: &[&'static str]| {
            texts.iter().rev().fold(None, |inner, text| Some(Box::new(Talkative(text, inner)))).unwrap()
        };
        let error = talkative(&["no responders", "no responders"]);
        assert_eq!(error.to_string(), "no responders: no responders");
        assert_eq!(chain(&*error), ["no responders"]);
        let fault = Fault::from_error(code::INTERNAL, &*talkative(&["cannot ask", "timed out", "5 s"]));
        assert_eq!(fault.to_string(), "cannot ask (internal): timed out: 5 s");
        assert_eq!(chain(&*talkative(&["a", "b", "a"])), ["a", "b", "a"]);
    }

    #[test]
    fn an_unknown_code_survives() {
        let fault: Fault = serde_json::from_str(r#"{"code":"from_the_future","message":"m"}"#).unwrap();
        assert_eq!(fault.code.as_str(), "from_the_future");
    }
}
