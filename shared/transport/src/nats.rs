//! The connection to NATS, and what must exist there: streams and buckets.

use std::time::Duration;

use async_nats::jetstream::{self, consumer, kv, stream};
use haulage_protocol::subject;

/// How long the work queue waits for a sign of life from the coordinator that took a job before another gets it.
pub const TAKE_OVER_AFTER: Duration = Duration::from_secs(5);
/// How often a coordinator gives that sign.
pub const HEARTBEAT: Duration = Duration::from_millis(1500);
/// How long a service's presence lasts without being renewed.
pub const PRESENCE_LASTS: Duration = Duration::from_secs(15);
/// How often a service renews it.
pub const PRESENCE_EVERY: Duration = Duration::from_secs(4);
/// How long what a switch has cost counts, since the last one.
const COSTS_COUNT: Duration = Duration::from_secs(30 * 24 * 3600);
/// For how long events are kept.
const EVENTS_KEPT: Duration = Duration::from_secs(7 * 24 * 3600);

/// A connection, cheap to clone.
#[derive(Clone)]
pub struct Nats {
    pub(crate) client: async_nats::Client,
    pub(crate) jetstream: jetstream::Context,
}

impl std::fmt::Debug for Nats {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Nats").finish_non_exhaustive()
    }
}

/// NATS cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum NatsError {
    /// The first connection failed.
    #[error("cannot connect to NATS at {url}")]
    Connect {
        /// Where.
        url: String,
        /// Why.
        source: async_nats::ConnectError,
    },
    /// A stream, bucket or consumer could not be made.
    #[error("cannot make {what} in JetStream: is it enabled on the server?")]
    Setup {
        /// Which.
        what: &'static str,
        /// Why.
        source: async_nats::Error,
    },
    /// Publishing, reading or subscribing failed.
    #[error("{what} failed")]
    Use {
        /// What was tried.
        what: &'static str,
        /// Why.
        source: async_nats::Error,
    },
}

pub(crate) fn failed<E: Into<async_nats::Error>>(what: &'static str) -> impl FnOnce(E) -> NatsError {
    move |error| NatsError::Use { what, source: error.into() }
}

impl Nats {
    /// Connects to `url` (`nats://host:port`) as `name`. Later losses of the connection are repaired in the
    /// background.
    ///
    /// # Errors
    /// [`NatsError::Connect`] when nothing answers there.
    pub async fn connect(url: &str, name: &str) -> Result<Self, NatsError> {
        let options = async_nats::ConnectOptions::new().name(name).ping_interval(Duration::from_secs(10));
        let client = options
            .connect(url)
            .await
            .map_err(|source| NatsError::Connect { url: url.to_owned(), source })?;
        let jetstream = jetstream::new(client.clone());
        Ok(Self { client, jetstream })
    }

    /// Makes streams, buckets and the shared consumer where they do not exist; leaves those that do.
    ///
    /// # Errors
    /// [`NatsError::Setup`].
    pub async fn ensure(&self) -> Result<(), NatsError> {
        let setup = |what| move |source: async_nats::Error| NatsError::Setup { what, source };
        let jobs = stream::Config {
            name: subject::JOBS.to_owned(),
            subjects: vec![subject::JOBS_FILTER.to_owned()],
            retention: stream::RetentionPolicy::WorkQueue,
            ..Default::default()
        };
        let jobs =
            self.jetstream.get_or_create_stream(jobs).await.map_err(|e| setup("the work queue")(e.into()))?;
        jobs.get_or_create_consumer(subject::COORDINATORS, job_consumer())
            .await
            .map_err(|e| setup("the consumer of the work queue")(e.into()))?;
        let events = stream::Config {
            name: subject::EVENTS.to_owned(),
            subjects: vec![subject::EVENTS_FILTER.to_owned()],
            max_age: EVENTS_KEPT,
            ..Default::default()
        };
        self.jetstream
            .get_or_create_stream(events)
            .await
            .map_err(|e| setup("the stream of events")(e.into()))?;
        for (bucket, max_age) in [
            (subject::MIGRATIONS, Duration::ZERO),
            (subject::LEASES, Duration::ZERO),
            (subject::LEFTOVERS, Duration::ZERO),
            (subject::COSTS, COSTS_COUNT),
            (subject::HOSTS, PRESENCE_LASTS),
        ] {
            if self.jetstream.get_key_value(bucket).await.is_ok() {
                continue;
            }
            let config = kv::Config { bucket: bucket.to_owned(), history: 1, max_age, ..Default::default() };
            self.jetstream.create_key_value(config).await.map_err(|e| setup("a bucket")(e.into()))?;
        }
        Ok(())
    }

    /// Whether the connection stands now; one that is lost is repaired in the background.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.client.connection_state() == async_nats::connection::State::Connected
    }

    /// Waits until everything that was published has left this process.
    ///
    /// # Errors
    /// [`NatsError::Use`] when the connection is gone.
    pub async fn flush(&self) -> Result<(), NatsError> {
        self.client.flush().await.map_err(failed("flush"))
    }
}

pub(crate) fn job_consumer() -> consumer::pull::Config {
    consumer::pull::Config {
        durable_name: Some(subject::COORDINATORS.to_owned()),
        ack_policy: consumer::AckPolicy::Explicit,
        ack_wait: TAKE_OVER_AFTER,
        // A job is delivered again whenever its coordinator dies, for as long as it takes.
        max_deliver: -1,
        max_ack_pending: 10_000,
        ..Default::default()
    }
}
