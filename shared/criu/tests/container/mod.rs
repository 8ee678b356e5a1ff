//! A container of runc's, without an engine: a bundle with the traits of Docker's that matter to CRIU, running
//! `program`. Everything is removed on drop.

#![allow(dead_code, reason = "each test binary uses a part")]

use std::fs;
use std::io::ErrorKind;
use std::ops::Range;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use haulage_criu::dump::DumpRequest;
use haulage_criu::image::PAGE_SIZE;
use haulage_criu::mask::{DEFAULT_PARENT, PagemapMask};
use haulage_criu::merge::PageSource;
use haulage_criu::pagemap::PageRun;
use haulage_criu::shared::LeftOut;
use haulage_criu::swrk::Criu;
use serde_json::{Value, json};

use crate::program;

pub(crate) struct Container {
    pub(crate) id: String,
    dir: PathBuf,
    cgroup: String,
    /// `None` where another process started it, which removes it too.
    owned: Option<tempfile::TempDir>,
}

impl Container {
    /// Starts the container and waits until its program works. `name` keeps tests apart: hexadecimal, as Docker's ids.
    pub(crate) fn start(name: &str) -> Self {
        Self::start_program(name, None)
    }

    /// As [`Self::start`], with a program in C instead.
    pub(crate) fn start_c(name: &str, source: &str) -> Self {
        Self::start_program(name, Some(source))
    }

    fn start_program(name: &str, source: Option<&str>) -> Self {
        let owned = tempfile::Builder::new().prefix("haul-criu-").tempdir().unwrap();
        let mut container = Self::attach(owned.path(), &format!("{name}{:x}", std::process::id()));
        container.owned = Some(owned);
        container.make_bundle(source);
        for made in ["images", "work", "complete"] {
            fs::create_dir(container.dir.join(made)).unwrap();
        }
        let status = container.runc(&["run", "--detach"], true);
        assert!(status, "runc cannot start a container: {}", container.log());
        container.wait_for_progress();
        container
    }

    /// A container that another process started.
    pub(crate) fn attach(dir: &Path, id: &str) -> Self {
        Self { cgroup: format!("/haul-criu-test-{id}"), id: id.to_owned(), dir: dir.to_owned(), owned: None }
    }

    fn make_bundle(&self, source: Option<&str>) {
        let rootfs = self.rootfs();
        for made in ["proc", "dev", "sys", "usr", "tmp", "shared"] {
            fs::create_dir_all(rootfs.join(made)).unwrap();
        }
        for link in ["bin", "lib", "lib64", "sbin"] {
            std::os::unix::fs::symlink(format!("usr/{link}"), rootfs.join(link)).unwrap();
        }
        match source {
            Some(source) => compile(source, &rootfs.join("program")),
            None => drop(fs::copy(std::env::current_exe().unwrap(), rootfs.join("program")).unwrap()),
        }
        // What Docker's network hook does: CRIU restores sockets into a namespace that the engine set up.
        let hook = self.dir.join("network-hook");
        let script = "#!/bin/sh\npid=$(sed 's/.*\"pid\":\\([0-9]*\\).*/\\1/')\nexec nsenter -t $pid -n ip link set lo up\n";
        fs::write(&hook, script).unwrap();
        fs::set_permissions(&hook, fs::Permissions::from_mode(0o755)).unwrap();
        let program = std::iter::once("/program").chain(program::ARGS.iter().copied()).collect::<Vec<_>>();
        let namespaces: Vec<Value> =
            ["pid", "ipc", "uts", "mount", "network"].iter().map(|kind| json!({ "type": kind })).collect();
        let config = json!({
            "ociVersion": "1.0.2",
            "process": {
                "user": { "uid": 0, "gid": 0 },
                "args": program,
                "env": ["PATH=/usr/bin", format!("{}=/shared/status", program::STATUS)],
                "cwd": "/",
                "noNewPrivileges": true,
            },
            "root": { "path": "rootfs" },
            "hostname": "moved",
            "hooks": { "prestart": [{ "path": hook, "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"] }] },
            "mounts": [
                { "destination": "/proc", "type": "proc", "source": "proc" },
                { "destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"] },
                { "destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["nosuid", "nodev"] },
                { "destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["ro", "nosuid"] },
                { "destination": "/usr", "type": "bind", "source": "/usr", "options": ["rbind", "ro", "rprivate"] },
            ],
            "linux": {
                "cgroupsPath": self.cgroup,
                "namespaces": namespaces,
                "maskedPaths": ["/proc/kcore", "/proc/scsi", "/sys/firmware"],
                "readonlyPaths": ["/proc/sys"],
            },
        });
        fs::write(self.dir.join("config.json"), config.to_string()).unwrap();
    }

