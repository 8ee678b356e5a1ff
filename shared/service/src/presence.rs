//! Tells the fleet that this service is there, for as long as it is.

use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use haulage_protocol::host::Presence;
use haulage_protocol::id::HostId;
use haulage_protocol::rpc::Service;
use haulage_protocol::subject;
use haulage_protocol::unit::Micros;
use haulage_protocol::version::Version;
use haulage_transport::nats::PRESENCE_EVERY;
use haulage_transport::{Nats, NatsError, Table};

/// The time now, in microseconds since the Unix epoch.
#[must_use]
pub fn now() -> Micros {
    Micros::from_duration(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default())
}

/// Announces a service until it is withdrawn.
pub(crate) struct Announcer {
    table: Table<Presence>,
    presence: Presence,
}

impl Announcer {
    pub(crate) async fn new(
        nats: &Nats,
        host: HostId,
        service: Service,
        facts: BTreeMap<String, String>,
    ) -> Result<Self, NatsError> {
        let table = Table::open(nats, subject::HOSTS).await?;
        let presence = Presence {
            version: Version::CURRENT,
            release: env!("CARGO_PKG_VERSION").to_owned(),
            host,
            service,
            pid: std::process::id(),
            at: now(),
            facts,
        };
        Ok(Self { table, presence })
    }

    /// Announces now and every few seconds, for ever.
    pub(crate) async fn announce(&mut self) {
        let mut every = tokio::time::interval(PRESENCE_EVERY);
        loop {
            every.tick().await;
            self.presence.at = now();
            let key = subject::presence_key(&self.presence.host, self.presence.service);
            if let Err(error) = self.table.put(&key, &self.presence).await {
                tracing::warn!(%error, "this service could not be announced, trying again");
            }
        }
    }

    /// Withdraws the announcement. One that fails expires by itself.
    pub(crate) async fn withdraw(self) {
        let key = subject::presence_key(&self.presence.host, self.presence.service);
        if let Err(error) = self.table.forget(&key).await {
            tracing::debug!(%error, "the announcement was not withdrawn");
        }
    }
}
