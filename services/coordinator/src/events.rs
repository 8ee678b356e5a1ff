//! What a change of the record tells the world.

use haulage_migration::{Migration, Phase, predicted};
use haulage_protocol::event::What;

/// The events between two states of a record; `before` is absent for a new migration.
pub(crate) fn between(before: Option<&Migration>, after: &Migration) -> Vec<What> {
    let mut events = Vec::new();
    if before.is_none_or(|before| before.facts.tracking.is_none())
        && let Some(tracking) = &after.facts.tracking
    {
        events.push(What::Tracking { tracker: tracking.tracker.clone(), reason: tracking.reason.clone() });
    }
    let known = before.map_or(0, |before| before.facts.rounds.len());
    for (n, report) in after.facts.rounds.iter().enumerate().skip(known) {
        let so_far = after.facts.rounds.get(..=n).unwrap_or_default();
        events.push(What::Round { report: report.clone(), predicted: predicted(so_far, after.fixed().cost) });
    }
    if before.is_none_or(|before| before.fault.is_none())
        && let Some(fault) = &after.fault
    {
        events.push(What::Failed { fault: fault.clone() });
    }
    let known = before.map_or(0, |before| before.phases.len());
    for (phase, _) in after.phases.iter().skip(known) {
        events.push(match (phase, after.outcome) {
            (Phase::Done, Some(outcome)) => {
                What::Finished { outcome: outcome.as_str().to_owned(), fault: after.fault.clone() }
            }
            (phase, _) => What::Phase { phase: phase.as_str().to_owned() },
        });
    }
    events
}
