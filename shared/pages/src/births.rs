//! Whether anything unseen may have written to shared memory between two looks.
//!
//! A process that was born and has died between two looks may have written to shared memory that it had from its
//! parent, and its page tables are gone with it. That there was none is proven by the numbers of processes: the kernel
//! gives them in ascending order in each pid namespace, so a process that we start in the container's, only to see its
//! number, has the number after that of the one before if there was nobody in between. Nothing of it stays.
//!
//! Nor do page tables tell of a write if the kernel has taken the page out of them since, to make room; it counts the
//! pages that it looks at for that.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::process::{Command, Stdio};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::process::Process;

/// A program that does nothing; every system has one.
const PROGRAM: &str = "true";

/// Looks at a container's pid namespace and at the kernel's counter. Until both have been seen twice without a change,
/// anything may have happened.
#[derive(Debug, Default)]
pub(crate) struct Births {
    namespace: Option<File>,
    last: Option<u32>,
    reclaimed: Option<u64>,
    unsure: bool,
}

impl Births {
    /// Of the namespace of these processes.
    pub(crate) fn of(processes: &[Process]) -> Self {
        let namespace = processes.first().and_then(|first| File::open(path(*first)).ok());
        Self { namespace, unsure: true, ..Self::default() }
    }

    /// Looks again. Processes must be listed after this.
    pub(crate) fn look(&mut self) {
        let number = self.namespace.as_ref().and_then(|namespace| next_number(namespace).ok());
        let sure = self.last.zip(number).is_some_and(|(last, number)| last.checked_add(1) == Some(number));
        let reclaimed = reclaimed().ok();
        self.unsure |= !sure || reclaimed.is_none() || reclaimed != self.reclaimed;
        (self.last, self.reclaimed) = (number, reclaimed);
    }

    /// Whether anything may have happened since [`Self::forgive`], as far as looks have shown. `processes` are all there
    /// are: those of another namespace are not looked for.
    pub(crate) fn is_unsure(&mut self, processes: &[Process]) -> bool {
        let ours = self.namespace.as_ref().and_then(|ours| ours.metadata().ok()).map(|ours| ours.ino());
        // One that has ended since it was listed is missed by whoever compares mappings.
        let mut others = processes.iter().filter_map(|process| fs::metadata(path(*process)).ok());
        self.unsure |= ours.is_none() || others.any(|other| Some(other.ino()) != ours);
        self.unsure
    }

    /// What has happened so far is taken into account.
    pub(crate) fn forgive(&mut self) {
        self.unsure = false;
    }
}

fn path(process: Process) -> String {
    format!("/proc/{}/ns/pid", process.pid)
}

/// The number that a process gets which is started in `namespace` now. It takes about a millisecond.
fn next_number(namespace: &File) -> io::Result<u32> {
    let namespace = namespace.try_clone()?;
    // A thread that has changed where its children go is of no other use.
    let started = std::thread::spawn(move || {
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::ProcessID))?;
        let mut program = Command::new(PROGRAM);
        program.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = program.spawn()?;
        // It may have ended, and is there until it is waited for.
        let status = fs::read_to_string(format!("/proc/{}/status", child.id()));
        child.wait()?;
        let status = status?;
        let numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
        let number = numbers.and_then(|numbers| numbers.split_ascii_whitespace().last()?.parse().ok());
        number.ok_or_else(|| io::Error::other("a process without a number"))
    });
    started.join().unwrap_or_else(|_| Err(io::Error::other("a thread died")))
}

/// Pages without a file that the kernel has looked at to make room, since boot: `pgscan_anon` of `/proc/vmstat`.
fn reclaimed() -> io::Result<u64> {
    let text = fs::read_to_string("/proc/vmstat")?;
    let count = text.lines().find_map(|line| line.strip_prefix("pgscan_anon ")?.trim().parse().ok());
    count.ok_or_else(|| io::Error::other("/proc/vmstat has no pgscan_anon"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process;
    use rustix::process::Pid;
    use std::io::{BufRead, BufReader, Write};

    #[test]
    fn a_process_that_came_and_went_is_noticed_and_nothing_else_is() {
        let mut shell = Command::new("unshare")
            .args(["--pid", "--fork", "--kill-child", "sh", "-c", "while read line; do $line; echo ok; done"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (mut stdin, stdout) = (shell.stdin.take().unwrap(), shell.stdout.take().unwrap());
        let mut lines = BufReader::new(stdout).lines();
        let mut tell = |line: &str| {
            writeln!(stdin, "{line}").unwrap();
            assert_eq!(lines.next().unwrap().unwrap(), "ok");
        };
        tell(":");
        let children = format!("/proc/{0}/task/{0}/children", shell.id());
        let first: i32 = fs::read_to_string(children).unwrap().trim().parse().unwrap();
        let first = [process::describe(Pid::from_raw(first).unwrap()).unwrap().unwrap()];
        let mut births = Births::of(&first);
        assert!(births.is_unsure(&first), "nothing has been seen yet");
        births.look();
        births.forgive();
        for _ in 0..3 {
            births.look();
            tell(":");
            assert!(!births.is_unsure(&first));
        }
        tell("/bin/true");
        assert!(!births.is_unsure(&first), "nobody has looked since");
        births.look();
        assert!(births.is_unsure(&first));
        births.look();
        assert!(births.is_unsure(&first), "until it is forgiven");
        births.forgive();
        births.look();
        assert!(!births.is_unsure(&first));
        let us = process::describe(rustix::process::getpid()).unwrap().unwrap();
        assert!(births.is_unsure(&[first[0], us]), "one of another namespace");
        shell.kill().unwrap();
        shell.wait().unwrap();
    }
}
