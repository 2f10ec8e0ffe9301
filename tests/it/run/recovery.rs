//! What a restart makes of what was there before it: what waited runs, what was to go on goes on, all else says that it
//! was interrupted; with the database or without, here or on another sidecar.

#![allow(clippy::unwrap_used, reason = "a test's own helpers fail like the test")]

use crate::support::proxy::Proxy;
use crate::support::sidecar::{API_KEY, Sidecar, World, assert_log, runs, soon};
use nix::sys::signal::{self, Signal};
use nix::unistd::Pid;
use opencode_sidecar::scripted::Script;
use reqwest::Method;
use secrecy::ExposeSecret;
use serde_json::{Value, json};
use std::fs;

const ONE: (&str, &str) = ("MAX_CONCURRENT_TASKS", "1");

async fn end(sidecar: Sidecar, how: Signal) {
    signal::kill(Pid::from_raw(sidecar.pid().cast_signed()), how).unwrap();
    sidecar.exited().await;
}

async fn kill(sidecar: Sidecar) {
    end(sidecar, Signal::SIGKILL).await;
}

/// A step that runs until it is told, and counts how often.
fn gated(world: &World, name: &str) -> Script {
    Script::new().bash(&gate(world, name))
}

fn gate(world: &World, name: &str) -> String {
    let (count, gate) = (world.path(&format!("{name}.count")), world.path(&format!("{name}.gate")));
    format!("echo run >> {count}; echo on; until [ -e {gate} ]; do sleep 0.05; done; echo off")
}

fn open(world: &World, name: &str) {
    fs::write(world.file(&format!("{name}.gate")), "").unwrap();
}

async fn works(sidecar: &Sidecar, id: &str) -> Vec<Value> {
    sidecar.stream(id, 0).await.until("work", |event| event["type"] == "stdout").await
}

fn with_code<'a>(events: &'a [Value], code: &str) -> Vec<&'a Value> {
    events.iter().filter(|event| event["data"]["code"] == code).collect()
}

/// All of a log that is in another epoch than its first.
async fn told_again(sidecar: &Sidecar, id: &str) -> Vec<Value> {
    let mut stream = sidecar.stream(id, 0).await;
    assert_eq!(stream.next().await.unwrap()["type"], "epoch");
    let events = stream.until("the end", |event| event["type"] == "complete").await;
    assert_log(&events);
    events
}

async fn submit_with_key(sidecar: &Sidecar, key: &str, script: &Script) -> (u16, Value, bool) {
    let body = json!({ "task_id": uuid::Uuid::from_u128(7), "prompt": script.to_prompt("x") });
    let request = sidecar.http.post(format!("{}/tasks/execute", sidecar.base)).bearer_auth(&sidecar.secret);
    let answer = request.header("idempotency-key", key).json(&body).send().await.unwrap();
    let replayed = answer.headers().contains_key("idempotent-replayed");
    (answer.status().as_u16(), answer.json().await.unwrap(), replayed)
}

const KEYS: [&str; 2] = ["sk-of-the-second-0123456789", "sk-of-the-third-0123456789"];

