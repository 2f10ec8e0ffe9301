//! Probes and what else needs no credential: health, readiness, metrics, the document and the page to read it on.
//! Nothing here says anything secret.

use crate::api::problem::{Code, Problem, ProblemDocument};
use crate::api::{ApiPath, docs, pages};
use crate::telemetry::Metrics;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use http::{HeaderName, HeaderValue, StatusCode, header};
use serde::Serialize;
use serde_json::{Map, Value, json};
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

/// What was found out about the parts that a task needs.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Checks {
    found: Vec<(String, Value)>,
    failing: Vec<String>,
}

impl Checks {
    /// Nothing found yet; ready.
    pub fn new() -> Self {
        Self::default()
    }

    /// A finding that does not stand in the way: `ok`, `degraded`, `off`, `ephemeral` …
    #[must_use]
    pub fn with(mut self, name: &str, status: &str, detail: Option<&str>) -> Self {
        self.found.push((name.to_owned(), entry(status, detail)));
        self
    }

    /// A finding that stands in the way of a task.
    #[must_use]
    pub fn failing(mut self, name: &str, status: &str, detail: Option<&str>) -> Self {
        self.failing.push(detail.map_or_else(|| format!("{name}: {status}"), |detail| format!("{name}: {detail}")));
        self.with(name, status, detail)
    }

    /// Whether a task could be taken.
    pub fn ready(&self) -> bool {
        self.failing.is_empty()
    }

    fn members(&self) -> Map<String, Value> {
        self.found.iter().cloned().collect()
    }
}

fn entry(status: &str, detail: Option<&str>) -> Value {
    match detail {
        Some(detail) => json!({ "status": status, "detail": detail }),
        None => json!({ "status": status }),
    }
}

type CheckFuture = Pin<Box<dyn Future<Output = Checks> + Send>>;

/// Finds out whether a task could be taken. Asked at each call of `/ready`, so it answers from what is known.
#[derive(Clone)]
pub struct Readiness(Arc<dyn Fn() -> CheckFuture + Send + Sync>);

impl Readiness {
    /// Asks `checks` at each call.
    pub fn new<F, Fut>(checks: F) -> Self
    where
        F: Fn() -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Checks> + Send + 'static,
    {
        Self(Arc::new(move || Box::pin(checks())))
    }
}

impl fmt::Debug for Readiness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Readiness")
    }
}

/// What the probes need.
#[derive(Clone, Debug)]
pub struct Probes {
    pub metrics: Metrics,
    pub readiness: Readiness,
}

/// The document as it is served; put on the routes when all of them are known.
#[derive(Clone, Debug)]
pub(crate) struct Served {
    pub(crate) json: Arc<str>,
}

/// Alive.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct Health {
    /// Always `ok`.
    pub status: &'static str,
    pub version: &'static str,
    pub uptime_seconds: u64,
}

/// One finding of `/ready`.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct Check {
    /// `ok`, `degraded`, `off`, `failed` …
    pub status: String,
    /// More, for people.
    pub detail: Option<String>,
}

/// Whether a task could be taken.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct Ready {
    /// `ready` or `not ready`.
    pub status: &'static str,
    /// What stands in the way; only with `not ready`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// By name: workspace, database, opencode, sandbox, journal, state, auth.
    #[schema(value_type = std::collections::HashMap<String, Check>)]
    pub checks: Map<String, Value>,
}

/// Metrics, which the operator may close (`METRICS_AUTH`).
pub(crate) fn metrics_route(probes: Probes) -> OpenApiRouter {
    OpenApiRouter::new().routes(routes!(metrics)).with_state(probes)
}

/// The routes without a credential.
pub fn routes(probes: Probes) -> OpenApiRouter {
    OpenApiRouter::new()
        .routes(routes!(health))
        .routes(routes!(healthz))
        .routes(routes!(livez))
        .routes(routes!(ready))
        .routes(routes!(readyz))
        .routes(routes!(openapi_json))
        .routes(routes!(docs_index))
        .routes(routes!(docs_page))
        .with_state(probes)
}

