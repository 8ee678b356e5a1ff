//! The phases of a migration: the one enumeration of them.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Where a migration stands. Only [`crate::machine`] moves it on.
///
/// ```text
/// Locate -> Inspect -> Check -> Reserve -> Image -> Create -> Open -> Files -> Track -> PreCopy
///   -> Prepare -> Settle -> Freeze -> Switch -> Ship -> Restore -> Verify -> Commit -> Retire -> Clean -> Release -> Done
///
/// any of Locate..Verify, on a fault, any of Locate..Ship, on a cancellation, any of Freeze..Ship, after too long:
///   [-> Fence, if a restore was asked for] [-> Resume, if a freeze was] -> Clean -> Release -> Done
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Find the host that has the container.
    Locate,
    /// Capture what the container is; refuse what cannot move.
    Inspect,
    /// Ask the target whether it can take it.
    Check,
    /// Take the lease on the container.
    Reserve,
    /// Bring the image to the target.
    Image,
    /// Create the container there, not started.
    Create,
    /// Open the target's bulk sessions.
    Open,
    /// First pass over the files, while the container runs.
    Files,
    /// Begin to track writes to memory.
    Track,
    /// Rounds of memory, while the container runs.
    PreCopy,
    /// Start the container on the target as far as it can be without its state, and make the freeze ready here, where it
    /// goes on.
    Prepare,
    /// More rounds, of what was written meanwhile.
    Settle,
    /// Freeze it. The downtime begins here.
    Freeze,
    /// With the container frozen, in parallel: the last round, the dump, the last file pass.
    Switch,
    /// Carry over the dump. Is the source still held as it was dumped, and the lease still ours?
    Ship,
    /// Bring it to life on the target. The downtime ends here.
    Restore,
    /// Is it alive there?
    Verify,
    /// Decided: the record in this phase *is* the commit. The target keeps the container and writes it to disk.
    Commit,
    /// The source ends.
    Retire,
    /// Undo: make sure that the container does not run on the target. Nothing else may happen before.
    Fence,
    /// Undo: let the source go on.
    Resume,
    /// Close sessions and remove what is no longer needed, on both hosts.
    Clean,
    /// Give the lease back.
    Release,
    /// Over.
    Done,
}

impl Phase {
    /// The name in records and events.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Locate => "locate",
            Self::Inspect => "inspect",
            Self::Check => "check",
            Self::Reserve => "reserve",
            Self::Image => "image",
            Self::Create => "create",
            Self::Open => "open",
            Self::Files => "files",
            Self::Track => "track",
            Self::PreCopy => "pre_copy",
            Self::Prepare => "prepare",
            Self::Settle => "settle",
            Self::Freeze => "freeze",
            Self::Switch => "switch",
            Self::Ship => "ship",
            Self::Restore => "restore",
            Self::Verify => "verify",
            Self::Commit => "commit",
            Self::Retire => "retire",
            Self::Fence => "fence",
            Self::Resume => "resume",
            Self::Clean => "clean",
            Self::Release => "release",
            Self::Done => "done",
        }
    }

    /// Before the target is asked to run: an operator may cancel. Afterwards it may have answered clients, and undoing
    /// it would lose what they were told.
    #[must_use]
    pub fn is_cancellable(self) -> bool {
        self < Self::Restore
    }

    /// Before the decision: a fault leads to undo.
    #[must_use]
    pub fn is_revocable(self) -> bool {
        self <= Self::Verify
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}
