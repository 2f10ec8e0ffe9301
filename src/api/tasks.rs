//! The task routes: from requests to calls of the service, from its results to answers.

use crate::api::auth::{Auth, Caller};
use crate::api::documents::{Accepted, EventsDocument, ExecutionDocument, HistoryDocument, StatusDocument};
use crate::api::extract::Seq;
use crate::api::extract::prefer_wait;
use crate::api::problem::{Code, Problem};
use crate::api::{ApiJson, ApiQuery, OptionalApiJson};
use crate::events::ReadQuery;
use crate::executions::{Executions, Submission, SubmitError, View};
use crate::model::event::{EventType, Severity};
use crate::model::idempotency::BadKey;
use crate::model::request::TaskRequest;
use crate::model::{ExecutionId, Fingerprint, Idempotency, IdempotencyKey, SessionId, Status, TaskId, millis};
use crate::store::{Cursor, HistoryFilter, StoreError};
use anstream::adapter::StripStr;
use axum::body::{Body, Bytes};
use axum::extract::{Path, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use chrono::{DateTime, TimeZone, Utc};
use secrecy::ExposeSecret;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use std::time::Duration;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use uuid::Uuid;

/// How long a cancellation is waited for: an execution is final within 5 s (CONTRACT), its proof may take longer.
const CANCEL_WAIT: Duration = Duration::from_secs(15);
/// The longest `reason` of a cancellation, in characters.
const MAX_REASON: usize = 500;
/// Events per read of a download.
const OUTPUT_BATCH: u32 = 500;

/// The state of the task routes.
#[derive(Clone, Debug)]
pub struct TasksApi {
    pub executions: Executions,
    pub auth: Auth,
}

/// The task routes without the streams.
pub fn routes(api: TasksApi) -> OpenApiRouter {
    OpenApiRouter::new()
        .routes(routes!(execute))
        .routes(routes!(history))
        .routes(routes!(show, delete))
        .routes(routes!(status))
        .routes(routes!(events))
        .routes(routes!(output))
        .routes(routes!(cancel))
        .routes(routes!(stream_token))
        .with_state(api)
}

pub(crate) fn parse_id(id: &str) -> Result<ExecutionId, Problem> {
    // One spelling only: the others of a UUID would make several names of one thing.
    match Uuid::parse_str(id) {
        Ok(uuid) if id.len() == 36 => Ok(ExecutionId(uuid)),
        _ => Err(Problem::invalid_field("execution_id", "must be a UUID")),
    }
}

pub(crate) fn not_found() -> Problem {
    Problem::new(Code::NotFound, "There is no execution with this id in this project.")
}

pub(crate) fn unavailable(error: StoreError) -> Problem {
    if error.is_transient() { Problem::unavailable("database", error) } else { Problem::internal(error) }
}

pub(crate) async fn find(api: &TasksApi, id: ExecutionId) -> Result<View, Problem> {
    api.executions.view(id).await.map_err(unavailable)?.ok_or_else(not_found)
}

/// Submit a task
///
/// 202 once the task is durable; it runs when its turn comes. With `Prefer: wait=N` (at most 60): 200 with the finished
/// execution where it ends in time.
///
/// With an `Idempotency-Key` it may be sent again: for 24 h the same key with the same body gives the first answer again,
/// as a 200 with `Idempotent-Replayed: true`, also while the queue is full or the database is away. How the body is written,
/// and its credentials, do not matter. A key of a submission that was refused, or of an execution that was deleted, is free.
#[utoipa::path(
    post, path = "/tasks/execute", tag = "tasks", security(("bearer" = ["tasks:execute"])),
    request_body = TaskRequest,
    params(
        ("Idempotency-Key" = Option<String>, Header, pattern = "^[!-~]{1,255}$", description = "The caller's own name of this submission: 1 to 255 visible ASCII characters"),
        ("Prefer" = Option<String>, Header, description = "`wait=N`: wait at most N seconds for the end (RFC 7240)"),
    ),
    responses(
        (status = 200, description = "Finished within the time that `Prefer: wait` gave; or taken before under this key, and then with the first answer where it has not finished in that time", body = Taken,
            headers(("Location" = String, description = "The execution"), ("Idempotent-Replayed" = Option<String>, description = "`true`: nothing new was taken"))),
        (status = 202, description = "Taken", body = Accepted, headers(("Location" = String, description = "The execution"))),
        (status = 409, description = "The key was used with another body, or the session has ended", content_type = "application/problem+json", body = crate::api::problem::ProblemDocument),
        (status = 429, description = "The queue is full; `Retry-After` says when to try again", content_type = "application/problem+json", body = crate::api::problem::ProblemDocument),
        (status = 503, description = "Shutting down, or the database is away", content_type = "application/problem+json", body = crate::api::problem::ProblemDocument),
    ),
)]
async fn execute(
    State(api): State<TasksApi>,
    Extension(caller): Extension<Caller>,
    headers: HeaderMap,
    ApiJson(request): ApiJson<TaskRequest>,
) -> Result<Response, Problem> {
    let idempotency = match idempotency_key(&headers)? {
        None => None,
        Some(key) => {
            let fingerprint = Fingerprint::of(&request).map_err(Problem::internal)?;
            Some(Idempotency { caller: caller.name().into_owned(), key, fingerprint })
        }
    };
    let submitted = api.executions.submit(request, idempotency).await;
    let Submission { submitted, replayed } = submitted.map_err(|error| submit_problem(error, &[]))?;
    let mut ended = None;
    if let Some(wait) = prefer_wait(&headers)
        && api.executions.ended(submitted.id, wait).await
    {
        ended = match find(&api, submitted.id).await {
            Ok(view) => Some(view).filter(|view| view.record.status.is_final()),
            // The first answer is known without the database.
            Err(_) if replayed => None,
            Err(problem) => return Err(problem),
        };
    }
    let (status, body) = match &ended {
        Some(view) => (StatusCode::OK, Taken::Ended(Box::new(ExecutionDocument::of(view)))),
        None if replayed => (StatusCode::OK, Taken::Accepted(Accepted::of(&submitted))),
        None => (StatusCode::ACCEPTED, Taken::Accepted(Accepted::of(&submitted))),
    };
    let mut response = (status, Json(body)).into_response();
    if let Ok(location) = HeaderValue::from_str(&format!("/tasks/{}", submitted.id)) {
        response.headers_mut().insert(header::LOCATION, location);
    }
    if replayed {
        response.headers_mut().insert("idempotent-replayed", HeaderValue::from_static("true"));
    }
    Ok(response)
}

