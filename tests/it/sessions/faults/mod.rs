//! A model that fails in every way, followed through both routes at once: each run ends with the right status, reason
//! and frames, none hangs, and the session takes the next prompt.

mod table;

use super::{Client, Frame, last_id, names};
use crate::support::sidecar::{API_KEY, Sidecar, World};
use reqwest::Method;
use serde_json::{Value, json};
use table::{End, Row, WORDS};
use tokio::net::{TcpSocket, TcpStream};
use uuid::Uuid;

/// What no sentence for a person has in it: the broker, code, JSON, the words of libraries.
const INTERNAL: [&str; 10] =
    ["/model/", "http:", "fetch", "socket", "JSON pars", "Type valid", "{", "\n", "undefined", "[object"];

#[tokio::test]
async fn faults_that_do_not_pass() {
    let world = World::new().await;
    let sidecar = start(&world, "1").await;
    tokio::join!(
        play(&world, &sidecar, "custom", table::for_good(false)),
        play(&world, &sidecar, "anthropic", table::for_good(true)),
    );
    sidecar.stop().await;
}

#[tokio::test]
async fn faults_that_pass_and_those_that_are_final_at_once() {
    let world = World::new().await;
    let sidecar = start(&world, "3").await;
    tokio::join!(
        play(&world, &sidecar, "custom", table::before_the_first_token()),
        play(&world, &sidecar, "custom", table::within_an_answer(false)),
        play(&world, &sidecar, "anthropic", table::within_an_answer(true)),
    );
    sidecar.stop().await;
}

#[tokio::test]
async fn a_provider_that_is_away_and_comes_back() {
    let world = World::new().await;
    let sidecar = start(&world, "1").await;
    let client = Client::of(&sidecar);
    // Bound and not listening: connections are refused, and nobody else gets the port.
    let door = TcpSocket::new_v4().unwrap();
    door.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let endpoint = format!("http://{}/v1", door.local_addr().unwrap());
    let id = create(&client, "custom", &endpoint).await;
    let away = Row {
        script: json!([{ "text": "Never said." }]),
        end: End::Failed("model_unreachable", None),
        calls: 1,
        retries: 0,
        says: Vec::new(),
    };
    let mark = follow(&sidecar, &client, &id, &away, None).await;
    assert_eq!(world.model.calls(), 0);
    let open = door.listen(16).unwrap();
    let model = world.model.base_url();
    let relay = async {
        let (mut outside, _) = open.accept().await.unwrap();
        let address = model.strip_prefix("http://").unwrap().split_once('/').unwrap().0;
        let mut inside = TcpStream::connect(address).await.unwrap();
        let _ = tokio::io::copy_bidirectional(&mut outside, &mut inside).await;
        // One call needs no more than one connection.
        std::future::pending().await
    };
    let back =
        Row { script: json!([{ "text": "Here again." }]), end: End::Completed, says: vec!["Here again."], ..away };
    tokio::select! {
        () = relay => {}
        _ = follow(&sidecar, &client, &id, &back, Some(mark)) => {}
    }
    assert_eq!(world.model.calls(), 1);
    client.stop(&id).await;
    sidecar.stop().await;
}

/// A sidecar with short clocks.
async fn start(world: &World, max_failures: &str) -> Sidecar {
    world
        .start(&[
            ("MAX_CONCURRENT_TASKS", "4"),
            ("MODEL_MAX_FAILURES", max_failures),
            ("MODEL_HEADER_TIMEOUT", "5"),
            ("MODEL_IDLE_TIMEOUT", "5"),
        ])
        .await
}

/// An idle session whose model is there.
async fn create(client: &Client<'_>, provider: &str, endpoint: &str) -> String {
    let id = Uuid::new_v4().to_string();
    let model = json!({ "provider": provider, "model": "m", "api_key": API_KEY, "api_endpoint": endpoint });
    let (status, made) =
        client.send(Method::POST, "/sessions", Some(json!({ "session_id": id, "model_config": model }))).await;
    assert_eq!(status, 201, "{made}");
    id
}

/// Plays the rows one after another in one session.
async fn play(world: &World, sidecar: &Sidecar, provider: &str, rows: Vec<Row>) {
    let client = Client::of(sidecar);
    let id = create(&client, provider, &world.model.base_url()).await;
    let mut mark = None;
    for row in rows {
        mark = Some(follow(sidecar, &client, &id, &row, mark).await);
    }
    client.stop(&id).await;
}

/// Plays one row, follows it through both routes, and checks what they show. Gives the last frame's id.
async fn follow(sidecar: &Sidecar, client: &Client<'_>, id: &str, row: &Row, mark: Option<String>) -> String {
    // The scripted model counts the calls of each conversation by its prompt.
    let body = json!({ "text": row.script().to_prompt(id) });
    let (status, taken) = client.send(Method::POST, &format!("/sessions/{id}/messages"), Some(body)).await;
    assert_eq!(status, 202, "{taken}");
    let execution = taken["execution_id"].as_str().unwrap();
    let (events, frames) = tokio::join!(sidecar.follow(execution), client.frames(id, mark.as_deref()));
    check_events(row, &events);
    check_frames(row, &events, &frames);
    last_id(&frames).unwrap().to_owned()
}

fn of<'a>(events: &'a [Value], kind: &str) -> Vec<&'a Value> {
    events.iter().filter(|event| event["type"] == kind).collect()
}

fn assert_for_people(message: &Value, shown: &str) {
    let message = message.as_str().unwrap();
    assert!(message.len() > 20, "{message:?} {shown}");
    assert!(!INTERNAL.iter().any(|word| message.contains(word)), "{message:?} {shown}");
}

