//! CRIU's image files: a magic number or two, then records of a 32-bit length and a protobuf message
//! (`criu/image.c`, `criu/protobuf.c`; magic numbers from `criu/include/magic.h`). Little-endian, as all of CRIU's
//! 64-bit platforms are.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

use prost::Message;

/// The size of a page in CRIU's images on x86-64, in bytes.
pub const PAGE_SIZE: u64 = 4096;
/// No record that CRIU writes comes near this; the length of a damaged file is not believed. In bytes.
const MAX_RECORD: u32 = 64 << 20;
const COMMON_MAGIC: u32 = 0x5456_4319;

/// The kinds of image that we read or write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImageKind {
    /// `inventory.img`.
    Inventory,
    /// `pstree.img`.
    Pstree,
    /// `mm-<pid>.img`.
    Mm,
    /// `pagemap-<pid>.img`.
    Pagemap,
    /// `files.img`.
    Files,
    /// `memfd.img`.
    MemfdInode,
    /// `ids-<pid>.img`.
    Ids,
    /// `fdinfo-<table>.img`.
    Fdinfo,
    /// Not CRIU's but ours: [`crate::shared`].
    Shared,
}

impl ImageKind {
    fn magic(self) -> u32 {
        match self {
            Self::Inventory => 0x5831_3116,
            Self::Pstree => 0x5027_3030,
            Self::Mm => 0x5749_2820,
            Self::Pagemap => 0x5608_4025,
            Self::Files => 0x5630_3138,
            Self::MemfdInode => 0x4845_3499,
            Self::Ids => 0x5443_2030,
            Self::Fdinfo => 0x5621_3732,
            Self::Shared => u32::from_le_bytes(*b"HSM2"),
        }
    }

    /// The inventory predates the common magic number and is written without it.
    fn header(self) -> Vec<u8> {
        let common = (self != Self::Inventory).then_some(COMMON_MAGIC);
        common.into_iter().chain([self.magic()]).flat_map(u32::to_le_bytes).collect()
    }

    #[cfg(test)]
    pub(crate) fn header_for_test(self) -> Vec<u8> {
        self.header()
    }
}

/// An image file that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The file system said no; a missing image shows as `NotFound`.
    #[error("cannot access {path}")]
    Io {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Not an image of that kind.
    #[error("{path} is not a {kind:?} image of criu")]
    Magic {
        /// Which file.
        path: PathBuf,
        /// What it should have been.
        kind: ImageKind,
    },
    /// A record is cut short, too long, or not a message of its type.
    #[error("{path} is damaged: {what}")]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// In what way.
        what: String,
    },
    /// Written by a CRIU that does something which we do not know.
    #[error("{path} has something this version does not know: {what}")]
    Unknown {
        /// Which file.
        path: PathBuf,
        /// What it has.
        what: String,
    },
}

pub(crate) fn io_at(path: &Path) -> impl FnOnce(io::Error) -> ImageError {
    let path = path.to_owned();
    move |source| ImageError::Io { path, source }
}

/// Reads the records of one image, in order.
pub struct ImageReader<R> {
    path: PathBuf,
    inner: R,
}

impl ImageReader<BufReader<File>> {
    /// Opens an image and checks what it is.
    pub fn open(path: &Path, kind: ImageKind) -> Result<Self, ImageError> {
        Self::new(path, kind, BufReader::new(File::open(path).map_err(io_at(path))?))
    }
}

impl<R: Read> ImageReader<R> {
    /// Reads an image from anywhere; `path` is for messages.
    pub fn new(path: &Path, kind: ImageKind, mut inner: R) -> Result<Self, ImageError> {
        let expected = kind.header();
        let mut header = vec![0; expected.len()];
        match inner.read_exact(&mut header) {
            Err(error) if error.kind() != ErrorKind::UnexpectedEof => Err(io_at(path)(error)),
            Ok(()) if header == expected => Ok(Self { path: path.to_owned(), inner }),
            _ => Err(ImageError::Magic { path: path.to_owned(), kind }),
        }
    }

