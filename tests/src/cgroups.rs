//! Who makes the cgroups of the containers: the hosts' engines themselves, or the machine's systemd for them.
//!
//! On cgroup v2 with systemd, which is what Debian has, an engine of an ordinary host leaves them to systemd. The fleet
//! does so where `HAULAGE_TEST_CGROUPS` is `systemd`; otherwise its engines make them, which works everywhere.

use std::sync::LazyLock;

/// Whether systemd makes them.
static SYSTEMD: LazyLock<bool> =
    LazyLock::new(|| std::env::var("HAULAGE_TEST_CGROUPS").is_ok_and(|driver| driver == "systemd"));

/// What dockerd is told. The janitor finds the containers' processes by the fleet's name in the path of the cgroup.
pub(crate) fn engine_arguments(fleet: &str, letter: char) -> [String; 2] {
    let (driver, parent) = match *SYSTEMD {
        true => ("systemd", format!("{fleet}-{letter}.slice")),
        false => ("cgroupfs", format!("/{fleet}/host-{letter}")),
    };
    [format!("--exec-opt=native.cgroupdriver={driver}"), format!("--cgroup-parent={parent}")]
}

/// Shell that mounts a `/run` of the host's own, in which the machine's systemd is heard where it is needed.
pub(crate) fn own_run() -> &'static str {
    match *SYSTEMD {
        true => {
            "new=$(mktemp -d) && mount -t tmpfs -o mode=755 tmpfs \"$new\" && mkdir \"$new/systemd\" \"$new/dbus\" &&
             mount --bind /run/systemd \"$new/systemd\" && mount --bind /run/dbus \"$new/dbus\" &&
             mount -n --move \"$new\" /run && rmdir \"$new\""
        }
        false => "mount -t tmpfs -o mode=755 tmpfs /run",
    }
}
