//! What is on the machine, before and after a fleet: nothing may be left.

use crate::process::run;
use crate::wait;
use anyhow::Result;
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::Duration;

/// Programs whose processes a fleet starts, directly or not.
const PROGRAMS: [&str; 14] = [
    "conmon",
    "containerd",
    "containerd-shim",
    "criu",
    "dirtier",
    "docker-proxy",
    "dockerd",
    "haul",
    "haul-",
    "nats-server",
    "podman",
    "redis-server",
    "runc",
    "tar",
];

/// Directories in which a fleet's programs may leave something, each with the depth to look at.
const DIRECTORIES: [(&str, u8); 12] = [
    ("/run", 1),
    ("/run/containerd", 2),
    ("/run/docker", 2),
    ("/run/haul", 3),
    ("/run/netns", 1),
    ("/run/runc", 2),
    ("/var/lib/containerd", 1),
    ("/var/lib/docker", 1),
    ("/var/lib/haul", 2),
    ("/etc/docker", 1),
    ("/var/tmp", 1),
    ("/tmp", 1),
];

/// A state of the machine: one line for each mount, link, cgroup, process and directory entry that matters.
#[derive(Debug, Clone)]
pub struct Snapshot(BTreeSet<String>);

impl Snapshot {
    /// Looks at the machine.
    ///
    /// # Errors
    /// `/proc` or `ip` does not answer.
    pub fn take() -> Result<Self> {
        let mut all = BTreeSet::new();
        for line in fs::read_to_string("/proc/self/mountinfo")?.lines() {
            all.extend(line.split(' ').nth(4).map(|point| format!("mount {point}")));
        }
        for line in run("ip", &["-o", "link"])?.lines() {
            // A link whose other end is in another namespace is told as `name@number`.
            let name = line.split(": ").nth(1).and_then(|name| name.split('@').next());
            all.extend(name.map(|name| format!("link {name}")));
        }
        add_cgroups(Path::new("/sys/fs/cgroup"), &mut all);
        add_processes(&mut all)?;
        for (directory, depth) in DIRECTORIES {
            add_entries(Path::new(directory), depth, &mut all);
        }
        Ok(Self(all))
    }

    /// What has come since `before`, leaving out what belongs to other fleets, which may run at the same time.
    #[must_use]
    pub fn added_since(&self, before: &Self, fleet: &str) -> Vec<String> {
        self.0.difference(&before.0).filter(|line| !is_of_another_fleet(line, fleet)).cloned().collect()
    }
}

/// Waits until nothing is left that was not there `before`, at most `limit`, and gives what is left.
///
/// # Errors
/// The machine cannot be looked at.
pub fn left_since(before: &Snapshot, fleet: &str, limit: Duration) -> Result<Vec<String>> {
    let mut left = Vec::new();
    let waited = wait::until("a clean machine", limit, || {
        left = Snapshot::take()?.added_since(before, fleet);
        Ok(left.is_empty().then_some(()))
    });
    match waited {
        Ok(()) => Ok(Vec::new()),
        Err(e) if left.is_empty() => Err(e),
        Err(_) => Ok(left),
    }
}

/// Whether a line names a fleet (`haul-` and four hexadecimal digits), and only others than the given one.
fn is_of_another_fleet(line: &str, fleet: &str) -> bool {
    let named = |start: usize| -> Option<&str> {
        let name = line.get(start..start + "haul-".len() + 4)?;
        name.bytes().skip("haul-".len()).all(|b| b.is_ascii_hexdigit()).then_some(name)
    };
    let names: Vec<&str> = line.match_indices("haul-").filter_map(|(start, _)| named(start)).collect();
    !names.is_empty() && !names.contains(&fleet)
}

fn add_cgroups(at: &Path, all: &mut BTreeSet<String>) {
    // A cgroup can vanish while it is read.
    let Ok(entries) = fs::read_dir(at) else { return };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            all.insert(format!("cgroup {}", entry.path().display()));
            add_cgroups(&entry.path(), all);
        }
    }
}

fn add_processes(all: &mut BTreeSet<String>) -> Result<()> {
    for entry in fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let Ok(name) = fs::read_to_string(entry.path().join("comm")) else { continue };
        let name = name.trim_end();
        if !PROGRAMS
            .iter()
            .any(|program| name == *program || (program.len() > 4 && name.starts_with(program)))
        {
            continue;
        }
        let read = |file: &str| fs::read(entry.path().join(file)).unwrap_or_default();
        let command = String::from_utf8_lossy(&read("cmdline")).replace('\0', " ");
        let groups = String::from_utf8_lossy(&read("cgroup")).replace('\n', " ");
        let environment = read("environ");
        let fleet = environment.split(|b| *b == 0).find(|part| part.starts_with(b"HAULAGE_FLEET="));
        let fleet = String::from_utf8_lossy(fleet.unwrap_or_default()).into_owned();
        all.insert(format!("process {pid} {name}: {command} [{fleet} {groups}]"));
    }
    Ok(())
}

fn add_entries(at: &Path, depth: u8, all: &mut BTreeSet<String>) {
    let Ok(entries) = fs::read_dir(at) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        // Everyone uses /tmp; what Haulage and its tools would leave there is known by name.
        if at == Path::new("/tmp")
            && !["haul", "criu", "docker", "runc", "nats"].iter().any(|s| name.contains(s))
        {
            continue;
        }
        all.insert(format!("file {}", entry.path().display()));
        if depth > 1 && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            add_entries(&entry.path(), depth - 1, all);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_lines_that_name_another_fleet_are_left_out() {
        assert!(is_of_another_fleet("mount /run/netns/haul-12ab-a", "haul-0001"));
        assert!(!is_of_another_fleet("mount /run/netns/haul-0001-a", "haul-0001"));
        assert!(!is_of_another_fleet("file /run/haul-something", "haul-0001"));
        assert!(!is_of_another_fleet("process 7 haul-syncer: haul-syncer --host host-a", "haul-0001"));
    }
}
