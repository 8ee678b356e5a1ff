//! The records of a pass, and the frames that carry them.
//!
//! A frame is a row of records in postcard's encoding, some 64 KiB of it. A pass is
//!
//! ```text
//!  Begin  (Remove | MakeDir | Special | Link | File (Data | Hole)* FileEnd | DirMeta)*  End
//! ```
//! and its `End` closes a frame. The bytes are guarded by whatever carries the frames; here the number of bytes of
//! every file and the counts of the whole pass are checked.

use std::fmt;

use bytes::Bytes;
use serde::de::Visitor;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::entry::{Kind, Meta, Time};
use crate::error::FilesError;
use crate::path::RelPath;

/// The version of the records that this build writes and reads.
pub const VERSION: u16 = 2;

/// The most content in one [`Record::Data`], in bytes: 256 KiB.
pub const MAX_DATA_BYTES: usize = 256 << 10;

/// A frame is closed once it is this long; it may be longer by one record. The target works on one while the source
/// makes the next: this is a few dozen of CRIU's images.
const FRAME_BYTES: usize = 64 << 10;

/// Which tree a pass is about, such as `layer`, `volume:NAME`, `images` or `log`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct RootId(String);

impl RootId {
    /// Takes a name of 1 to 300 printable ASCII characters.
    ///
    /// # Errors
    /// [`FilesError::BadRoot`] for any other.
    pub fn new(name: impl Into<String>) -> Result<Self, FilesError> {
        let name = name.into();
        match (1..=300).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_graphic()) {
            true => Ok(Self(name)),
            false => Err(FilesError::BadRoot { name }),
        }
    }
}

impl fmt::Display for RootId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for RootId {
    type Error = FilesError;

    fn try_from(name: String) -> Result<Self, FilesError> {
        Self::new(name)
    }
}

impl From<RootId> for String {
    fn from(root: RootId) -> Self {
        root.0
    }
}

/// Which pass: the time of its scan, in nanoseconds since 1970. A later pass names the one that it builds upon.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PassId(i128);

impl From<Time> for PassId {
    fn from(started: Time) -> Self {
        Self(started.total_nanos())
    }
}

/// What a pass did, counted by the sender and again by the receiver.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    /// Entries removed.
    pub removed: u64,
    /// Directories made.
    pub directories: u64,
    /// Files put, with whole content.
    pub files: u64,
    /// Files into which what differed was written.
    pub patched: u64,
    /// Symbolic links, devices, pipes and sockets put.
    pub specials: u64,
    /// Further names given.
    pub links: u64,
    /// Directories whose metadata was set.
    pub metas: u64,
    /// Content, in bytes.
    pub data_bytes: u64,
}

impl Totals {
    pub(crate) fn count(&mut self, record: &Record<'_>) {
        let counter = match record {
            Record::Remove(_) => &mut self.removed,
            Record::MakeDir(_) => &mut self.directories,
            Record::Special { .. } => &mut self.specials,
            Record::Link { .. } => &mut self.links,
            Record::File { patch: false, .. } => &mut self.files,
            Record::File { patch: true, .. } => &mut self.patched,
            Record::DirMeta { .. } => &mut self.metas,
            Record::Data { bytes, .. } => {
                self.data_bytes += bytes.0.len() as u64;
                return;
            }
            Record::Begin(_) | Record::Hole { .. } | Record::FileEnd { .. } | Record::End(_) => return,
        };
        *counter += 1;
    }
}

/// What the receiver answers once a pass is in its place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PassReport {
    /// Which tree.
    pub root: RootId,
    /// Which pass.
    pub pass: PassId,
    /// What was done.
    pub totals: Totals,
}

impl PassReport {
    /// The report as a frame's payload.
    pub fn encode(&self) -> Bytes {
        // It holds nothing that postcard cannot write; an empty payload would not decode.
        postcard::to_stdvec(self).unwrap_or_default().into()
    }