/// Alive
///
/// Touches no dependency.
#[utoipa::path(get, path = "/health", tag = "probes", responses((status = 200, body = Health)))]
async fn health(State(probes): State<Probes>) -> Json<Health> {
    let uptime_seconds = probes.metrics.uptime().as_secs();
    Json(Health { status: "ok", version: env!("CARGO_PKG_VERSION"), uptime_seconds })
}

/// Alive, under Kubernetes' name
#[utoipa::path(get, path = "/healthz", tag = "probes", responses((status = 200, body = Health)))]
async fn healthz(probes: State<Probes>) -> Json<Health> {
    health(probes).await
}

/// Alive, under Kubernetes' newer name
#[utoipa::path(get, path = "/livez", tag = "probes", responses((status = 200, body = Health)))]
async fn livez(probes: State<Probes>) -> Json<Health> {
    health(probes).await
}

/// Whether a task could be taken
#[utoipa::path(get, path = "/ready", tag = "probes", responses(
    (status = 200, description = "Ready", body = Ready),
    (status = 503, description = "Not ready", body = Ready),
))]
async fn ready(State(probes): State<Probes>) -> Response {
    let checks = (probes.readiness.0)().await;
    let (code, status) =
        if checks.ready() { (StatusCode::OK, "ready") } else { (StatusCode::SERVICE_UNAVAILABLE, "not ready") };
    let error = (!checks.ready()).then(|| checks.failing.join("; "));
    (code, Json(Ready { status, error, checks: checks.members() })).into_response()
}

/// Whether a task could be taken, under Kubernetes' name
#[utoipa::path(get, path = "/readyz", tag = "probes", responses(
    (status = 200, description = "Ready", body = Ready),
    (status = 503, description = "Not ready", body = Ready),
))]
async fn readyz(probes: State<Probes>) -> Response {
    ready(probes).await
}

/// Metrics for Prometheus
///
/// They need a credential only with `METRICS_AUTH=required`.
#[utoipa::path(get, path = "/metrics", tag = "probes", security(("bearer" = ["admin"])),
    responses((status = 200, description = "Text format 0.0.4", body = String, content_type = "text/plain")))]
async fn metrics(State(probes): State<Probes>) -> Result<Response, Problem> {
    let text = probes.metrics.render().map_err(Problem::internal)?;
    Ok(with_type("text/plain; version=0.0.4; charset=utf-8", text))
}

/// This document
#[utoipa::path(get, path = "/openapi.json", tag = "probes",
    responses((status = 200, description = "OpenAPI 3.1", content_type = "application/json")))]
async fn openapi_json(Extension(served): Extension<Served>) -> Response {
    with_type("application/json", served.json.to_string())
}

/// A page to read this document on, and the way to the pages for people
#[utoipa::path(get, path = "/docs", tag = "probes",
    responses((status = 200, description = "HTML", body = String, content_type = "text/html")))]
async fn docs_index(Extension(served): Extension<Served>) -> Response {
    html(docs::page(&served.json))
}

/// A page for people: guide, recipes, faq, troubleshooting, integration, operations
#[utoipa::path(get, path = "/docs/{page}", tag = "probes",
    params(("page" = String, Path, description = "The page's name")),
    responses(
        (status = 200, description = "HTML", body = String, content_type = "text/html"),
        (status = 404, description = "No such page", content_type = "application/problem+json", body = ProblemDocument),
    ))]
async fn docs_page(ApiPath(name): ApiPath<String>) -> Result<Response, Problem> {
    match pages::page(&name) {
        Some(page) => Ok(html(page)),
        None => {
            let names = pages::names().collect::<Vec<_>>().join(", ");
            Err(Problem::new(Code::NotFound, format!("There is no such page. The pages are: {names}.")))
        }
    }
}

fn html(page: String) -> Response {
    let mut response = with_type("text/html; charset=utf-8", page);
    let policy = HeaderName::from_static("content-security-policy");
    response.headers_mut().insert(policy, HeaderValue::from_static(pages::POLICY));
    response
}

fn with_type(content_type: &'static str, body: String) -> Response {
    ([(header::CONTENT_TYPE, HeaderValue::from_static(content_type))], body).into_response()
}
