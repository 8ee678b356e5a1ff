//! Two hosts and a container as a migration changes them, without services: what the machine is driven against.

use std::collections::BTreeSet;

use haulage_migration::{Effect, Migration, Phase, Success};
use haulage_protocol::checkpointer::{Dumped, Frozen, Inspected, Located, Network, RolledBack};
use haulage_protocol::fault::{Fault, code};
use haulage_protocol::id::{HostId, Step};
use haulage_protocol::page_shipper::{FinalReport, PagesOpened, RoundReport, TrackingStarted};
use haulage_protocol::restorer::{Checked, Created, Filled, Prepared, Restored, Verified};
use haulage_protocol::syncer::{FilesOpened, FilesSynced, ImagePulled, ImagePushed, TargetRoot};
use haulage_protocol::unit::{Bytes, Micros, Pages};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    Running,
    Frozen,
    Held,
    Gone,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Target {
    Absent,
    Created,
    Running,
    Adopted,
}

#[derive(Debug)]
pub(crate) struct World {
    pub(crate) source: Source,
    pub(crate) target: Target,
    pub(crate) open: BTreeSet<&'static str>,
    pub(crate) leased: bool,
    pub(crate) done: BTreeSet<Step>,
    pub(crate) image_present: bool,
    pub(crate) persisted: bool,
    pub(crate) tracker: &'static str,
    /// What every round leaves.
    pub(crate) left: u64,
    pub(crate) throttled: bool,
    /// The target lacks pages that only the source has.
    pub(crate) owed: bool,
}

impl World {
    pub(crate) fn new(image_present: bool, tracker: &'static str) -> Self {
        Self {
            source: Source::Running,
            target: Target::Absent,
            open: BTreeSet::new(),
            leased: false,
            done: BTreeSet::new(),
            image_present,
            persisted: false,
            tracker,
            left: 1 << 20,
            throttled: false,
            owed: false,
        }
    }

    /// Performs an effect as the services would: idempotent, and refusing what makes no sense.
    pub(crate) fn perform(
        &mut self,
        step: Step,
        effect: Effect,
        record: &Migration,
    ) -> Result<Success, Fault> {
        let again = !self.done.insert(step);
        let out_of_order = |what: &str| Err(Fault::new(code::OUT_OF_ORDER, what.to_owned()));
        match effect {
            Effect::AcquireLease => self.leased = true,
            Effect::ReleaseLease => self.leased = false,
            Effect::Create if !again => self.target = Target::Created,
            Effect::OpenPages => drop(self.open.insert("target pages")),
            Effect::OpenFiles => drop(self.open.insert("target files")),
            Effect::SyncFiles => drop(self.open.insert("source files")),
            Effect::SyncTmpfs => assert_ne!(self.source, Source::Frozen, "a live pass of what stands still"),
            Effect::StartTracking => drop(self.open.insert("source pages")),
            Effect::PrepareFreeze => {
                assert_eq!(self.source, Source::Running, "{effect}");
                self.open.insert("prepared freeze");
            }
            Effect::Freeze if self.source == Source::Running => {
                self.open.remove("prepared freeze");
                self.source = Source::Frozen;
            }
            Effect::Throttle(_) => self.throttled = true,
            Effect::Unthrottle => self.throttled = false,
            Effect::Dump => match self.source {
                Source::Frozen | Source::Held => {
                    assert!(!self.throttled, "dumped with other limits than its own");
                    self.source = Source::Held;
                }
                _ => return out_of_order("dump of a container that is not frozen"),
            },
            Effect::FinalRound => {
                assert_ne!(self.source, Source::Running, "{effect}");
                self.owed = record.is_post_copy();
            }
            Effect::TakePackets | Effect::SyncFrozen => assert_ne!(self.source, Source::Running, "{effect}"),
            Effect::Verify if self.owed => {
                if !self.open.contains("source pages") {
                    return Err(Fault::new(code::POST_COPY_FAILED, "the source's page-shipper is gone"));
                }
                assert!(
                    matches!(self.source, Source::Held | Source::Frozen),
                    "pulled from a source that does not stand still"
                );
                self.owed = false;
            }
            Effect::Restore if !again => {
                // A hold may be lost unnoticed until it is confirmed, but nothing thaws the source by itself.
                assert!(
                    matches!(self.source, Source::Held | Source::Frozen),
                    "restored while the source runs"
                );
                self.target = Target::Running;
            }
            Effect::ConfirmHold if self.source != Source::Held => {
                return Err(Fault::new(code::HOLD_LOST, "not held"));
            }
            Effect::CommitSource => {
                assert_eq!(record.phase, Phase::Retire, "the source ended without a recorded commit");
                assert_eq!(self.target, Target::Adopted, "ended, with no target");
                assert!(self.persisted, "ended before the target's files were on disk");
                assert!(!self.owed, "ended while the target lacks what only the source has");
                self.source = Source::Gone;
            }
            Effect::PersistFiles => self.persisted = true,
            Effect::Adopt => {
                assert!(!self.owed, "committed with pages missing");
                self.target = Target::Adopted;
            }
            Effect::UndoTarget => {
                assert_ne!(self.target, Target::Adopted);
                self.target = Target::Absent;
            }
            Effect::RollBackSource => {
                assert_ne!(self.source, Source::Gone);
                self.open.remove("prepared freeze");
                self.source = Source::Running;
            }
            Effect::CloseSourcePages => drop(self.open.remove("source pages")),
            Effect::CloseTargetPages => drop(self.open.remove("target pages")),
            Effect::CloseSourceFiles => drop(self.open.remove("source files")),
            Effect::CloseTargetFiles => drop(self.open.remove("target files")),
            _ => {}
        }
        let runs_on_target = matches!(self.target, Target::Running | Target::Adopted);
        assert!(!(self.source == Source::Running && runs_on_target), "two running copies after {effect}");
        Ok(self.success(effect))
    }

