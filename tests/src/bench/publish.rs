//! `deploy/BENCHMARKS.md`: the latest summary, for readers of the repository.

use crate::bench::about::workspace;
use crate::bench::report;
use crate::bench::sample::Results;
use anyhow::{Context, Result};

const HEAD: &str = "<!-- Written by `bench --publish`; do not edit. -->\n";

/// Writes the summary.
///
/// # Errors
/// The file cannot be written.
pub fn write(results: &Results) -> Result<()> {
    let file = workspace()?.join("deploy/BENCHMARKS.md");
    let text = format!("{HEAD}{}", report::markdown(results));
    std::fs::write(&file, text).with_context(|| format!("write {}", file.display()))
}
