//! The cells, the most important first: what does not fit into the budget of time is what comes last.

use crate::bench::cell::{
    Cell, Contender, Engine, Fill, Kind, Link, Pattern, Rate, Redis, RedisLoad, Workload, Writer,
};
use std::time::Duration;

/// What a run of the benchmark is to do.
#[derive(Debug, Clone)]
pub struct Plan {
    /// `full` or `quick`.
    pub name: &'static str,
    /// No run is begun after this.
    pub budget: Duration,
    /// The cells.
    pub cells: Vec<Cell>,
}

/// The Redis of the first mark.
pub const REDIS: &str = "redis-1g-set20";
/// Its freeze is the fixed cost: nothing was written, so nothing is left to send.
pub const FIXED: &str = "idle-64";
/// Idle memory of growing size, on a link that does not matter.
pub const GROWTH: [&str; 4] = ["grow-64", "grow-256", "grow-1g", "grow-4g"];
/// Where transfer policies differ.
pub const POLICIES: [&str; 4] = ["hot5-0.5", "hot20-0.5", "hot5-0.9", "hot20-0.9"];
/// What is sent twice here is overhead.
pub const READ_MOSTLY: [&str; 3] = [FIXED, "grow-1g", "grow-4g"];
/// A Redis whose one client never pauses.
pub const TAX: &str = "redis-tax";
/// Rounds a second apart, and a downtime that no switch keeps, so that there are some of them.
const A_ROUND_A_SECOND: &[&str] = &["--round-interval", "1000", "--max-downtime", "1"];
/// A limit on what the migration takes of the link, in bytes per second, which all memory keeps to in one round.
pub const LIMITED: &str = "limited-256";
/// As [`LIMITED`] has it.
pub const LIMIT: f64 = 50e6;
const FIFTY_MEGABYTES: &[&str] = &["--bandwidth", "50MB/s"];
/// Nothing but the page path limits the first round.
pub const UNSHAPED: &str = "unshaped-1g";

/// The policy with which the first round sends all.
pub const LIMITED_BY: Engine = ALL;
const HAUL: Engine = Engine::Haul(None);
const HISTORY: Engine = Engine::Haul(Some("history"));
const PHAUL: Engine = Engine::Haul(Some("phaul"));
const ALL: Engine = Engine::Haul(Some("all"));
const ADAPTIVE: Engine = Engine::Haul(Some("adaptive"));

const GIGABIT: Link = Link::Mbit(1000);
const TEN_GIGABIT: Link = Link::Mbit(10_000);

const IDLE: Writer = Writer {
    mebibytes: 64,
    processes: 1,
    pattern: Pattern::Hot,
    hot_permille: 1000,
    fill: Fill::Random,
    kind: Kind::Private,
    rate: Rate::Idle,
};

fn cell(
    name: &'static str,
    link: Link,
    workload: Workload,
    limit: u64,
    contenders: &[(Engine, u32)],
) -> Cell {
    let contenders = contenders.iter().map(|(engine, runs)| Contender { engine: *engine, runs: *runs });
    let limit = Duration::from_secs(limit);
    Cell { name, link, workload, haul: &[], contenders: contenders.collect(), limit }
}

fn idle(name: &'static str, link: Link, mebibytes: u64, limit: u64, contenders: &[(Engine, u32)]) -> Cell {
    cell(name, link, Workload::Writer(Writer { mebibytes, ..IDLE }), limit, contenders)
}

fn hot(name: &'static str, hot_permille: u64, share: f64, contenders: &[(Engine, u32)]) -> Cell {
    let writer = Writer { mebibytes: 128, hot_permille, rate: Rate::OfLink(share), ..IDLE };
    cell(name, GIGABIT, Workload::Writer(writer), 240, contenders)
}

fn redis(name: &'static str, mebibytes: u32, load: RedisLoad, limit: u64, runs: &[(Engine, u32)]) -> Cell {
    cell(name, GIGABIT, Workload::Redis(Redis { mebibytes, load }), limit, runs)
}

