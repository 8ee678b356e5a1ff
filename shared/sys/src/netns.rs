//! Running code inside another network namespace.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

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

    /// Runs `work` inside the namespace, on a thread made for it, and returns what it returns.
    ///
    /// Sockets that `work` makes stay in the namespace wherever they are used afterwards, and `/proc/sys/net` is the
    /// namespace's. Mounts, `/sys` among them, are as everywhere in this process.
    ///
    /// # Errors
    /// When no thread can be started or the namespace cannot be entered (`CAP_SYS_ADMIN`); `work` has not run then.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> io::Result<T> {
        let enter_and_work = || -> io::Result<T> {
            rustix::thread::move_into_link_name_space(self.0.as_fd(), Some(LinkNameSpaceType::Network))?;
            Ok(work())
        };
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().name("haul-netns".into());
            match thread.spawn_scoped(scope, enter_and_work)?.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

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
        assert_eq!(namespace.unwrap().run(read).unwrap(), "8\n");
        assert_eq!(read(), here);
        assert_ne!(here, "8\n");
    }
}
