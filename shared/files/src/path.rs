//! Paths inside a root, as bytes.

use std::fmt;

use serde::de::{Error as _, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::FilesError;

/// The most bytes in a path: what one system call takes.
const MAX_PATH_BYTES: usize = 4095;

/// The most bytes in one name.
const MAX_NAME_BYTES: usize = 255;

/// A path below a root: names joined by `/`, bytes and not necessarily text; empty for the root itself.
///
/// No name is empty, `.` or `..`, or holds a NUL: joined to a directory, it stays below it unless a symbolic link
/// leads out. Its order puts every directory before what is in it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct RelPath(Box<[u8]>);

impl RelPath {
    /// The root itself.
    pub fn root() -> Self {
        Self::default()
    }

    /// Checks a path which came from elsewhere.
    ///
    /// # Errors
    /// [`FilesError::BadPath`] when it is not as described above, or over 4095 bytes, or a name over 255.
    pub fn new(bytes: impl Into<Vec<u8>>) -> Result<Self, FilesError> {
        let bytes = bytes.into();
        let good = |name: &[u8]| {
            !matches!(name, b"" | b"." | b"..") && name.len() <= MAX_NAME_BYTES && !name.contains(&0)
        };
        if bytes.is_empty() || (bytes.len() <= MAX_PATH_BYTES && bytes.split(|b| *b == b'/').all(good)) {
            return Ok(Self(bytes.into()));
        }
        Err(FilesError::BadPath { path: String::from_utf8_lossy(&bytes).into_owned() })
    }

    /// The entry `name` of this directory.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn join(&self, name: &[u8]) -> Result<Self, FilesError> {
        if self.is_root() {
            return Self::new(name);
        }
        Self::new([&self.0, b"/".as_slice(), name].concat())
    }

    /// Whether it is the root itself.
    pub fn is_root(&self) -> bool {
        self.0.is_empty()
    }

    /// The directory it is in, and its name there; `None` for the root.
    pub fn split(&self) -> Option<(Self, &[u8])> {
        if self.is_root() {
            return None;
        }
        match self.0.iter().rposition(|b| *b == b'/') {
            Some(slash) => {
                let (parent, name) = self.0.split_at_checked(slash)?;
                Some((Self(parent.into()), name.get(1..)?))
            }
            None => Some((Self::root(), &self.0)),
        }
    }

    /// The first name on the way down; empty for the root.
    pub fn first_name(&self) -> &[u8] {
        self.0.split(|b| *b == b'/').next().unwrap_or_default()
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Display for RelPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.is_root() {
            true => f.write_str("."),
            false => f.write_str(&String::from_utf8_lossy(&self.0)),
        }
    }
}

impl fmt::Debug for RelPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for RelPath {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&self.0)
    }
}

impl<'de> Deserialize<'de> for RelPath {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_bytes(PathBytes)
    }
}

struct PathBytes;

impl<'de> Visitor<'de> for PathBytes {
    type Value = RelPath;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the bytes of a relative path")
    }

    fn visit_bytes<E: serde::de::Error>(self, bytes: &[u8]) -> Result<RelPath, E> {
        RelPath::new(bytes).map_err(E::custom)
    }

    /// JSON has no bytes, but numbers in a row.
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<RelPath, A::Error> {
        let mut bytes = Vec::new();
        while let Some(byte) = seq.next_element()? {
            if bytes.len() == MAX_PATH_BYTES {
                return Err(A::Error::custom("path too long"));
            }
            bytes.push(byte);
        }
        RelPath::new(bytes).map_err(A::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn only_paths_that_stay_below_are_paths() {
        for good in ["", "a", "a/b", "...", "a b", ".hidden", "a/..b/c"] {
            assert!(RelPath::new(good).is_ok(), "{good}");
        }
        for bad in ["/", "/a", "a/", "a//b", ".", "..", "a/..", "../a", "a/./b", "a\0b"] {
            assert!(RelPath::new(bad).is_err(), "{bad}");
        }
        assert!(RelPath::new(vec![b'a'; 256]).is_err());
        assert!(RelPath::new(b"a/".repeat(2048)).is_err());
        assert!(RelPath::new(vec![0xff, 0xfe]).is_ok());
    }

    #[test]
    fn splitting_undoes_joining() {
        let path = RelPath::root().join(b"a").unwrap().join(b"b").unwrap();
        assert_eq!(path.as_bytes(), b"a/b");
        let (parent, name) = path.split().unwrap();
        assert_eq!((parent.as_bytes(), name), (b"a".as_slice(), b"b".as_slice()));
        assert_eq!(parent.split().unwrap(), (RelPath::root(), b"a".as_slice()));
        assert!(RelPath::root().split().is_none());
        assert!(path.join(b"..").is_err());
        assert_eq!(path.first_name(), b"a");
    }

    proptest! {
        #[test]
        fn the_wire_gives_back_the_path_or_refuses_it(bytes in proptest::collection::vec(any::<u8>(), 0..40)) {
            let wire = postcard::to_stdvec(&bytes).unwrap();
            match (RelPath::new(bytes.clone()), postcard::from_bytes::<RelPath>(&wire)) {
                (Ok(path), Ok(decoded)) => {
                    prop_assert_eq!(&path, &decoded);
                    prop_assert_eq!(postcard::to_stdvec(&path).unwrap(), wire);
                }
                (Err(_), Err(_)) => {}
                (new, decoded) => prop_assert!(false, "{:?} {:?}", new, decoded),
            }
        }
    }
}
