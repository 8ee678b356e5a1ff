//! Typed KV buckets: what a key holds is JSON of one type, replaced with compare-and-set.

use std::marker::PhantomData;

use async_nats::jetstream::kv::{self, CreateErrorKind, Operation, UpdateErrorKind};
use futures_util::{Stream, StreamExt, TryStreamExt};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::nats::{Nats, NatsError, failed};

/// The revision of an entry: what compare-and-set compares.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Revision(pub u64);

/// A table cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum TableError {
    /// The key exists, or has another revision than expected: somebody else wrote.
    #[error("somebody else wrote key {0} first")]
    Conflict(String),
    /// The entry is not what it should be.
    #[error("the entry {key} of bucket {bucket} cannot be decoded")]
    Malformed {
        /// The bucket.
        bucket: String,
        /// The key.
        key: String,
        /// Why.
        source: serde_json::Error,
    },
    /// NATS failed; whether a write happened is unknown.
    #[error(transparent)]
    Nats(#[from] NatsError),
}

/// A bucket whose entries are `T`.
pub struct Table<T> {
    store: kv::Store,
    name: String,
    holds: PhantomData<fn() -> T>,
}

impl<T> Clone for Table<T> {
    fn clone(&self) -> Self {
        Self { store: self.store.clone(), name: self.name.clone(), holds: PhantomData }
    }
}

impl<T: Serialize + DeserializeOwned> Table<T> {
    /// Opens the bucket, which [`Nats::ensure`] has made.
    ///
    /// # Errors
    /// [`NatsError::Use`].
    pub async fn open(nats: &Nats, bucket: &str) -> Result<Self, NatsError> {
        let store = nats.jetstream.get_key_value(bucket).await.map_err(failed("open a bucket"))?;
        Ok(Self { store, name: bucket.to_owned(), holds: PhantomData })
    }

    /// The entry and its revision.
    ///
    /// # Errors
    /// [`TableError`].
    pub async fn get(&self, key: &str) -> Result<Option<(T, Revision)>, TableError> {
        match self.store.entry(key).await.map_err(failed("read an entry"))? {
            Some(entry) if entry.operation == Operation::Put => {
                Ok(Some((self.decode(key, &entry.value)?, Revision(entry.revision))))
            }
            _ => Ok(None),
        }
    }

    /// Writes an entry that must not exist.
    ///
    /// # Errors
    /// [`TableError::Conflict`] when it does.
    pub async fn create(&self, key: &str, value: &T) -> Result<Revision, TableError> {
        match self.store.create(key, self.encode(key, value)?).await {
            Ok(revision) => Ok(Revision(revision)),
            Err(error) if error.kind() == CreateErrorKind::AlreadyExists => {
                Err(TableError::Conflict(key.to_owned()))
            }
            Err(error) => Err(failed("create an entry")(error).into()),
        }
    }

    /// Replaces an entry that must have that revision.
    ///
    /// # Errors
    /// [`TableError::Conflict`] when it has another.
    pub async fn update(&self, key: &str, value: &T, revision: Revision) -> Result<Revision, TableError> {
        match self.store.update(key, self.encode(key, value)?, revision.0).await {
            Ok(revision) => Ok(Revision(revision)),
            Err(error) if error.kind() == UpdateErrorKind::WrongLastRevision => {
                Err(TableError::Conflict(key.to_owned()))
            }
            Err(error) => Err(failed("update an entry")(error).into()),
        }
    }

    /// Writes an entry whatever was there.
    ///
    /// # Errors
    /// [`TableError`].
    pub async fn put(&self, key: &str, value: &T) -> Result<(), TableError> {
        self.store.put(key, self.encode(key, value)?).await.map_err(failed("write an entry"))?;
        Ok(())
    }

    /// Removes an entry that must have that revision.
    ///
    /// # Errors
    /// [`TableError::Nats`], also when the revision is another one.
    pub async fn remove(&self, key: &str, revision: Revision) -> Result<(), TableError> {
        let removed = self.store.delete_expect_revision(key, Some(revision.0)).await;
        removed.map_err(failed("remove an entry"))?;
        Ok(())
    }

    /// Removes an entry of that revision, and with it every trace that it existed. One that was written since stays.
    ///
    /// # Errors
    /// [`TableError::Nats`].
    pub async fn erase(&self, key: &str, revision: Revision) -> Result<(), TableError> {
        // A bucket is a stream with a subject for each key, and a revision is the number of a message in it; those
        // below a number are purged.
        let subject = format!("{}{key}", self.store.prefix);
        let below = revision.0.saturating_add(1);
        let purged = self.store.stream.purge().filter(subject).sequence(below).await;
        purged.map_err(failed("erase an entry"))?;
        Ok(())
    }

    /// Removes an entry whatever its revision.
    ///
    /// # Errors
    /// [`TableError::Nats`].
    pub async fn forget(&self, key: &str) -> Result<(), TableError> {
        self.store.delete(key).await.map_err(failed("remove an entry"))?;
        Ok(())
    }

    /// Every entry. One that cannot be decoded is left out with a warning.
    ///
    /// # Errors
    /// [`TableError::Nats`].
    pub async fn list(&self) -> Result<Vec<(String, T)>, TableError> {
        Ok(self.revisions().await?.into_iter().map(|(key, value, _)| (key, value)).collect())
    }

    /// As [`Table::list`], with the revision of each.
    ///
    /// # Errors
    /// [`TableError::Nats`].
    pub async fn revisions(&self) -> Result<Vec<(String, T, Revision)>, TableError> {
        let keys = self.store.keys().await.map_err(failed("list entries"))?;
        let keys: Vec<String> = keys.try_collect().await.map_err(failed("list entries"))?;
        let mut entries = Vec::with_capacity(keys.len());
        for key in keys {
            match self.get(&key).await {
                Ok(Some((value, revision))) => entries.push((key, value, revision)),
                Ok(None) => {}
                Err(error @ TableError::Malformed { .. }) => tracing::warn!(%error, "left out"),
                Err(error) => return Err(error),
            }
        }
        Ok(entries)
    }

    /// The entry as it is now, if it exists, and every later state of it.
    ///
    /// # Errors
    /// [`NatsError::Use`]; an item is an error when an entry cannot be read or decoded.
    pub async fn watch(
        &self,
        key: &str,
    ) -> Result<impl Stream<Item = Result<T, TableError>> + Send + Unpin + use<T>, NatsError>
    where
        T: Send + 'static,
    {
        let watch = self.store.watch_with_history(key).await.map_err(failed("watch an entry"))?;
        let table = self.clone();
        Ok(Box::pin(watch.filter_map(move |entry| {
            let item = match entry {
                Ok(entry) if entry.operation == Operation::Put => {
                    Some(table.decode(&entry.key, &entry.value))
                }
                Ok(_) => None,
                Err(error) => Some(Err(failed("watch an entry")(error).into())),
            };
            async move { item }
        })))
    }

    fn encode(&self, key: &str, value: &T) -> Result<bytes::Bytes, TableError> {
        serde_json::to_vec(value).map(Into::into).map_err(|source| self.malformed(key, source))
    }

    fn decode(&self, key: &str, value: &[u8]) -> Result<T, TableError> {
        serde_json::from_slice(value).map_err(|source| self.malformed(key, source))
    }

    fn malformed(&self, key: &str, source: serde_json::Error) -> TableError {
        TableError::Malformed { bucket: self.name.clone(), key: key.to_owned(), source }
    }
}
