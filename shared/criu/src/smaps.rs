//! `/proc/<pid>/smaps` as CRIU reads it, and the same without mappings that it shall not know of.
//!
//! CRIU learns of mappings from this file alone (`parse_smaps` of `criu/proc_parse.c`). What it is not told of it
//! neither dumps nor names in its images; so what is left out here is described as its images would
//! ([`LeftOutMapping`]), and added to them before the restore ([`crate::shared`]).

use std::ops::Range;

use haulage_sys::ADDRESS_END;
use haulage_sys::vm_flags::Flagged;

use crate::shared::LeftOutMapping;

/// Protections and flags of `mmap(2)`.
const READ: u32 = 1;
const WRITE: u32 = 2;
const EXECUTE: u32 = 4;
const MAP_SHARED: u32 = 0x01;
const MAP_PRIVATE: u32 = 0x02;
const MAP_ANONYMOUS: u32 = 0x20;
/// A System V segment, whose id stands in the place of its inode number and may be 0.
const SEGMENT: &str = " /SYSV";
/// What the kernel puts behind its name.
const DELETED: &str = " (deleted)";
/// Flags that `VmFlags` tells, as CRIU takes them over (`__parse_vmflags` of `criu/proc_parse.c`).
const FLAGS: [(&str, u32); 2] = [("lo", 0x2000), ("nr", 0x4000)];
/// Advice, by its number in `madvise(2)`.
const ADVICE: [(&str, u32); 7] =
    [("sr", 2), ("rr", 1), ("dc", 10), ("dd", 16), ("mg", 12), ("hg", 14), ("nh", 15)];

/// A bit for each advice that a mapping can be told to have.
pub(crate) fn all_advice() -> u64 {
    ADVICE.iter().fold(0, |all, (_, number)| all | 1 << number)
}

/// What `VmFlags` may tell of a private mapping that is left out: what is in an image, or is of no account to a restore
/// (`um` and `uw` are our own tracking).
const PLAIN: [&str; 18] = [
    "rd", "wr", "ex", "mr", "mw", "me", "ac", "sd", "um", "uw", "nr", "sr", "rr", "dc", "dd", "mg", "hg",
    "nh",
];

/// A file that is not what `proc(5)` says, or lacks a mapping that was there.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SmapsError {
    /// A line is not understood.
    #[error("line {0:?} of smaps is not understood")]
    Line(String),
    /// A mapping that is to be left out is not there, or is no shared one.
    #[error("no shared mapping at {0:#x}")]
    Missing(u64),
}

/// `smaps` without the shared mappings that are `hidden` and those of the private ones in `needless` that an image can
/// describe (addresses, each exactly one mapping), and these.
///
/// # Errors
/// See [`SmapsError`].
pub(crate) fn without(
    smaps: &str,
    hidden: &[Range<u64>],
    needless: &[Range<u64>],
) -> Result<(String, Vec<LeftOutMapping>), SmapsError> {
    let (mut rest, mut found) = (String::with_capacity(smaps.len()), Vec::<LeftOutMapping>::new());
    for (range, about) in mappings(smaps) {
        let (head, flags) = about.lines().fold(("", ""), |(head, flags), line| match range_of(line) {
            Some(_) => (line, flags),
            None => (head, line.strip_prefix("VmFlags:").unwrap_or(flags)),
        });
        let is_plain =
            || !flags.is_empty() && flags.split_ascii_whitespace().all(|word| PLAIN.contains(&word));
        let left_out = match range {
            Some(range) if hidden.contains(&range) => {
                let mapping = mapping(head, range).filter(|mapping| !mapping.is_private());
                Some(mapping.ok_or_else(|| SmapsError::Line(head.to_owned()))?)
            }
            Some(range) if needless.contains(&range) && is_plain() => mapping(head, range),
            _ => None,
        };
        match left_out {
            Some(mapping) => found.push(with_flags(mapping, flags)),
            None => rest.push_str(about),
        }
    }
    let missing = hidden.iter().find(|range| !found.iter().any(|mapping| mapping.start == range.start));
    match missing {
        Some(range) => Err(SmapsError::Missing(range.start)),
        None => Ok((rest, found)),
    }
}

