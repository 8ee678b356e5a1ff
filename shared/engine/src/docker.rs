//! Docker, through bollard, on a unix socket.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::time::Duration;

use bollard::errors::Error;
use bollard::models;
use bollard::query_parameters as query;
use futures_util::{StreamExt, TryStreamExt};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::answers;
use crate::engine::{Engine, ImageStream};
use crate::error::{EngineError, EngineErrorKind};
use crate::facts::{ApiVersion, ContainerEntry, EngineInfo, ImageFacts, NetworkFacts, VolumeFacts};
use crate::inspect::Inspect;
use crate::raw::{RawClient, escape};
use crate::spec::RestartPolicy;

/// How long the engine may take for a common call.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long it may take to start a container (a restore lies within) or to take in an image.
const LONG_PATIENCE: Duration = Duration::from_secs(3600);

/// A Docker engine.
#[derive(Debug, Clone)]
pub struct Docker {
    client: bollard::Docker,
    patient: bollard::Docker,
    raw: RawClient,
    api: ApiVersion,
}

impl Docker {
    /// Connects to the engine on `socket` and agrees on the highest API version that both sides speak.
    ///
    /// # Errors
    /// `Unreachable` when nothing answers there, `Protocol` when it is no Docker engine.
    pub async fn connect(socket: &Path) -> Result<Self, EngineError> {
        let operation = || format!("connect to the Docker engine at {}", socket.display());
        let address = format!("unix://{}", socket.display());
        let client =
            bollard::Docker::connect_with_unix(&address, PATIENCE.as_secs(), bollard::API_DEFAULT_VERSION)
                .map_err(|error| EngineError::from_bollard(operation(), error))?;
        let client = client
            .negotiate_version()
            .await
            .map_err(|error| EngineError::from_bollard(operation(), error))?;
        let version = client.client_version();
        let number = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        Ok(Self {
            patient: client.clone().with_timeout(LONG_PATIENCE),
            api: ApiVersion { major: number(version.major_version), minor: number(version.minor_version) },
            raw: RawClient::new(socket, PATIENCE),
            client,
        })
    }

    /// The API version spoken.
    pub fn api_version(&self) -> ApiVersion {
        self.api
    }

    fn target(&self, rest: &str) -> String {
        format!("/v{}{rest}", self.api)
    }
}

/// Turns bollard's error into ours, with what was being done.
trait While<T> {
    fn during(self, operation: impl FnOnce() -> String) -> Result<T, EngineError>;
}

impl<T> While<T> for Result<T, Error> {
    fn during(self, operation: impl FnOnce() -> String) -> Result<T, EngineError> {
        self.map_err(|error| EngineError::from_bollard(operation(), error))
    }
}

/// An engine's answer that lacks what it must have.
fn protocol(operation: String, missing: &'static str) -> EngineError {
    EngineError::new(EngineErrorKind::Protocol, operation, format!("the answer has no {missing}"))
}

impl Engine for Docker {
    async fn info(&self) -> Result<EngineInfo, EngineError> {
        let operation = || "ask the engine about itself".to_owned();
        let info = self.client.info().await.during(operation)?;
        answers::engine_info(info, self.api)
            .ok_or_else(|| protocol(operation(), "version, driver or data root"))
    }

    async fn inspect(&self, container: &str) -> Result<Inspect, EngineError> {
        let target = self.target(&format!("/containers/{}/json", escape(container)));
        let answer = self.raw.get(&target).await.during(|| format!("inspect the container {container}"))?;
        Ok(Inspect::new(answer))
    }

    async fn containers(&self) -> Result<Vec<ContainerEntry>, EngineError> {
        let options = query::ListContainersOptionsBuilder::default().all(true).build();
        let list =
            self.client.list_containers(Some(options)).await.during(|| "list the containers".into())?;
        Ok(list.into_iter().map(answers::container_entry).collect())
    }

    async fn create(&self, name: &str, body: &Value) -> Result<String, EngineError> {
        #[derive(Deserialize)]
        #[serde(rename_all = "PascalCase")]
        struct Created {
            id: String,
            #[serde(default)]
            warnings: Option<Vec<String>>,
        }
        let operation = || format!("create the container {name}");
        let target = self.target(&format!("/containers/create?name={}", escape(name)));
        let answer = self.raw.post(&target, body).await.during(operation)?;
        let created = Created::deserialize(answer)
            .map_err(|error| EngineError::new(EngineErrorKind::Protocol, operation(), error))?;
        for warning in created.warnings.iter().flatten() {
            tracing::warn!(container = name, warning, "the engine warns of the new container");
        }
        Ok(created.id)
    }

    async fn connect_network(
        &self,
        network: &str,
        container: &str,
        endpoint: &Value,
    ) -> Result<(), EngineError> {
        let target = self.target(&format!("/networks/{}/connect", escape(network)));
        let body = json!({ "Container": container, "EndpointConfig": endpoint });
        let answer = self.raw.post(&target, &body).await;
        answer.during(|| format!("connect the container {container} to the network {network}")).map(drop)
    }

    async fn start(&self, container: &str) -> Result<(), EngineError> {
        let started = self.patient.start_container(container, None::<query::StartContainerOptions>).await;
        started.during(|| format!("start the container {container}"))
    }

