//! Which program image a process runs: changes with every `exec`, and with nothing else.

use std::fs;

use haulage_sys::Pid;
use haulage_sys::vm_read::VmReader;

/// `AT_RANDOM` of `getauxval(3)`.
const AT_RANDOM: u64 = 25;

/// The auxiliary vector and the 16 random bytes that the kernel gives every image it starts (`AT_RANDOM`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Program {
    vector: Vec<u8>,
    random: Vec<u8>,
}

impl Program {
    /// That of `pid` now; `None` when it is gone or does not have one.
    pub(crate) fn of(pid: Pid) -> Option<Self> {
        let vector = fs::read(format!("/proc/{pid}/auxv")).ok()?;
        let (words, _) = vector.as_chunks::<8>();
        let (pairs, _) = words.as_chunks::<2>();
        let [_, address] = pairs.iter().find(|[key, _]| u64::from_ne_bytes(*key) == AT_RANDOM)?;
        let address = u64::from_ne_bytes(*address);
        let mut random = Vec::new();
        let bytes = address..address.checked_add(16)?;
        let read = VmReader::open(pid).and_then(|memory| memory.read(&[bytes], &mut random));
        (read == Ok(16)).then_some(Self { vector, random })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    #[test]
    fn it_stays_until_exec() {
        let us = rustix::process::getpid();
        assert!(Program::of(us).is_some() && Program::of(us) == Program::of(us));
        let mut other = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        // `spawn` returns while the kernel still makes the image.
        let deadline = Instant::now() + Duration::from_secs(10);
        let theirs = loop {
            let theirs = Program::of(Pid::from_child(&other));
            if theirs.is_some() || Instant::now() > deadline {
                break theirs;
            }
        };
        other.kill().unwrap();
        other.wait().unwrap();
        assert!(theirs.is_some() && theirs != Program::of(us));
    }
}
