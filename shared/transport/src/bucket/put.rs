//! Into the bucket.

use bytes::Bytes;
use futures_util::{Stream, StreamExt, TryStreamExt};
use object_store::{ObjectStoreExt, PutPayload, WriteMultipart};

use super::digest::{Digest, Digester};
use super::{Bucket, BucketError};

/// Objects up to here are put in one request; larger ones in parts of this size. Stores in the way of S3 ask
/// for parts of 5 MiB at least, and take 10,000 of them: objects of up to 80 GiB.
const PART_BYTES: usize = 8 << 20;

/// Parts on their way at once: with the one being filled, at most 32 MiB are held in memory.
const PARTS_AT_ONCE: usize = 3;

/// What a put did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stored {
    /// The object's name.
    pub digest: Digest,
    /// Its bytes.
    pub size: u64,
    /// Whether it was sent; otherwise the bucket had it.
    pub sent: bool,
}

impl Bucket {
    /// Puts what `content` yields under `digest`, which it must have, unless an object of that digest and `size`
    /// is there; then `content` is dropped unread.
    ///
    /// # Errors
    /// [`BucketError::DigestMismatch`] when the content is not what `digest` says, [`BucketError::Local`] when it
    /// fails, [`BucketError::Store`]. Nothing is left under the key then.
    pub async fn put_stream<S>(&self, digest: Digest, size: u64, content: S) -> Result<Stored, BucketError>
    where
        S: Stream<Item = std::io::Result<Bytes>> + Send,
    {
        if self.size_of(&digest).await? == Some(size) {
            return Ok(Stored { digest, size, sent: false });
        }
        let content = content.map_err(BucketError::local("read what is put into the bucket"));
        let mut content = std::pin::pin!(content);
        let mut digester = Digester::default();
        let size = if size <= PART_BYTES as u64 {
            self.put_whole(digest, &mut digester, content).await?
        } else {
            let upload = self.store.put_multipart(&self.object_key(&digest)).await;
            let upload = upload.map_err(BucketError::store("begin an object"))?;
            let mut upload = WriteMultipart::new_with_chunk_size(upload, PART_BYTES);
            match send_parts(&mut upload, &mut digester, digest, &mut content).await {
                Ok(size) => {
                    upload.finish().await.map_err(BucketError::store("put an object"))?;
                    size
                }
                Err(error) => {
                    // The reason for giving up matters more than whether the parts could be taken back.
                    let _ = upload.abort().await;
                    return Err(error);
                }
            }
        };
        Ok(Stored { digest, size, sent: true })
    }

    async fn put_whole(
        &self,
        digest: Digest,
        digester: &mut Digester,
        mut content: impl Stream<Item = Result<Bytes, BucketError>> + Unpin,
    ) -> Result<u64, BucketError> {
        let mut payload = Vec::new();
        let mut size = 0;
        while let Some(bytes) = content.try_next().await? {
            size += bytes.len() as u64;
            if size > PART_BYTES as u64 {
                // More than was promised cannot have the promised digest, and is not to fill the memory.
                return Err(BucketError::TooLarge { size, limit: PART_BYTES as u64 });
            }
            digester.update(&bytes);
            payload.push(bytes);
        }
        expect(digest, digester.clone())?;
        let payload = PutPayload::from_iter(payload);
        self.store
            .put(&self.object_key(&digest), payload)
            .await
            .map_err(BucketError::store("put an object"))?;
        Ok(size)
    }
}

async fn send_parts(
    upload: &mut WriteMultipart,
    digester: &mut Digester,
    digest: Digest,
    content: &mut (impl Stream<Item = Result<Bytes, BucketError>> + Unpin),
) -> Result<u64, BucketError> {
    let mut size = 0;
    while let Some(bytes) = content.next().await.transpose()? {
        size += bytes.len() as u64;
        digester.update(&bytes);
        upload.wait_for_capacity(PARTS_AT_ONCE).await.map_err(BucketError::store("put a part"))?;
        upload.put(bytes);
    }
    expect(digest, digester.clone())?;
    Ok(size)
}

fn expect(expected: Digest, digester: Digester) -> Result<(), BucketError> {
    let actual = digester.finish();
    if actual == expected { Ok(()) } else { Err(BucketError::DigestMismatch { expected, actual }) }
}
