//! The index of a sealed store: which page lies where.
//!
//! ```text
//! "HAULIDX5", processes u32, slots u32
//!   per process: vpid u32, chunks u32, generation u64
//!     per chunk: number u64, slot u32 (all ones: none), latest round u32, pages stored 64 bytes, pages in the data file
//!                64 bytes, pages owed 64 bytes
//! objects u32, per object: vpid u32, place
//! namespaces u32 (0 or 1), per namespace: place
//! place: process that holds it u32, its descriptor u32, device u64, inode u64
//! CRC-32 of everything before it, u32
//! ```
//! All numbers little-endian; a chunk is 2 MiB of address space, its slot 2 MiB of the data file; page n of a chunk is
//! bit n % 8 of byte n / 8. A chunk of an object has its own place in the object: its slot is its number.

use std::collections::BTreeMap;

use crate::chunk::{Bits, CHUNK_PAGES, Chunk};
use crate::object::Place;
use crate::process::{Generation, Vpid};
use crate::range::PageNo;

const MAGIC: [u8; 8] = *b"HAULIDX5";
const NO_SLOT: u32 = u32::MAX;

/// An index that is not one, or damaged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum IndexError {
    /// It starts differently: another version, or something else.
    #[error("not an index of this version")]
    Magic,
    /// Its checksum does not match.
    #[error("index is damaged")]
    Checksum,
    /// It ends early or goes on too long.
    #[error("index has not the length that it says")]
    Length,
    /// A chunk lies outside memory or outside the data file.
    #[error("chunk {0} is where none can be")]
    Chunk(u64),
    /// An object that is not among the processes, or the other way round.
    #[error("{0} is an object on one list only")]
    Object(Vpid),
}

/// What is stored of one process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Stored {
    pub(crate) generation: Generation,
    pub(crate) chunks: BTreeMap<u64, Chunk>,
}

/// What a store holds.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Index {
    pub(crate) processes: BTreeMap<Vpid, Stored>,
    /// Where the objects among them are.
    pub(crate) objects: BTreeMap<Vpid, Place>,
    /// Where the IPC namespace of those is that are System V segments, if there have been any.
    pub(crate) namespace: Option<Place>,
    /// Slots of the data file in use or once used.
    pub(crate) slots: u32,
}

impl Index {
    /// The chunks of all processes.
    pub(crate) fn chunks(&self) -> impl Iterator<Item = &Chunk> {
        self.processes.values().flat_map(|stored| stored.chunks.values())
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend((self.processes.len() as u32).to_le_bytes());
        bytes.extend(self.slots.to_le_bytes());
        for (vpid, stored) in &self.processes {
            bytes.extend(vpid.0.to_le_bytes());
            bytes.extend((stored.chunks.len() as u32).to_le_bytes());
            bytes.extend(stored.generation.0.to_le_bytes());
            for (number, chunk) in &stored.chunks {
                bytes.extend(number.to_le_bytes());
                bytes.extend(chunk.slot.unwrap_or(NO_SLOT).to_le_bytes());
                bytes.extend(chunk.latest.to_le_bytes());
                let words = chunk.present.0.iter().chain(&chunk.data.0).chain(&chunk.owed.0);
                bytes.extend(words.flat_map(|word| word.to_le_bytes()));
            }
        }
        bytes.extend((self.objects.len() as u32).to_le_bytes());
        for (vpid, place) in &self.objects {
            bytes.extend(vpid.0.to_le_bytes());
            bytes.extend(encoded(place));
        }
        bytes.extend(u32::from(self.namespace.is_some()).to_le_bytes());
        bytes.extend(self.namespace.iter().flat_map(encoded));
        bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
        bytes
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, IndexError> {
        let (body, checksum) = bytes.split_last_chunk::<4>().ok_or(IndexError::Length)?;
        let body = body.strip_prefix(&MAGIC).ok_or(IndexError::Magic)?;
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&MAGIC);
        hasher.update(body);
        if hasher.finalize() != u32::from_le_bytes(*checksum) {
            return Err(IndexError::Checksum);
        }
        let mut reader = Reader(body);
        let (processes, slots) = (reader.u32()?, reader.u32()?);
        let mut index = Self { slots, ..Self::default() };
        for _ in 0..processes {
            let (vpid, count) = (Vpid(reader.u32()?), reader.u32()?);
            let mut stored = Stored { generation: Generation(reader.u64()?), chunks: BTreeMap::new() };
            for _ in 0..count {
                let (number, chunk) = reader.chunk(slots, vpid.is_object())?;
                stored.chunks.insert(number, chunk);
            }
            index.processes.insert(vpid, stored);
        }
        for _ in 0..reader.u32()? {
            index.objects.insert(Vpid(reader.u32()?), reader.place()?);
        }
        index.namespace = match reader.u32()? {
            0 => None,
            1 => Some(reader.place()?),
            _ => return Err(IndexError::Length),
        };
        let among_processes = index.processes.keys().filter(|vpid| vpid.is_object());
        if let Some(vpid) = among_processes.clone().find(|vpid| !index.objects.contains_key(vpid)) {
            return Err(IndexError::Object(*vpid));
        }
        let is_extra = |vpid: &&Vpid| !vpid.is_object() || !index.processes.contains_key(vpid);
        if let Some(vpid) = index.objects.keys().find(is_extra) {
            return Err(IndexError::Object(*vpid));
        }
        if reader.0.is_empty() { Ok(index) } else { Err(IndexError::Length) }
    }
}

