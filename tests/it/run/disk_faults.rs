//! The disk of `STATE_DIR` is full, or has changed what it holds.

#![allow(clippy::unwrap_used, reason = "a test's own helpers fail like the test")]

use super::outage::{FLOWING, at_once, stored};
use crate::support::disk::Disk;
use crate::support::proxy::Proxy;
use crate::support::sidecar::{PATIENCE, Sidecar, World, assert_log, parsed, soon, text_of};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use opencode_sidecar::scripted::Script;
use opencode_sidecar::store::Store;
use reqwest::Method;
use secrecy::ExposeSecret;
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const MIB: usize = 1024 * 1024;

/// A disk for the journal alone.
fn journal_disk(world: &World, bytes: usize) -> Disk {
    let place = world.state.path().join("journal");
    fs::create_dir(&place).unwrap();
    Disk::over(&place, bytes)
}

/// Waits until `/ready` says this of the journal. Only with `ok` it is ready.
async fn journal_is(sidecar: &Sidecar, word: &str) {
    soon(word, async {
        loop {
            let (status, ready) = sidecar.send(Method::GET, "/ready", None).await;
            let found = &ready["checks"]["journal"]["status"];
            assert_eq!(status == 200, found == "ok", "{ready:#}");
            if found == word {
                return;
            }
        }
    })
    .await;
}

/// A task is refused, which says why, and nothing of it is there.
async fn is_refused(sidecar: &Sidecar) {
    let body = json!({ "task_id": uuid::Uuid::new_v4(), "prompt": Script::new().text("never").to_prompt("Do it.") });
    let (status, problem) = at_once(|| sidecar.post("/tasks/execute", body.clone())).await;
    assert_eq!((status, &problem["code"]), (503, &json!("unavailable")), "{problem:#}");
    assert!(problem["detail"].as_str().unwrap().contains("journal takes nothing"), "{problem:#}");
}

async fn is_still_running(sidecar: &Sidecar, id: &str) {
    let status = sidecar.status(id).await;
    assert_eq!((&status["status"], &status["reason"]), (&json!("running"), &Value::Null));
}

/// What runs, and whoever follows it up to the end of the sidecar or of the log.
async fn sigkill(sidecar: &Sidecar) {
    kill(Pid::from_raw(sidecar.pid().cast_signed()), Signal::SIGKILL).unwrap();
    sidecar.exited().await;
}

/// The log is what was seen, and then says that the run was interrupted.
async fn was_interrupted(sidecar: &Sidecar, id: &str, seen: &[String]) {
    let told = sidecar.follow_text(id).await;
    assert_eq!(&told[..seen.len()], seen, "nothing that was seen is lost, or has another number");
    let status = sidecar.status(id).await;
    let [status, reason, epoch] = ["status", "reason", "epoch"].map(|name| &status[name]);
    assert_eq!((status, reason, epoch), (&json!("failed"), &json!("interrupted"), &json!(1)));
}

#[tokio::test]
#[cfg_attr(not(as_root), ignore = "makes a disk that can be full, which takes root")]
async fn while_the_journals_disk_is_full_a_run_is_held_up_and_not_cut() {
    let world = World::new().await;
    let disk = journal_disk(&world, 16 * MIB);
    let sidecar = world.start(&[]).await;
    let script = Script::new().bash(&format!("{FLOWING}; touch went")).text("done");
    let running = sidecar.submit(&script).await;
    let mut stream = sidecar.stream(&running, 0).await;
    stream.until("output", |event| event["type"] == "stdout").await;
    let story = async {
        disk.fill();
        journal_is(&sidecar, "failed").await;
        is_refused(&sidecar).await;
        fs::write(world.file("go"), "").unwrap();
        soon("the command ends", async {
            while !world.file("went").exists() {
                is_still_running(&sidecar, &running).await;
            }
        })
        .await;
        // What cannot be kept is not told.
        is_still_running(&sidecar, &running).await;
        journal_is(&sidecar, "failed").await;
        disk.make_room();
        journal_is(&sidecar, "ok").await;
    };
    let (seen, ()) = tokio::join!(sidecar.follow_text(&running), story);
    let complete = &parsed(&seen).pop().unwrap()["data"];
    assert_eq!((&complete["status"], &complete["final_message"]), (&json!("completed"), &json!("done")));
    assert!(text_of(&parsed(&seen), "stdout").ends_with("x\nwent\n"));
    // It takes tasks again, and has kept nothing of the one that it refused.
    let next = sidecar.submit(&Script::new().text("fine")).await;
    assert_eq!(sidecar.finished(&next).await["status"], "completed");
    assert_eq!(sidecar.get("/tasks").await["executions"].as_array().unwrap().len(), 2);
    sidecar.stop().await;
    let store = Store::connect(&world.database()).await.unwrap();
    assert_eq!(stored(&store, &running).await, seen);
}

