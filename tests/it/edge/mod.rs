//! The HTTP edge on real sockets, around a small router of this test's own.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a helper of tests fails its test")]

mod access;
mod connections;
mod documents;
mod requests;
mod tokens;

use axum::extract::ws::{Message, WebSocketUpgrade};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use opencode_sidecar::api::auth::{Admission, Auth, AuthSettings, STREAM_PROTOCOL, Slowing};
use opencode_sidecar::api::extract::BodyLimits;
use opencode_sidecar::api::layers::EdgeLimits;
use opencode_sidecar::api::openapi::{Edge, Routes, assemble, operations_of};
use opencode_sidecar::api::probes::{Checks, Probes, Readiness};
use opencode_sidecar::api::server::{ConnectionSlot, ServerLimits, serve_with};
use opencode_sidecar::api::{ApiJson, ApiPath, ApiQuery, Code, OptionalApiJson, Problem};
use opencode_sidecar::model::ExecutionId;
use opencode_sidecar::secrets::{Source, Sources, TokenSource};
use opencode_sidecar::tasks::Tasks;
use opencode_sidecar::telemetry::Metrics;
use reqwest::{Client, RequestBuilder, StatusCode};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, Semaphore};
use tokio_util::sync::CancellationToken;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

const SECRET: &str = "the-shared-secret";
const PROJECT: &str = "the-project";
/// Long enough that no test ever reaches it; what is under test gets a short one.
const NEVER: Duration = Duration::from_secs(60);

#[derive(Debug, Deserialize, Serialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
struct Echo {
    name: String,
    model_config: Option<Model>,
}

#[derive(Debug, Deserialize, Serialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
struct Model {
    temperature: f64,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Page {
    limit: Option<u32>,
    after: Option<uuid::Uuid>,
}

/// What the handlers and the test tell each other.
#[derive(Clone, Debug)]
struct Gate {
    entered: Arc<Semaphore>,
    open: Arc<Notify>,
}

#[utoipa::path(post, path = "/echo", security(("bearer" = ["tasks:read"])), request_body = Echo, responses((status = 200, body = Echo)))]
async fn echo(ApiJson(body): ApiJson<Echo>) -> Json<Echo> {
    Json(body)
}

#[utoipa::path(post, path = "/maybe", security(("bearer" = ["tasks:read"])), responses((status = 200, body = bool)))]
async fn maybe(OptionalApiJson(body): OptionalApiJson<Echo>) -> Json<bool> {
    Json(body.is_some())
}

#[utoipa::path(get, path = "/things/{execution_id}", security(("bearer" = ["tasks:read"])), params(("execution_id" = ExecutionId, Path)),
    responses((status = 200, body = Value)))]
async fn thing(ApiPath(id): ApiPath<ExecutionId>, ApiQuery(page): ApiQuery<Page>) -> Json<Value> {
    Json(json!({ "id": id, "limit": page.limit, "after": page.after }))
}

#[utoipa::path(get, path = "/pairs/{execution_id}/{number}", security(("bearer" = ["tasks:read"])), params(("execution_id" = ExecutionId, Path), ("number" = u8, Path)),
    responses((status = 200, body = u8)))]
async fn pair(pair: ApiPath<(ExecutionId, u8)>) -> Json<u8> {
    Json(pair.0.1)
}

#[utoipa::path(get, path = "/panic", security(("bearer" = ["tasks:read"])), responses((status = 200)))]
async fn panics() -> Response {
    if std::hint::black_box(true) {
        panic!("on purpose, by a test");
    }
    StatusCode::OK.into_response()
}

#[utoipa::path(get, path = "/fails", security(("bearer" = ["tasks:read"])), responses((status = 200)))]
async fn fails() -> Result<Response, Problem> {
    Err(Problem::internal(std::io::Error::other("hidden")))
}

#[utoipa::path(get, path = "/busy", security(("bearer" = ["tasks:read"])), responses((status = 429)))]
async fn busy() -> Problem {
    Problem::new(Code::QueueFull, "The queue is full.").retry_after(3)
}

/// Answers when the gate opens.
#[utoipa::path(get, path = "/gate", security(("bearer" = ["tasks:read"])), responses((status = 200, body = String)))]
async fn wait_at_gate(Extension(gate): Extension<Gate>) -> &'static str {
    let opened = gate.open.notified();
    gate.entered.add_permits(1);
    opened.await;
    "through"
}

/// Far more than the socket's buffers hold.
#[utoipa::path(get, path = "/flood", security(("bearer" = ["tasks:read"])), responses((status = 200)))]
async fn flood() -> Vec<u8> {
    vec![b'x'; 64 << 20]
}

#[utoipa::path(get, path = "/socket", security(("bearer" = ["tasks:read"])), responses((status = 101)))]
async fn socket(
    Extension(admission): Extension<Admission>,
    Extension(slot): Extension<ConnectionSlot>,
    upgrade: WebSocketUpgrade,
) -> Response {
    let mut valid = !admission.is_open();
    if valid && let Err(problem) = admission.granted().await {
        return problem.into_response();
    }
    upgrade.protocols([STREAM_PROTOCOL]).on_upgrade(move |mut socket| async move {
        let _slot = slot;
        while let Some(Ok(Message::Text(text))) = socket.recv().await {
            valid |= admission.granted_to(&text).await.is_ok();
            if socket.send(Message::text(valid.to_string())).await.is_err() {
                return;
            }
        }
    })
}

