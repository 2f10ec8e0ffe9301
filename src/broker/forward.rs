//! One call on its way to the provider and its answer on the way back.

use super::error::{ModelError, Said, body};
use super::observe::{Api, Form, Observer};
use super::server::refuse;
use super::session::{Call, Exhausted, Failed, Session};
use super::{BrokerConfig, Inner, Upstream, dialect, outward, priming};
use crate::telemetry::{BrokerRefusal, ModelCallOutcome};
use axum::body::Body;
use bytes::{Bytes, BytesMut};
use chrono::Utc;
use futures_util::stream::BoxStream;
use futures_util::{Stream, StreamExt};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper::header::{self, HeaderMap, HeaderValue};
use hyper::{Request, Response, StatusCode};
use serde::Deserialize;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::timeout;

/// How much of an error body is read.
const MAX_ERROR: usize = 64 * 1024;
/// How much of an event is held back until the rest of it is there. A longer one is passed on as it comes.
const MAX_HELD: usize = 64 * 1024;

/// What the broker reads of a call.
#[derive(Deserialize)]
struct Peek {
    #[serde(default)]
    model: String,
    #[serde(default)]
    stream: bool,
}

/// Forwards a call, or answers it itself where it may not go on.
pub(super) async fn forward(
    inner: &Inner,
    session: &Arc<Session>,
    api: Api,
    request: Request<Incoming>,
) -> Response<Body> {
    let Ok(slot) = Arc::clone(&session.slots).acquire_owned().await else {
        return refuse(StatusCode::SERVICE_UNAVAILABLE, "closed", "unavailable", "unavailable");
    };
    let (parts, body) = request.into_parts();
    let body = match Limited::new(body, inner.config.max_body).collect().await {
        Ok(body) => body.to_bytes(),
        Err(error) if error.is::<LengthLimitError>() => {
            inner.metrics.broker_refused(BrokerRefusal::Body);
            let message = "the call is longer than the broker takes";
            return refuse(StatusCode::PAYLOAD_TOO_LARGE, message, "invalid_request_error", "request_too_large");
        }
        Err(_) => return refuse(StatusCode::BAD_REQUEST, "the body broke off", "invalid_request_error", "bad_request"),
    };
    let Ok(peek) = serde_json::from_slice::<Peek>(&body) else {
        inner.metrics.broker_refused(BrokerRefusal::Body);
        let message = "the body is no call of a model";
        return refuse(StatusCode::BAD_REQUEST, message, "invalid_request_error", "bad_request");
    };
    if session.is_priming() {
        return priming::answer(api, &peek.model, peek.stream);
    }
    let mut call = match session.admit(slot) {
        Ok(call) => call,
        Err(exhausted) => {
            inner.metrics.model_call(ModelCallOutcome::OverLimit);
            return refused(exhausted);
        }
    };
    let upstream = &session.upstream;
    if !upstream.model.is_empty() && peek.model != upstream.model {
        inner.metrics.broker_refused(BrokerRefusal::Model);
        let error = ModelError::rejected("another model was called than the one that the execution was given");
        return failed(&mut call, error, &Said::default());
    }
    let outward = match outward::call(inner, upstream, api, &parts.headers) {
        Ok(outward) => outward,
        Err(error) => {
            inner.metrics.broker_refused(BrokerRefusal::Endpoint);
            return failed(&mut call, error, &Said::default());
        }
    };
    let body = dialect::spoken(upstream.provider, &upstream.endpoint, body);
    let answer = match timeout(inner.config.header_timeout, outward.body(body).send()).await {
        Ok(Ok(answer)) => answer,
        Ok(Err(error)) => {
            let error = outward::unanswered(&error, &upstream.endpoint);
            if error.code == ModelError::ENDPOINT {
                inner.metrics.broker_refused(BrokerRefusal::Endpoint);
            }
            return failed(&mut call, error, &Said::default());
        }
        Err(_) => {
            return failed(&mut call, ModelError::no_headers(inner.config.header_timeout), &Said::default());
        }
    };
    session.touch();
    if answer.status().is_success() {
        pass_on(call, api, answer, peek.stream, inner.config.idle_timeout).await
    } else {
        not_ok(call, upstream, answer, &inner.config).await
    }
}

