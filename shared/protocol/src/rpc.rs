//! What a request and its answer look like on the wire.

use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::fault::{Fault, code};
use crate::id::{Epoch, MigrationId, Step};
use crate::version::{SUPPORTED, Version};

/// The services that answer commands on a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Service {
    /// The process state of containers that leave.
    Checkpointer,
    /// The memory, in both roles.
    PageShipper,
    /// The files, in both roles.
    Syncer,
    /// Containers that arrive.
    Restorer,
}

impl Service {
    /// All of them: a host that lacks one can take no part in a migration.
    pub const ALL: [Self; 4] = [Self::Checkpointer, Self::PageShipper, Self::Syncer, Self::Restorer];

    /// The service's token in subjects.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Checkpointer => "checkpointer",
            Self::PageShipper => "page-shipper",
            Self::Syncer => "syncer",
            Self::Restorer => "restorer",
        }
    }

    /// The service of that token.
    #[must_use]
    pub fn parse(token: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|service| service.as_str() == token)
    }
}

impl std::fmt::Display for Service {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A request type: it names who answers it, and with what.
pub trait Rpc: Serialize + DeserializeOwned + Clone + Send + Sync + 'static {
    /// The service that answers.
    const SERVICE: Service;
    /// The last token of the subject.
    const VERB: &'static str;
    /// What a success carries.
    type Reply: Serialize + DeserializeOwned + Clone + Send + Sync + 'static;
}

/// A command as it travels: which migration, who asks, and which of the migration's commands it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Command<R> {
    /// The protocol version of the sender.
    pub version: Version,
    /// The migration that this is a step of.
    pub migration: MigrationId,
    /// The owner that asks.
    pub epoch: Epoch,
    /// The number of the command: asked again, the service answers with what already happened.
    pub step: Step,
    /// The lowest step that the owner still waits for. What it has given up on must not begin any more: a service
    /// refuses a step below this that it has not seen, such as a freeze that a roll-back has overtaken.
    pub floor: Step,
    /// What is asked.
    pub body: R,
}

/// The answer to a [`Command`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "snake_case")]
pub enum Answer<T> {
    /// Done, now or on an earlier asking.
    Done {
        /// The result.
        value: T,
    },
    /// Under way: ask again with the same step. Keeps a request short however long the work is.
    Pending,
    /// It failed, and what the service had begun of it is undone unless the verb's description says otherwise.
    Failed {
        /// Why.
        fault: Fault,
    },
}

/// For how long a service works on a command before it answers [`Answer::Pending`].
pub const PENDING_AFTER: Duration = Duration::from_secs(2);

/// For how long the asker waits for any answer. Longer than [`PENDING_AFTER`], so that silence means trouble.
pub const ANSWER_WITHIN: Duration = Duration::from_secs(6);

/// The largest control message that is accepted, in bytes. Bulk data never travels here.
pub const MAX_MESSAGE: usize = 900 * 1024;

/// Only the version, which must be readable whatever else changed.
#[derive(Deserialize)]
struct Versioned {
    version: Version,
}

/// Decodes a versioned message of a peer.
///
/// # Errors
/// `malformed_message` when it is not what it should be, `foreign_version` when its version is not supported.
pub fn decode<T: DeserializeOwned>(payload: &[u8]) -> Result<T, Fault> {
    if payload.len() > MAX_MESSAGE {
        let message = format!("message of {} bytes, the limit is {MAX_MESSAGE}", payload.len());
        return Err(Fault::new(code::MALFORMED, message));
    }
    let malformed =
        |error: serde_json::Error| Fault::new(code::MALFORMED, "message cannot be decoded").because(&error);
    let Versioned { version } = serde_json::from_slice(payload).map_err(malformed)?;
    if !SUPPORTED.contains(&version) {
        let message =
            format!("message of protocol version {version}, this side speaks {}", Version::range_text());
        return Err(Fault::new(code::FOREIGN_VERSION, message)
            .remedy("run the same release of haulage on every host, coordinators first"));
    }
    serde_json::from_slice(payload).map_err(malformed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpointer::Confirm;

    fn command() -> Command<Confirm> {
        Command {
            version: Version::CURRENT,
            migration: MigrationId::generate(),
            epoch: Epoch(1),
            step: Step(7),
            floor: Step(7),
            body: Confirm {},
        }
    }

    #[test]
    fn a_command_survives_the_wire() {
        let wire = serde_json::to_vec(&command()).unwrap();
        assert_eq!(decode::<Command<Confirm>>(&wire).unwrap().step, Step(7));
    }

    #[test]
    fn foreign_versions_and_garbage_are_told_apart() {
        let mut foreign = serde_json::to_value(command()).unwrap();
        foreign["version"] = serde_json::json!(999);
        let wire = serde_json::to_vec(&foreign).unwrap();
        assert_eq!(decode::<Command<Confirm>>(&wire).unwrap_err().code, code::FOREIGN_VERSION);
        for garbage in [&b""[..], b"{", b"[]", b"{\"version\":1}", b"\xff\xfe", b"null"] {
            assert_eq!(decode::<Command<Confirm>>(garbage).unwrap_err().code, code::MALFORMED);
        }
        let huge = vec![b' '; MAX_MESSAGE + 1];
        assert_eq!(decode::<Command<Confirm>>(&huge).unwrap_err().code, code::MALFORMED);
    }
}