    /// Reads a report back.
    ///
    /// # Errors
    /// [`FilesError::BadFrame`].
    pub fn decode(payload: &[u8]) -> Result<Self, FilesError> {
        postcard::from_bytes(payload).map_err(|_| FilesError::BadFrame)
    }
}

/// The beginning of a pass.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Begin {
    /// [`VERSION`] of the sender.
    pub version: u16,
    /// Which tree.
    pub root: RootId,
    /// Which pass.
    pub pass: PassId,
    /// Upon which pass it builds; upon none, the root is emptied first.
    pub base: Option<PassId>,
    /// If set, the pass is about entries of the root whose names begin so, and no others.
    pub only: Option<Vec<u8>>,
}

/// One record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Record<'a> {
    /// Opens a pass.
    Begin(Begin),
    /// See [`Step::Remove`](crate::delta::Step::Remove).
    Remove(RelPath),
    /// See [`Step::MakeDir`](crate::delta::Step::MakeDir).
    MakeDir(RelPath),
    /// A symbolic link, device, pipe or socket.
    Special {
        /// Where.
        path: RelPath,
        /// What.
        kind: Kind,
        /// Its metadata.
        meta: Meta,
    },
    /// A further name.
    Link {
        /// The new name.
        path: RelPath,
        /// A name that is there.
        to: RelPath,
    },
    /// Opens a file for content.
    File {
        /// Where.
        path: RelPath,
        /// Its bytes when done.
        size: u64,
        /// Whether content is written into the file that is there, rather than into a new one.
        patch: bool,
    },
    /// Content of the open file.
    Data {
        /// Where it begins.
        offset: u64,
        /// At most [`MAX_DATA_BYTES`].
        #[serde(borrow)]
        bytes: Blob<'a>,
    },
    /// A part of the open file in which nothing is stored.
    Hole {
        /// Where it begins.
        offset: u64,
        /// Its bytes.
        length: u64,
    },
    /// Closes the open file.
    FileEnd {
        /// Its metadata.
        meta: Meta,
        /// The sum of its `Data`, in bytes.
        data_bytes: u64,
    },
    /// Metadata of a directory.
    DirMeta {
        /// Which.
        path: RelPath,
        /// Its metadata.
        meta: Meta,
    },
    /// Closes the pass.
    End(Totals),
}

/// Bytes that are written at once rather than one by one, and read without a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blob<'a>(pub &'a [u8]);

impl Serialize for Blob<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(self.0)
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Blob<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Borrowed;
        impl<'de> Visitor<'de> for Borrowed {
            type Value = Blob<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("bytes of a frame")
            }

            fn visit_borrowed_bytes<E>(self, bytes: &'de [u8]) -> Result<Blob<'de>, E> {
                Ok(Blob(bytes))
            }
        }
        deserializer.deserialize_bytes(Borrowed)
    }
}

/// Gathers records into frames.
#[derive(Debug, Default)]
pub struct FrameWriter {
    frame: Vec<u8>,
}

impl FrameWriter {
    /// Adds a record; gives a frame when one is full.
    ///
    /// # Errors
    /// [`FilesError::BadFrame`] if the record cannot be encoded, which no record of this module is.
    pub fn push(&mut self, record: &Record<'_>) -> Result<Option<Bytes>, FilesError> {
        let frame = std::mem::take(&mut self.frame);
        self.frame = postcard::to_extend(record, frame).map_err(|_| FilesError::BadFrame)?;
        Ok((self.frame.len() >= FRAME_BYTES).then(|| self.take()))
    }

    /// What has been gathered and not given yet; empty when there is nothing.
    pub fn take(&mut self) -> Bytes {
        std::mem::take(&mut self.frame).into()
    }
}