/// What a submission is answered with.
#[derive(Debug, Serialize, utoipa::ToSchema)]
#[serde(untagged)]
enum Taken {
    Ended(Box<ExecutionDocument>),
    Accepted(Accepted),
}

/// The key of a submission; `None` where it has none.
fn idempotency_key(headers: &HeaderMap) -> Result<Option<IdempotencyKey>, Problem> {
    const NAME: &str = "Idempotency-Key";
    let mut values = headers.get_all(NAME).iter();
    let Some(value) = values.next() else { return Ok(None) };
    if values.next().is_some() {
        return Err(Problem::invalid_field(NAME, "may be there once only"));
    }
    let key = value.to_str().unwrap_or_default().parse();
    key.map(Some).map_err(|error: BadKey| Problem::invalid_field(NAME, error.to_string()))
}

/// Why a submission was not taken. `names` are fields that the caller knows under another name.
pub(crate) fn submit_problem(error: SubmitError, names: &[(&str, &str)]) -> Problem {
    match error {
        SubmitError::Field(field) => {
            let name = names.iter().find(|(ours, _)| *ours == field.field).map_or(&*field.field, |(_, theirs)| theirs);
            Problem::invalid_field(name, field.reason)
        }
        SubmitError::UnknownSession => {
            Problem::new(Code::NotFound, "There is no session with this id that takes tasks.")
                .field("session_id", "is no session that takes tasks")
        }
        SubmitError::SessionEnded => Problem::new(Code::Conflict, "The session has ended and takes no more prompts.")
            .field("session_id", "is a session that has ended"),
        SubmitError::QueueFull => Problem::new(Code::QueueFull, "As many tasks wait as may. Try again later."),
        SubmitError::ShuttingDown => Problem::new(Code::ShuttingDown, "The sidecar shuts down and takes no new task."),
        SubmitError::JournalFull => {
            Problem::new(Code::JournalFull, "The database is away, and as much waits for it as may. Try again later.")
        }
        SubmitError::JournalFailed => Problem::new(
            Code::Unavailable,
            "The journal takes nothing: the disk of STATE_DIR is full, or fails. Try again later.",
        ),
        SubmitError::NotStored => {
            Problem::new(Code::Unavailable, "The task could not be stored in time. It does not run.")
        }
        SubmitError::KeysUnknown => Problem::new(
            Code::Unavailable,
            "Whether the Idempotency-Key was used before is not known until the database has been reached once. Try again later.",
        ),
        SubmitError::KeyReused => {
            Problem::new(Code::IdempotencyMismatch, "The key was used for a submission with another body.")
                .field("Idempotency-Key", "was used with another body")
        }
        SubmitError::KeyPending => Problem::new(
            Code::Unavailable,
            "Another submission with this key is not decided yet. Send it again to learn what became of it.",
        ),
        SubmitError::TooManyKeys => Problem::new(
            Code::Unavailable,
            "As many keys of the last 24 h are remembered as may. Without a key the task can be submitted.",
        ),
    }
}

