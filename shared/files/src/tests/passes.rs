//! Passes over trees with everything in them.

use std::fs::{self, File, FileTimes, OpenOptions, Permissions};
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown, lchown, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use rustix::fs::{CWD, FallocateFlags, FileType, Mode, fallocate, makedev, mknodat};

use super::*;

const MIB: usize = 1 << 20;

fn node(path: &Path, kind: FileType, device: u64) {
    mknodat(CWD, path, kind, Mode::from_raw_mode(0o640), device).unwrap();
}

fn mode(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

/// A POSIX access list in the kernel's form: owner, user 1000, group, mask, others.
fn access_list(user_perm: u16) -> Vec<u8> {
    let mut acl = 2_u32.to_le_bytes().to_vec();
    for (tag, perm, who) in
        [(1, 7, u32::MAX), (2, user_perm, 1000), (4, 5, u32::MAX), (0x10, 7, u32::MAX), (0x20, 4, u32::MAX)]
    {
        acl.extend_from_slice(&u16::to_le_bytes(tag));
        acl.extend_from_slice(&u16::to_le_bytes(perm));
        acl.extend_from_slice(&u32::to_le_bytes(who));
    }
    acl
}

/// cap_net_bind_service=ep, as the kernel stores it.
const CAPABILITY: [u8; 20] = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// One of everything.
fn fill(pair: &Pair) {
    let at = |path: &str| pair.from(path);
    write(&at("plain"), "plain");
    write(&at("empty"), "");
    write(&at("large"), noise(3 * MIB + 12_345, 1));
    for dir in ["dir", "dir/deep", "dir/deep/er", "sticky", "locked", "acl"] {
        fs::create_dir(at(dir)).unwrap();
    }
    write(&at("dir/deep/er/file"), "deep");
    // Sorts between a directory and what is in it.
    write(&at("dir.beside"), "beside");
    mode(&at("sticky"), 0o1777);
    write(&at("locked/file"), "locked");
    mode(&at("locked"), 0);
    write(&at("suid"), "suid");
    chown(at("suid"), Some(1234), Some(5678)).unwrap();
    mode(&at("suid"), 0o6755);
    write(&at("capable"), "capable");
    xattr::set(at("capable"), "security.capability", &CAPABILITY).unwrap();
    xattr::set(at("capable"), "user.note", &noise(200, 5)).unwrap();
    xattr::set(at("dir"), "trusted.overlay.opaque", b"y").unwrap();
    xattr::set(at("dir"), "trusted.overlay.origin", b"a file handle of this host").unwrap();
    xattr::set(at("acl"), "system.posix_acl_default", &access_list(6)).unwrap();
    write(&at("acl/inherits"), "inherits");
    write(&at("acl/does-not"), "does not");
    xattr::remove(at("acl/does-not"), "system.posix_acl_access").unwrap();
    mode(&at("acl/does-not"), 0o644);
    symlink("plain", at("link")).unwrap();
    symlink("/nowhere/at/all", at("dangling")).unwrap();
    lchown(at("dangling"), Some(77), Some(88)).unwrap();
    xattr::set(at("dangling"), "trusted.note", b"on a link").unwrap();
    write(&at("one-name"), "several names");
    fs::hard_link(at("one-name"), at("dir/another-name")).unwrap();
    fs::hard_link(at("one-name"), at("a-third-name")).unwrap();
    fs::hard_link(at("dangling"), at("dangling-too")).unwrap();
    node(&at("whiteout"), FileType::CharacterDevice, 0);
    node(&at("null"), FileType::CharacterDevice, makedev(1, 3));
    node(&at("disk"), FileType::BlockDevice, makedev(7, 200));
    node(&at("pipe"), FileType::Fifo, 0);
    drop(UnixListener::bind(at("socket")).unwrap());
    let strange = pair.from("").join(std::ffi::OsStr::from_bytes(b"not \xff text\n"));
    write(&strange, "strange name");
    let time = SystemTime::UNIX_EPOCH + Duration::new(1_000_000_000, 123_456_789);
    let file = File::open(at("plain")).unwrap();
    file.set_times(FileTimes::new().set_modified(time)).unwrap();
    sparse(&at("sparse"));
}

/// 100 MiB with a few stored places, one of them in the middle of a block.
fn sparse(path: &Path) {
    let file = File::create(path).unwrap();
    file.set_len(100 * MIB as u64 + 1).unwrap();
    file.write_all_at(b"near the beginning", 8192).unwrap();
    file.write_all_at(&noise(70_000, 2), 50 * MIB as u64 + 12_288).unwrap();
    file.write_all_at(b"same block", 50 * MIB as u64 + 12_288 + 126_976).unwrap();
    file.write_all_at(b"e", 100 * MIB as u64).unwrap();
}

fn stored(path: &Path) -> u64 {
    fs::metadata(path).unwrap().blocks() * 512
}

#[test]
fn a_first_pass_brings_everything() {
    let mut pair = Pair::new();
    fill(&pair);
    let pass = pair.pass();
    pair.assert_same();
    assert_eq!(pass.unsettled, 0);
    assert!(pass.totals.data_bytes < 5 * MIB as u64, "holes are not sent");
    assert!(stored(&pair.to("sparse")) <= stored(&pair.from("sparse")) + 8192);
    assert!(xattr::get(pair.to("dir"), "trusted.overlay.origin").unwrap().is_none());
    pair.targets.sync(&id()).unwrap();
}

#[test]
fn a_first_pass_replaces_what_was_there() {
    let mut pair = Pair::new();
    fill(&pair);
    for dir in ["plain", "old", "old/tree"] {
        fs::create_dir(pair.to(dir)).unwrap();
    }
    write(&pair.to("old/tree/file"), "old");
    write(&pair.to("plain/file"), "in the way");
    symlink("/etc", pair.to("dir")).unwrap();
    pair.pass();
    pair.assert_same();
    assert!(Path::new("/etc/passwd").exists());
}

#[test]
fn a_second_pass_brings_every_change() {
    let mut pair = Pair::new();
    fill(&pair);
    pair.pass();
    let at = |path: &str| pair.from(path);
    write(&at("plain"), "changed");
    fs::remove_file(at("empty")).unwrap();
    fs::remove_dir_all(at("dir/deep")).unwrap();
    write(&at("dir/deep"), "a file now");
    fs::remove_file(at("link")).unwrap();
    fs::create_dir(at("link")).unwrap();
    write(&at("link/inside"), "a directory now");
    fs::rename(at("sticky"), at("moved")).unwrap();
    fs::remove_file(at("a-third-name")).unwrap();
    fs::hard_link(at("dir/another-name"), at("moved/a-fourth-name")).unwrap();
    mode(&at("suid"), 0o755);
    xattr::remove(at("capable"), "user.note").unwrap();
    xattr::set(at("capable"), "user.other", b"other").unwrap();
    xattr::remove(at("dir"), "trusted.overlay.opaque").unwrap();
    xattr::remove(at("acl"), "system.posix_acl_default").unwrap();
    fs::remove_file(at("whiteout")).unwrap();
    write(&at("whiteout"), "back again");
    node(&at("gone-now"), FileType::CharacterDevice, 0);
    chown(at("locked"), Some(9), Some(9)).unwrap();
    pair.pass();
    pair.assert_same();
}

#[test]
fn a_pass_without_changes_carries_nothing() {
    let mut pair = Pair::new();
    fill(&pair);
    // Older than the racy span, so that times alone tell that nothing has changed.
    std::thread::sleep(crate::delta::RACY + Duration::from_millis(50));
    pair.pass();
    let pass = pair.pass();
    assert_eq!(pass.totals, Default::default());
    pair.assert_same();
}

#[test]
fn a_write_that_hides_its_time_is_found() {
    let mut pair = Pair::new();
    write(&pair.from("file"), "before");
    pair.pass();
    let modified = fs::metadata(pair.from("file")).unwrap().modified().unwrap();
    let file = OpenOptions::new().write(true).open(pair.from("file")).unwrap();
    file.write_all_at(b"behind", 0).unwrap();
    file.set_times(FileTimes::new().set_modified(modified)).unwrap();
    pair.pass();
    assert_eq!(fs::read(pair.to("file")).unwrap(), b"behind");
    pair.assert_same();
}

#[test]
fn of_a_large_file_only_what_differs_is_sent() {
    let mut pair = Pair::new();
    let path = pair.from("large");
    write(&path, noise(20 * MIB, 3));
    fs::hard_link(&path, pair.from("large-too")).unwrap();
    pair.pass();

    let mut file = OpenOptions::new().write(true).open(&path).unwrap();
    file.write_all_at(b"x", 5 * MIB as u64).unwrap();
    file.seek(SeekFrom::End(0)).unwrap();
    file.write_all(b"appended").unwrap();
    let pass = pair.pass();
    pair.assert_same();
    assert_eq!((pass.totals.patched, pass.totals.files), (1, 0));
    assert_eq!(pass.totals.data_bytes, 64 * 1024 + 8);

    file.set_len(10 * MIB as u64 + 5).unwrap();
    pair.pass();
    pair.assert_same();

    // Punched, grown by a hole, and shrunk and grown again: old content must not shine through.
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(&file, punch, MIB as u64 + 100, 3 * MIB as u64).unwrap();
    file.set_len(30 * MIB as u64).unwrap();
    let pass = pair.pass();
    pair.assert_same();
    assert!(pass.totals.data_bytes <= 8 * 64 * 1024, "{:?}", pass.totals);
    assert!(stored(&pair.to("large")) <= stored(&path) + 8 * 65536);

    file.set_len(10).unwrap();
    pair.pass();
    pair.assert_same();
    file.set_len(10 * MIB as u64 + 5).unwrap();
    pair.pass();
    pair.assert_same();
    file.write_all_at(&noise(20 * MIB, 3)[..10 * MIB], 0).unwrap();
    pair.pass();
    pair.assert_same();
}

#[test]
fn files_that_vanish_or_shrink_while_being_read_do_not_break_the_pass() {
    let mut pair = Pair::new();
    // Read in this order; each is longer than a frame.
    for name in ["a", "b", "c", "d", "e"] {
        write(&pair.from(name), noise(4 * MIB, 4));
    }
    fs::hard_link(pair.from("c"), pair.from("linked")).unwrap();
    let source = pair.from("");
    let pass = pair.pass_with(&BTreeSet::new(), |frame| {
        if frame == 0 {
            fs::remove_file(source.join("b")).unwrap();
            fs::remove_file(source.join("c")).unwrap();
            fs::create_dir(source.join("c")).unwrap();
            File::options().write(true).open(source.join("d")).unwrap().set_len(2 * MIB as u64).unwrap();
            fs::remove_file(source.join("e")).unwrap();
            symlink("/etc/passwd", source.join("e")).unwrap();
        }
    });
    assert_eq!(pass.unsettled, 4);
    assert!(!pair.to("b").exists() && !pair.to("c").exists() && !pair.to("e").exists());
    assert_eq!(fs::metadata(pair.to("d")).unwrap().len(), 4 * MIB as u64);
    let pass = pair.pass();
    assert_eq!(pass.unsettled, 0);
    pair.assert_same();
}

#[test]
fn a_forced_file_is_looked_into_whatever_its_times_say() {
    let mut pair = Pair::new();
    write(&pair.from("mapped"), noise(MIB, 6));
    write(&pair.from("other"), noise(MIB, 7));
    std::thread::sleep(crate::delta::RACY + Duration::from_millis(50));
    pair.pass();
    // What the target holds differs, and the source's times do not tell: as after a write through a mapping.
    File::options().write(true).open(pair.to("mapped")).unwrap().write_all_at(b"stale", 70_000).unwrap();
    let forced = BTreeSet::from([RelPath::new("mapped").unwrap()]);
    let pass = pair.pass_with(&forced, |_| {});
    assert_eq!(pass.totals.patched, 1);
    assert_eq!(pass.totals.data_bytes, 0, "its content is compared with what was sent");
}

#[test]
fn churn_settles_when_the_writer_stops() {
    let mut pair = Pair::new();
    fill(&pair);
    let source = pair.from("");
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| churn(&source, &stop));
        let _stopped = Stop(&stop);
        for _ in 0..15 {
            pair.pass();
        }
    });
    let pass = pair.pass();
    assert_eq!(pass.unsettled, 0);
    pair.assert_same();
}

