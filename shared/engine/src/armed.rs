//! The armed state: how the restorer tells the OCI runtime that a container's next start is a restore.
//!
//! A directory per container under [`DEFAULT_ROOT`] (on tmpfs: a reboot disarms everything):
//!
//! ```text
//!   armed.json ──create──▶ consumed.json ──restored──▶ + outcome.json (ok) + started-by-restore ──start──▶ marker gone
//!                                        └──failed───▶ + outcome.json (not ok): every later create is refused
//! ```
//!
//! The state is consumed by one atomic rename before anything is restored: it is restored at most once, and a later
//! restart of the container begins afresh from its image. A container whose state was consumed and did not come to
//! life is never started empty in its place; only [`ArmedRoot::disarm`] frees it.

use std::fs;
use std::io::{self, ErrorKind, Write};
use std::net::Ipv4Addr;
use std::os::fd::AsRawFd;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// The version of this format; another one is refused, not guessed at.
pub const FORMAT: u32 = 3;
/// Where armed states lie unless [`ROOT_ENV`] says otherwise.
pub const DEFAULT_ROOT: &str = "/run/haul/armed";
/// The environment variable that moves the directory, for tests and for several engines on one machine.
pub const ROOT_ENV: &str = "HAUL_ARMED_DIR";

/// What a runtime that waits is sent when it shall restore. Anything but this and [`TAKE`], and the end of the
/// connection, calls it off.
pub const GO: u8 = b'g';
/// What it is sent, before [`GO`], when the container stands still on its source: its packets shall come here and be
/// kept.
pub const TAKE: u8 = b't';
/// What it is sent before, with the descriptor of shared memory that the restore inherits, in the order of its keys.
pub const MEMORY: u8 = b'm';
/// What it is sent before, with the descriptor of a tmpfs that is mounted nowhere and has the container's files, in the order
/// in which the images name them.
pub const TMPFS: u8 = b'f';
/// What it is sent before, with the descriptor of the IPC namespace that the container is restored in, where the images have
/// none.
pub const IPC: u8 = b'i';

const ARMED: &str = "armed.json";
const CONSUMED: &str = "consumed.json";
const OUTCOME: &str = "outcome.json";
const RESTORED: &str = "started-by-restore";
const GO_SOCKET: &str = "go.socket";
const GATE_SOCKET: &str = "gate.socket";
const GONE: &str = "go";

/// What the runtime restores in place of a fresh start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Armed {
    /// [`FORMAT`] at the time of writing.
    pub format: u32,
    /// The migration that this belongs to, for messages.
    pub migration: String,
    /// The directory of complete CRIU images, `descriptors.json` among them.
    pub images: PathBuf,
    /// Where CRIU writes `restore.log` and its working files.
    pub work: PathBuf,
    /// The network is made before the restore, and the images name it (`extRootNetNS`).
    pub network_first: bool,
    /// The runtime shall connect to [`ArmedRoot::go_socket`] when all is made but the container, and wait there until it
    /// is sent [`GO`].
    pub wait: bool,
    /// Addresses to announce when the container is there, each with the Ethernet address of its interface.
    pub addresses: Vec<(String, Ipv4Addr)>,
    /// A page server waits in `work` for the restore, to give it the pages that the images only name.
    pub lazy_pages: bool,
    /// Established TCP connections are restored too.
    pub tcp_established: bool,
    /// File locks are restored too.
    pub file_locks: bool,
    /// Unix sockets whose other end lies outside the container are connected again by name.
    pub ext_unix_sk: bool,
}

impl Armed {
    /// A state of the current format with everything restored that can be, all of it from the images.
    pub fn new(migration: impl Into<String>, images: impl Into<PathBuf>, work: impl Into<PathBuf>) -> Self {
        Self {
            format: FORMAT,
            migration: migration.into(),
            images: images.into(),
            work: work.into(),
            network_first: false,
            wait: false,
            addresses: Vec::new(),
            lazy_pages: false,
            tcp_established: true,
            file_locks: true,
            ext_unix_sk: true,
        }
    }
}

/// How a restore ended, written by the runtime for the restorer.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Outcome {
    /// The container runs.
    pub ok: bool,
    /// The exit status of `runc restore`; `None` when it was killed or could not be started.
    pub exit_code: Option<i32>,
    /// What went wrong and, where known, what to do about it.
    pub error: Option<String>,
    /// From the call of the runtime to the consumed state, in microseconds.
    pub prepare_us: u64,
    /// The time inside `runc restore`, in microseconds.
    pub restore_us: u64,
    /// From the word to go on until the container ran and was announced, in microseconds; zero until it was.
    pub start_us: u64,
    /// Packets that arrived while it stood still, and that it got.
    #[serde(default)]
    pub put_back: u32,
    /// Why others were lost, or it was not announced. Those who sent them send them again.
    #[serde(default)]
    pub packets_lost: Option<String>,
}

