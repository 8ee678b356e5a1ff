//! How pages and files travel: what an operator may choose about it.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The most connections that pages may travel on: each has buffers of some MiB on both hosts.
pub const MAX_CONNECTIONS: u16 = 8;

/// How pages are packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Compress {
    /// As it is fastest, by what link and codecs are measured to do.
    #[default]
    Auto,
    /// Not at all.
    None,
    /// With lz4, wherever that makes them shorter.
    Lz4,
    /// With zstd, wherever that makes them shorter.
    Zstd,
}

/// A choice that does not exist, or a rate that cannot be understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TransferError {
    /// No way to pack is called so.
    #[error("{0:?} is none of auto, none, lz4, zstd")]
    Compress(String),
    /// A rate is a number above zero and a unit.
    #[error("{0:?} is no rate: give a number and a unit, such as 50MB/s, 20MiB/s or 1Gbit/s")]
    Rate(String),
}

impl FromStr for Compress {
    type Err = TransferError;

    fn from_str(text: &str) -> Result<Self, TransferError> {
        match text {
            "auto" => Ok(Self::Auto),
            "none" => Ok(Self::None),
            "lz4" => Ok(Self::Lz4),
            "zstd" => Ok(Self::Zstd),
            other => Err(TransferError::Compress(other.to_owned())),
        }
    }
}

/// Bytes in a second, never zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "u64", into = "u64")]
pub struct Rate(u64);

impl Rate {
    /// `None` for no bytes at all.
    #[must_use]
    pub const fn new(bytes_per_second: u64) -> Option<Self> {
        if bytes_per_second == 0 { None } else { Some(Self(bytes_per_second)) }
    }

    /// Bytes in a second.
    #[must_use]
    pub const fn bytes_per_second(self) -> u64 {
        self.0
    }
}

impl TryFrom<u64> for Rate {
    type Error = TransferError;

    fn try_from(bytes: u64) -> Result<Self, TransferError> {
        Self::new(bytes).ok_or_else(|| TransferError::Rate(bytes.to_string()))
    }
}

impl From<Rate> for u64 {
    fn from(rate: Rate) -> Self {
        rate.0
    }
}

impl FromStr for Rate {
    type Err = TransferError;

    /// A number, which may have a fraction, and a unit of bytes (`B`, `kB`, `MB`, `GB`, `KiB`, `MiB`, `GiB`) or bits
    /// (`bit`, `kbit`, `Mbit`, `Gbit`), with or without `/s`.
    fn from_str(text: &str) -> Result<Self, TransferError> {
        let wrong = || TransferError::Rate(text.to_owned());
        let trimmed = text.trim();
        let bare = trimmed.strip_suffix("/s").unwrap_or(trimmed);
        let digits = bare.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or_else(wrong)?;
        let (number, unit) = bare.split_at(digits);
        let number: f64 = number.parse().map_err(|_| wrong())?;
        let scale = match unit.trim_start() {
            "B" => 1.0,
            "kB" | "KB" => 1e3,
            "MB" => 1e6,
            "GB" => 1e9,
            "KiB" => 1024.0,
            "MiB" => 1_048_576.0,
            "GiB" => 1_073_741_824.0,
            "bit" => 1.0 / 8.0,
            "kbit" | "Kbit" => 1e3 / 8.0,
            "Mbit" => 1e6 / 8.0,
            "Gbit" => 1e9 / 8.0,
            _ => return Err(wrong()),
        };
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "saturates; not negative")]
        Self::new((number * scale).round() as u64).ok_or_else(wrong)
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/s", crate::unit::Bytes(self.0))
    }
}

/// How to transfer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Transfer {
    /// How pages are packed.
    pub compress: Compress,
    /// Connections that pages travel on, 1 to [`MAX_CONNECTIONS`]; what is beyond is taken for the nearest.
    pub connections: u16,
    /// What pages and files together may take of the link, in the freeze as before it.
    pub bandwidth: Option<Rate>,
}

impl Default for Transfer {
    fn default() -> Self {
        Self { compress: Compress::Auto, connections: 1, bandwidth: None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_read_in_bytes_and_bits() {
        for (text, bytes) in [
            ("50MB/s", 50_000_000),
            ("1Gbit/s", 125_000_000),
            ("1.5 MiB", 1_572_864),
            ("8bit/s", 1),
            ("100kbit", 12_500),
            ("2GB", 2_000_000_000),
        ] {
            assert_eq!(text.parse::<Rate>().map(Rate::bytes_per_second), Ok(bytes), "{text}");
        }
        for text in ["", "50", "MB/s", "0MB/s", "-1MB", "1Mb/s", "1.2.3MB", "1MB/h", "0.1bit"] {
            assert!(text.parse::<Rate>().is_err(), "{text}");
        }
    }

    #[test]
    fn jobs_without_these_options_are_understood() {
        assert_eq!(serde_json::from_str::<Transfer>("{}").unwrap(), Transfer::default());
        let chosen: Transfer = serde_json::from_str(r#"{"compress":"zstd","bandwidth":1000}"#).unwrap();
        assert_eq!((chosen.compress, chosen.bandwidth), (Compress::Zstd, Rate::new(1000)));
        assert!(serde_json::from_str::<Transfer>(r#"{"bandwidth":0}"#).is_err());
    }
}
