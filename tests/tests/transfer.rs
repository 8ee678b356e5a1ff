//! However memory travels, all of it arrives.

use anyhow::{Context, Result, ensure};
use haulage_tests::cli::Moved;
use haulage_tests::fleet::Fleet;
use haulage_tests::scenario::{nothing_left_on, only_on, run, system};
use haulage_tests::{dirtier, image};
use serde_json::Value;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(120);

/// Pages that went in this form, in all rounds.
fn pages(moved: &Moved, form: &str) -> u64 {
    let rounds = moved.result.pointer("/facts/rounds").and_then(Value::as_array);
    let last = moved.result.pointer("/facts/last_round/round");
    let all = rounds.into_iter().flatten().chain(last);
    all.filter_map(|round| round.get("encoding")?.get(form)?.as_u64()).sum()
}

#[test]
fn memory_arrives_whole_packed_or_not_on_many_connections_and_within_a_limit() -> Result<()> {
    system(&Fleet::builder(), |fleet| {
        run(fleet, 0, "memory", 0, &[image::DIRTIER, "dirtier", "64", "40"])?;
        let ways: [(&[&str], &[&str]); 3] = [
            (&["--compress", "none", "--connections", "3"], &["plain"]),
            (&["--compress", "zstd", "--connections", "8"], &["zstd"]),
            (&["--compress", "lz4", "--connections", "2", "--bandwidth", "400Mbit/s"], &["lz4"]),
        ];
        for (n, (arguments, forms)) in ways.into_iter().enumerate() {
            let (from, to) = (n % 2, (n + 1) % 2);
            let moved = fleet.start_migration_with("memory", from, to, arguments)?.wait(PATIENCE)?;
            moved.committed().with_context(|| {
                let told = |what| fleet.host(from).docker(&["inspect", "--format", what, "memory"]);
                let log = told("{{.LogPath}}").map(|path| std::fs::read_to_string(path.trim()));
                format!("with {arguments:?}: {:?}, {log:?}", told("{{json .State}}"))
            })?;
            only_on(fleet, "memory", to)?;
            let verdict = dirtier::verify(fleet.host(to), "memory").context("after a move")?;
            ensure!(verdict.bad == 0, "with {arguments:?}: {verdict:?}");
            let went = ["plain", "lz4", "zstd", "named", "unchanged"].map(|form| (form, pages(&moved, form)));
            println!("{arguments:?}: {went:?}");
            for form in forms {
                ensure!(pages(&moved, form) > 0, "with {arguments:?} no page went as {form}: {went:?}");
            }
            ensure!(
                !forms.contains(&"plain") || pages(&moved, "lz4") + pages(&moved, "zstd") == 0,
                "packed although it was not asked for: {went:?}"
            );
        }
        fleet.hosts().iter().try_for_each(nothing_left_on)
    })
}
