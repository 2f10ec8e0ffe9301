//! The session routes, as the existing Go backend calls them, and the same under the session proxy's names.

use crate::api::documents::Accepted;
use crate::api::extract::parse_json;
use crate::api::problem::{Code, Problem};
use crate::api::sockets::Sockets;
use crate::api::tasks::{limit_of, submit_problem, unavailable};
use crate::api::{ApiJson, ApiQuery, session_stream, terminal};
use crate::executions::{CreateError, CreateSession, Executions, SessionState};
use crate::model::request::ModelConfig;
use crate::model::{ExecutionId, Reason, SessionId, Status, millis};
use crate::store::SessionCursor;
use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::routing::{get, post};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use chrono::{DateTime, TimeZone, Utc};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use uuid::Uuid;

/// How long the end of a session's executions is waited for.
const STOP_WAIT: Duration = Duration::from_secs(15);
/// The most unknown fields that are named, and the most characters of each.
const MAX_UNKNOWN: usize = 20;
const MAX_UNKNOWN_NAME: usize = 64;

/// The state of the session routes.
#[derive(Clone, Debug)]
pub struct SessionsApi {
    pub executions: Executions,
    /// Told when the sidecar shuts down.
    pub shutdown: CancellationToken,
    /// `SESSIONS_STREAM_UNAUTHENTICATED`
    pub open_streams: bool,
    pub sockets: Sockets,
}

/// The session routes without the streams.
pub fn routes(api: SessionsApi) -> OpenApiRouter {
    let router = OpenApiRouter::new()
        .routes(routes!(create, list))
        .routes(routes!(show, destroy))
        .routes(routes!(status))
        .routes(routes!(stop))
        .routes(routes!(message))
        .route("/session", post(create).get(list))
        .route("/session/{session_id}", get(show).delete(destroy))
        .route("/session/{session_id}/prompt", post(message));
    let aliases = [
        ("/sessions", "/session"),
        ("/sessions/{session_id}", "/session/{session_id}"),
        ("/sessions/{session_id}/messages", "/session/{session_id}/prompt"),
    ];
    aliased(router, &aliases).with_state(api)
}

/// The streams and terminals of sessions.
pub fn streams(api: SessionsApi) -> OpenApiRouter {
    let router = OpenApiRouter::new()
        .routes(routes!(session_stream::stream))
        .routes(routes!(terminal::terminal))
        .route("/session/{session_id}/events", get(session_stream::proxied))
        .route("/session/{session_id}/pty/connect", get(terminal::terminal));
    let aliases = [
        ("/sessions/{session_id}/stream", "/session/{session_id}/events"),
        ("/sessions/{session_id}/terminal", "/session/{session_id}/pty/connect"),
    ];
    aliased(router, &aliases).with_state(api)
}

/// Documents routes under their second names.
fn aliased(mut router: OpenApiRouter<SessionsApi>, aliases: &[(&str, &str)]) -> OpenApiRouter<SessionsApi> {
    let paths = &mut router.get_openapi_mut().paths.paths;
    for (path, alias) in aliases {
        let Some(mut item) = paths.get(*path).cloned() else { continue };
        for operation in crate::api::openapi::operations(&mut item) {
            operation.operation_id = operation.operation_id.take().map(|id| format!("proxied_{id}"));
            operation.description = Some(format!("The same as `{path}`, under the name that the session proxy has."));
        }
        paths.insert((*alias).to_owned(), item);
    }
    router
}

pub(crate) fn parse_id(id: &str) -> Result<SessionId, Problem> {
    // One spelling only: the others of a UUID would make several names of one thing.
    match Uuid::parse_str(id) {
        Ok(uuid) if id.len() == 36 => Ok(SessionId(uuid)),
        _ => Err(Problem::invalid_field("session_id", "must be a UUID")),
    }
}

pub(crate) fn not_found() -> Problem {
    Problem::new(Code::NotFound, "There is no session with this id in this project.")
}

pub(crate) async fn find(api: &SessionsApi, id: SessionId) -> Result<SessionState, Problem> {
    api.executions.session(id).await.map_err(unavailable)?.ok_or_else(not_found)
}

/// A new session. Fields that are not known are ignored, and named in the log of its first execution.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
struct SessionRequest {
    /// The caller's own id of the session.
    session_id: SessionId,
    /// The first prompt. Without it the session waits for one.
    #[serde(default)]
    #[schema(max_length = 50_000)]
    prompt: Option<String>,
    /// The model of all its executions; the pod's default without it.
    #[serde(default)]
    model_config: Option<ModelConfig>,
    /// Added to the agent's system prompt, with each prompt of the session.
    #[serde(default)]
    #[schema(max_length = 50_000)]
    system_prompt: Option<String>,
}

