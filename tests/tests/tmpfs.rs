//! Files in tmpfs mounts of a container move with it, and belong to it alone afterwards.

use anyhow::{Context, Result, ensure};
use haulage_tests::fleet::Fleet;
use haulage_tests::host::Host;
use haulage_tests::scenario::{nothing_left_on, only_on, run, system};
use haulage_tests::{dirtier, image, process};
use std::path::Path;

/// Files of every sort in all mounts, beside those of the program.
const MAKE: &str = "
set -e
for at in /dev/shm /scratch /packed; do
    cd $at
    dd if=/dev/urandom of=plain bs=1M count=16 2>/dev/null
    chmod 640 plain && chown 999:998 plain && touch -t 202001020304.05 plain
    ln plain hard && ln -s nowhere/at/all soft
    mkdir -p deep/er && echo x > deep/er/inner && chmod 1777 deep && touch -t 202101020304.05 deep/er
    mkfifo pipe && : > empty && dd if=/dev/zero of=sparse bs=1 count=1 seek=9999999 2>/dev/null
    echo spaces > 'a name with spaces'
done
echo volume > /scratch/inner/file";

/// What the mounts are, and what is in them but for what the program changes. CRIU binds sockets anew, and makes what was
/// deleted for a moment, which shows in the times of the socket and of its directory.
const DESCRIBE: &str = "
grep -E ' (/dev/shm|/scratch|/packed) ' /proc/mounts | sed 's/^[^ ]* //'
for at in /dev/shm /scratch /packed; do
    stat -c '%n %F %a %u:%g' $at
    find $at -mindepth 1 ! -name brief ! -name mapped ! -name socket -exec stat -c '%n %F %a %u:%g %s %h %Y' {} + | sort
    find $at -type f ! -name brief ! -name mapped -exec md5sum {} + | sort
    readlink $at/soft
    [ $(stat -c %i $at/plain) = $(stat -c %i $at/hard) ] && echo $at: one file with two names
done";

/// The mounts of a kind that the host itself sees.
fn mounts_of(host: &Host) -> Result<Vec<String>> {
    let mut table = host.command(Path::new("cat"));
    let table = process::finish(table.arg("/proc/self/mountinfo"))?;
    let tmpfs = table.lines().filter(|line| line.contains(" - tmpfs "));
    Ok(tmpfs.filter_map(|line| line.split(' ').nth(4)).map(ToOwned::to_owned).collect())
}

#[test]
fn files_in_tmpfs_mounts_arrive_while_they_are_written_to() -> Result<()> {
    system(&Fleet::builder(), |fleet| {
        // One has another file system mounted in it, and one an option that leaves it to CRIU.
        let mounts = ["--shm-size=200m", "--tmpfs", "/scratch:size=80m,mode=1770,exec", "--volume"];
        let mounts =
            [&mounts[..], &["inner:/scratch/inner", "--tmpfs", "/packed:size=80m,mpol=local"]].concat();
        run(fleet, 0, "tmpfs", 0, &[&mounts[..], &[image::DIRTIER, "hardship", "tmpfs", "64"]].concat())?;
        let mut last = dirtier::verify(fleet.host(0), "tmpfs")?;
        ensure!(last.bad == 0, "bad before any move: {last:?}");
        let source = fleet.host(0);
        source.docker(&["exec", "tmpfs", "sh", "-c", MAKE])?;
        let before = source.docker(&["exec", "tmpfs", "sh", "-c", DESCRIBE])?;
        ensure!(before.matches("one file with two names").count() == 3, "not as intended:\n{before}");
        let of_hosts = [mounts_of(fleet.host(0))?, mounts_of(fleet.host(1))?];

        for (from, to) in [(0, 1), (1, 0)] {
            let moved = fleet.migrate("tmpfs", from, to)?;
            moved.committed()?;
            println!("{}", fleet.haul(&["show", &moved.id])?.stdout);
            only_on(fleet, "tmpfs", to)?;
            let target = fleet.host(to);
            for _ in 0..2 {
                let next = dirtier::verify(target, "tmpfs").context("after a move")?;
                ensure!(next.bad == 0, "{} bad pages: {}", next.bad, target.docker(&["logs", "tmpfs"])?);
                ensure!(next.number == last.number + 1, "it was started anew: {last:?} {next:?}");
                last = next;
            }
            let after = target.docker(&["exec", "tmpfs", "sh", "-c", DESCRIBE])?;
            ensure!(before == after, "before:\n{before}\nafter the move to {to}:\n{after}");
            nothing_left_on(target)?;
        }
        for (host, before) in fleet.hosts().iter().zip(of_hosts) {
            nothing_left_on(host)?;
            ensure!(mounts_of(host)? == before, "{} has other mounts than before", host.name());
        }
        Ok(())
    })
}
