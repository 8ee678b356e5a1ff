//! The greeting: who connects, to which session, and with what right.
//!
//! Its payload is the version (u16, little endian), so that a foreign version is told apart whatever follows,
//! and then JSON.

use std::fmt;
use std::str::FromStr;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use subtle::ConstantTimeEq;

use super::error::StreamError;

/// The version of the bulk protocol that this build speaks. There is no other yet.
pub const VERSION: u16 = 1;

/// The most bytes that a greeting or its answer may have.
pub(super) const MAX_HANDSHAKE_BYTES: usize = 4096;

/// The right to join a session: 32 random bytes, written as 64 hexadecimal digits.
///
/// `Debug` hides it; `Display` and serde show it.
#[derive(Clone, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Token([u8; 32]);

impl Token {
    /// A new token from the system's random source.
    ///
    /// # Errors
    /// [`StreamError::NoRandomness`] when that source fails.
    pub fn generate() -> Result<Self, StreamError> {
        let mut bytes = [0; 32];
        getrandom::fill(&mut bytes).map_err(|_| StreamError::NoRandomness)?;
        Ok(Self(bytes))
    }

    /// Whether both are the same, in a time which does not depend on where they differ.
    pub fn matches(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl FromStr for Token {
    type Err = StreamError;

    fn from_str(text: &str) -> Result<Self, StreamError> {
        let mut bytes = [0; 32];
        hex::decode_to_slice(text, &mut bytes).map_err(|_| StreamError::WrongToken)?;
        Ok(Self(bytes))
    }
}

impl TryFrom<String> for Token {
    type Error = StreamError;

    fn try_from(text: String) -> Result<Self, StreamError> {
        text.parse()
    }
}

impl From<Token> for String {
    fn from(token: Token) -> Self {
        token.to_string()
    }
}

/// Which session of a listener: a migration and what the connection is for.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct SessionKey {
    /// The migration's id.
    pub migration: String,
    /// What travels: "pages", "files", ….
    pub role: String,
}

impl SessionKey {
    /// The session of `migration` for `role`.
    pub fn new(migration: impl Into<String>, role: impl Into<String>) -> Self {
        Self { migration: migration.into(), role: role.into() }
    }
}

impl fmt::Display for SessionKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.migration, self.role)
    }
}

/// What the connecting side says first.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Hello {
    /// The session to join.
    pub session: SessionKey,
    /// The right to join it.
    pub token: Token,
}

impl Hello {
    pub(super) fn encode(&self) -> Result<Bytes, StreamError> {
        let mut payload = VERSION.to_le_bytes().to_vec();
        serde_json::to_writer(&mut payload, self).map_err(|_| StreamError::BadHello)?;
        Ok(payload.into())
    }

    pub(super) fn decode(payload: &[u8]) -> Result<Self, StreamError> {
        let (version, body) = payload.split_first_chunk::<2>().ok_or(StreamError::BadHello)?;
        match u16::from_le_bytes(*version) {
            VERSION => serde_json::from_slice(body).map_err(|_| StreamError::BadHello),
            peer => Err(StreamError::BadVersion { peer, ours: VERSION }),
        }
    }
}

/// What a refused peer is told.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Refusal {
    pub(super) code: String,
    pub(super) message: String,
}

impl Refusal {
    pub(super) fn of(error: &StreamError) -> Self {
        Self { code: error.code().to_owned(), message: error.to_string() }
    }

    pub(super) fn encode(&self) -> Bytes {
        serde_json::to_vec(self).unwrap_or_default().into()
    }

    /// The refusal as this side's error. A refusal which cannot be read is still one.
    pub(super) fn decode(payload: &[u8]) -> StreamError {
        match serde_json::from_slice(payload) {
            Ok(Self { code, message }) => StreamError::Refused { code, message },
            Err(_) => StreamError::BadHello,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_survives_text_and_hides_from_debug() {
        let token = Token::generate().unwrap();
        let text = token.to_string();
        assert_eq!(text.len(), 64);
        assert!(text.parse::<Token>().unwrap().matches(&token));
        assert!(!Token::generate().unwrap().matches(&token));
        assert!(!format!("{token:?}").contains(&text));
        assert!("00".parse::<Token>().is_err());
        assert!("x".repeat(64).parse::<Token>().is_err());
    }

    #[test]
    fn a_greeting_survives_the_wire_and_a_foreign_version_is_named() {
        let hello = Hello { session: SessionKey::new("m-1", "files"), token: Token::generate().unwrap() };
        let bytes = hello.encode().unwrap();
        assert!(bytes.len() <= MAX_HANDSHAKE_BYTES);
        let back = Hello::decode(&bytes).unwrap();
        assert_eq!(back.session, hello.session);
        assert!(back.token.matches(&hello.token));

        let mut foreign = bytes.to_vec();
        foreign[0] = 9;
        assert!(matches!(Hello::decode(&foreign), Err(StreamError::BadVersion { peer: 9, ours: VERSION })));
        assert!(matches!(Hello::decode(&bytes[..9]), Err(StreamError::BadHello)));
        assert!(matches!(Hello::decode(b"\x01"), Err(StreamError::BadHello)));
    }
}
