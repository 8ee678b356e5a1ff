//! Whole migrations against a simulated world in which anything fails, gets lost, is repeated or is restarted.
//! The world checks after every effect that the container runs in at most one place, and at the end that it runs
//! in exactly one and that nothing is left on the other side.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod traced;
mod world;

use haulage_migration::fixed::Fixed;
use haulage_migration::{Effect, Event, Migration, Outcome, Persistence, Phase, Success, Transition};
use haulage_protocol::fault::{Fault, code};
use haulage_protocol::id::{CoordinatorId, MigrationId, Step};
use haulage_protocol::job::{Job, Options};
use haulage_protocol::restorer::{Filled, Verified};
use haulage_protocol::secret::Token;
use haulage_protocol::unit::{Micros, Pages};
use haulage_protocol::version::Version;
use proptest::prelude::*;
use proptest::test_runner::TestRng;
use world::{Source, Target, World};

/// How nasty the world is, in percent per decision.
#[derive(Debug, Clone, Copy)]
struct Chaos {
    fail: u32,
    lose: u32,
    crash: u32,
    repeat: u32,
    cancel: u32,
    hold: u32,
    bury: u32,
    late: u32,
    /// The source's page-shipper dies.
    die: u32,
}

const CALM: Chaos =
    Chaos { fail: 0, lose: 0, crash: 0, repeat: 0, cancel: 0, hold: 0, bury: 0, late: 0, die: 0 };

fn job() -> Job {
    Job {
        version: Version::CURRENT,
        id: MigrationId::generate(),
        container: "web".into(),
        from: None,
        to: "b".parse().unwrap(),
        options: Options { auto_converge: true, ..Options::default() },
    }
}

/// As [`job`], of a container that never gets within the downtime.
fn post_copy_job() -> Job {
    let options =
        Options { max_downtime_ms: Some(150), deadline_ms: Some(0), post_copy: true, ..Options::default() };
    Job { options, ..job() }
}

/// Drives one migration to its end through the chaos. The record goes through JSON each time it is persisted.
fn drive(chaos: Chaos, image_present: bool, tracker: &'static str, rng: &mut TestRng) -> (Migration, World) {
    drive_job(job(), chaos, image_present, tracker, rng)
}

