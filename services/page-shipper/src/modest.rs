//! Threads that give way to the container.
//!
//! Rounds whose time is bounded anyway compete with the container, and its clients, where processors are scarce. Their
//! threads ask for a tenth of what others get; where there is room they are as fast as any.

use rustix::process::{getpriority_process, setpriority_process};
use rustix::thread::{Pid, gettid};

/// The niceness of a thread that gives way: by `sched(7)` it weighs 110, others 1024.
const NICE: i32 = 10;

/// The calling thread gives way while this lives, which must not leave it.
pub(crate) struct Modest(Option<(Pid, i32)>);

impl Modest {
    /// Gives way if that is `wanted`, and the kernel lets us.
    pub(crate) fn if_wanted(wanted: bool) -> Self {
        let thread = gettid();
        let began = || {
            let before = getpriority_process(Some(thread)).ok().filter(|before| *before < NICE)?;
            setpriority_process(Some(thread), NICE).ok().map(|()| (thread, before))
        };
        Self(wanted.then(began).flatten())
    }
}

impl Drop for Modest {
    fn drop(&mut self) {
        let Some((thread, before)) = self.0 else { return };
        if let Err(error) = setpriority_process(Some(thread), before) {
            tracing::warn!(%error, "a thread goes on giving way to others; the service lacks CAP_SYS_NICE");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_gives_way_for_a_while() {
        let now = || getpriority_process(Some(gettid())).unwrap();
        let before = now();
        drop(Modest::if_wanted(false));
        let modest = Modest::if_wanted(true);
        assert_eq!(now(), NICE);
        drop(modest);
        assert_eq!(now(), before);
    }
}
