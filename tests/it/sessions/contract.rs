//! The backend's day: create, follow over cut connections, prompt again, stop; and what it is refused.

use super::{Client, last_id, names, output};
use crate::support::sidecar::World;
use opencode_sidecar::scripted::Script;
use reqwest::Method;
use serde_json::json;
use uuid::Uuid;

#[tokio::test]
async fn three_prompts_in_one_conversation_over_connections_that_are_cut() {
    let world = World::new().await;
    let sidecar = world.start(&[]).await;
    let client = Client::of(&sidecar);
    let script = Script::new()
        .bash("echo one; until [ -e gate ]; do sleep 0.02; done; echo two >&2")
        .write(&world.path("a.txt"), "a")
        .text("The first is done.");
    let id = client.create(&script).await;

    // Cut while the run goes on, and again after each frame of the rest.
    let mut stream = client.stream(&id, None).await;
    let mut frames = stream.until("one", |frame| frame.data["text"] == "one\n").await;
    drop(stream);
    assert_eq!(client.status(&id).await["status"], "running");
    std::fs::write(world.file("gate"), "").unwrap();
    while frames.last().unwrap().event != "done" {
        // Where OpenCode takes long there are such, which are no part of the log.
        frames.retain(|frame| frame.event != "heartbeat");
        let mut stream = client.stream(&id, last_id(&frames)).await;
        frames.push(stream.next().await.unwrap());
        if frames.last().unwrap().event == "complete" {
            // It has no id: a reader that is cut here gets it again.
            frames.push(stream.next().await.unwrap());
            assert_eq!(stream.next().await, None, "the stream closes after `done`");
        }
    }
    assert_eq!(frames, client.frames(&id, None).await, "the same as without any cut");
    assert_eq!(output(&frames), "one\ntwo\nThe first is done.");
    let end = names(&frames);
    assert_eq!(end[end.len() - 2..], ["complete", "done"]);
    let complete = &frames[frames.len() - 2];
    assert_eq!(complete.id, None);
    assert_eq!(complete.data["final_message"].as_str().unwrap().trim(), "The first is done.");
    assert_eq!(complete.data["files_modified"], json!(["a.txt"]));
    let done = frames.last().unwrap();
    assert_eq!(done.data["reason"], "finished");
    assert!(done.id.as_deref().unwrap().starts_with("1."));
    let statuses: Vec<_> = frames.iter().filter(|f| f.event == "status").map(|f| f.data["status"].clone()).collect();
    assert_eq!(statuses, ["pending", "running", "completed"]);

    // The next two, in the same process and the same conversation.
    let before = sidecar.opencodes();
    assert_eq!(before.len(), 1);
    for (ordinal, word) in [(2, "second"), (3, "third")] {
        let mark = last_id(&frames).unwrap().to_owned();
        client.message(&id, &Script::new().text(&format!("The {word}."))).await;
        let more = client.frames(&id, Some(&mark)).await;
        assert_eq!(output(&more), format!("The {word}."), "{more:#?}");
        assert!(more.iter().filter_map(|f| f.id.as_deref()).all(|id| id.starts_with(&format!("{ordinal}."))));
        frames.extend(more);
    }
    assert_eq!(sidecar.opencodes(), before);
    let body = String::from_utf8_lossy(&world.model.requests().last().unwrap().body).into_owned();
    for said in ["The first is done.", "The second."] {
        assert!(body.contains(said), "the model is shown what was said before");
    }
    // From the start it is one story with one end.
    let whole = client.frames(&id, None).await;
    assert_eq!(names(&whole).iter().filter(|name| **name == "done").count(), 1);
    assert_eq!(output(&whole), output(&frames));

    let session = sidecar.get(&format!("/sessions/{id}")).await;
    assert_eq!((&session["status"], &session["executions"]), (&json!("completed"), &json!(3)), "{session}");
    let history = sidecar.get(&format!("/tasks?session_id={id}")).await;
    assert_eq!(history["executions"].as_array().unwrap().len(), 3);
    assert_eq!(sidecar.get("/sessions").await["sessions"][0]["session_id"], json!(id));

    // What has completed is never called cancelled.
    let stopped = client.stop(&id).await;
    assert_eq!(stopped, json!({ "session_id": id, "status": "completed" }));
    assert!(sidecar.opencodes().is_empty());
    assert_eq!(client.stop(&id).await, stopped);
    let (status, refused) =
        client.send(Method::POST, &format!("/sessions/{id}/messages"), Some(json!({ "text": "more" }))).await;
    assert_eq!((status, &refused["code"]), (409, &json!("conflict")), "{refused}");
    let again = client.frames(&id, last_id(&whole)).await;
    assert_eq!(names(&again), ["done"], "nothing more will come");
    sidecar.stop().await;
}

