//! A container's changed files and its volume arrive as they were.

use anyhow::{Result, ensure};
use haulage_tests::fleet::Fleet;
use haulage_tests::image;
use haulage_tests::scenario::{only_on, run, system};

/// Makes files of every sort, in the writable layer and in the volume, and then writes on for ever.
const WORK: &str = "
set -e
for at in /data /volume; do
    cd $at
    echo changed > file && chmod 640 file && chown 999:999 file && touch -t 202001020304.05 file
    ln file hard && ln -s nowhere/at/all soft
    mkdir -p deep/er && chmod 1777 deep && echo x > deep/er/inner
    mkfifo pipe && : > empty && dd if=/dev/zero of=sparse bs=1 count=1 seek=9999999 2>/dev/null
    echo spaces > 'a name with spaces'
done
echo other > /etc/group
rm /etc/passwd /bin/wget
rm -r /sys-like 2>/dev/null || true
touch /data/ready
i=0
while :; do i=$((i + 1)); echo $i >> /data/log; echo $i >> /volume/log; usleep 20000; done";

/// What a tree is: kinds, modes, owners, sizes, times, link counts, targets and content.
const DESCRIBE: &str = "
for at in /data /volume; do
    find $at ! -name log -exec stat -c '%n %F %a %u:%g %s %h %Y' {} + | grep -v '^/data directory\\|^/volume directory' | sort
    for f in file hard soft deep/er/inner empty sparse 'a name with spaces'; do
        [ -L $at/\"$f\" ] && readlink $at/\"$f\" || md5sum $at/\"$f\"
    done
    [ $(stat -c %i $at/file) = $(stat -c %i $at/hard) ] && echo $at: one file with two names
done
cat /etc/group
ls /etc/passwd /bin/wget 2>&1 | sort
ls /bin | md5sum";

#[test]
fn changed_deleted_and_linked_files_and_a_volume_arrive() -> Result<()> {
    system(&Fleet::builder(), |fleet| {
        let source = fleet.host(0);
        source.docker(&["volume", "create", "--label", "kept=yes", "store"])?;
        run(fleet, 0, "files", 0, &["--volume", "store:/volume", image::BUSYBOX, "sh", "-c", WORK])?;
        haulage_tests::wait::until("the files", std::time::Duration::from_secs(10), || {
            Ok(source.docker(&["exec", "files", "sh", "-c", "[ -e /data/ready ]"]).ok())
        })?;
        let before = source.docker(&["exec", "files", "sh", "-c", DESCRIBE])?;
        ensure!(before.matches("one file with two names").count() == 2, "not as intended:\n{before}");

        for (from, to) in [(0, 1), (1, 0)] {
            fleet.migrate("files", from, to)?.committed()?;
            only_on(fleet, "files", to)?;
            let target = fleet.host(to);
            let after = target.docker(&["exec", "files", "sh", "-c", DESCRIBE])?;
            ensure!(before == after, "before:\n{before}\nafter the move to {to}:\n{after}");
            for log in ["/data/log", "/volume/log"] {
                check_log(&target.docker(&["exec", "files", "cat", log])?)?;
            }
            let label = target.docker(&["volume", "inspect", "--format", "{{.Labels.kept}}", "store"])?;
            ensure!(label == "yes", "the volume's label is {label}");
        }
        Ok(())
    })
}

/// The log must hold 1, 2, 3, … with nothing missing or twice, and go on.
fn check_log(log: &str) -> Result<()> {
    ensure!(log.lines().count() > 10, "the log is too short: {log}");
    for (expected, line) in (1..).zip(log.lines()) {
        ensure!(line == expected.to_string(), "line {expected} of the log is {line:?}");
    }
    Ok(())
}
