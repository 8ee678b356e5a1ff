//! Content-addressed objects in any store that `object_store` speaks.
//!
//! ```text
//!  sha256/ab/abcdef…            bytes, under their own digest: never overwritten, never trusted unread
//!  manifest/<kind>/<id>.json    a named list of what belongs together, written last
//! ```
//! An object appears under its key only when it is whole: a put that fails half-way leaves nothing under it.

mod digest;
mod error;
mod get;
mod put;

use std::fs;
use std::sync::Arc;

use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};
use serde::Serialize;
use serde::de::DeserializeOwned;
use url::Url;

pub use digest::{Digest, Digester};
pub use error::BucketError;
pub use put::Stored;

/// The most bytes that a manifest may have: 16 MiB.
pub const MAX_MANIFEST_BYTES: u64 = 16 << 20;

/// Objects and manifests in one place of one store. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Bucket {
    store: Arc<dyn ObjectStore>,
    prefix: Path,
}

impl Bucket {
    /// Opens the store at `url`: `file:///DIR` (made if missing), `memory:///`, or whichever others this build's
    /// `object_store` knows.
    ///
    /// # Errors
    /// [`BucketError::BadUrl`], [`BucketError::Directory`].
    pub fn open(url: &str) -> Result<Self, BucketError> {
        let bad = || BucketError::BadUrl { url: url.to_owned() };
        let parsed = Url::parse(url).map_err(|_| bad())?;
        if parsed.scheme() == "file" {
            let dir = parsed.to_file_path().map_err(|()| bad())?;
            fs::create_dir_all(&dir)
                .map_err(|source| BucketError::Directory { path: dir.clone(), source })?;
            let store = LocalFileSystem::new_with_prefix(&dir).map_err(BucketError::store("open"))?;
            return Ok(Self::over(Arc::new(store), Path::default()));
        }
        let (store, prefix) = object_store::parse_url(&parsed).map_err(BucketError::store("open"))?;
        Ok(Self::over(store.into(), prefix))
    }

    fn over(store: Arc<dyn ObjectStore>, prefix: Path) -> Self {
        Self { store, prefix }
    }

    /// Whether an object of this digest is there, and how many bytes it has. Its content is not looked at.
    ///
    /// # Errors
    /// [`BucketError::Store`].
    pub async fn size_of(&self, digest: &Digest) -> Result<Option<u64>, BucketError> {
        match self.store.head(&self.object_key(digest)).await {
            Ok(meta) => Ok(Some(meta.size)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(source) => Err(BucketError::store("look up an object")(source)),
        }
    }

    /// Writes a manifest, over one of the same name. It is seen whole or not at all.
    ///
    /// # Errors
    /// [`BucketError::BadName`], [`BucketError::BadManifest`], [`BucketError::TooLarge`], [`BucketError::Store`].
    pub async fn put_manifest<T>(&self, kind: &str, id: &str, manifest: &T) -> Result<(), BucketError>
    where
        T: Serialize + Sync,
    {
        let key = self.manifest_key(kind, id)?;
        let json = serde_json::to_vec_pretty(manifest)
            .map_err(|source| BucketError::BadManifest { name: format!("{kind}/{id}"), source })?;
        if json.len() as u64 > MAX_MANIFEST_BYTES {
            return Err(BucketError::TooLarge { size: json.len() as u64, limit: MAX_MANIFEST_BYTES });
        }
        self.store.put(&key, json.into()).await.map_err(BucketError::store("put a manifest"))?;
        Ok(())
    }

    /// Reads a manifest; `None` when there is none of this name.
    ///
    /// # Errors
    /// [`BucketError::BadName`], [`BucketError::TooLarge`], [`BucketError::BadManifest`], [`BucketError::Store`].
    pub async fn manifest<T>(&self, kind: &str, id: &str) -> Result<Option<T>, BucketError>
    where
        T: DeserializeOwned,
    {
        let object = match self.store.get(&self.manifest_key(kind, id)?).await {
            Ok(object) => object,
            Err(object_store::Error::NotFound { .. }) => return Ok(None),
            Err(source) => return Err(BucketError::store("get a manifest")(source)),
        };
        if object.meta.size > MAX_MANIFEST_BYTES {
            return Err(BucketError::TooLarge { size: object.meta.size, limit: MAX_MANIFEST_BYTES });
        }
        let json = object.bytes().await.map_err(BucketError::store("get a manifest"))?;
        serde_json::from_slice(&json)
            .map(Some)
            .map_err(|source| BucketError::BadManifest { name: format!("{kind}/{id}"), source })
    }

    fn object_key(&self, digest: &Digest) -> Path {
        let hex = digest.to_hex();
        let shard = hex.get(..2).unwrap_or_default();
        self.prefix.clone().join("sha256").join(shard).join(hex.as_str())
    }

    fn manifest_key(&self, kind: &str, id: &str) -> Result<Path, BucketError> {
        for name in [kind, id] {
            check_name(name)?;
        }
        Ok(self.prefix.clone().join("manifest").join(kind).join(format!("{id}.json")))
    }
}

/// Names are path segments in every store: letters, digits, `-`, `_` and `.`, not first, at most 128 of them.
fn check_name(name: &str) -> Result<(), BucketError> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if name.is_empty() || name.len() > 128 || name.starts_with('.') || !name.chars().all(allowed) {
        return Err(BucketError::BadName { name: name.to_owned() });
    }
    Ok(())
}

#[cfg(test)]
mod tests;
