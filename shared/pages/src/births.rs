//! Whether anything unseen may have written to shared memory between two looks.
//!
//! A process that was born and has died between two looks may have written to shared memory that it had from its
//! parent, and its page tables are gone with it. That there was none is proven by the numbers of processes: the kernel
//! gives them in ascending order in each pid namespace, so a process that we start in the container's, only to see its
//! number, has the number after that of the one before if there was nobody in between. Nothing of it stays.
//!
//! Numbers that were passed over mean nothing where threads have them of processes that were there at the look before and
//! listed after it: either the numbers were taken all the time, or the threads are new, and write by the page tables of
//! their process. A new process may have written and then given up its memory (`execve`). Whoever may choose numbers
//! (`clone3` with `set_tid`, `ns_last_pid`) can hide a process.
//!
//! Nor do page tables tell of a write if the kernel has taken the page out of them since, to make room; it counts the
//! pages that it looks at for that.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::mem;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::process::{Command, Stdio};

use rustix::param::clock_ticks_per_second;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use rustix::time::{ClockId, Timespec, clock_gettime};

use crate::process::{self, Generation, Process, Vpid};

/// A program that does nothing; every system has one.
const PROGRAM: &str = "true";

/// Whose more numbers are is not looked for, nor among more threads than that, which takes some 10 us for each.
const MANY: usize = 4096;

/// Looks at a container's pid namespace and at the kernel's counter. Until both have been seen twice, anything may have
/// happened.
#[derive(Debug, Default)]
pub(crate) struct Births {
    namespace: Option<File>,
    last: Option<Look>,
    /// Numbers that were passed over, each with the time of the look before that.
    passed_over: BTreeMap<u32, Generation>,
    /// Who was there when it was last asked.
    listed: BTreeMap<Vpid, Process>,
    reclaimed: Option<u64>,
    unsure: bool,
}

/// The number that the next process had, and the time before that.
#[derive(Debug, Clone, Copy)]
struct Look {
    number: u32,
    at: Generation,
}

impl Births {
    /// Of the namespace of these processes.
    pub(crate) fn of(processes: &[Process]) -> Self {
        let namespace = processes.first().and_then(|first| File::open(path(*first)).ok());
        Self { namespace, unsure: true, ..Self::default() }
    }

    /// Looks again. Processes must be listed after this.
    pub(crate) fn look(&mut self) {
        let look = self.namespace.as_ref().and_then(|namespace| Look::at(namespace).ok());
        let since_last =
            self.last.zip(look).and_then(|(last, look)| Some((last.at, last.passed_over(look)?)));
        match since_last {
            Some((since, numbers)) if numbers.len() + self.passed_over.len() <= MANY => {
                self.passed_over.extend(numbers.map(|number| (number, since)));
            }
            _ => self.unsure = true,
        }
        let reclaimed = reclaimed().ok();
        self.unsure |= reclaimed.is_none() || reclaimed != self.reclaimed;
        (self.last, self.reclaimed) = (look, reclaimed);
    }

    /// Whether anything may have happened since [`Self::forgive`], as far as looks have shown. `processes` are all there
    /// are: those of another namespace are not looked for.
    pub(crate) fn is_unsure(&mut self, processes: &[Process]) -> bool {
        let ours = self.namespace.as_ref().and_then(|ours| ours.metadata().ok()).map(|ours| ours.ino());
        // One that has ended since it was listed is missed by whoever compares mappings.
        let mut others = processes.iter().filter_map(|process| fs::metadata(path(*process)).ok());
        self.unsure |= ours.is_none() || others.any(|other| Some(other.ino()) != ours);
        let (mut unknown, mut room) = (mem::take(&mut self.passed_over), MANY);
        for process in processes {
            if self.unsure || unknown.is_empty() || room == 0 {
                break;
            }
            if self.listed.get(&process.vpid) == Some(process) {
                process.claim(&mut unknown, &mut room);
            }
        }
        self.unsure |= !unknown.is_empty();
        self.listed = processes.iter().map(|process| (process.vpid, *process)).collect();
        self.unsure
    }

    /// What has happened so far is taken into account.
    pub(crate) fn forgive(&mut self) {
        self.unsure = false;
    }
}

impl Look {
    /// It takes about a millisecond.
    fn at(namespace: &File) -> io::Result<Self> {
        let at = now();
        Ok(Self { number: next_number(namespace)?, at })
    }

    /// Numbers between this one and the next. None if they have started again.
    fn passed_over(self, next: Self) -> Option<Range<u32>> {
        let first = self.number.checked_add(1).filter(|first| *first <= next.number)?;
        Some(first..next.number)
    }
}

impl Process {
    /// Takes the numbers of its threads out of `unknown`, where it is older, as long as there is room for them.
    fn claim(self, unknown: &mut BTreeMap<u32, Generation>, room: &mut usize) {
        let numbers = process::thread_numbers(self.pid).take(*room).inspect(|_| *room -= 1);
        let is_ours = |number: &u32| unknown.get(number).is_some_and(|since| self.generation < *since);
        let ours: BTreeSet<u32> = numbers.filter(is_ours).collect();
        // Its place in /proc may be somebody else's by now.
        if process::describe(self.pid).is_ok_and(|now| now == Some(self)) {
            unknown.retain(|number, _| !ours.contains(number));
        }
    }
}

