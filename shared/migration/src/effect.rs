//! What a migration does to the world, and what undoes it.

use std::fmt;

use haulage_protocol::checkpointer::{Dumped, Frozen, Inspected, Located, RolledBack};
use haulage_protocol::id::{HostId, Round};
use haulage_protocol::page_shipper::{FinalReport, PagesOpened, RoundReport, TrackingStarted};
use haulage_protocol::restorer::{Checked, Created, Prepared, Restored, Verified};
use haulage_protocol::syncer::{FilesOpened, FilesSynced, ImagePulled, ImagePushed};
use serde::{Deserialize, Serialize};

use crate::fixed::Fixed;

/// One thing to do. Its parameters are in the record, so that it can be done again after a restart.
/// Every effect is idempotent under its step number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Effect {
    /// Ask the hosts which has the container.
    Locate,
    /// Source: capture and refuse.
    Inspect,
    /// Target: refuse.
    Check,
    /// Take the lease.
    AcquireLease,
    /// Source: image into the bucket.
    PushImage,
    /// Target: image out of the bucket.
    PullImage,
    /// Target: create the container.
    Create,
    /// Target: page store and session.
    OpenPages,
    /// Target: file session.
    OpenFiles,
    /// Source: first file pass.
    SyncFiles,
    /// Source: begin to track.
    StartTracking,
    /// Source: one round.
    RunRound(Round),
    /// Source: the container keeps so many percent of its processor time.
    Throttle(u8),
    /// Target: everything of a start that needs no state.
    Prepare,
    /// Source: everything of a freeze that changes nothing.
    PrepareFreeze,
    /// Source: a further pass over what lies in memory, which may be written faster than files on disk.
    SyncTmpfs,
    /// Source: freeze.
    Freeze,
    /// Target: its packets come here and are kept.
    TakePackets,
    /// Source: dump and hold.
    Dump,
    /// Source: last round.
    FinalRound,
    /// Source: last file pass.
    SyncFrozen,
    /// Source: the dump goes over.
    ShipImages,
    /// Target: restore.
    Restore,
    /// Target: is it alive?
    Verify,
    /// Source: is it still held?
    ConfirmHold,
    /// Is the lease still ours?
    ConfirmLease,
    /// Target: the files are on disk.
    PersistFiles,
    /// Source: kill and remove.
    CommitSource,
    /// Target: keep.
    Adopt,
    /// Target: remove.
    UndoTarget,
    /// Source: go on. What was made ready for a freeze is dropped.
    RollBackSource,
    /// Source: the container has its processor time back.
    Unthrottle,
    /// Source: trackers and connections.
    CloseSourcePages,
    /// Target: page store and session.
    CloseTargetPages,
    /// Source: snapshots and connections.
    CloseSourceFiles,
    /// Target: file session.
    CloseTargetFiles,
    /// Give the lease back.
    ReleaseLease,
}

/// What the driver does when an effect fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Persistence {
    /// Tell the machine, which undoes the migration. A host that does not answer is asked a few times.
    Report,
    /// Ask until it is known what happened, and tell the machine only that: the container may run and have answered
    /// clients, so it is undone only for what is certain, not for an answer that did not come or for an engine
    /// (`engine_failed`) that does not say.
    FindOut,
    /// Try again until it succeeds: there is no other way on.
    Insist,
    /// Try a few times, then tell the machine, which notes what is left behind and goes on.
    Attempt,
}

impl Effect {
    /// The effect that takes this one back; `None` where there is nothing to take back.
    #[must_use]
    pub const fn undo(self) -> Option<Self> {
        match self {
            Self::AcquireLease => Some(Self::ReleaseLease),
            Self::Create | Self::Prepare | Self::TakePackets | Self::Restore => Some(Self::UndoTarget),
            Self::OpenPages => Some(Self::CloseTargetPages),
            Self::OpenFiles => Some(Self::CloseTargetFiles),
            Self::SyncFiles | Self::SyncTmpfs | Self::SyncFrozen | Self::ShipImages => {
                Some(Self::CloseSourceFiles)
            }
            Self::StartTracking | Self::RunRound(_) | Self::FinalRound => Some(Self::CloseSourcePages),
            Self::Throttle(_) => Some(Self::Unthrottle),
            Self::PrepareFreeze | Self::Freeze | Self::Dump => Some(Self::RollBackSource),
            // An image in the bucket or on the target is content by digest: it harms nobody and serves again.
            Self::PushImage | Self::PullImage => None,
            Self::Locate
            | Self::Inspect
            | Self::Check
            | Self::Verify
            | Self::ConfirmHold
            | Self::ConfirmLease => None,
            // After the decision, and undo itself.
            Self::PersistFiles
            | Self::CommitSource
            | Self::Adopt
            | Self::UndoTarget
            | Self::RollBackSource
            | Self::Unthrottle
            | Self::CloseSourcePages
            | Self::CloseTargetPages
            | Self::CloseSourceFiles
            | Self::CloseTargetFiles
            | Self::ReleaseLease => None,
        }
    }

