//! What whole-system tests have in common: a fleet with services, a Redis under load, and a look at where things are.

use crate::fleet::{Fleet, FleetBuilder};
use crate::host::{Host, LAN};
use crate::load::{Counter, Writer, wait_for_server};
use crate::process::finish;
use crate::{image, wait};
use anyhow::{Context, Result, ensure};
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

/// Answers that each client of a [`Redis`] must get before and after every move.
const ENOUGH: u64 = 100;

/// How long what runs after the end of a migration may take, such as the removal of a process.
const SETTLE: Duration = Duration::from_secs(5);

/// Starts a fleet with its services, runs a test on it, and takes it down.
///
/// # Errors
/// The fleet could not be started or removed, or the test failed; then the error holds the end of all logs.
pub fn system(builder: &FleetBuilder, test: impl FnOnce(&mut Fleet) -> Result<()>) -> Result<()> {
    let mut fleet = builder.start()?;
    fleet.start_services()?;
    if let Err(e) = test(&mut fleet) {
        let logs = fleet.services()?.logs(40);
        return Err(e.context(format!("the logs end:\n{logs}\nthe test failed")));
    }
    fleet.services()?.check_running()?;
    fleet.stop()
}

/// Runs a container on a host in the network that lets it keep its address, and gives that address.
///
/// # Errors
/// The engine refused.
pub fn run(fleet: &Fleet, host: usize, name: &str, index: u8, arguments: &[&str]) -> Result<SocketAddr> {
    let address = fleet.container_address(index);
    let ip = address.to_string();
    let all: Vec<&str> = ["run", "--detach", "--name", name, "--network", LAN, "--ip", &ip]
        .into_iter()
        .chain(arguments.iter().copied())
        .collect();
    fleet.host(host).docker(&all)?;
    Ok(SocketAddr::from((address, 6379)))
}

/// A Redis with two clients that never stop using it.
#[derive(Debug)]
pub struct Redis {
    server: SocketAddr,
    counter: Counter,
    writer: Writer,
}

impl Redis {
    /// Runs one on a host, with more arguments for `docker run` before the image, and puts it under load.
    ///
    /// # Errors
    /// It could not be started or does not answer.
    pub fn start(fleet: &Fleet, host: usize, name: &str, index: u8, arguments: &[&str]) -> Result<Self> {
        let all: Vec<&str> = arguments.iter().copied().chain([image::REDIS]).collect();
        let server = run(fleet, host, name, index, &all)?;
        wait_for_server(server)?;
        let (counter, writer) = (Counter::start(server, "count")?, Writer::start(server, "written")?);
        let redis = Self { server, counter, writer };
        redis.carries_on()?;
        Ok(redis)
    }

    /// The server's address.
    #[must_use]
    pub fn server(&self) -> SocketAddr {
        self.server
    }

    /// Waits until both clients have got more answers since now, over the connections they have had from the start.
    ///
    /// # Errors
    /// One has lost its connection or got a wrong answer.
    pub fn carries_on(&self) -> Result<()> {
        self.counter.progress(ENOUGH).context("the counting client")?;
        self.writer.progress(ENOUGH).context("the writing client")
    }

    /// Stops the clients and checks all that they have seen; gives the longest wait for an answer.
    ///
    /// # Errors
    /// An answer was wrong, a connection was lost, or an acknowledged write is missing.
    pub fn finish(self) -> Result<Duration> {
        let counted = self.counter.stop()?;
        counted.check().context("the counting client")?;
        let (written, missing) = self.writer.stop()?;
        written.check().context("the writing client")?;
        ensure!(missing == 0, "{missing} of {} acknowledged writes are missing", written.answers);
        Ok(counted.longest_gap.max(written.longest_gap))
    }
}

/// Fails unless the container of this name runs on one host and the other does not know it.
///
/// # Errors
/// It is on both, on neither, or on the wrong one.
pub fn only_on(fleet: &Fleet, name: &str, host: usize) -> Result<()> {
    for (index, other) in fleet.hosts().iter().enumerate() {
        let (known, runs) = (other.has_container(name)?, other.is_running(name)?);
        let wanted = index == host;
        ensure!(
            known == wanted && runs == wanted,
            "{name} shall be on {} only, but {} says: known {known}, running {runs}",
            fleet.host(host).name(),
            other.name()
        );
    }
    Ok(())
}

/// Has the host's own CRIU, in its mount namespace only, fail when it has made the processes of a restore
/// (`FI_POST_RESTORE` of its `criu/include/fault-injection.h`). The one that restores is known by who started it: the
/// gate, which is `haul-runtime`. For all else it is the real one.
const BREAK: &str = r#"
set -e
real=$(readlink -f "$(command -v criu)")
cp "$real" "$1/criu.real"
cat > "$1/criu.broken" <<END
#!/bin/sh
case "\$(readlink /proc/\$PPID/exe)" in
*/haul-runtime) export CRIU_FAULT=6 ;;
esac
exec "$1/criu.real" "\$@"
END
chmod 755 "$1/criu.broken"
mount --bind "$1/criu.broken" "$real"
"#;

/// Has every restore on `host` fail after CRIU has made the processes; all else of CRIU's works.
///
/// # Errors
/// When CRIU cannot be replaced there.
pub fn break_restores_on(host: &Host) -> Result<()> {
    finish(host.command(Path::new("sh")).args(["-c", BREAK, "break"]).arg(host.directory())).map(drop)
}

/// Fails unless nothing of any migration is left on a host: state, armed restores, mounts, CRIU processes.
///
/// # Errors
/// Something is left; the error names it.
pub fn nothing_left_on(host: &Host) -> Result<()> {
    let mut left = Vec::new();
    let settled = wait::until("a clean host", SETTLE, || {
        left = leftovers_on(host)?;
        Ok(left.is_empty().then_some(()))
    });
    ensure!(left.is_empty(), "left on {}:\n{}", host.name(), left.join("\n"));
    settled
}

/// The look at a host, from inside its namespaces.
const LOOK: &str = "
find \"$1/migrations\" -mindepth 1 2>/dev/null | sed 's/^/state: /'
find /run/haul -mindepth 2 2>/dev/null | sed 's/^/run: /'
find /run -maxdepth 1 -name 'haul-*' | sed 's/^/pages: /'
awk '$5 ~ /haul|pagemap|criu/ && $5 !~ /^.(run.netns|opt.haulage)./ && index($5, root) != 1 { print \"mount: \" $5 }' root=\"$2\" /proc/self/mountinfo
ours=$(readlink /proc/self/ns/net)
for process in /proc/[0-9]*; do
    case $(cat $process/comm 2>/dev/null) in
    criu | haul-runtime | haul-page-serve | runc | iptables-resto* | ip6tables-rest*)
        # One that a service has started may be in the network of a container.
        parent=/proc/$(awk '$1 == \"PPid:\" { print $2 }' $process/status 2>/dev/null)
        [ \"$(readlink $process/ns/net)\" != \"$ours\" ] && [ \"$(readlink $parent/ns/net)\" != \"$ours\" ] ||
            echo \"process: $(tr '\\0' ' ' <$process/cmdline)\" ;;
    haul-*)
        [ \"$(readlink $process/ns/net)\" = \"$ours\" ] && readlink $process/fd/* | grep -F userfaultfd
        ;;
    esac
done
true";

fn leftovers_on(host: &Host) -> Result<Vec<String>> {
    let mut command = host.command(Path::new("sh"));
    command.args(["-c", LOOK, "look"]).arg(host.state_dir()).arg(host.directory());
    Ok(finish(&mut command)?.lines().map(str::to_owned).collect())
}
