//! Durations read out of a record.

use haulage_protocol::unit::Micros;

use crate::effect::Effect;
use crate::phase::Phase;
use crate::record::Migration;

/// The parts of the downtime, in microseconds on the coordinator's clock. The parts that run in parallel
/// (`dump` and `files`, with `ship` after both, and `last_round`) overlap, so they add up to more than `total`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
pub struct FreezeSplit {
    /// From the first task that stands still to the container running on the target.
    pub total: Micros,
    /// Freezing the cgroup, waiting for exec sessions to end included.
    pub freeze: Micros,
    /// CRIU's dump.
    pub dump: Micros,
    /// The last round of memory.
    pub last_round: Micros,
    /// The last file pass.
    pub files: Micros,
    /// Carrying over the dump.
    pub ship: Micros,
    /// Joining pages and images, on the target.
    pub merge: Micros,
    /// From the word to the runtime that waits until the container runs and its address is announced, with CRIU's
    /// restore in it.
    pub start: Micros,
}

/// How long an effect ran, if it has ended.
#[must_use]
pub fn took(migration: &Migration, effect: Effect) -> Option<Micros> {
    let span = migration.spans.iter().rev().find(|span| span.effect == effect)?;
    Some(span.to?.since(span.from))
}

/// The freeze and its parts, of a migration whose container has run on the target.
#[must_use]
pub fn freeze_split(migration: &Migration) -> Option<FreezeSplit> {
    let (frozen, restored) = (migration.facts.frozen.as_ref()?, migration.facts.restored.as_ref()?);
    // The checkpointer prepares before it freezes and answers right after, so what it says of the freeze itself
    // is counted back from its answer. Clocks of different hosts are never compared.
    let answered = migration.spans.iter().find(|span| span.effect == Effect::Freeze)?.to?;
    let ended = migration.spans.iter().find(|span| span.effect == Effect::Restore)?.to?;
    let part = |effect| took(migration, effect).unwrap_or_default();
    Some(FreezeSplit {
        total: ended.since(answered + restored.since) + frozen.took,
        freeze: frozen.took,
        dump: part(Effect::Dump),
        last_round: part(Effect::FinalRound),
        files: part(Effect::SyncFrozen),
        ship: part(Effect::ShipImages),
        merge: restored.merge,
        start: restored.start,
    })
}

/// Each phase with how long it lasted; the last one of a migration that goes on lasts until `now`.
#[must_use]
pub fn phases(migration: &Migration, now: Micros) -> Vec<(Phase, Micros)> {
    let ends = migration.phases.iter().skip(1).map(|(_, at)| *at).chain([now]);
    let lasted = migration.phases.iter().zip(ends).map(|((phase, from), to)| (*phase, to.since(*from)));
    lasted.filter(|(phase, _)| *phase != Phase::Done).collect()
}
