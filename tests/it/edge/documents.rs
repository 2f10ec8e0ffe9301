//! Probes, metrics, the OpenAPI document and its page.

use super::{Server, Setup};
use serde_json::{Value, json};
use std::sync::atomic::Ordering;

#[tokio::test]
async fn probes_answer_without_a_credential() {
    let server = Server::start(Setup { secret: false, ..Setup::default() }).await;
    let get = |path: &str| server.client.get(server.url(path)).send();
    for path in ["/health", "/healthz", "/livez"] {
        let body: Value = get(path).await.unwrap().json().await.unwrap();
        assert_eq!(body["status"], "ok");
        assert_eq!(body["version"], env!("CARGO_PKG_VERSION"));
        assert!(body["uptime_seconds"].is_u64());
    }
    for path in ["/ready", "/readyz"] {
        server.ready.store(true, Ordering::Relaxed);
        let response = get(path).await.unwrap();
        assert_eq!(response.status(), 200);
        let body: Value = response.json().await.unwrap();
        assert_eq!(body["status"], "ready");
        assert_eq!(body["checks"]["sandbox"], json!({ "status": "degraded", "detail": "no cgroup" }));
        assert!(body.get("error").is_none());
        server.ready.store(false, Ordering::Relaxed);
        let response = get(path).await.unwrap();
        assert_eq!(response.status(), 503);
        let body: Value = response.json().await.unwrap();
        assert_eq!((body["status"].as_str(), body["error"].as_str()), (Some("not ready"), Some("database: no answer")));
        assert_eq!(body["checks"]["database"]["status"], "failed");
    }
    let response = get("/metrics").await.unwrap();
    assert_eq!(response.headers()["content-type"], "text/plain; version=0.0.4; charset=utf-8");
    let text = response.text().await.unwrap();
    let line = "opencode_sidecar_http_requests_total{method=\"GET\",route=\"/ready\",status=\"503\"} 1";
    assert!(text.lines().any(|l| l == line), "{text}");
    assert_eq!(server.client.head(server.url("/health")).send().await.unwrap().status(), 200);
    server.stop().await;
}

#[tokio::test]
async fn the_document_lists_each_route_and_the_page_shows_them() {
    let server = Server::start(Setup::default()).await;
    let document: Value = server.client.get(server.url("/openapi.json")).send().await.unwrap().json().await.unwrap();
    assert_eq!(document, server.document);
    assert_eq!(document["openapi"], "3.1.0");
    assert_eq!(document["info"]["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(document["components"]["securitySchemes"]["bearer"]["scheme"], "bearer");
    let problem = &document["components"]["responses"]["Problem"]["content"]["application/problem+json"]["schema"];
    assert_eq!(problem["$ref"], "#/components/schemas/ProblemDocument");
    for name in ["ProblemDocument", "FieldError", "Health", "Ready", "Echo", "Model"] {
        assert!(document["components"]["schemas"][name].is_object(), "{name}");
    }
    let probes = ["/health", "/healthz", "/livez", "/ready", "/readyz", "/metrics", "/openapi.json", "/docs"];
    let own = ["/busy", "/fails", "/flood", "/gate", "/panic", "/socket"];
    let mut want: Vec<_> = probes.iter().chain(&own).map(|path| format!("GET {path}")).collect();
    want.extend(
        ["POST /echo", "POST /maybe", "GET /things/{execution_id}", "GET /pairs/{execution_id}/{number}"]
            .map(str::to_owned),
    );
    want.sort();
    let mut got = server.operations.clone();
    got.sort();
    assert_eq!(got, want);
    for operation in &got {
        let (method, path) = operation.split_once(' ').unwrap();
        let described = &document["paths"][path][method.to_lowercase()];
        let security = if probes.contains(&path) { json!([]) } else { json!([{ "bearer": [] }]) };
        assert_eq!(described["security"], security, "{operation}");
        assert_eq!(described["responses"]["default"]["$ref"], "#/components/responses/Problem");
    }

    let response = server.client.get(server.url("/docs")).send().await.unwrap();
    assert!(response.headers()["content-security-policy"].to_str().unwrap().contains("default-src 'none'"));
    let page = response.text().await.unwrap();
    for operation in &got {
        assert!(page.contains(&format!("<code>{}</code>", operation.split_once(' ').unwrap().1)), "{operation}");
    }
    assert!(page.contains("id=\"schema-Echo\"") && page.contains("href=\"#schema-Echo\""));
    assert!(!page.contains("src=") && !page.contains("http://") && !page.contains("<script"));
    server.stop().await;
}
