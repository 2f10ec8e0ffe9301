//! `GET /tasks/{execution_id}/stream`: the log as it grows, over SSE or WebSocket.
//!
//! Both are a `Cursor` over the log and differ in their frames only. The route refuses by itself, since a browser's WebSocket
//! can send its credential as its first frame. Reading ends when the credential does.

use crate::api::auth::{Admission, Caller, STREAM_PROTOCOL, Scope};
use crate::api::cursor::{Cursor, Next};
use crate::api::extract::Seq;
use crate::api::problem::Problem;
use crate::api::server::ConnectionSlot;
use crate::api::sockets::{Broken, Closing, EXPIRED, PING, Pace, STUCK, Sockets, close};
use crate::api::tasks::{TasksApi, find, parse_id};
use crate::executions::View;
use axum::Extension;
use axum::body::{Body, Bytes};
use axum::extract::ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade};
use axum::extract::{FromRequestParts, Path, Request, State};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use futures_util::SinkExt;
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use serde_json::{Value, json};
use std::num::NonZeroU32;
use std::pin::pin;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// The longest message that a client may send, in bytes.
const MAX_MESSAGE: usize = 64 * 1024;

/// What streams need beside the service.
#[derive(Clone, Debug)]
pub struct StreamApi {
    pub tasks: TasksApi,
    pub sockets: Sockets,
}

/// The streaming routes.
pub fn routes(api: StreamApi) -> utoipa_axum::router::OpenApiRouter {
    utoipa_axum::router::OpenApiRouter::new().routes(utoipa_axum::routes!(stream)).with_state(api)
}

#[derive(Debug, Default, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct StreamQuery {
    /// Only events after this one; everything from the start without it. For SSE `Last-Event-ID` says the same.
    #[serde(default)]
    #[param(value_type = Option<u64>)]
    after: Option<Seq>,
}

/// One event of a stream.
#[derive(utoipa::ToSchema)]
#[expect(dead_code, reason = "for the document alone: streams are written as text")]
pub(crate) struct ServerSentEvent {
    /// What a reader sends as `Last-Event-ID` to go on after it.
    id: Option<String>,
    event: Option<String>,
    /// JSON.
    data: Option<String>,
    /// Milliseconds to wait before the next attempt.
    retry: Option<u64>,
}

/// The log as it grows: WebSocket with `Upgrade`, else server-sent events
///
/// Each connection is a cursor over the log: every event once, in order, from `after` on. The WebSocket speaks
/// `opencode.stream.v1` and closes with 1000 after `complete`, 1012 at a restart, 4400 after a bad frame, 4401 without
/// a good credential or when it expires, 4403 with one that is not for this, 4404 where there is no such execution, 4408
/// for a reader that took nothing for 60 s. An `after` beyond the log's end is answered by a `reset` frame, and the log
/// from its start. `{"type":"cancel"}` needs the scope `tasks:control`; `{"type":"auth","token"}` replaces a token before
/// it expires.
#[utoipa::path(
    get, path = "/tasks/{execution_id}/stream", tag = "tasks", security(("bearer" = ["tasks:read"])),
    params(
        ("execution_id" = crate::model::ExecutionId, Path),
        StreamQuery,
        ("Last-Event-ID" = Option<u64>, Header, description = "The `seq` of the last event that was received; `after` goes before it"),
    ),
    responses(
        (status = 101, description = "A WebSocket: one event a text frame"),
        (status = 200, description = "Server-sent events: `id` is the seq, `event` the type", content_type = "text/event-stream", body = ServerSentEvent),
    ),
)]
async fn stream(
    State(api): State<StreamApi>,
    Extension(admission): Extension<Admission>,
    Path(id): Path<String>,
    request: Request,
) -> Result<Response, Problem> {
    let (mut parts, _) = request.into_parts();
    let upgrade = WebSocketUpgrade::from_request_parts(&mut parts, &()).await.ok();
    let caller = match upgrade {
        Some(_) => None,
        None => Some(admission.granted().await?),
    };
    let crate::api::ApiQuery(query) = crate::api::ApiQuery::<StreamQuery>::from_request_parts(&mut parts, &()).await?;
    let id = parse_id(&id)?;
    let (Some(upgrade), None) = (upgrade, &caller) else {
        let last_event_id = parts.headers.get("last-event-id").map(|value| {
            let seq = value.to_str().ok().and_then(|value| Seq::parse(value.trim()));
            seq.ok_or_else(|| Problem::invalid_field("Last-Event-ID", "must be the id of an event: a whole number"))
        });
        let after = query.after.or(last_event_id.transpose()?).map_or(0, |after| after.0);
        let view = find(&api.tasks, id).await?;
        let mut cursor = Cursor::new(api.tasks.executions.clone(), id, after);
        let reset = cursor.reset_if_beyond(view.last_seq);
        let mut first = Vec::from_iter(epoch_frame(&view));
        first.extend(reset.then(|| reset_frame(&view)));
        return Ok(server_sent_events(cursor, first, caller, api.sockets.shutdown.clone()));
    };
    let slot = parts.extensions.get::<ConnectionSlot>().cloned();
    let upgrade = upgrade.protocols([STREAM_PROTOCOL]).max_message_size(MAX_MESSAGE).max_frame_size(MAX_MESSAGE);
    Ok(upgrade.on_upgrade(move |socket| async move {
        let _slot = slot;
        let mut socket = Socket { socket };
        let (code, reason) = match socket.serve(&api, &admission, id, query.after.map_or(0, |after| after.0)).await {
            Ok((code, reason)) => (code, reason),
            // The connection is gone: nobody to tell.
            Err(Broken) => return,
        };
        let frame = CloseFrame { code, reason: reason.into() };
        let _ = tokio::time::timeout(STUCK, socket.socket.send(Message::Close(Some(frame)))).await;
    }))
}

