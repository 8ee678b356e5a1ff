//! Which dirty pages a round of pre-copy sends.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A transfer policy by name. As text `all`, `phaul`, `history:WINDOW,THRESHOLD` or `adaptive`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum Policy {
    /// Every dirty page in every round.
    All,
    /// Every dirty page in every round, and rounds end by P.Haul's rule instead of the predicted downtime.
    Phaul,
    /// A page that was written in so many of the last rounds waits.
    History {
        /// Rounds looked at, 1 to 8.
        window: u8,
        /// Written in so many of them, a page waits; 1 to `window`.
        threshold: u8,
    },
    /// A page waits when sending it is not expected to pay: it would be written again before the freeze.
    #[default]
    Adaptive,
}

/// Not a policy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no policy: all, phaul, history[:WINDOW,THRESHOLD] with 1 <= THRESHOLD <= WINDOW <= 8, or adaptive"
)]
pub struct NoPolicy(String);

impl FromStr for Policy {
    type Err = NoPolicy;

    fn from_str(text: &str) -> Result<Self, NoPolicy> {
        let no = || NoPolicy(text.to_owned());
        match text {
            "all" => Ok(Self::All),
            "phaul" => Ok(Self::Phaul),
            "adaptive" => Ok(Self::Adaptive),
            "history" => Ok(Self::History { window: 8, threshold: 1 }),
            _ => {
                let (window, threshold) =
                    text.strip_prefix("history:").and_then(|pair| pair.split_once(',')).ok_or_else(no)?;
                let window = window.parse().map_err(|_| no())?;
                let threshold = threshold.parse().map_err(|_| no())?;
                if (1..=8).contains(&window) && (1..=window).contains(&threshold) {
                    Ok(Self::History { window, threshold })
                } else {
                    Err(no())
                }
            }
        }
    }
}

impl TryFrom<String> for Policy {
    type Error = NoPolicy;

    fn try_from(text: String) -> Result<Self, NoPolicy> {
        text.parse()
    }
}

impl From<Policy> for String {
    fn from(policy: Policy) -> Self {
        policy.to_string()
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::All => f.pad("all"),
            Self::Phaul => f.pad("phaul"),
            Self::History { window, threshold } => f.pad(&format!("history:{window},{threshold}")),
            Self::Adaptive => f.pad("adaptive"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policies_are_said_as_they_are_read() {
        for text in ["all", "phaul", "adaptive", "history:1,1", "history:8,8", "history:4,2"] {
            let policy: Policy = text.parse().unwrap();
            assert_eq!(policy.to_string(), text);
            let json = serde_json::to_string(&policy).unwrap();
            assert_eq!(serde_json::from_str::<Policy>(&json).unwrap(), policy);
        }
        assert_eq!("history".parse(), Ok(Policy::History { window: 8, threshold: 1 }));
        for text in ["", "none", "history:", "history:9,1", "history:3,4", "history:3,0", "history:a,b"] {
            assert!(text.parse::<Policy>().is_err(), "{text}");
        }
    }
}
