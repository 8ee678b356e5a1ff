use super::*;
use crate::fixed::FIXED;
use haulage_protocol::id::Round;
use haulage_protocol::unit::Bytes;
use proptest::prelude::*;

/// A round at 10,000 pages a second.
fn round(n: u32, sent: u64, left: u64) -> RoundReport {
    RoundReport {
        round: Round(n),
        dirty: Pages(sent),
        sent: Pages(sent),
        zero: Pages(0),
        withheld: Pages(0),
        left: Some(Pages(left)),
        wire: Bytes(sent * 4096),
        scan: Micros(10),
        took: Micros(sent * 100),
        encoding: Default::default(),
    }
}

fn with(policy: &str) -> Options {
    Options { policy: policy.parse().unwrap(), ..Options::default() }
}

const NO_TIME: Micros = Micros(0);

#[test]
fn the_downtime_is_predicted_from_what_is_left_and_the_measured_rate() {
    let rounds = [round(0, 65536, 2000), round(1, 2000, 500)];
    assert_eq!(
        forecast(&rounds, FIXED),
        Forecast { left: Pages(500), rate: Some(Pages(10_000)), downtime: FIXED + Micros(50_000) }
    );
    // A round of no account does not change the rate.
    let slow = RoundReport { took: Micros(1_000_000), ..round(2, 10, 500) };
    assert_eq!(forecast(&[round(0, 65536, 2000), slow], FIXED).rate, Some(Pages(10_000)));
    assert_eq!(forecast(&[], FIXED).rate, None);
    assert_eq!(allowance(&rounds, &with("adaptive"), FIXED), Pages(500));
}

#[test]
fn freezes_when_what_is_left_fits_and_not_before() {
    for policy in ["all", "history", "adaptive"] {
        let rounds = [round(0, 65536, 500)];
        assert_eq!(
            decide(&rounds, &[], &with(policy), FIXED, NO_TIME),
            Decision::Freeze(Why::Fits),
            "{policy}"
        );
        // Prepared, it is worth one more round.
        assert_eq!(settle(&rounds, 1, &[], &with(policy), FIXED, NO_TIME), Decision::Again, "{policy}");
        // 300 left of 500 take 30 ms: `adaptive`, and it alone, has them go twice to save some of it. 460 it has not.
        let rounds = [round(0, 65536, 500), round(1, 500, 300)];
        let eager = if policy == "adaptive" { Decision::Again } else { Decision::Freeze(Why::Fits) };
        assert_eq!(settle(&rounds, 1, &[], &with(policy), FIXED, NO_TIME), eager, "{policy}");
        // And of 200 that it sends of 500, 30 less that are left are enough.
        let part = RoundReport { withheld: Pages(300), ..round(1, 200, 470) };
        let rounds = [round(0, 65536, 500), part];
        assert_eq!(settle(&rounds, 1, &[], &with(policy), FIXED, NO_TIME), eager, "{policy}");
        let rounds = [round(0, 65536, 500), round(1, 500, 460)];
        assert_eq!(
            settle(&rounds, 1, &[], &with(policy), FIXED, NO_TIME),
            Decision::Freeze(Why::Fits),
            "{policy}"
        );
        // The next one would leave some 100 of these 225, which then go a second time: `history` saves them.
        let rounds = [round(0, 65536, 500), round(1, 500, 225)];
        let again = if policy == "history" { Decision::Freeze(Why::Fits) } else { Decision::Again };
        assert_eq!(settle(&rounds, 1, &[], &with(policy), FIXED, NO_TIME), again, "{policy}");
        let rounds = [round(0, 65536, 5001)];
        assert_eq!(decide(&rounds, &[], &with(policy), FIXED, NO_TIME), Decision::Again, "{policy}");
        assert_eq!(settle(&rounds, 1, &[], &with(policy), FIXED, NO_TIME), Decision::Again, "{policy}");
    }
}

#[test]
fn what_fits_is_not_put_off_beyond_the_deadline_or_the_rounds_that_were_asked_for() {
    let rounds = [round(0, 65536, 500), round(1, 500, 200)];
    let deadline = Options { deadline_ms: Some(10), ..with("adaptive") };
    assert_eq!(settle(&rounds, 1, &[], &deadline, FIXED, Micros(9_999)), Decision::Again);
    assert_eq!(settle(&rounds, 1, &[], &deadline, FIXED, Micros(10_000)), Decision::Freeze(Why::Fits));
    let two = Options { max_rounds: Some(2), ..with("adaptive") };
    assert_eq!(settle(&rounds, 1, &[], &two, FIXED, NO_TIME), Decision::Freeze(Why::Fits));
}

