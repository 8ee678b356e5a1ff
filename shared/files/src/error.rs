//! Why a tree could not be read or written.

use std::io;
use std::path::PathBuf;

use crate::path::RelPath;
use crate::wire::{PassId, RootId, Totals};

/// Why a pass failed.
///
/// On the source nothing has been changed, ever. On the target the root is then neither the old nor the new tree,
/// and takes nothing but a first pass, which starts from nothing.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FilesError {
    /// A path leads, or might lead, out of its root, or is too long.
    #[error("{path:?} is no path inside a root")]
    BadPath {
        /// As far as it is text.
        path: String,
    },
    /// A name is not fit for a root.
    #[error("{name:?} is no name for a root")]
    BadRoot {
        /// As given.
        name: String,
    },
    /// A root cannot be opened.
    #[error("the root {} cannot be opened", path.display())]
    OpenRoot {
        /// Where it should be.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// The system refused something.
    #[error("cannot {action} {path}")]
    Io {
        /// What was being done.
        action: &'static str,
        /// To which entry.
        path: RelPath,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// An entry has more extended attributes than a record may carry.
    #[error("the extended attributes of {path} are over {limit} bytes")]
    XattrsTooLarge {
        /// Which entry.
        path: RelPath,
        /// What may be.
        limit: usize,
    },
    /// Who takes the frames has stopped taking them.
    #[error("the frames are not taken any more")]
    SinkClosed,
    /// A frame is not made of records.
    #[error("a frame of the file stream cannot be read")]
    BadFrame,
    /// The peer writes another version of the records.
    #[error("the peer writes version {peer} of the file stream, this side reads {ours}")]
    BadVersion {
        /// What the peer said.
        peer: u16,
        /// What this side reads.
        ours: u16,
    },
    /// A record came where it has no place.
    #[error("out of place in the file stream: {what}")]
    OutOfPlace {
        /// What came, and when.
        what: &'static str,
    },
    /// No such root is being received here.
    #[error("no root {root} is received here")]
    UnknownRoot {
        /// As the peer named it.
        root: RootId,
    },
    /// Another pass of this root is being received.
    #[error("root {root} is already being received")]
    RootBusy {
        /// Which one.
        root: RootId,
    },
    /// A pass builds upon one which is not the last that this root received whole.
    #[error("root {root} does not hold the pass which this one builds upon")]
    WrongBase {
        /// Which root.
        root: RootId,
        /// Upon which pass the peer builds.
        wants: PassId,
        /// Which one the root holds.
        has: Option<PassId>,
    },
    /// The end of a pass does not say what was received.
    #[error("a pass was announced as {announced:?} and received as {received:?}")]
    Miscounted {
        /// By the peer.
        announced: Box<Totals>,
        /// Here.
        received: Box<Totals>,
    },
}

impl FilesError {
    /// The stable code of this error, for faults.
    pub fn code(&self) -> &'static str {
        match self {
            Self::BadPath { .. } => "bad_path",
            Self::BadRoot { .. } => "bad_root",
            Self::OpenRoot { .. } => "root_unavailable",
            Self::Io { source, .. } if source.kind() == io::ErrorKind::StorageFull => "disk_full",
            Self::Io { .. } => "file_io",
            Self::XattrsTooLarge { .. } => "xattrs_too_large",
            Self::SinkClosed => "sink_closed",
            Self::BadFrame => "bad_frame",
            Self::BadVersion { .. } => "bad_version",
            Self::OutOfPlace { .. } => "out_of_place",
            Self::UnknownRoot { .. } => "unknown_root",
            Self::RootBusy { .. } => "root_busy",
            Self::WrongBase { .. } => "wrong_base",
            Self::Miscounted { .. } => "miscounted",
        }
    }

    /// Makes an error from the system's, for use in `map_err`.
    pub(crate) fn io<E: Into<io::Error>>(action: &'static str, path: &RelPath) -> impl Fn(E) -> Self {
        let path = path.clone();
        move |source| Self::Io { action, path: path.clone(), source: source.into() }
    }
}
