//! The container, created again and not started.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use haulage_engine::armed::{Armed, ArmedError, ArmedRoot, State};
use haulage_engine::{ContainerSpec, CreateOptions, Docker, Engine, HAUL_RUNTIME, Stage, capture, compare};
use haulage_protocol::fault::Fault;
use haulage_protocol::id::MigrationId;
use haulage_protocol::restorer::{Create, Created};
use haulage_protocol::syncer::TargetRoot;
use haulage_service::chain;

use crate::check::decode;
use crate::failure::{self, CONFLICT, ENGINE, STATE, blocking, fault};
use crate::finish;
use crate::notes::{Notes, working_name};
use crate::{IMAGES, Restorer};

pub(crate) async fn create(
    service: Arc<Restorer>,
    migration: MigrationId,
    ask: Create,
) -> Result<Created, Fault> {
    let dir = service.dir(&migration);
    if let Some(notes) = Notes::load(&dir).await? {
        // Asked again by another owner, or after a restart: what was half made is made anew.
        tracing::info!(%migration, container = ?notes.container, "created before, begins again");
        finish::undo(service.clone(), migration.clone()).await?;
    }
    let spec: ContainerSpec = decode("the container", ask.spec)?;
    // Of images there are two sets, the one that comes and the one that is joined with the pages.
    let room = ask.images.map(|images| ask.memory.0.saturating_add(images.0.saturating_mul(2)));
    let made = make(&service, &migration, &dir, spec, room).await;
    if made.is_err()
        && let Err(error) = finish::undo(service.clone(), migration.clone()).await
    {
        tracing::error!(%migration, %error, "a failed creation was not undone, the coordinator will ask again");
    }
    made
}

async fn make(
    service: &Restorer,
    migration: &MigrationId,
    dir: &Path,
    spec: ContainerSpec,
    room: Option<u64>,
) -> Result<Created, Fault> {
    let docker = &service.docker;
    let mut notes = Notes::of(spec);
    notes.store(dir).await?;
    for (_, volume) in notes.spec.clone().volumes().filter(|(_, volume)| !volume.anonymous) {
        match docker.volume(&volume.name).await {
            Err(error) if error.is_not_found() => {}
            Err(error) => return Err(failure::engine(&error)),
            Ok(_) => {
                let message = format!("the target has a volume {} now", volume.name);
                return Err(
                    Fault::new(CONFLICT, message).remedy("remove it, or move the container elsewhere")
                );
            }
        }
        notes.volumes.push(volume.name.clone());
        notes.store(dir).await?;
        let made = docker.create_volume(&volume.name, &volume.driver, &volume.options, &volume.labels).await;
        made.map_err(|error| failure::engine(&error))?;
    }
    let request = notes.spec.create_request(&CreateOptions {
        runtime: Some(HAUL_RUNTIME.to_owned()),
        keep_restart_policy: false,
        image: image_by_id(docker, &notes.spec).await?,
        api: docker.api_version(),
    });
    let id = docker.create(&working_name(migration), &request.body).await;
    let id = id.map_err(|error| failure::engine(&error))?;
    notes.container = Some(id.clone());
    notes.store(dir).await?;
    let (barred, at) = (id.clone(), migration.clone());
    service.armed(move |armed| bar(armed, at.as_str(), &barred)).await?;
    for (network, endpoint) in &request.connect {
        docker.connect_network(network, &id, endpoint).await.map_err(|error| failure::engine(&error))?;
    }
    docker.rename(&id, &notes.spec.name).await.map_err(|error| failure::engine(&error))?;
    let ours = capture(docker, &id).await.map_err(|error| failure::gather(&error))?;
    for difference in compare(&notes.spec, &ours.spec, Stage::Created) {
        tracing::warn!(%migration, %difference, "the container is not quite what it was");
    }
    let scratch = service.config.scratch(migration);
    let images = blocking(move || scratch.make(IMAGES, room).map_err(fault(STATE))).await?;
    let roots = roots(docker, &ours.spec, images).await?;
    Ok(Created { container: id.parse().map_err(fault(ENGINE))?, roots })
}

/// Until it is armed the container must not start: it would run empty beside the one that it is to become.
fn bar(armed: &ArmedRoot, migration: &str, id: &str) -> Result<(), ArmedError> {
    // A state that was consumed and never came to life is what the runtime refuses to start.
    armed.arm(id, &Armed::new(migration, "", ""))?;
    armed.consume(id)
}

/// Bars again what was barred before a reboot: notes survive it, armed states do not.
pub(crate) fn bar_again(left: &[(MigrationId, Notes)], armed: &ArmedRoot) -> Result<(), ArmedError> {
    for (migration, notes) in left {
        let Some(id) = &notes.container else { continue };
        if armed.state(id)? == State::Absent {
            bar(armed, migration.as_str(), id)?;
        }
    }
    Ok(())
}

/// The image's id, when its name means another image here, or none.
async fn image_by_id(docker: &Docker, spec: &ContainerSpec) -> Result<Option<String>, Fault> {
    match docker.image(&spec.image.reference).await {
        Ok(image) if image.id == spec.image.id => Ok(None),
        Err(error) if !error.is_not_found() => Err(failure::engine(&error)),
        Ok(_) | Err(_) => Ok(Some(spec.image.id.clone())),
    }
}

/// Where the files go. Names are those that the checkpointer gives to what the source has.
async fn roots(docker: &Docker, spec: &ContainerSpec, images: PathBuf) -> Result<Vec<TargetRoot>, Fault> {
    let upper = spec.layer.as_ref().and_then(|layer| layer.upper.clone());
    let upper = upper.ok_or_else(|| Fault::new(ENGINE, "the engine does not tell the writable layer"))?;
    let mut roots = vec![root("images", &images)?, root("layer", &upper)?];
    for (mount, volume) in spec.volumes() {
        let name = match volume.anonymous {
            true => format!("volume-at:{}", mount.destination.display()),
            false => format!("volume:{}", volume.name),
        };
        let source = mount.source.as_ref();
        let source = source.ok_or_else(|| Fault::new(ENGINE, format!("{name} has no directory here")))?;
        roots.push(root(&name, source)?);
    }
    if spec.log_driver() == "json-file" {
        // The engine names the file only when it opens it; this is where it will (daemon/logs.go of Docker).
        let info = docker.info().await.map_err(|error| failure::engine(&error))?;
        let id = &spec.id;
        roots.push(root("log", &info.data_root.join("containers").join(id).join(format!("{id}-json.log")))?);
    }
    Ok(roots)
}

fn root(name: &str, path: &Path) -> Result<TargetRoot, Fault> {
    let text = path.to_str().ok_or_else(|| {
        let message = format!("the path {} is not UTF-8", path.display());
        Fault::new(ENGINE, message)
    })?;
    Ok(TargetRoot { root: name.to_owned(), path: text.to_owned() })
}

/// Whatever happened, in one line for a log.
pub(crate) fn told(error: &dyn std::error::Error) -> String {
    chain(error)
}
