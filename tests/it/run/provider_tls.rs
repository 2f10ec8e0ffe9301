//! A provider behind TLS, over HTTP/1.1 and HTTP/2: whom the broker trusts, that it holds nothing back, and that what
//! passes is in no log.

use crate::support::sidecar::{API_KEY, World};
use crate::support::tls::Authority;
use opencode_sidecar::scripted::Script;
use serde_json::{Value, json};

fn local(endpoint: &str) -> Value {
    json!({ "model_config": { "provider": "local", "model": "m", "api_key": API_KEY, "api_endpoint": endpoint } })
}

#[tokio::test]
async fn both_protocols_stream_and_nothing_that_passes_is_logged() {
    let world = World::new().await;
    let authority = Authority::new();
    let roots = authority.file().to_str().unwrap();
    let mut sidecar = world.start(&[("SSL_CERT_FILE", roots), ("LOG_LEVEL", "trace")]).await;
    for (protocol, version) in [("h2", "HTTP/2.0"), ("http/1.1", "HTTP/1.1")] {
        let endpoint = world.tls_front(&authority, protocol).await;
        let answer = json!({ "text": "zebra-one zebra-two", "hold": protocol });
        let script = Script::new().json(answer).unwrap();
        let id = sidecar.submit_with(&script, local(&endpoint)).await;
        let mut stream = sidecar.stream(&id, 0).await;
        // The second word is not sent before the first one has been seen at the far end.
        let first = |e: &Value| e["type"] == "message" && e["data"]["delta"].as_str() == Some("zebra-one ");
        stream.until("the first word", first).await;
        assert_eq!(world.model.counts().borrow().open, 1, "{protocol}: the answer is not over yet");
        world.model.open_gate(protocol);
        let rest = stream.rest().await;
        let last: Value = serde_json::from_str(rest.last().unwrap()).unwrap();
        assert_eq!(last["data"]["status"], "completed", "{protocol}: {last}");
        assert_eq!(last["data"]["final_message"].as_str().unwrap().trim(), "zebra-one zebra-two");
        let request = world.model.requests().pop().unwrap();
        assert_eq!((request.version.as_str(), request.path.as_str()), (version, "/v1/chat/completions"));
        assert_eq!(world.model.authorization_values().pop().unwrap(), format!("Bearer {API_KEY}"));
    }
    let log = sidecar.log_so_far();
    assert!(log.iter().any(|line| line.contains("\"TRACE\"")), "the log is there to be searched");
    // The prompt begins so, see `submit_with`; the answers have a zebra.
    for line in log {
        for secret in [API_KEY, "Do what the script says", "zebra-"] {
            assert!(!line.contains(secret), "{secret}: {line}");
        }
    }
    sidecar.stop().await;
}

#[tokio::test]
async fn a_provider_for_whom_nobody_vouches_gets_nothing() {
    let world = World::new().await;
    let roots = Authority::new();
    let roots = roots.file().to_str().unwrap();
    let sidecar = world.start(&[("SSL_CERT_FILE", roots), ("MODEL_MAX_FAILURES", "1")]).await;
    let endpoint = world.tls_front(&Authority::new(), "h2").await;
    let id = sidecar.submit_with(&Script::new().text("never"), local(&endpoint)).await;
    let events = sidecar.follow(&id).await;
    let error = &events.iter().find(|e| e["type"] == "error").unwrap()["data"];
    assert_eq!((&error["code"], &error["fatal"]), (&json!("model_unreachable"), &json!(true)), "{error}");
    assert!(error["message"].as_str().unwrap().contains("no TLS connection"), "{error}");
    assert_eq!(world.model.calls(), 0);
    sidecar.stop().await;
}
