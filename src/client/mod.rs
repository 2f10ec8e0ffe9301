//! A client of the sidecar's own HTTP API: what the command line speaks, and the demonstration.
//!
//! It knows the contract and nothing of the server's inside. `follow` reads a log's stream and takes it up again where
//! the connection drops; `error` says what can go wrong. What a person gets to see is not decided here.

mod error;
mod follow;

pub use error::{ClientError, Refusal};
pub use follow::{Envelope, Followed, follow};

use crate::model::{ExecutionId, Status};
use bytes::Bytes;
use reqwest::{Method, RequestBuilder, Response};
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::value::RawValue;
use serde_json::{Value, json};
use std::time::Duration;
use url::Url;

/// How long a connection may take to be there.
const CONNECT: Duration = Duration::from_secs(10);
/// How long an ordinary answer may take. A cancellation takes longest: it waits for the end of every process.
const ANSWER: Duration = Duration::from_secs(60);

/// A sidecar to talk to. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Client {
    http: reqwest::Client,
    base: Url,
    secret: Option<SecretString>,
}

/// A task that was taken.
#[derive(Clone, Debug, Deserialize)]
pub struct Accepted {
    pub execution_id: ExecutionId,
}

/// How an execution stands.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Standing {
    pub status: Status,
    /// Set with a final status: a word of the contract's list.
    pub reason: Option<String>,
    /// The last event of its log.
    pub last_seq: u64,
}

/// A page of the history, newest first. Each row is as the sidecar wrote it.
#[derive(Debug, Deserialize)]
pub struct HistoryPage {
    pub executions: Vec<Box<RawValue>>,
    /// For the next page; `None` on the last one.
    pub next_cursor: Option<String>,
}

/// A page of a log.
#[derive(Debug, Deserialize)]
pub struct EventsPage {
    pub events: Vec<Value>,
    /// What to ask for next, as `after`.
    pub next_after: u64,
    /// The last event of the log.
    pub last_seq: u64,
}

/// Output of shell commands on its way.
#[derive(Debug)]
pub struct Download(Response);

impl Download {
    /// The next bytes; `None` at the end.
    ///
    /// # Errors
    /// [`ClientError::Unreachable`] where it breaks off before its end.
    pub async fn next(&mut self) -> Result<Option<Bytes>, ClientError> {
        self.0.chunk().await.map_err(ClientError::unreachable)
    }
}

impl Client {
    /// A client of the sidecar at `url`, such as `http://127.0.0.1:3003`; a path stands before that of each call.
    /// Without a secret none is sent.
    ///
    /// Plain HTTP goes to the sidecar directly; HTTPS heeds the proxy that the environment names (`HTTPS_PROXY`,
    /// `NO_PROXY`), which cannot see the secret then, and trusts the system's roots.
    ///
    /// # Errors
    /// [`ClientError::Setup`], where the URL or the secret cannot be used, which it does not repeat;
    /// [`ClientError::Http`].
    pub fn new(url: &str, secret: Option<SecretString>) -> Result<Self, ClientError> {
        let setup = |what: &str| ClientError::Setup(what.to_owned());
        let mut base = Url::parse(url).map_err(|_| setup("the URL must be absolute, such as http://127.0.0.1:3003"))?;
        if !matches!(base.scheme(), "http" | "https") {
            return Err(setup("the URL must be an http or https URL"));
        }
        if !base.username().is_empty() || base.password().is_some() || base.query().is_some() {
            return Err(setup("the URL may not carry credentials or a query"));
        }
        base.set_fragment(None);
        if let Some(secret) = &secret
            && (secret.expose_secret().is_empty() || !secret.expose_secret().bytes().all(|b| b.is_ascii_graphic()))
        {
            return Err(setup("the secret must be visible ASCII characters"));
        }
        let mut http = reqwest::Client::builder()
            .user_agent(concat!("opencode-sidecar/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT)
            // The API redirects nowhere, and a task must not be submitted twice.
            .redirect(reqwest::redirect::Policy::none())
            .retry(reqwest::retry::never());
        if base.scheme() == "http" {
            // No roots are read either, which is most of the time that a start takes.
            http = http.no_proxy().tls_certs_only([]);
        }
        let http = http.build().map_err(ClientError::Http)?;
        Ok(Self { http, base, secret })
    }

    /// Submits a task: the body of `POST /tasks/execute`. `api_key` is put into its `model_config`. With the same
    /// `idempotency_key` (1 to 255 visible ASCII characters) it may be submitted again within 24 h: it is taken once.
    ///
    /// # Errors
    /// [`ClientError`]. After one that is [`ClientError::Unreachable`] and not
    /// [`ClientError::was_not_sent`], the task may have been taken.
    pub async fn submit(
        &self,
        mut body: Value,
        api_key: Option<&SecretString>,
        idempotency_key: &str,
    ) -> Result<Accepted, ClientError> {
        if let Some(key) = api_key {
            body["model_config"]["api_key"] = json!(key.expose_secret());
        }
        let request = self.request(Method::POST, &["tasks", "execute"], &[]).header("idempotency-key", idempotency_key);
        self.json(request.json(&body)).await
    }

    /// How an execution stands.
    ///
    /// # Errors
    /// [`ClientError`], as for all calls.
    pub async fn status(&self, id: ExecutionId) -> Result<Standing, ClientError> {
        self.json(self.request(Method::GET, &["tasks", &id.to_string(), "status"], &[])).await
    }

    /// Cancels an execution, and returns once it has ended, or after some seconds without that. Cancelling again, or
    /// after the end, changes nothing.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn cancel(&self, id: ExecutionId, reason: Option<&str>) -> Result<Standing, ClientError> {
        let request = self.request(Method::POST, &["tasks", &id.to_string(), "cancel"], &[]);
        self.json(request.json(&json!({ "reason": reason }))).await
    }

    /// A page of the history. `query` is that of `GET /tasks`.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn history(&self, query: &[(&str, String)]) -> Result<HistoryPage, ClientError> {
        self.json(self.request(Method::GET, &["tasks"], query)).await
    }

