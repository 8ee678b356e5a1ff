//! `haul watch`.

use futures_util::StreamExt;
use haulage_protocol::event::{Event, What};
use haulage_transport::Nats;

use crate::args;
use crate::output::{Failure, clock, json, line};
use crate::show;

pub(crate) async fn run(nats: &Nats, wanted: args::Watch) -> Result<(), Failure> {
    let id = match &wanted.id {
        Some(id) => Some(show::find(nats, id).await?.job.id),
        None => None,
    };
    let mut events = nats.events(id.as_ref()).await?;
    while let Some(event) = events.next().await {
        let event = event?;
        if wanted.json {
            json(&event)?;
        } else {
            line(&text(&event))?;
        }
        if id.is_some() && matches!(event.what, What::Finished { .. }) {
            break;
        }
    }
    Ok(())
}

fn text(event: &Event) -> String {
    let what = match &event.what {
        What::Phase { phase } => phase.clone(),
        What::Tracking { tracker, reason: None } => format!("writes are tracked by {tracker}"),
        What::Tracking { tracker, reason: Some(reason) } => {
            format!("writes are tracked by {tracker}: {reason}")
        }
        What::Round { report, predicted } => format!(
            "round {}: {} pages dirty, {} in {}, predicted downtime for pages {predicted}",
            report.round, report.dirty.0, report.wire, report.took
        ),
        What::Failed { fault } => format!("failed: {fault}"),
        What::Finished { outcome, fault: None } => outcome.clone(),
        What::Finished { outcome, fault: Some(fault) } => format!("{outcome}: {fault}"),
    };
    format!("{}  {}  {what}", clock(event.at), event.migration)
}
