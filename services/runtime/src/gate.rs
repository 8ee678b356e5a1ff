//! The gate: what runc takes for CRIU while it restores a container whose state is not there yet.
//!
//! runc's own start takes longer than CRIU's restore. So it is started beforehand, and finds as `criu` this program,
//! which lets every request through but that of the restore: with it, it leaves the conversation with runc to the
//! [keeper](crate::keeper), waits for its word, and only then becomes CRIU, in the container's network namespace and in
//! a mount namespace of its own, which holds what the images leave out and goes with it. With the word come descriptors
//! of the container's shared memory, which CRIU inherits; the container's configuration file tells it their names. Others are
//! of tmpfs mounts that have the container's files, and are mounted in that namespace. Where the images lack the container's
//! IPC namespace CRIU runs in it too.
//!
//! ```text
//!   haul-runtime ──▶ runc restore ──▶ gate (as criu swrk): peek ── other ──▶ CRIU
//!      keeper ◀── both ends ─────────────────────────────────┴─ restore ──▶ waits ── go ──▶ root on ──▶ CRIU
//! ```

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::os::unix::fs::symlink;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use haulage_criu::companion::Companion;
use haulage_criu::rpc::{Kind, Request};
use haulage_criu::shared::LeftOut;
use haulage_criu::swrk::Criu;
use haulage_engine::armed::{ArmedRoot, GO, IPC, MEMORY, State, TMPFS};
use haulage_sys::ipc::IpcNamespace;
use haulage_sys::netns::NetworkNamespace;
use haulage_sys::{mount_ns, pass_fd};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use crate::cgroup;
use crate::failure::Failure;
use crate::keeper::{CRIU_END, RUNC_END};
use crate::root::Root;

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

/// Becomes CRIU, if need be after the word. Returns only on an error, on which runc gives up.
pub(crate) fn pass(args: &[OsString]) -> Failure {
    match prepare(args) {
        Err(failure) => failure,
        Ok(mut criu) => Failure::Gate(criu.exec()),
    }
}

fn prepare(args: &[OsString]) -> Result<Command, Failure> {
    let setting = |name: &str| {
        std::env::var_os(name).ok_or_else(|| Failure::Gate(io::Error::other(format!("{name} is not set"))))
    };
    let (id, container_root) = (setting(CONTAINER)?, PathBuf::from(setting(ROOT)?));
    let mut criu = Command::new(setting(CRIU)?);
    criu.arg0(NAME).env("PATH", setting(PATH)?);
    match request(args).map_err(Failure::Gate)? {
        Some((number, request)) if request.kind == Kind::Restore as i32 => {
            let (end, options) = restore(number, &request, &id.to_string_lossy(), &container_root)?;
            criu.args(options).args(["swrk", &end.to_string()]);
        }
        _ => {
            criu.args(args);
        }
    }
    for name in [CONTAINER, ROOT, CRIU, PATH, NETWORK] {
        criu.env_remove(name);
    }
    Ok(criu)
}

/// Has CRIU, which this process becomes, inherit the container's shared memory, under the names that the images have for
/// it: the options that say so. CRIU 4.1 reads a configuration twice, and would look twice for a descriptor that it has
/// put away the first time.
fn bequeath(shared: Vec<OwnedFd>) -> io::Result<Vec<String>> {
    let mut options = Vec::new();
    for (index, memory) in shared.into_iter().enumerate() {
        let number = pass_fd::leave_to_successor(memory)?;
        options.extend(["--inherit-fd".to_owned(), format!("fd[{number}]:{}", LeftOut::key(index))]);
    }
    Ok(options)
}

/// Takes the root off, waits for the word, and makes the world as CRIU is to find it; the number of its end of the
/// conversation, and options for it.
fn restore(
    number: RawFd,
    request: &Request,
    id: &str,
    container_root: &Path,
) -> Result<(RawFd, Vec<String>), Failure> {
    let armed_root = ArmedRoot::from_env();
    let State::Armed(armed) = armed_root.state(id)? else {
        return Err(Failure::Gate(io::Error::other("the container is not armed")));
    };
    let bind = request.options.as_ref().and_then(|options| options.root.clone()).map(PathBuf::from);
    let root = Root::take_off(container_root, bind).map_err(Failure::Root)?;
    let end = hand_over(number, &armed_root, id)?;
    let (mut shared, mut tmpfs, mut ipc) = (Vec::new(), Vec::new(), None);
    loop {
        match pass_fd::receive(&end).map_err(Failure::Gate)? {
            Some((MEMORY, Some(memory))) => shared.push(memory),
            Some((TMPFS, Some(filled))) => tmpfs.push(filled),
            Some((IPC, Some(namespace))) => ipc = Some(IpcNamespace::from(namespace)),
            Some((GO, None)) => break,
            _ => return Err(Failure::CalledOff(armed.migration)),
        }
    }
    root.put_on().map_err(Failure::Root)?;
    armed_root.consume(id)?;
    // CRIU looks for directories that it is told by number in the process that has made the connection: so far runc.
    // CRIU 4.1 takes the one for images for a link, such as /proc has for a descriptor, and fails on anything else.
    let link = armed.work.join(IMAGES_LINK);
    match symlink(&armed.images, &link) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(Failure::Gate(error)),
        _ => {}
    }
    let directories = [("images-dir", &link), ("work-dir", &armed.work)];
    for (option, path) in directories {
        cgroup::add_configuration(&armed.work, &format!("{option} {}\n", path.display()))?;
    }
    let provided = mount_ns::enter_private_mounts()
        .and_then(|()| Companion::read(&armed.images))
        .and_then(|companion| companion.map(|companion| companion.provide(&armed.work, &tmpfs)).transpose())
        .map_err(Failure::Root)?;
    if let Some(lines) = provided {
        cgroup::add_configuration(&armed.work, &lines)?;
    }
    let options = bequeath(shared).map_err(Failure::Gate)?;
    ipc.map_or(Ok(()), |ipc| ipc.enter()).map_err(Failure::Gate)?;
    if let Some(network) = std::env::var_os(NETWORK) {
        let entered = NetworkNamespace::at(Path::new(&network)).and_then(|network| network.enter());
        entered.map_err(|error| Failure::Network(error.into()))?;
    }
    Ok((pass_fd::leave_to_successor(end).map_err(Failure::Gate)?, options))
}

/// From here on the keeper talks with runc, and with us over what is returned.
fn hand_over(number: RawFd, armed_root: &ArmedRoot, id: &str) -> Result<OwnedFd, Failure> {
    let runc = pass_fd::duplicate_inherited(number).map_err(Failure::Gate)?;
    let pair = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None);
    let (ours, keeper_s) = pair.map_err(|errno| Failure::Gate(errno.into()))?;
    let keeper = armed_root.connect_to_gate(id)?;
    pass_fd::send(&keeper, RUNC_END, Some(runc.as_fd()))
        .and_then(|()| pass_fd::send(&keeper, CRIU_END, Some(keeper_s.as_fd())))
        .map_err(Failure::Gate)?;
    Ok(ours)
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
