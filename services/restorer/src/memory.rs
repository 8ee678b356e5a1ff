//! What the restorer sees of the page servers: it starts them, guards their containers, and waits for their end.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use haulage_criu::lazy::{self, LazyRestore, Said};
use haulage_protocol::fault::{Fault, FaultCode, code};
use haulage_protocol::id::MigrationId;
use haulage_service::chain;
use haulage_sys::pass_fd;
use haulage_sys::pidfd;
use rustix::event::{PollFd, PollFlags};
use rustix::process::{Signal, pidfd_send_signal};
use tokio::sync::watch;

use crate::failure::{STATE, blocking, fault};
use crate::kill::kill_container;
use crate::page_server::{DONE, GUARD, LOG, MEMORY, Outcome, READY, forget, log_in, running_in};

/// The page server of a restored container has died or failed before the container had all its memory.
pub(crate) const MEMORY_LOST: FaultCode = FaultCode::known("memory_lost");
/// The program, beside our own.
const PROGRAM: &str = "haul-page-server";
/// A container that could not be killed is tried again after this.
const KILL_AGAIN_AFTER: Duration = Duration::from_secs(1);

/// How a container's memory fares.
#[derive(Debug, Clone)]
enum Status {
    Filling,
    Complete(Outcome),
    Lost(Fault),
}

/// The page servers of this host.
#[derive(Debug, Default)]
pub(crate) struct Memories {
    watched: Mutex<BTreeMap<MigrationId, watch::Receiver<Status>>>,
    /// Those that wait for their stores to be sealed.
    waiting: Mutex<BTreeMap<MigrationId, UnixStream>>,
}

impl Memories {
    /// Starts the page server of a restore that is about to begin, and guards it.
    ///
    /// # Errors
    /// [`STATE`]; nothing runs then.
    pub(crate) fn start(
        &self,
        migration: &MigrationId,
        work: &Path,
        store: &Path,
        images: &Path,
        container: &str,
    ) -> Result<(), Fault> {
        stop(work).and_then(|()| forget(work)).map_err(fault(STATE))?;
        let program = std::env::current_exe().map(|us| us.with_file_name(PROGRAM)).map_err(fault(STATE))?;
        let mut command = Command::new(&program);
        command.arg(store).arg(images).arg(container).current_dir(work);
        let (relay, theirs) = UnixStream::pair().map_err(fault(STATE))?;
        let listener = listen(work).map_err(fault(STATE))?;
        // A signal to the restorer's group, such as Ctrl-C at a terminal, must not end it.
        command.process_group(0).stdin(OwnedFd::from(theirs)).stdout(Stdio::piped());
        command.stderr(log_in(work).map_err(fault(STATE))?);
        let mut child = command.spawn().map_err(|error| {
            let message = format!("the page server {} cannot be started", program.display());
            Fault::new(STATE, message)
                .because(&error)
                .remedy("install all of haulage's programs in one directory")
        })?;
        // Its end of the socket pair must be nobody else's, so that its death is seen.
        drop(command);
        let ready = wait_until_ready(&mut child).and_then(|()| Ok((connect(work)?, relay.try_clone()?)));
        match ready {
            Ok((guard, to_tell)) => {
                self.waiting().insert(migration.clone(), to_tell);
                let held = Held::default();
                let (ours, migration_id) = (held.clone(), migration.clone());
                std::thread::spawn(move || {
                    if let Err(error) = pass_on(&listener, &relay, &ours) {
                        tracing::warn!(migration = %migration_id, %error, "a restore was not passed on to its end");
                    }
                });
                self.guard(migration, work, container, guard, Some(child), held);
                Ok(())
            }
            Err(error) => {
                let said = std::fs::read_to_string(work.join(LOG)).unwrap_or_default();
                end(child);
                Err(Fault::new(STATE, format!("the page server did not begin: {}", said.trim()))
                    .because(&error))
            }
        }
    }

    fn waiting(&self) -> MutexGuard<'_, BTreeMap<MigrationId, UnixStream>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the page server look through its store, which is complete, before CRIU comes. It would do so then.
    pub(crate) fn sealed(&self, migration: &MigrationId) {
        let Some(waiting) = self.waiting().remove(migration) else { return };
        if let Err(error) = lazy::pass_on(&Said::Sealed, &waiting) {
            tracing::warn!(%migration, %error, "a page server does not listen");
        }
    }

