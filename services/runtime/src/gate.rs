//! The gate: what runc takes for CRIU while it restores a container whose state is not there yet.
//!
//! runc's own start takes longer than CRIU's restore, and CRIU's own start as long as much of it. So both are started
//! beforehand. runc finds as `criu` this program, which becomes CRIU for every request but that of the restore. With that,
//! it leaves the conversation with runc to the [keeper](crate::keeper), takes the root off, and starts CRIU as its
//! [child](crate::worker), in the container's network namespace and in a mount namespace of its own. CRIU waits for a
//! request, and the gate for the keeper's words. At the last one it puts the root on, which CRIU is shown with what the images
//! leave out, and gives CRIU's connection to the keeper. What is mounted for CRIU goes with it. Where the images
//! lack the container's IPC namespace CRIU is started anew in it.
//!
//! ```text
//!   haul-runtime ──▶ runc restore ──▶ gate (as criu swrk): peek ── other ──▶ CRIU, in its place
//!      keeper ◀── runc's end ─────────────────────────────────┴─ restore ──▶ root off ──▶ CRIU starts, and waits
//!             ── words, go ──▶ gate: root on, shown to CRIU
//!             ◀── ready, CRIU's end ── gate: waits for CRIU's end, and ends with its status
//! ```
//!
//! Shared memory that comes with the words has to be inherited by CRIU, which makes the one that waits of no use, as its death
//! does: another is started in its place.
//!
//! Whoever dies, CRIU's connection ends with it: the other end is the gate's until it is the keeper's, and a keeper that
//! finds the gate gone closes it. A CRIU without a connection ends, or undoes what it has done.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, ExitStatus};

use haulage_criu::companion::Companion;
use haulage_criu::rpc::{Kind, Request};
use haulage_criu::swrk::Criu;
use haulage_engine::armed::{Armed, ArmedRoot, GO, IPC, MEMORY, State, TMPFS};
use haulage_sys::ipc::IpcNamespace;
use haulage_sys::pass_fd;

use crate::cgroup;
use crate::failure::Failure;
use crate::keeper::RUNC_END;
use crate::root::Root;
use crate::worker::Worker;

/// The name by which runc starts CRIU, and us.
pub(crate) const NAME: &str = "criu";
/// The container that waits, for the gate.
const CONTAINER: &str = "HAUL_GATE_CONTAINER";
/// The root file system that is to be mounted anew.
const ROOT: &str = "HAUL_GATE_ROOT";
/// A path of the network namespace that was made for the container, if one was.
pub(crate) const NETWORK: &str = "HAUL_GATE_NETWORK";
/// Where the true CRIU is.
const CRIU: &str = "HAUL_GATE_CRIU";
/// The search path that CRIU gets: ours leads to the gate.
const PATH: &str = "HAUL_GATE_PATH";
/// A link to the images, in the directory of a migration's working files.
const IMAGES_LINK: &str = "images-link";
/// The longest request of runc's that is understood; they are below 16 KiB.
const MAX_REQUEST: usize = 256 << 10;

/// Has `runc` find the gate in CRIU's place. `dir` is a directory of the container's own, on a file system that allows
/// programs.
///
/// # Errors
/// When CRIU is not installed, or the gate cannot be set up.
pub(crate) fn set_up(runc: &mut Command, dir: &Path, id: &str, container_root: &Path) -> io::Result<()> {
    let criu = Criu::find().map_err(io::Error::other)?;
    let path = std::env::var_os("PATH").unwrap_or_default();
    let gate = dir.join("gate");
    fs::create_dir_all(&gate)?;
    let link = gate.join(NAME);
    match fs::remove_file(&link) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => std::os::unix::fs::symlink(std::env::current_exe()?, &link)?,
    }
    let dirs = std::iter::once(gate).chain(std::env::split_paths(&path));
    runc.env("PATH", std::env::join_paths(dirs).map_err(io::Error::other)?);
    runc.env(CONTAINER, id).env(ROOT, container_root).env(CRIU, criu.program()).env(PATH, path);
    Ok(())
}

/// Whether we were called in CRIU's place.
pub(crate) fn is_called(name: Option<&OsStr>) -> bool {
    name.map(Path::new).and_then(Path::file_name) == Some(OsStr::new(NAME))
        && std::env::var_os(CONTAINER).is_some()
}

/// What is known of the container, and of CRIU, from the environment.
struct Settings {
    id: String,
    container_root: PathBuf,
    criu: OsString,
    path: OsString,
    network: Option<OsString>,
}

impl Settings {
    fn from_env() -> Result<Self, Failure> {
        let setting = |name: &str| {
            let unset = || Failure::Gate(io::Error::other(format!("{name} is not set")));
            std::env::var_os(name).ok_or_else(unset)
        };
        Ok(Self {
            id: setting(CONTAINER)?.to_string_lossy().into_owned(),
            container_root: setting(ROOT)?.into(),
            criu: setting(CRIU)?,
            path: setting(PATH)?,
            network: std::env::var_os(NETWORK),
        })
    }

    /// CRIU as runc would have started it.
    fn criu(&self) -> Command {
        let mut criu = Command::new(&self.criu);
        criu.arg0(NAME).env("PATH", &self.path);
        for name in [CONTAINER, ROOT, CRIU, PATH, NETWORK] {
            criu.env_remove(name);
        }
        criu
    }
}

