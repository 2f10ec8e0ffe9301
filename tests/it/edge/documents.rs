//! Probes, metrics, the OpenAPI document and its page.

use super::{Server, Setup, problem};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
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
    let probes =
        ["/health", "/healthz", "/livez", "/ready", "/readyz", "/metrics", "/openapi.json", "/docs", "/docs/{page}"];
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
        let security = if probes.contains(&path) { json!([]) } else { json!([{ "bearer": ["tasks:read"] }]) };
        assert_eq!(described["security"], security, "{operation}");
        assert_eq!(described["responses"]["default"]["$ref"], "#/components/responses/Problem");
    }

    let page = read(&server, "/docs").await;
    for operation in &got {
        assert!(page.contains(&format!("<code>{}</code>", operation.split_once(' ').unwrap().1)), "{operation}");
    }
    assert!(page.contains("id=\"schema-Echo\"") && page.contains("href=\"#schema-Echo\""));
    server.stop().await;
}

/// A page, after a look at what holds for each: readable without a credential, and nothing in it from elsewhere.
async fn read(server: &Server, path: &str) -> String {
    let response = server.client.get(server.url(path)).send().await.unwrap();
    assert_eq!(response.status(), 200, "{path}");
    assert_eq!(response.headers()["content-type"], "text/html; charset=utf-8");
    assert_eq!(
        response.headers()["content-security-policy"],
        "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    );
    let page = response.text().await.unwrap();
    for foreign in ["<script", "<link", "<img", "<iframe", " src=", "url(", "@import"] {
        assert!(!page.contains(foreign), "{path} has {foreign}");
    }
    assert_eq!(page.matches("aria-current=page").count(), 1, "{path} says where one is");
    page
}

fn attributes<'a>(page: &'a str, name: &str) -> Vec<&'a str> {
    let begins = format!(" {name}=\"");
    page.split(&begins).skip(1).map(|rest| rest.split('"').next().unwrap()).collect()
}

#[tokio::test]
async fn each_page_is_served_and_every_link_leads_somewhere() {
    let server = Server::start(Setup { secret: false, ..Setup::default() }).await;
    let files = std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs")).unwrap();
    let names = files.map(|file| file.unwrap().path().file_stem().unwrap().to_str().unwrap().to_owned());
    let paths: Vec<_> = names.map(|name| format!("/docs/{name}")).chain(["/docs".to_owned()]).collect();
    let mut pages = BTreeMap::new();
    for path in &paths {
        pages.insert(path.as_str(), read(&server, path).await);
    }
    for (path, page) in &pages {
        let anchors = attributes(page, "id");
        let unique: BTreeSet<_> = anchors.iter().collect();
        assert_eq!(unique.len(), anchors.len(), "{path} has an anchor twice: {anchors:?}");
        let links = attributes(page, "href");
        for other in &paths {
            assert!(links.contains(&other.as_str()), "{path} does not lead to {other}");
        }
        // Schemas: the routes of this test name some that they do not bring.
        let elsewhere = |link: &str| ["/openapi.json", "https://", "#schema-"].iter().any(|l| link.starts_with(l));
        for link in links.into_iter().filter(|link| !elsewhere(link)) {
            let (to, anchor) = link.split_once('#').unwrap_or((link, ""));
            let to = if to.is_empty() { path } else { to };
            let page = pages.get(to).unwrap_or_else(|| panic!("{path}: {link}: no such page"));
            assert!(anchor.is_empty() || attributes(page, "id").contains(&anchor), "{path}: {link}: no such anchor");
        }
    }
    for unknown in ["/docs/nothing", "/docs/guide.md", "/docs/..%2Fguide"] {
        let got = problem(server.client.get(server.url(unknown)), 404, "not_found").await;
        assert!(got["detail"].as_str().unwrap().contains("guide, recipes"), "{got}");
    }
    server.stop().await;
}
