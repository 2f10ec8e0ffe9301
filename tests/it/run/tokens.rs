//! What a token opens while it lasts, and what becomes of its stream when it ends.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test's own helpers fail like the test")]

use crate::support::mint::{Signer, but, claims, in_seconds};
use crate::support::sidecar::{Sidecar, Socket, World, answer, frame, soon};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use futures_util::{SinkExt, StreamExt};
use opencode_sidecar::scripted::Script;
use reqwest::{Method, Response};
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Message;

const KEY: &str = "a-key-of-thirty-two-bytes-or-more";
const PROJECT: &str = "default";

async fn send(sidecar: &Sidecar, token: &str, method: Method, path: &str) -> (u16, Value) {
    let request = sidecar.http.request(method, format!("{}{path}", sidecar.base)).bearer_auth(token);
    answer(soon(path, request.send()).await.unwrap()).await
}

/// As a browser opens it.
async fn browser(sidecar: &Sidecar, id: &str, token: &str) -> Socket {
    let offered = format!("opencode.stream.v1, bearer.{}", URL_SAFE_NO_PAD.encode(token));
    sidecar.socket_with(&format!("/tasks/{id}/stream"), &[("sec-websocket-protocol", &offered)]).await
}

/// The code that a socket is closed with, whatever comes before.
async fn closed(socket: &mut Socket) -> u16 {
    loop {
        if let Err(code) = frame(socket).await {
            return code;
        }
    }
}

/// The answer to a frame.
async fn ask(socket: &mut Socket, text: Value) -> Value {
    socket.send(Message::text(text.to_string())).await.unwrap();
    loop {
        let frame = frame(socket).await.unwrap();
        if frame["seq"].is_null() {
            return frame;
        }
    }
}

async fn follow(sidecar: &Sidecar, path: &str, token: &str) -> Response {
    let request = sidecar.http.get(format!("{}{path}", sidecar.base)).bearer_auth(token);
    let response = soon(path, request.send()).await.unwrap();
    assert_eq!(response.status(), 200, "{path}");
    response
}

/// Runs until it is cancelled.
fn endless() -> Script {
    Script::new().bash("echo on; sleep 660067").text("x")
}

/// With the shared secret alone: the sidecar signs with a key of its own.
#[tokio::test]
async fn a_stream_token_reads_one_execution_and_does_nothing_else() {
    let world = World::new().await;
    let sidecar = world.start(&[]).await;
    let (id, other) = (sidecar.submit(&endless()).await, sidecar.submit(&Script::new().text("x")).await);
    sidecar.follow(&other).await;
    let (status, made) = sidecar.send(Method::POST, &format!("/tasks/{id}/stream-token"), None).await;
    assert_eq!((status, &made["execution_id"]), (200, &json!(id)), "{made}");
    let until: chrono::DateTime<chrono::Utc> = made["expires_at"].as_str().unwrap().parse().unwrap();
    let left = (until - chrono::Utc::now()).num_seconds();
    assert!((1..=60).contains(&left), "{made}");
    let token = made["token"].as_str().unwrap();

    assert_eq!(frame(&mut browser(&sidecar, &id, token).await).await.unwrap()["seq"], 1);
    let mut late = sidecar.socket_with(&format!("/tasks/{id}/stream"), &[]).await;
    late.send(Message::text(json!({ "type": "auth", "token": token }).to_string())).await.unwrap();
    assert_eq!(frame(&mut late).await.unwrap()["seq"], 1);
    drop(follow(&sidecar, &format!("/tasks/{id}/stream"), token).await);
    assert_eq!(send(&sidecar, token, Method::GET, &format!("/tasks/{id}/status")).await.0, 200);

    let refused = ask(&mut late, json!({ "type": "cancel" })).await;
    assert_eq!(
        (&refused["type"], &refused["of"], &refused["code"]),
        (&json!("error"), &json!("cancel"), &json!("forbidden"))
    );
    assert_eq!(closed(&mut browser(&sidecar, &other, token).await).await, 4403);
    for (method, path) in [
        (Method::POST, format!("/tasks/{id}/stream-token")),
        (Method::POST, format!("/tasks/{id}/cancel")),
        (Method::DELETE, format!("/tasks/{id}")),
        (Method::GET, format!("/tasks/{id}/output")),
        (Method::GET, format!("/tasks/{other}")),
        (Method::GET, format!("/tasks/{}", uuid::Uuid::now_v7())),
        (Method::GET, "/tasks".to_owned()),
        (Method::GET, "/sessions".to_owned()),
        (Method::POST, "/tasks/execute".to_owned()),
    ] {
        let (status, body) = send(&sidecar, token, method, &path).await;
        assert_eq!((status, &body["code"]), (403, &json!("forbidden")), "{path}: {body}");
    }
    let unknown = format!("/tasks/{}/stream-token", uuid::Uuid::now_v7());
    assert_eq!(sidecar.send(Method::POST, &unknown, None).await.0, 404);
    assert_eq!(sidecar.status(&id).await["status"], "running");
    assert_eq!(sidecar.post(&format!("/tasks/{id}/cancel"), json!({})).await.0, 200);
    sidecar.stop().await;

    // Another life has another key.
    let again = world.start(&[]).await;
    assert_eq!(send(&again, token, Method::GET, &format!("/tasks/{id}/status")).await.0, 401);
    again.stop().await;
}