#[test]
fn one_round_that_leaves_more_does_not_end_what_saves() {
    let part = |n, left| RoundReport { withheld: Pages(100), ..round(n, 300, left) };
    let settled = [round(0, 65536, 0), part(1, 450), part(2, 320), part(3, 325), part(4, 322)];
    let decision = |count: usize| settle(&settled[..=count], count, &[], &with("adaptive"), FIXED, NO_TIME);
    assert_eq!(decision(1), Decision::Freeze(Why::Fits), "it leaves more than it found");
    assert_eq!([2, 3].map(decision), [Decision::Again; 2]);
    assert_eq!(decision(4), Decision::Freeze(Why::Fits), "the second one that does");
}

#[test]
fn goes_on_while_it_shrinks_and_freezes_when_it_does_not() {
    let shrinking: Vec<_> = (0..20).map(|n| round(n, 1000, 100_000 - u64::from(n) * 3000)).collect();
    let flat: Vec<_> = (0..20).map(|n| round(n, 1000, 50_000)).collect();
    for policy in ["all", "history", "adaptive"] {
        assert_eq!(decide(&shrinking, &[], &with(policy), FIXED, NO_TIME), Decision::Again, "{policy}");
        assert_eq!(
            decide(&flat, &[], &with(policy), FIXED, NO_TIME),
            Decision::Freeze(Why::Stalled),
            "{policy}"
        );
    }
    // A single round that leaves more is forgiven.
    let rounds = [round(0, 1000, 60_000), round(1, 1000, 61_000)];
    assert_eq!(decide(&rounds, &[], &with("all"), FIXED, NO_TIME), Decision::Again);
}

#[test]
fn a_deadline_refuses_only_a_downtime_that_was_asked_for() {
    let flat: Vec<_> = (0..20).map(|n| round(n, 1000, 50_000)).collect();
    let best = Options { deadline_ms: Some(10_000), ..with("adaptive") };
    let strict = Options { max_downtime_ms: Some(150), ..best.clone() };
    let (before, after) = (Micros(9_999_999), Micros(10_000_000));
    assert_eq!(decide(&flat, &[], &strict, FIXED, before), Decision::Again);
    assert_eq!(decide(&flat, &[], &strict, FIXED, after), Decision::Refuse(Why::Deadline));
    assert_eq!(settle(&flat, 20, &[], &strict, FIXED, before), Decision::Again);
    assert_eq!(settle(&flat, 20, &[], &strict, FIXED, after), Decision::Refuse(Why::Deadline));
    assert_eq!(decide(&flat, &[], &best, FIXED, before), Decision::Freeze(Why::Stalled));
    assert_eq!(decide(&flat[..2], &[], &best, FIXED, after), Decision::Freeze(Why::Deadline));
    let fits = [round(0, 1000, 10)];
    assert_eq!(decide(&fits, &[], &strict, FIXED, after), Decision::Freeze(Why::Fits));
    let no_deadline = Options { deadline_ms: None, ..strict };
    assert_eq!(decide(&flat, &[], &no_deadline, FIXED, after), Decision::Freeze(Why::Stalled));
}

#[test]
fn post_copy_takes_the_place_of_a_refusal_and_of_a_freeze_that_does_not_fit() {
    let flat: Vec<_> = (0..5).map(|n| round(n, 1000, 50_000)).collect();
    let (before, after) = (Micros(59_000_000), Micros(60_000_000));
    let best = Options { post_copy: true, ..with("adaptive") };
    assert_eq!(decide(&flat, &[], &best, FIXED, NO_TIME), Decision::PostCopy(Why::Stalled));
    assert_eq!(settle(&flat, 5, &[], &best, FIXED, NO_TIME), Decision::PostCopy(Why::Stalled));
    let used_up = Options { max_rounds: Some(5), ..best.clone() };
    assert_eq!(decide(&flat, &[], &used_up, FIXED, NO_TIME), Decision::PostCopy(Why::Rounds));
    let strict = Options { max_downtime_ms: Some(150), deadline_ms: Some(60_000), ..best.clone() };
    assert_eq!(decide(&flat, &[], &strict, FIXED, before), Decision::Again, "there is time yet");
    assert_eq!(decide(&flat, &[], &strict, FIXED, after), Decision::PostCopy(Why::Deadline));
    assert_eq!(settle(&flat, 1, &[], &strict, FIXED, after), Decision::PostCopy(Why::Deadline));
    let fits = [round(0, 1000, 10)];
    assert_eq!(decide(&fits, &[], &strict, FIXED, after), Decision::Freeze(Why::Fits), "no need");
    // Slowing it down risks less.
    let slower = Options { auto_converge: true, ..best.clone() };
    assert_eq!(decide(&flat, &[], &slower, FIXED, NO_TIME), Decision::SlowDown(KEEPS[0]));
    let below = Options { max_downtime_ms: Some(1), ..strict };
    assert_eq!(
        decide(&flat, &[], &below, FIXED, after),
        Decision::Refuse(Why::Deadline),
        "the switch itself takes longer"
    );
    let phaul = Options { post_copy: true, ..with("phaul") };
    assert_eq!(decide(&[round(0, 64, 1 << 20)], &[], &phaul, FIXED, NO_TIME), Decision::Freeze(Why::Phaul));
}