const SESSION_FIELDS: &[&str] = &["session_id", "prompt", "model_config", "system_prompt"];
const MODEL_FIELDS: &[&str] = &[
    "provider",
    "model",
    "api_key",
    "api_key_encrypted",
    "temperature",
    "max_tokens",
    "enabled_tools",
    "model_version",
    "api_endpoint",
];

/// Takes the fields out that are not known, and gives their names as they can be shown.
fn take_unknown(body: &mut Map<String, Value>) -> Vec<String> {
    let mut unknown = Vec::new();
    let mut sift = |object: &mut Map<String, Value>, known: &[&str], prefix: &str| {
        object.retain(|name, _| {
            let known = known.contains(&name.as_str());
            if !known && unknown.len() < MAX_UNKNOWN {
                let name: String = name.escape_debug().take(MAX_UNKNOWN_NAME).collect();
                unknown.push(format!("{prefix}{name}"));
            }
            known
        });
    };
    sift(body, SESSION_FIELDS, "");
    if let Some(Value::Object(model)) = body.get_mut("model_config") {
        sift(model, MODEL_FIELDS, "model_config.");
    }
    unknown
}

/// A session that was made.
#[derive(Debug, Serialize, utoipa::ToSchema)]
struct SessionCreated {
    session_id: SessionId,
    /// OpenCode's own id of the conversation.
    remote_session_id: String,
    status: Status,
    #[serde(serialize_with = "millis::serialize")]
    created_at: DateTime<Utc>,
}

/// Create a session
///
/// 201 once its OpenCode process runs and, where there is a prompt, works on it. It is not queued: where as many
/// executions run as may, it is a 503. A caller who is gone before the answer leaves no session behind, and may come
/// again with the same id: that waits for the end of the first attempt. Fields that are not known are ignored, with a
/// `log` event that names them.
#[utoipa::path(
    post, path = "/sessions", tag = "sessions", security(("bearer" = ["tasks:execute"])), request_body = SessionRequest, operation_id = "create_session",
    responses(
        (status = 201, description = "Made", body = SessionCreated),
        (status = 409, description = "There is a session with this id", content_type = "application/problem+json", body = crate::api::problem::ProblemDocument),
        (status = 502, description = "OpenCode did not start", content_type = "application/problem+json", body = crate::api::problem::ProblemDocument),
        (status = 503, description = "Full, shutting down, or the database is away", content_type = "application/problem+json", body = crate::api::problem::ProblemDocument),
    ),
)]
async fn create(
    State(api): State<SessionsApi>,
    ApiJson(mut body): ApiJson<Map<String, Value>>,
) -> Result<(StatusCode, Json<SessionCreated>), Problem> {
    let ignored = take_unknown(&mut body);
    let body = serde_json::to_vec(&body).map_err(Problem::internal)?;
    let SessionRequest { session_id, prompt, model_config, system_prompt } = parse_json(&body)?;
    let gone = api.shutdown.child_token();
    let answered = CancellationToken::new();
    // Dropped with this handler, which is when the caller's connection closes.
    let guard = gone.clone().drop_guard();
    let request = CreateSession { id: session_id, prompt, model_config, system_prompt, ignored };
    let made = api.executions.create_session(request, gone, answered.clone()).await;
    answered.cancel();
    guard.disarm();
    let made = made.map_err(|error| match error {
        CreateError::Field(field) => Problem::invalid_field(field.field, field.reason),
        CreateError::Exists => Problem::new(Code::Conflict, "There is a session with this id.")
            .field("session_id", "is the id of a session that exists"),
        CreateError::Full => {
            Problem::new(Code::Unavailable, "As many executions run as may. Try again later, or end one.")
        }
        CreateError::ShuttingDown | CreateError::Abandoned => {
            Problem::new(Code::ShuttingDown, "The sidecar shuts down and takes no new session.")
        }
        CreateError::NotStored => {
            Problem::new(Code::Unavailable, "The session could not be stored in time. It does not run.")
        }
        CreateError::Store(error) => unavailable(error),
        CreateError::Refused(why) => Problem::new(Code::Unavailable, why),
        CreateError::NotStarted(why) => Problem::new(Code::BadGateway, why),
    })?;
    let created = SessionCreated {
        session_id,
        remote_session_id: made.record.remote_id,
        status: made.status,
        created_at: made.record.created_at,
    };
    Ok((StatusCode::CREATED, Json(created)))
}

/// A session.
#[derive(Debug, Serialize, utoipa::ToSchema)]
struct SessionDocument {
    session_id: SessionId,
    /// OpenCode's own id of the conversation.
    remote_session_id: String,
    /// That of the execution in `execution_id`; `pending` before the first one.
    status: Status,
    /// Of that execution, once it has ended.
    reason: Option<Reason>,
    #[serde(serialize_with = "millis::serialize")]
    created_at: DateTime<Utc>,
    #[serde(serialize_with = "millis::serialize")]
    last_activity: DateTime<Utc>,
    progress: Option<u8>,
    current_tool: Option<String>,
    /// The first of its executions that goes on, else the latest one.
    execution_id: Option<ExecutionId>,
    /// How many it has had.
    executions: u32,
    /// It takes no more prompts since then.
    #[serde(serialize_with = "millis::option::serialize")]
    ended_at: Option<DateTime<Utc>>,
}

