//! The clock jumps, forwards by two days and backwards by an hour, while a sidecar works. What waits goes by another clock;
//! what has to outlive the process goes by this one, and is never negative.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test's own helpers fail like the test")]

use crate::support::postgres::connect;
use crate::support::sidecar::{Sidecar, World, answer, opencode, soon};
use chrono::{DateTime, TimeDelta, Utc};
use opencode_sidecar::sandbox::Spec;
use opencode_sidecar::scripted::Script;
use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, Executor};
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt};
use tempfile::TempDir;

const HOUR: i64 = 3600;
const DAY: i64 = 24 * HOUR;

/// A clock for a sidecar, and for the OpenCodes that it starts where they are to have it too.
struct Clock {
    directory: TempDir,
    offset: File,
}

impl Clock {
    async fn new(world: &World) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let mut cc = Spec::new("cc", "cc");
        cc.args = ["-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o"].map(Into::into).into();
        cc.args
            .extend([path("clock.so").into(), concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/support/clock.c").into()]);
        cc.env = vec![("PATH".into(), std::env::var_os("PATH").unwrap())];
        cc.cwd = directory.path().to_owned();
        let made = soon("a library", world.sandbox().run(cc, std::time::Duration::from_secs(60))).await.unwrap();
        assert_eq!(made.exit.code, Some(0), "{}", String::from_utf8_lossy(&made.stderr));
        let offset = File::create_new(path("offset")).unwrap();
        let clock = Self { directory, offset };
        clock.jump(0);
        let [(_, library), (_, offset)] = clock.preload();
        let script = format!(
            "#!/bin/sh\nLD_PRELOAD='{library}' CLOCK_OFFSET='{offset}' exec '{}' \"$@\"\n",
            opencode().display()
        );
        fs::write(clock.command(), script).unwrap();
        fs::set_permissions(clock.command(), PermissionsExt::from_mode(0o755)).unwrap();
        clock
    }

    fn path(&self, name: &str) -> String {
        self.directory.path().join(name).to_str().unwrap().to_owned()
    }

    fn command(&self) -> String {
        self.path("opencode")
    }

    fn preload(&self) -> [(&'static str, String); 2] {
        [("LD_PRELOAD", self.path("clock.so")), ("CLOCK_OFFSET", self.path("offset"))]
    }

    /// The clock is so many seconds off the real one from now on.
    fn jump(&self, seconds: i64) {
        self.offset.write_all_at(&seconds.to_ne_bytes(), 0).unwrap();
    }

    async fn sidecar(&self, world: &World, changes: &[(&str, &str)]) -> Sidecar {
        let preload = self.preload();
        let mut changes = [changes, &[("MAX_CONCURRENT_TASKS", "1")]].concat();
        changes.extend(preload.iter().map(|(name, value)| (*name, value.as_str())));
        world.start(&changes).await
    }
}

/// Submits with a key; gives the status and the execution.
async fn submit(sidecar: &Sidecar, key: &str, script: &Script) -> (u16, String) {
    // The same body each time.
    let body = json!({ "task_id": "0190aaaa-0000-7000-8000-000000000000", "prompt": script.to_prompt("Do it."), "timeout_seconds": 600 });
    let request = sidecar.http.post(format!("{}/tasks/execute", sidecar.base)).bearer_auth(&sidecar.secret);
    let response = soon("an answer", request.header("idempotency-key", key).json(&body).send()).await.unwrap();
    let (status, taken) = answer(response).await;
    (status, taken["execution_id"].as_str().unwrap_or_else(|| panic!("{taken}")).to_owned())
}

fn time(value: &Value) -> DateTime<Utc> {
    value.as_str().unwrap().parse().unwrap()
}

/// All of the history by pages of one, each with times that make sense.
async fn history(sidecar: &Sidecar) -> Vec<String> {
    let mut ids = Vec::new();
    let mut path = "/tasks?limit=1".to_owned();
    let mut before = None;
    loop {
        let page = sidecar.get(&path).await;
        for execution in page["executions"].as_array().unwrap() {
            assert_eq!((&execution["status"], &execution["paused_ms"]), (&json!("completed"), &json!(0)));
            assert!(execution["duration_ms"].is_u64(), "{execution:#}");
            let created = time(&execution["created_at"]);
            assert!(before.is_none_or(|before| created <= before), "newest first: {execution:#}");
            before = Some(created);
            ids.push(execution["execution_id"].as_str().unwrap().to_owned());
        }
        match page["next_cursor"].as_str() {
            Some(cursor) => path = format!("/tasks?limit=1&cursor={cursor}"),
            None => return ids,
        }
    }
}

#[tokio::test]
async fn a_clock_that_jumps_loses_nothing_and_ends_nothing() {
    let world = World::new().await;
    let clock = Clock::new(&world).await;
    let sidecar = clock.sidecar(&world, &[("RETENTION_DAYS", "36500")]).await;
    let short = Script::new().text("Short.");
    let (status, first) = submit(&sidecar, "first", &short).await;
    assert_eq!(status, 202);
    assert_eq!(sidecar.finished(&first).await["status"], "completed");
    let gates = "echo on; until [ -e a ]; do sleep 0.05; done; echo forwards; \
                 until [ -e b ]; do sleep 0.05; done; echo backwards";
    let long_script = Script::new().bash(gates).text("Long.");
    let (_, long) = submit(&sidecar, "long", &long_script).await;
    let (_, queued) = submit(&sidecar, "queued", &short).await;
    let mut stream = sidecar.stream(&long, 0).await;
    let mut events = stream.until("it runs", |e| e["type"] == "stdout").await;

    // Far beyond every timeout, of the run as of OpenCode's silence: it goes on as if nothing had happened.
    clock.jump(2 * DAY);
    assert_eq!(sidecar.status(&queued).await["queue_position"], 1);
    fs::write(world.file("a"), "").unwrap();
    events.extend(stream.until("two days later", |e| e["type"] == "stdout").await);
    // By this clock the key's 24 h are over: it is free.
    let (status, second) = submit(&sidecar, "first", &short).await;
    assert_eq!(status, 202);
    assert_ne!(second, first);

    clock.jump(-HOUR);
    let status = sidecar.status(&long).await;
    assert_eq!((&status["status"], &status["duration_ms"]), (&json!("running"), &json!(0)), "{status:#}");
    // What was submitted less than 24 h ago is known again, and so is what was submitted in a future that never came.
    assert_eq!(submit(&sidecar, "queued", &short).await, (200, queued.clone()));
    assert_eq!(submit(&sidecar, "first", &short).await, (200, second.clone()));
    fs::write(world.file("b"), "").unwrap();
    events.extend(stream.until("the end", |e| e["type"] == "complete").await);

    let complete = &events.last().unwrap()["data"];
    assert_eq!((&complete["status"], &complete["final_message"]), (&json!("completed"), &json!("Long.")));
    assert_eq!(events, sidecar.follow(&long).await, "each event once, in order, whatever its time");
    assert_eq!(crate::support::sidecar::text_of(&events, "stdout"), "on\nforwards\nbackwards\n");
    let at: Vec<_> = events.iter().map(|event| time(&event["timestamp"]) - time(&events[0]["timestamp"])).collect();
    assert!(at.iter().any(|at| *at >= TimeDelta::seconds(2 * DAY)), "the clock did jump: {at:?}");
    assert!(at.last().unwrap() < &TimeDelta::zero(), "and back: {at:?}");
    for id in [&queued, &second] {
        assert_eq!(sidecar.finished(id).await["status"], "completed");
    }
    let all = history(&sidecar).await;
    assert_eq!(all.len(), 4);
    assert_eq!(all.iter().collect::<BTreeSet<_>>(), [&first, &long, &queued, &second].into());
    sidecar.stop().await;

    // After a restart at this time: keys count, and retention removes what is old and not what has just ended.
    let mut database = connect(&world.database().url).await;
    let age = format!(
        "UPDATE opencode_sidecar.executions SET created_at = created_at - interval '3 days',
                completed_at = completed_at - interval '3 days' WHERE id = '{first}'"
    );
    database.execute(AssertSqlSafe(age)).await.unwrap();
    let sidecar = clock.sidecar(&world, &[("RETENTION_DAYS", "1")]).await;
    soon("what is old is removed", async {
        loop {
            let answer = sidecar.http.get(format!("{}/metrics", sidecar.base)).send().await.unwrap();
            if answer.text().await.unwrap().contains("retention_removed_total{kind=\"execution\"} 1\n") {
                return;
            }
        }
    })
    .await;
    assert_eq!(history(&sidecar).await, all.into_iter().filter(|id| *id != first).collect::<Vec<_>>());
    assert_eq!(sidecar.follow(&long).await, events);
    assert_eq!(submit(&sidecar, "queued", &short).await, (200, queued));
    assert_eq!(submit(&sidecar, "long", &long_script).await, (200, long));
    sidecar.stop().await;
}

/// OpenCode 1.18.33 orders its messages by the time in their ids. Where that goes back within a run, it does not see that
/// it has its answer, and asks the model for another one for ever: what ends that is the budget, and the run has failed.
#[tokio::test]
async fn an_opencode_whose_clock_goes_back_is_held_by_the_budget() {
    let world = World::new().await;
    let clock = Clock::new(&world).await;
    let sidecar = clock.sidecar(&world, &[("SANDBOX", "off"), ("OPENCODE_COMMAND", &clock.command())]).await;
    let script = Script::new().bash("echo on; until [ -e a ]; do sleep 0.05; done").text("An answer.");
    let id = sidecar.submit_with(&script, json!({ "limits": { "model_calls": 4 } })).await;
    sidecar.stream(&id, 0).await.until("it runs", |e| e["type"] == "stdout").await;
    clock.jump(-HOUR);
    fs::write(world.file("a"), "").unwrap();
    let events = sidecar.follow(&id).await;
    let complete = &events.last().unwrap()["data"];
    assert_eq!(
        (&complete["status"], &complete["reason"]),
        (&json!("failed"), &json!("budget_exceeded")),
        "{events:#?}"
    );
    let next = sidecar.submit(&script).await;
    assert_eq!(sidecar.finished(&next).await["status"], "completed");
    sidecar.stop().await;
}
