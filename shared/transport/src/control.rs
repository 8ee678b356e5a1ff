//! Typed commands to the services of hosts: the asking side. The answering side is [`crate::serve`].

use std::time::Duration;

use async_nats::RequestErrorKind;
use haulage_protocol::fault::{Fault, code};
use haulage_protocol::id::HostId;
use haulage_protocol::rpc::{ANSWER_WITHIN, Answer, Command, MAX_MESSAGE, Rpc};
use haulage_protocol::subject::Subject;
use tokio::time::Instant;

use crate::nats::Nats;

/// The pause before a command is sent again to a service that is not there.
const ASK_AGAIN_AFTER: Duration = Duration::from_millis(250);

impl Nats {
    /// Asks `host` for `R` until it has answered something final, however long the work takes; gives up after
    /// `silence` without any answer.
    ///
    /// # Errors
    /// The service's own fault; `unreachable` after the silence, when the effect may or may not have happened;
    /// `malformed_message` when the answer cannot be understood.
    pub async fn call<R: Rpc>(
        &self,
        host: &HostId,
        command: &Command<R>,
        silence: Duration,
    ) -> Result<R::Reply, Fault> {
        let subject = Subject::command::<R>(host).to_string();
        let body = serde_json::to_vec(command)
            .map_err(|error| Fault::new(code::INTERNAL, "cannot encode a command").because(&error))?;
        if body.len() > MAX_MESSAGE {
            let message =
                format!("a {} command of {} bytes, the limit is {MAX_MESSAGE}", R::VERB, body.len());
            return Err(Fault::new(code::INTERNAL, message));
        }
        let body = bytes::Bytes::from(body);
        let mut last_sign = Instant::now();
        loop {
            let request = async_nats::Request::new().payload(body.clone()).timeout(Some(ANSWER_WITHIN));
            match self.client.send_request(subject.clone(), request).await {
                Ok(message) => match decode_answer::<R>(&message.payload)? {
                    Answer::Done { value } => return Ok(value),
                    Answer::Failed { fault } => return Err(fault),
                    Answer::Pending => last_sign = Instant::now(),
                },
                Err(error) if last_sign.elapsed() >= silence => return Err(unreachable::<R>(host, &error)),
                Err(error) => {
                    tracing::debug!(%host, verb = R::VERB, %error, "no answer, asking again");
                    if error.kind() != RequestErrorKind::TimedOut {
                        tokio::time::sleep(ASK_AGAIN_AFTER).await;
                    }
                }
            }
        }
    }
}

fn decode_answer<R: Rpc>(payload: &[u8]) -> Result<Answer<R::Reply>, Fault> {
    serde_json::from_slice(payload).map_err(|error| {
        let message = format!("the {} gave an answer to {} that cannot be decoded", R::SERVICE, R::VERB);
        Fault::new(code::MALFORMED, message).because(&error)
    })
}

fn unreachable<R: Rpc>(host: &HostId, error: &async_nats::RequestError) -> Fault {
    let message = format!("the {} of host {host} does not answer {}", R::SERVICE, R::VERB);
    Fault::new(code::UNREACHABLE, message)
        .because(error)
        .remedy(format!("see whether haul-{} runs on {host} and reaches NATS", R::SERVICE))
}