#[test]
fn what_stalls_is_slowed_down_in_steps_and_each_gets_its_chance() {
    let options = Options { auto_converge: true, ..with("all") };
    let flat = |steps: usize| vec![round(0, 1000, 50_000); 3 * steps];
    let mut slowdowns = Vec::new();
    for (n, keep) in KEEPS.into_iter().enumerate() {
        let rounds = flat(n + 1);
        assert_eq!(decide(&rounds, &slowdowns, &options, FIXED, NO_TIME), Decision::SlowDown(keep));
        slowdowns.push(Slowdown { after: rounds.len(), keep });
        assert_eq!(decide(&rounds, &slowdowns, &options, FIXED, NO_TIME), Decision::Again);
    }
    let rounds = flat(KEEPS.len() + 1);
    assert_eq!(decide(&rounds, &slowdowns, &options, FIXED, NO_TIME), Decision::Freeze(Why::Stalled));
    assert_eq!(decide(&rounds, &[], &with("all"), FIXED, NO_TIME), Decision::Freeze(Why::Stalled));
}

#[test]
fn a_downtime_below_the_fixed_cost_is_neither_waited_for_nor_throttled_for() {
    let rounds: Vec<_> = (0..5).map(|n| round(n, 100, 1)).collect();
    let below = Options {
        auto_converge: true,
        max_downtime_ms: Some(1),
        deadline_ms: Some(60_000),
        ..with("adaptive")
    };
    assert_eq!(decide(&rounds, &[], &below, FIXED, NO_TIME), Decision::Refuse(Why::Stalled));
    let lenient = Options { deadline_ms: None, ..below };
    assert_eq!(decide(&rounds, &[], &lenient, FIXED, NO_TIME), Decision::Freeze(Why::Stalled));
}

#[test]
fn the_default_aims_at_what_is_within_reach_and_what_was_asked_for_is_what_was_asked_for() {
    let (default, asked) = (with("all"), Options { max_downtime_ms: Some(150), ..with("all") });
    let (cheap, dear) = (Micros(100_000), Micros(400_000));
    assert_eq!([aim(&default, cheap), aim(&asked, cheap)], [Micros(150_000); 2]);
    assert_eq!([aim(&default, dear), aim(&asked, dear)], [dear + REACH, Micros(150_000)]);
    // What is left takes 15 ms.
    let rounds = [round(0, 65536, 150), round(1, 150, 150)];
    assert_eq!(forecast(&rounds, dear).downtime, Micros(415_000));
    assert_eq!(decide(&rounds, &[], &default, dear, NO_TIME), Decision::Freeze(Why::Fits));
    assert_eq!(allowance(&rounds, &default, dear), Pages(200));
    assert_eq!(decide(&rounds, &[], &asked, dear, NO_TIME), Decision::Again);
    assert_eq!(allowance(&rounds, &asked, dear), Pages(0));
    let flat = vec![round(0, 1000, 150); 5];
    let strict = Options { deadline_ms: Some(60_000), ..asked };
    assert_eq!(decide(&flat, &[], &strict, dear, NO_TIME), Decision::Refuse(Why::Stalled));
}

#[test]
fn rounds_end_with_the_deadline_where_what_is_left_does_not_go_in_the_freeze() {
    let in_time = Options { deadline_ms: Some(2000), ..with("all") };
    let strict = Options { max_downtime_ms: Some(150), ..in_time.clone() };
    let post_copy = Options { post_copy: true, ..in_time.clone() };
    let (second, third) = (Micros(1_000_000), Micros(3_000_000));
    assert_eq!(time_left(&strict, second), Some(second));
    assert_eq!(time_left(&strict, third), Some(Micros(0)));
    assert_eq!(round_within(&strict, FIXED, third, false), Some(Micros(0)));
    let for_preparing = PREPARING + Micros(50_000);
    assert_eq!(
        round_within(&strict, FIXED, third, true),
        Some(for_preparing),
        "not what was left is refused"
    );
    assert_eq!(round_within(&strict, FIXED, second, true), Some(second));
    assert_eq!(time_left(&post_copy, second), Some(second));
    assert_eq!(time_left(&in_time, second), None, "the first copy is made whole");
    assert_eq!(time_left(&Options { deadline_ms: None, ..strict }, second), None);
}