/// OpenCode does not repeat a call that got this status.
fn refused(exhausted: Exhausted) -> Response<Body> {
    refuse(StatusCode::BAD_REQUEST, exhausted.message(), exhausted.code(), exhausted.code())
}

/// Books the call as failed and tells OpenCode.
fn failed(call: &mut Call, error: ModelError, said: &Said) -> Response<Body> {
    call.fail(error.clone());
    let failed = call.failure().unwrap_or_else(|| Failed::of(error));
    told(&Failed { said: said.clone(), ..failed })
}

/// What OpenCode is told of a failed call, with the provider's own words for the kind of error where it had some:
/// OpenCode knows a few of them. After one failure too many it is told so at once: it would wait, up to 40 s and more,
/// only to be refused.
fn told(Failed { error, said, exhausted }: &Failed) -> Response<Body> {
    if let Some(exhausted) = exhausted {
        return refused(*exhausted);
    }
    let (message, kind, code) = error.told(said);
    let mut response = refuse(error.status(), &message, &kind, &code);
    if let Some(seconds) = error.retry_after {
        response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
    }
    response
}

/// The same as the last event of an answer that has begun.
fn failed_event(failed: &Failed) -> Bytes {
    let (message, kind, code) = match failed.exhausted {
        Some(exhausted) => (exhausted.message().to_owned(), exhausted.code().to_owned(), exhausted.code().to_owned()),
        None => failed.error.told_in_stream(&failed.said),
    };
    Bytes::from(format!("event: error\ndata: {}\n\n", body(&message, &kind, &code)))
}

async fn not_ok(
    mut call: Call,
    upstream: &Upstream,
    answer: reqwest::Response,
    config: &BrokerConfig,
) -> Response<Body> {
    let (idle, longest_wait) = (config.idle_timeout, config.longest_wait);
    let (status, headers) = (answer.status(), answer.headers().clone());
    let mut body = Vec::new();
    let mut stream = answer.bytes_stream();
    // The status says enough: a body that never ends, or breaks off, is read as far as it came.
    while let Ok(Some(Ok(bytes))) = timeout(idle, stream.next()).await {
        let room = MAX_ERROR - body.len();
        body.extend_from_slice(&bytes[..bytes.len().min(room)]);
        if body.len() == MAX_ERROR {
            break;
        }
    }
    let said = Said::read(&body, &upstream.api_key);
    let error = ModelError::from_status(status, &headers, &said, Utc::now()).within(longest_wait);
    failed(&mut call, error, &said)
}

fn media_type(headers: &HeaderMap) -> &str {
    let value = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    value.split(';').next().unwrap_or_default().trim()
}

/// Hands an answer on, from its first event: one that fails before it gets a status that says so.
async fn pass_on(
    mut call: Call,
    api: Api,
    answer: reqwest::Response,
    streamed: bool,
    idle: Duration,
) -> Response<Body> {
    let headers = answer.headers();
    if headers.get(header::CONTENT_ENCODING).is_some_and(|value| value != "identity") {
        return failed(
            &mut call,
            ModelError::bad_response("it is compressed, which was not asked for"),
            &Said::default(),
        );
    }
    let form = if streamed { Form::Stream } else { Form::Whole };
    let is_events = media_type(headers).eq_ignore_ascii_case("text/event-stream");
    let (status, kind) = (answer.status(), headers.get(header::CONTENT_TYPE).cloned());
    call.observe_with(Observer::new(api, form));
    let stream = answer.bytes_stream().fuse().boxed();
    let mut relay = Relay { call, stream, idle, form, doubted: streamed && !is_events, held: Held::default() };
    let first = match relay.next().await {
        Next::Bytes(bytes) => bytes,
        Next::End => Bytes::new(),
        Next::Failed(how) => return told(&how),
    };
    let mut response = Response::new(Body::from_stream(relay.rest(first)));
    *response.status_mut() = status;
    if let Some(kind) = kind {
        response.headers_mut().insert(header::CONTENT_TYPE, kind);
    }
    response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

fn begins_an_event(bytes: &[u8]) -> bool {
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes).trim_ascii_start();
    [&b"data:"[..], b"event:", b"id:", b"retry:", b":"].iter().any(|field| bytes.starts_with(field))
}

