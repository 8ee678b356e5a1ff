//! Images through the bucket: the source puts what it lacks, the target takes what it needs.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use futures_util::{StreamExt, TryStreamExt};
use haulage_engine::Engine;
use haulage_protocol::fault::{Fault, code};
use haulage_protocol::id::MigrationId;
use haulage_protocol::syncer::{ImagePulled, ImagePushed, PullImage, PushImage};
use haulage_protocol::unit::{Bytes, Micros};
use haulage_service::notes;
use tokio::io::AsyncWriteExt;
use tokio_util::io::ReaderStream;

use crate::Syncer;
use crate::archive::{ImageManifest, What, member_path, put_together, take_apart};
use crate::failure::{self, IMAGE, blocking, fault};

const KIND: &str = "image";

pub(crate) async fn push(
    service: Arc<Syncer>,
    migration: MigrationId,
    ask: PushImage,
) -> Result<ImagePushed, Fault> {
    let began = Instant::now();
    let name = manifest_name(&ask.image)?;
    let mut pushed = ImagePushed { put: Bytes(0), present: Bytes(0), took: Micros(0) };
    let known: Option<ImageManifest> =
        service.bucket.manifest(KIND, name).await.map_err(|error| failure::bucket(&error))?;
    pushed.present = match known {
        Some(manifest) => present(&service, &manifest).await?,
        None => Bytes(0),
    };
    if pushed.present == Bytes(0) {
        let scratch = Scratch::make(service.config.migration_dir(&migration), "image-out").await?;
        put_image(&service, &ask.image, name, &scratch.dir, &mut pushed).await?;
    }
    pushed.took = Micros::from_duration(began.elapsed());
    Ok(pushed)
}

/// The bytes of an image of which the bucket has everything; zero when it lacks something.
async fn present(service: &Syncer, manifest: &ImageManifest) -> Result<Bytes, Fault> {
    let mut bytes = 0;
    for member in &manifest.members {
        if let What::File { digest, size } = &member.what {
            let there = service.bucket.size_of(digest).await.map_err(|error| failure::bucket(&error))?;
            if there != Some(*size) {
                return Ok(Bytes(0));
            }
            bytes += size;
        }
    }
    Ok(Bytes(bytes))
}

async fn put_image(
    service: &Syncer,
    image: &str,
    name: &str,
    scratch: &Path,
    pushed: &mut ImagePushed,
) -> Result<(), Fault> {
    let facts = service.docker.image(image).await.map_err(|error| failure::engine(&error))?;
    let tar = scratch.join("image.tar");
    let mut file = tokio::fs::File::create(&tar).await.map_err(fault(IMAGE))?;
    let mut archive = service.docker.export_image(image);
    while let Some(piece) = archive.try_next().await.map_err(fault(IMAGE))? {
        file.write_all(&piece).await.map_err(fault(IMAGE))?;
    }
    file.flush().await.map_err(fault(IMAGE))?;
    let pieces = scratch.to_owned();
    let members = tokio::task::spawn_blocking(move || take_apart(&tar, &pieces));
    let members = members.await.map_err(fault(code::INTERNAL))?.map_err(fault(IMAGE))?;
    for member in &members {
        if let What::File { digest, size } = &member.what {
            let content = tokio::fs::File::open(member_path(scratch, digest)).await.map_err(fault(IMAGE))?;
            let content = ReaderStream::with_capacity(content, 1 << 20);
            let stored = service.bucket.put_stream(*digest, *size, content).await;
            let stored = stored.map_err(|error| failure::bucket(&error))?;
            let counter = if stored.sent { &mut pushed.put } else { &mut pushed.present };
            *counter += Bytes(*size);
        }
    }
    // Last, so that a manifest in the bucket means that all of its objects are.
    let manifest = ImageManifest { image: image.to_owned(), tags: facts.tags, members };
    service.bucket.put_manifest(KIND, name, &manifest).await.map_err(|error| failure::bucket(&error))
}