/// Becomes CRIU, or ends as it ends. On an error runc gives up.
pub(crate) fn pass(args: &[OsString]) -> ExitCode {
    match serve(args) {
        // One that a signal has ended has no code.
        Ok(status) => {
            status.code().and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, ExitCode::from)
        }
        Err(failure) => {
            eprintln!("{}", failure.chain());
            ExitCode::FAILURE
        }
    }
}

fn serve(args: &[OsString]) -> Result<ExitStatus, Failure> {
    let settings = Settings::from_env()?;
    match request(args).map_err(Failure::Gate)? {
        Some((number, request)) if request.kind == Kind::Restore as i32 => {
            restore(number, &request, &settings)
        }
        _ => Err(Failure::Gate(settings.criu().args(args).exec())),
    }
}

/// Takes the root off, starts CRIU, waits for the word, and makes the world as CRIU is to find it; then CRIU restores, and
/// ends.
fn restore(number: RawFd, request: &Request, settings: &Settings) -> Result<ExitStatus, Failure> {
    let armed_root = ArmedRoot::from_env();
    let State::Armed(armed) = armed_root.state(&settings.id)? else {
        return Err(Failure::Gate(io::Error::other("the container is not armed")));
    };
    // CRIU is not to have it: it would be open for as long as CRIU is there.
    let runc = pass_fd::take_inherited(number).map_err(Failure::Gate)?;
    let bind = request.options.as_ref().and_then(|options| options.root.clone()).map(PathBuf::from);
    let root = Root::take_off(&settings.container_root, bind).map_err(Failure::Root)?;
    tell_directories(&armed)?;
    // Not before it is off, or its mounts would hold it.
    let start = |shared, ipc| Worker::start(settings.criu(), settings.network.as_ref(), ipc, shared);
    let mut criu = start(Vec::new(), None).map_err(Failure::Gate)?;
    let keeper = leave_to_keeper(runc, &armed_root, &settings.id)?;
    let words = hear(&keeper).map_err(Failure::Gate)?;
    let Some(Words { shared, tmpfs, ipc }) = words else { return Err(Failure::CalledOff(armed.migration)) };

    root.put_on().map_err(Failure::Root)?;
    armed_root.consume(&settings.id)?;
    let mut useless = None;
    if !shared.is_empty() || ipc.is_some() || !criu.is_alive() {
        useless = Some(std::mem::replace(&mut criu, start(shared, ipc).map_err(Failure::Gate)?));
    }
    let companion = Companion::read(&armed.images).map_err(Failure::Root)?;
    let copies = root.copies().map_err(Failure::Root)?;
    let provided = criu.among_its_mounts(|| {
        copies.show()?;
        companion.map(|companion| companion.provide(&armed.work, &tmpfs)).transpose()
    });
    if let Some(lines) = provided.map_err(Failure::Root)? {
        cgroup::add_configuration(&armed.work, &lines)?;
    }
    criu.hand_over(&keeper).map_err(Failure::Gate)?;
    // What takes time to close has its time now.
    drop((useless, copies, tmpfs));
    // The keeper sees by its connection to us that we are there for as long as CRIU is.
    let status = criu.wait().map_err(Failure::Gate);
    drop(keeper);
    status
}

/// CRIU looks for directories that it is told by number in the process that has made the connection: so far runc. CRIU 4.1
/// takes the one for images for a link, such as /proc has for a descriptor, and fails on anything else.
fn tell_directories(armed: &Armed) -> Result<(), Failure> {
    let link = armed.work.join(IMAGES_LINK);
    match symlink(&armed.images, &link) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(Failure::Gate(error)),
        _ => {}
    }
    let lines = format!("images-dir {}\nwork-dir {}\n", link.display(), armed.work.display());
    cgroup::add_configuration(&armed.work, &lines)
}

/// From here on the keeper talks with runc, and with us over what is returned.
fn leave_to_keeper(runc: OwnedFd, armed_root: &ArmedRoot, id: &str) -> Result<UnixStream, Failure> {
    let keeper = armed_root.connect_to_gate(id)?;
    pass_fd::send(&keeper, RUNC_END, Some(runc.as_fd())).map_err(Failure::Gate)?;
    Ok(keeper)
}

/// What comes with the word.
#[derive(Default)]
struct Words {
    shared: Vec<OwnedFd>,
    tmpfs: Vec<OwnedFd>,
    ipc: Option<IpcNamespace>,
}

/// Waits for the word to go on; `None` when it does not come.
fn hear(keeper: &UnixStream) -> io::Result<Option<Words>> {
    let mut words = Words::default();
    loop {
        match pass_fd::receive(keeper)? {
            Some((MEMORY, Some(memory))) => words.shared.push(memory),
            Some((TMPFS, Some(filled))) => words.tmpfs.push(filled),
            Some((IPC, Some(namespace))) => words.ipc = Some(IpcNamespace::from(namespace)),
            Some((GO, None)) => return Ok(Some(words)),
            _ => return Ok(None),
        }
    }
}

/// The request that waits in the socket of `criu swrk FD`, which stays there, and FD. Any other call has none.
fn request(args: &[OsString]) -> io::Result<Option<(RawFd, Request)>> {
    let [verb, number] = args else { return Ok(None) };
    let number = number.to_str().and_then(|number| number.parse().ok()).filter(|_| verb == "swrk");
    let Some(number) = number else { return Ok(None) };
    let mut bytes = vec![0; MAX_REQUEST];
    let length = pass_fd::peek_inherited(number, &mut bytes)?;
    let request = Request::decode_bytes(bytes.get(..length).unwrap_or_default()).map_err(io::Error::other)?;
    Ok(Some((number, request)))
}