#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct HistoryParams {
    task_id: Option<TaskId>,
    session_id: Option<SessionId>,
    status: Option<Status>,
    /// Created at this time or later (RFC 3339).
    #[param(value_type = Option<String>, format = DateTime)]
    from: Option<DateTime<Utc>>,
    /// Created before this time (RFC 3339).
    #[param(value_type = Option<String>, format = DateTime)]
    to: Option<DateTime<Utc>>,
    /// 1 to 200.
    #[param(minimum = 1, maximum = 200, default = 50)]
    limit: Option<u32>,
    /// `next_cursor` of the page before.
    cursor: Option<String>,
}

pub(crate) fn limit_of(limit: Option<u32>, default: u32, most: u32) -> Result<u32, Problem> {
    match limit {
        None => Ok(default),
        Some(limit) if (1..=most).contains(&limit) => Ok(limit),
        Some(_) => Err(Problem::invalid_field("limit", format!("must be between 1 and {most}"))),
    }
}

/// Opaque to callers; ours is the creation time in microseconds (as the database keeps it) and the id.
fn cursor_text(cursor: &Cursor) -> String {
    URL_SAFE_NO_PAD.encode(format!("{}.{}", cursor.created_at.timestamp_micros(), cursor.id))
}

fn parse_cursor(text: &str) -> Result<Cursor, Problem> {
    let parsed = || {
        let text = String::from_utf8(URL_SAFE_NO_PAD.decode(text).ok()?).ok()?;
        let (micros, id) = text.split_once('.')?;
        let created_at = Utc.timestamp_micros(micros.parse().ok()?).single()?;
        Some(Cursor { created_at, id: ExecutionId(Uuid::parse_str(id).ok()?) })
    };
    parsed().ok_or_else(|| Problem::invalid_field("cursor", "must be the next_cursor of an earlier page"))
}

/// History, newest first
#[utoipa::path(get, path = "/tasks", tag = "tasks", security(("bearer" = ["tasks:read"])), params(HistoryParams), responses((status = 200, body = HistoryDocument)))]
async fn history(
    State(api): State<TasksApi>,
    ApiQuery(params): ApiQuery<HistoryParams>,
) -> Result<Json<HistoryDocument>, Problem> {
    let limit = limit_of(params.limit, 50, 200)?;
    let before = params.cursor.as_deref().map(parse_cursor).transpose()?;
    let filter = HistoryFilter {
        task_id: params.task_id,
        session_id: params.session_id,
        status: params.status,
        from: params.from,
        to: params.to,
    };
    // One more than asked for tells whether there is a next page.
    let mut records = api.executions.history(&filter, before, limit + 1).await.map_err(unavailable)?;
    let more = records.len() > limit as usize;
    records.truncate(limit as usize);
    let next_cursor = records.last().filter(|_| more).map(|last| cursor_text(&Cursor::of(last)));
    let executions = records.into_iter().map(StatusDocument::of_record).collect();
    Ok(Json(HistoryDocument { executions, next_cursor }))
}

/// The whole record of an execution
#[utoipa::path(
    get, path = "/tasks/{execution_id}", tag = "tasks", security(("bearer" = ["tasks:read"])), params(("execution_id" = ExecutionId, Path)),
    responses((status = 200, body = ExecutionDocument)),
)]
async fn show(State(api): State<TasksApi>, Path(id): Path<String>) -> Result<Json<ExecutionDocument>, Problem> {
    let view = find(&api, parse_id(&id)?).await?;
    Ok(Json(ExecutionDocument::of(&view)))
}

