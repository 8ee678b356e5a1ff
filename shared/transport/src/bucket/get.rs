//! Out of the bucket, verified.

use std::path::Path;

use bytes::Bytes;
use futures_util::stream::BoxStream;
use futures_util::{Stream, StreamExt, TryStreamExt, stream};
use object_store::ObjectStoreExt;
use tokio::fs::{self, File};
use tokio::io::AsyncWriteExt;
use uuid::Uuid;

use super::digest::{Digest, Digester};
use super::{Bucket, BucketError};

struct Reading {
    rest: BoxStream<'static, object_store::Result<Bytes>>,
    digester: Digester,
}

impl Bucket {
    /// The object's bytes as they come. The stream's last item is
    /// [`BucketError::DigestMismatch`] when they were not what the digest says: only a stream that ended without
    /// an error has given the object, and what it yielded is not to be used before.
    ///
    /// # Errors
    /// [`BucketError::Missing`], [`BucketError::Store`]; the stream's items likewise.
    async fn get_stream(
        &self,
        digest: Digest,
    ) -> Result<impl Stream<Item = Result<Bytes, BucketError>> + Send + use<>, BucketError> {
        let object = match self.store.get(&self.object_key(&digest)).await {
            Ok(object) => object,
            Err(object_store::Error::NotFound { .. }) => return Err(BucketError::Missing { digest }),
            Err(source) => return Err(BucketError::store("get an object")(source)),
        };
        let reading = Reading { rest: object.into_stream(), digester: Digester::default() };
        let verified = stream::try_unfold(Some(reading), move |reading| async move {
            let Some(mut reading) = reading else { return Ok(None) };
            match reading.rest.try_next().await.map_err(BucketError::store("get an object"))? {
                Some(bytes) => {
                    reading.digester.update(&bytes);
                    Ok(Some((bytes, Some(reading))))
                }
                None => match reading.digester.finish() {
                    actual if actual == digest => Ok(None),
                    actual => Err(BucketError::DigestMismatch { expected: digest, actual }),
                },
            }
        });
        Ok(verified)
    }

    /// Writes an object to `path`, where it appears only when it is whole and verified; a file that was there
    /// is replaced. Returns its bytes.
    ///
    /// # Errors
    /// [`BucketError::Local`]; else as [`get_stream`](Self::get_stream). Nothing is left at or beside `path` then.
    pub async fn get_to_file(&self, digest: Digest, path: &Path) -> Result<u64, BucketError> {
        let mut name = path.as_os_str().to_owned();
        name.push(format!(".{}.part", Uuid::new_v4().simple()));
        let part = Path::new(&name);
        let result = match self.write_part(digest, part).await {
            Ok(size) => fs::rename(part, path)
                .await
                .map(|()| size)
                .map_err(BucketError::local("put a file from the bucket in its place")),
            Err(error) => Err(error),
        };
        if result.is_err() {
            // It may not even have been made; the first error is the one that matters.
            let _ = fs::remove_file(part).await;
        }
        result
    }

    async fn write_part(&self, digest: Digest, part: &Path) -> Result<u64, BucketError> {
        let stream = self.get_stream(digest).await?;
        let mut stream = std::pin::pin!(stream);
        let mut file =
            File::create_new(part).await.map_err(BucketError::local("create a file from the bucket"))?;
        let mut size = 0;
        while let Some(bytes) = stream.next().await.transpose()? {
            file.write_all(&bytes).await.map_err(BucketError::local("write a file from the bucket"))?;
            size += bytes.len() as u64;
        }
        file.flush().await.map_err(BucketError::local("write a file from the bucket"))?;
        Ok(size)
    }
}
