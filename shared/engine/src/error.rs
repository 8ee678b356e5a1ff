//! What can go wrong between us and a Docker engine.

use std::error::Error as StdError;

/// A call to the engine that failed: what was attempted, of which kind the failure is, and the cause.
///
/// A failed call may still have taken effect (an answer lost after the engine acted): callers that undo must
/// treat [`EngineErrorKind::Timeout`] and [`EngineErrorKind::Unreachable`] as "perhaps done".
#[derive(Debug, thiserror::Error)]
#[error("cannot {operation}")]
pub struct EngineError {
    kind: EngineErrorKind,
    operation: String,
    source: Box<dyn StdError + Send + Sync>,
}

/// The kinds of failure a caller may want to tell apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum EngineErrorKind {
    /// The container, image, volume or network does not exist.
    NotFound,
    /// The engine says that it clashes with something that exists (a name taken, a volume in use).
    Conflict,
    /// The engine understood the request and refuses it as wrong.
    Invalid,
    /// Nothing answers on the engine's socket.
    Unreachable,
    /// The engine did not answer in time.
    Timeout,
    /// The engine tried and failed.
    Server,
    /// The engine's answer could not be understood.
    Protocol,
}

impl EngineError {
    /// An error of the given kind; `operation` completes the sentence "cannot …".
    pub fn new(
        kind: EngineErrorKind,
        operation: impl Into<String>,
        source: impl Into<Box<dyn StdError + Send + Sync>>,
    ) -> Self {
        Self { kind, operation: operation.into(), source: source.into() }
    }

    /// Which kind of failure this is.
    pub fn kind(&self) -> EngineErrorKind {
        self.kind
    }

    /// Whether what was asked for does not exist.
    pub fn is_not_found(&self) -> bool {
        self.kind == EngineErrorKind::NotFound
    }
}

#[cfg(feature = "docker")]
impl EngineError {
    pub(crate) fn from_bollard(operation: impl Into<String>, error: bollard::errors::Error) -> Self {
        use bollard::errors::Error as E;
        let kind = match &error {
            E::DockerResponseServerError { status_code, .. } => match status_code {
                404 => EngineErrorKind::NotFound,
                409 => EngineErrorKind::Conflict,
                400..=499 => EngineErrorKind::Invalid,
                _ => EngineErrorKind::Server,
            },
            E::RequestTimeoutError => EngineErrorKind::Timeout,
            E::SocketNotFoundError(_)
            | E::IOError { .. }
            | E::HyperResponseError { .. }
            | E::HyperLegacyError { .. } => EngineErrorKind::Unreachable,
            E::DockerStreamError { .. } | E::DockerContainerWaitError { .. } => EngineErrorKind::Server,
            _ => EngineErrorKind::Protocol,
        };
        Self::new(kind, operation, error)
    }
}
