//! Running code inside another network namespace.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc;

use rustix::thread::LinkNameSpaceType;

use crate::Pid;

/// A network namespace, held open: it exists at least as long as this does.
#[derive(Debug)]
pub struct NetworkNamespace(OwnedFd);

impl NetworkNamespace {
    /// The namespace in which `pid` is.
    ///
    /// # Errors
    /// `NotFound` when there is no such process.
    pub fn of(pid: Pid) -> io::Result<Self> {
        Self::at(Path::new(&format!("/proc/{pid}/ns/net")))
    }

    /// The namespace that a file names: a link under `/proc/<pid>/ns`, or a bind mount of one.
    ///
    /// # Errors
    /// When the file cannot be opened.
    pub fn at(path: &Path) -> io::Result<Self> {
        Ok(Self(File::open(path)?.into()))
    }

    /// Makes a new namespace, in which there is nothing but a thread that does nothing: whoever is told its id finds the
    /// namespace under `/proc/<id>/ns/net`.
    ///
    /// # Errors
    /// When no thread can be started or no namespace made (`CAP_SYS_ADMIN`).
    pub fn create() -> io::Result<(Self, Occupant)> {
        let (stay, leave) = mpsc::channel::<()>();
        let (tell, told) = mpsc::channel();
        std::thread::Builder::new().name("haul-netns".into()).spawn(move || {
            // SAFETY: this changes the network namespace of the calling thread, which is ours and does nothing else.
            let made = match unsafe { libc::unshare(libc::CLONE_NEWNET) } {
                -1 => Err(io::Error::last_os_error()),
                _ => Self::at(Path::new("/proc/thread-self/ns/net")),
            };
            // If nobody listens any more there is nobody to stay for either.
            if tell.send(made.map(|namespace| (namespace, rustix::thread::gettid()))).is_ok() {
                let _ = leave.recv();
            }
        })?;
        let (namespace, tid) = told.recv().map_err(io::Error::other)??;
        Ok((namespace, Occupant { tid, _stay: stay }))
    }

    /// A path under which any process with the right to can open the namespace, for as long as this exists.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd()))
    }

    /// Moves the calling thread into the namespace, for good.
    ///
    /// # Errors
    /// When it cannot be entered (`CAP_SYS_ADMIN`).
    pub fn enter(&self) -> io::Result<()> {
        Ok(rustix::thread::move_into_link_name_space(self.0.as_fd(), Some(LinkNameSpaceType::Network))?)
    }

    /// Has the program that `command` will start run inside the namespace. An error shows when it is started.
    pub fn enter_on_start(self, command: &mut Command) {
        let enter = move || self.enter();
        // SAFETY: the closure runs in the forked child, where only async-signal-safe calls are allowed: it makes one
        // plain system call, on a descriptor that it owns.
        unsafe { command.pre_exec(enter) };
    }

    /// Runs `work` inside the namespace, on a thread made for it, and returns what it returns.
    ///
    /// Sockets that `work` makes stay in the namespace wherever they are used afterwards, and `/proc/sys/net` is the
    /// namespace's. Mounts, `/sys` among them, are as everywhere in this process.
    ///
    /// # Errors
    /// When no thread can be started or the namespace cannot be entered (`CAP_SYS_ADMIN`); `work` has not run then.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> io::Result<T> {
        run_on_a_thread("haul-netns", || self.enter(), work)
    }
}

/// Runs `work` on a thread of that name, once it has been able to `enter`, and returns what it returns.
pub(crate) fn run_on_a_thread<T: Send>(
    name: &str,
    enter: impl FnOnce() -> io::Result<()> + Send,
    work: impl FnOnce() -> T + Send,
) -> io::Result<T> {
    let enter_and_work = || -> io::Result<T> {
        enter()?;
        Ok(work())
    };
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name(name.into());
        match thread.spawn_scoped(scope, enter_and_work)?.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

/// A thread that is in a new namespace until this is dropped.
#[derive(Debug)]
pub struct Occupant {
    tid: Pid,
    _stay: mpsc::Sender<()>,
}

impl Occupant {
    /// The thread's id, which `/proc` knows as it does a process's.
    #[must_use]
    pub fn id(&self) -> Pid {
        self.tid
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Stdio;

    #[test]
    fn work_runs_in_the_other_namespace_and_we_stay_here() {
        let mut child = Command::new("unshare")
            .args([
                "-n",
                "sh",
                "-c",
                "echo 8 >/proc/sys/net/ipv4/conf/lo/arp_ignore; echo ready; exec sleep 60",
            ])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut ready = [0; 6];
        io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut ready).unwrap();
        let namespace = NetworkNamespace::of(Pid::from_child(&child));
        child.kill().unwrap();
        child.wait().unwrap();
        let read = || std::fs::read_to_string("/proc/sys/net/ipv4/conf/lo/arp_ignore").unwrap();
        let here = read();
        let namespace = namespace.unwrap();
        assert_eq!(namespace.run(read).unwrap(), "8\n");
        assert_eq!(read(), here);
        let mut cat = Command::new("cat");
        namespace.enter_on_start(cat.arg("/proc/sys/net/ipv4/conf/lo/arp_ignore"));
        assert_eq!(cat.output().unwrap().stdout, b"8\n");
        assert_ne!(here, "8\n");
    }

    #[test]
    fn a_new_namespace_is_its_own_and_outlives_its_occupant() {
        let (namespace, occupant) = NetworkNamespace::create().unwrap();
        let link = |path: &Path| std::fs::read_link(path).unwrap();
        let there = link(Path::new(&format!("/proc/{}/ns/net", occupant.id())));
        assert_ne!(there, link(Path::new("/proc/self/ns/net")));
        drop(occupant);
        let seen = namespace.run(|| link(Path::new("/proc/thread-self/ns/net"))).unwrap();
        assert_eq!(seen, there);
        let again = NetworkNamespace::at(&namespace.path()).unwrap();
        assert_eq!(again.run(|| link(Path::new("/proc/thread-self/ns/net"))).unwrap(), there);
    }
}