/// What stands about a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// Nothing: the runtime passes everything through.
    Absent,
    /// The next `create` restores this.
    Armed(Armed),
    /// Consumed and not (or not yet) come to life: every `create` is refused.
    Consumed,
    /// Restored; the next `start` has nothing to do. A later `create` starts afresh.
    Restored,
}

/// The armed state could not be read, written or accepted.
#[derive(Debug, thiserror::Error)]
pub enum ArmedError {
    /// Not a container id of 1 to 64 hexadecimal digits.
    #[error("{0:?} is not a container id")]
    BadId(String),
    /// The file is not what this version writes.
    #[error("the armed state {path} cannot be understood")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
    /// Written by another version.
    #[error("the armed state has format {found}, this runtime understands {FORMAT}")]
    Format {
        /// The format that it claims.
        found: u32,
    },
    /// The container is armed or was, and has to be disarmed first.
    #[error("container {0} is already armed or consumed")]
    Occupied(String),
    /// The file system said no.
    #[error("cannot access the armed state {path}")]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

type Result<T> = std::result::Result<T, ArmedError>;

/// The directory of all armed states on a host.
#[derive(Debug, Clone)]
pub struct ArmedRoot(PathBuf);

impl ArmedRoot {
    /// An explicit directory.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self(root.into())
    }

    /// The directory named by [`ROOT_ENV`], or [`DEFAULT_ROOT`].
    pub fn from_env() -> Self {
        Self(
            std::env::var_os(ROOT_ENV)
                .filter(|root| !root.is_empty())
                .map_or_else(|| DEFAULT_ROOT.into(), Into::into),
        )
    }

