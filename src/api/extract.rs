//! Extractors: what comes in is checked here, and what is wrong becomes a problem document that names the field.
//!
//! Nothing of the body, path or query is repeated in a document, except the name of a field that is not known.

use crate::api::problem::{Code, Problem};
use crate::api::reason::{Place, reason};
use axum::body::HttpBody;
use axum::extract::path::ErrorKind;
use axum::extract::rejection::PathRejection;
use axum::extract::{FromRequest, FromRequestParts, Path, RawPathParams, Request};
use axum::response::IntoResponse;
use axum::response::Response;
use bytes::{Bytes, BytesMut};
use http::request::Parts;
use http::{HeaderMap, header};
use http_body_util::BodyExt;
use serde::de::DeserializeOwned;
use std::time::Duration;

/// What a body may cost. Put as an extension on a route to change it there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BodyLimits {
    /// Bytes of a body; more is a 413.
    pub max_bytes: usize,
    /// Time from the headers to the end of the body; longer is a 408.
    pub deadline: Duration,
}

impl Default for BodyLimits {
    /// 1 MiB in 10 s.
    fn default() -> Self {
        Self { max_bytes: 1 << 20, deadline: Duration::from_secs(10) }
    }
}

/// A JSON body of type `T`.
///
/// Refusals: 415 for another content type, 413 and 408 by [`BodyLimits`], 400 for what is not JSON or not a `T`.
#[derive(Clone, Copy, Debug)]
pub struct ApiJson<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for ApiJson<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, _state: &S) -> Result<Self, Problem> {
        check_content_type(request.headers())?;
        let body = read_body(request).await?;
        parse_json(&body).map(Self)
    }
}

/// A JSON body that may be left out: no body at all is `None`, whatever the content type says, and so is `null`.
#[derive(Clone, Copy, Debug)]
pub struct OptionalApiJson<T>(pub Option<T>);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for OptionalApiJson<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, _state: &S) -> Result<Self, Problem> {
        if request.body().is_end_stream() {
            return Ok(Self(None));
        }
        let typed = check_content_type(request.headers());
        let body = read_body(request).await?;
        if body.is_empty() {
            return Ok(Self(None));
        }
        typed?;
        parse_json(&body).map(Self)
    }
}

/// Parameters of the path. Refusal: 400 that names the parameter.
#[derive(Clone, Copy, Debug)]
pub struct ApiPath<T>(pub T);

impl<T: DeserializeOwned + Send, S: Send + Sync> FromRequestParts<S> for ApiPath<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let rejection = match Path::<T>::from_request_parts(parts, state).await {
            Ok(Path(value)) => return Ok(Self(value)),
            Err(PathRejection::FailedToDeserializePathParams(failed)) => failed,
            Err(other) => return Err(Problem::internal(other)),
        };
        let (name, why) = match rejection.kind() {
            ErrorKind::ParseErrorAtKey { key, expected_type, .. } => (Some(key.clone()), expected(expected_type)),
            ErrorKind::DeserializeError { key, message, .. } => {
                (Some(key.clone()), reason(message, Place::Parameter).text)
            }
            ErrorKind::InvalidUtf8InPathParam { key } => (Some(key.clone()), "is not UTF-8".to_owned()),
            ErrorKind::ParseErrorAtIndex { index, expected_type, .. } => {
                (parameter_name(parts, *index).await, expected(expected_type))
            }
            ErrorKind::ParseError { expected_type, .. } => (parameter_name(parts, 0).await, expected(expected_type)),
            ErrorKind::Message(message) => (parameter_name(parts, 0).await, reason(message, Place::Parameter).text),
            // The route and the handler do not fit together: a mistake of ours.
            _ => return Err(Problem::internal(rejection)),
        };
        Err(Problem::invalid_field(name.unwrap_or_else(|| "path".to_owned()), why))
    }
}

fn expected(type_name: &str) -> String {
    format!("must be {}", crate::api::reason::article(type_name))
}

async fn parameter_name(parts: &mut Parts, index: usize) -> Option<String> {
    let names = RawPathParams::from_request_parts(parts, &()).await.ok()?;
    names.iter().nth(index).map(|(name, _)| name.to_owned())
}

/// Parameters of the query. Refusal: 400 that names the parameter, also for one that a `T` with
/// `deny_unknown_fields` does not know.
#[derive(Clone, Copy, Debug)]
pub struct ApiQuery<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for ApiQuery<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Problem> {
        let query = parts.uri.query().unwrap_or_default();
        let deserializer = serde_urlencoded::Deserializer::new(url::form_urlencoded::parse(query.as_bytes()));
        serde_path_to_error::deserialize(deserializer)
            .map(Self)
            .map_err(|error| reason(&error.inner().to_string(), Place::Parameter).problem(&error.path().to_string()))
    }
}

/// The number of an event, as a reader gives it: no more than the database can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Seq(pub(crate) u64);

impl Seq {
    pub(crate) fn parse(text: &str) -> Option<Self> {
        text.parse::<u64>().ok().filter(|seq| i64::try_from(*seq).is_ok()).map(Self)
    }
}

impl<'de> serde::Deserialize<'de> for Seq {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let seq = u64::deserialize(deserializer)?;
        match i64::try_from(seq) {
            Ok(_) => Ok(Self(seq)),
            Err(_) => {
                let most = "a whole number up to 9223372036854775807";
                Err(serde::de::Error::invalid_value(serde::de::Unexpected::Unsigned(seq), &most))
            }
        }
    }
}

