//! Ends that somebody or something else brings about: nothing of the session is left after any of them.

use crate::support::sidecar::{World, runs, soon};
use opencode_sidecar::scripted::Script;
use serde_json::json;

/// A command that never ends by itself, with children that do their best to outlive it.
fn stubborn(mark: &str) -> Script {
    let command = format!(
        "trap '' TERM HUP INT; (setsid sh -c 'trap \"\" TERM HUP; sleep {mark}1' &) ; sleep {mark}2 & echo running; sleep {mark}3"
    );
    Script::new().bash(&command).text("never reached")
}

#[tokio::test]
async fn cancel_leaves_no_process() {
    let world = World::new().await;
    let sidecar = world.start(&[]).await;
    let id = sidecar.submit(&stubborn("77001")).await;
    let mut stream = sidecar.stream(&id, 0).await;
    let mut events = stream.until("output", |e| e["type"] == "stdout").await;
    assert!(runs("sleep 770011") && runs("sleep 770012") && runs("sleep 770013"));

    let (status, answer) = sidecar.post(&format!("/tasks/{id}/cancel"), json!({ "reason": "enough" })).await;
    assert_eq!((status, &answer["status"], &answer["reason"]), (200, &json!("cancelled"), &json!("cancelled")));
    assert!(!runs("sleep 77001"), "a process is left");
    assert_eq!(sidecar.descendants(), Vec::<String>::new());

    events.extend(stream.until("the end", |e| e["type"] == "complete").await);
    assert_eq!(events.last().unwrap()["data"]["status"], "cancelled");
    let log = events.iter().find(|e| e["data"]["code"] == "ending").unwrap();
    assert!(log["data"]["message"].as_str().unwrap().contains("enough"));
    let open = events.iter().find(|e| e["type"] == "tool_result").expect("the open call is closed");
    assert_eq!(open["data"]["error"], "interrupted");

    // Again, and after the end: nothing changes.
    let (status, again) = sidecar.post(&format!("/tasks/{id}/cancel"), json!({})).await;
    assert_eq!((status, again), (200, answer));
    sidecar.stop().await;
}

#[tokio::test]
async fn a_completed_run_stays_completed_when_it_is_cancelled() {
    let world = World::new().await;
    let sidecar = world.start(&[]).await;
    let id = sidecar.submit(&Script::new().text("done")).await;
    sidecar.follow(&id).await;
    let (status, answer) = sidecar.post(&format!("/tasks/{id}/cancel"), json!({})).await;
    assert_eq!((status, &answer["status"], &answer["reason"]), (200, &json!("completed"), &json!("finished")));
    sidecar.stop().await;
}

#[tokio::test]
async fn cancel_while_opencode_starts() {
    let world = World::new().await;
    let sidecar = world.start(&[]).await;
    let id = sidecar.submit(&Script::new().text("never reached")).await;
    let mut stream = sidecar.stream(&id, 0).await;
    stream.until("its turn", |e| e["type"] == "status" && e["data"] == "running").await;
    let (_, answer) = sidecar.post(&format!("/tasks/{id}/cancel"), json!({})).await;
    assert_eq!(answer["status"], "cancelled");
    assert_eq!(world.model.calls(), 0);
    sidecar.stop().await;
}

#[tokio::test]
async fn time_over() {
    let world = World::new().await;
    let sidecar = world.start(&[]).await;
    // Long enough for OpenCode to start on a busy machine or not: it ends as `timeout` either way.
    let id = sidecar.submit_with(&stubborn("77002"), json!({ "timeout_seconds": 15 })).await;
    let record = sidecar.finished(&id).await;
    assert_eq!((&record["status"], &record["reason"]), (&json!("failed"), &json!("timeout")), "{record:#}");
    assert!(record["duration_ms"].as_u64().unwrap() >= 15_000);
    assert!(!runs("sleep 77002"));
    sidecar.stop().await;
}

#[tokio::test]
async fn an_opencode_that_does_not_start_says_why() {
    let world = World::new().await;
    let sidecar = world.start(&[("OPENCODE_COMMAND", "/bin/false")]).await;
    let record = sidecar.finished(&sidecar.submit(&Script::new().text("x")).await).await;
    assert_eq!((&record["status"], &record["reason"]), (&json!("failed"), &json!("opencode_crashed")), "{record:#}");
    sidecar.stop().await;

    // One that never listens: its start has a deadline.
    let silent = world.file("silent-opencode");
    std::fs::write(&silent, "#!/bin/sh\nexec sleep 77004\n").unwrap();
    std::fs::set_permissions(&silent, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let sidecar = world.start(&[("OPENCODE_COMMAND", silent.to_str().unwrap()), ("START_TIMEOUT", "1")]).await;
    let record = sidecar.finished(&sidecar.submit(&Script::new().text("x")).await).await;
    assert_eq!(
        (&record["status"], &record["reason"]),
        (&json!("failed"), &json!("opencode_unresponsive")),
        "{record:#}"
    );
    assert!(!runs("sleep 77004"));
    sidecar.stop().await;
}

#[tokio::test]
async fn delete_ends_and_forgets() {
    let world = World::new().await;
    let sidecar = world.start(&[]).await;
    let id = sidecar.submit(&stubborn("77005")).await;
    let mut socket = sidecar.socket(&format!("/tasks/{id}/stream")).await;
    let path = format!("/tasks/{id}");
    loop {
        if crate::support::sidecar::frame(&mut socket).await.unwrap()["type"] == "stdout" {
            break;
        }
    }
    for _ in 0..2 {
        let (status, body) = soon("deletion", sidecar.send(reqwest::Method::DELETE, &path, None)).await;
        assert_eq!((status, body), (204, json!("")));
    }
    assert!(!runs("sleep 77005"));
    for path in [
        path.clone(),
        format!("{path}/status"),
        format!("{path}/events"),
        format!("{path}/output"),
        format!("{path}/stream"),
    ] {
        let (status, problem) = sidecar.send(reqwest::Method::GET, &path, None).await;
        assert_eq!((status, &problem["code"]), (404, &json!("not_found")), "{path}");
    }
    assert_eq!(sidecar.get("/tasks").await["executions"], json!([]));
    sidecar.stop().await;
}