    /// Arms container `id`. It is visible to the runtime all at once or, on error, not at all.
    ///
    /// # Errors
    /// [`ArmedError::Occupied`] when the container is armed already or its state was consumed.
    pub fn arm(&self, id: &str, armed: &Armed) -> Result<()> {
        let dir = self.dir(id)?;
        if self.state(id)? != State::Absent {
            return Err(ArmedError::Occupied(id.to_owned()));
        }
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir).map_err(at(&dir))?;
        write_whole(&dir.join(ARMED), armed)
    }

    /// Forgets all about container `id`: it starts as any other. Harmless when there was nothing.
    ///
    /// # Errors
    /// On error something of the state may remain; ask again.
    pub fn disarm(&self, id: &str) -> Result<()> {
        let dir = self.dir(id)?;
        match fs::remove_dir_all(&dir) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(at(&dir)(error)),
            _ => Ok(()),
        }
    }

    /// What stands about container `id`.
    ///
    /// # Errors
    /// A state that is there and cannot be read or understood is an error, never [`State::Absent`].
    pub fn state(&self, id: &str) -> Result<State> {
        let dir = self.dir(id)?;
        if let Some(armed) = read::<Armed>(&dir.join(ARMED))? {
            return if armed.format == FORMAT {
                Ok(State::Armed(armed))
            } else {
                Err(ArmedError::Format { found: armed.format })
            };
        }
        if !exists(&dir.join(CONSUMED))? {
            return Ok(State::Absent);
        }
        match self.outcome(id)? {
            Some(Outcome { ok: true, .. }) => Ok(State::Restored),
            _ => Ok(State::Consumed),
        }
    }

    /// Takes the armed state of `id`, once: afterwards it is consumed, whatever comes of it.
    ///
    /// # Errors
    /// When another took it first, or the rename failed; the state is then not ours.
    pub fn consume(&self, id: &str) -> Result<()> {
        let dir = self.dir(id)?;
        let armed = dir.join(ARMED);
        fs::rename(&armed, dir.join(CONSUMED)).map_err(at(&armed))
    }

    /// Listens for the runtime of container `id`, which is armed to wait.
    ///
    /// # Errors
    /// Of the file system. Nobody can connect then.
    pub fn listen(&self, id: &str) -> Result<UnixListener> {
        let path = self.dir(id)?.join(GO_SOCKET);
        reachable(&path).and_then(|(path, _dir)| UnixListener::bind(path)).map_err(at(&path))
    }

    /// Connects, as the runtime of container `id`, to whoever says [`TAKE`] and [`GO`].
    ///
    /// # Errors
    /// When there is nobody.
    pub fn connect(&self, id: &str) -> Result<UnixStream> {
        let path = self.dir(id)?.join(GO_SOCKET);
        reachable(&path).and_then(|(path, _dir)| UnixStream::connect(path)).map_err(at(&path))
    }

    /// Listens, as the runtime of container `id`, for what stands in CRIU's place.
    ///
    /// # Errors
    /// Of the file system.
    pub fn listen_at_gate(&self, id: &str) -> Result<UnixListener> {
        let path = self.dir(id)?.join(GATE_SOCKET);
        reachable(&path).and_then(|(path, _dir)| UnixListener::bind(path)).map_err(at(&path))
    }

    /// Connects to it.
    ///
    /// # Errors
    /// When there is nobody.
    pub fn connect_to_gate(&self, id: &str) -> Result<UnixStream> {
        let path = self.dir(id)?.join(GATE_SOCKET);
        reachable(&path).and_then(|(path, _dir)| UnixStream::connect(path)).map_err(at(&path))
    }

    /// Notes that the word was given, for [`ArmedRoot::since_go`].
    ///
    /// # Errors
    /// Of the file system.
    pub fn note_go(&self, id: &str) -> Result<()> {
        let path = self.dir(id)?.join(GONE);
        fs::write(&path, "").map_err(at(&path))
    }

    /// How long ago the word was given, if it was.
    pub fn since_go(&self, id: &str) -> Result<Option<Duration>> {
        let path = self.dir(id)?.join(GONE);
        match fs::metadata(&path).and_then(|noted| noted.modified()) {
            // A clock that was set back says nothing.
            Ok(noted) => Ok(Some(noted.elapsed().unwrap_or_default())),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(at(&path)(error)),
        }
    }

    /// Records how the restore of `id` ended; a success also lets the next `start` pass once.
    pub fn record(&self, id: &str, outcome: &Outcome) -> Result<()> {
        let dir = self.dir(id)?;
        let marker = dir.join(RESTORED);
        match outcome.ok {
            true => fs::write(&marker, "").map_err(at(&marker))?,
            false => {
                self.take_restored(id)?;
            }
        }
        write_whole(&dir.join(OUTCOME), outcome)
    }

    /// Records how long the start of `id` took, whose end is recorded already.
    pub fn record_time(&self, id: &str, outcome: &Outcome) -> Result<()> {
        write_whole(&self.dir(id)?.join(OUTCOME), outcome)
    }

    /// How the restore of `id` ended, if it has ended.
    pub fn outcome(&self, id: &str) -> Result<Option<Outcome>> {
        read(&self.dir(id)?.join(OUTCOME))
    }

    /// Whether `id` runs already because it was restored and was not yet "started": true once, then false.
    pub fn take_restored(&self, id: &str) -> Result<bool> {
        let marker = self.dir(id)?.join(RESTORED);
        match fs::remove_file(&marker) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
            Err(error) => Err(at(&marker)(error)),
        }
    }

    fn dir(&self, id: &str) -> Result<PathBuf> {
        // The id becomes a directory name: nothing but hexadecimal digits gets that far.
        if is_container_id(id) {
            Ok(self.0.join(id))
        } else {
            Err(ArmedError::BadId(id.chars().take(64).collect()))
        }
    }
}

/// Whether `id` is 1 to 64 hexadecimal digits, as the engine's container ids are.
pub fn is_container_id(id: &str) -> bool {
    (1..=64).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_hexdigit())
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> ArmedError {
    let path = path.to_owned();
    move |source| ArmedError::Io { path, source }
}

/// A name of `path` that is short enough for a socket, and what it stands on.
fn reachable(path: &Path) -> io::Result<(PathBuf, fs::File)> {
    let (dir, name) = path.parent().zip(path.file_name()).ok_or(ErrorKind::InvalidInput)?;
    let dir = fs::File::open(dir)?;
    Ok((Path::new("/proc/self/fd").join(dir.as_raw_fd().to_string()).join(name), dir))
}

fn exists(path: &Path) -> Result<bool> {
    fs::exists(path).map_err(at(path))
}

fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    let bytes = match fs::read(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        other => other.map_err(at(path))?,
    };
    serde_json::from_slice(&bytes)
        .map(Some)
        .map_err(|source| ArmedError::Malformed { path: path.to_owned(), source })
}