    /// A page of a log. `query` is that of `GET /tasks/{execution_id}/events`.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn events(&self, id: ExecutionId, query: &[(&str, String)]) -> Result<EventsPage, ClientError> {
        self.json(self.request(Method::GET, &["tasks", &id.to_string(), "events"], query)).await
    }

    /// All shell output so far; `strip` has its escape sequences left out.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn output(&self, id: ExecutionId, strip: bool) -> Result<Download, ClientError> {
        let ansi = if strip { "strip" } else { "keep" };
        let request = self.request(Method::GET, &["tasks", &id.to_string(), "output"], &[("ansi", ansi.to_owned())]);
        self.send(request).await.map(Download)
    }

    fn request(&self, method: Method, path: &[&str], query: &[(&str, String)]) -> RequestBuilder {
        let mut url = self.base.clone();
        // An http URL always has a path that can be extended.
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.pop_if_empty().extend(path);
        }
        if !query.is_empty() {
            url.query_pairs_mut().extend_pairs(query);
        }
        let request = self.http.request(method, url);
        match &self.secret {
            Some(secret) => request.bearer_auth(secret.expose_secret()),
            None => request,
        }
    }

    async fn send(&self, request: RequestBuilder) -> Result<Response, ClientError> {
        let response = request.send().await.map_err(ClientError::unreachable)?;
        match response.status().is_success() {
            true => Ok(response),
            false => Err(ClientError::Refused(Box::new(Refusal::of(response).await))),
        }
    }

    async fn json<T: DeserializeOwned>(&self, request: RequestBuilder) -> Result<T, ClientError> {
        let response = self.send(request.timeout(ANSWER)).await?;
        let body = response.bytes().await.map_err(ClientError::unreachable)?;
        serde_json::from_slice(&body).map_err(|error| ClientError::Unexpected(error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(url: &str) -> Result<Client, ClientError> {
        let _ = rustls::crypto::ring::default_provider().install_default();
        Client::new(url, Some("s3cret".into()))
    }

    #[test]
    fn a_call_goes_below_the_base() {
        for (base, want) in [
            ("http://h:1", "http://h:1/tasks?limit=2&to=a%2Bb"),
            ("http://h:1/pod/7/", "http://h:1/pod/7/tasks?limit=2&to=a%2Bb"),
        ] {
            let query = [("limit", "2".to_owned()), ("to", "a+b".to_owned())];
            let request = client(base).unwrap().request(Method::GET, &["tasks"], &query).build().unwrap();
            assert_eq!(request.url().as_str(), want);
            assert!(request.headers()["authorization"].is_sensitive());
        }
    }

    #[test]
    fn a_bad_url_or_secret_is_told_and_not_repeated() {
        for url in ["", "127.0.0.1:3003", "ftp://h", "http://me:hidden@h", "http://h?token=hidden"] {
            let error = client(url).unwrap_err().to_string();
            assert!(error.starts_with("the URL") && !error.contains("hidden"), "{url}: {error}");
        }
        let error = Client::new("http://h", Some("hid\nden".into())).unwrap_err().to_string();
        assert_eq!(error, "the secret must be visible ASCII characters");
        assert!(!format!("{:?}", client("http://h").unwrap()).contains("s3cret"));
    }
}
