//! Every route of the document, with every kind of credential that must not open it, and with those that must.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test's own helpers fail like the test")]

use crate::support::mint::{Signer, but, claims, in_seconds};
use crate::support::sidecar::{Sidecar, World, answer, soon};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use reqwest::Method;
use serde_json::{Value, json};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::atomic::{AtomicU32, Ordering};
use tokio_tungstenite::tungstenite::protocol::Role;

const KEY: &str = "a-key-of-thirty-two-bytes-or-more";
const PROJECT: &str = "the-project";

/// What each route needs, written down a second time: a route that is not here, or is not what stands here, fails.
const NEEDED: &[(&str, &str)] = &[
    ("GET /docs", ""),
    ("GET /docs/{page}", ""),
    ("GET /health", ""),
    ("GET /healthz", ""),
    ("GET /livez", ""),
    ("GET /metrics", "admin"),
    ("GET /openapi.json", ""),
    ("GET /ready", ""),
    ("GET /readyz", ""),
    ("DELETE /session/{session_id}", "tasks:control"),
    ("GET /session", "tasks:read"),
    ("GET /session/{session_id}", "tasks:read"),
    ("GET /session/{session_id}/events", "tasks:read"),
    ("GET /session/{session_id}/pty/connect", "tasks:control"),
    ("POST /session", "tasks:execute"),
    ("POST /session/{session_id}/prompt", "tasks:execute"),
    ("DELETE /sessions/{session_id}", "tasks:control"),
    ("GET /sessions", "tasks:read"),
    ("GET /sessions/{session_id}", "tasks:read"),
    ("GET /sessions/{session_id}/status", "tasks:read"),
    ("GET /sessions/{session_id}/stream", "tasks:read"),
    ("GET /sessions/{session_id}/terminal", "tasks:control"),
    ("POST /sessions", "tasks:execute"),
    ("POST /sessions/{session_id}/messages", "tasks:execute"),
    ("POST /sessions/{session_id}/stop", "tasks:control"),
    ("DELETE /tasks/{execution_id}", "tasks:control"),
    ("GET /tasks", "tasks:read"),
    ("GET /tasks/{execution_id}", "tasks:read"),
    ("GET /tasks/{execution_id}/diff", "files:read"),
    ("GET /tasks/{execution_id}/events", "tasks:read"),
    ("GET /tasks/{execution_id}/files", "files:read"),
    ("GET /tasks/{execution_id}/files/content", "files:read"),
    ("GET /tasks/{execution_id}/output", "files:read"),
    ("GET /tasks/{execution_id}/status", "tasks:read"),
    ("GET /tasks/{execution_id}/stream", "tasks:read"),
    ("POST /tasks/execute", "tasks:execute"),
    ("POST /tasks/{execution_id}/cancel", "tasks:control"),
    ("POST /tasks/{execution_id}/stream-token", "tasks:read"),
];
/// Those that a WebSocket opens.
const SOCKETS: &[&str] =
    &["/tasks/{execution_id}/stream", "/sessions/{session_id}/terminal", "/session/{session_id}/pty/connect"];
const SCOPES: [&str; 5] = ["tasks:read", "tasks:execute", "tasks:control", "files:read", "admin"];

/// Method and path of an operation, with what it needs by the document.
fn operations(document: &Value) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for (path, item) in document["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap().iter().filter(|(_, o)| o["responses"].is_object()) {
            let security = operation["security"].as_array().expect("each operation says what it needs");
            let scope = security.first().map_or("", |needs| needs["bearer"][0].as_str().unwrap());
            found.push((format!("{} {path}", method.to_uppercase()), scope.to_owned()));
        }
    }
    found.sort();
    found
}

/// Sends from an address that nobody has failed from, so that nothing is slowed. Nothing that is sent can do anything: no
/// body is one, and nothing has these ids.
async fn send(sidecar: &Sidecar, operation: &str, token: Option<&str>) -> (u16, Value) {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let address = Ipv4Addr::from_bits(0x7f01_0000 + NEXT.fetch_add(1, Ordering::Relaxed));
    let client =
        reqwest::Client::builder().no_proxy().tls_certs_only([]).local_address(IpAddr::V4(address)).build().unwrap();
    let (method, path) = operation.split_once(' ').unwrap();
    let path = path.replace("{page}", "guide").replace("{execution_id}", ID).replace("{session_id}", ID);
    let mut request = client.request(method.parse::<Method>().unwrap(), format!("{}{path}", sidecar.base));
    if let Some(token) = token {
        request = request.bearer_auth(token);
    }
    answer(soon(operation, request.send()).await.unwrap()).await
}

const ID: &str = "0197c3a0-0000-7000-8000-0000000000e1";