/// What `smaps` says but for the counts of pages: the lines of a `maps`, and the flags of the same mappings. Nothing
/// unless they are of one moment. Of what lies above user memory no flags are told.
pub(crate) fn from_maps(maps: &str, told: &[Flagged]) -> Option<String> {
    let mut told = told.iter();
    let mut smaps = String::with_capacity(2 * maps.len());
    for line in maps.split_inclusive('\n') {
        let range = range_of(line)?;
        smaps.push_str(line);
        if range.start < ADDRESS_END {
            let Flagged { words, .. } = told.next().filter(|told| (told.start..told.end) == range)?;
            smaps.push_str(&format!("VmFlags: {words} \n"));
        }
    }
    told.next().is_none().then_some(smaps)
}

/// The mappings with all that is said of each.
fn mappings(smaps: &str) -> impl Iterator<Item = (Option<Range<u64>>, &str)> {
    let mut rest = smaps;
    std::iter::from_fn(move || {
        let first = rest.split_inclusive('\n').next()?;
        let others = rest.split_inclusive('\n').skip(1).take_while(|line| range_of(line).is_none());
        let (about, after) = rest.split_at_checked(first.len() + others.map(str::len).sum::<usize>())?;
        rest = after;
        Some((range_of(first), about))
    })
}

fn with_flags(mut mapping: LeftOutMapping, flags: &str) -> LeftOutMapping {
    let told = |flag: &&str| flags.split_ascii_whitespace().any(|word| word == *flag);
    mapping.flags |= FLAGS.iter().filter(|(name, _)| told(name)).fold(0, |all, (_, flag)| all | flag);
    let advice = ADVICE.iter().filter(|(name, _)| told(name)).fold(0, |all, (_, number)| all | 1 << number);
    mapping.madv = (advice != 0).then_some(advice);
    mapping.read_only = (!mapping.is_private() && !told(&"mw")).then_some(true);
    mapping
}

/// The addresses, if the line begins a mapping: `start-end perms offset device inode name`.
fn range_of(line: &str) -> Option<Range<u64>> {
    let (start, end) = line.split_once(' ')?.0.split_once('-')?;
    Some(u64::from_str_radix(start, 16).ok()?..u64::from_str_radix(end, 16).ok()?)
}

