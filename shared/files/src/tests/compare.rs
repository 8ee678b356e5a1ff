//! Whether two trees are the same, found out by other means than those under test.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use walkdir::WalkDir;

/// Everything that should be the same, as text.
fn picture(root: &Path, with_dir_times: bool) -> BTreeMap<PathBuf, String> {
    let mut first_name = BTreeMap::new();
    let mut picture = BTreeMap::new();
    for entry in WalkDir::new(root).sort_by_file_name() {
        let entry = entry.unwrap();
        let path = entry.path().strip_prefix(root).unwrap().to_owned();
        let meta = fs::symlink_metadata(entry.path()).unwrap();
        let kind = meta.file_type();
        let whiteout = kind.is_char_device() && meta.rdev() == 0;
        let content = if kind.is_file() {
            blake3::hash(&fs::read(entry.path()).unwrap()).to_hex().to_string()
        } else if kind.is_symlink() {
            format!("{:?}", fs::read_link(entry.path()).unwrap())
        } else {
            String::new()
        };
        let shared_with = match meta.nlink() > 1 && !kind.is_dir() && !whiteout {
            true => first_name.entry(meta.ino()).or_insert_with(|| path.clone()).clone(),
            false => PathBuf::new(),
        };
        let size = if kind.is_dir() { 0 } else { meta.size() };
        let time = match kind.is_dir() && !with_dir_times {
            true => (0, 0),
            false => (meta.mtime(), meta.mtime_nsec()),
        };
        let text = format!(
            "mode {:o} owner {}:{} size {size} rdev {:x} mtime {time:?} content {content} shared {shared_with:?} xattrs {:?}",
            meta.mode(),
            meta.uid(),
            meta.gid(),
            meta.rdev(),
            xattrs(entry.path()),
        );
        picture.insert(path, text);
    }
    picture
}

fn xattrs(path: &Path) -> BTreeMap<OsString, Vec<u8>> {
    let local = ["trusted.overlay.origin", "trusted.overlay.impure", "trusted.overlay.uuid"];
    xattr::list(path)
        .unwrap()
        .filter(|name| !local.iter().any(|l| name == l))
        .map(|name| (name.clone(), xattr::get(path, &name).unwrap().unwrap()))
        .collect()
}

pub(super) fn assert_same(source: &Path, target: &Path) {
    assert_pictures(picture(source, true), picture(target, true));
}

/// Merged overlays: the kernel gives a directory the times of its upper part, or of a lower one that it has not
/// copied up on the other host.
pub(super) fn assert_same_but_dir_times(source: &Path, target: &Path) {
    assert_pictures(picture(source, false), picture(target, false));
}

fn assert_pictures(source: BTreeMap<PathBuf, String>, target: BTreeMap<PathBuf, String>) {
    for (path, text) in &source {
        assert_eq!(target.get(path), Some(text), "{}", path.display());
    }
    for path in target.keys() {
        assert!(source.contains_key(path), "{} should not be there", path.display());
    }
}