impl SessionDocument {
    fn of(state: SessionState) -> Self {
        let current = state.current.as_ref();
        Self {
            session_id: state.record.id,
            remote_session_id: state.record.remote_id,
            status: state.status,
            reason: current.and_then(|view| view.record.reason),
            created_at: state.record.created_at,
            last_activity: state.last_activity,
            progress: current.and_then(|view| view.record.progress),
            current_tool: current.and_then(|view| view.current_tool.clone()),
            execution_id: current.map(|view| view.record.id),
            executions: state.executions,
            ended_at: state.record.ended_at,
        }
    }
}

/// A page of sessions.
#[derive(Debug, Serialize, utoipa::ToSchema)]
struct SessionList {
    sessions: Vec<SessionDocument>,
    next_cursor: Option<String>,
}

#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct ListParams {
    /// 1 to 200.
    #[param(minimum = 1, maximum = 200, default = 50)]
    limit: Option<u32>,
    /// `next_cursor` of the page before.
    cursor: Option<String>,
}

fn parse_cursor(text: &str) -> Result<SessionCursor, Problem> {
    let parsed = || {
        let text = String::from_utf8(URL_SAFE_NO_PAD.decode(text).ok()?).ok()?;
        let (micros, id) = text.split_once('.')?;
        let created_at = Utc.timestamp_micros(micros.parse().ok()?).single()?;
        Some(SessionCursor { created_at, id: SessionId(Uuid::parse_str(id).ok()?) })
    };
    parsed().ok_or_else(|| Problem::invalid_field("cursor", "must be the next_cursor of an earlier page"))
}

/// Sessions, newest first
#[utoipa::path(get, path = "/sessions", tag = "sessions", security(("bearer" = ["tasks:read"])), operation_id = "list_sessions", params(ListParams), responses((status = 200, body = SessionList)))]
async fn list(
    State(api): State<SessionsApi>,
    ApiQuery(params): ApiQuery<ListParams>,
) -> Result<Json<SessionList>, Problem> {
    let limit = limit_of(params.limit, 50, 200)?;
    let before = params.cursor.as_deref().map(parse_cursor).transpose()?;
    // One more than asked for tells whether there is a next page.
    let mut states = api.executions.sessions(before, limit + 1).await.map_err(unavailable)?;
    let more = states.len() > limit as usize;
    states.truncate(limit as usize);
    let cursor = |state: &SessionState| {
        URL_SAFE_NO_PAD.encode(format!("{}.{}", state.record.created_at.timestamp_micros(), state.record.id))
    };
    let next_cursor = states.last().filter(|_| more).map(cursor);
    Ok(Json(SessionList { sessions: states.into_iter().map(SessionDocument::of).collect(), next_cursor }))
}

/// One session
#[utoipa::path(
    get, path = "/sessions/{session_id}", tag = "sessions", security(("bearer" = ["tasks:read"])), operation_id = "show_session",
    params(("session_id" = SessionId, Path)), responses((status = 200, body = SessionDocument)),
)]
async fn show(State(api): State<SessionsApi>, Path(id): Path<String>) -> Result<Json<SessionDocument>, Problem> {
    Ok(Json(SessionDocument::of(find(&api, parse_id(&id)?).await?)))
}

/// How a session stands.
#[derive(Debug, Serialize, utoipa::ToSchema)]
struct SessionStatus {
    session_id: SessionId,
    status: Status,
    #[serde(serialize_with = "millis::serialize")]
    created_at: DateTime<Utc>,
    #[serde(serialize_with = "millis::serialize")]
    last_activity: DateTime<Utc>,
    /// 0–100, from the agent's own to-do list; null where it keeps none.
    progress: Option<u8>,
    current_tool: Option<String>,
}

/// How a session stands
#[utoipa::path(
    get, path = "/sessions/{session_id}/status", tag = "sessions", security(("bearer" = ["tasks:read"])), operation_id = "session_status",
    params(("session_id" = SessionId, Path)), responses((status = 200, body = SessionStatus)),
)]
async fn status(State(api): State<SessionsApi>, Path(id): Path<String>) -> Result<Json<SessionStatus>, Problem> {
    let state = SessionDocument::of(find(&api, parse_id(&id)?).await?);
    let SessionDocument { session_id, status, created_at, last_activity, progress, current_tool, .. } = state;
    Ok(Json(SessionStatus { session_id, status, created_at, last_activity, progress, current_tool }))
}

