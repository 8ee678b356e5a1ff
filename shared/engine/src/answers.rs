//! From bollard's models to ours.

use std::collections::BTreeMap;
use std::path::PathBuf;

use bollard::models;

use crate::facts::{
    ApiVersion, CgroupVersion, ContainerEntry, EngineInfo, HostPort, ImageFacts, NetworkFacts, VolumeFacts,
};

pub(crate) fn engine_info(info: models::SystemInfo, api_version: ApiVersion) -> Option<EngineInfo> {
    Some(EngineInfo {
        server_version: info.server_version?,
        api_version,
        storage_driver: info.driver?,
        data_root: PathBuf::from(info.docker_root_dir?),
        runtimes: info.runtimes.unwrap_or_default().into_keys().collect(),
        default_runtime: info.default_runtime.unwrap_or_default(),
        cgroup_driver: info.cgroup_driver.map(|driver| driver.to_string()).unwrap_or_default(),
        // Engines before 20.10 do not say: they know v1 only.
        cgroup_version: match info.cgroup_version {
            Some(models::SystemInfoCgroupVersionEnum::_2) => CgroupVersion::V2,
            _ => CgroupVersion::V1,
        },
        security: info
            .security_options
            .unwrap_or_default()
            .iter()
            .filter_map(|o| security_feature(o))
            .collect(),
        log_drivers: info.plugins.and_then(|plugins| plugins.log).unwrap_or_default().into_iter().collect(),
        kernel: info.kernel_version.unwrap_or_default(),
        architecture: info.architecture.unwrap_or_default(),
    })
}

/// "name=seccomp,profile=default" tells the feature seccomp.
fn security_feature(option: &str) -> Option<String> {
    option.split(',').find_map(|part| part.strip_prefix("name=")).map(str::to_owned)
}

pub(crate) fn container_entry(summary: models::ContainerSummary) -> ContainerEntry {
    let names = summary.names.unwrap_or_default();
    ContainerEntry {
        id: summary.id.unwrap_or_default(),
        // With legacy links there are further names, with more slashes.
        name: names
            .iter()
            .map(|name| name.trim_start_matches('/'))
            .find(|name| !name.contains('/'))
            .unwrap_or_default()
            .to_owned(),
        state: summary.state.map(|state| state.to_string()).unwrap_or_default(),
        volumes: summary.mounts.unwrap_or_default().into_iter().filter_map(|mount| mount.name).collect(),
        ports: summary.ports.unwrap_or_default().into_iter().filter_map(host_port).collect(),
    }
}

fn host_port(port: models::PortSummary) -> Option<HostPort> {
    Some(HostPort {
        port: port.public_port?,
        ip: port.ip.and_then(|ip| ip.parse().ok()),
        protocol: port.typ.map_or_else(|| "tcp".to_owned(), |protocol| protocol.to_string()),
    })
}

pub(crate) fn image_facts(image: models::ImageInspect) -> Option<ImageFacts> {
    Some(ImageFacts {
        id: image.id?,
        tags: image.repo_tags.unwrap_or_default(),
        size: image.size.and_then(|size| u64::try_from(size).ok()).unwrap_or(0),
        layers: image.root_fs.and_then(|root| root.layers).unwrap_or_default(),
    })
}

pub(crate) fn volume_facts(volume: models::Volume) -> VolumeFacts {
    VolumeFacts {
        name: volume.name,
        driver: volume.driver,
        mountpoint: PathBuf::from(volume.mountpoint),
        options: volume.options.into_iter().collect(),
        labels: volume.labels.into_iter().collect(),
    }
}

pub(crate) fn network_facts(network: models::NetworkInspect) -> Option<NetworkFacts> {
    let subnets = network.ipam.and_then(|ipam| ipam.config).unwrap_or_default();
    Some(NetworkFacts {
        id: network.id?,
        name: network.name?,
        driver: network.driver?,
        options: network.options.unwrap_or_default().into_iter().collect(),
        // IPv6 subnets stand in the same list.
        subnets: subnets.into_iter().filter_map(|config| config.subnet?.parse().ok()).collect(),
        addresses: addresses(network.containers.unwrap_or_default()),
    })
}

fn addresses(
    endpoints: impl IntoIterator<Item = (String, models::EndpointResource)>,
) -> BTreeMap<std::net::Ipv4Addr, String> {
    endpoints
        .into_iter()
        .filter_map(|(id, endpoint)| {
            let address = endpoint.ipv4_address?;
            let address = address.split_once('/').map_or(address.as_str(), |(address, _)| address);
            Some((address.parse().ok()?, endpoint.name.unwrap_or(id)))
        })
        .collect()
}
