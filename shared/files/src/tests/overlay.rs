//! Upper directories of real overlay mounts: what is merged on both sides must be the same.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use super::*;

/// An overlay over `lower`, unmounted when dropped.
struct Overlay {
    merged: PathBuf,
}

impl Overlay {
    fn mount(root: &Path, upper: &str, options: &str) -> Self {
        let (work, merged) = (root.join(format!("{upper}-work")), root.join(format!("{upper}-merged")));
        for dir in [&work, &merged] {
            fs::create_dir_all(dir).unwrap();
        }
        let data = format!(
            "lowerdir={},upperdir={},workdir={}{options}",
            root.join("lower").display(),
            root.join(upper).display(),
            work.display(),
        );
        let data = std::ffi::CString::new(data).unwrap();
        mount("overlay", &merged, "overlay", MountFlags::empty(), data.as_c_str()).unwrap();
        Self { merged }
    }

    fn at(&self, path: &str) -> PathBuf {
        self.merged.join(path)
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        let _ = unmount(&self.merged, UnmountFlags::DETACH);
    }
}

fn fill_lower(lower: &Path) {
    for dir in ["keep", "empty-out", "replace", "rename-me/inside", "deep/er"] {
        fs::create_dir_all(lower.join(dir)).unwrap();
    }
    for file in ["a", "b", "keep/a", "keep/b", "empty-out/a", "replace/a", "rename-me/inside/a", "deep/er/a"]
    {
        write(&lower.join(file), format!("lower {file}"));
    }
    write(&lower.join("large"), noise(2 << 20, 1));
    fs::hard_link(lower.join("a"), lower.join("a-too")).unwrap();
    symlink("a", lower.join("link")).unwrap();
}

fn change(overlay: &Overlay) {
    write(&overlay.at("new"), "new");
    write(&overlay.at("a"), "changed");
    fs::remove_file(overlay.at("b")).unwrap();
    fs::remove_file(overlay.at("keep/a")).unwrap();
    fs::remove_file(overlay.at("empty-out/a")).unwrap();
    fs::remove_dir_all(overlay.at("replace")).unwrap();
    fs::create_dir(overlay.at("replace")).unwrap();
    write(&overlay.at("replace/other"), "the directory is opaque now");
    fs::remove_file(overlay.at("link")).unwrap();
    fs::create_dir(overlay.at("link")).unwrap();
    fs::set_permissions(overlay.at("large"), fs::Permissions::from_mode(0o600)).unwrap();
    fs::hard_link(overlay.at("new"), overlay.at("deep/new-too")).unwrap();
    // Without redirects, renaming a lower directory is refused, as Docker has it, and programs copy it.
    let _ = fs::rename(overlay.at("rename-me"), overlay.at("renamed"));
    xattr::set(overlay.at("a"), "user.note", b"note").unwrap();
}

fn whiteouts(dir: &Path) -> usize {
    let entries =
        walkdir::WalkDir::new(dir).into_iter().map(|e| fs::symlink_metadata(e.unwrap().path()).unwrap());
    entries.filter(|m| m.rdev() == 0 && m.mode() & 0o170_000 == 0o020_000).count()
}

/// Copies an upper directory live, once more after further changes, and compares what both hosts would see.
fn round_trip(options: &str) -> Pair {
    let mut pair = Pair::new();
    let root = pair.dir.path().to_owned();
    fs::create_dir(root.join("lower")).unwrap();
    fill_lower(&root.join("lower"));
    let near = Overlay::mount(&root, "source", options);
    change(&near);
    pair.pass();
    write(&near.at("a"), "changed again");
    fs::remove_file(near.at("deep/er/a")).unwrap();
    fs::remove_file(near.at("new")).unwrap();
    write(&near.at("b"), "the whiteout goes");
    pair.pass();
    pair.assert_same();
    assert!(whiteouts(&pair.to("")) >= 3);

    let far = Overlay::mount(&root, "target", options);
    compare::assert_same_but_dir_times(&near.merged, &far.merged);
    assert!(!far.at("keep/a").exists() && !far.at("replace/a").exists());
    // The kernel has no complaint about attributes that did not come along: the copy can be written to.
    write(&far.at("keep/b"), "written on the target");
    assert_eq!(fs::read_dir(far.at("replace")).unwrap().count(), 1);
    pair
}

#[test]
fn whiteouts_and_opaque_directories_come_over() {
    let pair = round_trip(",redirect_dir=off,metacopy=off");
    assert_eq!(xattr::get(pair.to("replace"), "trusted.overlay.opaque").unwrap().unwrap(), b"y");
}

#[test]
fn renamed_directories_and_bare_metadata_come_over() {
    let pair = round_trip(",redirect_dir=on,metacopy=on");
    assert!(xattr::get(pair.to("renamed"), "trusted.overlay.redirect").unwrap().is_some());
    assert!(xattr::get(pair.to("large"), "trusted.overlay.metacopy").unwrap().is_some());
}