/// How a session ended.
#[derive(Debug, Serialize, utoipa::ToSchema)]
struct SessionStopped {
    session_id: SessionId,
    /// `cancelled` if it ran, else its true final status.
    status: Status,
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "millis::option::serialize")]
    cancelled_at: Option<DateTime<Utc>>,
}

async fn end(api: &SessionsApi, id: &str) -> Result<Json<SessionStopped>, Problem> {
    let id = parse_id(id)?;
    let state = api.executions.end_session(id, Some("the session is stopped"), STOP_WAIT).await.map_err(unavailable)?;
    let state = state.ok_or_else(not_found)?;
    if !state.status.is_final() {
        return Err(Problem::new(Code::Unavailable, "The session could not be ended in time. Try again."));
    }
    let ended_at = state.current.and_then(|view| view.record.completed_at).or(state.record.ended_at);
    let cancelled_at = ended_at.filter(|_| state.status == Status::Cancelled);
    Ok(Json(SessionStopped { session_id: id, status: state.status, cancelled_at }))
}

/// Stop a session
///
/// What runs or waits in it is cancelled, its process ends, and it takes no more prompts. Stopping one that has ended
/// changes nothing and tells its true status.
#[utoipa::path(
    post, path = "/sessions/{session_id}/stop", tag = "sessions", security(("bearer" = ["tasks:control"])), operation_id = "stop_session",
    params(("session_id" = SessionId, Path)), responses((status = 200, body = SessionStopped)),
)]
async fn stop(State(api): State<SessionsApi>, Path(id): Path<String>) -> Result<Json<SessionStopped>, Problem> {
    end(&api, &id).await
}

/// Stop a session
///
/// The same as `POST /sessions/{session_id}/stop`; its history stays.
#[utoipa::path(
    delete, path = "/sessions/{session_id}", tag = "sessions", security(("bearer" = ["tasks:control"])), operation_id = "delete_session",
    params(("session_id" = SessionId, Path)), responses((status = 200, body = SessionStopped)),
)]
async fn destroy(State(api): State<SessionsApi>, Path(id): Path<String>) -> Result<Json<SessionStopped>, Problem> {
    end(&api, &id).await
}

/// The next prompt.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
struct MessageRequest {
    #[schema(min_length = 1, max_length = 50_000)]
    text: String,
}

/// Send the next prompt
///
/// A new execution in the same conversation, which runs when those before it have ended.
#[utoipa::path(
    post, path = "/sessions/{session_id}/messages", tag = "sessions", security(("bearer" = ["tasks:execute"])), operation_id = "message_session",
    params(("session_id" = SessionId, Path)), request_body = MessageRequest,
    responses(
        (status = 202, description = "Taken", body = Accepted),
        (status = 409, description = "The session has ended", content_type = "application/problem+json", body = crate::api::problem::ProblemDocument),
    ),
)]
async fn message(
    State(api): State<SessionsApi>,
    Path(id): Path<String>,
    ApiJson(request): ApiJson<MessageRequest>,
) -> Result<(StatusCode, Json<Accepted>), Problem> {
    let id = parse_id(&id)?;
    let state = find(&api, id).await?;
    if state.record.ended_at.is_some() {
        return Err(Problem::new(Code::Conflict, "The session has ended and takes no more prompts."));
    }
    let taken = api.executions.prompt_session(id, request.text).await;
    let submitted = taken.map_err(|error| submit_problem(error, &[("prompt", "text")]))?;
    Ok((StatusCode::ACCEPTED, Json(Accepted::of(&submitted))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use utoipa::PartialSchema;

    #[test]
    fn every_field_of_the_schema_is_known_and_no_other() {
        let properties = |schema: utoipa::openapi::RefOr<utoipa::openapi::Schema>| {
            let schema = serde_json::to_value(schema).unwrap();
            let mut names: Vec<_> = schema["properties"].as_object().unwrap().keys().cloned().collect();
            names.sort();
            names
        };
        let sorted = |names: &[&str]| {
            let mut names: Vec<_> = names.iter().map(|name| (*name).to_owned()).collect();
            names.sort();
            names
        };
        assert_eq!(properties(SessionRequest::schema()), sorted(SESSION_FIELDS));
        assert_eq!(properties(ModelConfig::schema()), sorted(MODEL_FIELDS));
    }

    #[test]
    fn unknown_fields_are_taken_out_and_named_as_they_can_be_shown() {
        let mut body = json!({ "session_id": 1, "ne\u{1b}w": 2, "model_config": { "model": "m", "later": null } });
        let unknown = take_unknown(body.as_object_mut().unwrap());
        assert_eq!(unknown, ["ne\\u{1b}w", "model_config.later"]);
        assert_eq!(body, json!({ "session_id": 1, "model_config": { "model": "m" } }));
    }
}