fn drive_job(
    job: Job,
    chaos: Chaos,
    image_present: bool,
    tracker: &'static str,
    rng: &mut TestRng,
) -> (Migration, World) {
    let mut world = World::new(image_present, tracker);
    let mut clock = 0;
    let roll = |rng: &mut TestRng, percent: u32| rng.random_range(0..100) < percent;
    let Transition { next, effects } =
        Migration::accept(job, Token::generate(), CoordinatorId::generate(), Micros(0));
    let persist = |record: &Migration| serde_json::to_vec(record).unwrap();
    let mut stored = persist(&next);
    let mut todo = effects;
    for turn in 0.. {
        assert!(turn < 20_000, "the migration never ends");
        let record: Migration = serde_json::from_slice(&stored).unwrap();
        if record.is_over() {
            assert!(record.pending.is_empty());
            return (record, world);
        }
        let event = if roll(rng, chaos.crash) || todo.is_empty() {
            Event::TakenOver(CoordinatorId::generate())
        } else if roll(rng, chaos.cancel) {
            Event::Cancelled
        } else if roll(rng, chaos.late) {
            // All of a sudden an hour has passed.
            clock += 3_600_000_000;
            Event::TimePassed
        } else if roll(rng, chaos.bury) && (record.phase.is_revocable() || record.phase == Phase::Fence) {
            // The operator is right: the host is off, and what is made there later is made by a restorer that is back.
            world.target = Target::Absent;
            Event::TargetIsDead
        } else {
            if world.source == Source::Held && roll(rng, chaos.hold) {
                // The checkpointer died: the container is frozen still, but its dump is worthless.
                world.source = Source::Frozen;
            }
            if roll(rng, chaos.die) {
                world.open.remove("source pages");
            }
            // Parallel effects are answered in any order.
            let (step, effect) = todo.remove(rng.random_range(0..todo.len()));
            let persistence = effect.persistence(record.phase);
            let may_fail = persistence != Persistence::Insist;
            let may_be_lost = may_fail && persistence != Persistence::FindOut;
            if roll(rng, chaos.fail) {
                if may_fail {
                    Event::Failed(step, Fault::new(code::INTERNAL, "chaos: refused"))
                } else {
                    todo.push((step, effect));
                    continue;
                }
            } else {
                let result = world.perform(step, effect, &record);
                if roll(rng, chaos.repeat) {
                    world.perform(step, effect, &record).ok();
                }
                match result {
                    Ok(_) if roll(rng, chaos.lose) => {
                        if may_be_lost {
                            Event::Failed(step, Fault::new(code::UNREACHABLE, "chaos: answer lost"))
                        } else {
                            todo.push((step, effect));
                            continue;
                        }
                    }
                    Ok(success) => Event::Done(step, success),
                    Err(fault) => Event::Failed(step, fault),
                }
            }
        };
        let repeated = roll(rng, chaos.repeat).then(|| event.clone());
        let taken_over = matches!(event, Event::TakenOver(_));
        clock += 1;
        match record.step(event, Micros(clock)) {
            Ok(transition) => {
                stored = persist(&transition.next);
                if taken_over {
                    todo = transition.effects;
                } else {
                    todo.retain(|(step, _)| transition.next.pending.contains_key(step));
                    todo.extend(transition.effects);
                }
                if let Some(event @ (Event::Done(..) | Event::Failed(..))) = repeated {
                    let twice = transition.next.step(event, Micros(clock)).unwrap();
                    assert_eq!(twice.next, transition.next, "a repeated answer changed the record");
                    assert!(twice.effects.is_empty());
                }
            }
            Err(_) => assert!(!record.phase.is_cancellable(), "refused in {}", record.phase),
        }
    }
    unreachable!()
}