fn write_whole<T: Serialize>(path: &Path, value: &T) -> Result<()> {
    let bytes = serde_json::to_vec(value)
        .map_err(|source| ArmedError::Malformed { path: path.to_owned(), source })?;
    let new = path.with_extension("new");
    fs::File::create(&new).and_then(|mut file| file.write_all(&bytes)).map_err(at(&new))?;
    fs::rename(&new, path).map_err(at(path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    const ID: &str = "0123456789abcdef";

    fn outcome(ok: bool) -> Outcome {
        Outcome { ok, exit_code: Some(0), error: None, ..Outcome::default() }
    }

    fn root() -> (tempfile::TempDir, ArmedRoot) {
        let dir = tempfile::tempdir().unwrap();
        let root = ArmedRoot::new(dir.path().join("armed"));
        (dir, root)
    }

    #[test]
    fn a_state_is_taken_once_and_start_passes_once() {
        let (_dir, root) = root();
        let armed = Armed::new("m-1", "/images", "/work");
        assert_eq!(root.state(ID).unwrap(), State::Absent);
        root.arm(ID, &armed).unwrap();
        assert_eq!(root.state(ID).unwrap(), State::Armed(armed.clone()));
        assert!(matches!(root.arm(ID, &armed), Err(ArmedError::Occupied(_))));
        root.consume(ID).unwrap();
        assert!(root.consume(ID).is_err());
        assert_eq!(root.state(ID).unwrap(), State::Consumed);
        root.record(ID, &outcome(true)).unwrap();
        assert_eq!(root.state(ID).unwrap(), State::Restored);
        assert!(root.take_restored(ID).unwrap());
        assert!(!root.take_restored(ID).unwrap());
        root.disarm(ID).unwrap();
        root.disarm(ID).unwrap();
        assert_eq!(root.state(ID).unwrap(), State::Absent);
    }

    #[test]
    fn a_runtime_finds_who_tells_it() {
        let (_dir, root) = root();
        assert!(root.connect(ID).is_err() && root.connect_to_gate(ID).is_err(), "nobody listens");
        root.arm(ID, &Armed { wait: true, ..Armed::new("m-1", "/images", "/work") }).unwrap();
        let (words, gate) = (root.listen(ID).unwrap(), root.listen_at_gate(ID).unwrap());
        let mut word = [0];
        let mut heard = root.connect(ID).unwrap();
        words.accept().unwrap().0.write_all(&[GO]).unwrap();
        heard.read_exact(&mut word).unwrap();
        assert_eq!(word, [GO]);
        root.connect_to_gate(ID).unwrap().write_all(b"r").unwrap();
        gate.accept().unwrap().0.read_exact(&mut word).unwrap();
        assert_eq!(word, *b"r");
    }

    #[test]
    fn a_start_that_failed_after_all_passes_no_more() {
        let (_dir, root) = root();
        root.arm(ID, &Armed::new("m-1", "/images", "/work")).unwrap();
        root.consume(ID).unwrap();
        root.record(ID, &outcome(true)).unwrap();
        root.record(ID, &outcome(false)).unwrap();
        assert!(!root.take_restored(ID).unwrap());
        assert_eq!(root.state(ID).unwrap(), State::Consumed);
    }

    #[test]
    fn a_failed_restore_leaves_the_container_barred() {
        let (_dir, root) = root();
        root.arm(ID, &Armed::new("m-1", "/images", "/work")).unwrap();
        root.consume(ID).unwrap();
        root.record(ID, &outcome(false)).unwrap();
        assert_eq!(root.state(ID).unwrap(), State::Consumed);
        assert!(!root.take_restored(ID).unwrap());
    }

    #[test]
    fn what_cannot_be_understood_is_never_taken_for_absent() {
        let (_dir, root) = root();
        let mut armed = Armed::new("m-1", "/images", "/work");
        armed.format = FORMAT + 1;
        root.arm(ID, &armed).unwrap();
        assert!(matches!(root.state(ID), Err(ArmedError::Format { .. })));
        fs::write(root.dir(ID).unwrap().join(ARMED), "{").unwrap();
        assert!(matches!(root.state(ID), Err(ArmedError::Malformed { .. })));
    }

    #[test]
    fn an_id_cannot_leave_the_directory() {
        let (_dir, root) = root();
        for id in ["", "..", "../../etc", "ab/cd", "xyz", &"a".repeat(65)] {
            assert!(matches!(root.disarm(id), Err(ArmedError::BadId(_))), "{id:?}");
        }
    }
}
