//! Logs: to standard error, filtered by `HAUL_LOG` (default `info`), as JSON lines with `HAUL_LOG_FORMAT=json`.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

/// Sets up logging for the process. A filter that cannot be parsed is replaced by the default, with a warning.
pub fn init() {
    let wanted = std::env::var("HAUL_LOG").unwrap_or_else(|_| "info".to_owned());
    let (filter, complaint) = match EnvFilter::try_new(&wanted) {
        Ok(filter) => (filter, None),
        Err(error) => (EnvFilter::new("info"), Some(error)),
    };
    let json = std::env::var("HAUL_LOG_FORMAT").is_ok_and(|format| format == "json");
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    // A subscriber that is already set (in a test) stays.
    let set = if json { builder.json().try_init() } else { builder.try_init() };
    if let (Ok(()), Some(error)) = (set, complaint) {
        tracing::warn!(%error, "HAUL_LOG is not a filter, using 'info'");
    }
}
