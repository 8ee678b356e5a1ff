//! The calls that a migration makes to a container engine, and nothing more.

use std::collections::BTreeMap;
use std::future::Future;

use bytes::Bytes;
use futures_util::stream::BoxStream;
use serde_json::Value;

use crate::error::EngineError;
use crate::facts::{ContainerEntry, EngineInfo, ImageFacts, NetworkFacts, VolumeFacts};
use crate::inspect::Inspect;
use crate::spec::RestartPolicy;

/// A stream of an image archive's bytes.
pub type ImageStream = BoxStream<'static, Result<Bytes, std::io::Error>>;

/// A container engine. Containers are named by id or name, images by id or reference.
///
/// Every call fails with an [`EngineError`]; a call on something that does not exist has the kind `NotFound`.
pub trait Engine: Send + Sync {
    /// What the engine says about itself.
    fn info(&self) -> impl Future<Output = Result<EngineInfo, EngineError>> + Send;

    /// Everything about one container. Docker answers late for a container that is just being started.
    fn inspect(&self, container: &str) -> impl Future<Output = Result<Inspect, EngineError>> + Send;

    /// All containers, also those that do not run.
    fn containers(&self) -> impl Future<Output = Result<Vec<ContainerEntry>, EngineError>> + Send;

    /// Creates a container, not started, and gives its id. After a failure nothing exists, unless the kind is
    /// `Timeout` or `Unreachable`.
    fn create(&self, name: &str, body: &Value) -> impl Future<Output = Result<String, EngineError>> + Send;

    /// Connects a container to one more network.
    fn connect_network(
        &self,
        network: &str,
        container: &str,
        endpoint: &Value,
    ) -> impl Future<Output = Result<(), EngineError>> + Send;

    /// Starts a created container; comes back when it runs. A container restored by the runtime takes as long
    /// as its restore. After a failure the container is stopped, or gone if it was created with `--rm`.
    fn start(&self, container: &str) -> impl Future<Output = Result<(), EngineError>> + Send;

    /// Kills and removes a container with its anonymous volumes.
    fn remove(&self, container: &str) -> impl Future<Output = Result<(), EngineError>> + Send;

    /// Gives a container another name.
    fn rename(&self, container: &str, name: &str) -> impl Future<Output = Result<(), EngineError>> + Send;

    /// Changes the restart policy. Docker refuses this for containers created with `--rm`.
    fn set_restart_policy(
        &self,
        container: &str,
        policy: &RestartPolicy,
    ) -> impl Future<Output = Result<(), EngineError>> + Send;

    /// Waits until the container does not run and gives its exit code; at once if it does not run now.
    fn wait_exit(&self, container: &str) -> impl Future<Output = Result<i64, EngineError>> + Send;

    /// What the engine knows of an image.
    fn image(&self, image: &str) -> impl Future<Output = Result<ImageFacts, EngineError>> + Send;

    /// The image as an archive (`docker save`). Failures come as items of the stream.
    fn export_image(&self, image: &str) -> ImageStream;

    /// Takes in an archive that [`Engine::export_image`] made (`docker load`).
    fn import_image(&self, archive: ImageStream) -> impl Future<Output = Result<(), EngineError>> + Send;

    /// Gives an image a reference, such as "redis:7". A reference that named another image names this one now.
    fn tag_image(&self, image: &str, reference: &str)
    -> impl Future<Output = Result<(), EngineError>> + Send;

    /// What the engine knows of a volume.
    fn volume(&self, name: &str) -> impl Future<Output = Result<VolumeFacts, EngineError>> + Send;

    /// Makes a volume. One that exists already with the same driver is given back as it is.
    fn create_volume(
        &self,
        name: &str,
        driver: &str,
        options: &BTreeMap<String, String>,
        labels: &BTreeMap<String, String>,
    ) -> impl Future<Output = Result<VolumeFacts, EngineError>> + Send;

    /// Removes a volume and its content; `Conflict` while a container uses it.
    fn remove_volume(&self, name: &str) -> impl Future<Output = Result<(), EngineError>> + Send;

    /// What the engine knows of a network.
    fn network(&self, network: &str) -> impl Future<Output = Result<NetworkFacts, EngineError>> + Send;
}