fn check_end(record: &Migration, world: &World) {
    match record.outcome.expect("an outcome") {
        Outcome::Committed => {
            assert_eq!((world.source, world.target), (Source::Gone, Target::Adopted));
        }
        Outcome::RolledBack => {
            assert!(record.fault.is_some(), "rolled back without a reason");
            assert_eq!(world.source, Source::Running);
            let noted = record.leftovers.iter().any(|left| left.effect == Effect::UndoTarget);
            assert!(world.target == Target::Absent || (noted && world.target == Target::Created));
        }
    }
    assert!(!world.leased, "the lease was kept");
    let noted = record.leftovers.iter().any(|left| left.effect == Effect::Unthrottle);
    assert!(!world.throttled || noted, "slowed down for ever");
    for (what, effect) in [
        ("source pages", Effect::CloseSourcePages),
        ("target pages", Effect::CloseTargetPages),
        ("source files", Effect::CloseSourceFiles),
        ("target files", Effect::CloseTargetFiles),
        ("prepared freeze", Effect::RollBackSource),
    ] {
        let noted = record.leftovers.iter().any(|left| left.effect == effect);
        assert!(!world.open.contains(what) || noted, "{what} left open and not noted");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn one_running_copy_and_no_leftovers_whatever_happens(
        fail in 0u32..25, lose in 0u32..25, crash in 0u32..20, repeat in 0u32..30, cancel in 0u32..4, hold in 0u32..5, bury in 0u32..3,
        late in 0u32..4, die in 0u32..3,
        image_present: bool, tracked: bool, post_copy: bool, seed: [u8; 32],
    ) {
        let mut rng = TestRng::from_seed(proptest::test_runner::RngAlgorithm::ChaCha, &seed);
        let chaos = Chaos { fail, lose, crash, repeat, cancel, hold, bury, late, die };
        let tracker = if tracked { "write_protect" } else { "none" };
        let job = if post_copy { post_copy_job() } else { job() };
        let (record, world) = drive_job(job, chaos, image_present, tracker, &mut rng);
        check_end(&record, &world);
        traced::read(&record, Micros(0));
    }
}

/// Fails or loses exactly one effect, each in turn: the path of every undo, one by one.
#[test]
fn every_single_failure_is_undone() {
    let mut rng = TestRng::deterministic_rng(proptest::test_runner::RngAlgorithm::ChaCha);
    let (good, world) = drive(CALM, false, "write_protect", &mut rng);
    assert_eq!(good.outcome, Some(Outcome::Committed));
    check_end(&good, &world);
    assert!(good.leftovers.is_empty());
    let forward: Vec<Effect> = good.attempted.iter().copied().filter(|e| *e < Effect::PersistFiles).collect();
    assert!(forward.len() > 20, "{forward:?}");
    for victim in forward {
        for lost in [false, true] {
            let (record, world) = drive_with_victim(job(), victim, lost);
            assert_eq!(record.outcome, Some(Outcome::RolledBack), "{victim}");
            check_end(&record, &world);
            assert!(record.leftovers.is_empty());
            assert_eq!(world.target, Target::Absent);
        }
    }
}

/// What is left follows the container, and only when it has all arrived is the source ended.
#[test]
fn a_container_that_runs_before_it_has_its_memory_is_committed_when_it_has_it() {
    let mut rng = TestRng::deterministic_rng(proptest::test_runner::RngAlgorithm::ChaCha);
    let (good, world) = drive_job(post_copy_job(), CALM, true, "write_protect", &mut rng);
    check_end(&good, &world);
    assert_eq!(good.outcome, Some(Outcome::Committed));
    assert!(good.is_post_copy());
    assert_eq!(good.facts.last_round.as_ref().map(|last| last.owed), Some(Pages(1)));
    // It is too late for rounds between the preparation and the freeze.
    assert!(good.phases.iter().all(|(phase, _)| *phase != Phase::Settle), "{:?}", good.phases);
    assert_eq!(good.facts.rounds.len(), 1);
    // Without the option it is refused, untouched.
    let strict = Options { post_copy: false, ..post_copy_job().options };
    let refused = Job { options: strict, ..job() };
    let (refused, world) = drive_job(refused, CALM, true, "write_protect", &mut rng);
    check_end(&refused, &world);
    assert_eq!(refused.fault.map(|fault| fault.code), Some(code::CANNOT_CONVERGE));
    assert!(!refused.attempted.contains(&Effect::Freeze));
}

#[test]
fn a_source_that_is_lost_before_it_has_paid_undoes_the_target_and_goes_on() {
    for victim in [Effect::Restore, Effect::Verify] {
        for lost in [false, true] {
            let (record, world) = drive_with_victim(post_copy_job(), victim, lost);
            assert!(record.is_post_copy());
            assert_eq!(
                (record.outcome, world.target),
                (Some(Outcome::RolledBack), Target::Absent),
                "{victim}"
            );
            check_end(&record, &world);
        }
    }
    let (record, mut world, todo) = entered_job(Phase::Verify, post_copy_job());
    world.open.remove("source pages");
    let (step, verify) = todo[0];
    let fault = world.perform(step, verify, &record).unwrap_err();
    let Transition { next, effects } = record.step(Event::Failed(step, fault), Micros(2)).unwrap();
    let effects: Vec<Effect> = effects.into_iter().map(|(_, effect)| effect).collect();
    assert_eq!((next.phase, effects), (Phase::Fence, vec![Effect::UndoTarget]));
    assert_eq!(next.fault.map(|fault| fault.code), Some(code::POST_COPY_FAILED));
    assert!(record.step(Event::Cancelled, Micros(2)).is_err(), "it may have answered clients");
}

fn drive_with_victim(job: Job, victim: Effect, lost: bool) -> (Migration, World) {
    let mut world = World::new(false, "write_protect");
    let Transition { mut next, effects: mut todo } =
        Migration::accept(job, Token::generate(), CoordinatorId::generate(), Micros(0));
    while let Some((step, effect)) = todo.pop() {
        let event = if effect == victim {
            if lost {
                world.perform(step, effect, &next).unwrap();
            }
            Event::Failed(step, Fault::new(code::UNREACHABLE, "the victim"))
        } else {
            Event::Done(step, world.perform(step, effect, &next).unwrap())
        };
        let transition = next.step(event, Micros(1)).unwrap();
        next = transition.next;
        todo.extend(transition.effects);
    }
    (next, world)
}

/// A world in which everything succeeds, up to the moment when `phase` has been entered.
fn entered(phase: Phase, options: Options) -> (Migration, World, Vec<(Step, Effect)>) {
    entered_job(phase, Job { options, ..job() })
}

fn entered_job(phase: Phase, job: Job) -> (Migration, World, Vec<(Step, Effect)>) {
    let mut world = World::new(true, "write_protect");
    let Transition { mut next, effects: mut todo } =
        Migration::accept(job, Token::generate(), CoordinatorId::generate(), Micros(0));
    while next.phase != phase {
        let (step, effect) = todo.pop().expect("the phase never comes");
        let success = world.perform(step, effect, &next).unwrap();
        let transition = next.step(Event::Done(step, success), Micros(1)).unwrap();
        next = transition.next;
        todo.extend(transition.effects);
    }
    (next, world, todo)
}

#[test]
fn a_container_that_stands_still_for_too_long_is_let_go_whatever_is_under_way() {
    let limit = Micros(Options::default().max_frozen_ms * 1000);
    let (before, after) = (limit, Micros(limit.0 + 1));
    for phase in [Phase::Freeze, Phase::Switch, Phase::Ship] {
        let (record, mut world, under_way) = entered(phase, Options::default());
        assert_eq!(record.frozen_until(), Some(Micros(limit.0 + 1)), "{phase}");
        assert_eq!(record.step(Event::TimePassed, before).unwrap().next, record, "{phase}: too early");
        // Half of it is done, and nobody will hear of it.
        for (step, effect) in under_way.iter().take(2) {
            world.perform(*step, *effect, &record).unwrap();
        }
        let Transition { mut next, effects: mut todo } = record.step(Event::TimePassed, after).unwrap();
        assert_eq!(todo.iter().map(|(_, effect)| *effect).collect::<Vec<_>>(), [Effect::RollBackSource]);
        let late = next.step(Event::Done(under_way[0].0, Success::Unit), after).unwrap();
        assert_eq!(late.next, next, "{phase}: an answer that is no longer waited for");
        while let Some((step, effect)) = todo.pop() {
            let success = world.perform(step, effect, &next).unwrap();
            let transition = next.step(Event::Done(step, success), after).unwrap();
            next = transition.next;
            todo.extend(transition.effects);
        }
        check_end(&next, &world);
        assert_eq!(next.fault.unwrap().code, code::FROZEN_TOO_LONG);
    }
}

#[test]
fn the_dump_goes_beside_the_last_round_once_it_and_the_files_are_done() {
    let (record, world, under_way) = entered(Phase::Switch, Options::default());
    let answer = |record: &Migration, all: &[(Step, Effect)], effect| {
        let (step, _) = all.iter().find(|(_, asked)| *asked == effect).unwrap();
        record.step(Event::Done(*step, world.success(effect)), Micros(1)).unwrap()
    };
    let failed = |record: &Migration, effect| {
        let (step, _) = under_way.iter().find(|(_, asked)| *asked == effect).unwrap();
        record.step(Event::Failed(*step, Fault::new(code::INTERNAL, "")), Micros(1)).unwrap()
    };
    let mut next = record;
    for effect in [Effect::TakePackets, Effect::Dump] {
        let transition = answer(&next, &under_way, effect);
        assert_eq!(transition.effects, [], "{effect}");
        next = transition.next;
    }
    let lost = failed(&next, Effect::SyncFrozen);
    assert_eq!(lost.effects, [], "nothing begins once something has failed");
    let Transition { next, effects: ship } = answer(&next, &under_way, Effect::SyncFrozen);
    assert_eq!((ship.len(), ship[0].1, next.phase), (1, Effect::ShipImages, Phase::Switch));
    for (first, second) in [(&ship, &under_way), (&under_way, &ship)] {
        let effect = |all| if all == &ship { Effect::ShipImages } else { Effect::FinalRound };
        let Transition { next, effects } = answer(&next, first, effect(first));
        assert_eq!((effects.len(), next.phase), (0, Phase::Switch));
        let Transition { next, effects } = answer(&next, second, effect(second));
        let asked: Vec<_> = effects.iter().map(|(_, effect)| *effect).collect();
        assert_eq!((next.phase, asked), (Phase::Ship, vec![Effect::ConfirmHold, Effect::ConfirmLease]));
    }
    let broken = failed(&next, Effect::FinalRound);
    assert_eq!((broken.effects.len(), broken.next.phase), (0, Phase::Switch), "the undo waits for it");
    let Transition { effects, .. } = answer(&broken.next, &ship, Effect::ShipImages);
    assert_eq!(effects.first().map(|(_, effect)| *effect), Some(Effect::RollBackSource));
}

#[test]
fn time_matters_only_while_the_source_alone_decides() {
    for phase in [Phase::PreCopy, Phase::Restore, Phase::Verify, Phase::Commit, Phase::Retire] {
        let (record, _, _) = entered(phase, Options::default());
        assert_eq!(record.step(Event::TimePassed, Micros(u64::MAX)).unwrap().next, record, "{phase}");
    }
    let (record, _, _) = entered(Phase::Switch, Options { max_frozen_ms: 0, ..Options::default() });
    assert_eq!(record.step(Event::TimePassed, Micros(u64::MAX)).unwrap().next, record, "no limit");
}

/// It goes by its id from the first answer on, but people know it by its name.
#[test]
fn a_container_is_known_by_its_name_wherever_it_is_refused() {
    for victim in [Effect::Locate, Effect::Inspect, Effect::Check] {
        let (record, _) = drive_with_victim(job(), victim, false);
        assert_eq!((record.outcome, record.name()), (Some(Outcome::RolledBack), "web"), "{victim}");
    }
}

#[test]
fn an_answer_of_another_kind_is_refused() {
    let Transition { next, effects } =
        Migration::accept(job(), Token::generate(), CoordinatorId::generate(), Micros(0));
    assert!(
        next.step(
            Event::Done(effects[0].0, Success::Verified(Verified { pid: 1, filled: Filled::default() })),
            Micros(1)
        )
        .is_err()
    );
}

/// A migration in which all goes well, each effect, or those of a phase together, takes 10 ms, and the hosts tell what
/// `told` makes of their answers.
fn in_steps_of_ten_ms(told: impl Fn(&mut Success)) -> Migration {
    const STEP: u64 = 10_000;
    let (mut world, mut now) = (World::new(true, "write_protect"), Micros(1_000_000));
    let Transition { mut next, effects: mut todo } =
        Migration::accept(job(), Token::generate(), CoordinatorId::generate(), now);
    while !next.is_over() {
        now += Micros(STEP);
        for (step, effect) in std::mem::take(&mut todo) {
            let mut success = world.perform(step, effect, &next).unwrap();
            told(&mut success);
            let transition = next.step(Event::Done(step, success), now).unwrap();
            next = transition.next;
            todo.extend(transition.effects);
        }
    }
    next
}

#[test]
fn a_trace_shows_who_did_what_and_the_parts_of_the_freeze() {
    let record = in_steps_of_ten_ms(|success| match success {
        Success::Round(round) => (round.took, round.sent) = (Micros(3_000), Pages(77)),
        Success::Frozen(frozen) => frozen.took = Micros(2_000),
        Success::Restored(restored) => {
            (restored.merge, restored.start, restored.since) = (Micros(1_000), Micros(4_000), Micros(500));
        }
        Success::Verified(verified) => verified.filled.took = Micros(9_000),
        _ => {}
    });
    let rows = traced::read(&record, Micros(u64::MAX));
    let row = |group: &str, name: &str| &rows[&(group.to_owned(), name.to_owned())];
    let names = row("target b", "restorer").iter().map(|(_, _, name)| name.as_str());
    let of_the_restorer =
        ["check target", "create", "prepare target", "take packets", "restore", "verify", "adopt"];
    assert!(names.eq(of_the_restorer), "{rows:?}");
    let sends = row("source a", "page-shipper").iter().filter(|(_, _, name)| name == "send");
    let sends: Vec<u64> = sends.map(|(_, lasted, _)| *lasted).collect();
    assert_eq!(sends, vec![3_000; record.facts.rounds.len()]);
    let written = serde_json::to_string(&haulage_migration::trace::trace(&record, Micros(0))).unwrap();
    assert!(written.contains("\"sent_pages\":77") && written.contains("\"wire_bytes\":0"), "{written}");

    // Freezing took the last 2 of its 10 ms; the end of throttling, switch and ship take 10 each, and of the restore's 10
    // the container runs for half a millisecond.
    let still = "the container stands still";
    let parts = row(still, "downtime");
    let lasted: Vec<_> = parts.iter().map(|(_, lasted, name)| (name.as_str(), *lasted)).collect();
    let wanted = [
        ("stands still", 41_500),
        ("freeze", 2_000),
        ("ship dump", 10_000),
        ("join", 1_000),
        ("start", 4_000),
    ];
    assert_eq!(lasted, wanted);
    assert_eq!(haulage_migration::timing::freeze_split(&record).unwrap().total, Micros(41_500));
    assert_eq!(row(still, "fill"), &[(parts[0].0 + 41_500, 9_000, "fill".to_owned())]);
    for part in ["dump", "last round", "files"] {
        assert_eq!(row(still, part)[0].1, 10_000, "{part}");
    }
    // The last round was no longer than the dump: all of it is the switch.
    assert_eq!(haulage_migration::fixed::cost_of(&record), Some(Micros(41_500)));
}

#[test]
fn rounds_are_kept_apart_but_those_before_the_freeze() {
    let options = Options { round_interval_ms: 1000, ..Options::default() };
    let (record, mut world, todo) = entered(Phase::PreCopy, options.clone());
    assert_eq!(record.pacing(Micros(5)).pause, Micros(0), "the first waits for nothing");
    let (step, effect) = todo[0];
    let mut success = world.perform(step, effect, &record).unwrap();
    if let Success::Round(round) = &mut success {
        round.took = Micros(300_000);
    }
    let now = Micros(400_000);
    let next = record.step(Event::Done(step, success), now).unwrap().next;
    assert_eq!(next.pacing(now).pause, Micros(700_000));
    assert_eq!(next.pacing(Micros(now.0 + 50_000)).pause, Micros(650_000));
    let (record, _, _) = entered(Phase::Settle, options);
    assert_eq!(record.pacing(Micros(2)).pause, Micros(0));
}

/// The switch costs what is known when the container has been found, whatever is learnt elsewhere meanwhile.
#[test]
fn the_forecast_uses_what_the_record_says_of_the_switch() {
    let Transition { next, effects } =
        Migration::accept(job(), Token::generate(), CoordinatorId::generate(), Micros(0));
    assert_eq!(next.fixed(), Fixed::default());
    let known = Fixed { cost: Micros(300_000), moves: 3 };
    let mut world = World::new(true, "write_protect");
    let (step, effect) = effects[0];
    let Success::Located(host, located, _) = world.perform(step, effect, &next).unwrap() else { panic!() };
    let event = Event::Done(step, Success::Located(host, located, Some(known)));
    let mut transition = next.step(event, Micros(1)).unwrap();
    while transition.next.facts.convergence.is_none() {
        let Some((step, effect)) = transition.effects.pop() else { panic!("pre-copy never ends") };
        let success = world.perform(step, effect, &transition.next).unwrap();
        let after = transition.next.step(Event::Done(step, success), Micros(1)).unwrap();
        transition.next = after.next;
        transition.effects.extend(after.effects);
    }
    let convergence = transition.next.facts.convergence.unwrap();
    assert!(convergence.wanted > known.cost && convergence.forecast.downtime > known.cost, "{convergence:?}");
}