struct Setup {
    secret: bool,
    tokens: Option<TokenSource>,
    auth_off: bool,
    metrics_auth: bool,
    slowing: Slowing,
    edge: EdgeLimits,
    server: ServerLimits,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            secret: true,
            tokens: None,
            auth_off: false,
            metrics_auth: false,
            // Not what is under test.
            slowing: Slowing { free: u32::MAX, ..Slowing::default() },
            edge: EdgeLimits { request: NEVER, body: BodyLimits { max_bytes: 1 << 20, deadline: NEVER } },
            server: ServerLimits {
                header_timeout: NEVER,
                idle: NEVER,
                stall: NEVER,
                drain: NEVER,
                ..ServerLimits::default()
            },
        }
    }
}

struct Server {
    address: SocketAddr,
    client: Client,
    tasks: Tasks,
    shutdown: CancellationToken,
    served: tokio::task::JoinHandle<usize>,
    gate: Gate,
    ready: Arc<AtomicBool>,
    operations: Vec<String>,
    document: Value,
}

impl Server {
    async fn start(setup: Setup) -> Self {
        let tasks = Tasks::new();
        let gate = Gate { entered: Arc::new(Semaphore::new(0)), open: Arc::new(Notify::new()) };
        let metrics = Metrics::new().unwrap();
        let sources =
            Sources { shared_secret: setup.secret.then(|| Source::Given(SECRET.into())), tokens: setup.tokens };
        let settings =
            AuthSettings { sources, project: PROJECT.to_owned(), off: setup.auth_off, slowing: setup.slowing };
        let auth = Auth::new(settings, metrics.clone()).unwrap();
        let ready = Arc::new(AtomicBool::new(true));
        let readiness = {
            let ready = Arc::clone(&ready);
            Readiness::new(move || {
                let ready = ready.load(Ordering::Relaxed);
                let checks = Checks::new().with("workspace", "ok", None).with("sandbox", "degraded", Some("no cgroup"));
                std::future::ready(if ready {
                    checks.with("database", "ok", None)
                } else {
                    checks.failing("database", "failed", Some("no answer"))
                })
            })
        };
        let probes = Probes { metrics, readiness };
        let protected = OpenApiRouter::new()
            .routes(routes!(echo))
            .routes(routes!(maybe))
            .routes(routes!(thing))
            .routes(routes!(pair))
            .routes(routes!(panics))
            .routes(routes!(fails))
            .routes(routes!(busy))
            .routes(routes!(wait_at_gate))
            .routes(routes!(flood))
            .layer(Extension(gate.clone()));
        let streams = OpenApiRouter::new().routes(routes!(socket));
        let edge = Edge { auth, probes, limits: setup.edge, metrics_auth: setup.metrics_auth };
        let (router, document) = assemble(&edge, Routes { protected, streams }).unwrap();

        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let shutdown = CancellationToken::new();
        let serving = serve_with(listener, router, tasks.clone(), shutdown.clone(), setup.server);
        let served = tasks.spawn("server", serving);
        let client = client().build().unwrap();
        let operations = operations_of(&document);
        let document = serde_json::to_value(document).unwrap();
        Self { address, client, tasks, shutdown, served, gate, ready, operations, document }
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    fn get(&self, path: &str) -> RequestBuilder {
        self.client.get(self.url(path)).bearer_auth(SECRET)
    }

    fn post(&self, path: &str, body: impl Into<reqwest::Body>) -> RequestBuilder {
        self.client.post(self.url(path)).bearer_auth(SECRET).header("content-type", "application/json").body(body)
    }

    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.unwrap()
    }

    /// Sends bytes on a connection of its own and reads to its end.
    async fn raw(&self, bytes: &[u8]) -> String {
        let mut stream = self.connect().await;
        // The server may have refused before all of it was sent.
        let _ = stream.write_all(bytes).await;
        read_to_end(&mut stream).await
    }

    /// Stops it, and holds it to leave nothing behind.
    async fn stop(self) {
        self.shutdown.cancel();
        drop(self.client);
        assert_eq!(self.served.await.unwrap(), 0);
        self.tasks.stop(NEVER).await.unwrap();
    }
}

fn client() -> reqwest::ClientBuilder {
    // The first test wins; the others find it installed.
    let _ = rustls::crypto::ring::default_provider().install_default();
    Client::builder().no_proxy()
}

async fn read_to_end(stream: &mut TcpStream) -> String {
    let mut got = Vec::new();
    // A reset is an end too.
    let _ = stream.read_to_end(&mut got).await;
    String::from_utf8_lossy(&got).into_owned()
}

/// Sends, and checks that the answer is a problem document of this code.
async fn problem(request: RequestBuilder, status: u16, code: &str) -> Value {
    let response = request.send().await.unwrap();
    assert_eq!(response.status().as_u16(), status, "{code}");
    assert_eq!(response.headers()["content-type"], "application/problem+json");
    assert_eq!(response.headers()["x-content-type-options"], "nosniff");
    assert_eq!(response.headers()["cache-control"], "no-store");
    let id = response.headers()["x-request-id"].to_str().unwrap().to_owned();
    let body: Value = response.json().await.unwrap();
    assert_eq!(body["code"], code, "{body}");
    assert_eq!(body["type"], format!("urn:opencode-sidecar:error:{code}"));
    assert_eq!(body["status"], status);
    assert_eq!(body["request_id"], id);
    assert_eq!(body["error"], body["detail"]);
    assert!(body["title"].is_string());
    assert!(body["timestamp"].as_str().unwrap().ends_with('Z'));
    body
}
