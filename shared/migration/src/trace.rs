//! A migration as a trace: what ran when, for chrome://tracing and Perfetto.
//!
//! The format is that of the Trace Event Profiling Tool (<https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU>),
//! in its form of an array: complete events (`X`), and metadata (`M`) that names processes and threads. Here a
//! "process" is a group of rows, a "thread" a row:
//!
//! ```text
//! migration web-1       phases        locate│inspect│…
//! stands still          downtime      freeze│…│ship│join│start      dump, last round, files, fill: a row each
//! coordinator           …
//! source host-a         checkpointer  inspect … freeze│dump …
//! target host-b         restorer      check … restore│verify …
//! ```
//! Times are microseconds since the migration was accepted, on the coordinator's clock. Clocks of different hosts are
//! never compared: what a host says of its own work is counted back from its answer. Where two events of a row would
//! overlap without one being within the other, such as after a take-over by a coordinator whose clock goes otherwise,
//! the later one gets a further row.

use std::collections::BTreeMap;

use haulage_protocol::page_shipper::RoundReport;
use haulage_protocol::rpc::Service;
use haulage_protocol::unit::Micros;
use serde::Serialize;

use crate::effect::Effect;
use crate::record::{Migration, Span};

/// One event, as the format has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TraceEvent {
    /// What is shown.
    pub name: String,
    /// `X`, a complete event, or `M`, metadata.
    pub ph: &'static str,
    /// The group of rows.
    pub pid: u32,
    /// The row; no two groups share one.
    pub tid: u32,
    /// When it began, in microseconds. Of metadata: zero.
    pub ts: u64,
    /// How long it lasted, in microseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dur: Option<u64>,
    /// What is told of it.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub args: BTreeMap<&'static str, Arg>,
}

/// A value that is told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Arg {
    /// A count, bytes, or microseconds, as its name says.
    Number(u64),
    /// A text.
    Text(String),
}

type Args = BTreeMap<&'static str, Arg>;

/// A group of rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Group {
    Migration,
    Freeze,
    Coordinator,
    Source,
    Target,
}

/// Something that ran.
#[derive(Debug)]
struct Piece {
    group: Group,
    row: &'static str,
    name: String,
    from: u64,
    to: u64,
    args: Args,
}

/// The trace of a migration. What has not ended yet lasts until `now`.
#[must_use]
pub fn trace(migration: &Migration, now: Micros) -> Vec<TraceEvent> {
    let end = migration.ended().unwrap_or(now);
    let at = Clock { began: migration.began };
    let mut pieces = phases(migration, end, at);
    pieces.extend(freeze(migration, at));
    pieces.extend(effects(migration, end, at));
    laid_out(migration, pieces)
}

/// Times as they are in the trace.
#[derive(Clone, Copy)]
struct Clock {
    began: Micros,
}

impl Clock {
    fn at(self, time: Micros) -> u64 {
        time.since(self.began).0
    }
}

fn phases(migration: &Migration, end: Micros, clock: Clock) -> Vec<Piece> {
    let (group, row) = (Group::Migration, "phases");
    let text = |value: &str| Arg::Text(value.to_owned());
    let mut about = Args::from([
        ("id", text(migration.job.id.as_str())),
        ("container", text(migration.name())),
        ("to", text(migration.job.to.as_str())),
        ("began_us", Arg::Number(migration.began.0)),
        ("outcome", text(migration.outcome.map_or("under way", |outcome| outcome.as_str()))),
    ]);
    about.extend(migration.source().map(|host| ("from", text(host.as_str()))));
    about.extend(migration.fault.as_ref().map(|fault| ("fault", Arg::Text(fault.to_string()))));
    let whole =
        Piece { group, row, name: migration.name().to_owned(), from: 0, to: clock.at(end), args: about };
    let ends = migration.phases.iter().skip(1).map(|(_, at)| *at).chain([end]);
    let each = migration.phases.iter().zip(ends).map(|((phase, from), to)| {
        let (from, to) = (clock.at(*from), clock.at(to));
        Piece { group, row, name: phase.to_string(), from, to: to.max(from), args: Args::new() }
    });
    [whole].into_iter().chain(each.filter(|piece| piece.name != "done")).collect()
}

