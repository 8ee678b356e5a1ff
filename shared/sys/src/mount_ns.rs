//! Starting a program in a mount namespace of its own, with files bound over others that only it sees.
//!
//! The namespace is made in the child between `fork` and `exec`: the mounts die with the child and everything that
//! it starts, whatever becomes of us, so there is nothing to clean up.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use rustix::fs::CWD;
use rustix::mount::{OpenTreeFlags, open_tree};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// Spawns `cmd` in a private copy of our mount namespace in which every `(source, target)` of `binds` is bind-mounted,
/// in order, and `over_own_pagemap`, if given, covers the program's own `/proc/self/pagemap`.
///
/// Its mounts are seen by nobody else. What is mounted or unmounted elsewhere later is so in the child too, where that is
/// shared (`MS_SLAVE`), so that one that waits for long keeps none of those busy. The child's own pagemap is
/// named by its process id, which `exec` keeps, also through a loader or a wrapper script that ends in `exec`.
///
/// # Errors
/// What `unshare`, `mount` or `exec` said (the child has exited then and holds nothing), or `InvalidInput` for a path
/// with a NUL in it. Needs `CAP_SYS_ADMIN`.
pub fn spawn_in_private_mounts(
    mut cmd: Command,
    binds: &[(PathBuf, PathBuf)],
    over_own_pagemap: Option<&Path>,
) -> io::Result<Child> {
    let mut mounts = Vec::with_capacity(binds.len() + 1);
    for (source, target) in binds {
        mounts.push((c_path(source)?, c_path(target)?));
    }
    if let Some(source) = over_own_pagemap {
        mounts.push((c_path(source)?, c"/proc/self/pagemap".to_owned()));
    }
    // SAFETY: the closure runs in the forked child, where only async-signal-safe calls are allowed: it makes plain
    // system calls on strings that were built before the fork, and allocates nothing.
    unsafe {
        cmd.pre_exec(move || {
            check(libc::unshare(libc::CLONE_NEWNS))?;
            mount(None, c"/", libc::MS_REC | libc::MS_SLAVE)?;
            for (source, target) in &mounts {
                mount(Some(source), target, libc::MS_BIND)?;
            }
            Ok(())
        });
    }
    cmd.spawn()
}

/// Has the program that `command` will start run in a mount namespace of its own, a copy of ours at that moment: what
/// [`run_in`] mounts there is seen by it alone, and goes with it. What is mounted elsewhere later is still seen by it where
/// that is shared (`MS_SLAVE`). An error shows when it is started; it needs `CAP_SYS_ADMIN`.
pub fn enter_private_mounts_on_start(command: &mut Command) {
    let enter = || {
        // SAFETY: the call takes a number only, and changes nothing but where mounts are seen.
        check(unsafe { libc::unshare(libc::CLONE_NEWNS) })?;
        mount(None, c"/", libc::MS_REC | libc::MS_SLAVE)
    };
    // SAFETY: the closure runs in the forked child, where only async-signal-safe calls are allowed: it makes two plain
    // system calls, on constants.
    unsafe { command.pre_exec(enter) };
}

/// Runs `work` in the mount namespace of process `pid`, on a thread made for it, and returns what it returns. Paths mean
/// there what they mean to a process that has the namespace's own root.
///
/// # Errors
/// When the process is gone, or for want of `CAP_SYS_ADMIN`: then `work` has not run. Those of `work`.
pub fn run_in<T: Send>(pid: crate::Pid, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    let namespace = std::fs::File::open(format!("/proc/{pid}/ns/mnt"))?;
    let enter_and_work = || {
        // SAFETY: this gives the calling thread, which is made for this and does nothing else, a root and a working
        // directory of its own, without which it may not enter another mount namespace.
        check(unsafe { libc::unshare(libc::CLONE_FS) })?;
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Mount))?;
        work()
    };
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("haul-mntns".into());
        match thread.spawn_scoped(scope, enter_and_work)?.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

