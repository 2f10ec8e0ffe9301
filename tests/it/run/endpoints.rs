//! `MODEL_ENDPOINT_ALLOW`: an endpoint that is not allowed is refused by its field, or by the broker at the call.

use crate::support::sidecar::World;
use nix::sys::signal::{self, Signal};
use nix::unistd::Pid;
use opencode_sidecar::scripted::Script;
use reqwest::Method;
use serde_json::{Value, json};

fn model(provider: &str, endpoint: Option<&str>) -> Value {
    json!({ "provider": provider, "model": "m", "api_key": "k", "api_endpoint": endpoint })
}

#[tokio::test]
async fn what_is_not_allowed_is_refused_by_its_field() {
    let world = World::new().await;
    let sidecar = world.start(&[("MODEL_ENDPOINT_ALLOW", "api.anthropic.com:443,*.models.example")]).await;
    let (endpoint, provider) = ("model_config.api_endpoint", "model_config.provider");
    for (model, field) in [
        (model("custom", Some("http://127.0.0.1:1/v1")), endpoint),
        (model("custom", Some("http://169.254.169.254/latest/meta-data")), endpoint),
        (model("local", Some("http://[::1]:11434/v1")), endpoint),
        (model("local", Some("http://localhost:11434/v1")), endpoint),
        (model("custom", Some("https://models.example/v1")), endpoint),
        (model("anthropic", Some("http://api.anthropic.com/v1")), endpoint),
        (model("openai", None), provider),
    ] {
        let task = json!({ "task_id": uuid::Uuid::new_v4(), "prompt": "x", "model_config": model });
        let session = json!({ "session_id": uuid::Uuid::new_v4(), "prompt": "x", "model_config": model });
        for (path, body) in [("/tasks/execute", task), ("/sessions", session)] {
            let (status, problem) = sidecar.post(path, body).await;
            assert_eq!((status, &problem["details"]["field"]), (400, &json!(field)), "{path} {model}: {problem}");
            assert!(problem["detail"].as_str().unwrap().contains("MODEL_ENDPOINT_ALLOW"), "{problem}");
        }
    }
    // The pod's own endpoint is allowed without a word of it, with another path too.
    let own = format!("{}/deeper/v1", world.model.base_url().strip_suffix("/v1").unwrap());
    let id =
        sidecar.submit_with(&Script::new().text("fine"), json!({ "model_config": model("custom", Some(&own)) })).await;
    assert_eq!(sidecar.finished(&id).await["final_message"].as_str().unwrap().trim(), "fine");
    sidecar.stop().await;
}

/// It was taken when the endpoint was allowed, and waited: the call itself is refused.
#[tokio::test]
async fn what_is_allowed_no_longer_is_not_called() {
    let world = World::new().await;
    let one = ("MAX_CONCURRENT_TASKS", "1");
    let sidecar = world.start(&[one]).await;
    let running = sidecar.submit(&Script::new().bash("echo on; sleep 600")).await;
    sidecar.stream(&running, 0).await.until("work", |event| event["type"] == "stdout").await;
    let waiting = sidecar.submit(&Script::new().text("never")).await;
    signal::kill(Pid::from_raw(sidecar.pid().cast_signed()), Signal::SIGKILL).unwrap();
    sidecar.exited().await;
    let calls = world.model.calls();

    let elsewhere = ("OPENCODE_API_ENDPOINT", "http://models.example/v1");
    let sidecar = world.start(&[one, elsewhere, ("MODEL_ENDPOINT_ALLOW", "models.example")]).await;
    let events = sidecar.follow(&waiting).await;
    let complete = &events.last().unwrap()["data"];
    assert_eq!((&complete["status"], &complete["reason"]), (&json!("failed"), &json!("model_error")), "{events:#?}");
    let errors: Vec<_> = events.iter().filter(|e| e["type"] == "error").map(|e| &e["data"]).collect();
    assert_eq!((errors.len(), &errors[0]["code"]), (1, &json!("model_endpoint_refused")), "{events:#?}");
    assert!(errors[0]["message"].as_str().unwrap().contains("127.0.0.1 is not among the hosts"), "{errors:?}");
    assert_eq!(complete["usage"]["model_calls"], 1, "OpenCode does not make the call again");
    assert_eq!(world.model.calls(), calls);
    let (_, metrics) = sidecar.send(Method::GET, "/metrics", None).await;
    let line = "opencode_sidecar_broker_refused_total{why=\"endpoint\"} 1";
    assert!(metrics.as_str().unwrap().lines().any(|l| l == line));
    sidecar.stop().await;
}
