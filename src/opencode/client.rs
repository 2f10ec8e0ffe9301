//! A typed client of one OpenCode server (1.18.33) on loopback. It knows calls and shapes; when to make them is
//! the session's business.

use super::wire::{Message, RawEvent};
use crate::sse::{Parser, SseError};
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::time::Duration;

/// The longest that an ordinary call may take. OpenCode answers within milliseconds, but on first use of a
/// directory it loads providers and plugins for some seconds.
const CALL_TIMEOUT: Duration = Duration::from_secs(30);

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("OpenCode cannot be reached ({call})")]
    Transport {
        call: &'static str,
        #[source]
        source: reqwest::Error,
    },
    #[error("OpenCode does not answer in time ({call})")]
    Timeout { call: &'static str },
    #[error("OpenCode answered {status} to {call}: {body}")]
    Status { call: &'static str, status: u16, body: String },
    #[error("OpenCode's answer to {call} has another shape than expected")]
    Shape {
        call: &'static str,
        #[source]
        source: serde_json::Error,
    },
    #[error("OpenCode's event stream is broken")]
    Stream(#[from] SseError),
    #[error("OpenCode's event stream holds something that is no event")]
    Garbage(#[source] serde_json::Error),
}

/// Talks to one server, about one directory.
#[derive(Clone, Debug)]
pub struct Client {
    http: reqwest::Client,
    base: String,
    password: SecretString,
    directory: String,
}

/// What a prompt consists of.
#[derive(Clone, Debug, Default)]
pub struct Prompt<'a> {
    pub text: &'a str,
    pub agent: Option<&'a str>,
    /// Appended to OpenCode's own system prompt.
    pub system: Option<&'a str>,
}

impl Client {
    /// For the server on `port`; `directory` is the canonical path that the conversation works in, spelled the same
    /// way everywhere (`/event` filters by the exact string).
    ///
    /// # Errors
    /// Where the HTTP client cannot be built.
    pub fn new(port: u16, password: SecretString, directory: &str) -> Result<Self, reqwest::Error> {
        let http = reqwest::Client::builder().no_proxy().connect_timeout(Duration::from_secs(5)).build()?;
        Ok(Self { http, base: format!("http://127.0.0.1:{port}"), password, directory: directory.to_owned() })
    }

    fn request(&self, method: reqwest::Method, path: &str) -> reqwest::RequestBuilder {
        self.http
            .request(method, format!("{}{path}", self.base))
            .basic_auth("opencode", Some(self.password.expose_secret()))
            .header("x-opencode-directory", &self.directory)
    }

    async fn call(&self, call: &'static str, request: reqwest::RequestBuilder) -> Result<Value, ClientError> {
        let transport = |source| ClientError::Transport { call, source };
        let response = request.timeout(CALL_TIMEOUT).send().await.map_err(transport)?;
        let status = response.status();
        let body = response.bytes().await.map_err(transport)?;
        if !status.is_success() {
            let body = String::from_utf8_lossy(&body).chars().take(300).collect();
            return Err(ClientError::Status { call, status: status.as_u16(), body });
        }
        if body.is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_slice(&body).map_err(|source| ClientError::Shape { call, source })
    }

    /// The version of the server that answers.
    ///
    /// # Errors
    /// [`ClientError`], as for every call here.
    pub async fn version(&self) -> Result<String, ClientError> {
        #[derive(Deserialize)]
        struct Health {
            version: String,
        }
        let value = self.call("health", self.request(reqwest::Method::GET, "/global/health")).await?;
        Health::deserialize(value)
            .map(|health| health.version)
            .map_err(|source| ClientError::Shape { call: "health", source })
    }

    /// Starts a conversation; gives its id. It has a title, or OpenCode would spend a model call on one.
    pub async fn create_session(&self, title: &str) -> Result<String, ClientError> {
        let request = self.request(reqwest::Method::POST, "/session").json(&json!({ "title": title }));
        #[derive(Deserialize)]
        struct Created {
            id: String,
        }
        let value = self.call("create session", request).await?;
        Created::deserialize(value)
            .map(|created| created.id)
            .map_err(|source| ClientError::Shape { call: "create session", source })
    }

    /// Ends a conversation and forgets it.
    pub async fn delete_session(&self, session: &str) -> Result<(), ClientError> {
        self.call("delete session", self.request(reqwest::Method::DELETE, &format!("/session/{session}")))
            .await
            .map(drop)
    }

    /// Hands in a prompt; what comes of it is told by the event stream.
    pub async fn prompt(&self, session: &str, prompt: &Prompt<'_>) -> Result<(), ClientError> {
        let mut body = json!({ "parts": [{ "type": "text", "text": prompt.text }] });
        for (name, value) in [("agent", prompt.agent), ("system", prompt.system)] {
            if let Some(value) = value {
                body[name] = json!(value);
            }
        }
        let request = self.request(reqwest::Method::POST, &format!("/session/{session}/prompt_async")).json(&body);
        self.call("prompt", request).await.map(drop)
    }

    /// The conversation so far.
    pub async fn messages(&self, session: &str) -> Result<Vec<Message>, ClientError> {
        self.messages_at(&format!("/session/{session}/message")).await
    }

    /// The last message of the conversation, `None` where it has none. This takes no longer for a long one.
    pub async fn last_message(&self, session: &str) -> Result<Option<Message>, ClientError> {
        // 1.18.33 counts the limit from the end, as its answers show.
        Ok(self.messages_at(&format!("/session/{session}/message?limit=1")).await?.pop())
    }

    async fn messages_at(&self, path: &str) -> Result<Vec<Message>, ClientError> {
        let value = self.call("messages", self.request(reqwest::Method::GET, path)).await?;
        Vec::deserialize(value).map_err(|source| ClientError::Shape { call: "messages", source })
    }

    /// Stops the present run of a conversation.
    pub async fn abort(&self, session: &str) -> Result<(), ClientError> {
        self.call("abort", self.request(reqwest::Method::POST, &format!("/session/{session}/abort"))).await.map(drop)
    }

    /// Refuses a permission.
    pub async fn refuse_permission(&self, request_id: &str) -> Result<(), ClientError> {
        let request = self
            .request(reqwest::Method::POST, &format!("/permission/{request_id}/reply"))
            .json(&json!({ "reply": "reject", "message": "Nobody can answer; go on without it." }));
        self.call("refuse permission", request).await.map(drop)
    }

    /// Refuses to answer a question.
    pub async fn reject_question(&self, request_id: &str) -> Result<(), ClientError> {
        let request = self.request(reqwest::Method::POST, &format!("/question/{request_id}/reject"));
        self.call("reject question", request).await.map(drop)
    }

    /// Ends running shells and gives everything back; the server lives on.
    pub async fn dispose(&self) -> Result<(), ClientError> {
        self.call("dispose", self.request(reqwest::Method::POST, "/global/dispose")).await.map(drop)
    }

    /// Opens the event stream and waits for its first event, `server.connected`: from then on nothing is missed.
    pub async fn events(&self) -> Result<EventStream, ClientError> {
        let transport = |source| ClientError::Transport { call: "events", source };
        let request = self.request(reqwest::Method::GET, "/event");
        let response = tokio::time::timeout(CALL_TIMEOUT, request.send())
            .await
            .map_err(|_| ClientError::Timeout { call: "events" })?
            .map_err(transport)?;
        if !response.status().is_success() {
            let status = response.status().as_u16();
            return Err(ClientError::Status { call: "events", status, body: String::new() });
        }
        let mut stream = EventStream { response, parser: Parser::default(), waiting: VecDeque::new() };
        let first = tokio::time::timeout(CALL_TIMEOUT, stream.next())
            .await
            .map_err(|_| ClientError::Timeout { call: "first event" })??;
        match first {
            Some(event) if event.kind == "server.connected" => Ok(stream),
            _ => Err(ClientError::Status {
                call: "events",
                status: 200,
                body: "the first event is not server.connected".to_owned(),
            }),
        }
    }
}

/// OpenCode's events as they come. Without replay: what happened before it was opened is not in it.
#[derive(Debug)]
pub struct EventStream {
    response: reqwest::Response,
    parser: Parser,
    waiting: VecDeque<String>,
}

impl EventStream {
    /// The next event; `None` where the server ended the stream. May be dropped while it waits: nothing is lost.
    ///
    /// # Errors
    /// A cut connection, or bytes that are no event stream.
    pub async fn next(&mut self) -> Result<Option<RawEvent>, ClientError> {
        loop {
            if let Some(text) = self.waiting.pop_front() {
                return serde_json::from_str(&text).map(Some).map_err(ClientError::Garbage);
            }
            let chunk =
                self.response.chunk().await.map_err(|source| ClientError::Transport { call: "events", source })?;
            let Some(chunk) = chunk else { return Ok(None) };
            let mut events = Vec::new();
            self.parser.push(&chunk, &mut events)?;
            self.waiting.extend(events);
            if self.waiting.is_empty() {
                // Bytes without an event may come for ever; whoever waits for something else too has its turn.
                tokio::task::yield_now().await;
            }
        }
    }
}