/// Takes the first record off a frame.
///
/// # Errors
/// [`FilesError::BadFrame`]. Never reads beyond the frame, never holds more than a small multiple of it.
pub fn next_record<'a>(frame: &mut &'a [u8]) -> Result<Record<'a>, FilesError> {
    let (record, rest) = postcard::take_from_bytes(frame).map_err(|_| FilesError::BadFrame)?;
    *frame = rest;
    match record {
        Record::Data { bytes: Blob(bytes), .. } if bytes.len() > MAX_DATA_BYTES => Err(FilesError::BadFrame),
        record => Ok(record),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn path() -> impl Strategy<Value = RelPath> {
        "[a-c]{1,3}(/[a-c]{1,3}){0,3}".prop_map(|text| RelPath::new(text).unwrap())
    }

    fn meta() -> impl Strategy<Value = Meta> {
        let time = (any::<i64>(), 0..1_000_000_000_u32);
        let xattrs = proptest::collection::vec((any::<Vec<u8>>(), any::<Vec<u8>>()), 0..3);
        (0..0o10000_u32, any::<(u32, u32)>(), time, xattrs).prop_map(
            |(mode, (uid, gid), (seconds, nanos), xattrs)| Meta {
                mode,
                uid,
                gid,
                mtime: Time { seconds, nanos },
                xattrs: xattrs.into_iter().map(|(name, value)| crate::entry::Xattr { name, value }).collect(),
            },
        )
    }

    fn record() -> impl Strategy<Value = Record<'static>> {
        prop_oneof![
            path().prop_map(Record::Remove),
            path().prop_map(Record::MakeDir),
            (path(), path()).prop_map(|(path, to)| Record::Link { path, to }),
            (path(), any::<u64>(), any::<bool>()).prop_map(|(path, size, patch)| Record::File {
                path,
                size,
                patch
            }),
            (path(), meta()).prop_map(|(path, meta)| Record::DirMeta { path, meta }),
            (path(), meta(), any::<Vec<u8>>()).prop_map(|(path, meta, target)| Record::Special {
                path,
                kind: Kind::Symlink { target },
                meta
            }),
            (any::<u64>(), any::<u64>()).prop_map(|(offset, length)| Record::Hole { offset, length }),
            any::<u64>().prop_map(|offset| Record::Data { offset, bytes: Blob(b"content") }),
            (meta(), any::<u64>()).prop_map(|(meta, data_bytes)| Record::FileEnd { meta, data_bytes }),
            any::<u64>().prop_map(|removed| Record::End(Totals { removed, ..Totals::default() })),
        ]
    }

    proptest! {
        #[test]
        fn records_come_back_in_order(records in proptest::collection::vec(record(), 0..20)) {
            let mut writer = FrameWriter::default();
            for record in &records {
                prop_assert!(writer.push(record).unwrap().is_none());
            }
            let frame = writer.take();
            let mut rest = frame.as_ref();
            let mut back = Vec::new();
            while !rest.is_empty() {
                back.push(next_record(&mut rest).unwrap());
            }
            prop_assert_eq!(back, records);
        }

        #[test]
        fn garbage_is_an_error_or_a_record_and_never_worse(bytes: Vec<u8>) {
            let mut rest = bytes.as_slice();
            while !rest.is_empty() && next_record(&mut rest).is_ok() {}
        }
    }

    #[test]
    fn frames_close_when_they_are_full() {
        let mut writer = FrameWriter::default();
        let data = vec![7; MAX_DATA_BYTES];
        let frame = writer.push(&Record::Data { offset: 0, bytes: Blob(&data) }).unwrap().unwrap();
        assert!(frame.len() > MAX_DATA_BYTES && frame.len() < MAX_DATA_BYTES + 32);
        assert!(writer.take().is_empty());
    }

    #[test]
    fn names_of_roots_are_checked() {
        assert!(RootId::new("volume:my_data-1").is_ok());
        for bad in ["", "a b", "ä", &"x".repeat(301)] {
            assert!(RootId::new(bad).is_err());
        }
    }
}
