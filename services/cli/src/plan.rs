//! `haul plan`: what a migration would be like. The container runs on; nothing is made on either host.

use std::fmt;
use std::time::Duration;

use futures_util::future::join_all;
use haulage_migration::fixed::{Costs, Fixed, Shape};
use haulage_migration::plan::{Prediction, predict};
use haulage_protocol::checkpointer::{Inspect, Inspected, Locate};
use haulage_protocol::fault::{Fault, code};
use haulage_protocol::host::Presence;
use haulage_protocol::id::{Epoch, HostId, MigrationId, Step};
use haulage_protocol::job::Options;
use haulage_protocol::lease::Lease;
use haulage_protocol::page_shipper::{LinkMeasured, MeasureLink, OpenSink, SampleWrites, WritesSampled};
use haulage_protocol::policy::Policy;
use haulage_protocol::restorer::Check;
use haulage_protocol::rpc::{Command, Rpc, Service};
use haulage_protocol::secret::Token;
use haulage_protocol::subject;
use haulage_protocol::unit::{Bytes, Micros, PAGE_SIZE, Pages};
use haulage_protocol::version::Version;
use haulage_transport::{Nats, Table};

use crate::args;
use crate::output::{Failure, json, line};

const SILENCE: Duration = Duration::from_secs(10);
/// What is compared.
const POLICIES: [Policy; 4] =
    [Policy::Adaptive, Policy::History { window: 8, threshold: 1 }, Policy::All, Policy::Phaul];

/// Asks services under an id of its own, which no migration has.
struct Asker<'a> {
    nats: &'a Nats,
    id: MigrationId,
}

impl Asker<'_> {
    async fn ask<R: Rpc>(&self, host: &HostId, step: u64, body: R) -> Result<R::Reply, Fault> {
        let (version, migration, step) = (Version::CURRENT, self.id.clone(), Step(step));
        let command = Command { version, migration, epoch: Epoch(1), step, floor: step, body };
        self.nats.call(host, &command, SILENCE).await
    }
}

pub(crate) async fn run(nats: &Nats, wanted: args::Plan) -> Result<(), Failure> {
    let asker = Asker { nats, id: MigrationId::generate() };
    let source = locate(&asker, &wanted).await?;
    let inspect = Inspect { container: wanted.container.clone(), shared_binds: wanted.shared.clone() };
    let inspected = asker.ask(&source, 2, inspect).await?;
    let leases: Table<Lease> = Table::open(nats, subject::LEASES).await?;
    if let Some((lease, _)) = leases.get(&subject::lease_key(&inspected.container)).await? {
        return Err(lease.held().into());
    }
    let costs: Table<Costs> = Table::open(nats, subject::COSTS).await?;
    let known = costs.get(&subject::cost_key(&source, &wanted.to)).await?;
    let fixed = known.map(|(costs, _)| costs.fixed()).unwrap_or_default().of(Shape::from(&inspected));
    let checked = asker.ask(&wanted.to, 3, Check::from(&inspected)).await?;
    let time = Micros(wanted.sample.saturating_mul(1_000_000));
    let sample = SampleWrites { cgroup_procs: inspected.cgroup_procs.clone(), time };
    let sampled = asker.ask(&source, 4, sample).await?;
    let link = match wanted.rate {
        Some(mbit) => Link { rate: Bytes(mbit.saturating_mul(125_000)), measured: None },
        None => measure(&asker, &source, &wanted.to).await?,
    };
    let rate = Pages(link.rate.0 / PAGE_SIZE);
    let options = |policy| Options {
        policy,
        max_downtime_ms: wanted.max_downtime,
        deadline_ms: wanted.deadline.map(|seconds| seconds.saturating_mul(1000)),
        ..Options::default()
    };
    let plans: Vec<(Policy, Prediction)> = match sampled.tracker.as_str() {
        "write_protect" => POLICIES
            .map(|policy| (policy, predict(&sampled.classes, rate, &options(policy), fixed.cost)))
            .into(),
        _ => Vec::new(),
    };
    if wanted.json {
        let plans: Vec<_> = plans
            .iter()
            .map(|(policy, plan)| serde_json::json!({ "policy": policy, "prediction": plan }))
            .collect();
        return json(&serde_json::json!({
            "container": inspected.container, "name": inspected.name, "from": source, "to": wanted.to,
            "memory": inspected.memory, "disk": inspected.disk, "image_present": checked.image_present,
            "sampled": sampled, "plans": plans,
            "assumed": {
                "pages_per_second": rate, "rate_measured": link.measured.is_some(), "probe": link.measured,
                "fixed_cost_us": fixed.cost, "fixed_cost_from_moves": fixed.moves,
            },
        }));
    }
    let image_present = checked.image_present;
    let report = Report { source, wanted, inspected, image_present, sampled, link, fixed, plans };
    line(report.to_string().trim_end())
}