/// Delete an execution
///
/// Cancelled if it still runs; then its events and its record are gone, and the key of its submission is free. Deleting
/// again is 204 as well.
#[utoipa::path(
    delete, path = "/tasks/{execution_id}", tag = "tasks", security(("bearer" = ["tasks:control"])), params(("execution_id" = ExecutionId, Path)),
    responses((status = 204, description = "Gone")),
)]
async fn delete(State(api): State<TasksApi>, Path(id): Path<String>) -> Result<StatusCode, Problem> {
    let id = parse_id(&id)?;
    match api.executions.delete(id, CANCEL_WAIT).await.map_err(unavailable)? {
        true => Ok(StatusCode::NO_CONTENT),
        false => Err(Problem::new(Code::Unavailable, "The execution could not be ended in time. Try again.")),
    }
}

/// How an execution stands
#[utoipa::path(
    get, path = "/tasks/{execution_id}/status", tag = "tasks", security(("bearer" = ["tasks:read"])), params(("execution_id" = ExecutionId, Path)),
    responses((status = 200, body = StatusDocument)),
)]
async fn status(State(api): State<TasksApi>, Path(id): Path<String>) -> Result<Json<StatusDocument>, Problem> {
    let view = find(&api, parse_id(&id)?).await?;
    Ok(Json(StatusDocument::of(&view)))
}

#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct EventsParams {
    /// Only events after this one.
    #[param(value_type = Option<u64>)]
    after: Option<Seq>,
    /// 1 to 1000.
    #[param(minimum = 1, maximum = 1000, default = 100)]
    limit: Option<u32>,
    /// Only these types, separated by commas.
    #[param(min_length = 1)]
    r#type: Option<String>,
    /// Only these severities, separated by commas.
    #[param(min_length = 1)]
    severity: Option<String>,
}

fn words<T>(field: &str, list: Option<&str>, parse: impl Fn(&str) -> Option<T>) -> Result<Option<Vec<T>>, Problem> {
    let Some(list) = list else { return Ok(None) };
    let parsed: Option<Vec<T>> = list.split(',').map(|word| parse(word.trim())).collect();
    parsed.map(Some).ok_or_else(|| Problem::invalid_field(field, "has a word that is not known"))
}

/// A page of the log
#[utoipa::path(
    get, path = "/tasks/{execution_id}/events", tag = "tasks", security(("bearer" = ["tasks:read"])),
    params(("execution_id" = ExecutionId, Path), EventsParams),
    responses((status = 200, body = EventsDocument)),
)]
async fn events(
    State(api): State<TasksApi>,
    Path(id): Path<String>,
    ApiQuery(params): ApiQuery<EventsParams>,
) -> Result<Json<EventsDocument>, Problem> {
    let id = parse_id(&id)?;
    let query = ReadQuery {
        after: params.after.map_or(0, |after| after.0),
        limit: limit_of(params.limit, 100, 1000)?,
        types: words("type", params.r#type.as_deref(), EventType::parse)?,
        severities: words("severity", params.severity.as_deref(), Severity::parse)?,
    };
    let view = find(&api, id).await?;
    let page = api.executions.events().read(id, view.last_seq, &query).await.map_err(unavailable)?;
    let events = page.events.iter().map(|event| RawValue::from_string(event.json.to_string()));
    let events = events.collect::<Result<_, _>>().map_err(Problem::internal)?;
    Ok(Json(EventsDocument { events, next_after: page.next_after, last_seq: page.last_seq }))
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
enum Ansi {
    #[default]
    Keep,
    Strip,
}

#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct OutputParams {
    /// What becomes of the output's escape sequences.
    #[serde(default)]
    #[param(inline)]
    ansi: Ansi,
}

/// All output of the shell commands so far, for download
#[utoipa::path(
    get, path = "/tasks/{execution_id}/output", tag = "tasks", security(("bearer" = ["files:read"])),
    params(("execution_id" = ExecutionId, Path), OutputParams),
    responses((status = 200, content_type = "text/plain", body = String)),
)]
async fn output(
    State(api): State<TasksApi>,
    Path(id): Path<String>,
    ApiQuery(params): ApiQuery<OutputParams>,
) -> Result<Response, Problem> {
    let id = parse_id(&id)?;
    let last_seq = find(&api, id).await?.last_seq;
    let log = api.executions.events().clone();
    let body = async_stream::stream! {
        let mut after = 0;
        // One for each, since a sequence may be cut between two events of one stream.
        let mut strip = [StripStr::new(), StripStr::new()];
        while after < last_seq {
            let types = Some(vec![EventType::Stdout, EventType::Stderr]);
            let query = ReadQuery { after, limit: OUTPUT_BATCH, types, severities: None };
            let page = match log.read(id, last_seq, &query).await {
                Ok(page) => page,
                Err(error) => {
                    // The download is cut, not ended: the client sees that it is not complete.
                    yield Err(std::io::Error::other(error));
                    return;
                }
            };
            let mut text = String::new();
            for event in page.events.iter().filter(|event| event.seq <= last_seq) {
                #[derive(Deserialize)]
                struct Output {
                    data: String,
                }
                let Ok(Output { data }) = serde_json::from_str(&event.json) else { continue };
                match params.ansi {
                    Ansi::Keep => text.push_str(&data),
                    Ansi::Strip => text.extend(strip[usize::from(event.kind == EventType::Stderr)].strip_next(&data)),
                }
            }
            if page.next_after <= after {
                return;
            }
            after = page.next_after;
            yield Ok(Bytes::from(text));
        }
    };
    let headers = [
        (header::CONTENT_TYPE, "text/plain; charset=utf-8".to_owned()),
        (header::CONTENT_DISPOSITION, format!("inline; filename=\"{id}.txt\"")),
    ];
    Ok((headers, Body::from_stream(body)).into_response())
}

