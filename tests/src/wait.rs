//! Waiting for a condition with a deadline.

use anyhow::{Result, bail};
use std::sync::LazyLock;
use std::thread::sleep;
use std::time::{Duration, Instant};

/// Time between two looks at a condition.
const STEP: Duration = Duration::from_millis(10);

/// How many times longer than elsewhere this machine may take for everything, from `HAULAGE_TEST_PATIENCE`: more than 1
/// where it is emulated.
static PATIENCE: LazyLock<u32> = LazyLock::new(|| {
    let told = std::env::var("HAULAGE_TEST_PATIENCE").ok().and_then(|text| text.parse().ok());
    told.filter(|factor| *factor > 0).unwrap_or(1)
});

/// The time that something may take here which takes at most `elsewhere` on an ordinary machine.
#[must_use]
pub fn limit(elsewhere: Duration) -> Duration {
    elsewhere * *PATIENCE
}

/// Looks at `condition` until it gives a value, at most for `limit` (see [`fn@limit`]).
///
/// # Errors
/// The condition's own error at once; after the limit, one that names `what` was awaited.
pub fn until<T>(what: &str, limit: Duration, mut condition: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let limit = self::limit(limit);
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
