//! One restore, served from its first process to its last page.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Instant;

use haulage_criu::lazy::{LazyRestore, Said};
use haulage_criu::mm;
use haulage_pages::frame::Batch;
use haulage_pages::link::Link;
use haulage_pages::owed::Word;
use haulage_pages::process::Vpid;
use haulage_pages::range::{PageRange, RangeSet};
use haulage_pages::sealed::SealedStore;
use haulage_pages::serve::{PageServer, Progress, SpaceId};
use haulage_sys::lazy::MissingMemory;
use haulage_sys::pass_fd;
use rustix::event::Timespec;
use rustix::event::epoll::{self, EventData, EventFlags};

use super::Failure;
use super::outcome::Outcome;

/// A message to the guard: here is a copy of a userfaultfd.
pub(crate) const MEMORY: u8 = b'm';
/// A message to the guard: nothing is missing, let go.
pub(crate) const DONE: u8 = b'd';

const GUARD_LISTENER: u64 = 1;
const RESTORE: u64 = 2;
const LINK: u64 = 3;
/// Spaces have numbers from here on.
const SPACES: u64 = 16;

const AT_ONCE: Timespec = Timespec { tv_sec: 0, tv_nsec: 0 };
/// How long to wait for the event that stops the filling. It is on its way, so this is never used up.
const SOON: Timespec = Timespec { tv_sec: 0, tv_nsec: 1_000_000 };

/// The source still owed memory, and nothing more will come of it.
#[derive(Debug, thiserror::Error)]
#[error("the source, or the way to it, was lost with {missing} pages missing here")]
pub(crate) struct SourceLost {
    missing: u64,
    source: std::io::Error,
}

pub(crate) struct Session {
    store: PathBuf,
    /// Once the store is sealed, which is in the freeze.
    server: Option<PageServer>,
    /// To what the source owes; `None` where it owes nothing.
    link: Option<Link>,
    images: PathBuf,
    poll: OwnedFd,
    guard_listener: UnixListener,
    /// `None` once it has ended.
    restore: Option<LazyRestore>,
    guards: Vec<UnixStream>,
    spaces: Vec<SpaceId>,
    /// Since when all processes have been restored.
    running: Option<Instant>,
}

impl Session {
    pub(crate) fn new(
        store: &Path,
        images: &Path,
        restore: UnixStream,
        guard_listener: UnixListener,
    ) -> Result<Self, Failure> {
        let poll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let restore = LazyRestore::new(restore);
        epoll::add(&poll, &restore, EventData::new_u64(RESTORE), EventFlags::IN)?;
        epoll::add(&poll, &guard_listener, EventData::new_u64(GUARD_LISTENER), EventFlags::IN)?;
        Ok(Self {
            store: store.to_owned(),
            server: None,
            link: None,
            images: images.to_owned(),
            poll,
            guard_listener,
            restore: Some(restore),
            guards: Vec::new(),
            spaces: Vec::new(),
            running: None,
        })
    }

    /// Serves until nothing is missing. On an error all descriptors stay open for as long as this session lives.
    pub(crate) fn run(&mut self) -> Result<Outcome, Failure> {
        let mut progress = Progress::Some;
        loop {
            let timeout = match (self.running, progress) {
                // Something will happen.
                (None, _) | (Some(_), Progress::Owed) => None,
                (Some(_), Progress::Stopped) => Some(&SOON),
                (Some(_), _) => Some(&AT_ONCE),
            };
            self.handle_events(timeout)?;
            self.ask()?;
            // Filling waits until the restore is over: it would compete with it for the processor.
            let (Some(since), Some(server)) = (self.running, &mut self.server) else { continue };
            progress = server.fill()?;
            if progress == Progress::Complete {
                return Ok(Outcome::complete(since.elapsed(), server.served()));
            }
        }
    }

    /// Asks the source for what is waited for.
    fn ask(&mut self) -> Result<(), Failure> {
        let Some(server) = &mut self.server else { return Ok(()) };
        let asks = server.take_asks();
        asks.into_iter().try_for_each(|ask| self.say(Word::Ask(ask)))
    }

    fn say(&mut self, word: Word) -> Result<(), Failure> {
        let Some(link) = &mut self.link else { return Ok(()) };
        link.say(word).or_else(|error| self.lost(error))
    }

