//! Units, so that a number says what it counts.

use std::fmt;
use std::ops::{Add, AddAssign};

use serde::{Deserialize, Serialize};

macro_rules! unit {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub u64);

        impl Add for $name {
            type Output = Self;
            fn add(self, other: Self) -> Self {
                Self(self.0.saturating_add(other.0))
            }
        }

        impl AddAssign for $name {
            fn add_assign(&mut self, other: Self) {
                *self = *self + other;
            }
        }

        impl std::iter::Sum for $name {
            fn sum<I: Iterator<Item = Self>>(items: I) -> Self {
                items.fold(Self(0), Add::add)
            }
        }
    };
}

unit! {
    /// A size in bytes.
    Bytes
}
unit! {
    /// A duration in microseconds, or a time in microseconds since the Unix epoch.
    Micros
}
unit! {
    /// A number of 4 KiB pages.
    Pages
}

/// The size of a page, in bytes, on the only architecture that is supported (x86-64).
pub const PAGE_SIZE: u64 = 4096;

impl Pages {
    /// What the pages hold.
    #[must_use]
    pub fn bytes(self) -> Bytes {
        Bytes(self.0.saturating_mul(PAGE_SIZE))
    }
}

impl Micros {
    /// From a duration; saturates after half a million years.
    #[must_use]
    pub fn from_duration(d: std::time::Duration) -> Self {
        Self(u64::try_from(d.as_micros()).unwrap_or(u64::MAX))
    }

    /// The time from `earlier` to this one; zero when the clock went backwards.
    #[must_use]
    pub fn since(self, earlier: Self) -> Self {
        Self(self.0.saturating_sub(earlier.0))
    }
}

impl fmt::Display for Micros {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        #[allow(clippy::cast_precision_loss, reason = "for reading only")]
        let us = self.0 as f64;
        match self.0 {
            0..1_000 => write!(f, "{} µs", self.0),
            1_000..1_000_000 => write!(f, "{:.1} ms", us / 1e3),
            _ => write!(f, "{:.2} s", us / 1e6),
        }
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        #[allow(clippy::cast_precision_loss, reason = "for reading only")]
        let bytes = self.0 as f64;
        match self.0 {
            0..1_024 => write!(f, "{} B", self.0),
            1_024..1_048_576 => write!(f, "{:.1} KiB", bytes / 1024.0),
            1_048_576..1_073_741_824 => write!(f, "{:.1} MiB", bytes / 1_048_576.0),
            _ => write!(f, "{:.2} GiB", bytes / 1_073_741_824.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_read_well() {
        assert_eq!(Micros(999).to_string(), "999 µs");
        assert_eq!(Micros(1_500).to_string(), "1.5 ms");
        assert_eq!(Micros(2_500_000).to_string(), "2.50 s");
        assert_eq!(Bytes(1536).to_string(), "1.5 KiB");
        assert_eq!(Pages(2).bytes(), Bytes(8192));
        assert_eq!(Micros(5).since(Micros(7)), Micros(0));
    }
}