/// One that runs and two that wait, each of these with a key of its own; the sidecar ends, and starts again.
async fn what_waited_runs(signal: Signal) {
    let world = World::new().await;
    let sidecar = world.start(&[ONE]).await;
    let running = sidecar.submit(&gated(&world, "first").text("never")).await;
    let mut seen = works(&sidecar, &running).await;
    let mut waiting = Vec::new();
    for key in KEYS {
        let model = json!({ "provider": "custom", "model": "scripted-model", "api_key": key,
            "api_endpoint": world.model.base_url() });
        waiting.push(sidecar.submit_with(&Script::new().text("fine"), json!({ "model_config": model })).await);
    }
    let told = sidecar.stream(&waiting[0], 0).await.next().await.unwrap();
    end(sidecar, signal).await;

    let sidecar = world.start(&[ONE]).await;
    let mut stream = sidecar.stream(&running, seen.len() as u64).await;
    while let Some(event) = stream.next().await {
        seen.push(event);
    }
    assert_log(&seen);
    let complete = &seen.last().unwrap()["data"];
    assert_eq!((&complete["status"], &complete["reason"]), (&json!("failed"), &json!("interrupted")));
    let call = seen.iter().find(|event| event["type"] == "tool_call").unwrap();
    let results: Vec<_> = seen.iter().filter(|event| event["type"] == "tool_result").collect();
    assert_eq!((results.len(), &results[0]["data"]["error"]), (1, &json!("interrupted")), "{seen:#?}");
    assert_eq!(results[0]["data"]["call_id"], call["data"]["call_id"]);
    for (id, key) in waiting.iter().zip(KEYS) {
        let events = sidecar.follow(id).await;
        assert_eq!(events.last().unwrap()["data"]["final_message"], "fine", "{events:#?}");
        assert_eq!(with_code(&events, "restarted").len(), 1, "{events:#?}");
        assert!(world.model.authorization_values().contains(&format!("Bearer {key}")), "it ran with its own key");
    }
    assert_eq!(sidecar.stream(&waiting[0], 0).await.next().await.unwrap(), told);
    let record = sidecar.get(&format!("/tasks/{}", waiting[1])).await;
    assert!(!record.to_string().contains(KEYS[1]), "{record:#}");
    assert_eq!(fs::read_to_string(world.file("first.count")).unwrap(), "run\n");
    sidecar.stop().await;
}

#[tokio::test]
async fn what_waited_runs_after_a_sigkill() {
    what_waited_runs(Signal::SIGKILL).await;
}

#[tokio::test]
async fn what_waited_runs_after_a_sigterm() {
    what_waited_runs(Signal::SIGTERM).await;
}

/// Also where a start is cut off between the new key and the end of the old one, again and again.
#[tokio::test]
async fn each_life_has_a_sealing_key_of_its_own_and_what_waits_moves_to_it() {
    let world = World::new().await;
    let key = |name: &str| fs::read(world.state.path().join(name)).ok();
    let sidecar = world.start(&[ONE]).await;
    let running = sidecar.submit(&gated(&world, "first")).await;
    works(&sidecar, &running).await;
    let next = sidecar.submit(&gated(&world, "second")).await;
    let waiting = sidecar.submit(&Script::new().text("at last")).await;
    let first = key("sealing.key").unwrap();
    kill(sidecar).await;
    let sidecar = world.start(&[ONE]).await;
    let second = key("sealing.key").unwrap();
    assert!(second != first && key("sealing.previous").is_none());
    works(&sidecar, &next).await;
    assert_eq!(sidecar.status(&waiting).await["status"], "pending");
    kill(sidecar).await;
    // As a start leaves it that gets no further than its new key.
    fs::write(world.state.path().join("sealing.previous"), &second).unwrap();
    fs::write(world.state.path().join("sealing.key"), [7; 32]).unwrap();
    let sidecar = world.start(&[ONE]).await;
    assert_eq!((key("sealing.key"), key("sealing.previous")), (Some(vec![7; 32]), None));
    assert_eq!(sidecar.finished(&waiting).await["status"], "completed");
    assert!(world.model.authorization_values().iter().all(|value| value == &format!("Bearer {API_KEY}")));
    kill(sidecar).await;
}