async fn locate(asker: &Asker<'_>, wanted: &args::Plan) -> Result<HostId, Failure> {
    let candidates = match &wanted.from {
        Some(host) => vec![host.clone()],
        None => {
            let table: Table<Presence> = Table::open(asker.nats, subject::HOSTS).await?;
            let present = table.list().await?.into_iter().map(|(_, presence)| presence);
            let source =
                |presence: &Presence| presence.service == Service::Checkpointer && presence.host != wanted.to;
            present.filter(source).map(|presence| presence.host).collect()
        }
    };
    let asked =
        candidates.iter().map(|host| asker.ask(host, 1, Locate { container: wanted.container.clone() }));
    let answers = join_all(asked).await.into_iter().zip(&candidates);
    let has = answers.filter(|(answer, _)| answer.as_ref().is_ok_and(|found| found.container.is_some()));
    let hosts: Vec<&HostId> = has.map(|(_, host)| host).collect();
    match hosts.as_slice() {
        [host] => Ok((*host).clone()),
        [] => {
            let message = format!("no host but {} has a container {:?}", wanted.to, wanted.container);
            Err(Fault::new(code::UNKNOWN_CONTAINER, message).remedy("see `haul hosts`").into())
        }
        _ => {
            let message = format!("several hosts have a container {:?}", wanted.container);
            Err(Fault::new(code::AMBIGUOUS_CONTAINER, message).remedy("say which with --from HOST").into())
        }
    }
}

/// What the way between the hosts takes.
struct Link {
    /// Bytes in a second.
    rate: Bytes,
    /// How that was found out; it was given where this is absent.
    measured: Option<LinkMeasured>,
}

/// The source's page-shipper sends to the target's, which drops it.
async fn measure(asker: &Asker<'_>, source: &HostId, to: &HostId) -> Result<Link, Fault> {
    let token = Token::generate();
    let sink = asker.ask(to, 5, OpenSink { token: token.clone() }).await?;
    let measured = asker.ask(source, 6, MeasureLink { address: sink.address, token }).await?;
    Ok(Link { rate: measured.rate, measured: Some(measured) })
}

/// What a person is told.
struct Report {
    source: HostId,
    wanted: args::Plan,
    inspected: Inspected,
    image_present: bool,
    sampled: WritesSampled,
    link: Link,
    fixed: Fixed,
    plans: Vec<(Policy, Prediction)>,
}

impl fmt::Display for Report {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { source, wanted, inspected, image_present, sampled, link, fixed, plans } = self;
        writeln!(out, "{} can move from {source} to {}", inspected.name, wanted.to)?;
        writeln!(out, "memory    {}, {} processes", inspected.memory, inspected.processes)?;
        writeln!(out, "files     {} in the layer and volumes, sent while it runs", inspected.disk)?;
        let image = match *image_present {
            true => "there already".to_owned(),
            false => format!("{} to be brought", inspected.image_size),
        };
        writeln!(out, "image     {image}")?;
        if plans.is_empty() {
            let reason = sampled.reason.as_deref().unwrap_or("unknown");
            let tracker = &sampled.tracker;
            return match tracker.as_str() {
                "none" => writeln!(
                    out,
                    "its writes cannot be tracked ({reason}): all its memory is sent while it stands still"
                ),
                _ => writeln!(
                    out,
                    "a move would follow its writes by {tracker} ({reason}), by which no look can be taken: no prediction"
                ),
            };
        }
        let written = sampled.classes.iter().filter(|class| class.writes > 0).map(|class| class.pages);
        let written: Bytes = written.map(Pages::bytes).sum();
        writeln!(out, "writes    to {written} of its memory, seen in {} s\n", wanted.sample)?;
        writeln!(
            out,
            "{:<12} {:>7} {:>11} {:>10} {:>10}",
            "policy", "rounds", "sent", "total", "stands still"
        )?;
        for (policy, plan) in plans {
            let end = match (plan.refused, plan.why) {
                (true, _) => "would be refused: cannot_converge; see --post-copy".to_owned(),
                (_, Some(why)) => why.to_string(),
                (_, None) => "does not end".to_owned(),
            };
            let (bytes, total, downtime) =
                (plan.bytes.to_string(), plan.total.to_string(), plan.downtime.to_string());
            writeln!(
                out,
                "{:<12} {:>7} {bytes:>11} {total:>10} {downtime:>10}   {end}",
                policy.to_string(),
                plan.rounds
            )?;
        }
        let rate = link.rate;
        let how = link.measured.as_ref().map_or("given".to_owned(), |measured| {
            format!("measured, with {} in {}", measured.sent, measured.took)
        });
        writeln!(out, "\nlink      {rate}/s (rate {how})")?;
        writeln!(out, "switch    {fixed}")?;
        writeln!(
            out,
            "Assumed: that link and switch stay so, that the container goes on writing as it was seen to, and that"
        )?;
        writeln!(out, "nothing is compressed. Files and image are not in the times.")
    }
}
