//! The work queue of jobs, the events of migrations, and cancellation.

use async_nats::jetstream::{AckKind, consumer};
use futures_util::{Stream, StreamExt};
use haulage_protocol::event::Event;
use haulage_protocol::fault::{Fault, code};
use haulage_protocol::id::MigrationId;
use haulage_protocol::job::{Cancel, CancelAnswer, Job};
use haulage_protocol::rpc::{ANSWER_WITHIN, decode};
use haulage_protocol::subject::{self, Subject};
use haulage_protocol::version::Version;

use crate::nats::{Nats, NatsError, failed, job_consumer};

/// A job that was delivered to this process, until it is done, given back, or this process is silent for
/// [`crate::nats::TAKE_OVER_AFTER`].
pub struct Delivery(async_nats::jetstream::Message);

impl Delivery {
    /// The job.
    ///
    /// # Errors
    /// `malformed_message` or `foreign_version`.
    pub fn job(&self) -> Result<Job, Fault> {
        decode(&self.0.payload)
    }

    /// Says that this process is at work on it.
    ///
    /// # Errors
    /// [`NatsError::Use`].
    pub async fn heartbeat(&self) -> Result<(), NatsError> {
        self.0.ack_with(AckKind::Progress).await.map_err(failed("heartbeat"))
    }

    /// Takes it off the queue.
    ///
    /// # Errors
    /// [`NatsError::Use`]; it will be delivered again.
    pub async fn done(&self) -> Result<(), NatsError> {
        self.0.double_ack().await.map_err(failed("acknowledge a job"))
    }

    /// Gives it back at once, for another coordinator.
    ///
    /// # Errors
    /// [`NatsError::Use`]; it will be delivered again later.
    pub async fn give_back(&self) -> Result<(), NatsError> {
        self.0.ack_with(AckKind::Nak(None)).await.map_err(failed("give a job back"))
    }

    /// Takes it off the queue for good although it was not done, because nobody can understand it.
    ///
    /// # Errors
    /// [`NatsError::Use`]; it will be delivered again.
    pub async fn refuse(&self) -> Result<(), NatsError> {
        self.0.ack_with(AckKind::Term).await.map_err(failed("refuse a job"))
    }
}

impl Nats {
    /// Puts a job on the queue. The same id within the queue's window is put once.
    ///
    /// # Errors
    /// [`NatsError::Use`]; whether the job is on the queue is then unknown, and submitting it again is safe.
    pub async fn submit(&self, job: &Job) -> Result<(), NatsError> {
        let payload = serde_json::to_vec(job).map_err(failed("encode a job"))?;
        let mut headers = async_nats::HeaderMap::new();
        headers.insert("Nats-Msg-Id", job.id.as_str());
        let published = self
            .jetstream
            .publish_with_headers(Subject::Submit.to_string(), headers, payload.into())
            .await
            .map_err(failed("submit a job"))?;
        published.await.map_err(failed("submit a job"))?;
        Ok(())
    }

    /// The jobs that are delivered to this process.
    ///
    /// # Errors
    /// [`NatsError::Use`].
    pub async fn jobs(
        &self,
    ) -> Result<impl Stream<Item = Result<Delivery, NatsError>> + Send + Unpin + use<>, NatsError> {
        let consumer = self
            .jetstream
            .create_consumer_on_stream(job_consumer(), subject::JOBS)
            .await
            .map_err(failed("consume the work queue"))?;
        let messages = consumer.messages().await.map_err(failed("consume the work queue"))?;
        Ok(Box::pin(messages.map(|message| message.map(Delivery).map_err(failed("consume the work queue")))))
    }

    /// Publishes an event, once per (migration, sequence, index).
    ///
    /// # Errors
    /// [`NatsError::Use`].
    pub async fn publish_event(&self, event: &Event, index: usize) -> Result<(), NatsError> {
        let payload = serde_json::to_vec(event).map_err(failed("encode an event"))?;
        let mut headers = async_nats::HeaderMap::new();
        headers.insert("Nats-Msg-Id", format!("{}.{}.{index}", event.migration, event.sequence).as_str());
        let subject = Subject::Event(event.migration.clone()).to_string();
        let published = self
            .jetstream
            .publish_with_headers(subject, headers, payload.into())
            .await
            .map_err(failed("publish an event"))?;
        published.await.map_err(failed("publish an event"))?;
        Ok(())
    }

