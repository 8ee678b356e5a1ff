//! Waiting for a condition with a deadline.

use anyhow::{Result, bail};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// Time between two looks at a condition.
const STEP: Duration = Duration::from_millis(10);

/// Looks at `condition` until it gives a value, at most for `limit`.
///
/// # Errors
/// The condition's own error at once; after the limit, one that names `what` was awaited.
pub fn until<T>(what: &str, limit: Duration, mut condition: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let started = Instant::now();
    loop {
        if let Some(value) = condition()? {
            return Ok(value);
        }
        if started.elapsed() > limit {
            bail!("{what}: not within {limit:?}");
        }
        sleep(STEP);
    }
}
