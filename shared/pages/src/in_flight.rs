//! Asynchronous IO (`io_submit(2)`) that is under way when the container is frozen.
//!
//! A task in the middle of direct IO of the ordinary kind sleeps uninterruptibly, so that its group is not frozen before
//! the transfer is over. Requests of `io_submit` go on without any task: their data, and then the events that tell of
//! them, appear in memory that stands still otherwise. The kernel tells nobody how many there are. So it is waited for
//! until no event has come for a while, and looked again after the dump: an event that has come since is in nobody's
//! copy, and whoever waits for it would wait forever ([`Rings::have_moved`]).

use std::time::{Duration, Instant};

use haulage_sys::CallError;
use haulage_sys::vm_read::VmReader;

use crate::maps::{Maps, MapsError};
use crate::process::{Process, Vpid};

/// For how long no event may come before a dump begins. The dump itself takes longer, and what comes within that is
/// noticed.
const QUIET: Duration = Duration::from_millis(20);
/// How long events may go on coming: as long as a working device takes for a transfer ([`crate::ledger::TRANSFER`]).
const PATIENCE: Duration = crate::ledger::TRANSFER;
const LOOK_EVERY: Duration = Duration::from_millis(1);

/// `struct aio_ring` of `fs/aio.c`: id, nr, head, tail, each of 32 bits.
const TAIL: std::ops::Range<usize> = 12..16;

/// A ring of events that could not be read.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    /// The mappings of the process could not be read.
    #[error("mappings of process {vpid} cannot be known")]
    Maps {
        /// Whose.
        vpid: Vpid,
        /// What happened.
        #[source]
        source: MapsError,
    },
    /// Its memory could not be read.
    #[error("events of asynchronous io of process {vpid} cannot be read")]
    Read {
        /// Whose.
        vpid: Vpid,
        /// What happened.
        #[source]
        source: CallError,
    },
}

/// The rings of frozen processes, and how far each has got.
#[derive(Debug, Default)]
pub struct Rings(Vec<Ring>);

#[derive(Debug)]
struct Ring {
    vpid: Vpid,
    memory: VmReader,
    address: u64,
    tail: u32,
}

impl Rings {
    /// The rings of `processes`, which must be frozen, when nothing has come for a while, and whether that is so: if
    /// not, it was waited for as long as is reasonable. Takes no time where there are none.
    ///
    /// # Errors
    /// [`RingError`].
    pub fn settled(processes: &[Process]) -> Result<(Self, bool), RingError> {
        let mut rings = Self::of(processes)?;
        let began = Instant::now();
        let mut last = began;
        while !rings.0.is_empty() && last.elapsed() < QUIET {
            if began.elapsed() >= PATIENCE {
                return Ok((rings, false));
            }
            std::thread::sleep(LOOK_EVERY);
            if rings.follow()? {
                last = Instant::now();
            }
        }
        Ok((rings, true))
    }

    fn of(processes: &[Process]) -> Result<Self, RingError> {
        let mut rings = Vec::new();
        for process in processes {
            let vpid = process.vpid;
            let maps = Maps::of(process.pid).map_err(|source| RingError::Maps { vpid, source })?;
            for region in maps.regions().iter().filter(|region| region.name.starts_with("/[aio]")) {
                let memory = VmReader::open(process.pid);
                let memory = memory.map_err(|source| RingError::Read { vpid, source })?;
                let mut ring = Ring { vpid, memory, address: region.start, tail: 0 };
                ring.tail = ring.read()?;
                rings.push(ring);
            }
        }
        Ok(Self(rings))
    }

    /// Takes in where each ring is now, and says whether any has moved.
    fn follow(&mut self) -> Result<bool, RingError> {
        let mut moved = false;
        for ring in &mut self.0 {
            let tail = ring.read()?;
            moved |= std::mem::replace(&mut ring.tail, tail) != tail;
        }
        Ok(moved)
    }

    /// Whether an event has come since they were settled. The processes must have stood still since.
    ///
    /// # Errors
    /// [`RingError`].
    pub fn have_moved(&self) -> Result<bool, RingError> {
        for ring in &self.0 {
            if ring.read()? != ring.tail {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

impl Ring {
    fn read(&self) -> Result<u32, RingError> {
        let mut head = [0; TAIL.end];
        let read = self.memory.read_protected(self.address, &mut head);
        read.map_err(|source| RingError::Read { vpid: self.vpid, source })?;
        let tail = head.get(TAIL).and_then(|bytes| bytes.first_chunk().copied()).unwrap_or_default();
        Ok(u32::from_ne_bytes(tail))
    }
}
