//! `GET /sessions/{session_id}/stream`: the log of a session as it grows, over SSE.
//!
//! The logs of its executions one after another, each read by the same cursor as everywhere. The connection ends with
//! `done` when an execution has ended and none waits behind it; whoever resumes after that `done` gets the next one.

use crate::api::auth::{Admission, Caller};
use crate::api::cursor::{Cursor, Next};
use crate::api::problem::Problem;
use crate::api::session_frames::{Frames, closing, done, heartbeat};
use crate::api::sessions::{SessionsApi, find, parse_id};
use crate::api::stream::expired;
use crate::executions::Executions;
use crate::model::event::{Event, EventType};
use crate::model::{ExecutionId, SessionEventId, SessionId};
use crate::store::StoreError;
use axum::Extension;
use axum::body::{Body, Bytes};
use axum::extract::{Path, Request, State};
use axum::http::header;
use axum::http::request::Parts;
use axum::response::{IntoResponse, Response};
use chrono::Utc;
use serde_json::json;
use std::convert::Infallible;
use std::num::NonZeroU32;
use std::pin::pin;
use std::time::Duration;

/// How often a quiet connection is told that it lives.
const HEARTBEAT: Duration = Duration::from_secs(15);

/// The log of a session as it grows
///
/// Server-sent events; each frame's data has a `timestamp`. `output` `{"type":"stdout"|"stderr","text","line"}` (shell
/// output as it comes, and each message of the agent when it is whole), `tool_call` `{"tool","args"}`, `tool_result`
/// `{"tool","result"}`, `status` `{"status","progress"}`, `error` `{"error","message","fatal"}`, `complete`
/// `{"final_message","files_modified"}` without an id, then `done` `{"reason"}`, and the stream closes; a run that
/// failed or was cancelled gives `error` with `fatal: true`, then `done`. `heartbeat` every 15 s. Ids are
/// `<execution>.<seq>`: with `Last-Event-ID` the stream goes on after that frame; without it, it begins with the
/// session's first execution. With the id of a `done` it waits for the next prompt's execution.
#[utoipa::path(
    get, path = "/sessions/{session_id}/stream", tag = "sessions", security(("bearer" = ["tasks:read"])),
    params(
        ("session_id" = SessionId, Path),
        ("Last-Event-ID" = Option<String>, Header, pattern = r"^[1-9][0-9]{0,9}\.[0-9]{1,19}$", description = "The id of the last frame that was received"),
    ),
    responses((status = 200, content_type = "text/event-stream", body = crate::api::stream::ServerSentEvent)),
)]
pub(crate) async fn stream(
    State(api): State<SessionsApi>,
    Extension(admission): Extension<Admission>,
    Path(id): Path<String>,
    request: Request,
) -> Result<Response, Problem> {
    let caller = if api.open_streams { None } else { Some(admission.granted().await?) };
    follow(api, &id, request.into_parts().0, caller).await
}

/// The same under the session proxy's name, never without a credential.
pub(crate) async fn proxied(
    State(api): State<SessionsApi>,
    Extension(admission): Extension<Admission>,
    Path(id): Path<String>,
    request: Request,
) -> Result<Response, Problem> {
    let caller = Some(admission.granted().await?);
    follow(api, &id, request.into_parts().0, caller).await
}

/// `caller`: who reads, where that has to be somebody.
async fn follow(api: SessionsApi, id: &str, parts: Parts, caller: Option<Caller>) -> Result<Response, Problem> {
    let id = parse_id(id)?;
    let asked = match parts.headers.get("last-event-id") {
        None => None,
        Some(value) => {
            let text = value.to_str().unwrap_or_default().trim();
            let parsed = text.parse::<SessionEventId>();
            Some(parsed.map_err(|why| Problem::invalid_field("Last-Event-ID", why.to_string()))?)
        }
    };
    let state = find(&api, id).await?;
    let had = state.executions;
    // A place that this session has not come to yet is none of this log: everything from its start, then.
    let place = asked.filter(|place| place.ordinal.get() <= had + 1).unwrap_or(START);
    let headers = [(header::CONTENT_TYPE, "text/event-stream"), (header::CACHE_CONTROL, "no-store")];
    let body = Body::from_stream(frames(api, id, place, caller));
    Ok((headers, [("x-accel-buffering", "no")], body).into_response())
}

const START: SessionEventId = SessionEventId { ordinal: NonZeroU32::MIN, seq: 0 };