/// The parts of the freeze, as [`crate::timing::freeze_split`] has them, each where it was.
fn freeze(migration: &Migration, clock: Clock) -> Vec<Piece> {
    let mut pieces = Vec::new();
    let mut piece = |row, name: &str, from: u64, to: u64, args| {
        let name = name.to_owned();
        pieces.push(Piece { group: Group::Freeze, row, name, from, to: to.max(from), args });
    };
    let span = |effect| {
        let span = migration.spans.iter().rev().find(|span| span.effect == effect)?;
        Some((clock.at(span.from), clock.at(span.to?)))
    };
    let facts = &migration.facts;
    let Some((frozen, (_, answered))) = facts.frozen.as_ref().zip(span(Effect::Freeze)) else {
        return pieces;
    };
    let began = answered.saturating_sub(frozen.took.0);
    piece(
        "downtime",
        "freeze",
        began,
        answered,
        Args::from([("processes", Arg::Number(frozen.processes.into()))]),
    );
    for (row, effect) in
        [("dump", Effect::Dump), ("last round", Effect::FinalRound), ("files", Effect::SyncFrozen)]
    {
        let args = match (effect, &facts.last_round, &facts.dumped) {
            (Effect::FinalRound, Some(last), _) => round_args(&last.round),
            (Effect::Dump, _, Some(dumped)) => Args::from([("bytes", Arg::Number(dumped.bytes.0))]),
            _ => Args::new(),
        };
        if let Some((from, to)) = span(effect) {
            piece(row, row, from, to, args);
        }
    }
    if let Some((from, to)) = span(Effect::ShipImages) {
        piece("downtime", "ship dump", from, to, Args::new());
    }
    if let Some((restored, (asked, answered))) = facts.restored.as_ref().zip(span(Effect::Restore)) {
        let runs = answered.saturating_sub(restored.since.0).max(asked);
        let start = runs.saturating_sub(restored.start.0).max(asked);
        let join = start.saturating_sub(restored.merge.0).max(asked);
        piece("downtime", "join", join, start, Args::new());
        piece("downtime", "start", start, runs, Args::new());
        piece("downtime", "stands still", began, runs, Args::new());
        if let Some(filled) = &facts.filled {
            let args = Args::from([
                ("waited_for", Arg::Number(filled.faults.0)),
                ("on_demand", Arg::Number(filled.on_demand.0)),
                ("in_background", Arg::Number(filled.in_background.0)),
            ]);
            piece("fill", "fill", runs, runs.saturating_add(filled.took.0), args);
        }
    }
    pieces
}

/// Every effect, at the service that performed it.
fn effects(migration: &Migration, end: Micros, clock: Clock) -> Vec<Piece> {
    let mut rounds = migration.facts.rounds.iter();
    let mut passes = migration.facts.passes.iter();
    let mut pieces = Vec::new();
    for span in &migration.spans {
        let (group, row) = place(span.effect);
        let from = clock.at(span.from);
        let to = clock.at(span.to.unwrap_or_else(|| given_up(migration, span, end))).max(from);
        let mut args = Args::new();
        if span.to.is_none() {
            args.insert("answer", Arg::Text("none".to_owned()));
        }
        match span.effect {
            Effect::RunRound(_) if span.to.is_some() => {
                if let Some(round) = rounds.next() {
                    args = round_args(round);
                    // What comes before it is a pause, in which nothing is sent.
                    let (name, from) = ("send".to_owned(), to.saturating_sub(round.took.0).max(from));
                    pieces.push(Piece { group, row, name, from, to, args: Args::new() });
                }
            }
            Effect::FinalRound => {
                args.extend(migration.facts.last_round.iter().flat_map(|last| round_args(&last.round)))
            }
            // Their answers come in this order, and after a failure there is no other.
            Effect::SyncFiles | Effect::SyncTmpfs | Effect::SyncFrozen | Effect::ShipImages
                if span.to.is_some() =>
            {
                args.extend(passes.next().into_iter().flat_map(|pass| {
                    let wire = ("wire_bytes", Arg::Number(pass.wire.0));
                    [("entries", Arg::Number(pass.entries)), ("sent", Arg::Number(pass.sent)), wire]
                }));
            }
            _ => {}
        }
        pieces.push(Piece { group, row, name: span.effect.to_string(), from, to, args });
    }
    pieces
}

/// Until when an effect was waited for whose answer has never come: the next phase, if there is one.
fn given_up(migration: &Migration, span: &Span, end: Micros) -> Micros {
    migration.phases.iter().map(|(_, at)| *at).find(|at| *at > span.from).unwrap_or(end)
}

fn round_args(round: &RoundReport) -> Args {
    let mut args = Args::from([
        ("dirty_pages", Arg::Number(round.dirty.0)),
        ("sent_pages", Arg::Number(round.sent.0)),
        ("zero_pages", Arg::Number(round.zero.0)),
        ("withheld_pages", Arg::Number(round.withheld.0)),
        ("wire_bytes", Arg::Number(round.wire.0)),
        ("scan_us", Arg::Number(round.scan.0)),
        ("took_us", Arg::Number(round.took.0)),
    ]);
    args.extend(round.left.map(|left| ("left_pages", Arg::Number(left.0))));
    args
}