#[tokio::test]
async fn without_the_sidecars_own_key_nothing_runs() {
    let world = World::new().await;
    let sidecar = world.start(&[ONE]).await;
    let running = sidecar.submit(&gated(&world, "first")).await;
    works(&sidecar, &running).await;
    let waiting = sidecar.submit(&Script::new().text("never")).await;
    kill(sidecar).await;
    let calls = world.model.calls();
    fs::remove_file(world.state.path().join("sealing.key")).unwrap();
    let sidecar = world.start(&[ONE]).await;
    let events = sidecar.follow(&waiting).await;
    let complete = &events.last().unwrap()["data"];
    assert_eq!((&complete["status"], &complete["reason"]), (&json!("failed"), &json!("interrupted")), "{events:#?}");
    let error = events.iter().find(|event| event["type"] == "error").unwrap();
    assert!(error["data"]["message"].as_str().unwrap().contains("key"), "{error}");
    assert_eq!(world.model.calls(), calls);
    sidecar.stop().await;
    fs::write(world.state.path().join("sealing.key"), "half").unwrap();
    let log = world.start_in_vain(&[]).await;
    assert!(log.contains("sealing.key"), "{log}");
}

/// In the same conversation, with what was cut off said, and no call of a tool twice.
async fn goes_on_where_it_was(signal: Signal) {
    let world = World::new().await;
    let sidecar = world.start(&[]).await;
    let script = Script::new().bash("echo before").bash(&gate(&world, "work")).text("all done");
    let id = sidecar.submit_with(&script, json!({ "on_restart": "resume" })).await;
    let is_second = |event: &Value| event["type"] == "stdout" && event["data"] == "on\n";
    let mut seen = sidecar.stream(&id, 0).await.until("the second call", is_second).await;
    end(sidecar, signal).await;
    let calls = world.model.calls();

    let sidecar = world.start(&[]).await;
    let mut stream = sidecar.stream(&id, seen.len() as u64).await;
    while let Some(event) = stream.next().await {
        seen.push(event);
    }
    assert_log(&seen);
    let complete = &seen.last().unwrap()["data"];
    assert_eq!((&complete["status"], &complete["reason"]), (&json!("completed"), &json!("finished")), "{seen:#?}");
    assert_eq!(complete["final_message"], "all done");
    assert_eq!(complete["usage"]["model_calls"], calls + 1, "those before the restart count too: {complete}");
    let calls: Vec<_> = seen.iter().filter(|e| e["type"] == "tool_call").map(|e| &e["data"]["call_id"]).collect();
    let results: Vec<_> = seen.iter().filter(|e| e["type"] == "tool_result").map(|e| &e["data"]["call_id"]).collect();
    assert_eq!((calls.len(), &calls), (2, &results), "{seen:#?}");
    let restarted = with_code(&seen, "restarted");
    assert_eq!(restarted.len(), 1);
    assert_eq!(fs::read_to_string(world.file("work.count")).unwrap(), "run\n", "never a replayed call");
    // The model has what was before, and is told what was cut off.
    let asked = String::from_utf8(world.model.requests().pop().unwrap().body.to_vec()).unwrap();
    assert!(asked.contains("echo before") && asked.contains("They have not been run again"), "{asked}");
    if signal == Signal::SIGKILL {
        assert_eq!(restarted[0]["data"]["interrupted_calls"], json!([calls[1]]));
    }
    let statuses: Vec<_> = seen.iter().filter(|e| e["type"] == "status").map(|e| &e["data"]).collect();
    assert_eq!(statuses, ["pending", "running", "completed"]);
    assert!(world.private_directories().is_empty(), "nothing stays on disk");
    sidecar.stop().await;
}

#[tokio::test]
async fn what_is_to_be_resumed_goes_on_after_a_sigkill() {
    goes_on_where_it_was(Signal::SIGKILL).await;
}

#[tokio::test]
async fn what_is_to_be_resumed_goes_on_after_a_sigterm() {
    goes_on_where_it_was(Signal::SIGTERM).await;
}

