//! JSON calls whose bodies must pass unchanged.
//!
//! bollard reads and writes through models of one API version and drops what they do not know. For the two
//! bodies a container is copied by, inspect and create, nothing may be dropped: they go over a plain HTTP
//! connection to the same socket. Errors are bollard's, so that all calls fail alike.

use std::path::{Path, PathBuf};
use std::time::Duration;

use bollard::errors::Error;
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::Request;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::UnixStream;
use tokio::time::timeout;

/// A way to the engine's socket; each call opens a connection of its own, as bollard does.
#[derive(Debug, Clone)]
pub(crate) struct RawClient {
    socket: PathBuf,
    patience: Duration,
}

impl RawClient {
    pub(crate) fn new(socket: &Path, patience: Duration) -> Self {
        Self { socket: socket.to_owned(), patience }
    }

    pub(crate) async fn get(&self, target: &str) -> Result<Value, Error> {
        self.call("GET", target, Bytes::new()).await
    }

    pub(crate) async fn post(&self, target: &str, body: &Value) -> Result<Value, Error> {
        self.call("POST", target, serde_json::to_vec(body)?.into()).await
    }

    async fn call(&self, method: &str, target: &str, body: Bytes) -> Result<Value, Error> {
        timeout(self.patience, self.exchange(method, target, body))
            .await
            .map_err(|_| Error::RequestTimeoutError)?
    }

    async fn exchange(&self, method: &str, target: &str, body: Bytes) -> Result<Value, Error> {
        let stream = UnixStream::connect(&self.socket).await?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        let request = Request::builder()
            .method(method)
            .uri(target)
            .header("Host", "docker")
            .header("Content-Type", "application/json")
            .body(Full::new(body))?;
        // The connection must be driven beside the request; it ends when the answer is read and the sender gone.
        let driver = tokio::spawn(connection);
        let outcome = async {
            let response = sender.send_request(request).await?;
            let status = response.status();
            let bytes = response.into_body().collect().await?.to_bytes();
            Ok((status, bytes))
        }
        .await;
        driver.abort();
        let (status, bytes) = outcome.map_err(|err: hyper::Error| Error::HyperResponseError { err })?;
        if !status.is_success() {
            return Err(Error::DockerResponseServerError {
                status_code: status.as_u16(),
                message: server_message(&bytes),
            });
        }
        if bytes.is_empty() { Ok(Value::Null) } else { Ok(serde_json::from_slice(&bytes)?) }
    }
}

/// Docker says `{"message": …}`; anything else is shown as it is.
fn server_message(body: &[u8]) -> String {
    serde_json::from_slice::<Value>(body)
        .ok()
        .and_then(|value| value.get("message").and_then(Value::as_str).map(str::to_owned))
        .unwrap_or_else(|| String::from_utf8_lossy(body).into_owned())
}

/// Escapes a path segment or query value of a request target (RFC 3986, all but the unreserved characters).
pub(crate) fn escape(text: &str) -> String {
    use std::fmt::Write as _;
    text.bytes().fold(String::with_capacity(text.len()), |mut out, byte| {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            // Writing to a String cannot fail.
            let _ = write!(out, "%{byte:02X}");
        }
        out
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_targets_are_escaped() {
        assert_eq!(escape("web-1_a.b~"), "web-1_a.b~");
        assert_eq!(escape("a/b?c=d e"), "a%2Fb%3Fc%3Dd%20e");
    }

    #[test]
    fn the_servers_own_words_are_kept() {
        assert_eq!(server_message(br#"{"message":"No such container"}"#), "No such container");
        assert_eq!(server_message(b"page not found\n"), "page not found\n");
    }
}
