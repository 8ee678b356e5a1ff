//! Which hosts there are: those whose services have announced themselves lately.

use std::collections::{BTreeMap, BTreeSet};

use haulage_protocol::fault::{Fault, code};
use haulage_protocol::host::Presence;
use haulage_protocol::id::HostId;
use haulage_protocol::rpc::Service;
use haulage_protocol::subject;
use haulage_transport::{Nats, NatsError, Table};

pub(crate) struct Registry {
    table: Table<Presence>,
}

impl Registry {
    pub(crate) async fn open(nats: &Nats) -> Result<Self, NatsError> {
        Ok(Self { table: Table::open(nats, subject::HOSTS).await? })
    }

    /// The hosts and the services that each announces.
    pub(crate) async fn hosts(&self) -> Result<BTreeMap<HostId, BTreeSet<Service>>, Fault> {
        let entries = self.table.list().await.map_err(|error| {
            Fault::new(code::UNREACHABLE, "the host registry cannot be read").because(&error)
        })?;
        let mut hosts: BTreeMap<HostId, BTreeSet<Service>> = BTreeMap::new();
        for (_, presence) in entries {
            hosts.entry(presence.host).or_default().insert(presence.service);
        }
        Ok(hosts)
    }

    /// Refuses a host that is not registered with all its services.
    pub(crate) async fn require(&self, host: &HostId) -> Result<(), Fault> {
        let hosts = self.hosts().await?;
        let Some(present) = hosts.get(host) else {
            let known: Vec<&str> = hosts.keys().map(HostId::as_str).collect();
            let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
            return Err(Fault::new(code::UNKNOWN_HOST, format!("host {host} is not registered"))
                .remedy(format!("registered hosts: {known}; see `haul hosts`")));
        };
        let missing: Vec<&str> = Service::ALL
            .into_iter()
            .filter(|service| !present.contains(service))
            .map(Service::as_str)
            .collect();
        if missing.is_empty() {
            return Ok(());
        }
        let message = format!("host {host} lacks services: {}", missing.join(", "));
        Err(Fault::new(code::UNKNOWN_HOST, message).remedy("start them; see `haul hosts`"))
    }
}