/// Who performs an effect.
fn place(effect: Effect) -> (Group, &'static str) {
    let (group, service) = match effect {
        // Many hosts are asked.
        Effect::Locate | Effect::AcquireLease | Effect::ConfirmLease | Effect::ReleaseLease => {
            return (Group::Coordinator, "coordinator");
        }
        Effect::Inspect
        | Effect::Throttle(_)
        | Effect::Unthrottle
        | Effect::PrepareFreeze
        | Effect::Freeze
        | Effect::Dump
        | Effect::ConfirmHold
        | Effect::CommitSource
        | Effect::RollBackSource => (Group::Source, Service::Checkpointer),
        Effect::StartTracking | Effect::RunRound(_) | Effect::FinalRound | Effect::CloseSourcePages => {
            (Group::Source, Service::PageShipper)
        }
        Effect::PushImage
        | Effect::SyncFiles
        | Effect::SyncTmpfs
        | Effect::SyncFrozen
        | Effect::ShipImages
        | Effect::CloseSourceFiles => (Group::Source, Service::Syncer),
        Effect::Check
        | Effect::Create
        | Effect::Prepare
        | Effect::TakePackets
        | Effect::Restore
        | Effect::Verify
        | Effect::Adopt
        | Effect::UndoTarget => (Group::Target, Service::Restorer),
        Effect::OpenPages | Effect::CloseTargetPages => (Group::Target, Service::PageShipper),
        Effect::PullImage | Effect::OpenFiles | Effect::PersistFiles | Effect::CloseTargetFiles => {
            (Group::Target, Service::Syncer)
        }
    };
    (group, service.as_str())
}

/// Gives every piece a row in which it overlaps nothing that it is not within, and names the rows.
fn laid_out(migration: &Migration, mut pieces: Vec<Piece>) -> Vec<TraceEvent> {
    // Of those that begin at once the longest comes first: the others are within it.
    pieces.sort_by_key(|piece| (piece.group, piece.row, piece.from, std::cmp::Reverse(piece.to)));
    let mut rows: Vec<Row> = Vec::new();
    let mut events = Vec::new();
    for Piece { group, row, name, from, to, args } in pieces {
        let has_room = |candidate: &mut Row| {
            candidate.group == group && candidate.name == row && candidate.takes(from, to)
        };
        let found = rows.iter_mut().position(has_room);
        let index = found.unwrap_or_else(|| {
            rows.push(Row { group, name: row, open: vec![to] });
            rows.len() - 1
        });
        let (pid, tid) = (group as u32 + 1, u32::try_from(index).unwrap_or(u32::MAX).saturating_add(1));
        let dur = Some(to.saturating_sub(from));
        events.push(TraceEvent { name, ph: "X", pid, tid, ts: from, dur, args });
    }
    let mut named: Vec<TraceEvent> = Vec::new();
    let meta = |name: &str, pid, tid, arg, value| TraceEvent {
        name: name.to_owned(),
        ph: "M",
        pid,
        tid,
        ts: 0,
        dur: None,
        args: Args::from([(arg, value)]),
    };
    for (row, tid) in rows.iter().zip(1..) {
        let pid = row.group as u32 + 1;
        if !named.iter().any(|event| event.pid == pid) {
            named.push(meta("process_name", pid, tid, "name", Arg::Text(title(migration, row.group))));
            named.push(meta("process_sort_index", pid, tid, "sort_index", Arg::Number(pid.into())));
        }
        named.push(meta("thread_name", pid, tid, "name", Arg::Text(row.name.to_owned())));
        named.push(meta("thread_sort_index", pid, tid, "sort_index", Arg::Number(tid.into())));
    }
    named.extend(events);
    named
}

fn title(migration: &Migration, group: Group) -> String {
    let host = |role: &str, host: Option<&str>| format!("{role} {}", host.unwrap_or("?"));
    match group {
        Group::Migration => format!("migration of {}", migration.name()),
        Group::Freeze => "the container stands still".to_owned(),
        Group::Coordinator => "coordinator".to_owned(),
        Group::Source => host("source", migration.source().map(|host| host.as_str())),
        Group::Target => host("target", Some(migration.job.to.as_str())),
    }
}

/// A row, and the ends of the events that the next one may be within, the innermost last.
struct Row {
    group: Group,
    name: &'static str,
    open: Vec<u64>,
}

impl Row {
    /// Takes an event that begins no sooner than any before it, if it overlaps none that it is not within.
    fn takes(&mut self, from: u64, to: u64) -> bool {
        while self.open.last().is_some_and(|end| *end <= from) {
            self.open.pop();
        }
        let has_room = self.open.last().is_none_or(|end| to <= *end);
        if has_room {
            self.open.push(to);
        }
        has_room
    }
}
