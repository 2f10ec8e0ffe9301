//! The database is away, or the power was: what was told stays true.

#![allow(clippy::unwrap_used, reason = "a test's own helpers fail like the test")]

use crate::support::proxy::Proxy;
use crate::support::sidecar::{Sidecar, World, assert_log, soon};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use opencode_sidecar::model::ExecutionId;
use opencode_sidecar::scripted::Script;
use opencode_sidecar::store::{EventQuery, Store};
use reqwest::Method;
use secrecy::ExposeSecret;
use serde_json::{Value, json};
use std::fs;

/// Waits until `/ready` says this of the database.
async fn database_is(sidecar: &Sidecar, word: &str) {
    soon(word, async {
        while sidecar.get("/ready").await["checks"]["database"]["status"] != word {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

/// Tasks are taken, run and are followed as ever; what only the database knows is refused, and not after a wait.
async fn goes_on_without(how: impl FnOnce(&Proxy)) {
    let world = World::new().await;
    let (proxy, options) = Proxy::before(world.database()).await;
    let sidecar = world.start(&[("DATABASE_URL", options.url.expose_secret())]).await;
    let old = sidecar.submit(&Script::new().text("before")).await;
    let told = sidecar.follow(&old).await;
    let running =
        sidecar.submit(&Script::new().bash("until [ -e go ]; do sleep 0.05; done; echo went").text("done")).await;
    sidecar.stream(&running, 0).await.until("it runs", |event| event["type"] == "tool_call").await;
    // What is old is in the database alone.
    assert_eq!(sidecar.get("/tasks?limit=2").await["executions"].as_array().unwrap().len(), 2);

    how(&proxy);
    database_is(&sidecar, "degraded").await;
    let new = sidecar.submit(&Script::new().bash("echo new").text("fine")).await;
    fs::write(world.file("go"), "").unwrap();
    let mut seen = Vec::new();
    for id in [&running, &new] {
        let events = sidecar.follow(id).await;
        assert_eq!(events.last().unwrap()["data"]["status"], "completed");
        assert_eq!(sidecar.status(id).await["status"], "completed");
        seen.push(events);
    }
    let ready = sidecar.get("/ready").await;
    assert_eq!((&ready["status"], &ready["checks"]["journal"]["status"]), (&json!("ready"), &json!("ok")), "{ready:#}");
    for path in ["/tasks".to_owned(), format!("/tasks/{old}"), format!("/tasks/{old}/events")] {
        let (status, refused) = sidecar.send(Method::GET, &path, None).await;
        assert_eq!((status, &refused["code"]), (503, &json!("unavailable")), "{path}");
    }
    proxy.mend();
    database_is(&sidecar, "ok").await;
    let history = soon("it is shipped", async {
        loop {
            let history = sidecar.get("/tasks").await["executions"].as_array().unwrap().clone();
            if history.len() == 3 && history.iter().all(|e| e["status"] == "completed") {
                break history;
            }
        }
    })
    .await;
    let ids: Vec<_> = history.iter().map(|e| e["execution_id"].as_str().unwrap()).collect();
    assert_eq!(ids, [&*new, &*running, &*old]);
    assert_eq!(sidecar.follow(&old).await, told);
    sidecar.stop().await;
    // And there, the bytes are those that readers saw.
    let store = Store::connect(&world.database()).await.unwrap();
    for (id, seen) in [running, new].iter().zip(&seen) {
        let query = EventQuery { after: 0, limit: 10_000, types: None, severities: None };
        let stored = store.events(ExecutionId(id.parse().unwrap()), &query).await.unwrap();
        let stored: Vec<Value> = stored.iter().map(|event| serde_json::from_str(&event.json).unwrap()).collect();
        assert_eq!(&stored, seen);
    }
}

#[tokio::test]
async fn a_database_that_is_gone_stops_nothing() {
    goes_on_without(Proxy::cut).await;
}

#[tokio::test]
async fn a_database_that_says_nothing_stops_nothing() {
    goes_on_without(Proxy::freeze).await;
}

/// What was shown while the database was away survives the sidecar's sudden end too.
#[tokio::test]
async fn what_was_seen_during_an_outage_survives_a_sigkill() {
    let world = World::new().await;
    let (proxy, options) = Proxy::before(world.database()).await;
    let through = [("DATABASE_URL", options.url.expose_secret())];
    let sidecar = world.start(&through).await;
    proxy.cut();
    let ended = sidecar.submit(&Script::new().text("fine")).await;
    let told = sidecar.follow(&ended).await;
    let running = sidecar.submit(&Script::new().bash("echo on; sleep 88003").text("never")).await;
    let mut seen = sidecar.stream(&running, 0).await.until("output", |event| event["type"] == "stdout").await;
    kill(Pid::from_raw(sidecar.pid().cast_signed()), Signal::SIGKILL).unwrap();
    sidecar.exited().await;
    proxy.mend();
    let sidecar = world.start(&through).await;
    assert_eq!(sidecar.follow(&ended).await, told);
    let mut stream = sidecar.stream(&running, seen.len() as u64).await;
    while let Some(event) = stream.next().await {
        seen.push(event);
    }
    assert_log(&seen);
    let status = sidecar.status(&running).await;
    assert_eq!(
        (&status["status"], &status["reason"], &status["epoch"]),
        (&json!("failed"), &json!("interrupted"), &json!(1))
    );
    sidecar.stop().await;
}

/// A loss of power, as the next start sees it: the directory was open in another boot, and the journal's end is torn.
#[tokio::test]
async fn after_a_loss_of_power_the_log_goes_on_under_another_epoch() {
    let world = World::new().await;
    let sidecar = world.start(&[]).await;
    let ended = sidecar.submit(&Script::new().text("fine")).await;
    let told = sidecar.follow(&ended).await;
    let running = sidecar.submit(&Script::new().bash("echo on; sleep 88004").text("never")).await;
    sidecar.stream(&running, 0).await.until("output", |event| event["type"] == "stdout").await;
    kill(Pid::from_raw(sidecar.pid().cast_signed()), Signal::SIGKILL).unwrap();
    sidecar.exited().await;
    let journal = world.state.path().join("journal");
    fs::write(journal.join("boot"), "00000000-0000-0000-0000-000000000000\n").unwrap();
    for entry in fs::read_dir(&journal).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|suffix| suffix == "journal") {
            let file = fs::File::options().append(true).open(&path).unwrap();
            std::io::Write::write_all(&mut &file, b"\x07\x00\x00\x00torn").unwrap();
        }
    }
    let sidecar = world.start(&[]).await;
    assert_eq!(sidecar.status(&running).await["epoch"], 2);
    let events = sidecar.stream(&running, 0).await.until("the end", |event| event["type"] == "complete").await;
    assert_eq!(events[0], json!({ "type": "epoch", "epoch": 2 }));
    assert_log(&events[1..]);
    assert_eq!(sidecar.follow(&ended).await, told, "what had ended is as it was");
    assert_eq!(sidecar.status(&ended).await["epoch"], 1);
    sidecar.stop().await;
}
