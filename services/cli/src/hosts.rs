//! `haul hosts`.

use std::collections::BTreeMap;

use haulage_protocol::host::Presence;
use haulage_protocol::id::HostId;
use haulage_protocol::rpc::Service;
use haulage_protocol::subject;
use haulage_transport::{Nats, Table};

use crate::args;
use crate::output::{Failure, json, line};

pub(crate) async fn run(nats: &Nats, wanted: args::Json) -> Result<(), Failure> {
    let table: Table<Presence> = Table::open(nats, subject::HOSTS).await?;
    let mut hosts: BTreeMap<HostId, Vec<Presence>> = BTreeMap::new();
    for (_, presence) in table.list().await? {
        hosts.entry(presence.host.clone()).or_default().push(presence);
    }
    if wanted.json {
        return json(&hosts);
    }
    if hosts.is_empty() {
        return line("no host is registered: start the services of one, see deploy/README.md");
    }
    for (host, services) in hosts {
        let present = |service| services.iter().any(|presence| presence.service == service);
        let missing: Vec<&str> =
            Service::ALL.into_iter().filter(|service| !present(*service)).map(Service::as_str).collect();
        let state =
            if missing.is_empty() { "ready".to_owned() } else { format!("lacks {}", missing.join(", ")) };
        line(&format!("{:<20} {state}", host.as_str()))?;
        let facts: BTreeMap<&String, &String> =
            services.iter().flat_map(|presence| &presence.facts).collect();
        for (fact, value) in facts {
            line(&format!("    {fact:<12} {value}"))?;
        }
    }
    Ok(())
}