    pub(crate) fn bundle(&self) -> &Path {
        &self.dir
    }

    pub(crate) fn runc_root(&self) -> PathBuf {
        self.dir.join("runc")
    }

    pub(crate) fn rootfs(&self) -> PathBuf {
        self.dir.join("rootfs")
    }

    pub(crate) fn images(&self) -> PathBuf {
        self.dir.join("images")
    }

    pub(crate) fn work(&self) -> PathBuf {
        self.dir.join("work")
    }

    pub(crate) fn complete(&self) -> PathBuf {
        self.dir.join("complete")
    }

    /// The container's processes, in our pid namespace, the first one first.
    pub(crate) fn pids(&self) -> Vec<i32> {
        let procs = fs::read_to_string(self.freezer().0.join("cgroup.procs")).unwrap();
        let mut pids: Vec<i32> = procs.lines().map(|line| line.parse().unwrap()).collect();
        pids.sort_by_key(|pid| vpid(*pid));
        pids
    }

    fn log(&self) -> String {
        let read = |name: &str| fs::read_to_string(self.dir.join(name)).unwrap_or_default();
        format!("{}\n{}", read("runc.log"), read("work/restore.log") + &read("work/dump.log"))
    }

    /// `runc ARGS [--bundle B] ID`.
    fn runc(&self, args: &[&str], bundle: bool) -> bool {
        self.runc_with(args, bundle, Command::new("runc"))
    }

    fn runc_with(&self, args: &[&str], bundle: bool, mut cmd: Command) -> bool {
        cmd.args(["--root", &self.runc_root().to_string_lossy()]);
        cmd.args(["--log", &self.dir.join("runc.log").to_string_lossy()]).args(args);
        if bundle {
            cmd.arg("--bundle").arg(self.bundle());
        }
        cmd.arg(&self.id).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        cmd.status().expect("runc is needed: see deploy/setup").success()
    }

    fn state(&self) -> Value {
        let path = self.runc_root().join(&self.id).join("state.json");
        serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
    }

    /// The container's init, in our pid namespace.
    pub(crate) fn pid(&self) -> i32 {
        self.state()["init_process_pid"].as_i64().unwrap() as i32
    }

    pub(crate) fn is_running(&self) -> bool {
        Path::new(&format!("/proc/{}", self.pid())).exists()
    }

    /// Ticks and faults that the program reports.
    pub(crate) fn status(&self) -> (u64, u64) {
        let text = fs::read_to_string(self.rootfs().join("shared/status")).unwrap_or_default();
        let mut words = text.split_whitespace().map(|word| word.parse().unwrap());
        (words.next().unwrap_or(0), words.next().unwrap_or(0))
    }

    /// Waits until the program has gone on by some rounds, and checks that it found no fault.
    pub(crate) fn wait_for_progress(&self) {
        let (from, _) = self.status();
        poll("the program to go on", || self.status().0 >= from + 10);
        assert_eq!(self.status().1, 0, "the program found its memory changed");
    }

    /// Waits until the restored program has gone on from its count at the dump, and empties the directories for another
    /// move.
    pub(crate) fn wait_until_moved(&self, ticks: u64) {
        poll("the first tick after the restore", || self.status().0 > ticks);
        self.wait_for_progress();
        for made in [self.images(), self.complete()] {
            fs::remove_dir_all(&made).unwrap();
            fs::create_dir(&made).unwrap();
        }
    }

