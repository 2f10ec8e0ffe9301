//! Streams: each connection is a cursor over the log, whatever happens to it.

use crate::support::sidecar::{World, assert_log, frame};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use futures_util::SinkExt;
use opencode_sidecar::scripted::Script;
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Message;

#[tokio::test]
async fn a_socket_that_drops_and_resumes_sees_each_event_once() {
    let world = World::new().await;
    let sidecar = world.start(&[]).await;
    let script = Script::new()
        .bash("for i in $(seq 20); do echo $i; sleep 0.02; done; until [ -e gate ]; do sleep 0.02; done; seq 21 40")
        .text("done");
    let id = sidecar.submit(&script).await;
    let mut seen: Vec<Value> = Vec::new();
    // Dropped without a word, ever again, at other places.
    for take in [1, 1, 1, 2] {
        let after = seen.last().map_or(0, |e: &Value| e["seq"].as_u64().unwrap());
        let mut socket = sidecar.socket(&format!("/tasks/{id}/stream?after={after}")).await;
        for _ in 0..take {
            seen.push(frame(&mut socket).await.unwrap());
        }
        drop(socket);
    }
    std::fs::write(world.file("gate"), "").unwrap();
    let after = seen.last().unwrap()["seq"].as_u64().unwrap();
    let mut socket = sidecar.socket(&format!("/tasks/{id}/stream?after={after}")).await;
    let code = loop {
        match frame(&mut socket).await {
            Ok(event) => seen.push(event),
            Err(code) => break code,
        }
    };
    assert_eq!(code, 1000);
    assert_log(&seen);
    assert_eq!(seen, sidecar.follow(&id).await, "SSE says the same, from the start, after the end");

    // From its end on there is nothing but the end; from beyond it, a reset and everything.
    let last = seen.len();
    let mut socket = sidecar.socket(&format!("/tasks/{id}/stream?after={last}")).await;
    assert_eq!(frame(&mut socket).await, Err(1000));
    let mut socket = sidecar.socket(&format!("/tasks/{id}/stream?after={}", last + 1)).await;
    assert_eq!(frame(&mut socket).await.unwrap(), json!({ "type": "reset", "last_seq": last, "epoch": 1 }));
    assert_eq!(frame(&mut socket).await.unwrap(), seen[0]);
    sidecar.stop().await;
}

#[tokio::test]
async fn a_socket_takes_commands_and_is_let_in_by_a_credential_only() {
    let world = World::new().await;
    let mut sidecar = world.start(&[]).await;
    let id = sidecar.submit(&Script::new().bash("echo on; sleep 660066").text("x")).await;
    let path = format!("/tasks/{id}/stream");
    sidecar.stream(&id, 0).await.until("work", |e| e["type"] == "stdout").await;

    // A browser's two ways.
    let token = URL_SAFE_NO_PAD.encode(&sidecar.secret);
    let protocols = format!("opencode.stream.v1, bearer.{token}");
    let mut by_protocol = sidecar.socket_with(&path, &[("sec-websocket-protocol", &protocols)]).await;
    assert_eq!(frame(&mut by_protocol).await.unwrap()["seq"], 1);
    let mut by_frame = sidecar.socket_with(&path, &[]).await;
    by_frame.send(Message::text(json!({ "type": "auth", "token": sidecar.secret }).to_string())).await.unwrap();
    assert_eq!(frame(&mut by_frame).await.unwrap()["seq"], 1);

    // And those who have none.
    let mut bad = sidecar.socket_with(&path, &[("authorization", "Bearer wrong")]).await;
    assert_eq!(frame(&mut bad).await, Err(4401));
    for first in [json!({ "type": "auth", "token": "wrong" }).to_string(), "{}".to_owned(), "nonsense".to_owned()] {
        let mut bad = sidecar.socket_with(&path, &[]).await;
        bad.send(Message::text(first)).await.unwrap();
        assert_eq!(frame(&mut bad).await, Err(4401));
    }
    let mut unknown = sidecar.socket(&format!("/tasks/{}/stream", uuid::Uuid::now_v7())).await;
    assert_eq!(frame(&mut unknown).await, Err(4404));

    // Bad frames end the socket at most, never the run.
    let mut socket = sidecar.socket(&path).await;
    socket.send(Message::text("no json")).await.unwrap();
    let code = loop {
        if let Err(code) = frame(&mut socket).await {
            break code;
        }
    };
    assert_eq!(code, 4400);
    let answer = async |text: &str| {
        let mut socket = sidecar.socket(&path).await;
        socket.send(Message::text(text)).await.unwrap();
        loop {
            let frame = frame(&mut socket).await.unwrap();
            if frame["seq"].is_null() {
                return frame;
            }
        }
    };
    assert_eq!(answer(r#"{"type":"dance"}"#).await["code"], "unknown_type");
    assert_eq!(answer(r#"{"type":"pause"}"#).await["code"], "not_supported");
    assert_eq!(sidecar.status(&id).await["status"], "running");

    assert_eq!(answer(r#"{"type":"cancel"}"#).await, json!({ "type": "ack", "of": "cancel" }));
    let events = sidecar.follow(&id).await;
    assert_eq!(events.last().unwrap()["data"]["status"], "cancelled");
    assert!(sidecar.log_so_far().iter().all(|line| !line.contains(&sidecar.secret)), "the secret is in the log");
    sidecar.stop().await;
}

/// A reader that takes nothing costs nothing and holds nobody up.
#[tokio::test]
async fn a_stuck_reader_does_not_slow_the_run() {
    let world = World::new().await;
    let sidecar = world.start(&[]).await;
    let id = sidecar.submit(&Script::new().bash("seq 1 300000").text("done")).await;
    let _stuck = sidecar.socket(&format!("/tasks/{id}/stream")).await;
    let _stuck_too = sidecar.stream(&id, 0).await;
    let record = sidecar.finished(&id).await;
    assert_eq!(record["status"], "completed", "{record:#}");
    drop((_stuck, _stuck_too));
    sidecar.stop().await;
}
