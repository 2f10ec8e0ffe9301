//! OpenCode dies, freezes, or says something that is none of its events, in the middle of a run. The run ends in time, as
//! what it was, with a sentence for the user; nothing of it is left, and the next task runs.

#![allow(clippy::unwrap_used, reason = "a test's own helpers fail like the test")]

use crate::support::between::{After, Between, Fault};
use crate::support::sidecar::{Sidecar, World, runs, soon};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use opencode_sidecar::scripted::{Script, Step};
use serde_json::{Value, json};

/// A tool that never ends by itself.
fn in_a_tool(mark: &str) -> Script {
    Script::new().bash(&format!("(setsid sleep {mark}1 &); echo running; sleep {mark}2")).text("never reached")
}

/// An answer that has begun, and waits for a gate that nobody opens.
fn in_an_answer() -> Script {
    let text = Some("One two three four.".to_owned());
    Script::new().step(Step { text, hold: Some("closed".to_owned()), ..Step::default() })
}

/// A log that ends with this failure: told once, in a sentence; each call and each text has its end.
fn assert_failed(events: &[Value], reason: &str, code: &str) {
    let complete = &events.last().unwrap()["data"];
    assert_eq!((&complete["status"], &complete["reason"]), (&json!("failed"), &json!(reason)), "{events:#?}");
    assert_eq!(complete["final_message"], Value::Null, "{events:#?}");
    let errors: Vec<_> = events.iter().filter(|e| e["type"] == "error").map(|e| &e["data"]).collect();
    assert_eq!(errors.len(), 1, "{events:#?}");
    assert_eq!((&errors[0]["code"], &errors[0]["fatal"]), (&json!(code), &json!(true)), "{events:#?}");
    let sentence = errors[0]["message"].as_str().unwrap();
    assert!(sentence.len() > 30 && sentence.ends_with('.') && !sentence.contains("http"), "{sentence}");
    assert_ends(events);
}

/// Each call of a tool has its result, each text that was begun its end.
fn assert_ends(events: &[Value]) {
    let of = |kind: &'static str| events.iter().filter(move |e| e["type"] == kind).map(|e| &e["data"]);
    let calls: Vec<_> = of("tool_call").map(|data| &data["call_id"]).collect();
    let results: Vec<_> = of("tool_result").map(|data| &data["call_id"]).collect();
    assert_eq!(calls, results, "{events:#?}");
    for part in of("message").filter(|data| data["delta"].is_string()).map(|data| &data["part_id"]) {
        let told: String =
            of("message").filter(|d| d["part_id"] == *part).filter_map(|d| d["delta"].as_str()).collect();
        let ends: Vec<_> = of("message").filter(|d| d["part_id"] == *part && d["final"] == true).collect();
        assert_eq!(ends.iter().map(|end| &end["text"]).collect::<Vec<_>>(), [&json!(told)], "{events:#?}");
    }
}

fn assert_interrupted(events: &[Value]) {
    let results: Vec<_> = events.iter().filter(|e| e["type"] == "tool_result").map(|e| &e["data"]["error"]).collect();
    assert_eq!(results, [&json!("interrupted")], "{events:#?}");
}

/// The next task runs, and then nothing is left of any.
async fn goes_on(sidecar: Sidecar) {
    let next = sidecar.submit(&Script::new().bash("echo next").text("Fine.")).await;
    let record = sidecar.finished(&next).await;
    assert_eq!((&record["status"], &record["final_message"]), (&json!("completed"), &json!("Fine.")), "{record:#}");
    sidecar.stop().await;
}

/// Runs one script in a tool and one in an answer, and sends their OpenCodes the signal. Gives the ids and the processes.
async fn strike(sidecar: &Sidecar, mark: &str, signal: Signal) -> ([String; 2], Vec<Pid>) {
    let ids = [sidecar.submit(&in_a_tool(mark)).await, sidecar.submit(&in_an_answer()).await];
    let [tool, answer] = &ids;
    sidecar.stream(tool, 0).await.until("output", |e| e["type"] == "stdout").await;
    sidecar.stream(answer, 0).await.until("a piece", |e| e["data"]["delta"].is_string()).await;
    let opencodes: Vec<_> = sidecar.opencodes().into_iter().map(|pid| Pid::from_raw(pid.cast_signed())).collect();
    assert_eq!(opencodes.len(), 2, "{:?}", sidecar.descendants());
    for pid in &opencodes {
        kill(*pid, signal).unwrap();
    }
    (ids, opencodes)
}

