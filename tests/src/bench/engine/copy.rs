//! Copying a directory from host to host: `tar` on both sides of one TCP connection.
//!
//! It stands for `rsync`, which the machine may lack, and is faster than it: nothing is compared and nothing encrypted.

use crate::host::Host;
use crate::process::FLEET_VARIABLE;
use anyhow::{Context, Result, bail};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::fs::File;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

/// Copies all that is in `source` on one host into `target` on the other.
///
/// # Errors
/// A side could not be started, failed, or took longer than `limit`.
pub(super) fn copy(from: &Host, source: &Path, to: &Host, target: &Path, limit: Duration) -> Result<()> {
    std::fs::create_dir_all(target).with_context(|| format!("make {}", target.display()))?;
    let listener = inside(to, || TcpListener::bind((to.address(), 0)))?;
    let address = listener.local_addr()?;
    let sender = inside(from, || TcpStream::connect(address))?;
    let (receiver, _) = listener.accept()?;
    let start = |mode: &str, directory: &Path, input: Stdio, output: Stdio| {
        let mut command = Command::new("tar");
        command.args([mode, "--sparse", "--file=-", "-C"]).arg(directory).env(FLEET_VARIABLE, from.fleet());
        if mode == "--create" {
            command.arg(".");
        }
        command.stdin(input).stdout(output).stderr(Stdio::piped()).spawn().context("start tar")
    };
    let mut reader = start("--extract", target, OwnedFd::from(receiver).into(), Stdio::null())?;
    let mut writer = start("--create", source, Stdio::null(), OwnedFd::from(sender).into())?;
    for (child, what) in [(&mut writer, "the sending tar"), (&mut reader, "the receiving tar")] {
        super::end_within(child, what, limit)?;
    }
    for child in [writer, reader] {
        let output = child.wait_with_output()?;
        if !output.status.success() {
            bail!("copy {}: {}", source.display(), String::from_utf8_lossy(&output.stderr).trim());
        }
    }
    Ok(())
}

/// Makes a socket in a host's network namespace; it stays there wherever it is used.
fn inside<T: Send>(host: &Host, make: impl FnOnce() -> std::io::Result<T> + Send) -> Result<T> {
    let netns = File::open(Path::new("/run/netns").join(host.netns()))?;
    std::thread::scope(|scope| {
        let enter_and_make = || {
            move_into_link_name_space(netns.as_fd(), Some(LinkNameSpaceType::Network))?;
            make()
        };
        let made = scope.spawn(enter_and_make).join();
        made.ok().context("a thread panicked")?.context("make a socket")
    })
}
