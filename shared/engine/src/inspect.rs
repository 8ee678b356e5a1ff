//! `docker inspect` of a container, kept as the engine gave it.
//!
//! The engine's own JSON is kept whole rather than read into a model of one API version: fields that the model
//! does not know (an older engine's `Config.MacAddress`, a newer one's additions) would be lost from the
//! container that is created from it.

use std::path::PathBuf;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

/// The answer to `GET /containers/{id}/json`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(transparent)]
pub struct Inspect(Value);

/// Whether a container runs, as the engine sees it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct RunState {
    /// "created", "running", "paused", "restarting", "removing", "exited" or "dead".
    pub status: String,
    /// The container's first process exists (also when paused).
    pub running: bool,
    /// Stopped by `docker pause`.
    #[serde(default)]
    pub paused: bool,
    /// Waiting to be started again by its restart policy.
    #[serde(default)]
    pub restarting: bool,
    /// The first process's pid in the engine's PID namespace; 0 when not running.
    pub pid: i32,
    /// Exit code of the last run.
    #[serde(default)]
    pub exit_code: i64,
    /// Why the last start failed, empty if it did not.
    #[serde(default)]
    pub error: String,
    /// The health check's verdict, if the container has one.
    #[serde(default)]
    pub health: Option<Health>,
}

/// The verdict of a container's health check.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Health {
    /// "none", "starting", "healthy" or "unhealthy".
    pub status: String,
}

/// An inspect answer lacks something that every engine gives, or gives it in another form.
#[derive(Debug, thiserror::Error)]
#[error("the engine's description of the container has no usable {field}")]
pub struct InspectError {
    /// The field, as a JSON pointer.
    pub field: &'static str,
    source: Option<serde_json::Error>,
}

impl Inspect {
    /// Takes an engine's answer as it is.
    pub fn new(answer: Value) -> Self {
        Self(answer)
    }

    /// The container's full id.
    ///
    /// # Errors
    /// When the answer has none.
    pub fn id(&self) -> Result<&str, InspectError> {
        self.required_text("/Id")
    }

    /// The container's name, without the leading slash.
    ///
    /// # Errors
    /// When the answer has none.
    pub fn name(&self) -> Result<&str, InspectError> {
        self.required_text("/Name").map(|name| name.trim_start_matches('/'))
    }

    /// Whether and how it runs.
    ///
    /// # Errors
    /// When the answer has no state or one that cannot be read.
    pub fn state(&self) -> Result<RunState, InspectError> {
        self.parse("/State")
    }

    /// Text at a JSON pointer; absent and empty are the same to Docker.
    pub(crate) fn text(&self, pointer: &str) -> Option<&str> {
        self.0.pointer(pointer).and_then(Value::as_str).filter(|text| !text.is_empty())
    }

    pub(crate) fn path(&self, pointer: &str) -> Option<PathBuf> {
        self.text(pointer).map(PathBuf::from)
    }

    pub(crate) fn required_text(&self, field: &'static str) -> Result<&str, InspectError> {
        self.text(field).ok_or(InspectError { field, source: None })
    }

    pub(crate) fn object(&self, field: &'static str) -> Result<Map<String, Value>, InspectError> {
        match self.0.pointer(field) {
            Some(Value::Object(map)) => Ok(map.clone()),
            _ => Err(InspectError { field, source: None }),
        }
    }

    pub(crate) fn parse<T: DeserializeOwned>(&self, field: &'static str) -> Result<T, InspectError> {
        let value = self.0.pointer(field).ok_or(InspectError { field, source: None })?;
        T::deserialize(value).map_err(|error| InspectError { field, source: Some(error) })
    }

    /// Like [`Self::parse`], with absent and null giving the default.
    pub(crate) fn parse_or_default<T: DeserializeOwned + Default>(
        &self,
        field: &'static str,
    ) -> Result<T, InspectError> {
        match self.0.pointer(field) {
            None | Some(Value::Null) => Ok(T::default()),
            Some(_) => self.parse(field),
        }
    }
}