/// Then OpenCode, whose own state is there too, cannot go on; what is told of that is true, and told.
#[tokio::test]
#[cfg_attr(not(as_root), ignore = "makes a disk that can be full, which takes root")]
async fn with_all_of_the_state_directory_full_a_run_may_fail_and_nothing_seen_is_lost() {
    let world = World::new().await;
    let disk = Disk::over(world.state.path(), 64 * MIB);
    let sidecar = world.start(&[]).await;
    let running = sidecar.submit(&Script::new().bash(FLOWING).text("done")).await;
    sidecar.stream(&running, 0).await.until("output", |event| event["type"] == "stdout").await;
    disk.fill();
    // With the end of the run its directory goes, and that is room for the rest of the log.
    let seen = sidecar.follow_text(&running).await;
    let complete = &parsed(&seen).pop().unwrap()["data"];
    assert_eq!(complete["status"], "failed", "{complete:#}");
    assert!(["internal", "opencode_crashed"].contains(&complete["reason"].as_str().unwrap()), "{complete:#}");
    disk.make_room();
    journal_is(&sidecar, "ok").await;
    let next = sidecar.submit(&Script::new().text("fine")).await;
    assert_eq!(sidecar.finished(&next).await["status"], "completed");
    sidecar.stop().await;
    let store = Store::connect(&world.database()).await.unwrap();
    assert_eq!(stored(&store, &running).await, seen);
}

/// The journal itself takes the room, since the database is away, and something else the little that is left. When the
/// database is back, nobody has to make room.
#[tokio::test]
#[cfg_attr(not(as_root), ignore = "makes a disk that can be full, which takes root")]
async fn a_disk_that_the_journal_has_filled_is_empty_again_once_the_database_is_back() {
    let world = World::new().await;
    // Less than one segment.
    let disk = journal_disk(&world, 4 * MIB);
    let (proxy, options) = Proxy::before(world.database()).await;
    let sidecar = world.start(&[("DATABASE_URL", options.url.expose_secret())]).await;
    proxy.cut();
    // A control character takes six bytes in an event.
    let running = sidecar.submit(&Script::new().bash("head -c 1500000 /dev/zero | tr '\\0' '\\1'").text("done")).await;
    journal_is(&sidecar, "failed").await;
    is_refused(&sidecar).await;
    is_still_running(&sidecar, &running).await;
    disk.fill();
    proxy.mend();
    let seen = soon("the end", sidecar.follow_text(&running)).await;
    assert_eq!(parsed(&seen).last().unwrap()["data"]["status"], "completed");
    assert_eq!(text_of(&parsed(&seen), "stdout"), "\u{1}".repeat(1_500_000));
    journal_is(&sidecar, "ok").await;
    sidecar.shipped().await;
    sidecar.stop().await;
    let store = Store::connect(&world.database()).await.unwrap();
    assert_eq!(stored(&store, &running).await, seen);
}