    /// The events of one migration from its beginning, or those of all from now on.
    ///
    /// # Errors
    /// [`NatsError::Use`].
    pub async fn events(
        &self,
        migration: Option<&MigrationId>,
    ) -> Result<impl Stream<Item = Result<Event, Fault>> + Send + Unpin + use<>, NatsError> {
        let (filter_subject, deliver_policy) = match migration {
            Some(id) => (Subject::Event(id.clone()).to_string(), consumer::DeliverPolicy::All),
            None => (subject::EVENTS_FILTER.to_owned(), consumer::DeliverPolicy::New),
        };
        let config = consumer::pull::OrderedConfig { filter_subject, deliver_policy, ..Default::default() };
        let consumer = self
            .jetstream
            .create_consumer_on_stream(config, subject::EVENTS)
            .await
            .map_err(failed("follow events"))?;
        let messages = consumer.messages().await.map_err(failed("follow events"))?;
        Ok(Box::pin(messages.map(|message| match message {
            Ok(message) => decode(&message.payload),
            Err(error) => Err(Fault::new(code::UNREACHABLE, "events cannot be followed").because(&error)),
        })))
    }

    /// Asks the coordinator that owns the migration to give it up; see [`Cancel`].
    ///
    /// # Errors
    /// The coordinator's refusal, or `unreachable` when no coordinator owns it.
    pub async fn cancel(&self, id: &MigrationId, target_is_dead: bool) -> Result<(), Fault> {
        let cancel = Cancel { version: Version::CURRENT, id: id.clone(), target_is_dead };
        let payload = serde_json::to_vec(&cancel)
            .map_err(|error| Fault::new(code::INTERNAL, "cannot encode a request").because(&error))?;
        let request = async_nats::Request::new().payload(payload.into()).timeout(Some(ANSWER_WITHIN));
        let reply = self.client.send_request(Subject::Cancel(id.clone()).to_string(), request).await;
        let reply = reply.map_err(|error| {
            Fault::new(code::UNREACHABLE, format!("no coordinator owns migration {id}"))
                .because(&error)
                .remedy("see with `haul show` whether it is over, and whether a coordinator runs")
        })?;
        match serde_json::from_slice(&reply.payload) {
            Ok(CancelAnswer::Accepted) => Ok(()),
            Ok(CancelAnswer::Refused { fault }) => Err(fault),
            Err(error) => Err(Fault::new(code::MALFORMED, "the answer cannot be decoded").because(&error)),
        }
    }

    /// The requests to cancel one migration; the receiver answers each.
    ///
    /// # Errors
    /// [`NatsError::Use`].
    pub async fn cancellations(
        &self,
        id: &MigrationId,
    ) -> Result<impl Stream<Item = CancelRequest> + Send + Unpin + use<>, NatsError> {
        let subject = Subject::Cancel(id.clone()).to_string();
        let client = self.client.clone();
        let requests = self.client.subscribe(subject).await.map_err(failed("subscribe to cancellations"))?;
        Ok(Box::pin(requests.filter_map(move |message| {
            let request = message.reply.clone().map(|reply| CancelRequest {
                cancel: decode(&message.payload),
                reply,
                client: client.clone(),
            });
            async move { request }
        })))
    }
}

/// A request to cancel.
pub struct CancelRequest {
    /// What is asked, if it could be understood.
    pub cancel: Result<Cancel, Fault>,
    reply: async_nats::Subject,
    client: async_nats::Client,
}

impl CancelRequest {
    /// Answers it.
    pub async fn answer(self, answer: CancelAnswer) {
        let payload = serde_json::to_vec(&answer).unwrap_or_default();
        if let Err(error) = self.client.publish(self.reply, payload.into()).await {
            tracing::warn!(%error, "an answer could not be sent");
        }
    }
}