/// What has to be refused everywhere, by name, with the status.
fn bad(secret: &str) -> Vec<(&'static str, Option<String>, u16)> {
    let signer = Signer::hmac(KEY);
    let all = claims(PROJECT, &SCOPES.join(" "));
    let changed = |changes: Value| Some(signer.token(&but(&all, changes)));
    let header = |header: Value| Some(signer.token_with(&header, &all));
    let foreign = |signer: Signer| Some(signer.token(&all));
    vec![
        ("none", None, 401),
        ("bad", Some("wrong".to_owned()), 401),
        ("longer than the secret", Some(format!("{secret}x")), 401),
        ("a beginning of the secret", Some(secret[..secret.len() - 1].to_owned()), 401),
        ("the key of tokens", Some(KEY.to_owned()), 401),
        ("expired", changed(json!({ "exp": in_seconds(-1) })), 401),
        ("without an end", changed(json!({ "exp": null })), 401),
        ("for another audience", changed(json!({ "aud": "opencode-backend" })), 401),
        ("for no audience", changed(json!({ "aud": null })), 401),
        ("of another project", changed(json!({ "project_id": "another" })), 401),
        ("of no project", changed(json!({ "project_id": null })), 401),
        ("not signed", Some(Signer::Nobody.token(&all)), 401),
        ("signed with another key", foreign(Signer::hmac("another-key-of-thirty-two-bytes-or")), 401),
        ("signed with the shared secret", foreign(Signer::hmac(secret)), 401),
        ("signed with RSA", foreign(Signer::rsa()), 401),
        ("of another algorithm by its header", header(json!({ "alg": "HS512" })), 401),
        ("of no algorithm by its header", header(json!({ "alg": "none" })), 401),
        ("with all scopes but no scope", changed(json!({ "scope": null, "scopes": SCOPES })), 401),
        ("without a scope", changed(json!({ "scope": "" })), 403),
        ("of another execution", changed(json!({ "execution_id": uuid::Uuid::now_v7() })), 403),
    ]
}

#[tokio::test]
async fn every_route_is_closed_to_all_but_its_scope() {
    let world = World::new().await;
    let set = [("JWT_SECRET", KEY), ("PROJECT_ID", PROJECT), ("METRICS_AUTH", "required")];
    let mut sidecar = world.start(&set).await;
    let document = sidecar.get("/openapi.json").await;
    let mut needed: Vec<_> = NEEDED.iter().map(|(o, scope)| ((*o).to_owned(), (*scope).to_owned())).collect();
    needed.sort();
    assert_eq!(operations(&document), needed);

    let signer = Signer::hmac(KEY);
    let bad = bad(&sidecar.secret);
    for (operation, scope) in NEEDED {
        let code = |status: u16| if status == 401 { "unauthorized" } else { "forbidden" };
        if scope.is_empty() {
            for token in [None, Some("wrong")] {
                let (status, _) = send(&sidecar, operation, token).await;
                assert!(status == 200 || status == 503, "{operation}: {status}");
            }
            continue;
        }
        for (name, token, want) in &bad {
            let (status, body) = send(&sidecar, operation, token.as_deref()).await;
            assert_eq!((status, body["code"].as_str()), (*want, Some(code(*want))), "{operation}, {name}: {body}");
            assert_eq!(
                (body["status"].as_u64(), body["error"].as_str()),
                (Some((*want).into()), body["detail"].as_str())
            );
            assert!(token.as_deref().is_none_or(|token| !body.to_string().contains(token)), "{operation}, {name}");
        }
        // All scopes but this one.
        let others: Vec<_> = SCOPES.into_iter().filter(|other| other != scope).collect();
        let token = signer.token(&claims(PROJECT, &others.join(" ")));
        let (status, body) = send(&sidecar, operation, Some(&token)).await;
        assert_eq!((status, body["code"].as_str()), (403, Some("forbidden")), "{operation}: {body}");
        assert!(body["detail"].as_str().unwrap().contains(scope), "{operation}: {body}");
        // This one and no other; the same for the execution that it is about; and the secret.
        let own = signer.token(&claims(PROJECT, scope));
        let narrow = signer.token(&but(&claims(PROJECT, scope), json!({ "execution_id": ID })));
        for (token, lets_in) in [(&own, true), (&narrow, operation.contains("{execution_id}")), (&sidecar.secret, true)]
        {
            let (status, body) = send(&sidecar, operation, Some(token)).await;
            assert_eq!(![401, 403].contains(&status), lets_in, "{operation}: {status} {body}");
        }
        let head = operation.replace("GET ", "HEAD ");
        if head != *operation {
            assert_eq!(send(&sidecar, &head, None).await.0, 401, "{head}");
        }
    }
    // Whoever may not in learns no methods; a narrow token no other path.
    assert_eq!(send(&sidecar, "PATCH /tasks", None).await.0, 401);
    assert_eq!(send(&sidecar, "PATCH /tasks", Some(&sidecar.secret)).await.0, 405);

    // Nothing of it is in the log, and all of it is counted.
    let log = sidecar.log_so_far();
    for token in bad.iter().filter_map(|(_, token, _)| token.as_deref()).filter(|token| token.len() > 10) {
        let part = token.rsplit('.').next().filter(|part| part.len() > 10).unwrap_or(token);
        assert!(log.iter().all(|line| !line.contains(part)), "a credential is in the log");
    }
    assert!(log.iter().any(|line| line.contains("a credential was refused") && line.contains("127.1.")));
    let (_, metrics) = sidecar.send(Method::GET, "/metrics", None).await;
    for why in ["missing", "invalid", "expired", "elsewhere", "scope"] {
        let begins = format!("opencode_sidecar_auth_refused_total{{why=\"{why}\"}} ");
        let line = metrics.as_str().unwrap().lines().find_map(|line| line.strip_prefix(&begins)).unwrap();
        assert!(line.parse::<u32>().unwrap() > 20, "{why}: {line}");
    }
    sidecar.stop().await;
}

