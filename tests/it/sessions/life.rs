//! The life of a session: idle, attached, parked, taken up again, full, abandoned, over a restart.

use super::{Client, Stream, last_id, names, output};
use crate::support::sidecar::{World, soon};
use opencode_sidecar::scripted::Script;
use reqwest::Method;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use uuid::Uuid;

#[tokio::test]
async fn an_idle_session_is_attached_to_parked_and_taken_up_again() {
    let world = World::new().await;
    let sidecar = world.start(&[("SESSION_IDLE_TIMEOUT", "1")]).await;
    let client = Client::of(&sidecar);
    let id = Uuid::new_v4().to_string();
    let (status, made) = client.send(Method::POST, "/sessions", Some(json!({ "session_id": id }))).await;
    assert_eq!((status, &made["status"]), (201, &json!("pending")), "{made}");
    let remote = made["remote_session_id"].clone();
    let mut attached = client.stream(&id, None).await;
    client.message(&id, &Script::new().bash("echo hello").text("First.")).await;
    let frames = attached.until("its end", |frame| frame.event == "done").await;
    assert_eq!(output(&frames), "hello\nFirst.");

    // Nobody needs its process: it goes, the session stays.
    soon("the process is parked", async {
        while !sidecar.opencodes().is_empty() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let mark = last_id(&frames).unwrap().to_owned();
    let mut attached = client.stream(&id, Some(&mark)).await;
    // A task may run in it as well; it brings no model of its own.
    let script = Script::new().text("Second.");
    let execution = sidecar.submit_with(&script, json!({ "session_id": id, "metadata": 7 })).await;
    let frames = attached.until("its end", |frame| frame.event == "done").await;
    assert_eq!(output(&frames), "Second.");
    let record = sidecar.get(&format!("/tasks/{execution}")).await;
    assert_eq!((&record["session_id"], &record["metadata"]), (&json!(id), &json!(7)));
    let said = String::from_utf8_lossy(&world.model.requests().last().unwrap().body).into_owned();
    assert!(said.contains("First.") && said.contains("hello"), "the conversation outlived its process");
    assert_eq!(sidecar.get(&format!("/sessions/{id}")).await["remote_session_id"], remote);

    let body = |more: Value| {
        let mut body = json!({ "task_id": Uuid::new_v4(), "prompt": "x", "session_id": id });
        for (name, value) in more.as_object().unwrap() {
            body[name] = value.clone();
        }
        body
    };
    let model = json!({ "provider": "openai", "model": "m", "api_key": "k" });
    for (more, field) in [
        (json!({ "model_config": model }), "model_config"),
        (json!({ "workdir": "a" }), "workdir"),
        (json!({ "limits": { "pids": 100 } }), "limits.pids"),
    ] {
        let (status, refused) = sidecar.post("/tasks/execute", body(more)).await;
        assert_eq!((status, &refused["details"]["field"]), (400, &json!(field)), "{refused}");
    }
    let (status, destroyed) = client.send(Method::DELETE, &format!("/sessions/{id}"), None).await;
    assert_eq!((status, &destroyed["status"]), (200, &json!("completed")));
    let (status, refused) = sidecar.post("/tasks/execute", body(json!({}))).await;
    assert_eq!((status, &refused["details"]["field"]), (404, &json!("session_id")), "{refused}");
    assert_eq!(std::fs::read_dir(world.state.path().join("sessions")).unwrap().count(), 0, "nothing is left on disk");
    sidecar.stop().await;
}

#[tokio::test]
async fn one_slot_is_shared_by_many_sessions_and_one_session_runs_one_after_another() {
    let world = World::new().await;
    let sidecar = world.start(&[("MAX_CONCURRENT_TASKS", "1")]).await;
    let client = Client::of(&sidecar);
    let first = client.create(&Script::new().text("One.")).await;
    client.frames(&first, None).await;
    // The first rests: its process makes room.
    let gated = Script::new().bash("until [ -e gate ]; do sleep 0.02; done").text("Two.");
    let second = client.create(&gated).await;
    assert_eq!(sidecar.opencodes().len(), 1);
    // Now the slot is taken: nothing can be made, and a prompt waits.
    let full = json!({ "session_id": Uuid::new_v4(), "prompt": "x" });
    let (status, refused) = client.send(Method::POST, "/sessions", Some(full)).await;
    assert_eq!((status, &refused["code"]), (503, &json!("unavailable")), "{refused}");
    let waiting = client.message(&first, &Script::new().text("Three.")).await;
    let behind = client.message(&second, &Script::new().text("Four.")).await;
    for taken in [&waiting, &behind] {
        let status = sidecar.status(taken["execution_id"].as_str().unwrap()).await;
        assert_eq!(status["status"], "pending", "{status}");
    }
    assert_eq!(client.status(&first).await["status"], "pending");
    std::fs::write(world.file("gate"), "").unwrap();
    assert_eq!(output(&client.frames(&first, None).await), "One.Three.");
    // A stream that was open while the next one was waiting goes on with it.
    assert_eq!(output(&client.frames(&second, None).await), "Two.Four.");
    assert!(sidecar.opencodes().len() <= 1);
    for id in [&first, &second] {
        assert_eq!(client.stop(id).await["status"], "completed");
    }
    sidecar.stop().await;
}

#[tokio::test]
async fn stop_cancels_what_runs_and_what_waits() {
    let world = World::new().await;
    let sidecar = world.start(&[]).await;
    let client = Client::of(&sidecar);
    let id = client.create(&Script::new().bash("echo here; sleep 98765").text("never")).await;
    let mut stream = client.stream(&id, None).await;
    let mut frames = stream.until("here", |frame| frame.data["text"] == "here\n").await;
    let waiting = client.message(&id, &Script::new().text("never")).await["execution_id"].as_str().unwrap().to_owned();
    let stopped = client.stop(&id).await;
    assert_eq!(stopped["status"], "cancelled", "{stopped}");
    assert!(stopped["cancelled_at"].as_str().unwrap().ends_with('Z'));
    assert!(sidecar.opencodes().is_empty() && !crate::support::sidecar::runs("sleep 98765"));
    while let Some(frame) = stream.next().await {
        frames.push(frame);
    }
    let end = names(&frames);
    assert_eq!(end[end.len() - 2..], ["error", "done"], "{frames:#?}");
    let error = &frames[frames.len() - 2];
    assert_eq!((&error.id, &error.data["fatal"], &error.data["error"]), (&None, &json!(true), &json!("cancelled")));
    assert_eq!(frames.last().unwrap().data["reason"], "cancelled");
    assert_eq!(sidecar.status(&waiting).await["status"], "cancelled");
    assert_eq!(client.stop(&id).await, stopped);
    assert_eq!(client.status(&id).await["status"], "cancelled");

    // Cancelling one execution of a session ends its processes, not the session.
    let id = client.create(&Script::new().bash("sleep 98764").text("never")).await;
    let mut stream = client.stream(&id, None).await;
    stream.until("the call", |frame| frame.event == "tool_call").await;
    let execution = sidecar.get(&format!("/sessions/{id}")).await["execution_id"].as_str().unwrap().to_owned();
    let (status, cancelled) = sidecar.post(&format!("/tasks/{execution}/cancel"), json!({})).await;
    assert_eq!((status, &cancelled["status"]), (200, &json!("cancelled")));
    assert!(!crate::support::sidecar::runs("sleep 98764"));
    let mark = stream.until("its end", |frame| frame.event == "done").await;
    client.message(&id, &Script::new().text("It goes on.")).await;
    assert_eq!(output(&client.frames(&id, last_id(&mark)).await), "It goes on.");
    client.stop(&id).await;
    sidecar.stop().await;
}

#[tokio::test]
async fn a_create_whose_caller_goes_leaves_nothing() {
    let world = World::new().await;
    let sidecar = world.start(&[]).await;
    let client = Client::of(&sidecar);
    let id = Uuid::new_v4().to_string();
    let body = json!({ "session_id": id, "prompt": Script::new().bash("sleep 98763").to_prompt("x") }).to_string();
    let mut caller = TcpStream::connect(sidecar.address()).await.unwrap();
    let head = format!(
        "POST /sessions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        sidecar.secret,
        body.len()
    );
    caller.write_all(format!("{head}{body}").as_bytes()).await.unwrap();
    soon("OpenCode is being started", async {
        while sidecar.opencodes().is_empty() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    drop(caller);
    soon("everything of it ends", async {
        while !sidecar.descendants().is_empty() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let (status, refused) = client.send(Method::GET, &format!("/sessions/{id}"), None).await;
    assert_eq!(status, 404, "it never was: {refused}");
    // So the backend may try it again.
    let body = json!({ "session_id": id, "prompt": Script::new().text("Now.").to_prompt("x") });
    let (status, made) = client.send(Method::POST, "/sessions", Some(body)).await;
    assert_eq!(status, 201, "{made}");
    assert_eq!(output(&client.frames(&id, None).await), "Now.");
    client.stop(&id).await;
    sidecar.stop().await;
}

#[tokio::test]
async fn a_restart_ends_sessions_and_tells_what_became_of_them() {
    let world = World::new().await;
    let sidecar = world.start(&[]).await;
    let client = Client::of(&sidecar);
    let finished = client.create(&Script::new().text("Done.")).await;
    let frames = client.frames(&finished, None).await;
    let running = client.create(&Script::new().bash("sleep 98762").text("never")).await;
    let mut stream = client.stream(&running, None).await;
    let seen = stream.until("the call", |frame| frame.event == "tool_call").await;
    // The stream tells its reader to come again.
    let (restarted, rest) = tokio::join!(
        async {
            sidecar.signal(opencode_sidecar::sandbox::Signal::Term);
            sidecar.exited().await
        },
        async { while stream.next().await.is_some() {} }
    );
    let () = rest;
    assert_eq!(restarted.code, Some(0));
    assert!(!crate::support::sidecar::runs("sleep 98762"));

    let sidecar = world.start(&[]).await;
    let client = Client::of(&sidecar);
    assert_eq!(client.status(&finished).await["status"], "completed");
    assert_eq!(client.frames(&finished, None).await, frames, "the same log over a restart");
    let rest = client.frames(&running, last_id(&seen)).await;
    let ends: Vec<_> = rest.iter().filter(|f| f.event == "error" || f.event == "done").collect();
    assert_eq!(ends.len(), 2, "{rest:#?}");
    assert_eq!((&ends[0].data["error"], &ends[0].data["fatal"]), (&json!("interrupted"), &json!(true)));
    assert_eq!(ends[1].data["reason"], "interrupted");
    assert_eq!(client.stop(&running).await, json!({ "session_id": running, "status": "failed" }));
    let (status, _) =
        client.send(Method::POST, &format!("/sessions/{running}/messages"), Some(json!({ "text": "x" }))).await;
    assert_eq!(status, 409);
    sidecar.stop().await;
}

#[tokio::test]
async fn streams_are_open_only_where_that_was_said_and_the_proxys_names_never() {
    let world = World::new().await;
    let sidecar = world.start(&[("SESSIONS_STREAM_UNAUTHENTICATED", "1")]).await;
    let client = Client::of(&sidecar);
    let id = Uuid::new_v4().to_string();
    let body = json!({ "session_id": id, "prompt": Script::new().text("Hi.").to_prompt("x") });
    let (status, _) = client.send(Method::POST, "/session", Some(body)).await;
    assert_eq!(status, 201);
    let anonymous = |path: String| sidecar.http.get(format!("{}{path}", sidecar.base)).send();
    let open = anonymous(format!("/sessions/{id}/stream")).await.unwrap();
    let mut stream = Stream::open(open).await;
    let frames = stream.until("its end", |frame| frame.event == "done").await;
    assert_eq!(output(&frames), "Hi.");
    for path in [
        format!("/session/{id}/events"),
        format!("/sessions/{id}/status"),
        format!("/sessions/{id}"),
        format!("/session/{id}"),
        "/sessions".to_owned(),
        "/session".to_owned(),
    ] {
        assert_eq!(anonymous(path.clone()).await.unwrap().status(), 401, "{path}");
    }
    let ready = sidecar.get("/ready").await;
    assert!(ready["checks"]["auth"].to_string().contains("SESSIONS_STREAM_UNAUTHENTICATED"), "{ready}");
    let prompt = json!({ "text": Script::new().text("Again.").to_prompt("x") });
    let (status, _) = client.send(Method::POST, &format!("/session/{id}/prompt"), Some(prompt)).await;
    assert_eq!(status, 202);
    let proxied = sidecar.http.get(format!("{}/session/{id}/events", sidecar.base)).bearer_auth(&sidecar.secret);
    let mut stream =
        Stream::open(proxied.header("last-event-id", last_id(&frames).unwrap()).send().await.unwrap()).await;
    let more = stream.until("its end", |frame| frame.event == "done").await;
    assert_eq!(output(&more), "Again.");
    let (status, destroyed) = client.send(Method::DELETE, &format!("/session/{id}"), None).await;
    assert_eq!((status, &destroyed["status"]), (200, &json!("completed")));
    sidecar.stop().await;

    let sidecar = world.start(&[]).await;
    let closed = sidecar.http.get(format!("{}/sessions/{id}/stream", sidecar.base)).send().await.unwrap();
    assert_eq!(closed.status(), 401);
    sidecar.stop().await;
}