/// How long a token lasts that is to end while it reads, in seconds: long enough to open everything on a busy machine.
const SHORT: i64 = 20;

/// What a stream of server-sent events says where its credential ends.
async fn ends_without_an_end(stream: Response) {
    let text = soon("the end of a stream", stream.text()).await.unwrap();
    assert!(text.ends_with(": the credential has expired\n\n") && !text.contains("event: complete"), "{text}");
}

#[tokio::test]
async fn reading_ends_with_the_token_unless_it_is_replaced() {
    let world = World::new().await;
    let sidecar = world.start(&[("JWT_SECRET", KEY)]).await;
    let signer = Signer::hmac(KEY);
    let id = sidecar.submit(&endless()).await;
    sidecar.stream(&id, 0).await.until("work", |e| e["type"] == "stdout").await;

    let changes = json!({ "exp": in_seconds(SHORT), "execution_id": id });
    let short = signer.token(&but(&claims(PROJECT, "tasks:read tasks:control"), changes));
    let mut socket = browser(&sidecar, &id, &short).await;
    let mut replaced = browser(&sidecar, &id, &short).await;
    let stream = follow(&sidecar, &format!("/tasks/{id}/stream"), &short).await;

    // A token of another execution does not replace it; a good one does, and brings its own scopes.
    for wrong in [json!({ "execution_id": uuid::Uuid::now_v7() }), json!({ "exp": in_seconds(-1) })] {
        let token = signer.token(&but(&claims(PROJECT, "tasks:read"), wrong));
        assert_eq!(ask(&mut replaced, json!({ "type": "auth", "token": token })).await["type"], "error");
    }
    let reader = signer.token(&claims(PROJECT, "tasks:read"));
    let ack = json!({ "type": "ack", "of": "auth" });
    assert_eq!(ask(&mut replaced, json!({ "type": "auth", "token": reader })).await, ack);

    assert_eq!(closed(&mut socket).await, 4401);
    ends_without_an_end(stream).await;
    assert_eq!(closed(&mut browser(&sidecar, &id, &short).await).await, 4401);

    // This one reads on, and may only read now.
    assert_eq!(ask(&mut replaced, json!({ "type": "cancel" })).await["code"], "forbidden");
    assert_eq!(sidecar.status(&id).await["status"], "running", "the run does not end with its readers");
    let all = signer.token(&but(&claims(PROJECT, "tasks:read tasks:control"), json!({ "execution_id": id })));
    assert_eq!(ask(&mut replaced, json!({ "type": "auth", "token": all })).await, ack);
    assert_eq!(ask(&mut replaced, json!({ "type": "cancel" })).await, json!({ "type": "ack", "of": "cancel" }));
    assert_eq!(closed(&mut replaced).await, 1000);
    sidecar.stop().await;
}

#[tokio::test]
async fn a_sessions_stream_and_terminal_end_with_the_token() {
    let world = World::new().await;
    let sidecar = world.start(&[("JWT_SECRET", KEY)]).await;
    let session = uuid::Uuid::new_v4();
    assert_eq!(sidecar.post("/sessions", json!({ "session_id": session })).await.0, 201);
    let changes = json!({ "exp": in_seconds(SHORT) });
    let short = Signer::hmac(KEY).token(&but(&claims(PROJECT, "tasks:read tasks:control"), changes));
    let stream = follow(&sidecar, &format!("/sessions/{session}/stream"), &short).await;
    let offered = format!("opencode.stream.v1, bearer.{}", URL_SAFE_NO_PAD.encode(&short));
    let path = format!("/sessions/{session}/terminal");
    let mut terminal = sidecar.socket_with(&path, &[("sec-websocket-protocol", &offered)]).await;
    let code = loop {
        let message = soon("the end of a terminal", terminal.next()).await.unwrap().unwrap();
        if let Message::Close(close) = message {
            break u16::from(close.unwrap().code);
        }
    };
    assert_eq!(code, 4401);
    ends_without_an_end(stream).await;
    assert_eq!(sidecar.send(Method::DELETE, &format!("/sessions/{session}"), None).await.0, 200);
    sidecar.stop().await;
}

/// A backend's own callers do not meet in their keys.
#[tokio::test]
async fn idempotency_keys_belong_to_the_subject_of_a_token() {
    let world = World::new().await;
    let sidecar = world.start(&[("JWT_SECRET", KEY)]).await;
    let submit = async |subject: &str| {
        let token = Signer::hmac(KEY).token(&but(&claims(PROJECT, "tasks:execute"), json!({ "sub": subject })));
        let body = json!({ "task_id": "0197c3a0-0000-7000-8000-000000000001", "prompt": Script::new().text("x").to_prompt("x") });
        let request = sidecar.http.post(format!("{}/tasks/execute", sidecar.base)).bearer_auth(token);
        answer(request.header("idempotency-key", "k").json(&body).send().await.unwrap()).await
    };
    let (ada, again, grace) = (submit("ada").await, submit("ada").await, submit("grace").await);
    assert_eq!((ada.0, again.0, grace.0), (202, 200, 202), "{ada:?} {again:?} {grace:?}");
    assert_eq!(ada.1["execution_id"], again.1["execution_id"]);
    for taken in [ada, grace] {
        sidecar.follow(taken.1["execution_id"].as_str().unwrap()).await;
    }
    sidecar.stop().await;
}
