//! Requests to the page-shipper: the memory of a container, on the source and on the target host.

use serde::{Deserialize, Serialize};

use crate::checkpointer::rpc;
use crate::id::Round;
use crate::rpc::{Rpc, Service};
use crate::secret::Token;
use crate::unit::{Bytes, Micros, Pages};

/// Target role: makes an empty page store and lets one source in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenPages {
    /// What the source must present.
    pub token: Token,
    /// Memory in use on the source: what the store will have to hold.
    pub memory: Bytes,
}

/// The answer to [`OpenPages`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PagesOpened {
    /// Where the source connects to: `address:port`.
    pub address: String,
    /// The directory of the page store on the target host.
    pub store: String,
}

/// Source role: connects to the target and starts to track writes of every process of the container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartTracking {
    /// The file that lists the processes of the container's cgroup.
    pub cgroup_procs: String,
    /// The target's bulk address.
    pub address: String,
    /// The target's token.
    pub token: Token,
}

/// The answer to [`StartTracking`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrackingStarted {
    /// How writes are tracked: `write_protect`, or `none` when the kernel cannot, and the final round sends all.
    pub tracker: String,
    /// Why not by write protection, when not.
    pub reason: Option<String>,
    /// Processes that could not be tracked, whose memory goes in the final round.
    pub untracked: Vec<Untracked>,
}

/// A process whose writes cannot be tracked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Untracked {
    /// Its process id on the source host.
    pub pid: i32,
    /// Why.
    pub reason: String,
}

/// Source role: one pre-copy round while the container runs. Returns when the target has stored the pages.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunRound {
    /// Its number.
    pub round: Round,
}

/// The answer to [`RunRound`], and what the record keeps of a round.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoundReport {
    /// Its number.
    pub round: Round,
    /// Pages found dirty, new ones included.
    pub dirty: Pages,
    /// Pages sent with content or as zeros.
    pub sent: Pages,
    /// Of these, pages of zeros, which cost nothing.
    pub zero: Pages,
    /// Pages held back by the transfer policy.
    pub withheld: Pages,
    /// Bytes on the wire, headers included.
    pub wire: Bytes,
    /// Time in the scans.
    pub scan: Micros,
    /// The whole round.
    pub took: Micros,
}

/// Source role: the last round, with the container frozen. Afterwards the target holds exactly the pages that
/// exist, each current, and has sealed its store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FinalRound {}

/// The answer to [`FinalRound`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FinalReport {
    /// The figures, as for any other round.
    pub round: RoundReport,
    /// Pages that exist, over all processes.
    pub total: Pages,
    /// Pages that the target had stored and dropped, because they no longer exist.
    pub dropped: Pages,
}

/// Either role: ends the session, drops trackers, connections and the store. Harmless when there is none.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClosePages {}

/// The answer to [`ClosePages`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PagesClosed {}

rpc!(OpenPages, PageShipper, "open", PagesOpened);
rpc!(StartTracking, PageShipper, "start", TrackingStarted);
rpc!(RunRound, PageShipper, "round", RoundReport);
rpc!(FinalRound, PageShipper, "final-round", FinalReport);
rpc!(ClosePages, PageShipper, "close", PagesClosed);
