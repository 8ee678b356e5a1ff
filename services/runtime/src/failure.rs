//! What can go wrong, and how the engine gets to hear of it.

use std::error::Error;
use std::ffi::OsString;
use std::fs::OpenOptions;
use std::io::{self, Write};

use haulage_criu::cause::Cause;
use haulage_engine::armed::ArmedError;

use crate::args;

/// A call that failed. The container does not run, unless said otherwise.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// The armed state is unusable; nothing was started.
    #[error("haul-runtime: the container is armed for a restore that cannot be done")]
    Armed(#[from] ArmedError),
    /// Its state was used up.
    #[error(
        "haul-runtime: container {0} was to be restored and that did not succeed; it is not started empty \
         (remedy: undo the migration, or remove the container)"
    )]
    Consumed(String),
    /// Options that we do not know.
    #[error(
        "haul-runtime: container {0} is armed for a restore, and this call has options that are not known"
    )]
    Unclear(String),
    /// An option of `create` that a restore has not.
    #[error("haul-runtime: a restore cannot honour --{0}")]
    Unsupported(&'static str),
    /// `create` without what it must have.
    #[error("haul-runtime: the call lacks --{0}")]
    Missing(&'static str),
    /// runc could not be started.
    #[error("haul-runtime: cannot run runc")]
    Runc(#[source] io::Error),
    /// The restore failed; nothing of the container is left running.
    #[error("haul-runtime: restore of migration {migration} failed: {cause}")]
    Restore {
        /// Which migration.
        migration: String,
        /// Why.
        cause: Cause,
    },
    /// Its network could not be made, or not be opened.
    #[error("haul-runtime: the container's network cannot be made")]
    Network(#[source] Box<dyn Error + Send + Sync>),
    /// CRIU could not be told its cgroup.
    #[error("haul-runtime: the container's cgroup cannot be told to criu")]
    Cgroup(#[source] Box<dyn Error + Send + Sync>),
    /// Its root file system could not be mounted anew.
    #[error("haul-runtime: the container's root file system cannot be mounted anew")]
    Root(#[source] io::Error),
    /// What stands in CRIU's place until the state is there does not work.
    #[error("haul-runtime: cannot stand in for criu")]
    Gate(#[source] io::Error),
    /// Locks that its processes had could not be taken again, or segments not be attached; it was killed before it ran.
    #[error("haul-runtime: the container's locks on files or its System V segments cannot be had again")]
    Locks(#[source] Box<dyn Error + Send + Sync>),
    /// Whoever armed it does not want it any more, or is gone.
    #[error("haul-runtime: the restore of migration {0} was called off")]
    CalledOff(String),
    /// The restore succeeded and that could not be recorded; the container was killed again.
    #[error("haul-runtime: the restore cannot be recorded")]
    Record(#[source] ArmedError),
}

impl Failure {
    /// Tells it on stderr, and in the file of `--log`, whose last error is what the engine shows.
    pub(crate) fn report(&self, args: &[OsString]) {
        let message = self.chain();
        // Where stderr is closed there is nobody to tell.
        let _ = writeln!(io::stderr(), "{message}");
        let Some(path) = args::global(args, "log") else { return };
        let json = args::global(args, "log-format").is_some_and(|format| format == "json");
        let line = if json {
            serde_json::json!({ "level": "error", "msg": message }).to_string()
        } else {
            format!("level=error msg={message:?}")
        };
        let logged = OpenOptions::new()
            .append(true)
            .create(true)
            .open(path)
            .and_then(|mut log| writeln!(log, "{line}"));
        if let Err(error) = logged {
            let _ = writeln!(io::stderr(), "haul-runtime: cannot write the log: {error}");
        }
    }

    /// The message with its causes.
    pub(crate) fn chain(&self) -> String {
        let mut message = self.to_string();
        let mut source = self.source();
        while let Some(error) = source {
            message.push_str(": ");
            message.push_str(&error.to_string());
            source = error.source();
        }
        message
    }
}
