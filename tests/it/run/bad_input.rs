//! What arrives broken gets a problem document that names the field, and a neighbour's run is not disturbed.

use crate::support::sidecar::{World, answer};
use opencode_sidecar::scripted::Script;
use reqwest::Method;
use serde_json::{Value, json};

#[tokio::test]
async fn every_bad_request_is_answered_and_no_neighbour_disturbed() {
    let world = World::new().await;
    let sidecar = world.start(&[("MAX_PROMPT_LENGTH", "2000")]).await;
    let neighbour = sidecar
        .submit(&Script::new().bash("echo on; until [ -e gate ]; do sleep 0.02; done; seq 1 1000").text("fine"))
        .await;
    sidecar.stream(&neighbour, 0).await.until("work", |e| e["type"] == "stdout").await;

    let id = uuid::Uuid::new_v4().to_string();
    let good = json!({ "task_id": id, "prompt": "x" });
    let with = |name: &str, value: Value| {
        let mut body = good.clone();
        body[name] = value;
        body.to_string()
    };
    let nested = format!(
        "{{\"task_id\":\"{id}\",\"prompt\":\"x\",\"metadata\":{}{}}}",
        "[".repeat(100_000),
        "]".repeat(100_000)
    );
    let bodies: Vec<(&str, String, u16, &str, Option<&str>)> = vec![
        ("not JSON", "{task_id".into(), 400, "malformed_json", None),
        ("empty", String::new(), 400, "malformed_json", None),
        ("not UTF-8 text", "\u{fffd}".into(), 400, "malformed_json", None),
        ("wrong type", with("prompt", json!(7)), 400, "invalid_field", Some("prompt")),
        (
            "wrong type, deep",
            with("model_config", json!({ "provider": "custom", "model": "m", "temperature": "hot" })),
            400,
            "invalid_field",
            Some("model_config.temperature"),
        ),
        ("unknown field", with("promt", json!("x")), 400, "unknown_field", Some("promt")),
        ("no task_id", json!({ "prompt": "x" }).to_string(), 400, "invalid_field", Some("task_id")),
        ("bad UUID", with("task_id", json!("42")), 400, "invalid_field", Some("task_id")),
        ("no prompt", json!({ "task_id": id }).to_string(), 400, "invalid_field", Some("prompt")),
        ("prompt too long", with("prompt", json!("x".repeat(2001))), 400, "invalid_field", Some("prompt")),
        ("workdir outside", with("workdir", json!("../..")), 400, "invalid_field", Some("workdir")),
        ("workdir through a link", with("workdir", json!("link/x")), 400, "invalid_field", Some("workdir")),
        ("unknown session", with("session_id", json!(id)), 404, "not_found", Some("session_id")),
        (
            "not yet possible",
            with("limits", json!({ "memory_bytes": 1 })),
            400,
            "invalid_field",
            Some("limits.memory_bytes"),
        ),
        ("body too large", with("metadata", json!("x".repeat(2 << 20))), 413, "body_too_large", None),
        ("100,000 nested brackets", nested, 400, "malformed_json", None),
    ];
    std::os::unix::fs::symlink("/", world.file("link")).unwrap();
    let url = format!("{}/tasks/execute", sidecar.base);
    for (what, body, status, code, field) in bodies {
        let request = sidecar.http.post(&url).bearer_auth(&sidecar.secret).header("content-type", "application/json");
        let response = request.body(body).send().await.unwrap();
        assert_eq!(response.headers()["content-type"], "application/problem+json", "{what}");
        let (got, problem) = answer(response).await;
        assert_eq!((got, problem["code"].as_str().unwrap()), (status, code), "{what}: {problem:#}");
        if field.is_some() {
            assert_eq!(problem["details"]["field"].as_str(), field, "{what}: {problem:#}");
        }
        assert!(problem["error"].as_str().is_some_and(|e| !e.is_empty()) && problem["request_id"].is_string());
    }

    let plain = sidecar.http.post(&url).bearer_auth(&sidecar.secret).header("content-type", "text/plain");
    assert_eq!(answer(plain.body(good.to_string()).send().await.unwrap()).await.0, 415);
    let others = [
        (Method::PUT, "/tasks/execute".to_owned(), 405),
        (Method::GET, "/tasks/42".to_owned(), 400),
        (Method::GET, format!("/tasks/{}", id.replace('-', "")), 400),
        (Method::GET, format!("/tasks/{id}"), 404),
        (Method::GET, format!("/tasks/{neighbour}/events?after=-1"), 400),
        (Method::GET, format!("/tasks/{neighbour}/events?limit=0"), 400),
        (Method::GET, format!("/tasks/{neighbour}/events?type=sound"), 400),
        (Method::GET, format!("/tasks/{neighbour}/events?befor=1"), 400),
        (Method::GET, format!("/tasks/{neighbour}/output?ansi=maybe"), 400),
        (Method::GET, "/tasks?cursor=abc".to_owned(), 400),
        (Method::GET, "/tasks?status=done".to_owned(), 400),
        (Method::GET, "/tasks?from=yesterday".to_owned(), 400),
        (Method::POST, format!("/tasks/{id}/cancel"), 404),
        (Method::GET, "/nothing".to_owned(), 404),
    ];
    for (method, path, status) in others {
        let (got, problem) = sidecar.send(method.clone(), &path, None).await;
        assert_eq!(got, status, "{method} {path}: {problem:#}");
        assert_eq!(problem["type"], format!("urn:opencode-sidecar:error:{}", problem["code"].as_str().unwrap()));
    }

    std::fs::write(world.file("gate"), "").unwrap();
    let events = sidecar.follow(&neighbour).await;
    assert_eq!(events.last().unwrap()["data"]["status"], "completed");
    let history = sidecar.get("/tasks").await;
    assert_eq!(history["executions"].as_array().unwrap().len(), 1, "nothing of it was taken in");
    sidecar.stop().await;
}

/// Every route of the document that is not a probe refuses whoever has no credential, or a wrong one.
#[tokio::test]
async fn every_route_wants_a_credential() {
    let world = World::new().await;
    let sidecar = world.start(&[]).await;
    let document: Value =
        sidecar.http.get(format!("{}/openapi.json", sidecar.base)).send().await.unwrap().json().await.unwrap();
    let mut protected = 0;
    for (path, item) in document["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap() {
            let open = operation["security"] == json!([]);
            let url = format!("{}{}", sidecar.base, path.replace("{execution_id}", &uuid::Uuid::now_v7().to_string()));
            let method = Method::from_bytes(method.to_uppercase().as_bytes()).unwrap();
            for token in [None, Some("wrong"), Some("")] {
                let mut request = sidecar.http.request(method.clone(), &url);
                if let Some(token) = token {
                    request = request.bearer_auth(token);
                }
                let (status, body) = answer(request.send().await.unwrap()).await;
                assert_eq!(status == 401, !open, "{method} {path}: {status} {body}");
            }
            protected += usize::from(!open);
        }
    }
    assert!(protected >= 9, "{protected}");
    sidecar.stop().await;
}
