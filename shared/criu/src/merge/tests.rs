//! The merge against a naive model: a map from address to page.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::image::{ImageReader, PAGE_SIZE};

const PID: u32 = 1;
const PAGES_ID: u32 = 3;

#[derive(Clone, PartialEq, prost::Message)]
struct AnyNumber {
    #[prost(uint32, required, tag = "1")]
    number: u32,
}

#[derive(Clone, PartialEq, prost::Message)]
struct AnyMm {
    #[prost(message, repeated, tag = "14")]
    mappings: Vec<Mapping>,
}

type Pages = BTreeMap<u64, u8>;

/// A page's content is its one byte, repeated.
struct Stored {
    runs: std::vec::IntoIter<PageRun>,
    pages: Pages,
}

impl Stored {
    fn new(pages: &Pages) -> Self {
        Self { runs: runs(pages).into_iter(), pages: pages.clone() }
    }
}

impl PageSource for Stored {
    fn next_run(&mut self) -> io::Result<Option<PageRun>> {
        Ok(self.runs.next())
    }

    fn read_at(&mut self, address: u64, buffer: &mut [u8]) -> io::Result<()> {
        for (page, chunk) in buffer.chunks_mut(PAGE_SIZE as usize).enumerate() {
            let content = self.pages.get(&(address + page as u64 * PAGE_SIZE));
            chunk.fill(*content.ok_or(ErrorKind::NotFound)?);
        }
        Ok(())
    }
}

fn runs(pages: &Pages) -> Vec<PageRun> {
    let mut runs: Vec<PageRun> = Vec::new();
    for address in pages.keys() {
        match runs.last_mut() {
            Some(run) if run.end() == *address => run.pages += 1,
            _ => runs.push(PageRun::new(*address, 1).unwrap()),
        }
    }
    runs
}

/// From here on memory is locked and cannot come later.
const LOCKED: u64 = 0x1000 + 200 * PAGE_SIZE;

/// The images of a process with two mappings of the first 256 pages after 0x1000, as CRIU would write them.
fn received(dir: &Path, dumped: &Pages) {
    received_with(dir, dumped, Laziness::Eager);
}

fn received_with(dir: &Path, dumped: &Pages, laziness: Laziness) {
    let image = |name: &str, kind| ImageWriter::create(&dir.join(name), kind).unwrap();
    let mut inventory = image("inventory.img", ImageKind::Inventory);
    inventory.append(&AnyNumber { number: 2 }).unwrap();
    inventory.finish().unwrap();
    let mut tree = image("pstree.img", ImageKind::Pstree);
    tree.append(&pstree::Process { pid: PID, parent: 0, group: PID, session: PID, threads: vec![PID] })
        .unwrap();
    tree.finish().unwrap();
    let mut mm = image("mm-1.img", ImageKind::Mm);
    let free = Mapping { start: 0x1000, end: LOCKED, flags: 0x22, status: 1 << 9 | 1 };
    let locked =
        Mapping { start: LOCKED, end: 0x1000 + 256 * PAGE_SIZE, flags: 0x22 | 0x2000, status: 1 << 9 | 1 };
    mm.append(&AnyMm { mappings: vec![free, locked] }).unwrap();
    mm.finish().unwrap();
    let mut map = PagemapWriter::new(image("pagemap-1.img", ImageKind::Pagemap), PAGES_ID).unwrap();
    for run in runs(dumped) {
        map.append(run, laziness).unwrap();
    }
    map.finish().unwrap();
    let content: Vec<u8> = dumped.values().flat_map(|byte| [*byte; PAGE_SIZE as usize]).collect();
    fs::write(dir.join("pages-3.img"), content).unwrap();
}