#[tokio::test]
async fn killed_in_a_tool_call_and_in_an_answer() {
    let world = World::new().await;
    let sidecar = world.start(&[]).await;
    let ([tool, answer], _) = strike(&sidecar, "77101", Signal::SIGKILL).await;
    let events = sidecar.follow(&tool).await;
    assert_failed(&events, "opencode_crashed", "opencode_crashed");
    assert_interrupted(&events);
    let events = sidecar.follow(&answer).await;
    assert_failed(&events, "opencode_crashed", "opencode_crashed");
    assert!(events.iter().any(|e| e["abandoned"] == true), "{events:#?}");
    assert!(!runs("sleep 77101"));
    goes_on(sidecar).await;
}

#[tokio::test]
async fn frozen_in_a_tool_call_and_in_an_answer() {
    let world = World::new().await;
    let sidecar = world.start(&[("UNRESPONSIVE_TIMEOUT", "15")]).await;
    let ([tool, answer], opencodes) = strike(&sidecar, "77102", Signal::SIGSTOP).await;
    let events = sidecar.follow(&tool).await;
    assert_failed(&events, "opencode_unresponsive", "opencode_unresponsive");
    assert_interrupted(&events);
    assert_failed(&sidecar.follow(&answer).await, "opencode_unresponsive", "opencode_unresponsive");
    for pid in opencodes {
        assert_eq!(kill(pid, Signal::SIGCONT), Err(Errno::ESRCH), "there is nothing to wake up");
    }
    assert!(!runs("sleep 77102"));
    for id in [&tool, &answer] {
        assert_eq!(sidecar.status(id).await["reason"], "opencode_unresponsive");
    }
    goes_on(sidecar).await;
}

#[tokio::test]
async fn frozen_for_a_while_or_cancelled_meanwhile() {
    let world = World::new().await;
    let sidecar = world.start(&[("MAX_CONCURRENT_TASKS", "3"), ("UNRESPONSIVE_TIMEOUT", "600")]).await;
    let ([tool, answer], opencodes) = strike(&sidecar, "77103", Signal::SIGSTOP).await;
    // For as long as another task takes.
    let other = sidecar.submit(&Script::new().text("Meanwhile.")).await;
    assert_eq!(sidecar.finished(&other).await["status"], "completed");
    let (_, cancelled) = sidecar.post(&format!("/tasks/{tool}/cancel"), json!({})).await;
    assert_eq!(cancelled["status"], "cancelled");
    assert!(!runs("sleep 77103"));
    assert_interrupted(&sidecar.follow(&tool).await);
    let woken = opencodes.iter().filter(|pid| kill(**pid, Signal::SIGCONT).is_ok()).count();
    assert_eq!(woken, 1);
    world.model.open_gate("closed");
    let record = sidecar.finished(&answer).await;
    assert_eq!(
        (&record["status"], &record["final_message"]),
        (&json!("completed"), &json!("One two three four.")),
        "{record:#}"
    );
    goes_on(sidecar).await;
}

