//! What the browser's code reads of each kind of run.

use super::{Client, Frame, names, output};
use crate::support::sidecar::World;
use opencode_sidecar::scripted::Script;
use serde_json::json;

/// Every frame has what the browser reads of it.
fn assert_readable(frames: &[Frame]) {
    let mut last = (0, 0);
    for Frame { id, event, data } in frames {
        let text = |name: &str| data[name].as_str().unwrap_or_else(|| panic!("{event} without {name}: {data}"));
        text("timestamp");
        match event.as_str() {
            "output" => assert!(["stdout", "stderr"].contains(&text("type")) && text("line") == text("text")),
            "tool_call" => assert!(!text("tool").is_empty() && data["args"].is_object()),
            "tool_result" => assert!(!text("tool").is_empty() && !data["result"].is_null()),
            "status" => assert!(!text("status").is_empty() && data.get("progress").is_some()),
            "error" => assert!(!text("message").is_empty() && !text("error").is_empty() && data["fatal"].is_boolean()),
            "complete" => assert!(data["files_modified"].is_array() && data.get("final_message").is_some()),
            "done" => assert!(!text("reason").is_empty()),
            "heartbeat" => assert_eq!(id, &None),
            other => panic!("a frame that nobody knows: {other}"),
        }
        if let Some((ordinal, seq)) = id.as_deref().map(|id| id.split_once('.').unwrap()) {
            let id = (ordinal.parse().unwrap(), seq.parse().unwrap());
            assert!(id > last, "{id:?} after {last:?}");
            last = id;
        }
    }
    assert_eq!(frames.last().unwrap().event, "done");
}

#[tokio::test]
async fn text_alone_a_failure_and_ten_thousand_events() {
    let world = World::new().await;
    let sidecar = world.start(&[("MODEL_MAX_FAILURES", "1")]).await;
    let client = Client::of(&sidecar);
    let id = client.create(&Script::new().text("Just words.")).await;
    let frames = client.frames(&id, None).await;
    assert_readable(&frames);
    assert_eq!(names(&frames), ["status", "status", "output", "status", "complete", "done"]);
    let mut mark = frames.last().unwrap().id.clone();

    let failing = Script::new().json(json!({ "status": 401 })).unwrap();
    client.message(&id, &failing).await;
    let frames = client.frames(&id, mark.as_deref()).await;
    assert_readable(&frames);
    let end = names(&frames);
    assert_eq!(end[end.len() - 3..], ["error", "status", "done"], "{frames:#?}");
    let error = &frames[frames.len() - 3];
    assert_eq!((&error.data["error"], &error.data["fatal"]), (&json!("model_auth"), &json!(true)));
    assert_eq!(frames[frames.len() - 2].data["status"], "failed");
    assert_eq!(frames.last().unwrap().data["reason"], "model_error");
    assert_eq!(frames.iter().filter(|frame| frame.data["fatal"] == true).count(), 1);
    mark = frames.last().unwrap().id.clone();

    // The model failed, not the session.
    let todos = |done: &str| {
        json!({ "todos": [
            { "content": "a", "status": "completed", "priority": "high" }, { "content": "b", "status": done, "priority": "low" },
        ]})
    };
    let words: String = (0..10_000).map(|n| format!("{} ", n % 10)).collect();
    let script = Script::new()
        .tool("todowrite", todos("pending"))
        .bash("seq 1 2000; echo bad >&2; exit 3")
        .tool("todowrite", todos("completed"))
        .text(&words);
    client.message(&id, &script).await;
    let frames = client.frames(&id, mark.as_deref()).await;
    assert_readable(&frames);
    let progress: Vec<_> = frames.iter().filter(|f| f.event == "status").map(|f| f.data["progress"].clone()).collect();
    assert_eq!(progress, [json!(null), json!(null), json!(50), json!(100), json!(100)], "{frames:#?}");
    let numbers: String = (1..=2000).map(|n| format!("{n}\n")).collect();
    assert!(output(&frames).starts_with(&numbers) && output(&frames).contains("bad\n"));
    assert!(output(&frames).ends_with(words.trim_end()) || output(&frames).ends_with(&words));
    let session = sidecar.get(&format!("/sessions/{id}")).await;
    let status = sidecar.status(session["execution_id"].as_str().unwrap()).await;
    assert!(status["last_seq"].as_u64().unwrap() > 10_000, "{status}");
    client.stop(&id).await;
    sidecar.stop().await;
}