/// The provider's bytes on their way to OpenCode, by whole events: what came of one is held back until the rest is
/// there. When OpenCode closes its connection this is dropped, and the provider's connection with it.
struct Relay {
    call: Call,
    stream: BoxStream<'static, reqwest::Result<Bytes>>,
    idle: Duration,
    form: Form,
    /// It does not call itself a stream of events, and nothing of it has come yet.
    doubted: bool,
    held: Held,
}

enum Next {
    Bytes(Bytes),
    End,
    Failed(Failed),
}

impl Relay {
    async fn next(&mut self) -> Next {
        let call = &mut self.call;
        let error = loop {
            match timeout(self.idle, self.stream.next()).await {
                // OpenCode would read a web page as an answer without a finish reason, and call again at once.
                Ok(Some(Ok(bytes))) if std::mem::take(&mut self.doubted) && !begins_an_event(&bytes) => {
                    break ModelError::bad_response("a stream of events was asked for, and it is none");
                }
                Ok(Some(Ok(bytes))) => {
                    let whole = call.pass(&bytes);
                    let bytes = self.held.pass(&bytes, whole, call.has_failed());
                    if !bytes.is_empty() {
                        return Next::Bytes(bytes);
                    }
                    if let Some(failed) = call.failure().filter(|_| call.has_failed()) {
                        return Next::Failed(failed);
                    }
                }
                // The answer was complete: nothing is missing.
                Ok(Some(Err(_))) | Err(_) if call.is_settled() => return Next::End,
                Ok(None) => {
                    call.end();
                    // One that asks for a tool goes on by itself; called again, OpenCode would run the tool twice.
                    let goes_on = call.asks_for_tools() && !call.has_failed();
                    return match call.failure().filter(|_| !goes_on) {
                        Some(failed) => Next::Failed(failed),
                        None if self.held.bytes.is_empty() => Next::End,
                        None => Next::Bytes(self.held.bytes.split().freeze()),
                    };
                }
                Ok(Some(Err(_))) => break ModelError::cut(),
                Err(_) => break ModelError::stalled(self.idle),
            }
        };
        call.fail(error.clone());
        Next::Failed(call.failure().unwrap_or_else(|| Failed::of(error)))
    }

    /// What goes to OpenCode. A stream that fails ends with an event that says how, so that OpenCode has all that came
    /// before, and words that it repeats the call for or does not. Where that cannot be said, an error makes the server
    /// abort OpenCode's connection.
    fn rest(mut self, first: Bytes) -> impl Stream<Item = io::Result<Bytes>> {
        async_stream::stream! {
            if !first.is_empty() {
                yield Ok(first);
            }
            loop {
                // What failed before the last bytes were handed on is told after them.
                let next = match self.call.failure().filter(|_| self.call.has_failed()) {
                    Some(failed) => Next::Failed(failed),
                    None => self.next().await,
                };
                match next {
                    Next::Bytes(bytes) => yield Ok(bytes),
                    Next::End => return,
                    Next::Failed(failed) if self.form == Form::Stream && !self.held.overflowed => {
                        yield Ok(failed_event(&failed));
                        return;
                    }
                    Next::Failed(_) => {
                        yield Err(io::Error::other("the model's answer broke off"));
                        return;
                    }
                }
            }
        }
    }
}

/// What has come of an event that is not whole yet.
#[derive(Default)]
struct Held {
    bytes: BytesMut,
    /// The event is longer than what is held back, and some of it was passed on.
    overflowed: bool,
}

impl Held {
    /// What can be passed on, with these bytes added, of which the first `whole` go to the end of an event. None of an
    /// event that says that the answer `failed`.
    fn pass(&mut self, bytes: &[u8], whole: usize, failed: bool) -> Bytes {
        self.bytes.extend_from_slice(bytes);
        let open = if whole == 0 { self.bytes.len() } else { bytes.len() - whole };
        self.overflowed = open > MAX_HELD || self.overflowed && whole == 0;
        let kept = if self.overflowed && !failed { 0 } else { open };
        self.bytes.split_to(self.bytes.len() - kept).freeze()
    }
}