#[tokio::test]
async fn an_event_stream_of_something_else_and_one_that_is_cut() {
    let bytes = |text: &[u8]| Fault::Bytes(text.to_vec());
    let giant = [b"data: ".as_slice(), &vec![b'x'; 33 << 20]].concat();
    let faults = [
        ("no-sse", After::Tool, bytes(b"SSH-2.0-OpenSSH_9.2\r\n\0\x01\x02\n\n")),
        ("no-json", After::Tool, bytes(b"data: {nope\n\n")),
        ("list", After::Tool, bytes(b"data: []\n\n")),
        ("number", After::Text, bytes(b"data: {\"type\":7,\"properties\":{}}\n\n")),
        ("no-text", After::Tool, bytes(b"data: {\"type\":\"\xff\xfe\"}\n\n")),
        ("giant", After::Tool, Fault::Bytes(giant)),
        ("endless", After::Tool, Fault::Endless(": still here\n\n")),
        ("reset", After::Text, Fault::Cut { reset: true }),
        ("reset-tool", After::Tool, Fault::Cut { reset: true }),
        ("fin", After::Tool, Fault::Cut { reset: false }),
        ("end", After::Tool, Fault::End),
    ];
    let world = World::new().await;
    let between = Between::start(&world, &faults, &[]).await;
    let sidecar = between.sidecar(&world, &[("MAX_CONCURRENT_TASKS", "4")]).await;
    let mut ids = Vec::new();
    for (name, after, _) in &faults {
        let script = if *after == After::Text { in_an_answer() } else { in_a_tool("77104") };
        ids.push(sidecar.submit_with(&Script::new(), json!({ "prompt": Between::prompt(name, &script) })).await);
    }
    let mut sentences = Vec::new();
    for (id, (name, after, fault)) in ids.iter().zip(&faults) {
        if matches!(fault, Fault::Cut { .. }) {
            let seen = |event: &Value| event["type"] == "tool_call" || event["data"]["delta"].is_string();
            sidecar.stream(id, 0).await.until("what is said before the cut", seen).await;
            between.cut(name);
        }
        let events = sidecar.follow(id).await;
        assert_failed(&events, "opencode_unresponsive", "opencode_stream_lost");
        if *after == After::Tool {
            assert_interrupted(&events);
        }
        let error = events.iter().find(|e| e["type"] == "error").unwrap();
        sentences.push((*name, error["data"]["message"].as_str().unwrap().rsplit_once(": ").unwrap().1.to_owned()));
    }
    let broke = "its connection broke.";
    let no_event = "it holds something that is no event.";
    let too_long = "no event ends within 33554432 bytes.";
    let expected = [
        ("no-sse", "a line is no field of an event."),
        ("no-json", no_event),
        ("list", no_event),
        ("number", no_event),
        ("no-text", "an event is not UTF-8."),
        ("giant", too_long),
        ("endless", too_long),
        ("reset", broke),
        ("reset-tool", broke),
        ("fin", broke),
        ("end", "it ended."),
    ];
    assert_eq!(sentences, expected.map(|(name, sentence)| (name, sentence.to_owned())));
    assert!(!runs("sleep 77104"));
    goes_on(sidecar).await;
}

/// Events of a form that is not known stop nothing, and are kept word for word.
#[tokio::test]
async fn events_of_another_form_are_kept_as_they_are() {
    let odd = [
        json!({ "type": "message.updated", "properties": { "sessionID": "SESSION", "info": { "id": 7 } } }),
        json!({ "type": "message.part.updated", "properties": { "sessionID": "SESSION", "part": [] } }),
        json!({ "type": "message.part.delta", "properties": { "sessionID": "SESSION", "partID": "p", "delta": 1 } }),
        json!({ "type": "session.status", "properties": { "sessionID": "SESSION", "status": "busy" } }),
        json!({ "type": "session.error", "properties": { "sessionID": "SESSION", "error": "all is lost" } }),
        json!({ "type": "todo.updated", "properties": { "sessionID": "SESSION", "todos": "many" } }),
        json!({ "type": "permission.asked", "properties": { "sessionID": "SESSION", "id": null } }),
        json!({ "type": "question.asked", "properties": { "sessionID": "SESSION" } }),
        json!({ "type": "file.watcher.updated", "properties": null }),
        json!({ "type": "of.another.day", "properties": { "sessionID": "SESSION", "more": true }, "beside": 1 }),
        json!({ "type": "of.nobody", "properties": [1, 2] }),
        json!({ "type": "session.idle" }),
    ];
    let frames: String = odd.iter().map(|event| format!("data: {event}\n\n")).collect();
    let world = World::new().await;
    let between = Between::start(&world, &[("odd", After::Tool, Fault::Among(frames))], &[]).await;
    let sidecar = between.sidecar(&world, &[]).await;
    let script = Script::new().bash("echo hi").text("Done.");
    let id = sidecar.submit_with(&script, json!({ "prompt": Between::prompt("odd", &script) })).await;
    let events = sidecar.follow(&id).await;
    let complete = &events.last().unwrap()["data"];
    assert_eq!((&complete["status"], &complete["final_message"]), (&json!("completed"), &json!("Done.")));
    assert_ends(&events);
    let kept: Vec<_> = events.iter().filter(|e| e["type"] == "opencode").map(|e| &e["data"]).collect();
    let session = kept[0]["properties"]["sessionID"].as_str().unwrap();
    // Those that are of no session are no business of this run.
    let expected: Vec<Value> = odd[..10]
        .iter()
        .map(|event| json!({ "type": event["type"], "properties": event["properties"] }).to_string())
        .map(|text| serde_json::from_str(&text.replace("SESSION", session)).unwrap())
        .collect();
    assert_eq!(kept, expected.iter().collect::<Vec<_>>());
    goes_on(sidecar).await;
}