    /// Waits until the container has all its memory.
    ///
    /// # Errors
    /// [`MEMORY_LOST`] or `post_copy_failed`: it never will, and has been killed.
    pub(crate) async fn complete(
        self: &Arc<Self>,
        migration: &MigrationId,
        work: &Path,
        container: &str,
    ) -> Result<Outcome, Fault> {
        let mut status = match self.watched(migration) {
            Some(status) => status,
            // This restorer is younger than the restore.
            None => {
                let (memories, migration) = (self.clone(), migration.clone());
                let (work, container) = (work.to_owned(), container.to_owned());
                blocking(move || memories.rejoin(&migration, &work, &container)).await?
            }
        };
        let ended = status.wait_for(|status| !matches!(status, Status::Filling)).await;
        match ended.as_deref() {
            Ok(Status::Complete(outcome)) => Ok(outcome.clone()),
            Ok(Status::Lost(fault)) => Err(fault.clone()),
            Ok(Status::Filling) | Err(_) => Err(lost("nobody watches over it")),
        }
    }

    fn watched(&self, migration: &MigrationId) -> Option<watch::Receiver<Status>> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner).get(migration).cloned()
    }

    /// Finds a page server that an earlier life of this service has started, or what became of it.
    fn rejoin(
        &self,
        migration: &MigrationId,
        work: &Path,
        container: &str,
    ) -> Result<watch::Receiver<Status>, Fault> {
        match running_in(work).map_err(fault(STATE))? {
            Some(pid) => match connect(work) {
                Ok(guard) => {
                    tracing::info!(%migration, %pid, "a page server of an earlier life is at work");
                    return Ok(self.guard(migration, work, container, guard, None, Held::default()));
                }
                // It has ended since it was seen.
                Err(error) => tracing::warn!(%migration, %pid, %error, "a page server does not answer"),
            },
            None => tracing::info!(%migration, "the page server of an earlier life has ended"),
        }
        let (_, status) = watch::channel(verdict(work, container).0);
        Ok(status)
    }

    /// Watches over a page server on a thread of its own.
    fn guard(
        &self,
        migration: &MigrationId,
        work: &Path,
        container: &str,
        guard: UnixStream,
        child: Option<Child>,
        held: Held,
    ) -> watch::Receiver<Status> {
        let (tell, status) = watch::channel(Status::Filling);
        self.watched.lock().unwrap_or_else(PoisonError::into_inner).insert(migration.clone(), status.clone());
        let (work, container) = (work.to_owned(), container.to_owned());
        std::thread::spawn(move || {
            hold(&guard, &held);
            if let Some(child) = child {
                end(child);
            }
            let (verdict, mut over) = verdict(&work, &container);
            // Nobody may be interested any more.
            let _ = tell.send(verdict);
            // Whoever waits for a page must not get zeros: nothing is let go before all is well or all are dead.
            while !over {
                std::thread::sleep(KILL_AGAIN_AFTER);
                over = kill_container(&container).is_ok();
            }
            held.release();
        });
        status
    }

    /// Ends a page server and forgets it.
    pub(crate) fn end(&self, migration: &MigrationId, work: &Path) -> io::Result<()> {
        self.forget(migration);
        stop(work)
    }

    /// Forgets a page server that has ended.
    pub(crate) fn forget(&self, migration: &MigrationId) {
        self.waiting().remove(migration);
        self.watched.lock().unwrap_or_else(PoisonError::into_inner).remove(migration);
    }
}

fn lost(why: &str) -> Fault {
    Fault::new(MEMORY_LOST, format!("the container's memory was not completed: {why}"))
        .remedy("the container goes on where it was; see page-server.log and the kernel's log on the target")
}

/// As [`lost`], since the source has not paid what it owed.
fn source_lost(why: &str) -> Fault {
    let message = format!("the container's memory was not completed: {why}");
    Fault::new(code::POST_COPY_FAILED, message).remedy(
        "the container goes on where it was, from the moment when it was frozen: what it has done since is lost; see the \
         logs of both page-shippers, and page-server.log on the target",
    )
}

/// Copies of the descriptors of a container's memory. None is closed before [`Held::release`].
#[derive(Debug, Clone, Default)]
struct Held(Arc<Mutex<Option<Vec<OwnedFd>>>>);

impl Held {
    fn keep(&self, memory: OwnedFd) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_default().push(memory);
    }

    fn release(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
    }
}