/// What a reader is told first where the log may have lost events, to a loss of power or a disk: it may have others under their numbers.
fn epoch_frame(view: &View) -> Option<Value> {
    let epoch = view.record.epoch;
    (epoch > NonZeroU32::MIN).then(|| json!({ "type": "epoch", "epoch": epoch }))
}

/// The reader's place is beyond the log's end.
fn reset_frame(view: &View) -> Value {
    json!({ "type": "reset", "last_seq": view.last_seq, "epoch": view.record.epoch })
}

fn server_sent_events(
    mut cursor: Cursor,
    first: Vec<Value>,
    caller: Option<Caller>,
    shutdown: CancellationToken,
) -> Response {
    let body = async_stream::stream! {
        for data in first {
            let kind = data["type"].as_str().unwrap_or_default();
            yield Ok::<_, std::convert::Infallible>(Bytes::from(format!("event: {kind}\ndata: {data}\n\n")));
        }
        let mut expired = pin!(expired(caller.as_ref()));
        loop {
            let next = tokio::select! {
                () = &mut expired => {
                    yield Ok(Bytes::from_static(b": the credential has expired\n\n"));
                    return;
                }
                next = cursor.next() => next,
                () = shutdown.cancelled() => {
                    yield Ok(Bytes::from_static(b": the sidecar restarts\nretry: 1000\n\n"));
                    return;
                }
                () = tokio::time::sleep(PING) => {
                    yield Ok(Bytes::from_static(b": ping\n\n"));
                    continue;
                }
            };
            match next {
                Ok(Next::Events(events)) => {
                    let mut text = String::new();
                    for event in events {
                        use std::fmt::Write;
                        // Writing to a string cannot fail. The envelope has no line break in it.
                        let _ = write!(text, "id: {}\nevent: {}\ndata: {}\n\n", event.seq, event.kind.as_str(), event.json);
                    }
                    yield Ok(Bytes::from(text));
                }
                Ok(Next::End | Next::Gone) => return,
                Err(error) => {
                    // The client comes again with its last id, and finds everything after it.
                    tracing::warn!(error = &error as &dyn std::error::Error, "a stream could not be read on");
                    return;
                }
            }
        }
    };
    let headers = [(header::CONTENT_TYPE, "text/event-stream"), (header::CACHE_CONTROL, "no-store")];
    (headers, [("x-accel-buffering", "no")], Body::from_stream(body)).into_response()
}

struct Socket {
    socket: WebSocket,
}

#[derive(Deserialize)]
struct ClientFrame {
    r#type: String,
    #[serde(default)]
    reason: Option<String>,
    #[serde(default)]
    token: Option<SecretString>,
}

/// Takes another credential in place of one that ends.
async fn renewed(admission: &Admission, caller: &mut Caller, token: Option<SecretString>) -> Value {
    let ack = json!({ "type": "ack", "of": "auth" });
    if !caller.expires() {
        return ack;
    }
    match admission.granted_to(token.unwrap_or_default().expose_secret()).await {
        Ok(other) => {
            *caller = other;
            ack
        }
        Err(problem) => refused("auth", &problem),
    }
}

fn refused(of: &str, problem: &Problem) -> Value {
    json!({ "type": "error", "of": of, "code": problem.code().as_str(), "message": problem.detail() })
}

