//! Asking an engine and a machine for all that capture and the rules need.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::path::PathBuf;

use crate::engine::Engine;
use crate::error::{EngineError, EngineErrorKind};
use crate::facts::HostPort;
use crate::host::{self, HostError, HostFacts};
use crate::inspect::{Inspect, InspectError, RunState};
use crate::portable::RunningFacts;
use crate::spec::ContainerSpec;
use crate::target::TargetFacts;

/// The engine or the machine could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum GatherError {
    /// The engine did not answer as it should.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The engine's description of a container is incomplete.
    #[error(transparent)]
    Inspect(#[from] InspectError),
    /// The machine did not tell.
    #[error(transparent)]
    Host(#[from] HostError),
    /// The thread that asks the machine was lost.
    #[error("the look at this machine was interrupted")]
    Interrupted,
}

/// A container as it is now: what it is, and whether it runs.
#[derive(Debug, Clone)]
pub struct Captured {
    /// What it is.
    pub spec: ContainerSpec,
    /// Whether and how it runs.
    pub state: RunState,
}

/// Captures a container, by name or id, with all volumes and networks it uses.
///
/// # Errors
/// `NotFound` when there is no such container.
pub async fn capture(engine: &impl Engine, container: &str) -> Result<Captured, GatherError> {
    let inspect = engine.inspect(container).await?;
    let state = inspect.state()?;
    let mut volumes = BTreeMap::new();
    for name in volume_names(&inspect)? {
        if let Some(volume) = found(engine.volume(&name).await)? {
            volumes.insert(name, volume);
        }
    }
    let mut networks = BTreeMap::new();
    for name in network_names(&inspect)? {
        if let Some(network) = found(engine.network(&name).await)? {
            networks.insert(name, network);
        }
    }
    let spec = ContainerSpec::capture(&inspect, &volumes, &networks)?;
    Ok(Captured { spec, state })
}

/// What the rules of [`crate::refusals`] ask beside the spec.
///
/// # Errors
/// When the engine does not answer.
pub async fn running_facts(
    engine: &impl Engine,
    captured: &Captured,
    shared_binds: BTreeSet<PathBuf>,
) -> Result<RunningFacts, GatherError> {
    let info = engine.info().await?;
    let others = engine.containers().await?;
    let volume_users = captured
        .spec
        .volumes()
        .map(|(_, volume)| {
            let users = others
                .iter()
                .filter(|other| other.id != captured.spec.id && other.volumes.contains(&volume.name))
                .map(|other| other.name.clone())
                .collect();
            (volume.name.clone(), users)
        })
        .collect();
    Ok(RunningFacts { state: captured.state.clone(), engine: info, volume_users, shared_binds })
}

/// What the rules of [`crate::target_refusals`] ask about this host and engine, for this container.
///
/// Must run in the network namespace of the engine: host ports are tried by binding them for a moment.
///
/// # Errors
/// When the engine or the machine does not answer.
pub async fn target_facts(engine: &impl Engine, spec: &ContainerSpec) -> Result<TargetFacts, GatherError> {
    let info = engine.info().await?;
    let mut volumes = BTreeSet::new();
    for (_, volume) in spec.volumes().filter(|(_, volume)| !volume.anonymous) {
        if found(engine.volume(&volume.name).await)?.is_some() {
            volumes.insert(volume.name.clone());
        }
    }
    let mut networks = BTreeMap::new();
    for network in &spec.networks {
        // Docker also finds networks by the beginning of an id; only the name counts here.
        let theirs = found(engine.network(&network.name).await)?.filter(|theirs| theirs.name == network.name);
        if let Some(theirs) = theirs {
            networks.insert(network.name.clone(), theirs);
        }
    }
    let image_present = found(engine.image(&spec.image.id).await)?.is_some();
    let reference_names = found(engine.image(&spec.image.reference).await)?.map(|image| image.id);
    let containers = engine.containers().await?;
    let (ports, about) = (spec.fixed_ports(), info.clone());
    let machine = tokio::task::spawn_blocking(move || {
        Ok::<_, HostError>((
            HostFacts::gather(&about)?,
            ports.into_iter().filter(is_taken).collect(),
            host::memory_available()?,
            host::disk_available(&about.data_root)?,
        ))
    });
    let (host, ports_taken, memory_available, disk_available) =
        machine.await.map_err(|_| GatherError::Interrupted)??;
    Ok(TargetFacts {
        engine: info,
        host,
        containers,
        volumes,
        networks,
        ports_taken,
        reference_names,
        image_present,
        memory_available,
        disk_available,
    })
}

/// Whether another program holds the port, or the address is not this host's. SCTP cannot be tried.
fn is_taken(port: &HostPort) -> bool {
    let address = SocketAddr::new(port.ip.unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED)), port.port);
    let tried = match port.protocol.as_str() {
        "tcp" => TcpListener::bind(address).map(drop),
        "udp" => UdpSocket::bind(address).map(drop),
        _ => return false,
    };
    let taken = [io::ErrorKind::AddrInUse, io::ErrorKind::AddrNotAvailable];
    tried.is_err_and(|error| taken.contains(&error.kind()))
}

/// None for what does not exist. An engine finds some names invalid (a volume's or an image's); such a thing does
/// not exist either.
fn found<T>(answer: Result<T, EngineError>) -> Result<Option<T>, EngineError> {
    match answer {
        Ok(value) => Ok(Some(value)),
        Err(error) if matches!(error.kind(), EngineErrorKind::NotFound | EngineErrorKind::Invalid) => {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

fn volume_names(inspect: &Inspect) -> Result<Vec<String>, InspectError> {
    let mounts: Vec<VolumeMount> = inspect.parse_or_default("/Mounts")?;
    Ok(mounts.into_iter().filter(|mount| mount.kind == "volume").filter_map(|mount| mount.name).collect())
}

fn network_names(inspect: &Inspect) -> Result<Vec<String>, InspectError> {
    let networks: BTreeMap<String, serde::de::IgnoredAny> =
        inspect.parse_or_default("/NetworkSettings/Networks")?;
    Ok(networks.into_keys().collect())
}

#[derive(serde::Deserialize)]
struct VolumeMount {
    #[serde(rename = "Type")]
    kind: String,
    #[serde(rename = "Name")]
    name: Option<String>,
}
