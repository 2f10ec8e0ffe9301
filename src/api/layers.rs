//! What happens to every request around its handler: an id, a log line, metrics, a net for panics, headers, and a
//! time limit.

use crate::api::extract::{BodyLimits, prefer_wait};
use crate::api::problem::{Code, Problem};
use crate::telemetry::Metrics;
use axum::extract::{MatchedPath, Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use futures_util::FutureExt;
use http::{HeaderMap, HeaderName, HeaderValue, header};
use std::fmt;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tracing::Instrument;

/// The header that carries a request's id in both directions.
pub const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

tokio::task_local! {
    static REQUEST_ID: RequestId;
}

/// The id of one request: the caller's, where it is fit to be one, else a UUIDv7. Cheap to clone.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct RequestId(Arc<str>);

impl RequestId {
    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    fn of(headers: &HeaderMap) -> Self {
        let fit = |id: &&str| {
            (1..=128).contains(&id.len())
                && id.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
        };
        match headers.get(X_REQUEST_ID).and_then(|id| id.to_str().ok()).filter(fit) {
            Some(id) => Self(id.into()),
            None => Self(uuid::Uuid::now_v7().to_string().into()),
        }
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The id of the request that runs now; `None` outside of one and in tasks that it started.
pub fn current_request_id() -> Option<RequestId> {
    REQUEST_ID.try_with(Clone::clone).ok()
}

/// Limits that hold for all routes.
#[derive(Clone, Copy, Debug)]
pub struct EdgeLimits {
    /// Time from the headers to the answer's head, on ordinary routes. `Prefer: wait` is added to it.
    pub request: Duration,
    /// For routes that set none of their own.
    pub body: BodyLimits,
}

/// Bytes of a path, and of a query, as they are sent. A longer one is a 414.
const MAX_PATH: usize = 1024;
const MAX_QUERY: usize = 16 * 1024;

impl Default for EdgeLimits {
    /// 30 s, and the default [`BodyLimits`].
    fn default() -> Self {
        Self { request: Duration::from_secs(30), body: BodyLimits::default() }
    }
}

/// Why no route is to see the request.
fn refused(request: &Request) -> Option<Problem> {
    let too_long = |what: &str, max: usize| {
        Some(Problem::new(Code::UriTooLong, format!("The {what} may have at most {max} bytes.")))
    };
    let headers = request.headers();
    if request.uri().path().len() > MAX_PATH {
        return too_long("path", MAX_PATH);
    }
    if request.uri().query().is_some_and(|query| query.len() > MAX_QUERY) {
        return too_long("query", MAX_QUERY);
    }
    if headers.contains_key(header::TRANSFER_ENCODING) && headers.contains_key(header::CONTENT_LENGTH) {
        return Some(Problem::invalid_field("Content-Length", "cannot be given together with Transfer-Encoding"));
    }
    None
}

/// What [`around`] needs.
#[derive(Clone, Debug)]
pub(crate) struct Around {
    pub(crate) limits: EdgeLimits,
    pub(crate) metrics: Metrics,
}

/// The outermost layer of every route.
pub(crate) async fn around(State(around): State<Around>, mut request: Request, next: Next) -> Response {
    let started = Instant::now();
    let id = RequestId::of(request.headers());
    let method = request.method().clone();
    // The pattern, not the path: paths hold ids, queries may hold anything.
    let route = request.extensions().get::<MatchedPath>().cloned();
    request.extensions_mut().insert(id.clone());
    if request.extensions().get::<BodyLimits>().is_none() {
        request.extensions_mut().insert(around.limits.body);
    }

    let span = tracing::info_span!("request", request_id = %id);
    let refused = refused(&request);
    let handled = async {
        if let Some(problem) = refused {
            return problem.into_response();
        }
        match AssertUnwindSafe(next.run(request)).catch_unwind().await {
            Ok(response) => response,
            // The panic hook has printed where and why.
            Err(_) => {
                tracing::error!("a handler panicked");
                Problem::new(Code::Internal, "Something failed inside. The log has it under this request's id.")
                    .into_response()
            }
        }
    };
    let mut response = REQUEST_ID.scope(id.clone(), handled).instrument(span.clone()).await;

    let headers = response.headers_mut();
    if let Ok(value) = HeaderValue::from_str(id.as_str()) {
        headers.insert(X_REQUEST_ID, value);
    }
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    if !headers.contains_key(header::CACHE_CONTROL) {
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    }

    let took = started.elapsed();
    let route = route.as_ref().map_or("none", MatchedPath::as_str);
    let status = response.status().as_u16();
    around.metrics.http_request(route, &method, status, took);
    let duration_ms = u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
    let _in_span = span.enter();
    if PROBES.contains(&route) {
        tracing::debug!(%method, route, status, duration_ms, "request");
    } else {
        tracing::info!(%method, route, status, duration_ms, "request");
    }
    response
}

/// Routes that are asked every few seconds: their lines would drown the others.
const PROBES: &[&str] = &["/health", "/healthz", "/livez", "/ready", "/readyz", "/metrics"];

/// The time limit of ordinary routes: 503 where the answer does not begin in time.
pub(crate) async fn time_limit(State(limit): State<Duration>, request: Request, next: Next) -> Response {
    let limit = limit + prefer_wait(request.headers()).unwrap_or_default();
    match tokio::time::timeout(limit, next.run(request)).await {
        Ok(response) => response,
        Err(_) => {
            tracing::warn!(limit_ms = limit.as_millis(), "no answer in time");
            Problem::new(Code::Unavailable, "The answer took too long.").into_response()
        }
    }
}

/// 404 for paths that are no route.
pub(crate) async fn not_found() -> Problem {
    Problem::new(Code::NotFound, "There is nothing at this path.")
}

/// 405 for methods that a route has not; the router adds `Allow`.
pub(crate) async fn method_not_allowed() -> Problem {
    Problem::new(Code::MethodNotAllowed, "This path does not take that method; the header Allow names those it takes.")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_fit_request_id_is_taken_over() {
        let with = |id: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(X_REQUEST_ID, id.parse().unwrap());
            RequestId::of(&headers).to_string()
        };
        assert_eq!(with("Abc-1._x"), "Abc-1._x");
        let longest = "a".repeat(128);
        assert_eq!(with(&longest), longest);
        for unfit in ["", "a b", "a\"b", "a/b", &"a".repeat(129)] {
            assert_eq!(with(unfit).parse::<uuid::Uuid>().unwrap().get_version_num(), 7, "{unfit}");
        }
        assert!(RequestId::of(&HeaderMap::new()).as_str().parse::<uuid::Uuid>().is_ok());
    }
}
