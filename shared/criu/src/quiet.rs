//! Keeps a network namespace silent: nothing gets in, nothing out, nobody is answered. On the source that of a
//! container that is held; on the target one that is made before the container is there.
//!
//! CRIU locks packets out too, but only while it lives; then the kernel would acknowledge what clients send to the
//! frozen source, bytes that the target never gets, and would reset their connections when the source is ended.
//! Neither lock stops ARP, whose answers would lead switches and neighbours back here after the target has
//! announced itself.

use std::io::{self, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use haulage_sys::Pid;
use haulage_sys::netns::NetworkNamespace;

const ARP_IGNORE: &str = "/proc/sys/net/ipv4/conf/all/arp_ignore";
/// "Do not reply for all local addresses" (`ip-sysctl.rst` of the kernel's documentation).
const NEVER_REPLY: &str = "8";
/// Exists where the kernel has IPv6.
const IPV6: &str = "/proc/net/if_inet6";
/// CRIU puts a connection that is half closed back by sending it the end of the stream, with this mark (`SOCCR_MARK`),
/// which its own lock lets through too.
const SHUT: &str = "*filter\n:HAULAGE - [0:0]\n-A HAULAGE -m mark --mark 0xC114 -j ACCEPT\n-A HAULAGE -j DROP\n\
                    -I INPUT 1 -j HAULAGE\n-I OUTPUT 1 -j HAULAGE\nCOMMIT\n";
const OPEN: &str = "*filter\n-D INPUT -j HAULAGE\n-D OUTPUT -j HAULAGE\n-F HAULAGE\n-X HAULAGE\nCOMMIT\n";
const OPEN_OUT: &str = "*filter\n-D OUTPUT -j HAULAGE\nCOMMIT\n";
const OPEN_IN: &str = "*filter\n-D INPUT -j HAULAGE\n-F HAULAGE\n-X HAULAGE\nCOMMIT\n";

/// The namespace of process `init`.
///
/// # Errors
/// When there is no such process.
pub fn namespace_of(init: i32) -> io::Result<NetworkNamespace> {
    NetworkNamespace::of(Pid::from_raw(init).ok_or_else(|| io::Error::other("no such process"))?)
}

/// The present setting of `arp_ignore`.
///
/// # Errors
/// When the namespace cannot be entered or asked.
pub fn present(namespace: &NetworkNamespace) -> io::Result<String> {
    namespace.run(|| Ok(std::fs::read_to_string(ARP_IGNORE)?.trim().to_owned()))?
}

/// A packet filter that is about to be changed: its program is started and waits for its rules. What is left of a
/// change that is given up changes nothing.
#[derive(Debug)]
pub struct Change {
    families: Vec<(Family, Child)>,
    rules: &'static str,
}

impl Change {
    /// Prepares to silence a namespace.
    ///
    /// # Errors
    /// When the programs cannot be started in it.
    pub fn to_silence(namespace: &NetworkNamespace) -> io::Result<Self> {
        Self::prepare(namespace, SHUT)
    }

    /// Prepares to let packets out, the first half of the end of the silence.
    ///
    /// # Errors
    /// As [`Self::to_silence`].
    pub fn to_send(namespace: &NetworkNamespace) -> io::Result<Self> {
        Self::prepare(namespace, OPEN_OUT)
    }

    /// Prepares to let packets in, the other half.
    ///
    /// # Errors
    /// As [`Self::to_silence`].
    pub fn to_hear(namespace: &NetworkNamespace) -> io::Result<Self> {
        Self::prepare(namespace, OPEN_IN)
    }

    fn prepare(namespace: &NetworkNamespace, rules: &'static str) -> io::Result<Self> {
        let start = || filters().map(|family| Ok((family, family.start()?))).collect::<io::Result<Vec<_>>>();
        let families = namespace.run(start)?;
        Ok(Self { families: families?, rules })
    }

    /// Whether it can be made still: the programs wait.
    pub fn is_ready(&mut self) -> bool {
        self.families.iter_mut().all(|(_, child)| matches!(child.try_wait(), Ok(None)))
    }

    /// Changes it. After an error part of it may be done.
    fn commit(&mut self) -> io::Result<()> {
        // All are fed before one is waited for.
        for (_, child) in &mut self.families {
            if let Some(mut stdin) = child.stdin.take() {
                stdin.write_all(self.rules.as_bytes())?;
            }
        }
        self.families.drain(..).try_for_each(|(family, child)| family.finish(child))
    }
}

impl Drop for Change {
    fn drop(&mut self) {
        for (_, child) in &mut self.families {
            // It may have ended by itself.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Silence, from now on: no packet gets in or out, and nobody is answered.
///
/// # Errors
/// There may be part of it then, which [`restore`] ends.
pub fn hush(namespace: &NetworkNamespace, mut change: Change) -> io::Result<()> {
    namespace.run(|| std::fs::write(ARP_IGNORE, NEVER_REPLY))??;
    change.commit()
}

/// Lets a silent namespace be asked for by ARP as `setting` says. No packet gets in or out all the same.
///
/// # Errors
/// When the namespace cannot be entered or changed.
pub fn answer(namespace: &NetworkNamespace, setting: &str) -> io::Result<()> {
    namespace.run(|| std::fs::write(ARP_IGNORE, setting))?
}

/// The end of [`answer`].
///
/// # Errors
/// As that.
pub fn never_answer(namespace: &NetworkNamespace) -> io::Result<()> {
    answer(namespace, NEVER_REPLY)
}

/// Whether [`hush`] was complete, and is.
///
/// # Errors
/// When it cannot be found out.
pub fn is_silent(namespace: &NetworkNamespace) -> io::Result<bool> {
    namespace.run(|| filters().try_fold(true, |all, family| Ok(all && family.is_shut()?)))?
}

/// Lets packets out of a namespace that is silent, and not in. What the kernel sends by itself are the bytes that a
/// connection had when it was dumped, and they must find their way while it is restored: a segment that the filter
/// refuses is tried again after a second.
///
/// # Errors
/// Packets may still be dropped then.
pub fn send(mut to_send: Change) -> io::Result<()> {
    to_send.commit()
}

/// Ends the silence of a namespace that may send already.
///
/// # Errors
/// Packets may still be dropped then.
pub fn hear(namespace: &NetworkNamespace, mut to_hear: Change, setting: &str) -> io::Result<()> {
    to_hear.commit()?;
    answer(namespace, setting)
}

/// As before. Silence that was never complete is ended as far as it went.
///
/// # Errors
/// When packets may still be dropped: ask again.
pub fn restore(namespace: &NetworkNamespace, setting: &str) -> io::Result<()> {
    namespace.run(|| {
        filters().try_for_each(|family| match family.start().and_then(|child| family.feed(child, OPEN)) {
            Err(error) if family.is_shut()? => Err(error),
            // It was not shut, or has been opened before.
            _ => Ok(()),
        })?;
        std::fs::write(ARP_IGNORE, setting)
    })?
}

/// The packet filter of one version of IP, in the thread's network namespace.
#[derive(Debug, Clone, Copy)]
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
    /// Starts its program, in the thread's network namespace. It takes its rules in one transaction.
    fn start(self) -> io::Result<Child> {
        Command::new(self.restore)
            .args(["--noflush", "--wait"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
    }

    fn feed(self, mut child: Child, rules: &str) -> io::Result<()> {
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(rules.as_bytes())?;
        }
        self.finish(child)
    }

    fn finish(self, child: Child) -> io::Result<()> {
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
        let namespace = namespace_of(container.pid()).unwrap();
        let reaches = || {
            let tried = namespace.run(|| {
                let listener = TcpListener::bind("127.0.0.1:0").unwrap();
                let address = listener.local_addr().unwrap();
                TcpStream::connect_timeout(&address, Duration::from_millis(300)).is_ok()
            });
            tried.unwrap()
        };
        let before = present(&namespace).unwrap();
        assert!(reaches());
        drop(Change::to_silence(&namespace).unwrap());
        assert!(reaches(), "a change that was given up changes nothing");
        hush(&namespace, Change::to_silence(&namespace).unwrap()).unwrap();
        assert!(!reaches() && is_silent(&namespace).unwrap());
        assert_eq!(present(&namespace).unwrap(), NEVER_REPLY);
        let to_hear = Change::to_hear(&namespace).unwrap();
        send(Change::to_send(&namespace).unwrap()).unwrap();
        assert!(!reaches() && is_silent(&namespace).unwrap(), "it hears nothing yet");
        hear(&namespace, to_hear, &before).unwrap();
        assert!(reaches());
        hush(&namespace, Change::to_silence(&namespace).unwrap()).unwrap();
        restore(&namespace, &before).unwrap();
        assert!(reaches() && !is_silent(&namespace).unwrap());
        restore(&namespace, &before).unwrap();
        assert_eq!(present(&namespace).unwrap(), before);
    }
}
