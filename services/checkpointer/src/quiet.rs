//! Keeps a held container's network namespace from answering for its addresses.
//!
//! Its packets are locked out while it is held, but the kernel still answers ARP for it, which would lead
//! switches and neighbours back here after the target has announced itself.

use std::io;

use haulage_sys::Pid;
use haulage_sys::netns::NetworkNamespace;

const ARP_IGNORE: &str = "/proc/sys/net/ipv4/conf/all/arp_ignore";
/// "Do not reply for all local addresses" (`ip-sysctl.rst` of the kernel's documentation).
const NEVER_REPLY: &str = "8";

fn in_namespace<T: Send>(init: i32, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    let init = Pid::from_raw(init).ok_or_else(|| io::Error::other("no such process"))?;
    NetworkNamespace::of(init)?.run(work)?
}

/// The present setting.
pub(crate) fn present(init: i32) -> io::Result<String> {
    in_namespace(init, || Ok(std::fs::read_to_string(ARP_IGNORE)?.trim().to_owned()))
}

/// No more answers.
pub(crate) fn hush(init: i32) -> io::Result<()> {
    in_namespace(init, || std::fs::write(ARP_IGNORE, NEVER_REPLY))
}

/// Answers as before.
pub(crate) fn restore(init: i32, setting: &str) -> io::Result<()> {
    in_namespace(init, || std::fs::write(ARP_IGNORE, setting))
}