#[derive(Debug, Default, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
struct CancelRequest {
    /// For the log; up to 500 characters.
    #[serde(default)]
    #[schema(max_length = 500)]
    reason: Option<String>,
}

/// Cancel an execution
///
/// 200 with the true status once it has ended and no process of it is left. Cancelling again, or after the end, changes
/// nothing.
#[utoipa::path(
    post, path = "/tasks/{execution_id}/cancel", tag = "tasks", security(("bearer" = ["tasks:control"])), params(("execution_id" = ExecutionId, Path)),
    request_body(content = Option<CancelRequest>),
    responses((status = 200, body = StatusDocument)),
)]
async fn cancel(
    State(api): State<TasksApi>,
    Path(id): Path<String>,
    OptionalApiJson(request): OptionalApiJson<CancelRequest>,
) -> Result<Json<StatusDocument>, Problem> {
    let id = parse_id(&id)?;
    let reason = request.unwrap_or_default().reason.filter(|reason| !reason.is_empty());
    if reason.as_deref().is_some_and(|reason| reason.chars().count() > MAX_REASON) {
        return Err(Problem::invalid_field("reason", format!("may have at most {MAX_REASON} characters")));
    }
    let view = api.executions.cancel(id, reason.as_deref(), CANCEL_WAIT).await.map_err(unavailable)?;
    Ok(Json(StatusDocument::of(&view.ok_or_else(not_found)?)))
}

/// A token for one stream.
#[derive(Serialize, utoipa::ToSchema)]
struct StreamToken {
    token: String,
    execution_id: ExecutionId,
    /// When it ends: 60 s from now, or with the token that asked for it.
    #[serde(serialize_with = "millis::serialize")]
    expires_at: DateTime<Utc>,
}

/// A token for the stream of one execution
///
/// What the backend hands to a browser: it has the scope `tasks:read`, for this execution alone, and lasts 60 s. A stream
/// that it opened ends with it, by 4401 where it is a WebSocket; come again with another one, or send that as
/// `{"type":"auth","token"}` before. It is good at this sidecar only, and until it restarts.
#[utoipa::path(
    post, path = "/tasks/{execution_id}/stream-token", tag = "tasks", security(("bearer" = ["tasks:read"])),
    params(("execution_id" = ExecutionId, Path)),
    responses((status = 200, body = StreamToken)),
)]
async fn stream_token(
    State(api): State<TasksApi>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Json<StreamToken>, Problem> {
    let id = parse_id(&id)?;
    find(&api, id).await?;
    let (token, expires_at) = api.auth.stream_token(id, &caller)?;
    Ok(Json(StreamToken { token: token.expose_secret().to_owned(), execution_id: id, expires_at }))
}
