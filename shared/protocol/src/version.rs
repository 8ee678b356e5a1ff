//! The protocol's version and the range that this release speaks.

use std::fmt;
use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};

/// The version of a message. It grows when a message changes so that an older reader would misread it; a new
/// optional field does not count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Version(pub u16);

impl Version {
    /// What this release writes.
    pub const CURRENT: Self = Self(1);

    /// The supported range, for messages.
    #[must_use]
    pub fn range_text() -> String {
        let (first, last) = (SUPPORTED.start(), SUPPORTED.end());
        if first == last { first.to_string() } else { format!("{first} to {last}") }
    }
}

/// What this release reads.
pub const SUPPORTED: RangeInclusive<Version> = Version(1)..=Version::CURRENT;

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
