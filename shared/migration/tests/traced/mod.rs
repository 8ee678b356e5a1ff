//! Traces, read back as a viewer does.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use haulage_migration::{Migration, trace};
use haulage_protocol::unit::Micros;
use serde_json::Value;

/// The complete events of a row: when each began, how long it lasted, what it is called.
pub(crate) type Rows = BTreeMap<(String, String), Vec<(u64, u64, String)>>;

/// The rows of a migration's trace, by the names of their groups and their own. Whatever a viewer relies on is checked,
/// and that every span of the record is there.
pub(crate) fn read(record: &Migration, now: Micros) -> Rows {
    let written = serde_json::to_string(&trace::trace(record, now)).unwrap();
    let events: Vec<Value> = serde_json::from_str(&written).unwrap();
    let number =
        |event: &Value, field: &str| event[field].as_u64().unwrap_or_else(|| panic!("{field}: {event}"));
    let text = |event: &Value, field: &str| event[field].as_str().unwrap().to_owned();
    let (mut groups, mut names, mut complete) = (BTreeMap::new(), BTreeMap::new(), Vec::new());
    for event in &events {
        let (pid, tid) = (number(event, "pid"), number(event, "tid"));
        match (text(event, "ph").as_str(), text(event, "name").as_str()) {
            ("M", "process_name") => assert_eq!(groups.insert(pid, text(&event["args"], "name")), None),
            ("M", "thread_name") => assert_eq!(names.insert(tid, (pid, text(&event["args"], "name"))), None),
            ("M", "process_sort_index" | "thread_sort_index") => {
                number(&event["args"], "sort_index");
            }
            ("X", name) => {
                complete.push((pid, tid, number(event, "ts"), number(event, "dur"), name.to_owned()))
            }
            other => panic!("{other:?}"),
        }
    }
    let mut by_row: BTreeMap<u64, Vec<(u64, u64, String)>> = BTreeMap::new();
    for (pid, tid, from, lasted, name) in complete {
        assert_eq!(names[&tid].0, pid, "a row in two groups");
        by_row.entry(tid).or_default().push((from, lasted, name));
    }
    for row in by_row.values_mut() {
        row.sort_by_key(|(from, lasted, _)| (*from, Reverse(*lasted)));
        let mut open: Vec<u64> = Vec::new();
        for (from, lasted, name) in row.iter() {
            open.retain(|end| end > from);
            assert!(
                open.iter().all(|end| from + lasted <= *end),
                "{name} overlaps what it is not within: {row:?}"
            );
            open.push(from + lasted);
        }
    }
    let all: BTreeSet<(String, u64)> =
        by_row.values().flatten().map(|(from, _, name)| (name.clone(), *from)).collect();
    for span in &record.spans {
        let what = (span.effect.to_string(), span.from.since(record.began).0);
        assert!(all.contains(&what), "{what:?} is missing: {all:?}");
    }
    let named = by_row.into_iter().map(|(tid, row)| {
        let (pid, name) = &names[&tid];
        ((groups[pid].clone(), name.clone()), row)
    });
    let mut rows = Rows::new();
    named.for_each(|(name, row)| rows.entry(name).or_default().extend(row));
    rows
}