#[tokio::test]
#[cfg_attr(not(as_root), ignore = "makes a disk that can be full, which takes root")]
async fn what_was_seen_before_the_disk_was_full_survives_a_sigkill() {
    let world = World::new().await;
    let disk = journal_disk(&world, 16 * MIB);
    let (proxy, options) = Proxy::before(world.database()).await;
    let through = [("DATABASE_URL", options.url.expose_secret())];
    let sidecar = world.start(&through).await;
    // The journal alone has it.
    proxy.cut();
    let running = sidecar.submit(&Script::new().bash(FLOWING).text("never")).await;
    sidecar.stream(&running, 0).await.until("output", |event| event["type"] == "stdout").await;
    let mut stream = sidecar.stream(&running, 0).await;
    disk.fill();
    journal_is(&sidecar, "failed").await;
    sigkill(&sidecar).await;
    let seen = stream.until_cut().await;
    assert!(seen.len() > 4, "{seen:#?}");
    proxy.mend();
    let log = world.start_in_vain(&through).await;
    assert!(log.contains("the journal in STATE_DIR cannot be used") && log.contains("No space left"), "{log}");
    disk.make_room();
    let sidecar = world.start(&through).await;
    was_interrupted(&sidecar, &running, &seen).await;
    sidecar.stop().await;
}

#[tokio::test]
#[cfg_attr(not(as_root), ignore = "makes a disk that can be full, which takes root")]
async fn with_a_full_disk_a_shutdown_ends_in_its_time_and_says_what_it_left() {
    const GRACE: u64 = 5;
    let world = World::new().await;
    let disk = journal_disk(&world, 16 * MIB);
    let mut sidecar = world.start(&[("SHUTDOWN_GRACE_SECONDS", &GRACE.to_string())]).await;
    let running = sidecar.submit(&Script::new().bash(FLOWING).text("never")).await;
    sidecar.stream(&running, 0).await.until("output", |event| event["type"] == "stdout").await;
    let mut stream = sidecar.stream(&running, 0).await;
    disk.fill();
    journal_is(&sidecar, "failed").await;
    let told = Instant::now();
    sidecar.signal(opencode_sidecar::sandbox::Signal::Term);
    let seen = stream.until_cut().await;
    let exit = sidecar.exited().await;
    assert_eq!(exit.code, Some(1), "{exit}");
    // Without its grace it would never end; what is beyond that is the end of a process on a busy machine.
    assert!(told.elapsed() < Duration::from_secs(GRACE) + PATIENCE, "{:?}", told.elapsed());
    let log = soon("its last words", sidecar.whole_log()).await.join("\n");
    assert!(log.contains("abandoned at shutdown: 1 executions"), "{log}");
    disk.make_room();
    let sidecar = world.start(&[]).await;
    was_interrupted(&sidecar, &running, &seen).await;
    sidecar.stop().await;
}

/// The journal's files that hold something, in order.
fn segments(state: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(state.join("journal")).unwrap().map(|entry| entry.unwrap().path());
    let is_segment = |path: &PathBuf| path.extension().is_some_and(|suffix| suffix == "journal");
    let mut found: Vec<_> = entries.filter(|path| is_segment(path) && path.metadata().unwrap().len() > 8).collect();
    found.sort();
    found
}

/// The records of a segment, each as the place of its last byte and what it says.
fn records(segment: &[u8]) -> Vec<(usize, Value)> {
    let (mut found, mut at) = (Vec::new(), 8);
    while at < segment.len() {
        let length = u32::from_le_bytes(segment[at..at + 4].try_into().unwrap()) as usize;
        let end = at + 8 + length;
        found.push((end - 1, serde_json::from_slice(&segment[at + 8..end]).unwrap()));
        at = end;
    }
    found
}

fn flip(path: &Path, at: usize) {
    let mut bytes = fs::read(path).unwrap();
    bytes[at] ^= 0x10;
    fs::write(path, bytes).unwrap();
}

/// How many events of an execution a record holds.
fn events_in(record: &Value, id: &str) -> usize {
    record.as_array().unwrap().iter().filter(|write| write["Event"]["execution"] == id).count()
}