    pub(crate) fn success(&self, effect: Effect) -> Success {
        let host = |name: &str| name.parse::<HostId>().unwrap();
        let id = || "c0ffee".repeat(10).parse().unwrap();
        let round = |round| RoundReport {
            round,
            dirty: Pages(1 << (16 - round.0.min(16))),
            sent: Pages(10_000),
            zero: Pages(0),
            withheld: Pages(0),
            left: Some(Pages(self.left)),
            wire: Bytes(0),
            scan: Micros(1),
            took: Micros(1_000_000),
            encoding: Default::default(),
        };
        match effect {
            Effect::Locate => {
                Success::Located(host("a"), Located { container: Some(id()), name: Some("web".into()) }, None)
            }
            Effect::Inspect => Success::Inspected(Box::new(Inspected {
                container: id(),
                name: "web".into(),
                spec: serde_json::Value::Null,
                host: serde_json::Value::Null,
                image: "sha256:0".into(),
                cgroup_procs: String::new(),
                processes: 1,
                memory: Bytes(0),
                images: None,
                disk: Bytes(0),
                image_size: Bytes(0),
                roots: Vec::new(),
                tmpfs: Vec::new(),
                descriptors: Vec::new(),
                mapped_writable: Vec::new(),
            })),
            Effect::Check => Success::Checked(Checked { image_present: self.image_present }),
            Effect::PushImage => {
                Success::Pushed(ImagePushed { put: Bytes(0), present: Bytes(0), took: Micros(0) })
            }
            Effect::PullImage => Success::Pulled(ImagePulled { read: Bytes(0), took: Micros(0) }),
            Effect::Create => Success::Created(Created { container: id(), roots: Vec::new() }),
            Effect::OpenPages => {
                Success::PagesOpened(PagesOpened { address: String::new(), store: String::new() })
            }
            Effect::OpenFiles => {
                // One world is as good as the other for being the one with a tmpfs.
                let tmpfs = TargetRoot { root: "tmpfs:/dev/shm".into(), path: String::new() };
                let tmpfs = if self.image_present { Vec::new() } else { vec![tmpfs] };
                Success::FilesOpened(FilesOpened { address: String::new(), tmpfs })
            }
            Effect::SyncFiles | Effect::SyncTmpfs | Effect::SyncFrozen | Effect::ShipImages => {
                Success::Synced(FilesSynced {
                    entries: 0,
                    sent: 0,
                    deleted: 0,
                    wire: Bytes(0),
                    took: Micros(0),
                })
            }
            Effect::StartTracking => Success::Tracking(TrackingStarted {
                tracker: self.tracker.into(),
                reason: None,
                untracked: Vec::new(),
            }),
            Effect::RunRound(n) => Success::Round(round(n)),
            Effect::Freeze => Success::Frozen(Frozen {
                at: Micros(0),
                took: Micros(0),
                processes: 1,
                mapped_writable: Vec::new(),
            }),
            Effect::Dump => {
                Success::Dumped(Dumped { images: String::new(), bytes: Bytes(0), took: Micros(0) })
            }
            Effect::FinalRound => Success::Final(FinalReport {
                round: round(Default::default()),
                total: Pages(0),
                dropped: Pages(0),
                owed: Pages(u64::from(self.owed)),
            }),
            Effect::Prepare => Success::Prepared(Prepared { network: Network::Made, took: Micros(0) }),
            Effect::Restore => Success::Restored(Restored {
                at: Micros(0),
                merge: Micros(0),
                start: Micros(0),
                since: Micros(0),
            }),
            Effect::Verify => Success::Verified(Verified { pid: 1, filled: Filled::default() }),
            Effect::RollBackSource => Success::RolledBack(RolledBack { thawed_at: None }),
            _ => Success::Unit,
        }
    }
}
