//! What a session may not do: call more often than it may, and ask for anything but a model's answer.

use super::{PLENTY, World, call, config, error, read};
use opencode_sidecar::broker::{BrokerConfig, Exhausted};
use opencode_sidecar::model::task::Provider;
use secrecy::ExposeSecret;
use serde_json::json;

/// Whether the metrics have this line.
fn counted(world: &World, line: &str) -> bool {
    world.metrics.render().unwrap().lines().any(|l| l == format!("opencode_sidecar_{line}"))
}

#[tokio::test]
async fn more_calls_within_a_minute_than_allowed_end_it() {
    let world = World::with(BrokerConfig { calls_per_minute: 3, ..config() }, Provider::Custom, PLENTY).await;
    for status in [200, 200, 200, 400, 400] {
        let response = world.chat(json!({"text": "x"})).send().await.unwrap();
        assert_eq!(response.status(), status);
        if status == 400 {
            let told = error(response).await;
            assert_eq!(told["code"], "budget_exceeded");
            assert_eq!(told["message"], Exhausted::Rate.message());
        } else {
            read(response).await.unwrap();
        }
    }
    let facts = world.settled().await;
    assert_eq!((facts.calls, facts.exhausted), (3, Some(Exhausted::Rate)));
    assert_eq!(world.model.calls(), 3);
    assert!(counted(&world, "model_calls_total{outcome=\"over_limit\"} 2"));
    // The next execution in the session starts anew.
    world.lease.reset(PLENTY);
    assert_eq!(world.chat(json!({"text": "x"})).send().await.unwrap().status(), 200);
    world.end().await;
}

#[tokio::test]
async fn only_the_providers_paths_and_each_refusal_is_counted() {
    let world = World::new().await;
    let body = call(json!({"text": "x"}));
    let paths = [
        "/models",
        "/embeddings",
        "/files",
        "/responses/resp_1",
        "/chat/completions/",
        "/chat//completions",
        "/chat%2fcompletions",
        "/Chat/Completions",
        "/chat/completions/../../v1/files",
        "/chat/completions?stream=false",
        "/messages?beta=true",
        "/messages?",
    ];
    for path in paths {
        assert_eq!(world.post(path).json(&body).send().await.unwrap().status(), 404, "{path}");
    }
    let token = world.lease.token().expose_secret();
    let methods = ["GET", "PUT", "DELETE", "OPTIONS", "TRACE"];
    for method in methods {
        let method = reqwest::Method::from_bytes(method.as_bytes()).unwrap();
        let url = format!("{}/messages", world.lease.base_url());
        assert_eq!(world.http.request(method, url).bearer_auth(token).send().await.unwrap().status(), 405);
    }
    assert!(counted(&world, &format!("broker_refused_total{{why=\"path\"}} {}", paths.len() + methods.len())));
    assert_eq!(world.post("/messages").body("no json").send().await.unwrap().status(), 400);
    assert!(counted(&world, "broker_refused_total{why=\"body\"} 1"));
    let mut other = body.clone();
    other["model"] = json!("a-dearer-one");
    assert_eq!(world.post("/messages").json(&other).send().await.unwrap().status(), 400);
    assert!(counted(&world, "broker_refused_total{why=\"model\"} 1"));
    let stranger = world.http.post(format!("{}/messages", world.lease.base_url())).bearer_auth("wrong");
    assert_eq!(stranger.json(&body).send().await.unwrap().status(), 401);
    assert!(counted(&world, "broker_refused_total{why=\"token\"} 1"));
    assert_eq!(world.model.calls(), 0);
    world.end().await;
}