fn frames(
    api: SessionsApi,
    id: SessionId,
    mut place: SessionEventId,
    caller: Option<Caller>,
) -> impl futures_util::Stream<Item = Result<Bytes, Infallible>> {
    async_stream::stream! {
        let mut reader = Reader { executions: api.executions.clone(), id, place, current: None };
        let mut expired = pin!(expired(caller.as_ref()));
        loop {
            let step = tokio::select! {
                () = &mut expired => {
                    yield Ok(Bytes::from_static(b": the credential has expired\n\n"));
                    return;
                }
                step = reader.next() => step,
                () = api.shutdown.cancelled() => {
                    yield Ok(Bytes::from_static(b": the sidecar restarts\nretry: 1000\n\n"));
                    return;
                }
                () = tokio::time::sleep(HEARTBEAT) => {
                    yield Ok(Bytes::from(heartbeat(Utc::now())));
                    continue;
                }
            };
            place = reader.place;
            match step {
                Ok(Step::Frames(text)) => yield Ok(Bytes::from(text)),
                Ok(Step::Last(text)) => {
                    yield Ok(Bytes::from(text));
                    return;
                }
                Err(error) => {
                    // The client comes again with its last id, and finds everything after it.
                    tracing::warn!(error = &error as &dyn std::error::Error, %place, "a stream could not be read on");
                    return;
                }
            }
        }
    }
}

enum Step {
    Frames(String),
    /// The connection ends with these.
    Last(String),
}

/// A place in a session's log.
struct Reader {
    executions: Executions,
    id: SessionId,
    /// The execution that is read, and the last event of it that was looked at.
    place: SessionEventId,
    current: Option<Current>,
}

/// The execution that is read.
struct Current {
    cursor: Cursor,
    frames: Frames,
    /// Its last event, where it was met here and not before.
    end: Option<Event>,
}

impl Reader {
    /// What comes next. May be dropped while it waits.
    async fn next(&mut self) -> Result<Step, StoreError> {
        loop {
            let Some(current) = &mut self.current else {
                match self.arrival().await? {
                    Some(execution) => self.begin(execution).await?,
                    None => return Ok(Step::Last(self.last_words().await?)),
                }
                continue;
            };
            match current.cursor.next().await? {
                Next::Events(events) => {
                    let mut text = String::new();
                    for event in events {
                        self.place.seq = event.seq;
                        text.push_str(&current.frames.of(self.place, &event));
                        if event.kind == EventType::Complete {
                            current.end = Some(event);
                        }
                    }
                    if !text.is_empty() {
                        return Ok(Step::Frames(text));
                    }
                }
                Next::End | Next::Gone => {
                    let following = self.place.ordinal.saturating_add(1);
                    if let Some(end) = &current.end
                        && self.executions.execution_in_session(self.id, following).await?.is_none()
                    {
                        return Ok(Step::Last(closing(self.place, end)));
                    }
                    self.current = None;
                    self.place = SessionEventId { ordinal: following, seq: 0 };
                }
            }
        }
    }

    async fn begin(&mut self, execution: ExecutionId) -> Result<(), StoreError> {
        let mut cursor = Cursor::new(self.executions.clone(), execution, self.place.seq);
        if let Some(view) = self.executions.view(execution).await?
            && cursor.reset_if_beyond(view.last_seq)
        {
            self.place.seq = 0;
        }
        self.current = Some(Current { cursor, frames: Frames::default(), end: None });
        Ok(())
    }

    /// Waits for the execution at this place; `None` where the session has ended and there will be none.
    async fn arrival(&mut self) -> Result<Option<ExecutionId>, StoreError> {
        loop {
            // First the level, then the look: what comes between the two shows in the level.
            let changes = self.executions.session_changes(self.id);
            if let Some(execution) = self.executions.execution_in_session(self.id, self.place.ordinal).await? {
                return Ok(Some(execution));
            }
            let Some(mut changes) = changes else {
                let had = self.executions.session(self.id).await?.map_or(0, |state| state.executions);
                if had < self.place.ordinal.get() {
                    return Ok(None);
                }
                // This one was deleted.
                self.place = SessionEventId { ordinal: self.place.ordinal.saturating_add(1), seq: 0 };
                continue;
            };
            let ordinal = self.place.ordinal.get();
            let arrived = changes.wait_for(|changes| changes.executions >= ordinal || changes.ended).await;
            if arrived.is_ok_and(|changes| changes.executions < ordinal) {
                return Ok(None);
            }
        }
    }

    /// For a reader who has had everything of a session that has ended.
    async fn last_words(&self) -> Result<String, StoreError> {
        let latest = self.executions.session(self.id).await?.and_then(|state| state.current);
        let (place, reason) = match latest.map(|view| (view.record.ordinal, view.last_seq, view.record.reason)) {
            Some((Some(ordinal), seq, reason)) => (SessionEventId { ordinal, seq }, reason),
            _ => (START, None),
        };
        let reason = reason.map_or(json!("cancelled"), |reason| json!(reason.as_str()));
        Ok(done(place, &reason, Utc::now()))
    }
}