/// OpenCode writes a call down before it tells of it: here the sidecar ends in between.
#[tokio::test]
async fn a_call_that_only_the_conversation_has_is_told_as_cut_off() {
    let world = World::new().await;
    let sidecar = world.start(&[("OPENCODE_SIDECAR_FAILPOINT", "run-call:2")]).await;
    let script = Script::new().bash("echo before").bash("sleep 600; echo never").text("all done");
    let id = sidecar.submit_with(&script, json!({ "on_restart": "resume" })).await;
    assert_eq!(sidecar.exited().await.signal, Some(9));

    let sidecar = world.start(&[]).await;
    let events = sidecar.follow(&id).await;
    assert_eq!(events.last().unwrap()["data"]["final_message"], "all done", "{events:#?}");
    let of_kind = |kind: &str| -> Vec<_> { events.iter().filter(|e| e["type"] == kind).map(|e| &e["data"]).collect() };
    let (calls, results) = (of_kind("tool_call"), of_kind("tool_result"));
    assert_eq!((calls.len(), results.len()), (2, 2), "{events:#?}");
    assert_eq!(calls[1]["args"]["command"], "sleep 600; echo never");
    assert_eq!(results[1]["call_id"], calls[1]["call_id"]);
    assert_eq!((&results[0]["error"], &results[1]["error"]), (&json!(null), &json!("interrupted")));
    let asked = String::from_utf8(world.model.requests().pop().unwrap().body.to_vec()).unwrap();
    let (_, told) = asked.split_once("They have not been run again").unwrap();
    assert!(told.contains("sleep 600; echo never"), "{told}");
    assert!(!told.contains("echo before"), "{told}");
    sidecar.stop().await;
}

#[tokio::test]
async fn what_takes_the_sidecar_with_it_is_not_resumed_for_ever_and_what_is_cancelled_is_not_resumed() {
    let world = World::new().await;
    let mut sidecar = world.start(&[]).await;
    let long = |gate| gated(&world, gate).bash("sleep 600").text("never");
    let (script, other) = (long("work"), long("other"));
    let id = sidecar.submit_with(&script, json!({ "on_restart": "resume" })).await;
    let cancelled = sidecar.submit_with(&other, json!({ "on_restart": "resume" })).await;
    works(&sidecar, &id).await;
    works(&sidecar, &cancelled).await;
    for restarts in 1..=4 {
        kill(sidecar).await;
        sidecar = world.start(&[]).await;
        if restarts == 1 {
            let (_, answer) = sidecar.post(&format!("/tasks/{cancelled}/cancel"), json!({})).await;
            assert_eq!(answer["status"], "cancelled");
        }
        let restarted = |events: &[Value]| with_code(events, "restarted").len() == restarts;
        let mut stream = sidecar.stream(&id, 0).await;
        let mut events = Vec::new();
        while !restarted(&events) && restarts < 4 {
            events.push(stream.next().await.unwrap());
        }
    }
    let record = sidecar.finished(&id).await;
    assert_eq!((&record["status"], &record["reason"]), (&json!("failed"), &json!("interrupted")), "{record:#}");
    assert_eq!(sidecar.status(&cancelled).await["status"], "cancelled");
    sidecar.stop().await;
}

