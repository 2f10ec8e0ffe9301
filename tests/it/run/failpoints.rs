//! The sidecar is ended between every two steps of submitting, appending, shipping, running, ending and deleting, and of
//! taking up what was left; the next life tells the truth.

#![allow(clippy::unwrap_used, reason = "a test's own helpers fail like the test")]

use crate::support::follower::{Follower, raw_log};
use crate::support::sidecar::{Sidecar, World, runs, soon};
use opencode_sidecar::scripted::Script;
use reqwest::Method;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::fs;

/// Where the first life ends, and at which time that it comes there.
const SUBMIT: &[&str] = &["submit-admitted", "submit-queued", "submit-durable", "submit-taken", "submit-taken:2"];
const APPEND: &[&str] = &[
    "append-begun:2",
    "append-torn:2",
    "append-torn:5",
    "append-written:2",
    "append-written:4",
    "append-synced",
    "append-noted:3",
    "append-shown:6",
];
const SHIP: &[&str] = &["ship-begun", "ship-in-transaction:2", "ship-committed", "ship-told:3"];
const RUN: &[&str] = &[
    "run-begun",
    "run-conversation",
    "run-unprompted:2",
    "run-prompted",
    "run-prompted:2",
    "run-call",
    "run-over",
    "end-begun",
    "end-queued",
    "end-durable:2",
];
const DELETE: &[&str] =
    &["delete-begun", "delete-done", "release-rotated", "summary-new", "release-summed", "release-removed"];
/// The same of a second life, after a first one that ended with both tasks under way.
const RECOVER: &[&str] = &["recovery-begun", "recovery-taken-up", "recovery-taken-up:2", "recovery-held"];

/// What one test knows of what it has done.
struct Story {
    world: World,
    /// What every reader that was there has seen.
    readers: Vec<Follower>,
    deleted: Option<String>,
}

fn counted(world: &World, name: &str) -> Script {
    Script::new().bash(&format!("echo run >> {}; echo out; echo err >&2", world.path(name))).text("done")
}

async fn submit(sidecar: &Sidecar, key: &str, body: &Value) -> Option<String> {
    let request = sidecar.http.post(format!("{}/tasks/execute", sidecar.base)).bearer_auth(&sidecar.secret);
    let answer = request.header("idempotency-key", key).json(body).send().await.ok()?;
    let status = answer.status().as_u16();
    let answer: Value = answer.json().await.ok()?;
    assert!([200, 202].contains(&status), "{answer}");
    Some(answer["execution_id"].as_str().unwrap().to_owned())
}

impl Story {
    async fn new() -> Self {
        Self { world: World::new().await, readers: Vec::new(), deleted: None }
    }

