//! A look at how a container writes, for a plan: tracking only.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use haulage_pages::policy::TransferPolicy;
use haulage_pages::source::{SourceEngine, SourceOptions, best_method};
use haulage_pages::track::Method;
use haulage_protocol::fault::Fault;
use haulage_protocol::page_shipper::{SampleWrites, WriteClass, WritesSampled};
use haulage_protocol::unit::Pages;

use crate::failure::{TRACKING, fault, joined};
use crate::source;
use crate::watched::Watched;

/// Looks within the time: as many rounds as a history remembers.
const LOOKS: u32 = 8;
const LEAST: Duration = Duration::from_millis(100);
const MOST: Duration = Duration::from_secs(30);

pub(crate) async fn sample(watched: Arc<Watched>, ask: SampleWrites) -> Result<WritesSampled, Fault> {
    joined(tokio::task::spawn_blocking(move || look(&watched, &ask)).await)
}

/// Dropping the engine, also on an error, ends the tracking; then the watch ends.
fn look(watched: &Arc<Watched>, ask: &SampleWrites) -> Result<WritesSampled, Fault> {
    let watch = watched.look(&ask.cgroup_procs)?;
    let options = SourceOptions { policy: TransferPolicy::Adaptive };
    let procs = Path::new(&ask.cgroup_procs);
    let (method, reason) = best_method(procs);
    // Soft-dirty marks are one set for all who look: looking would take those away that a migration may need.
    if method != Method::WriteProtect {
        let tracker = source::name_of(method).to_owned();
        return Ok(WritesSampled { tracker, reason, classes: Vec::new() });
    }
    let (mut engine, _) = SourceEngine::begin(procs, options).map_err(fault(TRACKING))?;
    let pause = Duration::from_micros(ask.time.0).clamp(LEAST, MOST) / LOOKS;
    engine.look().map_err(fault(TRACKING))?;
    for _ in 0..LOOKS {
        watch.wait(pause)?;
        engine.look().map_err(fault(TRACKING))?;
    }
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "saturates")]
    let class = |(writes, pages): (f64, u64)| WriteClass {
        pages: Pages(pages),
        writes: (writes * 1000.0).ceil() as u64,
    };
    let classes = engine.seen().into_iter().map(class).collect();
    Ok(WritesSampled { tracker: source::name_of(method).to_owned(), reason: None, classes })
}