/// A node that comes back before its database does.
#[tokio::test]
async fn a_start_needs_no_database() {
    let world = World::new().await;
    let (proxy, options) = Proxy::before(world.database()).await;
    let setting = [ONE, ("DATABASE_URL", options.url.expose_secret())];
    let sidecar = world.start(&setting).await;
    let (_, first, _) = submit_with_key(&sidecar, "k", &gated(&world, "first").text("first")).await;
    let running = first["execution_id"].as_str().unwrap().to_owned();
    let mut seen = works(&sidecar, &running).await;
    let waiting = sidecar.submit(&Script::new().bash("echo it ran").text("second")).await;
    proxy.cut();
    kill(sidecar).await;

    let sidecar = world.start(&setting).await;
    let ready = sidecar.get("/ready").await;
    assert_eq!(ready["checks"]["database"]["status"], "degraded", "{ready:#}");
    let mut stream = sidecar.stream(&running, seen.len() as u64).await;
    while let Some(event) = stream.next().await {
        seen.push(event);
    }
    assert_log(&seen);
    assert_eq!(sidecar.status(&running).await["reason"], "interrupted");
    let (status, again, replayed) = submit_with_key(&sidecar, "k", &gated(&world, "first").text("first")).await;
    assert_eq!((status, replayed, &again["execution_id"]), (200, true, &json!(running)), "{again}");
    assert_eq!(submit_with_key(&sidecar, "k", &Script::new().text("other")).await.0, 409);
    let (status, new, replayed) = submit_with_key(&sidecar, "k2", &Script::new().text("new")).await;
    assert_eq!((status, replayed), (202, false), "{new}");
    let told = sidecar.follow(&waiting).await;
    assert_eq!(told.last().unwrap()["data"]["final_message"], "second");
    assert_eq!(
        sidecar.follow(new["execution_id"].as_str().unwrap()).await.last().unwrap()["data"]["status"],
        "completed"
    );
    // A second life without it still has what the first one did.
    kill(sidecar).await;
    let sidecar = world.start(&setting).await;
    assert_eq!(sidecar.follow(&waiting).await, told);
    let (status, _, replayed) = submit_with_key(&sidecar, "k2", &Script::new().text("new")).await;
    assert_eq!((status, replayed), (200, true));
    proxy.mend();
    let history = soon("it is shipped", async {
        loop {
            let (status, history) = sidecar.send(Method::GET, "/tasks", None).await;
            let all = history["executions"].as_array().map_or(0, Vec::len);
            if status == 200 && all == 3 && history.to_string().matches("\"completed_at\":\"").count() == 3 {
                return history;
            }
        }
    })
    .await;
    assert_eq!(history.to_string().matches("\"completed\"").count(), 2, "{history:#}");
    assert_eq!(sidecar.follow(&waiting).await, told);
    sidecar.stop().await;
}

/// Its keys are in the database: until that was asked nothing with a key is taken, and then they are known.
#[tokio::test]
async fn a_state_directory_that_was_lost_runs_nothing_twice() {
    let world = World::new().await;
    let (proxy, options) = Proxy::before(world.database()).await;
    let other = tempfile::tempdir().unwrap();
    let setting = [("DATABASE_URL", options.url.expose_secret()), ("STATE_DIR", other.path().to_str().unwrap())];
    let sidecar = world.start(&[]).await;
    let (_, first, _) = submit_with_key(&sidecar, "k", &Script::new().text("x")).await;
    sidecar.follow(first["execution_id"].as_str().unwrap()).await;
    sidecar.stop().await;
    proxy.cut();
    let sidecar = world.start(&setting).await;
    let (status, refused, _) = submit_with_key(&sidecar, "k", &Script::new().text("x")).await;
    assert_eq!((status, &refused["code"]), (503, &json!("unavailable")), "{refused}");
    let id = sidecar.submit(&Script::new().text("without a key")).await;
    assert_eq!(sidecar.follow(&id).await.last().unwrap()["data"]["status"], "completed");
    proxy.mend();
    let again = soon("the keys are known", async {
        loop {
            let (status, again, replayed) = submit_with_key(&sidecar, "k", &Script::new().text("x")).await;
            if status != 503 {
                assert_eq!((status, replayed), (200, true), "{again}");
                return again;
            }
        }
    })
    .await;
    assert_eq!(again["execution_id"], first["execution_id"]);
    sidecar.stop().await;
}

