//! A Docker engine of its own for one test, removed with all it made when dropped.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use haulage_engine::Docker;
use tempfile::TempDir;

static COUNT: AtomicU32 = AtomicU32::new(0);

/// `dockerd` in new network and mount namespaces, with a network `lan` (macvlan on one end of a veth pair) and an image
/// `probe:1` that holds a shell, `sleep` and `cat`.
pub(crate) struct TestEngine {
    dir: TempDir,
    daemon: Child,
}

impl TestEngine {
    pub(crate) fn start() -> Self {
        let dir = tempfile::Builder::new().prefix("haul-engine-").tempdir().unwrap();
        let unique = format!("haul-engine-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let at = |name: &str| dir.path().join(name).display().to_string();
        let log = std::fs::File::create(dir.path().join("dockerd.log")).unwrap();
        let script = "ip link set lo up && ip link add eth0 type veth peer name eth1 && ip link set eth1 up && ip addr add 10.93.0.1/24 dev eth0 && \
                      ip link set eth0 up && exec dockerd \"$@\"";
        let daemon = Command::new("unshare")
            .args(["--net", "--mount", "--propagation", "private", "sh", "-c", script, "dockerd"])
            .args(["--data-root", &at("data"), "--exec-root", &at("exec"), "--pidfile", &at("docker.pid")])
            .args(["-H", &format!("unix://{}", at("docker.sock"))])
            .args(["--containerd-namespace", &unique])
            .args(["--containerd-plugins-namespace", &format!("{unique}-plugins")])
            .args(["--storage-driver", "overlay2", "--add-runtime", "haul=runc"])
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let mut engine = Self { dir, daemon };
        engine.await_ready();
        engine.docker(&[
            "network",
            "create",
            "-d",
            "macvlan",
            "--subnet",
            "10.93.0.0/24",
            "-o",
            "parent=eth0",
            "lan",
        ]);
        engine.import_probe();
        engine
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.path().join("docker.sock")
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) async fn connect(&self) -> Docker {
        Docker::connect(&self.socket()).await.unwrap()
    }

    /// Runs the `docker` command against this engine, and gives what it printed.
    pub(crate) fn docker(&self, args: &[&str]) -> String {
        let output = self.command(args).output().unwrap();
        assert!(output.status.success(), "docker {args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new("docker");
        command.arg("-H").arg(format!("unix://{}", self.socket().display())).args(args);
        command
    }

    fn await_ready(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            if self.command(&["version"]).output().unwrap().status.success() {
                return;
            }
            let ended = self.daemon.try_wait().unwrap();
            if ended.is_some() || Instant::now() > deadline {
                let log = std::fs::read_to_string(self.path("dockerd.log")).unwrap();
                panic!("dockerd is not ready ({ended:?}): {log}");
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// A small image from this machine's own programs, so that tests need no registry.
    fn import_probe(&self) {
        let tar = self.path("probe.tar");
        let mut archive = tar::Builder::new(std::fs::File::create(&tar).unwrap());
        archive.follow_symlinks(true);
        let programs = ["/bin/sh", "/bin/sleep", "/bin/cat"];
        let mut files: Vec<PathBuf> = programs.iter().map(PathBuf::from).collect();
        for program in programs {
            let listed = Command::new("ldd").arg(program).output().unwrap();
            let listed = String::from_utf8(listed.stdout).unwrap();
            files.extend(listed.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from));
        }
        files.sort();
        files.dedup();
        for file in files {
            archive.append_path_with_name(&file, file.strip_prefix("/").unwrap()).unwrap();
        }
        let mut link = tar::Header::new_gnu();
        link.set_entry_type(tar::EntryType::Symlink);
        link.set_size(0);
        archive.append_link(&mut link, "var/run", "/run").unwrap();
        archive.finish().unwrap();
        self.docker(&[
            "import",
            "--change",
            "ENTRYPOINT [\"/bin/sh\"]",
            "--change",
            "VOLUME /declared",
            "--change",
            "ENV FROM_IMAGE=yes",
            tar.to_str().unwrap(),
            "probe:1",
        ]);
    }
}

impl Drop for TestEngine {
    fn drop(&mut self) {
        // Containers first: their shims outlive the engine.
        if let Ok(list) = self.command(&["ps", "-aq"]).output() {
            let ids = String::from_utf8_lossy(&list.stdout).into_owned();
            let ids: Vec<&str> = ids.split_whitespace().collect();
            if !ids.is_empty() {
                let _ = self.command(&["rm", "-fv"]).args(&ids).output();
            }
        }
        if matches!(self.daemon.try_wait(), Ok(None)) {
            let _ = Command::new("kill").arg(self.daemon.id().to_string()).status();
        }
        let deadline = Instant::now() + Duration::from_secs(20);
        while Instant::now() < deadline {
            if matches!(self.daemon.try_wait(), Ok(Some(_))) {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

/// Polls until `check` gives a value; fails the test when it does not within half a minute.
pub(crate) async fn eventually<T>(what: &str, mut check: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        if let Some(value) = check().await {
            return value;
        }
        assert!(Instant::now() < deadline, "{what} did not come about");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Whether the path is under the directory of an engine, for messages about what was left behind.
pub(crate) fn mounts_under(dir: &Path) -> Vec<String> {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    mounts.lines().filter(|line| line.contains(dir.to_str().unwrap())).map(str::to_owned).collect()
}
