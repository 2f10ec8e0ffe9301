//! The scripted model's connections: what is written to them and when.

use super::script::{Conversation, Garbage, Script, Silence, Step};
use super::wire::{After, GARBAGE, Stream, Wire};
use super::{Counts, RecordedRequest};
use crate::tasks::Tasks;
use axum::body::Body;
use bytes::Bytes;
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use hyper::rt::Executor;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode, header};
use hyper_util::rt::TokioIo;
use hyper_util::server::conn::auto::Builder;
use sha2::{Digest, Sha256};
use std::collections::{HashMap, HashSet, VecDeque};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Longest request body that is read.
const MAX_BODY: usize = 64 * 1024 * 1024;
/// Requests kept for [`super::ScriptedModel::requests`].
const KEPT: usize = 1_000;
/// Longest wait at a gate.
const GATE: Duration = Duration::from_secs(60);
const INTRODUCTION: &str = "This is the scripted model that ships with opencode-sidecar. It is no language model: it \
    plays the script in the prompt, and this prompt has none.";

#[derive(Debug, Default)]
pub(super) struct Log {
    pub(super) requests: VecDeque<RecordedRequest>,
    pub(super) credentials: VecDeque<String>,
    /// How often each step of each conversation was called, by a hash of both.
    steps: HashMap<[u8; 32], u32>,
}

#[derive(Debug)]
pub(super) struct Shared {
    script: Script,
    pub(super) counts: watch::Sender<Counts>,
    pub(super) gates: watch::Sender<HashSet<String>>,
    log: Mutex<Log>,
}

impl Shared {
    pub(super) fn new(script: Option<Script>) -> Self {
        Self {
            script: script.unwrap_or_else(|| Script::new().text(INTRODUCTION)),
            counts: watch::Sender::default(),
            gates: watch::Sender::default(),
            log: Mutex::default(),
        }
    }

    pub(super) fn log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn pass_gate(&self, name: Option<&str>) {
        if let Some(name) = name {
            let mut gates = self.gates.subscribe();
            // A gate that nobody opens lets the answer go on: a script must not hang a test run for ever. The
            // sender is in `self`, so the wait cannot fail otherwise.
            let _ = tokio::time::timeout(GATE, gates.wait_for(|open| open.contains(name))).await;
        }
    }

    fn record(&self, parts: &http::request::Parts, body: &Bytes) {
        let is_credential = |name: &str| name == "authorization" || name == "x-api-key";
        let text = |value: &header::HeaderValue| String::from_utf8_lossy(value.as_bytes()).into_owned();
        let (secret, headers): (Vec<_>, Vec<_>) = parts
            .headers
            .iter()
            .map(|(name, value)| (name.as_str().to_owned(), text(value)))
            .partition(|(name, _)| is_credential(name));
        let mut log = self.log();
        if log.requests.len() == KEPT {
            log.requests.pop_front();
        }
        while log.credentials.len() >= KEPT {
            log.credentials.pop_front();
        }
        log.requests.push_back(RecordedRequest {
            method: parts.method.to_string(),
            version: format!("{:?}", parts.version),
            path: parts.uri.path().to_owned(),
            headers,
            authorized: !secret.is_empty(),
            body: body.clone(),
        });
        log.credentials.extend(secret.into_iter().map(|(_, value)| value));
    }

    /// Counts a call of this step of this conversation: 1 for the first.
    fn count_step(&self, conversation: &Conversation) -> u32 {
        let mut hash = Sha256::new();
        hash.update(conversation.prompt.as_bytes());
        hash.update(conversation.answers.to_be_bytes());
        let mut log = self.log();
        let count = log.steps.entry(hash.finalize().into()).or_default();
        *count += 1;
        *count
    }
}

/// Counts an answer as open for as long as it lives, and as dropped unless it was finished.
struct Open {
    shared: Arc<Shared>,
    finished: bool,
}

impl Open {
    fn new(shared: &Arc<Shared>) -> Self {
        shared.counts.send_modify(|counts| {
            counts.calls += 1;
            counts.open += 1;
        });
        Self { shared: Arc::clone(shared), finished: false }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.shared.counts.send_modify(|counts| {
            counts.open -= 1;
            counts.dropped += u64::from(!self.finished);
        });
    }
}

/// Runs the streams of HTTP/2 as tracked tasks.
#[derive(Clone, Debug)]
struct OnTasks(Tasks);

impl<F: Future<Output: Send> + Send + 'static> Executor<F> for OnTasks {
    fn execute(&self, future: F) {
        self.0.spawn("scripted model's stream", async move {
            future.await;
        });
    }
}

/// Takes connections until `stop`; then the open ones are cut.
pub(super) async fn serve(tasks: Tasks, listener: TcpListener, shared: Arc<Shared>, stop: CancellationToken) {
    loop {
        let stream = tokio::select! {
            () = stop.cancelled() => return,
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                // Out of descriptors, or the peer is gone already: the next one may work.
                Err(_) => {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                    continue;
                }
            },
        };
        // Only latency would suffer.
        let _ = stream.set_nodelay(true);
        let (shared, stop, executor) = (Arc::clone(&shared), stop.clone(), OnTasks(tasks.clone()));
        tasks.spawn("scripted model's connection", async move {
            let service = service_fn(move |request| handle(Arc::clone(&shared), request));
            let server = Builder::new(executor);
            let connection = server.serve_connection(TokioIo::new(stream), service);
            tokio::select! {
                () = stop.cancelled() => {}
                // Clients that go away and faults that cut end in an error here.
                _ = connection => {}
            }
        });
    }
}