/// The [`Generation`] of a process that is started now.
fn now() -> Generation {
    let Timespec { tv_sec: seconds, tv_nsec: nanoseconds } = clock_gettime(ClockId::Boottime);
    let ticks = clock_ticks_per_second();
    let of_second = nanoseconds.unsigned_abs() * ticks / 1_000_000_000;
    Generation(seconds.unsigned_abs() * ticks + of_second)
}

fn path(process: Process) -> String {
    format!("/proc/{}/ns/pid", process.pid)
}

/// The number that a process gets which is started in `namespace` now.
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
        process::own_number(&status?).ok_or_else(|| io::Error::other("a process without a number"))
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
    use rustix::process::Pid;
    use std::io::{BufRead, BufReader, Lines, Write};
    use std::process::{Child, ChildStdin, ChildStdout};

    /// A shell that is the first process of a pid namespace.
    struct Shell {
        outside: Child,
        stdin: ChildStdin,
        lines: Lines<BufReader<ChildStdout>>,
    }

    impl Shell {
        fn start() -> Self {
            let mut outside = Command::new("unshare")
                .args(["--pid", "--fork", "--kill-child", "sh", "-c"])
                .arg("while read line; do eval \"$line\"; echo ok; done")
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let (stdin, stdout) = (outside.stdin.take().unwrap(), outside.stdout.take().unwrap());
            let mut shell = Self { outside, stdin, lines: BufReader::new(stdout).lines() };
            shell.tell(":");
            shell
        }

        fn tell(&mut self, line: &str) {
            writeln!(self.stdin, "{line}").unwrap();
            assert_eq!(self.lines.next().unwrap().unwrap(), "ok");
        }

        /// The next process has the number after that.
        fn number_from(&mut self, last: u32) {
            self.tell(&format!("echo {last} > /proc/sys/kernel/ns_last_pid"));
        }

        /// It, and its children.
        fn processes(&self) -> Vec<Process> {
            let mut all = children(Pid::from_child(&self.outside));
            all.extend(children(all[0]));
            all.into_iter().map(|pid| process::describe(pid).unwrap().unwrap()).collect()
        }
    }

    impl Drop for Shell {
        fn drop(&mut self) {
            self.outside.kill().ok();
            self.outside.wait().ok();
        }
    }

    fn children(pid: Pid) -> Vec<Pid> {
        let text = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
        text.split_ascii_whitespace().map(|pid| Pid::from_raw(pid.parse().unwrap()).unwrap()).collect()
    }

    fn wait_until_old(processes: &[Process]) {
        while processes.iter().any(|process| process.generation >= now()) {
            std::thread::yield_now();
        }
    }

    /// What it has seen so far is forgiven.
    fn looking_at(processes: &[Process]) -> Births {
        let mut births = Births::of(processes);
        births.look();
        assert!(births.is_unsure(processes), "everything may have been before");
        births.forgive();
        births
    }

    #[test]
    fn a_process_that_came_and_went_is_noticed_and_nothing_else_is() {
        let mut shell = Shell::start();
        let first = shell.processes();
        let mut births = looking_at(&first);
        for _ in 0..3 {
            births.look();
            shell.tell(":");
            assert!(!births.is_unsure(&first));
        }
        shell.tell("/bin/true");
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
    }

    #[test]
    fn numbers_that_are_passed_over_as_somebody_has_them_hide_nobody() {
        let mut shell = Shell::start();
        shell.tell("/bin/true; /bin/true; sleep 1000 & sleep 1000 &");
        let all = shell.processes();
        let numbers: Vec<_> = all.iter().map(|process| process.vpid.0).collect();
        assert_eq!(numbers, [1, 4, 5]);
        wait_until_old(&all);
        shell.number_from(1);
        let mut births = looking_at(&all);
        births.look();
        births.look();
        assert_eq!(births.last.unwrap().number, 6, "2 and 3 are free");
        assert!(!births.is_unsure(&all));

        shell.number_from(2);
        births.look();
        assert!(births.is_unsure(&all), "numbers have started again");
        births.forgive();
        shell.tell("/bin/true");
        births.look();
        assert_eq!(births.last.unwrap().number, 7, "the one that has ended had 6");
        assert!(births.is_unsure(&all), "one of three numbers is nobody's");
    }

    #[test]
    fn a_process_that_is_new_may_have_done_something_before() {
        let mut shell = Shell::start();
        let first = shell.processes();
        let mut births = looking_at(&first);
        births.look();
        shell.tell("sleep 1000 &");
        let all = shell.processes();
        assert!(!births.is_unsure(&all), "its number is seen the next time");
        births.look();
        assert!(births.is_unsure(&all), "listed both times, but born after the first look");
        births.forgive();
        // It is there at the next look, but is not listed after it.
        wait_until_old(&all);
        shell.number_from(2);
        births.look();
        assert!(births.is_unsure(&first));
        births.forgive();
        births.look();
        assert_eq!(births.last.unwrap().number, 5, "4 is passed over");
        assert!(births.is_unsure(&all));
    }
}
