//! The address space of a process that runs and lacks pages: what it lacks, where, and who waits.
//!
//! ```text
//!   owed ──── receive: the source has sent it ────► absent ──── put in place ────► (gone from here)
//!   blocked ─ a thread waits for what is owed ────► waiting ─── served
//! ```

use haulage_sys::lazy::{Event, MissingMemory};

use crate::absent::Absent;
use crate::process::Vpid;
use crate::range::{PageNo, PageRange};

#[derive(Debug)]
pub(crate) struct Space {
    pub(crate) vpid: Vpid,
    pub(crate) memory: MissingMemory,
    /// Missing, and in the store.
    pub(crate) absent: Absent,
    /// Missing, and still to come from the source.
    pub(crate) owed: Absent,
    /// Pages that threads wait for and that could not be put in place yet.
    pub(crate) waiting: Vec<PageNo>,
    /// Pages that threads wait for and that the source owes.
    pub(crate) blocked: Vec<PageNo>,
    /// What is missing may be elsewhere than where it was dumped.
    pub(crate) moved: bool,
}

impl Space {
    pub(crate) fn new(vpid: Vpid, memory: MissingMemory, absent: Absent, owed: Absent) -> Self {
        Self { vpid, memory, absent, owed, waiting: Vec::new(), blocked: Vec::new(), moved: false }
    }

    /// A child, if that is what happened.
    pub(crate) fn obey(&mut self, event: Event) -> Option<Space> {
        match event {
            Event::Fault { address } => self.waiting.push(PageNo::containing(address)),
            Event::Fork(memory) => {
                let child = Self::new(self.vpid, memory, self.absent.clone(), self.owed.clone());
                return Some(Self { moved: self.moved, ..child });
            }
            Event::Remap { from, to, len } => {
                self.moved = true;
                if let Some(range) = PageRange::of_addresses(from..from.saturating_add(len)) {
                    self.absent.relocate(range, PageNo::containing(to));
                    self.owed.relocate(range, PageNo::containing(to));
                }
                self.look_again();
            }
            Event::Remove { start, end } | Event::Unmap { start, end } => {
                if let Some(range) = PageRange::of_addresses(start..end) {
                    self.absent.remove(range);
                    self.owed.remove(range);
                }
                self.look_again();
            }
        }
        None
    }

    /// What threads wait for may be owed no longer, or be somewhere else.
    fn look_again(&mut self) {
        self.waiting.append(&mut self.blocked);
    }

    /// The pages that were in `range` when they were dumped have come.
    pub(crate) fn receive(&mut self, range: PageRange, zeros: bool) {
        for run in self.owed.take_dumped(range) {
            let here = |page: &PageNo| run.now.start() <= *page && *page < run.now.end();
            self.waiting.extend(self.blocked.iter().copied().filter(here));
            self.blocked.retain(|page| !here(page));
            // Zeros are what the kernel gives for them.
            if !zeros {
                self.absent.put(run);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    fn range(start: u64, count: u64) -> PageRange {
        PageRange::with_count(PageNo(start), count).unwrap()
    }

    /// Whatever descriptor: it is not used.
    fn memory() -> MissingMemory {
        MissingMemory::adopt(File::open("/dev/null").unwrap().into())
    }

    /// Ten pages are owed, and a thread waits for the sixth.
    fn space() -> Space {
        let mut owed = Absent::default();
        owed.insert(range(100, 10));
        let mut space = Space::new(Vpid(1), memory(), Absent::default(), owed);
        space.blocked.push(PageNo(105));
        space
    }

    fn remap(from: u64, to: u64, pages: u64) -> Event {
        Event::Remap { from: PageNo(from).address(), to: PageNo(to).address(), len: PageNo(pages).address() }
    }

    #[test]
    fn what_comes_is_absent_and_who_waits_for_it_is_served() {
        let mut space = space();
        space.receive(range(90, 15), false);
        assert_eq!((space.absent.pages(), space.owed.pages()), (5, 5));
        assert_eq!((space.waiting.len(), space.blocked.len()), (0, 1));
        // Zeros need no place, but whoever waits has to be told.
        space.receive(range(105, 2), true);
        assert_eq!((space.absent.pages(), space.owed.pages()), (5, 3));
        assert_eq!((space.waiting, space.blocked), (vec![PageNo(105)], vec![]));
    }

    #[test]
    fn what_is_owed_follows_its_memory_and_its_children() {
        let mut space = space();
        assert!(space.obey(remap(104, 500, 4)).is_none());
        assert_eq!(space.waiting, [PageNo(105)], "it may wait for nothing now");
        let mut child = space.obey(Event::Fork(memory())).unwrap();
        assert!(child.waiting.is_empty() && child.blocked.is_empty());
        let gone = Event::Remove { start: PageNo(500).address(), end: PageNo(502).address() };
        assert!(space.obey(gone).is_none());
        for (space, pages) in [(&mut space, 8), (&mut child, 10)] {
            space.receive(range(100, 10), false);
            assert_eq!((space.absent.pages(), space.owed.pages()), (pages, 0));
        }
        let moved = child.absent.next_in(range(500, 100)).unwrap();
        assert_eq!((moved.now, moved.then), (range(500, 4), PageNo(104)));
        assert_eq!(space.absent.next_in(range(500, 100)).unwrap().then, PageNo(106));
    }
}
