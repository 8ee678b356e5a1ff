//! The gate: what runc takes for CRIU while it restores a container whose state is not there yet.
//!
//! runc's own start takes longer than CRIU's restore. So it is started beforehand, and finds as `criu` this program,
//! which lets every request through but that of the restore: with it, it waits for the word, and only then becomes
//! CRIU. The request is looked at and left in the socket, so CRIU reads it as if nobody had been there. With the word come
//! descriptors of the container's shared memory, which CRIU inherits: a configuration file tells it their names.
//!
//! ```text
//!   haul-runtime ──▶ runc restore ──▶ gate (as criu swrk): peek ── other ──▶ CRIU
//!                                                            └─ restore ──▶ waits ── GO ──▶ root anew ──▶ CRIU
//! ```

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use haulage_criu::rpc::{Kind, Request};
use haulage_criu::shared::LeftOut;
use haulage_criu::swrk::Criu;
use haulage_engine::armed::{ArmedRoot, State};
use haulage_sys::pass_fd;
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::mount::{UnmountFlags, mount_bind_recursive, unmount};

use crate::failure::Failure;
use crate::root;

/// The name by which runc starts CRIU, and us.
pub(crate) const NAME: &str = "criu";
/// The container that waits, for the gate.
const CONTAINER: &str = "HAUL_GATE_CONTAINER";
/// The root file system that is to be mounted anew.
const ROOT: &str = "HAUL_GATE_ROOT";
/// Where the true CRIU is.
const CRIU: &str = "HAUL_GATE_CRIU";
/// The search path that CRIU gets: ours leads to the gate.
const PATH: &str = "HAUL_GATE_PATH";
/// Where CRIU reads options besides (`next_config` of `criu/config.c`).
const CONFIGURATION: &str = "CRIU_CONFIG_FILE";
/// Ours, in the working directory.
const INHERITED: &str = "criu-inherited.conf";
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

/// Becomes CRIU, if need be after the word. Returns only on an error, on which runc gives up.
pub(crate) fn pass(args: &[OsString]) -> Failure {
    match prepare(args) {
        Err(failure) => failure,
        Ok((mut criu, _shared)) => Failure::Gate(criu.exec()),
    }
}

/// The call of CRIU, and what must be open then.
fn prepare(args: &[OsString]) -> Result<(Command, Vec<OwnedFd>), Failure> {
    let setting = |name: &str| {
        std::env::var_os(name).ok_or_else(|| Failure::Gate(io::Error::other(format!("{name} is not set"))))
    };
    let (id, container_root) = (setting(CONTAINER)?, PathBuf::from(setting(ROOT)?));
    let id = id.to_string_lossy();
    let (mut criu, mut shared) = (Command::new(setting(CRIU)?), Vec::new());
    if let Some(request) =
        request(args).map_err(Failure::Gate)?.filter(|request| request.kind == Kind::Restore as i32)
    {
        let armed = ArmedRoot::from_env();
        let State::Armed(state) = armed.state(&id)? else { return Err(Failure::CalledOff(id.into_owned())) };
        let Some(handed) = armed.wait(&id)? else { return Err(Failure::CalledOff(id.into_owned())) };
        // Noted before anything else, so that the time is known of which it counts.
        armed.note_go(&id)?;
        renew(&container_root, &request).map_err(Failure::Root)?;
        armed.consume(&id)?;
        if !handed.is_empty() {
            criu.env(CONFIGURATION, bequeath(&handed, &state.work).map_err(Failure::Gate)?);
        }
        shared = handed;
    }
    criu.args(args).arg0(NAME).env("PATH", setting(PATH)?);
    for name in [CONTAINER, ROOT, CRIU, PATH] {
        criu.env_remove(name);
    }
    Ok((criu, shared))
}

/// Has CRIU, which this process becomes, inherit descriptors under the names that the images have for them: the path of
/// a configuration file that says so.
fn bequeath(shared: &[OwnedFd], work: &Path) -> io::Result<PathBuf> {
    // What the host's administrator has set stays.
    let mut text = match std::env::var_os(CONFIGURATION) {
        Some(theirs) => fs::read_to_string(theirs)? + "\n",
        None => String::new(),
    };
    for (index, memory) in shared.iter().enumerate() {
        fcntl_setfd(memory, FdFlags::empty())?;
        text.push_str(&format!("inherit-fd fd[{}]:{}\n", memory.as_raw_fd(), LeftOut::key(index)));
    }
    let path = work.join(INHERITED);
    fs::write(&path, text)?;
    Ok(path)
}

/// The request that waits in the socket of `criu swrk FD`, which stays there. Any other call has none.
fn request(args: &[OsString]) -> io::Result<Option<Request>> {
    let [verb, number] = args else { return Ok(None) };
    let number = number.to_str().and_then(|number| number.parse().ok()).filter(|_| verb == "swrk");
    let Some(number) = number else { return Ok(None) };
    let mut bytes = vec![0; MAX_REQUEST];
    let length = pass_fd::peek_inherited(number, &mut bytes)?;
    Request::decode_bytes(bytes.get(..length).unwrap_or_default()).map(Some).map_err(io::Error::other)
}

/// The engine's mount of the container's root, and runc's of the same for CRIU, which is a bind of it.
fn renew(container_root: &Path, request: &Request) -> io::Result<()> {
    let bind = request.options.as_ref().and_then(|options| options.root.clone()).map(PathBuf::from);
    let Some(bind) = bind.filter(|bind| bind != container_root) else { return root::renew(container_root) };
    unmount(&bind, UnmountFlags::NOFOLLOW)?;
    root::renew(container_root)?;
    Ok(mount_bind_recursive(container_root, &bind)?)
}