fn read_back(dir: &Path) -> BTreeMap<u64, (u8, Laziness)> {
    let content = fs::read(dir.join("pages-3.img")).unwrap();
    let mut content = content.chunks_exact(PAGE_SIZE as usize);
    let mut map = PagemapReader::open(dir, PID).unwrap();
    let mut pages = BTreeMap::new();
    while let Some((run, laziness)) = map.next_run().unwrap() {
        for page in 0..run.pages {
            let address = run.start + page * PAGE_SIZE;
            if laziness == Laziness::Elsewhere {
                pages.insert(address, (0, laziness));
                continue;
            }
            let content = content.next().unwrap();
            assert!(content.iter().all(|byte| *byte == content[0]));
            pages.insert(address, (content[0], laziness));
        }
    }
    assert!(content.next().is_none(), "content without an entry");
    pages
}

/// `None` has no page, `Some((false, byte))` CRIU's, `Some((true, byte))` ours.
fn sides(pages: &[Option<(bool, u8)>]) -> (Pages, Pages) {
    let (mut dumped, mut stored) = (Pages::new(), Pages::new());
    for (index, page) in pages.iter().enumerate() {
        if let Some((ours, byte)) = page {
            let side = if *ours { &mut stored } else { &mut dumped };
            side.insert(0x1000 + index as u64 * PAGE_SIZE, *byte);
        }
    }
    (dumped, stored)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn a_merge_is_the_union(pages in prop::collection::vec(any::<Option<(bool, u8)>>(), 0..256)) {
        let (from, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let out = out.path().join("complete");
        let (dumped, stored) = sides(&pages);
        received(from.path(), &dumped);
        let before = read_back(from.path());
        // Twice: an assembly that was cut off is begun again.
        for _ in 0..2 {
            let assembly = Assembly::begin(from.path(), &out).unwrap();
            let merged = assembly.add_pages(PID, &mut Stored::new(&stored), Fill::AtRestore).unwrap();
            prop_assert_eq!(merged, Merged { dumped: dumped.len() as u64, stored: stored.len() as u64, later: 0 });
        }
        let mut expected = BTreeMap::new();
        expected.extend(dumped.iter().map(|(address, byte)| (*address, (*byte, Laziness::Eager))));
        expected.extend(stored.iter().map(|(address, byte)| (*address, (*byte, Laziness::Lazy))));
        prop_assert_eq!(read_back(&out), expected);
        prop_assert_eq!(read_back(from.path()), before, "the received images were touched");
    }

    #[test]
    fn what_is_served_later_is_named_and_not_copied(pages in prop::collection::vec(any::<Option<(bool, u8)>>(), 0..256)) {
        let (from, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let out = out.path().join("complete");
        let (dumped, stored) = sides(&pages);
        received(from.path(), &dumped);
        let assembly = Assembly::begin(from.path(), &out).unwrap();
        let merged = assembly.add_pages(PID, &mut Stored::new(&stored), Fill::Later).unwrap();
        let later = stored.keys().filter(|address| **address < LOCKED).count() as u64;
        prop_assert_eq!(merged, Merged { dumped: dumped.len() as u64, stored: stored.len() as u64, later });
        let mut expected = BTreeMap::new();
        expected.extend(dumped.iter().map(|(address, byte)| (*address, (*byte, Laziness::Eager))));
        expected.extend(stored.iter().map(|(address, byte)| match *address < LOCKED {
            true => (*address, (0, Laziness::Elsewhere)),
            false => (*address, (*byte, Laziness::Eager)),
        }));
        prop_assert_eq!(read_back(&out), expected);
    }

    #[test]
    fn a_page_from_both_sides_is_refused(
        pages in prop::collection::vec(any::<Option<(bool, u8)>>(), 1..64),
        both in any::<prop::sample::Index>(),
    ) {
        let (from, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (mut dumped, mut stored) = sides(&pages);
        let address = 0x1000 + both.index(pages.len()) as u64 * PAGE_SIZE;
        dumped.insert(address, 1);
        stored.insert(address, 2);
        received(from.path(), &dumped);
        let assembly = Assembly::begin(from.path(), &out.path().join("complete")).unwrap();
        let error = assembly.add_pages(PID, &mut Stored::new(&stored), Fill::AtRestore).unwrap_err();
        prop_assert!(matches!(error, MergeError::Overlap { .. }), "{}", error);
    }
}

#[test]
fn stored_pages_must_be_wanted_and_in_order() {
    let (from, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let out = out.path().join("complete");
    received(from.path(), &Pages::new());
    let add = |runs: Vec<PageRun>| {
        let pages =
            runs.iter().flat_map(|run| (0..run.pages).map(|n| (run.start + n * PAGE_SIZE, 1))).collect();
        let mut source = Stored { runs: runs.into_iter(), pages };
        Assembly::begin(from.path(), &out).unwrap().add_pages(PID, &mut source, Fill::AtRestore)
    };
    let run = |start, pages| PageRun::new(start, pages).unwrap();
    assert!(add(vec![run(0x1000, 256)]).is_ok());
    let last = 0x1000 + 256 * PAGE_SIZE;
    assert!(
        matches!(add(vec![run(0x1000, 257)]), Err(MergeError::Unmapped { address, .. }) if address == last)
    );
    assert!(matches!(add(vec![run(0, 1)]), Err(MergeError::Unmapped { address: 0, .. })));
    assert!(matches!(add(vec![run(0x2000, 1), run(0x1000, 1)]), Err(MergeError::Order { .. })));
    let assembly = Assembly::begin(from.path(), &out).unwrap();
    assert!(matches!(
        assembly.add_pages(9, &mut Stored::new(&Pages::new()), Fill::AtRestore),
        Err(MergeError::NoProcess(9))
    ));
}

/// Nothing of it is stored, say because it has just begun to run another program. CRIU's marks would leave its stack to
/// a server that does not have it.
#[test]
fn what_criu_dumped_never_comes_later() {
    let (from, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let dumped = Pages::from([(0x1000, 1), (0x2000, 2)]);
    received_with(from.path(), &dumped, Laziness::Lazy);
    let assembly = Assembly::begin(from.path(), out.path()).unwrap();
    assembly.add_pages(PID, &mut Stored::new(&Pages::new()), Fill::Later).unwrap();
    let eager = dumped.into_iter().map(|(address, byte)| (address, (byte, Laziness::Eager)));
    assert_eq!(read_back(out.path()), eager.collect());
}

#[test]
fn a_zombie_has_no_memory() {
    let (from, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    received(from.path(), &Pages::new());
    for name in ["mm-1.img", "pagemap-1.img", "pages-3.img"] {
        fs::remove_file(from.path().join(name)).unwrap();
    }
    let assembly = Assembly::begin(from.path(), out.path()).unwrap();
    let add = |pages| assembly.add_pages(PID, &mut Stored::new(&pages), Fill::Later);
    assert_eq!(add(Pages::new()).unwrap(), Merged::default());
    assert!(matches!(add(Pages::from([(0x1000, 1)])), Err(MergeError::Unmapped { .. })));
}

#[test]
fn a_truncated_pages_image_is_refused() {
    let (from, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    received(from.path(), &Pages::from([(0x1000, 1), (0x2000, 2)]));
    let pages = File::options().write(true).open(from.path().join("pages-3.img")).unwrap();
    pages.set_len(PAGE_SIZE + 1).unwrap();
    let assembly = Assembly::begin(from.path(), &out.path().join("complete")).unwrap();
    assert!(matches!(
        assembly.add_pages(PID, &mut Stored::new(&Pages::new()), Fill::AtRestore),
        Err(MergeError::Image(ImageError::Io { .. }))
    ));
    let mut cut = fs::read(from.path().join("pagemap-1.img")).unwrap();
    cut.pop();
    let mut reader = ImageReader::new(Path::new("cut"), ImageKind::Pagemap, &cut[..]).unwrap();
    let _: AnyNumber = reader.read().unwrap().unwrap();
    assert!(matches!(reader.read::<AnyNumber>(), Err(ImageError::Damaged { .. })));
}