/// Bind-mounts every `(source, target)` of `binds`, in order, in the mount namespace of process `pid`. The paths are looked
/// up there.
///
/// # Errors
/// When the process is gone, or what `mount` said: those before it are mounted then. Needs `CAP_SYS_ADMIN`.
pub fn bind_in(pid: crate::Pid, binds: &[(PathBuf, PathBuf)]) -> io::Result<()> {
    let c_paths = |(source, target): &(PathBuf, PathBuf)| Ok((c_path(source)?, c_path(target)?));
    let binds = binds.iter().map(c_paths).collect::<io::Result<Vec<_>>>()?;
    run_in(pid, || binds.iter().try_for_each(|(source, target)| mount(Some(source), target, libc::MS_BIND)))
}

/// The file system that is mounted at `at` for process `pid`, alone: without what is mounted inside it. The descriptor is
/// of its root, and the mount is nobody else's and gone with it; it is reached by `/proc/self/fd`. Whoever has no time
/// [lets it go](let_go) rather than closing it.
///
/// # Errors
/// When the process is gone, nothing is mounted there, or for want of `CAP_SYS_ADMIN`.
pub fn mounted_alone(pid: crate::Pid, at: &Path) -> io::Result<OwnedFd> {
    run_in(pid, || open_alone(at))
}

/// As [`mounted_alone`], of several.
///
/// # Errors
/// As there, when any cannot be had.
pub fn all_mounted_alone<'a>(
    pid: crate::Pid,
    at: impl Iterator<Item = &'a Path> + Send,
) -> io::Result<Vec<OwnedFd>> {
    run_in(pid, || at.map(open_alone).collect())
}

fn open_alone(at: &Path) -> io::Result<OwnedFd> {
    Ok(open_tree(CWD, at, OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC)?)
}

/// Closes descriptors of [`mounted_alone`] at leisure: the last one takes the mount with it, and the kernel waits for all
/// processors to have forgotten that, milliseconds for each.
pub fn let_go(mounts: Vec<OwnedFd>) {
    // Where there is no thread to be had, they are closed here.
    let _ = std::thread::Builder::new().name("haul-unmount".into()).spawn(move || drop(mounts));
}

/// Lets the program that `cmd` will start inherit `fd`, under the number that it has here, which is returned.
///
/// Only that child gets it: everywhere else the descriptor stays close-on-exec. It is closed here when `cmd` is
/// dropped, so that the other end of a pipe or socket pair sees the end when the child is gone.
pub fn pass_fd(cmd: &mut Command, fd: OwnedFd) -> i32 {
    let number = fd.as_raw_fd();
    // SAFETY: the closure runs in the forked child and makes one async-signal-safe system call, on a descriptor that
    // the closure itself owns and that therefore is open in the child.
    unsafe {
        cmd.pre_exec(move || check(libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, 0)));
    }
    number
}

