//! A model that fails a task without a session, and budgets. Every fault there is: `sessions::faults`.

use crate::support::sidecar::World;
use opencode_sidecar::scripted::Script;
use serde_json::json;

#[tokio::test]
async fn a_task_of_its_own_fails_with_its_model_or_waits_for_it() {
    let world = World::new().await;
    let sidecar = world.start(&[]).await;
    let refused = sidecar.submit(&Script::new().json(json!({ "status": 401 })).unwrap()).await;
    let passing = json!({ "status": 503, "headers": { "retry-after": "1" }, "times": 1, "text": "After all.",
        "usage": { "prompt": 1, "completion": 1, "cost": 0.25 } });
    let passing = sidecar.submit(&Script::new().json(passing).unwrap()).await;
    let events = sidecar.follow(&refused).await;
    let complete = &events.last().unwrap()["data"];
    assert_eq!((&complete["status"], &complete["reason"]), (&json!("failed"), &json!("model_error")), "{events:#?}");
    let errors: Vec<_> = events.iter().filter(|e| e["type"] == "error").map(|e| &e["data"]).collect();
    assert_eq!(errors.len(), 1, "{events:#?}");
    assert_eq!((&errors[0]["code"], &errors[0]["fatal"]), (&json!("model_auth"), &json!(true)));

    let events = sidecar.follow(&passing).await;
    let complete = &events.last().unwrap()["data"];
    assert_eq!((&complete["status"], &complete["final_message"]), (&json!("completed"), &json!("After all.")));
    assert_eq!((&complete["usage"]["model_calls"], &complete["usage"]["cost"]), (&json!(2), &json!(0.25)));
    let retry = events.iter().find(|e| e["data"]["code"] == "model_retry").unwrap();
    // What is left of the wait when it is said: on a busy machine that may be little.
    assert!(retry["data"]["wait_ms"].as_u64().unwrap() <= 1_000, "{retry}");
    assert!(!events.iter().any(|e| e["type"] == "error"));
    sidecar.stop().await;
}

#[tokio::test]
async fn budgets_end_a_run_that_would_go_on() {
    let world = World::new().await;
    let sidecar = world.start(&[]).await;
    let endless = (0..30).fold(Script::new(), |script, _| script.bash("true"));
    let loud = Script::new().bash("yes | head -c 200000").bash("sleep 96431").text("never reached");
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
    assert!(!crate::support::sidecar::runs("sleep 96431"));
    sidecar.stop().await;
}

/// OpenCode itself has no bound for any of it: it calls again at once.
#[tokio::test]
async fn a_model_that_goes_on_without_end_is_bounded() {
    let world = World::new().await;
    let bounds = [("MODEL_MAX_FAILURES", "4"), ("MODEL_CALLS_PER_MINUTE", "6")];
    let sidecar = world.start(&bounds).await;
    let endless = (0..30).fold(Script::new(), |script, _| script.bash("true"));
    let tool = json!([{ "name": "bash", "args": { "command": "true", "description": "Nothing" } }]);
    let unfinished = json!({ "tools": tool, "cut": "call", "by": "end" });
    let unfinished = (0..30).fold(Script::new(), |script, _| script.json(unfinished.clone()).unwrap());
    for (script, reason, code, calls) in
        [(unfinished, "model_error", "model_unfinished", 4), (endless, "budget_exceeded", "model_rate", 6)]
    {
        let before = world.model.calls();
        let id = sidecar.submit(&script).await;
        let events = sidecar.follow(&id).await;
        let complete = &events.last().unwrap()["data"];
        assert_eq!((&complete["status"], &complete["reason"]), (&json!("failed"), &json!(reason)), "{events:#?}");
        assert_eq!(complete["usage"]["model_calls"], calls, "{events:#?}");
        let errors: Vec<_> = events.iter().filter(|e| e["type"] == "error").map(|e| &e["data"]["code"]).collect();
        assert_eq!(errors, [&json!(code)], "{events:#?}");
        assert_eq!(world.model.calls() - before, calls, "the model is not called again");
    }
    sidecar.stop().await;
}