    /// The next record, or `None` at the end of the file.
    pub fn read<M: Message + Default>(&mut self) -> Result<Option<M>, ImageError> {
        let Some(bytes) = self.next_bytes()? else { return Ok(None) };
        M::decode(&bytes[..]).map(Some).map_err(|error| self.damaged(error))
    }

    /// The next record, refused when it has a field that `M` does not: dropping such a field when the record is
    /// written again would change what the image says.
    pub fn read_known<M: Message + Default>(&mut self) -> Result<Option<M>, ImageError> {
        let Some(bytes) = self.next_bytes()? else { return Ok(None) };
        let message = M::decode(&bytes[..]).map_err(|error| self.damaged(error))?;
        if message.encode_to_vec() != bytes {
            return Err(self.unknown("an unknown field in a record"));
        }
        Ok(Some(message))
    }

    pub(crate) fn damaged(&self, what: impl ToString) -> ImageError {
        ImageError::Damaged { path: self.path.clone(), what: what.to_string() }
    }

    pub(crate) fn unknown(&self, what: impl ToString) -> ImageError {
        ImageError::Unknown { path: self.path.clone(), what: what.to_string() }
    }

    /// The next record as it is, or `None` at the end of the file.
    pub(crate) fn next_bytes(&mut self) -> Result<Option<Vec<u8>>, ImageError> {
        let mut head = Vec::with_capacity(4);
        self.inner.by_ref().take(4).read_to_end(&mut head).map_err(io_at(&self.path))?;
        let length = match <[u8; 4]>::try_from(head.as_slice()) {
            Ok(head) => u32::from_le_bytes(head),
            Err(_) if head.is_empty() => return Ok(None),
            Err(_) => return Err(self.damaged("it ends within a record")),
        };
        if length > MAX_RECORD {
            return Err(self.damaged(format!("a record of {length} bytes")));
        }
        let mut bytes = Vec::new();
        self.inner.by_ref().take(length.into()).read_to_end(&mut bytes).map_err(io_at(&self.path))?;
        if bytes.len() as u64 == u64::from(length) {
            Ok(Some(bytes))
        } else {
            Err(self.damaged("it ends within a record"))
        }
    }
}

/// Writes an image record by record.
pub struct ImageWriter<W: Write> {
    path: PathBuf,
    inner: W,
}

impl ImageWriter<BufWriter<File>> {
    /// Creates an image, which must not exist: an image is never written through a hard link.
    pub fn create(path: &Path, kind: ImageKind) -> Result<Self, ImageError> {
        Self::new(path, kind, BufWriter::new(File::create_new(path).map_err(io_at(path))?))
    }
}

impl<W: Write> ImageWriter<W> {
    /// Writes an image to anywhere; `path` is for messages.
    pub fn new(path: &Path, kind: ImageKind, mut inner: W) -> Result<Self, ImageError> {
        inner.write_all(&kind.header()).map_err(io_at(path))?;
        Ok(Self { path: path.to_owned(), inner })
    }

    /// Goes on with an image that has its header and whole records.
    pub(crate) fn further(path: &Path, inner: W) -> Self {
        Self { path: path.to_owned(), inner }
    }

    /// Appends a record.
    pub fn append(&mut self, message: &impl Message) -> Result<(), ImageError> {
        self.append_bytes(&message.encode_to_vec())
    }

    /// Appends a record that is encoded already.
    pub(crate) fn append_bytes(&mut self, bytes: &[u8]) -> Result<(), ImageError> {
        let length = u32::try_from(bytes.len()).ok().filter(|length| *length <= MAX_RECORD);
        let Some(length) = length else {
            return Err(ImageError::Damaged {
                path: self.path.clone(),
                what: "a record too long to write".into(),
            });
        };
        self.inner
            .write_all(&length.to_le_bytes())
            .and_then(|()| self.inner.write_all(bytes))
            .map_err(io_at(&self.path))
    }

    /// Hands everything to the system.
    pub fn finish(mut self) -> Result<W, ImageError> {
        self.inner.flush().map_err(io_at(&self.path))?;
        Ok(self.inner)
    }
}