/// Hands what the restore says to the page server, and keeps a copy of each descriptor. Ends with either of them.
fn pass_on(listener: &UnixListener, relay: &UnixStream, held: &Held) -> io::Result<()> {
    let mut fds = [PollFd::new(listener, PollFlags::IN), PollFd::new(relay, PollFlags::IN)];
    retry(|| rustix::event::poll(&mut fds, None))?;
    let [restore, server] = fds.map(|fd| fd.revents());
    if !server.is_empty() || restore.is_empty() {
        return Ok(());
    }
    let mut restore = LazyRestore::new(listener.accept()?.0);
    loop {
        let said = restore.listen()?;
        if let Said::Memory(_, memory) = &said {
            held.keep(memory.try_clone()?);
        }
        lazy::pass_on(&said, relay)?;
        if matches!(said, Said::Closed) {
            return Ok(());
        }
    }
}

fn retry<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> rustix::io::Result<T> {
    loop {
        match call() {
            Err(rustix::io::Errno::INTR) => {}
            result => return result,
        }
    }
}

/// Copies of the descriptors of children, until the page server is done or gone.
fn hold(guard: &UnixStream, held: &Held) {
    loop {
        match pass_fd::receive(guard) {
            Ok(Some((MEMORY, Some(memory)))) => held.keep(memory),
            Ok(Some((DONE, _)) | None) => return,
            Ok(Some((other, _))) => tracing::warn!(other, "a page server said what is not understood"),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => {
                tracing::warn!(%error, "a page server is not heard any more");
                return;
            }
        }
    }
}

/// What became of a page server that has ended; without a good end, of its container too. And whether nobody waits for
/// a page any more.
fn verdict(work: &Path, container: &str) -> (Status, bool) {
    let mut fault = match Outcome::read(work) {
        Ok(Some(outcome)) => match &outcome.error {
            None => return (Status::Complete(outcome), true),
            Some(error) if outcome.source_lost => source_lost(error),
            Some(error) => lost(error),
        },
        Ok(None) => lost("the page server died"),
        Err(error) => lost(&chain(&error)),
    };
    match kill_container(container) {
        Ok(()) => (Status::Lost(fault), true),
        Err(error) => {
            tracing::error!(container, %error, "a container with missing memory was not killed");
            fault.message = format!("{}; and it was not killed: {error}", fault.message);
            (Status::Lost(fault), false)
        }
    }
}

fn wait_until_ready(child: &mut Child) -> io::Result<()> {
    let stdout = child.stdout.take().ok_or_else(|| io::Error::other("no pipe from it"))?;
    let mut line = String::new();
    BufReader::new(stdout).read_line(&mut line)?;
    match line.trim_end() == READY {
        true => Ok(()),
        false => Err(io::Error::other("it ended at once")),
    }
}

/// Connects to the page server in `work`, whose path may be too long for a socket's name.
fn connect(work: &Path) -> io::Result<UnixStream> {
    let dir = File::open(work)?;
    UnixStream::connect(format!("/proc/self/fd/{}/{GUARD}", dir.as_raw_fd()))
}

/// Listens for the restore, in place of CRIU's own daemon.
fn listen(work: &Path) -> io::Result<UnixListener> {
    let dir = File::open(work)?;
    match std::fs::remove_file(work.join(lazy::SOCKET)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => UnixListener::bind(format!("/proc/self/fd/{}/{}", dir.as_raw_fd(), lazy::SOCKET)),
    }
}

/// Reaps a child that has ended or is about to.
fn end(mut child: Child) {
    if let Err(error) = child.wait() {
        tracing::warn!(%error, "a page server was not waited for");
    }
}

/// Kills the page server in `work`, if there is one. Its container must be dead or not yet begun.
fn stop(work: &Path) -> io::Result<()> {
    let Some(pid) = running_in(work)? else { return Ok(()) };
    let Ok(process) = pidfd::open(pid) else { return Ok(()) };
    // Its lock is asked for again: while it is held, the number is still that of the holder.
    if running_in(work)? != Some(pid) {
        return Ok(());
    }
    match pidfd_send_signal(&process, Signal::KILL) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => {}
        Err(error) => return Err(error.into()),
    }
    let mut dying = [rustix::event::PollFd::new(&process, rustix::event::PollFlags::IN)];
    rustix::event::poll(&mut dying, None)?;
    Ok(())
}