    fn freezer(&self) -> (PathBuf, bool) {
        match self.state()["cgroup_paths"]["freezer"].as_str() {
            Some(path) => (path.into(), false),
            None => (self.state()["cgroup_paths"][""].as_str().unwrap().into(), true),
        }
    }

    pub(crate) fn set_frozen(&self, frozen: bool) {
        match self.freezer() {
            (dir, false) => {
                fs::write(dir.join("freezer.state"), if frozen { "FROZEN" } else { "THAWED" }).unwrap()
            }
            (dir, true) => fs::write(dir.join("cgroup.freeze"), if frozen { "1" } else { "0" }).unwrap(),
        }
        poll("the cgroup to change", || self.is_frozen() == frozen);
    }

    pub(crate) fn is_frozen(&self) -> bool {
        match self.freezer() {
            (dir, false) => fs::read_to_string(dir.join("freezer.state")).unwrap().trim() == "FROZEN",
            (dir, true) => fs::read_to_string(dir.join("cgroup.events")).unwrap().contains("frozen 1"),
        }
    }

    /// A request as the checkpointer makes it from runc's state.
    pub(crate) fn request(&self) -> DumpRequest {
        let (state, pid) = (self.state(), self.pid());
        let mut request = DumpRequest::new(pid, self.rootfs(), self.images(), self.work());
        request.freeze_cgroup = Some(self.freezer().0);
        request.external_mounts = vec!["/usr".into()];
        request.log_level = 4;
        request.null_masks = vec!["/proc/kcore".into()];
        request.descriptors = serde_json::from_value(state["external_descriptors"].clone()).unwrap();
        request
    }

    /// The frozen container's tracked memory, hidden from CRIU, and its content.
    pub(crate) fn mask(&self, criu: &Criu) -> (PagemapMask, Stored) {
        let mut mask = PagemapMask::prepare(criu, Path::new(DEFAULT_PARENT)).unwrap();
        let stored = self.hide(&mut mask);
        (mask, stored)
    }

    /// The same behind a mask that is there.
    pub(crate) fn hide(&self, mask: &mut PagemapMask) -> Stored {
        let hidden = tracked(self.pid());
        assert!(!hidden.is_empty());
        mask.cover(self.pid(), &hidden).unwrap();
        Stored::read(self.pid(), &hidden)
    }

    pub(crate) fn delete(&self) {
        assert!(self.runc(&["delete", "--force"], false), "{}", self.log());
    }

    pub(crate) fn restore(&self, images: &Path) {
        self.restore_by(images, Command::new("runc"));
    }

    /// As [`Self::restore`], by a CRIU that inherits descriptors of this process, each under its key.
    pub(crate) fn restore_inheriting(&self, images: &Path, inherited: &[i32]) {
        let bin = self.dir.join("bin");
        fs::create_dir_all(&bin).unwrap();
        let (mut script, mut options) = ("#!/bin/bash\n".to_owned(), String::new());
        for (index, descriptor) in inherited.iter().enumerate() {
            // Beyond those of runc's own.
            let number = 200 + index;
            script += &format!("exec {number}<>/proc/{}/fd/{descriptor}\n", std::process::id());
            options += &format!("inherit-fd fd[{number}]:{}\n", LeftOut::key(index));
        }
        let config = self.dir.join("criu.conf");
        fs::write(&config, options).unwrap();
        let criu = Criu::find().unwrap();
        script +=
            &format!("CRIU_CONFIG_FILE={} exec {} \"$@\"\n", config.display(), criu.program().display());
        let wrapper = bin.join("criu");
        fs::write(&wrapper, script).unwrap();
        fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o755)).unwrap();
        let mut runc = Command::new("runc");
        let path = std::env::var("PATH").unwrap_or_default();
        runc.env("PATH", format!("{}:{path}", bin.display()));
        self.restore_by(images, runc);
    }

    fn restore_by(&self, images: &Path, runc: Command) {
        let (images, work) = (images.to_string_lossy(), self.work());
        let work = work.to_string_lossy();
        let args =
            ["restore", "--detach", "--tcp-established", "--image-path", &images, "--work-path", &work];
        assert!(self.runc_with(&args, true, runc), "runc cannot restore: {}", self.log());
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        if self.owned.is_none() {
            return;
        }
        if std::thread::panicking() {
            eprintln!("{}", self.log());
        }
        if self.runc_root().join(&self.id).exists() {
            self.set_frozen(false);
            self.runc(&["delete", "--force"], false);
        }
    }
}