/// Everything.
#[must_use]
pub fn full() -> Plan {
    let set = |zipf| RedisLoad::Set { megabytes: 20, zipf };
    // A single run of Docker on 1 GiB takes more than a minute.
    let against_all = [(HAUL, 10), (Engine::Runc, 10), (Engine::Podman, 2), (Engine::Docker, 1)];
    let policies = [(HAUL, 6), (HISTORY, 6), (PHAUL, 6)];
    let every_policy = [(HAUL, 6), (HISTORY, 6), (PHAUL, 6), (ALL, 4), (ADAPTIVE, 4)];
    let alone = [(HAUL, 5)];
    let writer = |change: fn(&mut Writer)| {
        let mut writer = Writer { rate: Rate::OfLink(0.1), ..IDLE };
        change(&mut writer);
        Workload::Writer(writer)
    };
    let [grow_64, grow_256, grow_1g, grow_4g] = GROWTH;
    let [hot5_half, hot20_half, hot5_most, hot20_most] = POLICIES;
    let cells = vec![
        redis(REDIS, 1024, set(false), 720, &against_all),
        idle(
            FIXED,
            GIGABIT,
            64,
            180,
            &[(HAUL, 10), (Engine::Runc, 10), (Engine::Podman, 3), (Engine::Docker, 3)],
        ),
        idle(grow_64, TEN_GIGABIT, 64, 90, &[(HAUL, 10), (Engine::Runc, 3)]),
        idle(grow_4g, TEN_GIGABIT, 4096, 300, &[(HAUL, 10)]),
        idle(grow_1g, TEN_GIGABIT, 1024, 150, &[(HAUL, 10), (Engine::Runc, 3)]),
        hot(hot5_half, 50, 0.5, &every_policy),
        hot(hot20_half, 200, 0.5, &policies),
        Cell { haul: A_ROUND_A_SECOND, ..redis(TAX, 256, RedisLoad::Incr, 180, &[(HAUL, 10)]) },
        idle(UNSHAPED, Link::Unshaped, 1024, 90, &[(HAUL, 10)]),
        Cell { haul: FIFTY_MEGABYTES, ..idle(LIMITED, TEN_GIGABIT, 256, 60, &[(LIMITED_BY, 3)]) },
        hot(hot5_most, 50, 0.9, &policies),
        hot(hot20_most, 200, 0.9, &policies),
        idle(grow_256, TEN_GIGABIT, 256, 60, &[(HAUL, 5), (Engine::Runc, 3)]),
        cell("processes-14", GIGABIT, writer(|w| w.processes = 14), 60, &[(HAUL, 5), (Engine::Runc, 3)]),
        cell("processes-50", GIGABIT, writer(|w| w.processes = 50), 60, &[(HAUL, 5), (Engine::Runc, 3)]),
        redis("redis-256-zipf20", 256, set(true), 60, &alone),
        hot("hot1-0.1", 10, 0.1, &alone),
        hot("hot20-1.5", 200, 1.5, &alone),
        cell("shift-0.5", GIGABIT, writer(shift), 60, &alone),
        cell("sparse-0.5", GIGABIT, writer(sparse), 60, &alone),
        // P.Haul's mtouch: one byte of a random page every so many microseconds, here 500.
        cell(
            "mtouch-2000",
            GIGABIT,
            writer(|w| (w.fill, w.rate) = (Fill::Byte, Rate::Pages(2000))),
            60,
            &alone,
        ),
        // Memory that is carried before the freeze, of which one kind may be written to through a descriptor, too.
        cell("shared-1g", TEN_GIGABIT, shared(Kind::Shared), 90, &[(HAUL, 5), (Engine::Runc, 2)]),
        cell("memfd-1g", TEN_GIGABIT, shared(Kind::Memfd), 90, &[(HAUL, 3)]),
        cell("sysv-1g", TEN_GIGABIT, shared(Kind::SysV), 90, &[(HAUL, 3), (Engine::Runc, 2)]),
        idle("slow-64", Link::Mbit(100), 64, 90, &[(HAUL, 3), (Engine::Runc, 3)]),
    ];
    Plan { name: "full", budget: Duration::from_secs(37 * 60), cells }
}

fn shared(kind: Kind) -> Workload {
    Workload::Writer(Writer { mebibytes: 1024, processes: 4, kind, ..IDLE })
}

fn shift(writer: &mut Writer) {
    (writer.pattern, writer.hot_permille, writer.rate) = (Pattern::Shift, 50, Rate::OfLink(0.5));
}

fn sparse(writer: &mut Writer) {
    (writer.fill, writer.hot_permille, writer.rate) = (Fill::Sparse, 200, Rate::OfLink(0.5));
}

/// The most telling cells, with fewer runs.
#[must_use]
pub fn quick() -> Plan {
    const RUNS: u32 = 3;
    let [small, .., large] = GROWTH;
    let [hot5, ..] = POLICIES;
    let names = [
        (REDIS, 2, 1),
        (FIXED, 5, 3),
        (small, 3, 0),
        (hot5, RUNS, 0),
        (TAX, RUNS, 0),
        (UNSHAPED, 2, 0),
        (large, 2, 0),
    ];
    let all = full().cells;
    let chosen = names.iter().filter_map(|(name, ours, others)| {
        let mut cell = all.iter().find(|cell| cell.name == *name)?.clone();
        // On a GiB they take minutes.
        let is_quick = |engine: &Engine| !matches!(engine, Engine::Docker | Engine::Podman);
        cell.contenders.retain(|c| is_quick(&c.engine) || *name == FIXED);
        cell.contenders.retain(|c| matches!(c.engine, Engine::Haul(_)) || *others > 0);
        for contender in &mut cell.contenders {
            let most = if matches!(contender.engine, Engine::Haul(_)) { *ours } else { *others };
            contender.runs = contender.runs.min(most);
        }
        Some(cell)
    });
    Plan { name: "quick", budget: Duration::from_secs(7 * 60), cells: chosen.collect() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn names_are_unique_and_shares_are_of_something() {
        for plan in [full(), quick()] {
            let names: HashSet<&str> = plan.cells.iter().map(|cell| cell.name).collect();
            assert_eq!(names.len(), plan.cells.len());
            for cell in &plan.cells {
                let Workload::Writer(writer) = cell.workload else { continue };
                let is_share = matches!(writer.rate, Rate::OfLink(_));
                assert!(!is_share || cell.link.bytes_per_second().is_some(), "{}", cell.name);
                assert!(
                    is_share == (cell.write_rate() > 0) || matches!(writer.rate, Rate::Pages(_)),
                    "{}",
                    cell.name
                );
            }
        }
        assert_eq!(quick().cells.len(), 7);
    }
}