fn mount(source: Option<&CStr>, target: &CStr, flags: libc::c_ulong) -> io::Result<()> {
    let source = source.map_or(std::ptr::null(), CStr::as_ptr);
    // SAFETY: both strings are NUL-terminated and live across the call; type and data may be null for these flags.
    check(unsafe { libc::mount(source, target.as_ptr(), std::ptr::null(), flags, std::ptr::null()) })
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes())
        .map_err(|source| io::Error::new(io::ErrorKind::InvalidInput, source))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::process::Stdio;

    fn output_of(mut child: Child) -> String {
        let mut text = String::new();
        child.stdout.take().unwrap().read_to_string(&mut text).unwrap();
        assert!(child.wait().unwrap().success());
        text
    }

    #[test]
    fn only_the_child_sees_its_binds() {
        let dir = tempfile::tempdir().unwrap();
        let (over, under, own) = (dir.path().join("over"), dir.path().join("under"), dir.path().join("own"));
        std::fs::write(&over, "over").unwrap();
        std::fs::write(&under, "under").unwrap();
        std::fs::write(&own, "own").unwrap();
        let mut cmd = Command::new("cat");
        cmd.arg(&under).arg("/proc/self/pagemap").stdout(Stdio::piped());
        let child = spawn_in_private_mounts(cmd, &[(over, under.clone())], Some(&own)).unwrap();
        assert_eq!(output_of(child), "overown");
        assert_eq!(std::fs::read_to_string(under).unwrap(), "under");
    }

    #[test]
    fn a_missing_source_is_an_error_and_leaves_no_child() {
        let cmd = Command::new("true");
        let binds = [(PathBuf::from("/nonexistent/source"), PathBuf::from("/tmp"))];
        let error = spawn_in_private_mounts(cmd, &binds, None).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn what_is_unmounted_where_mounts_are_shared_is_not_kept_busy_by_the_child() {
        let script = "mount -t tmpfs t /mnt && mount --make-shared /mnt && mkdir /mnt/in && touch /mnt/under && \
                      mount -t tmpfs t /mnt/in && echo ready && exec sleep 60";
        let mut host =
            Command::new("unshare").args(["-m", "sh", "-c", script]).stdout(Stdio::piped()).spawn().unwrap();
        let mut ready = [0; 6];
        host.stdout.as_mut().unwrap().read_exact(&mut ready).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let over = dir.path().join("over");
        std::fs::write(&over, "over").unwrap();
        let seen = run_in(crate::Pid::from_child(&host), || {
            let mut cmd = Command::new("sh");
            cmd.args(["-c", "read line; mountpoint -q /mnt/in && echo busy; cat /mnt/under"]);
            cmd.stdin(Stdio::piped()).stdout(Stdio::piped());
            let mut child = spawn_in_private_mounts(cmd, &[(over, "/mnt/under".into())], None)?;
            let outside = std::fs::read_to_string("/mnt/under");
            let unmounted = rustix::mount::unmount("/mnt/in", rustix::mount::UnmountFlags::empty());
            std::io::Write::write_all(&mut child.stdin.take().unwrap(), b"\n")?;
            Ok((outside?, unmounted, output_of(child)))
        });
        host.kill().unwrap();
        host.wait().unwrap();
        assert_eq!(seen.unwrap(), (String::new(), Ok(()), "over".to_owned()));
    }

    #[test]
    fn a_mount_is_seen_without_what_is_mounted_in_it() {
        let script = "mount -t tmpfs t /mnt && mkdir /mnt/in && mount -t tmpfs t /mnt/in && touch /mnt/in/deep && \
                      echo ready && exec sleep 60";
        let mut child =
            Command::new("unshare").args(["-m", "sh", "-c", script]).stdout(Stdio::piped()).spawn().unwrap();
        let mut ready = [0; 6];
        child.stdout.as_mut().unwrap().read_exact(&mut ready).unwrap();
        let pid = crate::Pid::from_child(&child);
        let alone = mounted_alone(pid, Path::new("/mnt"));
        let nothing = mounted_alone(pid, Path::new("/mnt/nothing"));
        child.kill().unwrap();
        child.wait().unwrap();
        let path = format!("/proc/self/fd/{}/in", alone.as_ref().unwrap().as_raw_fd());
        assert_eq!(std::fs::read_dir(path).unwrap().count(), 0);
        assert_eq!(nothing.unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn what_is_mounted_in_the_namespace_of_a_process_is_seen_there_alone() {
        let place = tempfile::tempdir().unwrap();
        let mut cmd = Command::new("sh");
        cmd.arg("-c").arg("read line && cat \"$0/file\"").arg(place.path());
        cmd.stdin(Stdio::piped()).stdout(Stdio::piped());
        enter_private_mounts_on_start(&mut cmd);
        let mut child = cmd.spawn().unwrap();
        let pid = crate::Pid::from_child(&child);
        let mounted = run_in(pid, || {
            rustix::mount::mount("t", place.path(), "tmpfs", rustix::mount::MountFlags::empty(), None)?;
            std::fs::write(place.path().join("file"), "there")
        });
        let here = std::fs::read_dir(place.path()).unwrap().count();
        std::io::Write::write_all(&mut child.stdin.take().unwrap(), b"\n").unwrap();
        let there = output_of(child);
        mounted.unwrap();
        assert_eq!((here, there.as_str()), (0, "there"));
        assert!(run_in(pid, || Ok(())).is_err(), "a process that is gone");
    }

    #[test]
    fn a_passed_descriptor_reaches_the_child_and_closes_with_the_command() {
        let (mut ours, theirs) = io::pipe().unwrap();
        let mut cmd = Command::new("sh");
        let number = pass_fd(&mut cmd, theirs.into());
        cmd.arg("-c").arg(format!("echo hello >&{number}"));
        assert!(cmd.status().unwrap().success());
        drop(cmd);
        let mut text = String::new();
        ours.read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello\n");
    }
}