/// Its ports are open, and it says nothing any more: on the event stream alone, or at all.
#[tokio::test]
async fn wedged_in_the_middle() {
    let faults = [
        ("silence", After::Tool, Fault::Silence),
        ("wedge", After::Text, Fault::Wedge),
        ("wedge-at-the-end", After::Idle, Fault::Wedge),
    ];
    let world = World::new().await;
    let between = Between::start(&world, &faults, &[]).await;
    let changes = [("MAX_CONCURRENT_TASKS", "3"), ("UNRESPONSIVE_TIMEOUT", "15")];
    let sidecar = between.sidecar(&world, &changes).await;
    let said = Script::new().text("All is said.");
    let mut ids = Vec::new();
    for ((name, ..), script) in faults.iter().zip([in_a_tool("77105"), in_an_answer(), said]) {
        ids.push(sidecar.submit_with(&script, json!({ "prompt": Between::prompt(name, &script) })).await);
    }
    for id in &ids[..2] {
        assert_failed(&sidecar.follow(id).await, "opencode_unresponsive", "opencode_unresponsive");
    }
    // It had said all, but not that it was all.
    let events = sidecar.follow(&ids[2]).await;
    let complete = &events.last().unwrap()["data"];
    assert_eq!(
        (&complete["status"], &complete["reason"], &complete["final_message"]),
        (&json!("failed"), &json!("opencode_unresponsive"), &json!("All is said.")),
        "{events:#?}"
    );
    assert!(!runs("sleep 77105"));
    goes_on(sidecar).await;
}

/// Who wants the end of it does not wait for an answer of OpenCode's.
#[tokio::test]
async fn wedged_at_the_end_and_cancelled() {
    let world = World::new().await;
    let between = Between::start(&world, &[("wedge", After::Idle, Fault::Wedge)], &[]).await;
    let sidecar = between.sidecar(&world, &[]).await;
    let script = Script::new().text("All is said.");
    let id = sidecar.submit_with(&script, json!({ "prompt": Between::prompt("wedge", &script) })).await;
    // It was asked how it ended.
    between.hanging(1).await;
    let (_, cancelled) = sidecar.post(&format!("/tasks/{id}/cancel"), json!({})).await;
    assert_eq!(cancelled["status"], "cancelled");
    goes_on(sidecar).await;
}

#[tokio::test]
async fn wedged_before_it_takes_the_prompt() {
    let calls = [("GET", "/event"), ("POST", "/session"), ("POST", "/prompt_async")];
    let world = World::new().await;
    let between = Between::start(&world, &[], &calls).await;
    let changes = [("MAX_CONCURRENT_TASKS", "4"), ("UNRESPONSIVE_TIMEOUT", "15")];
    let sidecar = between.sidecar(&world, &changes).await;
    let mut ids = Vec::new();
    for _ in calls {
        ids.push(sidecar.submit(&Script::new().text("never reached")).await);
    }
    for id in &ids {
        assert_failed(&sidecar.follow(id).await, "opencode_unresponsive", "opencode_unresponsive");
    }
    assert_eq!(world.model.calls(), 0);
    goes_on(sidecar).await;
}

#[tokio::test]
async fn wedged_at_its_start() {
    let world = World::new().await;
    let between = Between::start(&world, &[], &[("GET", "/global/health"); 2]).await;
    let sidecar = between.sidecar(&world, &[("START_TIMEOUT", "25")]).await;
    let cancelled = sidecar.submit(&Script::new().text("never reached")).await;
    between.hanging(1).await;
    let slow = sidecar.submit(&Script::new().text("never reached")).await;
    let (_, answer) = soon("its end", sidecar.post(&format!("/tasks/{cancelled}/cancel"), json!({}))).await;
    assert_eq!(answer["status"], "cancelled");
    assert_failed(&sidecar.follow(&slow).await, "opencode_unresponsive", "opencode_start_failed");
    goes_on(sidecar).await;
}
