//! What is wrong with a request, and what surrounds every answer.

use super::{SECRET, Server, Setup, problem};
use opencode_sidecar::model::ExecutionId;
use serde_json::json;
use std::time::Duration;

#[tokio::test]
async fn bad_requests_get_a_problem_that_names_the_field() {
    let server = Server::start(Setup::default()).await;
    let good = server.post("/echo", r#"{"name":"x","model_config":{"temperature":1}}"#).send().await.unwrap();
    assert_eq!(good.status(), 200);

    let cases: [(&[u8], &str, Option<&str>); 9] = [
        (b"", "malformed_json", None),
        (b"{", "malformed_json", None),
        (b"not json", "malformed_json", None),
        (b"{\"name\":\"\xff\"}", "malformed_json", None),
        (b"{}", "invalid_field", Some("name")),
        (br#"{"name":1}"#, "invalid_field", Some("name")),
        (br#"{"name":"x","nmae":1}"#, "unknown_field", Some("nmae")),
        (br#"{"name":"x","model_config":{"temperature":"hot"}}"#, "invalid_field", Some("model_config.temperature")),
        (br#"{"name":"x","name":"y"}"#, "invalid_field", Some("name")),
    ];
    for (body, code, field) in cases {
        let got = problem(server.post("/echo", body), 400, code).await;
        assert_eq!(got["details"]["field"].as_str(), field, "{got}");
        assert!(!got.to_string().contains("hot"), "{got}");
    }
    problem(server.post("/echo", "[".repeat(100_000)), 400, "invalid_field").await;
    let nested = format!(r#"{{"name":"x","model_config":{}"#, "[".repeat(100_000));
    problem(server.post("/echo", nested), 400, "invalid_field").await;

    let got = problem(server.get("/things/not-a-uuid"), 400, "invalid_field").await;
    assert_eq!(got["details"], json!({ "field": "execution_id", "reason": "must be a UUID" }));
    let id = ExecutionId::new();
    assert_eq!(server.get(&format!("/things/{id}?limit=5")).send().await.unwrap().status(), 200);
    let got = problem(server.get(&format!("/pairs/{id}/256")), 400, "invalid_field").await;
    assert_eq!(got["details"]["field"], "number");
    let got = problem(server.get(&format!("/pairs/{id}/%ff")), 400, "invalid_field").await;
    assert_eq!(got["details"]["field"], "number");
    for (query, code, field) in [
        ("limit=x", "invalid_field", "limit"),
        ("limit=-1", "invalid_field", "limit"),
        ("after=x", "invalid_field", "after"),
        ("limit=1&limit=2", "invalid_field", "limit"),
        ("nope=1", "unknown_field", "nope"),
    ] {
        let got = problem(server.get(&format!("/things/{id}?{query}")), 400, code).await;
        assert_eq!(got["details"]["field"], field, "{got}");
    }
    server.stop().await;
}

#[tokio::test]
async fn a_body_must_say_that_it_is_json() {
    let server = Server::start(Setup::default()).await;
    for (content_type, status) in [
        ("application/json", 200),
        ("Application/JSON; charset=UTF-8", 200),
        ("application/vnd.x+json", 200),
        ("application/json; charset=latin1", 415),
        ("text/plain", 415),
        ("application/x-www-form-urlencoded", 415),
        ("text/json+json", 415),
    ] {
        let request = server.client.post(server.url("/echo")).bearer_auth(SECRET);
        let response = request.header("content-type", content_type).body(r#"{"name":"x"}"#).send().await.unwrap();
        assert_eq!(response.status(), status, "{content_type}");
    }
    let untyped = server.client.post(server.url("/echo")).bearer_auth(SECRET).body("{}");
    problem(untyped, 415, "unsupported_media_type").await;
    problem(server.post("/echo", "{}").header("content-encoding", "gzip"), 415, "unsupported_media_type").await;

    let maybe = |body: &'static str| server.post("/maybe", body);
    assert_eq!(
        server.client.post(server.url("/maybe")).bearer_auth(SECRET).send().await.unwrap().text().await.unwrap(),
        "false"
    );
    assert_eq!(maybe(r#"{"name":"x"}"#).send().await.unwrap().text().await.unwrap(), "true");
    problem(maybe("{"), 400, "malformed_json").await;
    server.stop().await;
}

#[tokio::test]
async fn a_body_has_a_limit() {
    let mut setup = Setup::default();
    setup.edge.body.max_bytes = 100;
    let server = Server::start(setup).await;
    let body = |length: usize| format!(r#"{{"name":"{}"}}"#, "x".repeat(length - 11));
    assert_eq!(server.post("/echo", body(100)).send().await.unwrap().status(), 200);
    for length in [101, 1_000_000] {
        let got = problem(server.post("/echo", body(length)), 413, "body_too_large").await;
        assert!(got["detail"].as_str().unwrap().contains("100 bytes"), "{got}");
    }
    // Without an announced length.
    let chunks = futures_util::stream::iter((0..50).map(move |_| Ok::<_, std::io::Error>(body(100))));
    problem(server.post("/echo", reqwest::Body::wrap_stream(chunks)), 413, "body_too_large").await;
    // Announced, and far too large: refused before a byte of it is sent.
    let head = format!(
        "POST /echo HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {SECRET}\r\ncontent-type: application/json\r\n\
         content-length: 99999999999\r\nconnection: close\r\n\r\n"
    );
    assert!(server.raw(head.as_bytes()).await.starts_with("HTTP/1.1 413 "));
    server.stop().await;
}

#[tokio::test]
async fn panics_and_inner_errors_say_nothing_internal() {
    let server = Server::start(Setup::default()).await;
    for path in ["/panic", "/fails"] {
        let got = problem(server.get(path), 500, "internal").await.to_string();
        assert!(!got.contains("purpose") && !got.contains("hidden"), "{got}");
    }
    // The server is none the worse for it.
    assert_eq!(server.get("/health").send().await.unwrap().status(), 200);
    server.stop().await;
}

#[tokio::test]
async fn unknown_paths_and_wrong_methods_are_problems_too() {
    let server = Server::start(Setup::default()).await;
    problem(server.get("/nope"), 404, "not_found").await;
    problem(server.client.get(server.url("/nope")), 404, "not_found").await;
    for (path, allow) in [("/echo", "POST"), ("/health", "GET,HEAD"), ("/socket", "GET,HEAD")] {
        let delete = || server.client.delete(server.url(path)).bearer_auth(SECRET);
        problem(delete(), 405, "method_not_allowed").await;
        assert_eq!(delete().send().await.unwrap().headers()["allow"], allow);
    }
    // Who may not in does not learn the methods either.
    problem(server.client.delete(server.url("/echo")), 401, "unauthorized").await;
    let busy = server.get("/busy").send().await.unwrap();
    assert_eq!((busy.status().as_u16(), busy.headers()["retry-after"].to_str().unwrap()), (429, "3"));
    server.stop().await;
}

#[tokio::test]
async fn a_slow_answer_is_cut_but_waits_as_long_as_the_caller_prefers() {
    let mut setup = Setup::default();
    setup.edge.request = Duration::from_millis(20);
    let server = Server::start(setup).await;
    problem(server.get("/gate"), 503, "unavailable").await;
    server.gate.entered.acquire().await.unwrap().forget();
    let patient = server.tasks.spawn("client", server.get("/gate").header("prefer", "wait=60").send());
    server.gate.entered.acquire().await.unwrap().forget();
    // This one comes after it and is cut: by then the patient one would have been cut too.
    problem(server.get("/gate"), 503, "unavailable").await;
    server.gate.open.notify_waiters();
    assert_eq!(patient.await.unwrap().unwrap().status(), 200);
    server.stop().await;
}

#[tokio::test]
async fn request_ids_are_taken_over_or_made() {
    let server = Server::start(Setup::default()).await;
    let id = |given: Option<&'static str>| {
        let request = server.client.get(server.url("/health"));
        let request = if let Some(given) = given { request.header("x-request-id", given) } else { request };
        async move { request.send().await.unwrap().headers()["x-request-id"].to_str().unwrap().to_owned() }
    };
    assert_eq!(id(Some("trace-1.a_B")).await, "trace-1.a_B");
    for unfit in [None, Some("has space"), Some("semi;colon")] {
        assert_eq!(id(unfit).await.parse::<uuid::Uuid>().unwrap().get_version_num(), 7);
    }
    let got = problem(server.get("/nope").header("x-request-id", "mine"), 404, "not_found").await;
    assert_eq!(got["request_id"], "mine");
    server.stop().await;
}