    /// Takes in what the source has sent.
    fn listen_to_source(&mut self) -> Result<(), Failure> {
        let (Some(link), Some(server)) = (&mut self.link, &mut self.server) else { return Ok(()) };
        match link.receive() {
            Ok(bytes) => Ok(server.arrive(&Batch::decode(&bytes)?)?),
            Err(error) => self.lost(error),
        }
    }

    /// The link is gone, which does not matter once nothing is owed.
    fn lost(&mut self, source: std::io::Error) -> Result<(), Failure> {
        if let Some(server) = self.server.as_ref().filter(|server| self.running.is_none() || server.is_owed())
        {
            return Err(SourceLost { missing: server.missing(), source }.into());
        }
        if let Some(link) = self.link.take() {
            epoll::delete(&self.poll, &link)?;
        }
        Ok(())
    }

    fn handle_events(&mut self, timeout: Option<&Timespec>) -> Result<(), Failure> {
        let mut events = Vec::with_capacity(64);
        match epoll::wait(&self.poll, rustix::buffer::spare_capacity(&mut events), timeout) {
            Err(rustix::io::Errno::INTR) => return Ok(()),
            waited => waited?,
        };
        for event in events {
            match event.data.u64() {
                GUARD_LISTENER => self.welcome_guard()?,
                RESTORE => self.listen_to_restore()?,
                LINK => self.listen_to_source()?,
                space => {
                    let Some(server) = &mut self.server else { continue };
                    for born in server.handle(SpaceId(space - SPACES))? {
                        self.watch(born)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn listen_to_restore(&mut self) -> Result<(), Failure> {
        let Some(restore) = &mut self.restore else { return Ok(()) };
        let said = restore.listen()?;
        let server = match &mut self.server {
            Some(server) => server,
            none => {
                let store = SealedStore::open(&self.store)?;
                if store.owed() > 0 {
                    let link = Link::connect(&self.store);
                    let link = link.map_err(|source| SourceLost { missing: store.owed(), source })?;
                    epoll::add(&self.poll, &link, EventData::new_u64(LINK), EventFlags::IN)?;
                    self.link = Some(link);
                }
                none.insert(PageServer::new(store)?)
            }
        };
        match said {
            Said::Memory(pid, memory) => {
                let lazy = lazy_pages(&self.images, pid)?;
                let id = server.adopt(Vpid(pid), MissingMemory::adopt(memory), &lazy)?;
                self.watch(id)?;
            }
            Said::Sealed | Said::Zombie(_) => {}
            Said::Finished => {
                self.running = Some(Instant::now());
                // Until now it would have competed with the images for the link.
                self.say(Word::Begin)?;
            }
            Said::Closed if self.running.is_none() => {
                return Err("the restore ended before it was finished".into());
            }
            Said::Closed => {
                epoll::delete(&self.poll, &*restore)?;
                self.restore = None;
            }
        }
        Ok(())
    }

    fn watch(&mut self, id: SpaceId) -> Result<(), Failure> {
        let Some(memory) = self.server.as_ref().and_then(|server| server.descriptor(id)) else {
            return Ok(());
        };
        epoll::add(&self.poll, memory, EventData::new_u64(SPACES + id.0), EventFlags::IN)?;
        // A guard that has gone is replaced by the restorer's successor, which gets everything anew.
        self.guards.retain(|guard| pass_fd::send(guard, MEMORY, Some(memory)).is_ok());
        self.spaces.push(id);
        Ok(())
    }

    fn welcome_guard(&mut self) -> Result<(), Failure> {
        let guard = self.guard_listener.accept()?.0;
        let memories = self.spaces.iter().filter_map(|id| self.server.as_ref()?.descriptor(*id));
        let greeted = memories.map(|memory| pass_fd::send(&guard, MEMORY, Some(memory.as_fd())));
        if greeted.collect::<Result<Vec<()>, _>>().is_ok() {
            self.guards.push(guard);
        }
        Ok(())
    }

    /// Tells the guards to let go. One that is gone has done so.
    pub(crate) fn done(&self) {
        for guard in &self.guards {
            let _ = pass_fd::send(guard, DONE, None);
        }
    }
}

/// The pages of process `pid` that the restore leaves to us.
fn lazy_pages(images: &Path, pid: u32) -> Result<RangeSet, Failure> {
    let mappings = mm::read(images, pid)?;
    let lazy = mappings.iter().filter(|mapping| mapping.can_be_lazy());
    Ok(lazy.filter_map(|mapping| PageRange::of_addresses(mapping.start..mapping.end)).collect())
}