/// The log: numbered and ended by `complete` (see [`Sidecar::follow`]); one reason; each retry; each text and each call
/// to its end.
fn check_events(row: &Row, events: &[Value]) {
    let shown = format!("{}\n{events:#?}", row.script);
    assert!(!shown.split_once('\n').unwrap().1.contains(API_KEY), "the key is shown: {shown}");
    let complete = &events.last().unwrap()["data"];
    let (status, reason) = match row.end {
        End::Completed => ("completed", "finished"),
        End::Failed(..) => ("failed", "model_error"),
    };
    assert_eq!((&complete["status"], &complete["reason"]), (&json!(status), &json!(reason)), "{shown}");
    assert_eq!(complete["usage"]["model_calls"], row.calls, "{shown}");
    let started = events.iter().find(|e| e["data"]["code"] == "session_started").unwrap();
    assert_eq!(started["data"]["warm"], true, "the process of the session was kept: {shown}");

    let fatal: Vec<_> = of(events, "error").into_iter().filter(|e| e["data"]["fatal"] == true).collect();
    match row.end {
        End::Completed => assert!(fatal.is_empty(), "{shown}"),
        End::Failed(code, retry_after) => {
            assert_eq!(fatal.len(), 1, "{shown}");
            let error = &fatal[0]["data"];
            assert_eq!((&error["code"], &error["retry_after"]), (&json!(code), &json!(retry_after)), "{shown}");
            assert_for_people(&error["message"], &shown);
            let (said, quoted) = (row.script.to_string().contains(WORDS), error["message"].to_string().contains(WORDS));
            assert_eq!(quoted, said && code != "model_auth", "{shown}");
        }
    }

    let retries: Vec<_> = events.iter().filter(|e| e["data"]["code"] == "model_retry").collect();
    assert_eq!(retries.len() as u64, row.retries, "{shown}");
    for (retry, attempt) in retries.iter().zip(1..) {
        assert_eq!(retry["data"]["attempt"], attempt, "{shown}");
        assert!(retry["data"]["wait_ms"].as_u64().unwrap() < 3_000, "{shown}");
        assert_for_people(&retry["data"]["message"], &shown);
        // What the answer that broke off had already set going is named: it may be done twice.
        let before = events.iter().take_while(|event| *event != *retry);
        let begun: Vec<_> = before.filter(|e| e["type"] == "tool_call").map(|e| e["data"]["call_id"].clone()).collect();
        if row.script[0]["cut"].is_string() {
            assert_eq!(retry["data"]["calls"], if begun.is_empty() { Value::Null } else { json!(begun) }, "{shown}");
        }
    }

    let said: Vec<_> = of(events, "message").into_iter().filter(|e| e["data"]["final"] == true).collect();
    let texts: Vec<_> = said.iter().map(|e| e["data"]["text"].as_str().unwrap()).collect();
    assert_eq!(texts, row.says, "{shown}");
    for text in said {
        let deltas = of(events, "message").into_iter().filter(|e| e["data"]["part_id"] == text["data"]["part_id"]);
        let whole: String = deltas.filter_map(|e| e["data"]["delta"].as_str()).collect();
        assert_eq!(text["data"]["text"], whole, "{shown}");
    }
    let ids = |kind| -> Vec<String> {
        let mut ids: Vec<_> = of(events, kind).iter().map(|e| e["data"]["call_id"].to_string()).collect();
        ids.sort();
        ids
    };
    assert_eq!(ids("tool_call"), ids("tool_result"), "{shown}");
}

/// The frames are those events, in that order, and end as the run does.
fn check_frames(row: &Row, events: &[Value], frames: &[Frame]) {
    let shown = format!("{}\n{frames:#?}", row.script);
    assert!(!shown.split_once('\n').unwrap().1.contains(API_KEY), "the key is shown: {shown}");
    let expected: Vec<(&str, Value)> = events
        .iter()
        .filter_map(|event| {
            let data = &event["data"];
            match event["type"].as_str().unwrap() {
                "stdout" | "stderr" => Some(("output", data.clone())),
                "message" if data["final"] == true => Some(("output", data["text"].clone())),
                "tool_call" => Some(("tool_call", data["args"].clone())),
                "tool_result" if data["error"].is_null() => Some(("tool_result", data["result"].clone())),
                "tool_result" => Some(("tool_result", data["error"].clone())),
                "status" => Some(("status", data.clone())),
                "error" => Some(("error", json!([data["code"], data["message"], data["fatal"]]))),
                "complete" if data["status"] == "completed" => Some(("complete", data["final_message"].clone())),
                _ => None,
            }
        })
        .collect();
    let got: Vec<(&str, Value)> = frames
        .iter()
        .filter(|frame| !matches!(frame.event.as_str(), "done" | "heartbeat"))
        .map(|Frame { event, data, .. }| {
            let data = match event.as_str() {
                "output" => &data["text"],
                "tool_call" => &data["args"],
                "tool_result" => &data["result"],
                "status" => &data["status"],
                "error" => &json!([data["error"], data["message"], data["fatal"]]),
                _ => &data["final_message"],
            };
            (event.as_str(), data.clone())
        })
        .collect();
    assert_eq!(got, expected, "{shown}");
    let end: Vec<_> = names(frames).into_iter().filter(|name| *name != "heartbeat").collect();
    let last = match row.end {
        End::Completed => ["status", "complete", "done"],
        End::Failed(..) => ["error", "status", "done"],
    };
    assert!(end.ends_with(&last), "{shown}");
    assert_eq!(frames.last().unwrap().data["reason"], events.last().unwrap()["data"]["reason"], "{shown}");
    assert_eq!(end.iter().filter(|name| **name == "done").count(), 1, "{shown}");
}
