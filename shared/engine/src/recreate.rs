//! From a [`ContainerSpec`] to the request that creates the container again.

use std::net::Ipv4Addr;

use serde_json::{Map, Value, json};

use crate::facts::ApiVersion;
use crate::spec::{ContainerSpec, NetworkSpec, RestartPolicy};

/// How the new container shall differ from the captured one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CreateOptions {
    /// OCI runtime; none keeps the captured one.
    pub runtime: Option<String>,
    /// Keep the captured restart policy. Otherwise it is "no": a container that has not been adopted must not be
    /// started by the engine's own decision.
    pub keep_restart_policy: bool,
    /// What to create from; none means the captured reference. The image's id where that reference names another
    /// image on the target.
    pub image: Option<String>,
    /// API version spoken with the target's engine.
    pub api: ApiVersion,
}

/// The requests that make a container.
#[derive(Debug, Clone, PartialEq)]
pub struct CreateRequest {
    /// Body of `POST /containers/create`.
    pub body: Value,
    /// Networks to connect it to before its start, with the endpoint to ask for.
    ///
    /// Engines before Docker 25 create a container on one network only. They also look at the address only when it
    /// starts, too late for us, but at once when a created container is connected: so the first network is repeated
    /// here, and one that cannot give the address (its subnet was chosen by the engine) is found out.
    pub connect: Vec<(String, Value)>,
}

impl ContainerSpec {
    /// The requests that create this container again.
    ///
    /// Addresses, MAC addresses and the host name become explicit, whether or not they were when the container was
    /// made: they are part of its running state. Named volumes and networks must exist beforehand.
    pub fn create_request(&self, options: &CreateOptions) -> CreateRequest {
        let mut body = self.config.clone();
        let image = options.image.as_deref().unwrap_or(&self.image.reference);
        body.insert("Image".into(), image.into());
        // Docker fills an absent entrypoint from the image, and with it an absent command; [""] says "none".
        if body.get("Entrypoint").is_none_or(Value::is_null) {
            body.insert("Entrypoint".into(), json!([""]));
        }
        let primary = self.networks.first();
        body.remove("MacAddress");
        if options.api < ApiVersion::ENDPOINT_MAC
            && let Some(mac) = primary.and_then(|network| network.mac.as_deref())
        {
            body.insert("MacAddress".into(), mac.into());
        }
        body.insert("HostConfig".into(), Value::Object(self.host_config_for(options)));
        let mut endpoints = Map::new();
        let mut connect = Vec::new();
        for (index, network) in self.networks.iter().enumerate() {
            let config = endpoint_config(network, options.api);
            if options.api < ApiVersion::ENDPOINT_MAC {
                connect.push((network.name.clone(), config.clone()));
            }
            if index == 0 || options.api >= ApiVersion::ENDPOINT_MAC {
                endpoints.insert(network.name.clone(), config);
            }
        }
        body.insert("NetworkingConfig".into(), json!({ "EndpointsConfig": endpoints }));
        CreateRequest { body: Value::Object(body), connect }
    }

    fn host_config_for(&self, options: &CreateOptions) -> Map<String, Value> {
        let mut host = self.host_config.clone();
        if let Some(runtime) = &options.runtime {
            host.insert("Runtime".into(), runtime.as_str().into());
        }
        if !options.keep_restart_policy {
            host.insert("RestartPolicy".into(), json!(RestartPolicy::never()));
        }
        host
    }
}

fn endpoint_config(network: &NetworkSpec, api: ApiVersion) -> Value {
    let mut config = Map::new();
    let mut ipam = Map::new();
    if let Some(ipv4) = network.ipv4 {
        ipam.insert("IPv4Address".into(), ipv4.to_string().into());
    }
    if let Some(ipv6) = network.ipv6 {
        ipam.insert("IPv6Address".into(), ipv6.to_string().into());
    }
    if !ipam.is_empty() {
        config.insert("IPAMConfig".into(), ipam.into());
    }
    if let Some(mac) = network.mac.as_deref().filter(|_| api >= ApiVersion::ENDPOINT_MAC) {
        config.insert("MacAddress".into(), mac.into());
    }
    if !network.aliases.is_empty() {
        config.insert("Aliases".into(), json!(network.aliases));
    }
    if !network.links.is_empty() {
        config.insert("Links".into(), json!(network.links));
    }
    if !network.driver_opts.is_empty() {
        config.insert("DriverOpts".into(), json!(network.driver_opts));
    }
    Value::Object(config)
}

/// The MAC address that engines before Docker 28 give an endpoint which asks for none: made of its address.
pub(crate) fn mac_of_address(ipv4: Ipv4Addr) -> String {
    let [a, b, c, d] = ipv4.octets();
    format!("02:42:{a:02x}:{b:02x}:{c:02x}:{d:02x}")
}
