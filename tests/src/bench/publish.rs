//! `deploy/BENCHMARKS.md`: the latest summary, for readers of the repository.

use crate::bench::about::workspace;
use crate::bench::report;
use crate::bench::sample::Results;
use anyhow::{Context, Result};

const HEAD: &str = "<!-- Written by `bench --publish`, down to the mark below; do not edit. -->\n";
/// What follows in the file is not the benchmark's.
const KEPT: &str = "<!-- From here on written by hand. -->\n";

/// Writes the summary, and leaves what stands below it.
///
/// # Errors
/// The file cannot be written.
pub fn write(results: &Results) -> Result<()> {
    let file = workspace()?.join("deploy/BENCHMARKS.md");
    let before = std::fs::read_to_string(&file).unwrap_or_default();
    let kept = before.split_once(KEPT).map_or_else(String::new, |(_, kept)| format!("\n{KEPT}{kept}"));
    let text = format!("{HEAD}{}{kept}", report::markdown(results));
    std::fs::write(&file, text).with_context(|| format!("write {}", file.display()))
}