    async fn remove(&self, container: &str) -> Result<(), EngineError> {
        let options = query::RemoveContainerOptionsBuilder::default().force(true).v(true).build();
        let removed = self.client.remove_container(container, Some(options)).await;
        removed.during(|| format!("remove the container {container}"))
    }

    async fn rename(&self, container: &str, name: &str) -> Result<(), EngineError> {
        let options = query::RenameContainerOptionsBuilder::default().name(name).build();
        let renamed = self.client.rename_container(container, options).await;
        renamed.during(|| format!("rename the container {container} to {name}"))
    }

    async fn set_restart_policy(&self, container: &str, policy: &RestartPolicy) -> Result<(), EngineError> {
        let operation =
            || format!("set the restart policy of the container {container} to {:?}", policy.name);
        let policy = models::RestartPolicy::deserialize(json!(policy))
            .map_err(|error| EngineError::new(EngineErrorKind::Invalid, operation(), error))?;
        let update = models::ContainerUpdateBody { restart_policy: Some(policy), ..Default::default() };
        self.client.update_container(container, update).await.during(operation)
    }

    async fn wait_exit(&self, container: &str) -> Result<i64, EngineError> {
        let operation = || format!("wait for the container {container}");
        let options = query::WaitContainerOptionsBuilder::default().condition("not-running").build();
        let mut waiting = Box::pin(self.client.wait_container(container, Some(options)));
        match waiting.next().await {
            Some(Ok(exit)) => Ok(exit.status_code),
            // bollard takes a non-zero exit code for a failure.
            Some(Err(Error::DockerContainerWaitError { error, code })) if error.is_empty() => Ok(code),
            Some(Err(error)) => Err(EngineError::from_bollard(operation(), error)),
            None => Err(protocol(operation(), "exit code")),
        }
    }

    async fn image(&self, image: &str) -> Result<ImageFacts, EngineError> {
        let operation = || format!("inspect the image {image}");
        let answer = self.client.inspect_image(image).await.during(operation)?;
        answers::image_facts(answer).ok_or_else(|| protocol(operation(), "id"))
    }

    fn export_image(&self, image: &str) -> ImageStream {
        let (client, image) = (self.patient.clone(), image.to_owned());
        // The stream owns its client, so that it can outlive this call.
        futures_util::stream::once(async move { client.export_image(&image).boxed() })
            .flatten()
            .map_err(std::io::Error::other)
            .boxed()
    }

    async fn import_image(&self, archive: ImageStream) -> Result<(), EngineError> {
        let options = query::ImportImageOptionsBuilder::default().quiet(true).build();
        let mut progress = Box::pin(self.patient.import_image_stream(options, archive, None));
        while let Some(line) = progress.next().await {
            line.during(|| "take in an image".into())?;
        }
        Ok(())
    }

    async fn tag_image(&self, image: &str, reference: &str) -> Result<(), EngineError> {
        let (name, tag) = split_reference(reference);
        let options = query::TagImageOptionsBuilder::default().repo(name).tag(tag).build();
        let tagged = self.client.tag_image(image, Some(options)).await;
        tagged.during(|| format!("name the image {image} {reference}"))
    }

    async fn volume(&self, name: &str) -> Result<VolumeFacts, EngineError> {
        let volume =
            self.client.inspect_volume(name).await.during(|| format!("inspect the volume {name}"))?;
        Ok(answers::volume_facts(volume))
    }

    async fn create_volume(
        &self,
        name: &str,
        driver: &str,
        options: &BTreeMap<String, String>,
        labels: &BTreeMap<String, String>,
    ) -> Result<VolumeFacts, EngineError> {
        let map = |map: &BTreeMap<String, String>| Some(map.clone().into_iter().collect::<HashMap<_, _>>());
        let request = models::VolumeCreateRequest {
            name: Some(name.to_owned()),
            driver: Some(driver.to_owned()),
            driver_opts: map(options),
            labels: map(labels),
            cluster_volume_spec: None,
        };
        let volume =
            self.client.create_volume(request).await.during(|| format!("create the volume {name}"))?;
        Ok(answers::volume_facts(volume))
    }

    async fn remove_volume(&self, name: &str) -> Result<(), EngineError> {
        let removed = self.client.remove_volume(name, None::<query::RemoveVolumeOptions>).await;
        removed.during(|| format!("remove the volume {name}"))
    }

    async fn network(&self, network: &str) -> Result<NetworkFacts, EngineError> {
        let operation = || format!("inspect the network {network}");
        let answer = self.client.inspect_network(network, None::<query::InspectNetworkOptions>).await;
        answers::network_facts(answer.during(operation)?)
            .ok_or_else(|| protocol(operation(), "id, name or driver"))
    }
}

/// A reference into name and tag; a colon before the last slash belongs to a registry's port.
fn split_reference(reference: &str) -> (&str, &str) {
    match reference.rsplit_once(':') {
        Some((name, tag)) if !tag.contains('/') => (name, tag),
        _ => (reference, "latest"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_split_at_the_tag() {
        assert_eq!(split_reference("redis:7"), ("redis", "7"));
        assert_eq!(split_reference("redis"), ("redis", "latest"));
        assert_eq!(split_reference("registry.test:5000/a/b"), ("registry.test:5000/a/b", "latest"));
        assert_eq!(split_reference("registry.test:5000/a/b:1"), ("registry.test:5000/a/b", "1"));
    }
}
