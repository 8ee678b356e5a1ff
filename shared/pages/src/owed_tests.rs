use super::*;
use proptest::prelude::*;
use std::collections::BTreeSet;

fn process(vpid: u32) -> Process {
    Process { pid: rustix::process::getpid(), vpid: Vpid(vpid), generation: Generation(u64::from(vpid)) }
}

fn range(start: u64, count: u64) -> PageRange {
    PageRange::with_count(PageNo(start), count).unwrap()
}

fn pages(errand: &Errand) -> Vec<(u32, u64)> {
    errand.pages.pages().map(|page| (errand.process.vpid.0, page.0)).collect()
}

#[test]
fn the_hottest_goes_first_and_what_was_written_last_is_hottest() {
    let mut owed = Owed::new(1);
    // Written two rounds ago, never, in the last round, and since then.
    owed.owe(process(1), &[(0b10, range(10, 2)), (0, range(20, 2)), (0b1, range(30, 1))], false);
    owed.owe(process(2), &[(0, range(5, 1))], true);
    owed.sort();
    assert_eq!(owed.pages(), 6);
    assert_eq!(pages(&owed.next_errand().unwrap()), [(2, 5)]);
    // One errand is of one process, and goes on with the next in heat.
    assert_eq!(owed.order.last(), Some(&(0b1000_0000, Vpid(1), range(30, 1))));
    assert_eq!(pages(&owed.next_errand().unwrap()), [(1, 10), (1, 11), (1, 20), (1, 21), (1, 30)]);
    assert_eq!(owed.next_errand(), None);
}

#[test]
fn an_ask_is_answered_for_what_is_owed_and_for_nothing_else() {
    let mut owed = Owed::new(1);
    owed.owe(process(1), &[(0, range(10, 200))], false);
    owed.sort();
    let ask = |vpid, generation, pages| Ask { vpid: Vpid(vpid), generation: Generation(generation), pages };
    assert_eq!(owed.asked(ask(2, 2, range(10, 1))), None);
    assert_eq!(owed.asked(ask(1, 7, range(10, 1))), None);
    assert_eq!(owed.asked(ask(1, 1, range(300, 1))), None);
    assert_eq!(owed.asked(ask(1, 1, range(5, 10))).unwrap().pages.runs(), [range(10, 5)]);
    assert_eq!(owed.asked(ask(1, 1, range(20, 1000))).unwrap().pages.runs(), [range(20, ERRAND)]);
}

proptest! {
    #[test]
    fn everything_that_is_owed_goes_once_unless_it_is_asked_for_again(
        runs in prop::collection::vec((1..3_u32, 0..500_u64, 1..150_u64, any::<u8>(), any::<bool>()), 0..12),
        asks in prop::collection::vec((1..4_u32, 0..700_u64, 1..20_u64, 0..4_usize), 0..12),
    ) {
        let mut owed = Owed::new(1);
        let mut left: BTreeSet<(u32, u64)> = BTreeSet::new();
        for (vpid, start, count, pattern, since) in runs {
            // The ledger's runs do not overlap.
            let fresh: RangeSet = (start..start + count)
                .filter(|page| left.insert((vpid, *page)))
                .map(|page| range(page, 1))
                .collect();
            let runs: Vec<_> = fresh.iter().map(|run| (pattern, run)).collect();
            owed.owe(process(vpid), &runs, since);
        }
        owed.sort();
        let all = left.clone();
        prop_assert_eq!(owed.pages(), all.len() as u64);
        let listed: BTreeSet<(u32, u64)> = owed
            .manifest()
            .processes
            .iter()
            .flat_map(|(vpid, process)| process.pages.pages().map(|page| (vpid.0, page.0)).collect::<Vec<_>>())
            .collect();
        prop_assert_eq!(&listed, &all);
        for (vpid, start, count, errands) in asks {
            let wanted = range(start, count);
            let ask = Ask { vpid: Vpid(vpid), generation: Generation(u64::from(vpid)), pages: wanted };
            let went: BTreeSet<_> = owed.asked(ask).iter().flat_map(pages).collect();
            let expected = wanted_of(&all, vpid, wanted);
            prop_assert_eq!(&went, &expected);
            left.retain(|page| !went.contains(page));
            for _ in 0..errands {
                let went = owed.next_errand().map(|errand| pages(&errand)).unwrap_or_default();
                prop_assert!(went.len() as u64 <= ERRAND);
                for page in went {
                    prop_assert!(left.remove(&page), "{page:?} went twice unasked, or was not owed");
                }
            }
        }
        while let Some(errand) = owed.next_errand() {
            for page in pages(&errand) {
                prop_assert!(left.remove(&page), "{page:?} went twice unasked, or was not owed");
            }
        }
        prop_assert!(left.is_empty());
    }

    #[test]
    fn words_come_back_as_they_were(vpid: u32, generation: u64, start in 0..1_u64 << 30, count in 1..5000_u64) {
        let ask = Ask { vpid: Vpid(vpid), generation: Generation(generation), pages: range(start, count) };
        prop_assert_eq!(Word::decode(&Word::Ask(ask).encode()), Some(Word::Ask(ask)));
    }
}

fn wanted_of(all: &BTreeSet<(u32, u64)>, vpid: u32, wanted: PageRange) -> BTreeSet<(u32, u64)> {
    let inside = |page: &u64| (wanted.start().0..wanted.end().0).contains(page);
    all.iter().filter(|(owner, page)| *owner == vpid && inside(page)).copied().collect()
}

#[test]
fn what_is_no_word_is_refused() {
    assert_eq!(Word::decode(&Word::Begin.encode()), Some(Word::Begin));
    assert_eq!(Word::decode(&[0; WORD - 1]), None);
    assert_eq!(Word::decode(&[0; WORD + 8]), None);
    assert_eq!(Word::decode(&[0xff; WORD]), None);
}

#[test]
fn locked_memory_is_found_and_does_not_come_later() {
    let smaps = "1000-3000 rw-p 00000000 00:00 0 \nRss: 8 kB\nVmFlags: rd wr mr lo ac \n\
                 5000-6000 rw-p 00000000 00:00 0 [heap]\nVmFlags: rd wr mr mw me ac \n";
    assert_eq!(locked_of(smaps).runs(), [range(1, 2)]);
    let memory = vec![1_u8; 64 << 12];
    let first = PageNo::containing(memory.as_ptr() as u64).0 + 1;
    let us = process::describe(rustix::process::getpid()).unwrap().unwrap();
    assert!(can_come_later(us).unwrap().contains(PageNo(first)));
}