#[test]
fn a_deadline_binds_phaul_too() {
    let strict = Options { max_downtime_ms: Some(150), deadline_ms: Some(2000), ..with("phaul") };
    let rounds = [round(0, 65536, 9000), round(1, 9000, 9000)];
    let decided = |elapsed| {
        let elapsed = Micros(elapsed);
        (decide(&rounds, &[], &strict, FIXED, elapsed), settle(&rounds, 1, &[], &strict, FIXED, elapsed))
    };
    assert_eq!(decided(1_000_000), (Decision::Again, Decision::Freeze(Why::Phaul)));
    let refused = Decision::Refuse(Why::Deadline);
    assert_eq!(decided(2_000_000), (refused, refused));
    // Which has no post-copy, in a deadline either.
    let post_copy = Options { post_copy: true, max_downtime_ms: None, ..strict.clone() };
    assert_eq!(time_left(&post_copy, Micros(0)), None);
    let late = Micros(2_000_000);
    assert_eq!(decide(&rounds, &[], &post_copy, FIXED, late), Decision::Freeze(Why::Deadline));
}

#[test]
fn phaul_stops_by_its_own_rule() {
    let goes_on = |dirty: &[u64]| {
        let rounds: Vec<_> = dirty.iter().zip(0..).map(|(dirty, n)| round(n, *dirty, 1 << 30)).collect();
        decide(&rounds, &[], &with("phaul"), FIXED, NO_TIME) == Decision::Again
    };
    assert!(goes_on(&[65]) && !goes_on(&[64]));
    assert!(goes_on(&[1000, 1109]) && !goes_on(&[1000, 1110]));
    assert!(goes_on(&[1000; 8]) && !goes_on(&[1000; 9]));
    assert!(!goes_on(&[1000, 500, 64]));
}

proptest! {
    #[test]
    fn pre_copy_always_ends(
        rounds in proptest::collection::vec((0u64..1 << 30, 0u64..1 << 30, any::<bool>()), 101..140),
        policy in prop_oneof![Just("all"), Just("phaul"), Just("history:3,2"), Just("adaptive")],
        max_rounds in proptest::option::of(0u32..20), deadline_ms in proptest::option::of(0u64..100_000),
        max_downtime_ms in proptest::option::of(0u64..1000), post_copy: bool,
    ) {
        let options = Options { max_rounds, deadline_ms, max_downtime_ms, post_copy, ..with(policy) };
        let strict = deadline_ms.is_some() && max_downtime_ms.is_some();
        let (mut so_far, mut settled, mut elapsed) = (Vec::new(), 0, Micros(0));
        let mut ended = [false; 2];
        for ((sent, left, counted), n) in rounds.into_iter().zip(0..) {
            let mut report = round(n, sent, left);
            report.left = report.left.filter(|_| counted);
            so_far.push(report);
            elapsed += Micros(1_000_000);
            settled += usize::from(n > 10);
            let decisions = [decide(&so_far, &[], &options, FIXED, elapsed), settle(&so_far, settled, &[], &options, FIXED, elapsed)];
            for (decision, ended) in decisions.into_iter().zip(&mut ended) {
                match decision {
                    Decision::Again => {}
                    Decision::SlowDown(_) => prop_assert!(false, "nobody asked for it"),
                    Decision::Freeze(Why::Fits) => {
                        prop_assert!(predicted(&so_far, FIXED) <= options.downtime() + PREPARING);
                        *ended = true;
                    }
                    Decision::PostCopy(_) => {
                        prop_assert!(post_copy && policy != "phaul" && predicted(&so_far, FIXED) > options.downtime());
                        *ended = true;
                    }
                    Decision::Freeze(why) => {
                        prop_assert!(!(strict || may_owe(&options)) || why == Why::Phaul, "frozen although the downtime cannot be kept");
                        *ended = true;
                    }
                    Decision::Refuse(_) => {
                        prop_assert!(strict && predicted(&so_far, FIXED) > options.downtime());
                        *ended = true;
                    }
                }
            }
        }
        prop_assert_eq!(ended, [true; 2]);
    }
}
