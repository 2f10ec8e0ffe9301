//! A model that fails in every way: each run ends as failed with a typed error, none hangs, none is `completed`.

#![allow(clippy::unwrap_used, reason = "a test's own helpers fail like the test")]

use crate::support::sidecar::World;
use opencode_sidecar::scripted::Script;
use serde_json::{Value, json};

/// A script whose model fails like this at each answer.
fn failing(step: Value) -> Script {
    Script::new().json(step).unwrap()
}

#[tokio::test]
async fn every_fault_of_a_provider_is_a_typed_failure() {
    let world = World::new().await;
    let sidecar = world
        .start(&[
            ("MAX_CONCURRENT_TASKS", "3"),
            ("MODEL_MAX_FAILURES", "2"),
            ("MODEL_HEADER_TIMEOUT", "2"),
            ("MODEL_IDLE_TIMEOUT", "2"),
        ])
        .await;
    let cases = [
        (json!({ "status": 401 }), "model_auth"),
        (json!({ "status": 403 }), "model_auth"),
        (json!({ "status": 400 }), "model_rejected"),
        (json!({ "status": 429, "headers": { "retry-after": "1" } }), "model_rate_limited"),
        (json!({ "status": 500 }), "model_unavailable"),
        (json!({ "garbage": true }), "model_bad_response"),
        (json!({ "garbage": "sse" }), "model_bad_response"),
        (json!({ "silence": "headers" }), "model_timeout"),
        (json!({ "silence": "body" }), "model_timeout"),
        (json!({ "text": "half an", "cut": "text" }), "model_cut"),
        (
            json!({ "tools": [{ "name": "write", "args": { "filePath": "x", "content": "y".repeat(200) } }], "cut": "tool" }),
            "model_cut",
        ),
        (json!({ "text": "no end", "no_finish": true }), "model_unfinished"),
    ];
    let mut runs = Vec::new();
    for (step, code) in cases {
        runs.push((sidecar.submit(&failing(step.clone())).await, step, code));
    }
    for (id, step, code) in runs {
        let events = sidecar.follow(&id).await;
        let complete = &events.last().unwrap()["data"];
        assert_eq!(
            (&complete["status"], &complete["reason"]),
            (&json!("failed"), &json!("model_error")),
            "{step}: {events:#?}"
        );
        let fatal: Vec<_> = events.iter().filter(|e| e["type"] == "error" && e["data"]["fatal"] == true).collect();
        assert_eq!(fatal.len(), 1, "{step}: {events:#?}");
        assert_eq!(fatal[0]["data"]["code"], code, "{step}: {}", fatal[0]);
        if code == "model_rate_limited" {
            assert_eq!(fatal[0]["data"]["retry_after"], 1);
        }
        let calls = complete["usage"]["model_calls"].as_u64().unwrap();
        assert!((1..=3).contains(&calls), "{step}: {calls} calls");
    }
    assert!(world.model.calls() < 40, "{} calls reached the model", world.model.calls());
    sidecar.stop().await;
}

#[tokio::test]
async fn a_fault_that_passes_is_retried_and_told() {
    let world = World::new().await;
    let sidecar = world.start(&[]).await;
    let script = Script::new().json(json!({ "status": 503, "times": 1, "text": "After all." })).unwrap();
    let events = sidecar.follow(&sidecar.submit(&script).await).await;
    let complete = &events.last().unwrap()["data"];
    assert_eq!(complete["status"], "completed", "{events:#?}");
    assert_eq!(complete["usage"]["model_calls"], 2);
    assert!(events.iter().any(|e| e["type"] == "log" && e["data"]["code"] == "model_retry"), "{events:#?}");
    assert!(!events.iter().any(|e| e["type"] == "error"));
    sidecar.stop().await;
}

#[tokio::test]
async fn budgets_end_a_run_that_would_go_on() {
    let world = World::new().await;
    let sidecar = world.start(&[]).await;
    let endless = (0..30).fold(Script::new(), |script, _| script.bash("true"));
    let loud = Script::new().bash("yes | head -c 200000").bash("sleep 1000").text("never reached");
    let by_calls = sidecar.submit_with(&endless, json!({ "limits": { "model_calls": 3 } })).await;
    let by_tokens = sidecar.submit_with(&endless, json!({ "limits": { "total_tokens": 250 } })).await;
    let by_output = sidecar.submit_with(&loud, json!({ "limits": { "output_bytes": 100_000 } })).await;
    for (id, code) in [(by_calls, "model_calls"), (by_tokens, "total_tokens"), (by_output, "output_bytes")] {
        let events = sidecar.follow(&id).await;
        let complete = &events.last().unwrap()["data"];
        assert_eq!((&complete["status"], &complete["reason"]), (&json!("failed"), &json!("budget_exceeded")), "{code}");
        assert!(complete["usage"]["model_calls"].as_u64().unwrap() <= 4, "{complete}");
        let fatal = events.iter().find(|e| e["type"] == "error" && e["data"]["fatal"] == true).unwrap();
        assert_eq!(fatal["data"]["code"], code);
    }
    assert!(!crate::support::sidecar::runs("sleep 1000"));
    sidecar.stop().await;
}

#[tokio::test]
async fn a_model_that_cannot_be_reached_or_asks_for_too_long_a_wait() {
    let world = World::new().await;
    let sidecar = world.start(&[("MODEL_MAX_FAILURES", "1"), ("STALL_TIMEOUT", "20")]).await;
    let model_config = json!({ "provider": "local", "model": "m", "api_endpoint": "http://127.0.0.1:9/v1" });
    let away = sidecar.submit_with(&Script::new().text("x"), json!({ "model_config": model_config })).await;
    let later = Script::new().json(json!({ "status": 429, "headers": { "retry-after": "3600" } })).unwrap();
    let later = sidecar.submit(&later).await;
    for (id, code, retry_after) in
        [(away, "model_unreachable", Value::Null), (later, "model_rate_limited", json!(3600))]
    {
        let events = sidecar.follow(&id).await;
        assert_eq!(events.last().unwrap()["data"]["reason"], "model_error", "{events:#?}");
        let fatal = events.iter().find(|e| e["type"] == "error" && e["data"]["fatal"] == true).unwrap();
        assert_eq!((&fatal["data"]["code"], &fatal["data"]["retry_after"]), (&json!(code), &retry_after));
    }
    sidecar.stop().await;
}