/// Two of one project: the one leaves the other's alone for as long as it lives, ends them when it is gone, and what that
/// one brings when it comes back changes no status.
#[tokio::test]
async fn what_a_sidecar_that_is_gone_has_left_is_ended_by_another() {
    let world = World::new().await;
    let (elsewhere, lease) = (tempfile::tempdir().unwrap(), ("LEASE_SECONDS", "3"));
    let (proxy, options) = Proxy::before(world.database()).await;
    let one = world.start(&[ONE, lease, ("DATABASE_URL", options.url.expose_secret())]).await;
    let running = one.submit(&gated(&world, "first").text("never")).await;
    let mut seen = works(&one, &running).await;
    let waiting = one.submit(&Script::new().text("never")).await;
    let (_, keyed, _) = submit_with_key(&one, "k", &Script::new().text("never")).await;
    one.shipped().await;
    let two = world.start(&[lease, ("STATE_DIR", elsewhere.path().to_str().unwrap())]).await;
    assert_eq!(two.status(&running).await["status"], "running");
    // A key that another one has taken is known, too.
    let (status, again, replayed) = submit_with_key(&two, "k", &Script::new().text("never")).await;
    assert_eq!((status, replayed, &again["execution_id"]), (200, true, &keyed["execution_id"]));

    // It is cut off from the database, and does not know.
    proxy.cut();
    let ended = soon("the lease runs out", async {
        loop {
            let status = two.status(&running).await;
            if status["status"] != "running" {
                return status;
            }
        }
    })
    .await;
    assert_eq!(
        (&ended["status"], &ended["reason"], &ended["epoch"]),
        (&json!("failed"), &json!("interrupted"), &json!(2))
    );
    assert_eq!(two.status(&waiting).await["reason"], "interrupted");
    let told = told_again(&two, &running).await;
    assert_eq!(told[..seen.len()], seen[..], "its log goes on from what was there");
    assert_eq!(told.iter().filter(|e| e["type"] == "tool_result").count(), 1);
    // Here it goes on, and is seen to.
    open(&world, "first");
    let mut stream = one.stream(&running, seen.len() as u64).await;
    seen.extend(stream.until("more", |event| event["type"] == "tool_result").await);
    drop(stream);
    kill(one).await;
    proxy.mend();
    let calls = world.model.calls();

    // It comes back: what it had shown is in the log, what it thinks of the status is not, and nothing runs again.
    let one = world.start(&[ONE, lease, ("DATABASE_URL", options.url.expose_secret())]).await;
    one.shipped().await;
    let late = soon("its events are there", async {
        loop {
            let events = told_again(&one, &running).await;
            if events.len() > told.len() {
                return events;
            }
        }
    })
    .await;
    assert_eq!(late[..seen.len()], seen[..]);
    let complete = &late.last().unwrap()["data"];
    assert_eq!((&complete["status"], &complete["reason"]), (&json!("failed"), &json!("interrupted")));
    for id in [&waiting, &keyed["execution_id"].as_str().unwrap().to_owned()] {
        assert_eq!(one.status(id).await["reason"], "interrupted");
    }
    assert_eq!(world.model.calls(), calls);
    assert!(!runs(&world.path("first.gate")));
    one.stop().await;
    two.stop().await;
}

/// A deletion that the database does not have yet, nor the end that goes before it: the next life does not take what it
/// finds there for something that was left.
#[tokio::test]
async fn what_is_deleted_while_the_database_is_away_is_gone_after_a_restart() {
    let world = World::new().await;
    let (proxy, options) = Proxy::before(world.database()).await;
    let setting = [ONE, ("DATABASE_URL", options.url.expose_secret())];
    let sidecar = world.start(&setting).await;
    let running = sidecar.submit(&gated(&world, "first").text("never")).await;
    works(&sidecar, &running).await;
    let deleted = sidecar.submit(&Script::new().text("never")).await;
    sidecar.shipped().await;
    proxy.cut();
    let (status, refused) = sidecar.send(Method::DELETE, &format!("/tasks/{deleted}"), None).await;
    assert_eq!(status, 503, "{refused}");
    kill(sidecar).await;
    proxy.mend();
    let mut sidecar = world.start(&setting).await;
    sidecar.shipped().await;
    assert_eq!(sidecar.send(Method::GET, &format!("/tasks/{deleted}"), None).await.0, 404);
    assert_eq!(sidecar.get("/tasks").await["executions"].as_array().unwrap().len(), 1);
    let log = sidecar.log_so_far().join("\n");
    assert!(!log.contains("the database refuses a batch") && !log.contains("nobody runs"), "{log}");
    sidecar.stop().await;
}