#[tokio::test]
async fn what_the_backend_is_refused_names_the_field() {
    let world = World::new().await;
    let sidecar = world.start(&[]).await;
    let client = Client::of(&sidecar);
    let id = Uuid::new_v4().to_string();
    let model = |more: serde_json::Value| {
        let mut model =
            json!({ "provider": "custom", "model": "m", "api_key": "k", "api_endpoint": "http://127.0.0.1:1" });
        for (name, value) in more.as_object().unwrap() {
            model[name] = value.clone();
        }
        json!({ "session_id": id, "prompt": "x", "model_config": model })
    };
    let cases = [
        (json!({ "prompt": "x" }), "session_id"),
        (json!({ "session_id": "7", "prompt": "x" }), "session_id"),
        (json!({ "session_id": id, "prompt": 7 }), "prompt"),
        (json!({ "session_id": id, "prompt": "x".repeat(50_001) }), "prompt"),
        (json!({ "session_id": id, "prompt": "a\u{0}b" }), "prompt"),
        (json!({ "session_id": id, "prompt": "x", "system_prompt": [] }), "system_prompt"),
        (model(json!({ "provider": "acme" })), "model_config.provider"),
        (model(json!({ "temperature": 2.5 })), "model_config.temperature"),
        (model(json!({ "enabled_tools": ["file_ops", "teleport"] })), "model_config.enabled_tools[1]"),
        (model(json!({ "api_key_encrypted": "AAAA", "api_key": null })), "model_config.api_key_encrypted"),
    ];
    for (body, field) in cases {
        let (status, refused) = client.send(Method::POST, "/sessions", Some(body)).await;
        assert_eq!((status, &refused["details"]["field"]), (400, &json!(field)), "{refused}");
        assert!(!refused["details"]["reason"].as_str().unwrap().is_empty());
        assert_eq!(refused["error"], refused["detail"]);
    }
    for (method, path) in [
        (Method::GET, format!("/sessions/{id}")),
        (Method::GET, format!("/sessions/{id}/status")),
        (Method::GET, format!("/sessions/{id}/stream")),
        (Method::POST, format!("/sessions/{id}/stop")),
        (Method::DELETE, format!("/sessions/{id}")),
    ] {
        let (status, refused) = client.send(method, &path, None).await;
        assert_eq!((status, &refused["code"]), (404, &json!("not_found")), "{path}: {refused}");
    }
    assert!(sidecar.opencodes().is_empty());
    sidecar.stop().await;
}

#[tokio::test]
async fn fields_of_a_newer_backend_are_ignored_and_named_and_an_id_is_taken_once() {
    let world = World::new().await;
    let sidecar = world.start(&[]).await;
    let client = Client::of(&sidecar);
    let id = Uuid::new_v4().to_string();
    let body = json!({
        "session_id": id, "prompt": Script::new().text("Hi.").to_prompt("x"), "colour": "red",
        "model_config": {
            "provider": "custom", "model": "m", "api_endpoint": world.model.base_url(), "api_key": "k", "later": { "a": 1 },
        },
    });
    // Two at once: one of them is made.
    let (one, two) = tokio::join!(
        client.send(Method::POST, "/sessions", Some(body.clone())),
        client.send(Method::POST, "/sessions", Some(body.clone()))
    );
    let mut statuses = [one.0, two.0];
    statuses.sort_unstable();
    assert_eq!(statuses, [201, 409], "{one:?} {two:?}");
    let frames = client.frames(&id, None).await;
    assert_eq!(output(&frames), "Hi.");
    let execution = sidecar.get(&format!("/sessions/{id}")).await["execution_id"].as_str().unwrap().to_owned();
    let log = sidecar.get(&format!("/tasks/{execution}/events?type=log")).await;
    let remark = log["events"].as_array().unwrap().iter().find(|e| e["data"]["code"] == "unknown_fields").unwrap();
    assert_eq!(remark["data"]["fields"], json!(["colour", "model_config.later"]));
    let (status, refused) = client.send(Method::POST, "/sessions", Some(body)).await;
    assert_eq!((status, &refused["details"]["field"]), (409, &json!("session_id")), "{refused}");
    client.stop(&id).await;
    sidecar.stop().await;
}