    /// How hard to try, in a migration that is at `phase`.
    #[must_use]
    pub fn persistence(self, phase: crate::Phase) -> Persistence {
        use crate::Phase;
        match phase {
            Phase::Commit | Phase::Retire | Phase::Fence | Phase::Resume | Phase::Release => {
                Persistence::Insist
            }
            Phase::Restore | Phase::Verify => Persistence::FindOut,
            Phase::Clean => Persistence::Attempt,
            _ => Persistence::Report,
        }
    }
}

impl fmt::Display for Effect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self {
            Self::Locate => "locate",
            Self::Inspect => "inspect",
            Self::Check => "check target",
            Self::AcquireLease => "acquire lease",
            Self::PushImage => "push image",
            Self::PullImage => "pull image",
            Self::Create => "create",
            Self::OpenPages => "open page store",
            Self::OpenFiles => "open file session",
            Self::SyncFiles => "sync files",
            Self::StartTracking => "start tracking",
            Self::RunRound(round) => return f.pad(&format!("round {round}")),
            Self::Throttle(keep) => return f.pad(&format!("throttle to {keep} %")),
            Self::Unthrottle => "end of throttling",
            Self::Prepare => "prepare target",
            Self::SyncTmpfs => "sync tmpfs",
            Self::PrepareFreeze => "prepare freeze",
            Self::Freeze => "freeze",
            Self::TakePackets => "take packets",
            Self::Dump => "dump",
            Self::FinalRound => "final round",
            Self::SyncFrozen => "sync files, frozen",
            Self::ShipImages => "ship dump",
            Self::Restore => "restore",
            Self::Verify => "verify",
            Self::ConfirmHold => "confirm hold",
            Self::ConfirmLease => "confirm lease",
            Self::PersistFiles => "write files to disk",
            Self::CommitSource => "remove source",
            Self::Adopt => "adopt",
            Self::UndoTarget => "undo target",
            Self::RollBackSource => "roll back source",
            Self::CloseSourcePages => "stop tracking",
            Self::CloseTargetPages => "drop page store",
            Self::CloseSourceFiles => "close files on source",
            Self::CloseTargetFiles => "close files on target",
            Self::ReleaseLease => "release lease",
        };
        f.pad(name)
    }
}

/// The result of an effect that succeeded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Success {
    /// Of [`Effect::Locate`]: the host, what it answered, and what is known of moves from there to the target.
    Located(HostId, Located, Option<Fixed>),
    /// Of [`Effect::Inspect`].
    Inspected(Box<Inspected>),
    /// Of [`Effect::Check`].
    Checked(Checked),
    /// Of [`Effect::PushImage`].
    Pushed(ImagePushed),
    /// Of [`Effect::PullImage`].
    Pulled(ImagePulled),
    /// Of [`Effect::Create`].
    Created(Created),
    /// Of [`Effect::OpenPages`].
    PagesOpened(PagesOpened),
    /// Of [`Effect::OpenFiles`].
    FilesOpened(FilesOpened),
    /// Of [`Effect::SyncFiles`], [`Effect::SyncTmpfs`], [`Effect::SyncFrozen`] and [`Effect::ShipImages`].
    Synced(FilesSynced),
    /// Of [`Effect::StartTracking`].
    Tracking(TrackingStarted),
    /// Of [`Effect::RunRound`].
    Round(RoundReport),
    /// Of [`Effect::Prepare`].
    Prepared(Prepared),
    /// Of [`Effect::Freeze`].
    Frozen(Frozen),
    /// Of [`Effect::Dump`].
    Dumped(Dumped),
    /// Of [`Effect::FinalRound`].
    Final(FinalReport),
    /// Of [`Effect::Restore`].
    Restored(Restored),
    /// Of [`Effect::Verify`].
    Verified(Verified),
    /// Of [`Effect::RollBackSource`].
    RolledBack(RolledBack),
    /// Of every other effect.
    Unit,
}