#[tokio::test]
async fn a_bit_that_flips_in_the_last_record_costs_that_one_and_is_told() {
    let world = World::new().await;
    let (proxy, options) = Proxy::before(world.database()).await;
    let through = [("DATABASE_URL", options.url.expose_secret()), ("MAX_CONCURRENT_TASKS", "1")];
    let sidecar = world.start(&through).await;
    proxy.cut();
    let running = sidecar.submit(&Script::new().bash(FLOWING).text("never")).await;
    let ended = sidecar.submit(&Script::new().text("never")).await;
    assert_eq!(sidecar.post(&format!("/tasks/{ended}/cancel"), json!({})).await.0, 200);
    let told = sidecar.follow_text(&ended).await;
    let mut stream = sidecar.stream(&running, 0).await;
    let mut seen = Vec::new();
    // Until what ended is long before the end.
    while parsed(&seen).iter().filter(|event| event["type"] == "stdout").count() < 3 {
        seen.push(stream.next_text().await.unwrap());
    }
    sigkill(&sidecar).await;
    seen.extend(stream.until_cut().await);
    let last = segments(world.state.path()).pop().unwrap();
    let mut records = records(&fs::read(&last).unwrap());
    let (at, lost) = records.pop().unwrap();
    let intact: usize = records.iter().map(|(_, record)| events_in(record, &running)).sum();
    assert!(events_in(&lost, &running) > 0 && intact > 4, "{lost:#}");
    flip(&last, at);
    proxy.mend();

    let mut sidecar = world.start(&through).await;
    let log = sidecar.log_so_far().join("\n");
    assert!(log.contains("the end of the journal is damaged") && log.contains(last.to_str().unwrap()), "{log}");
    let mut events = sidecar.stream(&running, 0).await.rest().await;
    assert_eq!(parsed(&events.drain(..1).collect::<Vec<_>>()), [json!({ "type": "epoch", "epoch": 2 })]);
    assert_log(&parsed(&events));
    let both = intact.min(seen.len());
    assert_eq!(events[..both], seen[..both], "what was before it is intact");
    let after: Vec<_> = parsed(&events[intact..]).iter().map(|event| event["type"].clone()).collect();
    assert!(!after.contains(&json!("stdout")) && after.last() == Some(&json!("complete")), "{after:?}");
    assert_eq!(sidecar.status(&running).await["reason"], "interrupted");
    assert_eq!(sidecar.follow_text(&ended).await, told, "what had ended is as it was");
    assert_eq!(sidecar.status(&ended).await["epoch"], 1);
    sidecar.stop().await;
}

#[tokio::test]
async fn a_bit_that_flips_in_the_middle_is_an_error_and_what_follows_is_shipped() {
    let world = World::new().await;
    let (proxy, options) = Proxy::before(world.database()).await;
    let through = [("DATABASE_URL", options.url.expose_secret())];
    let sidecar = world.start(&through).await;
    proxy.cut();
    // Three segments: a control character takes six bytes in an event.
    let ended = sidecar.submit(&Script::new().bash("head -c 3600000 /dev/zero | tr '\\0' '\\1'").text("done")).await;
    let seen = sidecar.follow_text(&ended).await;
    sigkill(&sidecar).await;
    let segments = segments(world.state.path());
    assert!(segments.len() >= 3, "{segments:?}");
    let damaged = fs::read(&segments[1]).unwrap();
    let records = records(&damaged);
    let middle = records.len() / 2;
    flip(&segments[1], records[middle].0);
    let lost: usize = records[middle..].iter().map(|(_, record)| events_in(record, &ended)).sum();
    assert!(lost > 0 && middle > 0, "{}", records.len());
    proxy.mend();

    let mut sidecar = world.start(&through).await;
    let log = sidecar.log_so_far();
    let said = |line: &&String| line.contains("a part of the journal is damaged, and its events are lost");
    let error = log.iter().find(said).unwrap();
    assert!(error.contains("ERROR") && error.contains(segments[1].to_str().unwrap()), "{error}");
    let record = sidecar.get(&format!("/tasks/{ended}")).await;
    assert_eq!((&record["status"], &record["final_message"]), (&json!("completed"), &json!("done")));
    sidecar.shipped().await;
    sidecar.stop().await;
    let store = Store::connect(&world.database()).await.unwrap();
    let stored = stored(&store, &ended).await;
    assert_eq!(stored.len(), seen.len() - lost);
    let before = stored.iter().zip(&seen).take_while(|(stored, seen)| stored == seen).count();
    assert!(before > 0 && before < stored.len());
    assert_eq!(stored[before..], seen[before + lost..]);
}
