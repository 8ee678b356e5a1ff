//! The bucket on a local directory, its default.

use std::path::{Path, PathBuf};

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use serde::{Deserialize, Serialize};
use tempfile::TempDir;

use super::*;

const LARGE: usize = 20 << 20;

struct Fixture {
    dir: TempDir,
    bucket: Bucket,
}

fn fixture() -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    let url = format!("file://{}", dir.path().join("deep/bucket").display());
    Fixture { bucket: Bucket::open(&url).unwrap(), dir }
}

impl Fixture {
    fn root(&self) -> PathBuf {
        self.dir.path().join("deep/bucket")
    }

    fn file_of(&self, digest: &Digest) -> PathBuf {
        let hex = digest.to_hex();
        self.root().join("sha256").join(&hex[..2]).join(&hex)
    }

    async fn put(&self, bytes: &Bytes) -> Stored {
        let digest = Digest::of(bytes);
        self.bucket.put_stream(digest, bytes.len() as u64, pieces(bytes)).await.unwrap()
    }

    async fn get(&self, digest: Digest) -> Result<Vec<u8>, BucketError> {
        let path = self.dir.path().join("got");
        let size = self.bucket.get_to_file(digest, &path).await?;
        let bytes = std::fs::read(&path).unwrap();
        std::fs::remove_file(path).unwrap();
        assert_eq!(bytes.len() as u64, size);
        Ok(bytes)
    }

    /// Every file below the bucket, half-written ones included.
    fn files(&self) -> usize {
        fn count(dir: &Path) -> usize {
            std::fs::read_dir(dir)
                .unwrap()
                .map(|entry| entry.unwrap().path())
                .map(|path| if path.is_dir() { count(&path) } else { 1 })
                .sum()
        }
        count(&self.root())
    }
}

fn noise(len: usize) -> Bytes {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let word = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    std::iter::repeat_with(word).flatten().take(len).collect::<Vec<_>>().into()
}

fn pieces(bytes: &Bytes) -> impl futures_util::Stream<Item = std::io::Result<Bytes>> + Send + use<> {
    let chunks: Vec<_> = bytes.chunks(777_777).map(|c| Ok(Bytes::copy_from_slice(c))).collect();
    stream::iter(chunks)
}

#[tokio::test]
async fn small_and_large_objects_come_back_and_are_sent_once() {
    let f = fixture();
    for bytes in [Bytes::new(), noise(1000), noise(LARGE)] {
        let first = f.put(&bytes).await;
        assert_eq!((first.size, first.sent), (bytes.len() as u64, true));
        assert!(f.file_of(&first.digest).exists());
        let again = f.put(&bytes).await;
        assert!(!again.sent);
        assert_eq!(f.get(first.digest).await.unwrap(), bytes);
        assert_eq!(f.bucket.size_of(&first.digest).await.unwrap(), Some(bytes.len() as u64));
    }
}

#[tokio::test]
async fn a_wrong_promise_leaves_nothing() {
    let f = fixture();
    for bytes in [noise(1000), noise(LARGE)] {
        let promised = Digest::of(b"something else");
        let error = f.bucket.put_stream(promised, bytes.len() as u64, pieces(&bytes)).await.unwrap_err();
        assert_eq!(error.code(), "digest_mismatch");
        assert_eq!(f.bucket.size_of(&promised).await.unwrap(), None);
    }
    assert_eq!(f.files(), 0);
}

#[tokio::test]
async fn a_source_that_fails_leaves_nothing() {
    let f = fixture();
    let bytes = noise(LARGE);
    let digest = Digest::of(&bytes);
    let failing = pieces(&bytes).take(15).chain(stream::iter([Err(std::io::Error::other("gone"))]));
    let error = f.bucket.put_stream(digest, LARGE as u64, failing).await.unwrap_err();
    assert_eq!(error.code(), "io");
    assert_eq!(f.files(), 0);
}

#[tokio::test]
async fn a_damaged_object_is_noticed_and_not_used() {
    let f = fixture();
    for bytes in [noise(1000), noise(LARGE)] {
        let digest = f.put(&bytes).await.digest;
        let mut damaged = bytes.to_vec();
        *damaged.last_mut().unwrap() ^= 1;
        std::fs::write(f.file_of(&digest), &damaged).unwrap();

        let target = f.dir.path().join("target");
        assert_eq!(f.bucket.get_to_file(digest, &target).await.unwrap_err().code(), "digest_mismatch");
        assert!(!target.exists());
        assert_eq!(std::fs::read_dir(f.dir.path()).unwrap().count(), 1, "the bucket only");
    }
}

#[tokio::test]
async fn an_object_of_the_wrong_size_is_put_again() {
    let f = fixture();
    let bytes = noise(5000);
    let digest = f.put(&bytes).await.digest;
    std::fs::write(f.file_of(&digest), &bytes[..100]).unwrap();
    assert!(f.put(&bytes).await.sent);
    assert_eq!(f.get(digest).await.unwrap(), bytes);
}

#[tokio::test]
async fn what_is_missing_is_said() {
    let f = fixture();
    let digest = Digest::of(b"never put");
    assert_eq!(f.get(digest).await.unwrap_err().code(), "object_missing");
    assert_eq!(f.bucket.size_of(&digest).await.unwrap(), None);
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Image {
    members: Vec<Digest>,
}

#[tokio::test]
async fn manifests_are_named_and_replaced() {
    let f = fixture();
    let id = "a".repeat(64);
    assert_eq!(f.bucket.manifest::<Image>("image", &id).await.unwrap(), None);
    let first = Image { members: vec![Digest::of(b"1")] };
    let second = Image { members: vec![Digest::of(b"1"), Digest::of(b"2")] };
    for image in [&first, &second] {
        f.bucket.put_manifest("image", &id, image).await.unwrap();
        assert_eq!(f.bucket.manifest::<Image>("image", &id).await.unwrap().as_ref(), Some(image));
    }
    std::fs::write(f.root().join("manifest/image").join(format!("{id}.json")), "{").unwrap();
    assert_eq!(f.bucket.manifest::<Image>("image", &id).await.unwrap_err().code(), "bad_manifest");
    for bad in ["", "..", "a/b", ".hidden", "sha256:00", &"x".repeat(129)] {
        assert_eq!(f.bucket.manifest::<Image>("image", bad).await.unwrap_err().code(), "bad_object_name");
    }
}

#[test]
fn urls_and_digests_are_checked() {
    assert_eq!(Bucket::open("no url").unwrap_err().code(), "bad_bucket_url");
    assert!(Bucket::open("gopher://x/y").is_err());
    assert!(Bucket::open("memory:///").is_ok());
    let digest = Digest::of(b"");
    assert_eq!(digest.to_string(), "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    assert_eq!(digest.to_hex().parse::<Digest>().unwrap(), digest);
    assert_eq!(digest.to_string().parse::<Digest>().unwrap(), digest);
    assert!("sha256:00".parse::<Digest>().is_err());
}