    fn bodies(&self) -> [(&'static str, Value); 2] {
        let body = |name: &str, more: &str| {
            json!({ "task_id": uuid::Uuid::from_u128(9), "on_restart": more,
                "prompt": counted(&self.world, name).to_prompt("x") })
        };
        [("plain", body("plain", "fail")), ("resumed", body("resumed", "resume"))]
    }

    /// Does everything, as far as the sidecar lets it. `None` where it is gone.
    async fn play(&mut self, sidecar: &Sidecar) -> Option<()> {
        for (key, body) in self.bodies() {
            let id = submit(sidecar, key, &body).await?;
            self.readers.push(Follower::new(&id));
        }
        for reader in &mut self.readers {
            reader.follow(sidecar).await?;
        }
        let gone = submit(sidecar, "gone", &json!({ "task_id": uuid::Uuid::from_u128(9), "prompt": "x" })).await?;
        let answer = soon(
            "a deletion",
            sidecar.http.delete(format!("{}/tasks/{gone}", sidecar.base)).bearer_auth(&sidecar.secret).send(),
        )
        .await
        .ok()?;
        if answer.status() == 204 {
            self.deleted = Some(gone);
        }
        // What is behind an answer may come later.
        soon("the sidecar's end", async {
            while sidecar.http.get(format!("{}/health", sidecar.base)).send().await.is_ok() {}
        })
        .await;
        None
    }

    async fn ends_at(&mut self, failpoint: &str) {
        let sidecar = match self.world.try_start(&[("OPENCODE_SIDECAR_FAILPOINT", failpoint)]).await {
            Ok(sidecar) => sidecar,
            // It writes something before it listens, too.
            Err(log) => {
                assert!(log.ends_with("signal 9"), "{failpoint}: {log}");
                return;
            }
        };
        self.play(&sidecar).await;
        let exit = sidecar.exited().await;
        assert_eq!(exit.signal, Some(9), "{failpoint} was never come to: {exit}");
    }

    /// The same before it listens.
    async fn ends_at_start(&mut self, failpoint: &str) {
        let log = self.world.start_in_vain(&[("OPENCODE_SIDECAR_FAILPOINT", failpoint)]).await;
        assert!(log.ends_with("signal 9"), "{failpoint} was never come to: {log}");
    }

    /// The last life: what was promised holds.
    async fn holds(mut self, failpoint: &str) {
        let sidecar = self.world.start(&[]).await;
        let mut known = BTreeSet::new();
        for (key, body) in self.bodies() {
            let id = submit(&sidecar, key, &body).await.unwrap();
            let log = raw_log(&sidecar, &id).await;
            let last: Value = serde_json::from_str(log.last().unwrap()).unwrap();
            let (status, reason) = (&last["data"]["status"], &last["data"]["reason"]);
            let fine = status == "completed" || (key == "plain" && reason == "interrupted");
            assert!(fine, "{failpoint}: {key} {last}\n{log:#?}");
            let runs = fs::read_to_string(self.world.file(key)).unwrap_or_default().lines().count();
            assert!(runs <= 1, "{failpoint}: {key} ran {runs} times");
            // A call that was cut off is not run again; whether it is made anew is the model's to say, and ours goes on.
            let was_cut_off = log.iter().any(|event| event.contains(r#""error":"interrupted""#));
            assert!(runs == 1 || status != "completed" || was_cut_off, "{failpoint}: {key} never ran");
            known.insert(id);
        }
        for reader in &mut self.readers {
            assert!(known.contains(&reader.id), "{failpoint}: a key stands for another execution");
            let log = raw_log(&sidecar, &reader.id).await;
            assert_eq!(log[..reader.seen.len()], reader.seen[..], "{failpoint}");
        }
        sidecar.shipped().await;
        let (_, history) = sidecar.send(Method::GET, "/tasks?limit=100", None).await;
        for execution in history["executions"].as_array().unwrap() {
            let id = execution["execution_id"].as_str().unwrap();
            let is_final = ["completed", "failed", "cancelled"].contains(&execution["status"].as_str().unwrap());
            assert!(is_final || !known.contains(id), "{failpoint}: {execution:#}");
            if !known.remove(id) {
                // The one that was to be deleted, before that was durable: as the caller was told.
                assert_ne!(Some(id), self.deleted.as_deref(), "{failpoint}: it is deleted");
                raw_log(&sidecar, id).await;
            }
        }
        assert!(known.is_empty(), "{failpoint}: {known:?} is not in the history");
        sidecar.stop().await;
        assert!(!runs(&self.world.path("")), "{failpoint}: nothing of it runs");
    }
}

async fn all_of(failpoints: &[&str]) {
    for failpoint in failpoints {
        let mut story = Story::new().await;
        story.ends_at(failpoint).await;
        story.holds(failpoint).await;
    }
}

#[tokio::test]
async fn an_end_while_a_task_is_submitted() {
    all_of(SUBMIT).await;
}

#[tokio::test]
async fn an_end_while_events_are_appended() {
    all_of(APPEND).await;
}

#[tokio::test]
async fn an_end_while_events_are_shipped() {
    all_of(SHIP).await;
}

#[tokio::test]
async fn an_end_while_a_task_runs_and_ends() {
    all_of(RUN).await;
}

#[tokio::test]
async fn an_end_while_a_task_is_deleted_and_the_journal_forgets() {
    all_of(DELETE).await;
}

#[tokio::test]
async fn an_end_while_what_was_left_is_taken_up() {
    for failpoint in RECOVER {
        let mut story = Story::new().await;
        // One of them has been prompted, the other waits or is about to be.
        story.ends_at("run-prompted").await;
        story.ends_at_start(failpoint).await;
        story.holds(failpoint).await;
    }
}
