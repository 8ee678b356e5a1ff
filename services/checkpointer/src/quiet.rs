//! Keeps a held container's network namespace silent: nothing gets in, nothing out, nobody is answered.
//!
//! CRIU locks packets out too, but only while it lives; then the kernel would acknowledge what clients send to the
//! frozen source, bytes that the target never gets, and would reset their connections when the source is ended.
//! Neither lock stops ARP, whose answers would lead switches and neighbours back here after the target has
//! announced itself.

use std::io::{self, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use haulage_sys::Pid;
use haulage_sys::netns::NetworkNamespace;

const ARP_IGNORE: &str = "/proc/sys/net/ipv4/conf/all/arp_ignore";
/// "Do not reply for all local addresses" (`ip-sysctl.rst` of the kernel's documentation).
const NEVER_REPLY: &str = "8";
/// Exists where the kernel has IPv6.
const IPV6: &str = "/proc/net/if_inet6";
const SHUT: &str = "*filter\n:HAULAGE - [0:0]\n-A HAULAGE -j DROP\n\
                    -I INPUT 1 -j HAULAGE\n-I OUTPUT 1 -j HAULAGE\nCOMMIT\n";
const OPEN: &str = "*filter\n-D INPUT -j HAULAGE\n-D OUTPUT -j HAULAGE\n-F HAULAGE\n-X HAULAGE\nCOMMIT\n";

fn in_namespace<T: Send>(init: i32, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    let init = Pid::from_raw(init).ok_or_else(|| io::Error::other("no such process"))?;
    NetworkNamespace::of(init)?.run(work)?
}

/// The present setting of `arp_ignore`.
pub(crate) fn present(init: i32) -> io::Result<String> {
    in_namespace(init, || Ok(std::fs::read_to_string(ARP_IGNORE)?.trim().to_owned()))
}

/// Silence. After an error there may be part of it, which [`restore`] ends.
pub(crate) fn hush(init: i32) -> io::Result<()> {
    in_namespace(init, || {
        std::fs::write(ARP_IGNORE, NEVER_REPLY)?;
        filters().try_for_each(|family| family.feed(SHUT))
    })
}

/// As before. Silence that was never complete is ended as far as it went.
///
/// # Errors
/// When packets may still be dropped: ask again.
pub(crate) fn restore(init: i32, setting: &str) -> io::Result<()> {
    in_namespace(init, || {
        filters().try_for_each(|family| match family.feed(OPEN) {
            Err(error) if family.is_shut()? => Err(error),
            // It was not shut, or has been opened before.
            _ => Ok(()),
        })?;
        std::fs::write(ARP_IGNORE, setting)
    })
}

/// The packet filter of one version of IP, in the thread's network namespace.
#[derive(Clone, Copy)]
struct Family {
    list: &'static str,
    restore: &'static str,
}

fn filters() -> impl Iterator<Item = Family> {
    let ipv4 = Family { list: "iptables", restore: "iptables-restore" };
    let ipv6 = Family { list: "ip6tables", restore: "ip6tables-restore" };
    // Without IPv6 there is nothing to shut.
    [ipv4].into_iter().chain(Path::new(IPV6).exists().then_some(ipv6))
}

impl Family {
    /// Feeds rules to it, in one transaction.
    fn feed(self, rules: &str) -> io::Result<()> {
        let mut child = Command::new(self.restore)
            .args(["--noflush", "--wait"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(rules.as_bytes())?;
        }
        let output = child.wait_with_output()?;
        if output.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        Err(io::Error::other(format!("{} ended with {}: {said}", self.restore, output.status)))
    }

    fn is_shut(self) -> io::Result<bool> {
        let list = Command::new(self.list)
            .args(["--wait", "-n", "-L", "HAULAGE"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()?;
        Ok(list.success())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::net::{TcpListener, TcpStream};
    use std::time::Duration;

    /// A process in a network namespace of its own, killed on drop.
    struct Container(std::process::Child);

    impl Container {
        fn start() -> Self {
            let mut child = Command::new("unshare")
                .args(["--net", "sh", "-c", "ip link set lo up && echo ready && exec sleep 60"])
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let mut ready = [0; 6];
            child.stdout.take().unwrap().read_exact(&mut ready).unwrap();
            Self(child)
        }

        fn pid(&self) -> i32 {
            i32::try_from(self.0.id()).unwrap()
        }
    }

    impl Drop for Container {
        fn drop(&mut self) {
            self.0.kill().unwrap();
            self.0.wait().unwrap();
        }
    }

    #[test]
    fn a_silent_namespace_takes_no_connection_until_it_is_restored() {
        let container = Container::start();
        let reaches = || {
            in_namespace(container.pid(), || {
                let listener = TcpListener::bind("127.0.0.1:0")?;
                Ok(TcpStream::connect_timeout(&listener.local_addr()?, Duration::from_millis(300)).is_ok())
            })
            .unwrap()
        };
        let before = present(container.pid()).unwrap();
        assert!(reaches());
        hush(container.pid()).unwrap();
        assert!(!reaches());
        assert_eq!(present(container.pid()).unwrap(), NEVER_REPLY);
        restore(container.pid(), &before).unwrap();
        assert!(reaches());
        restore(container.pid(), &before).unwrap();
        assert_eq!(present(container.pid()).unwrap(), before);
    }
}