fn mapping(line: &str, range: Range<u64>) -> Option<LeftOutMapping> {
    let mut fields = line.split_ascii_whitespace().skip(1);
    let (permissions, offset, _device) = (fields.next()?, fields.next()?, fields.next()?);
    let &[read, write, execute, sharing] = permissions.as_bytes() else { return None };
    let object = fields.next()?.parse().ok()?;
    let is_segment = || line.trim_end().ends_with(DELETED) && line.contains(SEGMENT);
    let flags = match (sharing, object) {
        (b's', 1..) => MAP_SHARED,
        (b's', 0) if is_segment() => MAP_SHARED,
        (b'p', 0) if fields.next().is_none() => MAP_PRIVATE | MAP_ANONYMOUS,
        _ => return None,
    };
    let allowed = [(read == b'r', READ), (write == b'w', WRITE), (execute == b'x', EXECUTE)];
    Some(LeftOutMapping {
        start: range.start,
        end: range.end,
        offset: u64::from_str_radix(offset, 16).ok()?,
        object,
        prot: allowed.iter().filter(|(is_allowed, _)| *is_allowed).fold(0, |all, (_, bit)| all | bit),
        flags,
        madv: None,
        read_only: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
7f0000000000-7f0000004000 rw-s 00002000 00:01 77                         /dev/zero (deleted)
Size:                 16 kB
VmFlags: rd wr sh mr mw me ms nr dd sd 
7f0000004000-7f0000006000 rw-p 00000000 00:00 0 
Size:                  8 kB
VmFlags: rd wr mr mw me ac sd 
7f0000008000-7f0000009000 r--s 00000000 00:01 77                         /dev/zero (deleted)
VmFlags: rd mr me ms sd 
";

    const VSYSCALL: &str =
        "ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]\n";

    #[test]
    fn what_is_hidden_is_described_and_the_rest_is_as_it_was() {
        let hidden = [0x7f00_0000_8000..0x7f00_0000_9000, 0x7f00_0000_0000..0x7f00_0000_4000];
        let (rest, found) = without(SMAPS, &hidden, &[]).unwrap();
        assert_eq!(rest, SMAPS.lines().skip(3).take(3).map(|line| format!("{line}\n")).collect::<String>());
        let first = LeftOutMapping {
            start: 0x7f00_0000_0000,
            end: 0x7f00_0000_4000,
            offset: 0x2000,
            object: 77,
            prot: READ | WRITE,
            flags: MAP_SHARED | 0x4000,
            madv: Some(1 << 16),
            read_only: None,
        };
        let second = LeftOutMapping {
            start: 0x7f00_0000_8000,
            end: 0x7f00_0000_9000,
            offset: 0,
            object: 77,
            prot: READ,
            flags: MAP_SHARED,
            madv: None,
            read_only: Some(true),
        };
        assert_eq!(found, [first, second]);
    }

    #[test]
    fn a_segment_s_number_may_be_zero_and_that_of_another_mapping_not() {
        let smaps =
            SMAPS.replace("77                         /dev/zero", "0                         /SYSV00000a01");
        let hidden = [0x7f00_0000_0000..0x7f00_0000_4000, 0x7f00_0000_8000..0x7f00_0000_9000];
        let (rest, found) = without(&smaps, &hidden, &[]).unwrap();
        assert_eq!(rest.lines().count(), 3);
        assert!(found.len() == 2 && found.iter().all(|found| found.object == 0 && !found.is_private()));
        assert!(without(&SMAPS.replace(" 77 ", " 0 "), &hidden, &[]).is_err());
    }

    #[test]
    fn maps_and_flags_say_what_smaps_does() {
        let is_counted = |line: &&str| line.starts_with("Size");
        let maps: String =
            SMAPS.split_inclusive('\n').filter(|line| line.contains('-')).collect::<String>() + VSYSCALL;
        let flags = SMAPS.lines().filter_map(|line| line.strip_prefix("VmFlags: "));
        let told = maps.lines().zip(flags).map(|(line, words)| {
            let Range { start, end } = range_of(line).unwrap();
            Flagged { start, end, words: words.trim().to_owned() }
        });
        let told: Vec<_> = told.collect();
        let expected: String = SMAPS.split_inclusive('\n').filter(|line| !is_counted(line)).collect();
        assert_eq!(from_maps(&maps, &told).unwrap(), expected + VSYSCALL);
        // Of another moment.
        assert_eq!(from_maps(&maps, &told[1..]), None);
        let more: Vec<_> = told.iter().chain(&told[2..]).cloned().collect();
        assert_eq!(from_maps(&maps, &more), None);
    }

    #[test]
    fn what_is_not_there_or_not_shared_cannot_be_hidden() {
        for range in [0x7f00_0000_0000..0x7f00_0000_3000, 0x1000..0x2000] {
            let start = range.start;
            assert_eq!(without(SMAPS, &[range], &[]), Err(SmapsError::Missing(start)));
        }
        assert!(matches!(
            without(SMAPS, std::slice::from_ref(&(0x7f00_0000_4000..0x7f00_0000_6000)), &[]),
            Err(SmapsError::Line(_))
        ));
    }

    #[test]
    fn a_plain_private_mapping_may_be_left_out_and_another_stays() {
        let other = SMAPS.replace("mw me ac sd", "mw me ac sd wf");
        let needless = 0x7f00_0000_4000..0x7f00_0000_6000;
        let (rest, found) = without(SMAPS, &[], std::slice::from_ref(&needless)).unwrap();
        assert_eq!(rest.lines().count(), 5);
        let flags = MAP_PRIVATE | MAP_ANONYMOUS;
        assert_eq!(
            found.iter().map(|found| (found.start, found.flags)).collect::<Vec<_>>(),
            [(needless.start, flags)]
        );
        assert_eq!(without(&other, &[], &[needless]).unwrap(), (other.clone(), vec![]));
    }
}
