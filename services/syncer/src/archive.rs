//! An image archive, taken apart into members and put together again.
//!
//! `docker save` makes a tar of layers, each a file, and a few small files that tell how they belong together.
//! Each file goes into the bucket under its digest, so a layer that another image has is there already; the list
//! of members is the image's manifest.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use haulage_transport::bucket::{Digest, Digester};
use serde::{Deserialize, Serialize};

/// What an image is made of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ImageManifest {
    /// The engine's content id.
    pub(crate) image: String,
    /// The names that it had on the source.
    pub(crate) tags: Vec<String>,
    pub(crate) members: Vec<Member>,
}

/// One member of the archive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Member {
    pub(crate) path: String,
    pub(crate) what: What,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub(crate) enum What {
    Directory,
    File { digest: Digest, size: u64 },
    Link { to: String },
}

/// Takes the archive at `tar` apart: files go into `dir` under their digests.
pub(crate) fn take_apart(tar: &Path, dir: &Path) -> io::Result<Vec<Member>> {
    let mut archive = tar::Archive::new(BufReader::new(File::open(tar)?));
    let mut members = Vec::new();
    for entry in archive.entries()? {
        let mut entry = entry?;
        let path = text(&entry.path_bytes())?;
        let what = match entry.header().entry_type() {
            kind if kind.is_dir() => What::Directory,
            kind if kind.is_symlink() => {
                What::Link { to: text(&entry.link_name_bytes().unwrap_or_default())? }
            }
            kind if kind.is_file() => file(&mut entry, dir)?,
            kind => return Err(io::Error::other(format!("a member of type {kind:?} in an image archive"))),
        };
        members.push(Member { path, what });
    }
    Ok(members)
}

fn text(bytes: &[u8]) -> io::Result<String> {
    String::from_utf8(bytes.to_vec()).map_err(io::Error::other)
}

fn file(content: &mut impl Read, dir: &Path) -> io::Result<What> {
    let unnamed = dir.join("member");
    let mut out = File::create(&unnamed)?;
    let (mut digester, mut size, mut buffer) = (Digester::default(), 0, vec![0; 1 << 20]);
    loop {
        let read = content.read(&mut buffer)?;
        let Some(piece) = buffer.get(..read).filter(|piece| !piece.is_empty()) else { break };
        digester.update(piece);
        out.write_all(piece)?;
        size += u64::try_from(read).unwrap_or(u64::MAX);
    }
    let digest = digester.finish();
    std::fs::rename(unnamed, member_path(dir, &digest))?;
    Ok(What::File { digest, size })
}

/// Where a file's content lies while the archive is in pieces.
pub(crate) fn member_path(dir: &Path, digest: &Digest) -> PathBuf {
    dir.join(digest.to_hex())
}

/// Puts the archive together at `tar` from the files in `dir`.
pub(crate) fn put_together(members: &[Member], dir: &Path, tar: &Path) -> io::Result<()> {
    let mut archive = tar::Builder::new(BufWriter::new(File::create(tar)?));
    for member in members {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        match &member.what {
            What::Directory => {
                header.set_entry_type(tar::EntryType::Directory);
                header.set_mode(0o755);
                header.set_size(0);
                archive.append_data(&mut header, &member.path, io::empty())?;
            }
            What::Link { to } => {
                header.set_entry_type(tar::EntryType::Symlink);
                header.set_size(0);
                archive.append_link(&mut header, &member.path, to)?;
            }
            What::File { digest, size } => {
                header.set_size(*size);
                let content = File::open(member_path(dir, digest))?;
                archive.append_data(&mut header, &member.path, content)?;
            }
        }
    }
    archive.into_inner()?.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_comes_back_with_all_its_members() {
        let dir = tempfile::tempdir().unwrap();
        let (first, second) = (dir.path().join("first.tar"), dir.path().join("second.tar"));
        let mut archive = tar::Builder::new(File::create(&first).unwrap());
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Directory);
        header.set_size(0);
        archive.append_data(&mut header, "layer/", io::empty()).unwrap();
        for (path, content) in [("layer/layer.tar", &b"content"[..]), ("twin", b"content"), ("empty", b"")] {
            let mut header = tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            archive.append_data(&mut header, path, content).unwrap();
        }
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Symlink);
        header.set_size(0);
        archive.append_link(&mut header, "link", "../layer/layer.tar").unwrap();
        archive.into_inner().unwrap();
        let pieces = dir.path().join("pieces");
        std::fs::create_dir(&pieces).unwrap();
        let members = take_apart(&first, &pieces).unwrap();
        assert_eq!(members.len(), 5);
        assert_eq!(std::fs::read_dir(&pieces).unwrap().count(), 2, "equal contents are kept once");
        put_together(&members, &pieces, &second).unwrap();
        let again = dir.path().join("again");
        std::fs::create_dir(&again).unwrap();
        assert_eq!(take_apart(&second, &again).unwrap(), members);
    }
}
