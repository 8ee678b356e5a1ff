//! Why the bucket did not take or give something.

use std::io;
use std::path::PathBuf;

use super::digest::Digest;

/// Why the bucket did not take or give something.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BucketError {
    /// The URL names no store.
    #[error("{url:?} names no object store")]
    BadUrl {
        /// As given.
        url: String,
    },
    /// The local directory of the store cannot be made.
    #[error("the bucket's directory {} cannot be made", path.display())]
    Directory {
        /// Which one.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// A name is not fit to be part of a key.
    #[error("{name:?} is no name for a manifest")]
    BadName {
        /// As given.
        name: String,
    },
    /// A text is no digest.
    #[error("{text:?} is no sha256 digest")]
    BadDigest {
        /// Its first hundred characters.
        text: String,
    },
    /// A manifest does not hold what it should.
    #[error("manifest {name} cannot be read or written")]
    BadManifest {
        /// Kind and id.
        name: String,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
    /// No object of this digest is there.
    #[error("the bucket has no object {digest}")]
    Missing {
        /// What was asked for.
        digest: Digest,
    },
    /// The bytes do not have the digest which names them: a damaged object, or a wrong promise on putting it.
    #[error("bytes named {expected} have the digest {actual}")]
    DigestMismatch {
        /// The name.
        expected: Digest,
        /// The truth.
        actual: Digest,
    },
    /// More bytes than may be held at once.
    #[error("{size} bytes are over the limit of {limit}")]
    TooLarge {
        /// What there is.
        size: u64,
        /// What may be.
        limit: u64,
    },
    /// The source or the destination on this host failed.
    #[error("{action}")]
    Local {
        /// What was being done.
        action: &'static str,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// The store failed.
    #[error("the object store could not {action}")]
    Store {
        /// What it was to do.
        action: &'static str,
        /// Its reason.
        #[source]
        source: Box<object_store::Error>,
    },
}

impl BucketError {
    /// The stable code of this error, for faults.
    pub fn code(&self) -> &'static str {
        match self {
            Self::BadUrl { .. } => "bad_bucket_url",
            Self::BadName { .. } => "bad_object_name",
            Self::BadDigest { .. } => "bad_digest",
            Self::BadManifest { .. } => "bad_manifest",
            Self::Missing { .. } => "object_missing",
            Self::DigestMismatch { .. } => "digest_mismatch",
            Self::TooLarge { .. } => "object_too_large",
            Self::Directory { .. } | Self::Local { .. } => "io",
            Self::Store { .. } => "bucket_failed",
        }
    }

    pub(super) fn store(action: &'static str) -> impl Fn(object_store::Error) -> Self {
        move |source| Self::Store { action, source: Box::new(source) }
    }

    pub(super) fn local(action: &'static str) -> impl Fn(io::Error) -> Self {
        move |source| Self::Local { action, source }
    }
}