pub(crate) async fn pull(
    service: Arc<Syncer>,
    migration: MigrationId,
    ask: PullImage,
) -> Result<ImagePulled, Fault> {
    let began = Instant::now();
    if has_image(&service, &ask.image).await? {
        return Ok(ImagePulled { read: Bytes(0), took: Micros::from_duration(began.elapsed()) });
    }
    let name = manifest_name(&ask.image)?;
    let manifest: Option<ImageManifest> =
        service.bucket.manifest(KIND, name).await.map_err(|error| failure::bucket(&error))?;
    let manifest = manifest.ok_or_else(|| {
        Fault::new(IMAGE, format!("the bucket has no image {}", ask.image))
            .remedy("see that --bucket names the same store on both hosts")
    })?;
    let scratch = Scratch::make(service.config.migration_dir(&migration), "image-in").await?;
    let read = fetch(&service, &manifest, &scratch.dir).await?;
    let tar = scratch.dir.join("image.tar");
    let (members, pieces, to) = (manifest.members.clone(), scratch.dir.clone(), tar.clone());
    let joined = tokio::task::spawn_blocking(move || put_together(&members, &pieces, &to));
    joined.await.map_err(fault(code::INTERNAL))?.map_err(fault(IMAGE))?;
    let archive = tokio::fs::File::open(&tar).await.map_err(fault(IMAGE))?;
    let archive = ReaderStream::with_capacity(archive, 1 << 20).boxed();
    service.docker.import_image(archive).await.map_err(|error| failure::engine(&error))?;
    if !has_image(&service, &ask.image).await? {
        let message = format!("the engine loaded the archive, but has no image {}", ask.image);
        return Err(Fault::new(IMAGE, message));
    }
    for tag in &manifest.tags {
        name_image(&service, &ask.image, tag).await?;
    }
    Ok(ImagePulled { read, took: Micros::from_duration(began.elapsed()) })
}

async fn has_image(service: &Syncer, image: &str) -> Result<bool, Fault> {
    match service.docker.image(image).await {
        Ok(_) => Ok(true),
        Err(error) if error.is_not_found() => Ok(false),
        Err(error) => Err(failure::engine(&error)),
    }
}

/// The image gets the name that it had, unless another image has it here.
async fn name_image(service: &Syncer, image: &str, tag: &str) -> Result<(), Fault> {
    match service.docker.image(tag).await {
        Ok(_) => Ok(()),
        Err(error) if error.is_not_found() => {
            service.docker.tag_image(image, tag).await.map_err(|error| failure::engine(&error))
        }
        Err(error) => Err(failure::engine(&error)),
    }
}

async fn fetch(service: &Syncer, manifest: &ImageManifest, dir: &Path) -> Result<Bytes, Fault> {
    let mut read = Bytes(0);
    for member in &manifest.members {
        if let What::File { digest, .. } = &member.what {
            let path = member_path(dir, digest);
            if !tokio::fs::try_exists(&path).await.map_err(fault(IMAGE))? {
                let got = service.bucket.get_to_file(*digest, &path).await;
                read += Bytes(got.map_err(|error| failure::bucket(&error))?);
            }
        }
    }
    Ok(read)
}

/// An image's id without the name of its digest, which is no name of a manifest.
fn manifest_name(image: &str) -> Result<&str, Fault> {
    image
        .strip_prefix("sha256:")
        .ok_or_else(|| Fault::new(code::MALFORMED, format!("{image:?} is not the content id of an image")))
}

/// A directory that goes with this.
struct Scratch {
    migration: PathBuf,
    name: &'static str,
    dir: PathBuf,
}

impl Scratch {
    async fn make(migration: PathBuf, name: &'static str) -> Result<Self, Fault> {
        let work = move || {
            notes::remove(&migration, &[name]).map_err(fault(IMAGE))?;
            let dir = migration.join(name);
            std::fs::create_dir_all(&dir).map_err(fault(IMAGE))?;
            Ok(Self { migration, name, dir })
        };
        blocking(work).await
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // Whoever asked is told only when it is gone, and an image can be large.
        let removed = tokio::task::block_in_place(|| notes::remove(&self.migration, &[self.name]));
        if let Err(error) = removed {
            tracing::warn!(dir = %self.dir.display(), %error, "a scratch directory was not removed");
        }
    }
}