fn json(status: StatusCode, value: &serde_json::Value) -> Response<Body> {
    let mut response = Response::new(Body::from(value.to_string()));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/json"));
    response
}

/// An error closes the connection without an answer.
async fn handle(shared: Arc<Shared>, request: Request<Incoming>) -> Result<Response<Body>, io::Error> {
    let mut open = Open::new(&shared);
    let (parts, body) = request.into_parts();
    let body = Limited::new(body, MAX_BODY).collect().await.map_err(io::Error::other)?.to_bytes();
    shared.record(&parts, &body);
    let path = parts.uri.path();
    let wire = if path.ends_with("/messages") { Wire::Anthropic } else { Wire::OpenAi };
    if parts.method != Method::POST || !(path.ends_with("/messages") || path.ends_with("/chat/completions")) {
        open.finished = true;
        return Ok(json(StatusCode::NOT_FOUND, &wire.error("the scripted model has no such path")));
    }
    let conversation = match serde_json::from_slice(&body) {
        Ok(serde_json::Value::Object(body)) => Conversation::read(&body),
        _ => {
            open.finished = true;
            return Ok(json(StatusCode::BAD_REQUEST, &wire.error("the body is no JSON object")));
        }
    };
    let script = match Script::in_prompt(&conversation.prompt) {
        Ok(script) => script,
        Err(error) => {
            open.finished = true;
            return Ok(json(StatusCode::BAD_REQUEST, &wire.error(&format!("the script in the prompt: {error}"))));
        }
    };
    let script = script.as_ref().unwrap_or(&shared.script);
    let Some(step) = script.at(conversation.answers) else {
        open.finished = true;
        return Ok(json(StatusCode::BAD_REQUEST, &wire.error("the script in the prompt has no steps")));
    };
    let count = shared.count_step(&conversation);
    let step = if step.times.is_some_and(|times| count > times) { step.healthy() } else { step.clone() };
    shared.pass_gate(step.gate.as_deref()).await;
    play(open, wire, step, &conversation).await
}

async fn play(
    mut open: Open,
    wire: Wire,
    step: Step,
    conversation: &Conversation,
) -> Result<Response<Body>, io::Error> {
    if step.refuse {
        open.finished = true;
        return Err(io::Error::other("the script closes the connection"));
    }
    if step.silence == Some(Silence::Headers) {
        std::future::pending::<()>().await;
    }
    if let Some(status) = step.status {
        open.finished = true;
        let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = match &step.body {
            Some(serde_json::Value::String(text)) => {
                let mut response = Response::new(Body::from(text.clone()));
                *response.status_mut() = status;
                response
            }
            Some(body) => json(status, body),
            None => json(status, &wire.error("this error is in the script")),
        };
        for (name, value) in &step.headers {
            if let (Ok(name), Ok(value)) = (name.parse::<header::HeaderName>(), value.parse()) {
                response.headers_mut().insert(name, value);
            }
        }
        return Ok(response);
    }
    let streamed = |body, kind: &'static str| {
        let mut response = Response::new(body);
        response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(kind));
        response
    };
    match step.garbage {
        Some(Garbage::Text) => {
            open.finished = true;
            return Ok(streamed(Body::from("<html><body>It works!</body></html>\n"), "text/html"));
        }
        Some(Garbage::Sse) => {
            open.finished = true;
            return Ok(streamed(Body::from(GARBAGE), "text/event-stream"));
        }
        None => {}
    }
    if !conversation.stream && step.silence.is_none() {
        open.finished = true;
        return Ok(json(StatusCode::OK, &wire.whole(&step, conversation)));
    }
    let answer = wire.stream(&step, conversation);
    Ok(streamed(Body::from_stream(body(open, answer, step)), "text/event-stream"))
}

fn body(open: Open, answer: Stream, step: Step) -> impl futures_util::Stream<Item = Result<Bytes, io::Error>> {
    async_stream::stream! {
        // Moved whole: its drop must see what is set here.
        let mut open = open;
        let Stream { events, head, after } = answer;
        if step.silence == Some(Silence::Body) {
            std::future::pending::<()>().await;
        }
        let last = events.len();
        for (sent, event) in events.into_iter().enumerate() {
            if sent + 1 == last && after == After::End {
                // The client may close the connection as soon as it has the last event.
                open.finished = true;
            }
            yield Ok(Bytes::from(event));
            // Each event is on the wire before the next one is made: the server flushes where the body pauses.
            tokio::task::yield_now().await;
            if sent + 1 == head {
                open.shared.pass_gate(step.hold.as_deref()).await;
                if step.silence == Some(Silence::Middle) {
                    std::future::pending::<()>().await;
                }
            }
            if let Some(delay) = step.delay_ms {
                tokio::time::sleep(Duration::from_millis(delay)).await;
            }
        }
        if after == After::Silence {
            std::future::pending::<()>().await;
        }
        open.finished = true;
        if after == After::Abort {
            tokio::task::yield_now().await;
            yield Err(io::Error::other("the script cuts the connection"));
        }
    }
}
