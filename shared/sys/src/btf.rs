//! Where the running kernel keeps a field: `/sys/kernel/btf/vmlinux`, its types as the BPF type format has them.
//!
//! # References
//! `Documentation/bpf/btf.rst` and `include/uapi/linux/btf.h`.
//!
//! Read by ourselves: of the crates that do, one is under a licence that our programs, which are linked statically,
//! cannot carry, and the other keeps the members of structures to itself.

use std::ops::Range;

const VMLINUX: &str = "/sys/kernel/btf/vmlinux";
const MAGIC: u16 = 0xeb9f;
/// Of a type: its name, its kind with the number of things that follow, and its size or what it refers to.
const TYPE: usize = 12;
/// Of a member of a structure: its name, its type, and where it is.
const MEMBER: usize = 12;
const STRUCT: u32 = 4;
const UNION: u32 = 5;
const FUNC: u32 = 12;
/// How deep structures and unions without a name may lie within one another. In the kernel it is two or three.
const DEEPEST: u32 = 8;

/// The types of a kernel.
#[derive(Debug)]
pub(crate) struct Btf {
    bytes: Vec<u8>,
    strings: Range<usize>,
    /// Where each type begins in `bytes`, by its id less one: 0 is "no type".
    types: Vec<usize>,
}

#[derive(Debug, Clone, Copy)]
struct Type {
    name: u32,
    kind: u32,
    /// How many members or the like follow.
    count: usize,
    /// Offsets of members are accompanied by widths of bit fields.
    has_bit_fields: bool,
    /// Where what follows begins.
    rest: usize,
}

impl Btf {
    /// That of the running kernel.
    ///
    /// # Errors
    /// `NotFound` where the kernel does not tell; `InvalidData` when it is not understood.
    pub(crate) fn of_kernel() -> std::io::Result<Self> {
        Self::parse(std::fs::read(VMLINUX)?).ok_or_else(|| std::io::ErrorKind::InvalidData.into())
    }

    fn parse(bytes: Vec<u8>) -> Option<Self> {
        let header = word(&bytes, 4)? as usize;
        if u16::try_from(word(&bytes, 0)? & 0xffff) != Ok(MAGIC) {
            return None;
        }
        let section = |at| {
            let start = header.checked_add(word(&bytes, at)? as usize)?;
            let end = start.checked_add(word(&bytes, at + 4)? as usize)?;
            (end <= bytes.len()).then_some(start..end)
        };
        let (all, strings) = (section(8)?, section(16)?);
        let (mut types, mut at) = (Vec::new(), all.start);
        while at < all.end {
            types.push(at);
            let found = type_at(&bytes, at)?;
            at = found.rest.checked_add(following(found)?)?;
        }
        Some(Self { bytes, strings, types })
    }

    /// The id of the function called `name`.
    pub(crate) fn function(&self, name: &str) -> Option<u32> {
        self.find(FUNC, name).map(|(id, _)| id)
    }

    /// Where the structure `name` has its field `field`, in bytes from its beginning. Fields of structures and unions
    /// without a name within it are its own.
    pub(crate) fn offset(&self, name: &str, field: &str) -> Option<u64> {
        let (_, found) = self.find(STRUCT, name)?;
        let bits = self.member(found, field, DEEPEST)?;
        (bits % 8 == 0).then_some(u64::from(bits) / 8)
    }

    fn find(&self, kind: u32, name: &str) -> Option<(u32, Type)> {
        (1..).zip(&self.types).find_map(|(id, at)| {
            let found = type_at(&self.bytes, *at)?;
            (found.kind == kind && self.is_called(found.name, name)).then_some((id, found))
        })
    }