/// A socket has no status: it is upgraded, and closed with a code.
#[tokio::test]
async fn every_socket_is_closed_to_all_but_its_scope() {
    let world = World::new().await;
    let sidecar = world.start(&[("JWT_SECRET", KEY), ("PROJECT_ID", PROJECT)]).await;
    let signer = Signer::hmac(KEY);
    for path in SOCKETS {
        let operation = format!("GET {path}");
        let scope = NEEDED.iter().find(|(known, _)| *known == operation).unwrap().1;
        let others: Vec<_> = SCOPES.into_iter().filter(|other| *other != scope).collect();
        let mut tokens = bad(&sidecar.secret);
        tokens.push(("with all other scopes", Some(signer.token(&claims(PROJECT, &others.join(" ")))), 403));
        // There is none of this id: the credential is good.
        tokens.push(("good", Some(signer.token(&claims(PROJECT, scope))), 404));
        tokens.push(("the secret", Some(sidecar.secret.clone()), 404));
        for (name, token, want) in &tokens {
            let Some(token) = token else { continue };
            for way in [Way::Header, Way::Subprotocol, Way::FirstFrame] {
                let code =
                    closed(&sidecar, &path.replace("{execution_id}", ID).replace("{session_id}", ID), token, way).await;
                assert_eq!(code, 4000 + want, "{path}, {name}, {way:?}");
            }
        }
    }
    sidecar.stop().await;
}

#[derive(Clone, Copy, Debug)]
enum Way {
    Header,
    Subprotocol,
    FirstFrame,
}

/// The code that a socket is closed with; it comes from an address of its own.
async fn closed(sidecar: &Sidecar, path: &str, token: &str, way: Way) -> u16 {
    use futures_util::SinkExt;
    use tokio_tungstenite::tungstenite::Message;
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let address = Ipv4Addr::from_bits(0x7f02_0000 + NEXT.fetch_add(1, Ordering::Relaxed));
    let client =
        reqwest::Client::builder().no_proxy().tls_certs_only([]).local_address(IpAddr::V4(address)).build().unwrap();
    let mut request = client
        .get(format!("{}{path}", sidecar.base))
        .header("connection", "upgrade")
        .header("upgrade", "websocket")
        .header("sec-websocket-version", "13")
        .header("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ==");
    match way {
        Way::Header => request = request.bearer_auth(token),
        Way::Subprotocol => {
            let offered = format!("opencode.stream.v1, bearer.{}", URL_SAFE_NO_PAD.encode(token));
            request = request.header("sec-websocket-protocol", offered);
        }
        Way::FirstFrame => {}
    }
    let answer = soon(path, request.send()).await.unwrap();
    assert_eq!(answer.status(), 101);
    let upgraded = answer.upgrade().await.unwrap();
    let mut socket = tokio_tungstenite::WebSocketStream::from_raw_socket(upgraded, Role::Client, None).await;
    if matches!(way, Way::FirstFrame) {
        socket.send(Message::text(json!({ "type": "auth", "token": token }).to_string())).await.unwrap();
    }
    use futures_util::StreamExt;
    loop {
        match soon("the end of a socket", socket.next()).await.unwrap().unwrap() {
            Message::Close(close) => return close.unwrap().code.into(),
            // A terminal says first why there is none.
            Message::Text(_) | Message::Ping(_) => {}
            other => panic!("{other:?}"),
        }
    }
}