/// How long the caller is ready to wait for an answer: `Prefer: wait=N` (RFC 7240), at most 60 s. `None` where it
/// did not say; what cannot be read is ignored, as the RFC wants it.
pub fn prefer_wait(headers: &HeaderMap) -> Option<Duration> {
    const MOST: u64 = 60;
    let values = headers.get_all("prefer").iter().filter_map(|v| v.to_str().ok());
    values.flat_map(|v| v.split(',')).find_map(|preference| {
        let (name, value) = preference.split(';').next()?.split_once('=')?;
        let seconds = value.trim().trim_matches('"').parse::<u64>().ok()?;
        name.trim().eq_ignore_ascii_case("wait").then(|| Duration::from_secs(seconds.min(MOST)))
    })
}

/// 415 unless the body says that it is JSON in UTF-8, not compressed.
fn check_content_type(headers: &HeaderMap) -> Result<(), Problem> {
    let refuse = |why: &str| Err(Problem::new(Code::UnsupportedMediaType, why));
    let encoding = headers.get(header::CONTENT_ENCODING).map(|v| v.as_bytes().to_ascii_lowercase());
    if encoding.is_some_and(|encoding| encoding != b"identity") {
        return refuse("The body must not be compressed.");
    }
    let Some(Ok(value)) = headers.get(header::CONTENT_TYPE).map(|v| v.to_str()) else {
        return refuse("The body must be application/json; the request has no content type.");
    };
    let mut parts = value.split(';').map(str::trim);
    let essence = parts.next().unwrap_or_default().to_ascii_lowercase();
    let json = essence == "application/json" || (essence.starts_with("application/") && essence.ends_with("+json"));
    if !json {
        return refuse("The body must be application/json.");
    }
    let charset = parts.filter_map(|p| p.split_once('=')).find(|(name, _)| name.trim().eq_ignore_ascii_case("charset"));
    match charset {
        Some((_, value)) if !value.trim().trim_matches('"').eq_ignore_ascii_case("utf-8") => {
            refuse("The body must be in UTF-8.")
        }
        _ => Ok(()),
    }
}

/// Reads a body within the request's [`BodyLimits`].
///
/// # Errors
/// 413 that names the limit, 408 for one that comes too slowly, 400 for one that breaks off.
pub async fn read_body(request: Request) -> Result<Bytes, Problem> {
    let limits = request.extensions().get::<BodyLimits>().copied().unwrap_or_default();
    match tokio::time::timeout(limits.deadline, collect(request, limits.max_bytes)).await {
        Ok(read) => read,
        Err(_) => Err(Problem::new(
            Code::RequestTimeout,
            format!("The body did not arrive within {} ms.", limits.deadline.as_millis()),
        )),
    }
}

async fn collect(request: Request, max_bytes: usize) -> Result<Bytes, Problem> {
    // A client that is still sending may not read the answer; so a body that is not much too large is taken in and
    // thrown away first.
    const DISCARD: usize = 8 << 20;
    let too_large = || Problem::new(Code::BodyTooLarge, format!("The body may have at most {max_bytes} bytes."));
    let waits_for_permission = request.headers().contains_key(header::EXPECT);
    let mut body = request.into_body();
    let announced = usize::try_from(body.size_hint().lower()).unwrap_or(usize::MAX);
    if announced > max_bytes && (waits_for_permission || announced > max_bytes.saturating_add(DISCARD)) {
        return Err(too_large());
    }
    let mut bytes = BytesMut::with_capacity(announced.min(max_bytes));
    let mut total = 0usize;
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|_| Problem::new(Code::MalformedJson, "The body broke off."))?;
        let Ok(data) = frame.into_data() else { continue };
        total = total.saturating_add(data.len());
        if total > max_bytes.saturating_add(DISCARD) {
            break;
        }
        if total <= max_bytes {
            bytes.extend_from_slice(&data);
        }
    }
    if total > max_bytes { Err(too_large()) } else { Ok(bytes.freeze()) }
}

/// Parses JSON text. For bodies that do not come through [`ApiJson`], such as a WebSocket's frames.
///
/// # Errors
/// 400: `malformed_json`, or `invalid_field` and `unknown_field` with the field's dotted path.
pub fn parse_json<T: DeserializeOwned>(body: &[u8]) -> Result<T, Problem> {
    let malformed = |why: String| Problem::new(Code::MalformedJson, why);
    let Ok(text) = std::str::from_utf8(body) else {
        return Err(malformed("The body is not UTF-8.".to_owned()));
    };
    if text.trim_ascii().is_empty() {
        return Err(malformed("The body is empty.".to_owned()));
    }
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let syntax = |error: &serde_json::Error| {
        let nested = error.to_string().starts_with("recursion limit");
        let why = if nested { "is nested too deeply" } else { "is not JSON" };
        malformed(format!("The body {why} (line {}, column {}).", error.line(), error.column()))
    };
    let value = serde_path_to_error::deserialize(&mut deserializer).map_err(|error| {
        let inner = error.inner();
        match inner.classify() {
            serde_json::error::Category::Data => {
                reason(&inner.to_string(), Place::Body).problem(&error.path().to_string())
            }
            _ => syntax(inner),
        }
    })?;
    deserializer.end().map_err(|error| syntax(&error))?;
    Ok(value)
}

/// A problem or a response: for handlers that answer in either way.
pub type ApiResult<T = Response> = Result<T, Problem>;

impl From<Problem> for Response {
    fn from(problem: Problem) -> Self {
        problem.into_response()
    }
}
