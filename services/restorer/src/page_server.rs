//! The process that serves a lazy restore, and what the restorer sees of it.
//!
//! It is a process of its own so that a restorer which dies or is restarted takes no container with it: were the last
//! descriptor of a userfaultfd closed while pages are missing, the container would read zeros in their place.
//!
//! ```text
//!        lazy-pages.socket          stdin                    guard.socket
//!   CRIU ───────────────▶ restorer ───────▶ page server ── userfaultfds of children ──▶ restorer
//!    pid, userfaultfd, …  keeps copies        │      └──── byte "done" ───────────────▶  lets go
//!    finished                                 ▼
//!                                         filled.json: how it ended
//! ```
//!
//! What the source still owes when the container begins to run comes over a socket in the store
//! ([`haulage_pages::link`]).
//!
//! The restorer holds a copy of every descriptor ([`crate::memory`]). Should the page server die while pages are
//! missing, threads that touch one stand still until the restorer has killed the container; nobody reads zeros. Should
//! the restorer die, the page server goes on, and the restorer's successor gets copies on the guard's socket. A page
//! server that fails, and does not die, kills the container itself.

mod outcome;
mod session;

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

pub(crate) use outcome::{GUARD, LOG, Outcome, READY, forget, running_in};
pub(crate) use session::{DONE, MEMORY};

use crate::kill::kill_container;
use session::{Session, SourceLost};

/// What goes wrong ends the page server, whatever it is.
type Failure = Box<dyn std::error::Error + Send + Sync>;

/// The arguments, as the restorer gives them.
struct Arguments {
    store: PathBuf,
    images: PathBuf,
    container: String,
}

/// The whole program: serves in the working directory until the container has all its memory. Exit code 0 then, 1
/// after a failure, 2 for a wrong command line.
pub fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1);
    let (Some(store), Some(images), Some(container), None) =
        (args.next(), args.next(), args.next(), args.next())
    else {
        eprintln!(
            "usage: haul-page-server STORE IMAGES CONTAINER, in the working directory of the restore, which is"
        );
        eprintln!("passed on over the socket that is standard input");
        return ExitCode::from(2);
    };
    let container = container.to_string_lossy().into_owned();
    let arguments = Arguments { store: store.into(), images: images.into(), container };
    match serve(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("{}", haulage_service::chain(failure.as_ref()));
            ExitCode::FAILURE
        }
    }
}

fn serve(arguments: &Arguments) -> Result<(), Failure> {
    // A restorer that dies must not take it along, in whatever state it is.
    haulage_sys::process::ignore_hangup();
    let work = Path::new(".");
    // Held for as long as this process lives, so that a restorer that was restarted sees whether it does.
    let _claim = outcome::claim(work)?;
    let restore = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    let mut session = Session::new(&arguments.store, &arguments.images, restore, listen(GUARD)?)?;
    println!("{READY}");
    io::stdout().flush()?;
    match session.run() {
        Ok(served) => {
            served.write(work)?;
            session.done();
            Ok(())
        }
        Err(failure) => {
            // Its descriptors are still open, so nothing of it has gone on with what is missing.
            let killed = kill_container(&arguments.container);
            let why = haulage_service::chain(failure.as_ref());
            Outcome::failed(why, failure.is::<SourceLost>()).write(work)?;
            killed?;
            Err(failure)
        }
    }
}

/// A socket in the working directory: the path of a deep directory is longer than a socket's name may be.
fn listen(name: &str) -> io::Result<UnixListener> {
    match std::fs::remove_file(name) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    UnixListener::bind(name)
}

/// Where the errors of the program go, in the working directory.
pub(crate) fn log_in(work: &Path) -> io::Result<File> {
    File::create(work.join(LOG))
}