async fn command(api: &StreamApi, id: crate::model::ExecutionId, caller: &Caller, frame: ClientFrame) -> Value {
    let of = frame.r#type.as_str();
    let controls = ["cancel", "pause", "resume", "message", "permission_reply", "question_reply"];
    if !controls.contains(&of) {
        return json!({ "type": "error", "code": "unknown_type", "message": "There is no such frame." });
    }
    if let Err(problem) = caller.may(Scope::TasksControl) {
        return refused(of, &problem);
    }
    if of != "cancel" {
        return json!({ "type": "error", "of": of, "code": "not_supported", "message": "This version does not support it." });
    }
    match api.tasks.executions.cancel(id, frame.reason.as_deref(), Duration::ZERO).await {
        Ok(_) => json!({ "type": "ack", "of": "cancel" }),
        Err(_) => {
            json!({ "type": "error", "of": "cancel", "code": "unavailable", "message": "The database cannot be asked." })
        }
    }
}

/// The next frame, when it may be read.
async fn paced(pace: &Pace, socket: &mut WebSocket) -> Option<Result<Message, axum::Error>> {
    pace.turn().await;
    socket.recv().await
}

/// Completes when the credential of a reader ends; never for one that needs none.
pub(crate) async fn expired(caller: Option<&Caller>) {
    match caller {
        Some(caller) => caller.expired().await,
        None => std::future::pending().await,
    }
}

impl Socket {
    async fn serve(
        &mut self,
        api: &StreamApi,
        admission: &Admission,
        id: crate::model::ExecutionId,
        after: u64,
    ) -> Result<Closing, Broken> {
        let mut caller = match api.sockets.admit(&mut self.socket, admission).await? {
            Ok(caller) => caller,
            Err(closing) => return Ok(closing),
        };
        let view = match api.tasks.executions.view(id).await {
            Ok(Some(view)) => view,
            Ok(None) => return Ok((close::NOT_FOUND, "there is no execution with this id")),
            Err(_) => return Ok((close::INTERNAL, "the database cannot be asked")),
        };
        let mut cursor = Cursor::new(api.tasks.executions.clone(), id, after);
        if let Some(frame) = epoch_frame(&view) {
            self.send(frame.to_string()).await?;
        }
        if cursor.reset_if_beyond(view.last_seq) {
            self.send(reset_frame(&view).to_string()).await?;
        }
        let mut pace = Pace::of_commands();
        let mut ping = tokio::time::interval_at(tokio::time::Instant::now() + PING, PING);
        loop {
            tokio::select! {
                () = caller.expired() => return Ok(EXPIRED),
                next = cursor.next() => match next {
                    Ok(Next::Events(events)) => {
                        let sent = tokio::time::timeout(STUCK, async {
                            for event in events {
                                self.socket.feed(Message::text(event.json.as_ref())).await.map_err(|_| Broken)?;
                            }
                            self.socket.flush().await.map_err(|_| Broken)
                        });
                        match sent.await {
                            Ok(sent) => sent?,
                            Err(_) => return Ok((close::STUCK, "nothing was taken for 60 s")),
                        }
                    }
                    Ok(Next::End) => return Ok((close::DONE, "complete")),
                    Ok(Next::Gone) => return Ok((close::NOT_FOUND, "the execution is gone")),
                    Err(error) => {
                        tracing::warn!(error = &error as &dyn std::error::Error, "a stream could not be read on");
                        return Ok((close::INTERNAL, "the log cannot be read now"));
                    }
                },
                message = paced(&pace, &mut self.socket) => match message {
                    Some(Ok(Message::Text(text))) => {
                        pace.read();
                        let Ok(frame) = serde_json::from_str::<ClientFrame>(&text) else {
                            return Ok((close::BAD_FRAME, "a frame must be a JSON object with a type"));
                        };
                        let answer = match frame.r#type.as_str() {
                            "auth" => renewed(admission, &mut caller, frame.token).await,
                            _ => command(api, id, &caller, frame).await,
                        };
                        self.send(answer.to_string()).await?;
                    }
                    Some(Ok(Message::Binary(_))) => return Ok((close::BAD_FRAME, "frames must be text")),
                    Some(Ok(Message::Ping(_) | Message::Pong(_))) => pace.read(),
                    Some(Ok(Message::Close(_)) | Err(_)) | None => return Err(Broken),
                },
                _ = ping.tick() => {
                    let ping = self.socket.send(Message::Ping(Bytes::new()));
                    match tokio::time::timeout(STUCK, ping).await {
                        Ok(sent) => sent.map_err(|_| Broken)?,
                        Err(_) => return Ok((close::STUCK, "nothing was taken for 60 s")),
                    }
                }
                () = api.sockets.shutdown.cancelled() => return Ok((close::RESTART, "the sidecar restarts")),
            }
        }
    }

    async fn send(&mut self, text: String) -> Result<(), Broken> {
        match tokio::time::timeout(STUCK, self.socket.send(Message::text(text))).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) | Err(_) => Err(Broken),
        }
    }
}