fn encoded(Place { pid, descriptor, device, inode }: &Place) -> Vec<u8> {
    let numbers = [pid, descriptor].into_iter().flat_map(|number| number.to_le_bytes());
    numbers.chain([device, inode].into_iter().flat_map(|number| number.to_le_bytes())).collect()
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], IndexError> {
        let (bytes, rest) = self.0.split_first_chunk().ok_or(IndexError::Length)?;
        self.0 = rest;
        Ok(*bytes)
    }

    fn u32(&mut self) -> Result<u32, IndexError> {
        Ok(u32::from_le_bytes(self.take()?))
    }

    fn u64(&mut self) -> Result<u64, IndexError> {
        Ok(u64::from_le_bytes(self.take()?))
    }

    fn place(&mut self) -> Result<Place, IndexError> {
        let (pid, descriptor) = (self.u32()?, self.u32()?);
        Ok(Place { pid, descriptor, device: self.u64()?, inode: self.u64()? })
    }

    fn bits(&mut self) -> Result<Bits, IndexError> {
        let mut bits = Bits::default();
        for word in &mut bits.0 {
            *word = self.u64()?;
        }
        Ok(bits)
    }

    fn chunk(&mut self, slots: u32, of_object: bool) -> Result<(u64, Chunk), IndexError> {
        let (number, slot, latest) = (self.u64()?, self.u32()?, self.u32()?);
        let slot = (slot != NO_SLOT).then_some(slot);
        let chunk = Chunk { slot, latest, present: self.bits()?, data: self.bits()?, owed: self.bits()? };
        let homeless = slot.is_none() && !chunk.data.or(chunk.owed).is_empty();
        let misplaced = slot.is_some_and(|slot| match of_object {
            true => u64::from(slot) != number,
            false => slot >= slots,
        });
        // Shared memory is there when it is mapped.
        let indebted = of_object && !chunk.owed.is_empty();
        if number >= PageNo::END.0.div_ceil(CHUNK_PAGES) || misplaced || homeless || indebted {
            return Err(IndexError::Chunk(number));
        }
        Ok((number, chunk))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn index() -> Index {
        let zero = Chunk { present: Bits([5; 8]), ..Chunk::default() };
        let (data, owed) = (Bits([9; 8]), Bits([6; 8]));
        let full = Chunk { slot: Some(3), latest: 7, present: Bits([u64::MAX; 8]), data, owed };
        let stored = Stored { generation: Generation(77), chunks: [(4, zero), (9, full)].into() };
        let empty = Stored { generation: Generation(1), chunks: BTreeMap::new() };
        let object = Vpid::of_object(0);
        let there = Chunk { slot: Some(70), owed: Bits::default(), ..full };
        let shared = Stored { generation: Generation(8), chunks: [(70, there)].into() };
        let place = Place { pid: 9, descriptor: 3, device: 1, inode: 8 };
        let processes = [(Vpid(1), stored), (Vpid(2), empty), (object, shared)].into();
        let namespace = Some(Place { descriptor: 5, ..place });
        Index { processes, objects: [(object, place)].into(), namespace, slots: 4 }
    }

    #[test]
    fn an_index_comes_back_as_it_was() {
        for index in [index(), Index { namespace: None, ..index() }] {
            assert_eq!(Index::decode(&index.encode()), Ok(index));
        }
    }

    proptest! {
        #[test]
        fn any_damage_is_noticed(at in any::<prop::sample::Index>(), bit in 0..8_u8) {
            let mut bytes = index().encode();
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            prop_assert!(Index::decode(&bytes).is_err());
            prop_assert!(Index::decode(&bytes[..at]).is_err());
        }
    }

    #[test]
    fn an_object_is_on_both_lists_and_in_its_own_place() {
        let (object, mut wrong) = (Vpid::of_object(0), index());
        wrong.objects.clear();
        assert_eq!(Index::decode(&wrong.encode()), Err(IndexError::Object(object)));
        let mut wrong = index();
        wrong.processes.remove(&object);
        assert_eq!(Index::decode(&wrong.encode()), Err(IndexError::Object(object)));
        let mut wrong = index();
        wrong.processes.get_mut(&object).unwrap().chunks.get_mut(&70).unwrap().slot = Some(3);
        assert_eq!(Index::decode(&wrong.encode()), Err(IndexError::Chunk(70)));
    }

    #[test]
    fn a_slot_outside_the_data_file_is_refused() {
        let wrong = Index { slots: 3, ..index() };
        assert_eq!(Index::decode(&wrong.encode()), Err(IndexError::Chunk(9)));
    }
}