/// Stops the writer, also when a pass fails.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Changes a tree in every way, as fast as it can.
fn churn(root: &Path, stop: &AtomicBool) {
    let mut state = 88_172_645_463_325_252_u64;
    let mut next = |below: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % below
    };
    while !stop.load(Ordering::Relaxed) {
        let a = root.join(format!("churn-{}", next(8)));
        let b = root.join(format!("churn-{}", next(8)));
        // Whatever cannot be done just now is not done.
        let _ = match next(9) {
            0 => fs::write(&a, noise(next(300_000) as usize, next(100))),
            1 => {
                File::options().write(true).open(&a).and_then(|f| f.write_all_at(b"scribble", next(200_000)))
            }
            2 => File::options().write(true).open(&a).and_then(|f| f.set_len(next(200_000))),
            3 => fs::rename(&a, &b),
            4 => fs::hard_link(&a, &b),
            5 => fs::remove_file(&a).or_else(|_| fs::remove_dir_all(&a)),
            6 => fs::create_dir(&a),
            7 => fs::write(a.join("inside"), noise(next(3000) as usize, 9)),
            _ => symlink("churn-1", &a),
        };
    }
}

#[test]
fn a_scope_by_name_renames_and_leaves_the_rest_alone() {
    let scope = Scope::Named { from: b"abc-json.log".to_vec(), to: b"xyz-json.log".to_vec() };
    let mut pair = Pair::scoped(scope);
    write(&pair.from("abc-json.log"), "log");
    write(&pair.from("abc-json.log.1"), "older log");
    write(&pair.from("config.v2.json"), "the engine's");
    fs::create_dir(pair.from("abc-json.log.d")).unwrap();
    write(&pair.to("config.v2.json"), "the other engine's");
    write(&pair.to("xyz-json.log.7"), "left over");
    let before = fs::metadata(pair.to("")).unwrap().permissions();
    mode(&pair.from(""), 0o711);
    pair.pass();
    let mut names: Vec<_> =
        fs::read_dir(pair.to("")).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    assert_eq!(names, ["config.v2.json", "xyz-json.log", "xyz-json.log.1"]);
    assert_eq!(fs::read(pair.to("xyz-json.log.1")).unwrap(), b"older log");
    assert_eq!(fs::metadata(pair.to("")).unwrap().permissions(), before);

    fs::remove_file(pair.from("abc-json.log.1")).unwrap();
    File::options().append(true).open(pair.from("abc-json.log")).unwrap().write_all(b" and more").unwrap();
    pair.pass();
    assert_eq!(fs::read(pair.to("xyz-json.log")).unwrap(), b"log and more");
    assert!(!pair.to("xyz-json.log.1").exists() && pair.to("config.v2.json").exists());
}
