//! A look at how a container writes, for a plan: tracking only.

use std::path::Path;
use std::time::Duration;

use haulage_pages::policy::TransferPolicy;
use haulage_pages::source::{SourceEngine, SourceError, SourceOptions, best_method};
use haulage_pages::track::Method;
use haulage_protocol::fault::{Fault, code};
use haulage_protocol::page_shipper::{SampleWrites, WriteClass, WritesSampled};
use haulage_protocol::unit::Pages;

use crate::failure::{TRACKING, fault};
use crate::source;

/// Looks within the time: as many rounds as a history remembers.
const LOOKS: u32 = 8;
const LEAST: Duration = Duration::from_millis(100);
const MOST: Duration = Duration::from_secs(30);

pub(crate) async fn sample(ask: SampleWrites) -> Result<WritesSampled, Fault> {
    let looking = tokio::task::spawn_blocking(move || look(&ask).map_err(fault(TRACKING)));
    looking.await.map_err(fault(code::INTERNAL))?
}

/// Dropping the engine, also on an error, ends the tracking.
fn look(ask: &SampleWrites) -> Result<WritesSampled, SourceError> {
    let options = SourceOptions { policy: TransferPolicy::Adaptive };
    let procs = Path::new(&ask.cgroup_procs);
    let (method, reason) = best_method(procs);
    // Soft-dirty marks are one set for all who look: looking would take those away that a migration may need.
    if method != Method::WriteProtect {
        let tracker = source::name_of(method).to_owned();
        return Ok(WritesSampled { tracker, reason, classes: Vec::new() });
    }
    let (mut engine, _) = SourceEngine::begin(procs, options)?;
    let pause = Duration::from_micros(ask.time.0).clamp(LEAST, MOST) / LOOKS;
    engine.look()?;
    for _ in 0..LOOKS {
        std::thread::sleep(pause);
        engine.look()?;
    }
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "saturates")]
    let class = |(writes, pages): (f64, u64)| WriteClass {
        pages: Pages(pages),
        writes: (writes * 1000.0).ceil() as u64,
    };
    let classes = engine.seen().into_iter().map(class).collect();
    Ok(WritesSampled { tracker: source::name_of(method).to_owned(), reason: None, classes })
}
