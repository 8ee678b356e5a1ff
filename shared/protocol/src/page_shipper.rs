//! Requests to the page-shipper: the memory of a container, on the source and on the target host.

use std::ops::AddAssign;

use serde::{Deserialize, Serialize};

use crate::checkpointer::rpc;
use crate::id::Round;
use crate::policy::Policy;
use crate::rpc::{Rpc, Service};
use crate::secret::Token;
use crate::transfer::Transfer;
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
    /// How pages travel.
    #[serde(default)]
    pub transfer: Transfer,
    /// Memory in use: what the account of the pages that were sent may be a hundredth of.
    #[serde(default)]
    pub memory: Bytes,
    /// Which dirty pages a round sends.
    #[serde(default)]
    pub policy: Policy,
}

/// The answer to [`StartTracking`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrackingStarted {
    /// How writes are tracked: `write_protect`; `soft_dirty` on older kernels, which stops the container for a moment in
    /// each round; or `none` when the kernel cannot, and the final round sends all.
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
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct RunRound {
    /// Its number.
    pub round: Round,
    /// What the way to the target takes in a second, once rounds have told.
    #[serde(default)]
    pub rate: Option<Pages>,
    /// What may be left for the freeze.
    #[serde(default)]
    pub allowance: Pages,
    /// The freeze is next: what is put off now is sent then.
    #[serde(default)]
    pub last: bool,
    /// How long to wait before it begins.
    #[serde(default)]
    pub pause: Micros,
    /// The next one begins no sooner after this one's beginning: it may as well send for as long.
    #[serde(default)]
    pub interval: Micros,
    /// How long it may go on for, with the pause; what it has not sent by then is left.
    #[serde(default)]
    pub within: Option<Micros>,
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
    /// Pages that would have to be sent if the container were frozen right after the round: those held back and those
    /// written meanwhile. Absent where it is not known, and in the last round.
    #[serde(default)]
    pub left: Option<Pages>,
    /// Bytes on the wire, headers included.
    pub wire: Bytes,
    /// Time in the scans.
    pub scan: Micros,
    /// The whole round.
    pub took: Micros,
    /// How the pages went.
    #[serde(default)]
    pub encoding: Encoding,
}

/// How the pages of a round that are not zero went over the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Encoding {
    /// Pages that went as they are.
    pub plain: Pages,
    /// Pages that went packed with lz4.
    pub lz4: Pages,
    /// Pages that went packed with zstd.
    pub zstd: Pages,
    /// Pages that went as the name of another one, which the target had.
    pub named: Pages,
    /// Pages that were written, but hold what the target has of them: they did not go.
    pub unchanged: Pages,
    /// Those of the plain and packed ones of which the target had parts, so that only the others went.
    pub partial: Pages,
}

impl Encoding {
    /// What the pages hold that went in any form or did not have to.
    #[must_use]
    pub fn raw(self) -> Bytes {
        (self.plain + self.lz4 + self.zstd + self.named + self.unchanged).bytes()
    }
}

impl AddAssign for Encoding {
    fn add_assign(&mut self, other: Self) {
        self.plain += other.plain;
        self.lz4 += other.lz4;
        self.zstd += other.zstd;
        self.named += other.named;
        self.unchanged += other.unchanged;
        self.partial += other.partial;
    }
}

/// Source role: follows a container's writes for a while and sends nothing. It runs on; what it writes costs it what a
/// few rounds of pre-copy would. Nothing is left afterwards, whatever happens. Refused (`lease_held`) while a migration
/// tracks the container, and given up when one begins to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SampleWrites {
    /// The file that lists the processes of the container's cgroup.
    pub cgroup_procs: String,
    /// How long: 0.1 s to 30 s.
    pub time: Micros,
}

/// The answer to [`SampleWrites`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WritesSampled {
    /// How writes were tracked: `write_protect`; or what a migration would have, and then `classes` is empty.
    pub tracker: String,
    /// Why not by write protection, when not.
    pub reason: Option<String>,
    /// All pages, by how often they are written.
    pub classes: Vec<WriteClass>,
}

/// Pages that are written about as often as one another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct WriteClass {
    /// How many.
    pub pages: Pages,
    /// How often each is written, in a thousand seconds; 0 for one that was not seen written.
    pub writes: u64,
}

/// Target role: makes a sink for a measurement of the link and lets one source in. What comes is counted and dropped;
/// the sink goes by itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenSink {
    /// What the source must present.
    pub token: Token,
}

/// The answer to [`OpenSink`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SinkOpened {
    /// Where the source connects to: `address:port`.
    pub address: String,
}

/// Source role: sends to a sink for some tenths of a second what cannot be packed, on one connection and as fast as it
/// goes, at most [`PROBE_BYTES`]. No container is touched.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MeasureLink {
    /// The sink's address.
    pub address: String,
    /// The sink's token.
    pub token: Token,
}

/// The most that a measurement of the link sends.
pub const PROBE_BYTES: Bytes = Bytes(64 << 20);

/// The answer to [`MeasureLink`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkMeasured {
    /// Bytes that the link takes in a second.
    pub rate: Bytes,
    /// Bytes that were sent to find out.
    pub sent: Bytes,
    /// How long that took.
    pub took: Micros,
}

/// Source role: the last round, with the container frozen. Afterwards the target holds exactly the pages that
/// exist, each current, and has sealed its store.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct FinalRound {
    /// What is not current on the target may be owed: it is sent when the target asks for it, after the restore, for as
    /// long as the source stands still and until [`ClosePages`].
    #[serde(default)]
    pub post_copy: bool,
}

/// The answer to [`FinalRound`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FinalReport {
    /// The figures, as for any other round.
    pub round: RoundReport,
    /// Pages that exist, over all processes.
    pub total: Pages,
    /// Pages that the target had stored and dropped, because they no longer exist.
    pub dropped: Pages,
    /// Pages that exist and that the source still owes the target.
    #[serde(default)]
    pub owed: Pages,
}

/// Either role: ends the session, drops trackers, connections and the store. Harmless when there is none.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClosePages {}

/// The answer to [`ClosePages`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PagesClosed {}

rpc!(OpenPages, PageShipper, "open", PagesOpened);
rpc!(StartTracking, PageShipper, "start", TrackingStarted);
rpc!(SampleWrites, PageShipper, "sample", WritesSampled);
rpc!(OpenSink, PageShipper, "open-sink", SinkOpened);
rpc!(MeasureLink, PageShipper, "measure", LinkMeasured);
rpc!(RunRound, PageShipper, "round", RoundReport);
rpc!(FinalRound, PageShipper, "final-round", FinalReport);
rpc!(ClosePages, PageShipper, "close", PagesClosed);