/// A program of its own, without any library.
fn compile(source: &str, to: &Path) {
    let from = to.with_extension("c");
    fs::write(&from, source).unwrap();
    let compiled = Command::new("cc").args(["-static", "-O1", "-o"]).arg(to).arg(&from).status();
    assert!(compiled.expect("a C compiler is needed").success());
}

/// The id of a process in its own pid namespace.
pub(crate) fn vpid(pid: i32) -> u32 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:")).unwrap();
    numbers.split_whitespace().last().unwrap().parse().unwrap()
}

/// The private anonymous mappings of a process.
pub(crate) fn tracked(pid: i32) -> Vec<Range<u64>> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let mut ranges = Vec::new();
    for line in maps.lines() {
        let mut fields = line.split_whitespace();
        let (range, mode) = (fields.next().unwrap(), fields.next().unwrap());
        let (inode, name) = (fields.nth(2).unwrap(), fields.next().unwrap_or_default());
        if mode.ends_with('p') && inode == "0" && (name.is_empty() || name == "[heap]") {
            let (start, end) = range.split_once('-').unwrap();
            ranges.push(u64::from_str_radix(start, 16).unwrap()..u64::from_str_radix(end, 16).unwrap());
        }
    }
    ranges
}

/// Memory of a process, as the page store holds it on the target.
#[derive(Clone)]
pub(crate) struct Stored {
    runs: std::vec::IntoIter<PageRun>,
    content: std::collections::HashMap<u64, Vec<u8>>,
}

impl Stored {
    pub(crate) fn read(pid: i32, ranges: &[Range<u64>]) -> Self {
        let pagemap = fs::File::open(format!("/proc/{pid}/pagemap")).unwrap();
        let memory = fs::File::open(format!("/proc/{pid}/mem")).unwrap();
        let mut stored = Self { runs: Vec::new().into_iter(), content: Default::default() };
        let mut runs = Vec::new();
        for address in ranges.iter().cloned().flat_map(|range| range.step_by(PAGE_SIZE as usize)) {
            let mut entry = [0; 8];
            pagemap.read_exact_at(&mut entry, address / PAGE_SIZE * 8).unwrap();
            let entry = u64::from_le_bytes(entry);
            // Present, and not the zero page.
            if entry >> 63 == 1 && entry >> 61 & 1 == 0 {
                let mut page = vec![0; PAGE_SIZE as usize];
                memory.read_exact_at(&mut page, address).unwrap();
                stored.content.insert(address, page);
                runs.push(PageRun::new(address, 1).unwrap());
            }
        }
        stored.runs = runs.into_iter();
        stored
    }

    pub(crate) fn pages(&self) -> u64 {
        self.content.len() as u64
    }
}

impl PageSource for Stored {
    fn next_run(&mut self) -> std::io::Result<Option<PageRun>> {
        Ok(self.runs.next())
    }

    fn read_at(&mut self, address: u64, buffer: &mut [u8]) -> std::io::Result<()> {
        for (page, chunk) in buffer.chunks_mut(PAGE_SIZE as usize).enumerate() {
            let content =
                self.content.get(&(address + page as u64 * PAGE_SIZE)).ok_or(ErrorKind::NotFound)?;
            chunk.copy_from_slice(content);
        }
        Ok(())
    }
}

/// Polls until `condition` holds; fails the test when it does not come true.
pub(crate) fn poll(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}