    /// In bits.
    fn member(&self, of: Type, field: &str, deepest: u32) -> Option<u32> {
        (0..of.count).find_map(|index| {
            let at = of.rest + index * MEMBER;
            let (name, id, offset) =
                (word(&self.bytes, at)?, word(&self.bytes, at + 4)?, word(&self.bytes, at + 8)?);
            let offset = if of.has_bit_fields { offset & 0x00ff_ffff } else { offset };
            if name != 0 {
                return self.is_called(name, field).then_some(offset);
            }
            let within = type_at(&self.bytes, *self.types.get(id.checked_sub(1)? as usize)?)?;
            let is_searched = deepest > 0 && [STRUCT, UNION].contains(&within.kind);
            is_searched.then(|| self.member(within, field, deepest - 1)).flatten()?.checked_add(offset)
        })
    }

    fn is_called(&self, name: u32, wanted: &str) -> bool {
        let start = self.strings.start + name as usize;
        let found = self.bytes.get(start..self.strings.end);
        found
            .and_then(|rest| rest.strip_prefix(wanted.as_bytes()))
            .is_some_and(|rest| rest.first() == Some(&0))
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|bytes| u32::from_le_bytes(*bytes))
}

fn type_at(bytes: &[u8], at: usize) -> Option<Type> {
    let (name, info) = (word(bytes, at)?, word(bytes, at + 4)?);
    let (kind, count) = (info >> 24 & 0x1f, info & 0xffff);
    Some(Type { name, kind, count: count as usize, has_bit_fields: info >> 31 == 1, rest: at + TYPE })
}

/// How many bytes of its own follow a type. A kind that is newer than this makes the rest unreadable.
fn following(found: Type) -> Option<usize> {
    match found.kind {
        // An integer, a variable, a tag of a declaration.
        1 | 14 | 17 => Some(4),
        // An array.
        3 => Some(12),
        // Structures, unions, sections and enumerations of 64 bits.
        STRUCT | UNION | 15 | 19 => Some(found.count * MEMBER),
        // Enumerations and the parameters of functions.
        6 | 13 => Some(found.count * 8),
        // Pointers, declarations ahead, names, qualifiers, functions, floats, tags of types.
        2 | 7..=12 | 16 | 18 => Some(0),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A type format with `struct outer { u64 first; union { struct { u64 inner; }; }; }` and a function `outer`.
    fn sample(kind_of_last: u32) -> Vec<u8> {
        let strings = b"\0u64\0outer\0first\0inner\0";
        let of = |kind: u32, count: u32| kind << 24 | count;
        let types: Vec<u32> = [
            [1, of(1, 0), 8, 64].as_slice(),
            &[0, of(STRUCT, 1), 8, 17, 1, 0],
            &[0, of(UNION, 1), 8, 0, 2, 0],
            &[5, of(STRUCT, 2), 16, 11, 1, 0, 0, 3, 64],
            &[5, of(kind_of_last, 0), 0],
        ]
        .concat();
        let (length, mut bytes) = (types.len() as u32 * 4, Vec::new());
        bytes.extend(MAGIC.to_le_bytes());
        bytes.extend([1, 0]);
        let header = [24, 0, length, length, strings.len() as u32];
        header.iter().chain(&types).for_each(|word| bytes.extend(word.to_le_bytes()));
        bytes.extend(strings);
        bytes
    }

    #[test]
    fn fields_of_what_has_no_name_are_found_where_they_are() {
        let btf = Btf::parse(sample(FUNC)).unwrap();
        assert_eq!(btf.offset("outer", "first"), Some(0));
        assert_eq!(btf.offset("outer", "inner"), Some(8));
        assert_eq!((btf.offset("outer", "inne"), btf.offset("oute", "first")), (None, None));
        assert_eq!((btf.function("outer"), btf.function("u64")), (Some(5), None));
    }

    #[test]
    fn what_is_not_understood_is_nothing() {
        assert!(Btf::parse(sample(31)).is_none());
        let whole = sample(FUNC);
        for length in 0..whole.len() {
            assert!(Btf::parse(whole.iter().copied().take(length).collect()).is_none(), "{length}");
        }
    }
}
