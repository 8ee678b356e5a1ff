//! Identifiers, each its own type, validated where it enters the system.
//!
//! Every identifier that becomes a token of a NATS subject or a key of a KV bucket is restricted to
//! `[A-Za-z0-9_-]`, 1 to 64 characters: no dot, no wildcard, no white space, no path separator.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The longest identifier that is accepted, in characters.
pub const MAX_TOKEN: usize = 64;

/// An identifier that is not 1 to 64 characters of `[A-Za-z0-9_-]`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{kind} {given:?} is not 1 to {MAX_TOKEN} characters of letters, digits, '-' and '_'")]
pub struct InvalidId {
    kind: &'static str,
    given: String,
}

fn check(kind: &'static str, given: &str) -> Result<(), InvalidId> {
    let fits = !given.is_empty() && given.len() <= MAX_TOKEN;
    if fits && given.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_') {
        Ok(())
    } else {
        // What a stranger sends may be long: the message need not be.
        Err(InvalidId { kind, given: given.chars().take(MAX_TOKEN).collect() })
    }
}

macro_rules! token_id {
    ($(#[$doc:meta])* $name:ident, $kind:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The identifier as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<String> for $name {
            type Error = InvalidId;
            fn try_from(given: String) -> Result<Self, InvalidId> {
                check($kind, &given)?;
                Ok(Self(given))
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;
            fn from_str(given: &str) -> Result<Self, InvalidId> {
                Self::try_from(given.to_owned())
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

token_id! {
    /// One migration. Whoever submits a job chooses it; the same id twice is the same migration.
    MigrationId, "migration id"
}
token_id! {
    /// A host of the fleet, as its services were configured to call it.
    HostId, "host id"
}
token_id! {
    /// A container as its Docker engine names it: 64 hexadecimal digits, unique across engines.
    ContainerId, "container id"
}
token_id! {
    /// One running coordinator process.
    CoordinatorId, "coordinator id"
}

impl MigrationId {
    /// A fresh id, ordered by time (UUID version 7, without hyphens).
    #[must_use]
    pub fn generate() -> Self {
        Self(uuid::Uuid::now_v7().simple().to_string())
    }
}

impl CoordinatorId {
    /// A fresh id for a process that starts.
    #[must_use]
    pub fn generate() -> Self {
        Self(uuid::Uuid::new_v4().simple().to_string())
    }
}

/// Counts the coordinators that have owned a migration, from 1. A service obeys the highest it has seen
/// and refuses what comes from an earlier one, so an owner that was taken for dead cannot interfere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Epoch(pub u64);

/// Numbers the commands of one migration, from 1, across owners: a command that is sent again keeps its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Step(pub u64);

/// A pre-copy round, from 0 (the first sends every page).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Round(pub u32);

impl Round {
    /// The round after this one.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for Round {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_that_would_break_a_subject_are_refused() {
        for bad in ["", "a.b", "a b", "*", ">", "a/b", "..", "ä", &"x".repeat(65)] {
            assert!(bad.parse::<HostId>().is_err(), "{bad:?}");
            assert!(serde_json::from_value::<HostId>(serde_json::json!(bad)).is_err(), "{bad:?}");
        }
        assert_eq!("host-a_1".parse::<HostId>().unwrap().as_str(), "host-a_1");
    }

    #[test]
    fn generated_ids_are_valid() {
        let id = MigrationId::generate();
        assert_eq!(id.as_str().parse::<MigrationId>().unwrap(), id);
    }
}
