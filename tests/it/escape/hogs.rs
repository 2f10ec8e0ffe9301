//! What takes all there is, or does not end: one run each, beside a neighbour that must not notice.
//!
//! The record says what was hit: a `log` event where a tool died of it or was refused, the reason where OpenCode itself
//! did. Which of the two it is, is the kernel's choice where all of a session shares one limit: it takes the largest.

#![allow(clippy::unwrap_used, reason = "a test's own helpers fail like the test")]

use super::stage::{As, Stage, patient};
use nix::libc;
use opencode_sidecar::scripted::Script;
use serde_json::{Value, json};
use std::io::Write;
use std::path::Path;

const GIB: u64 = 1 << 30;

/// The hogs that are no shell lines, named by the variable. Without it there is nothing to take.
#[test]
fn a_hog_takes_what_it_is_named_for() {
    match std::env::var("HOG").as_deref() {
        Ok("page-tables") => page_tables(),
        Ok("memory-files") => memory_files(),
        Ok("files") => files(),
        _ => {}
    }
}

/// Maps what is never there: each page table is for two megabytes of the kernel's one page of zeros.
#[expect(unsafe_code, reason = "the mapping is as large as it is empty")]
fn page_tables() {
    const STEP: usize = 2 << 20;
    const SIZE: usize = 1 << 40;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a new mapping, which nothing else knows.
    let start = unsafe { libc::mmap(std::ptr::null_mut(), SIZE, libc::PROT_READ, flags, -1, 0) };
    assert_ne!(start, libc::MAP_FAILED);
    // SAFETY: the mapping of just now.
    assert_eq!(unsafe { libc::madvise(start, SIZE, libc::MADV_NOHUGEPAGE) }, 0);
    for at in (0..SIZE).step_by(STEP) {
        // SAFETY: within the mapping, which may be read.
        unsafe { start.cast::<u8>().add(at).read_volatile() };
    }
}

/// A file of a tmpfs that has no name, and is mapped by nobody.
fn memory_files() {
    let file = rustix::fs::memfd_create("hog", rustix::fs::MemfdFlags::empty()).unwrap();
    let mut file = std::fs::File::from(file);
    let piece = vec![1; 1 << 20];
    for _ in 0..4096 {
        file.write_all(&piece).unwrap();
    }
}

fn files() {
    std::fs::create_dir("many").unwrap();
    for number in 0..1_000_000 {
        std::fs::write(format!("many/{number}"), "x").unwrap();
    }
}

fn program(hog: &str) -> String {
    format!("HOG={hog} ./program --exact escape::hogs::a_hog_takes_what_it_is_named_for --nocapture")
}

fn has(events: &[Value], kind: &str, code: &str) -> bool {
    events.iter().any(|event| event["type"] == kind && event["data"]["code"] == code)
}

/// How it ended: `completed`, or else the reason.
fn end(events: &[Value]) -> &str {
    let complete = &events.last().unwrap()["data"];
    match complete["status"].as_str() {
        Some("completed") => "completed",
        _ => complete["reason"].as_str().unwrap(),
    }
}

/// Runs a line in a session of these limits, to its end.
async fn run(stage: &Stage, line: &str, limits: Value) -> Vec<Value> {
    std::fs::write(stage.world.file("work/hog.sh"), line).unwrap();
    let script = Script::new().tool("bash", patient("bash hog.sh 2>&1")).text("done");
    let id = stage.sidecar.submit_with(&script, json!({ "workdir": "work", "limits": limits })).await;
    let events = stage.sidecar.follow(&id).await;
    nothing_is_left(stage);
    assert_eq!(stage.sidecar.get("/health").await["status"], "ok");
    events
}

/// No process works where the attacker did. The neighbour, which does so beside it, shows that they would be seen.
fn nothing_is_left(stage: &Stage) {
    let of = |directory: &str| {
        let directory = stage.world.path(directory);
        let entries = std::fs::read_dir("/proc").unwrap().flatten();
        entries
            .filter(|entry| std::fs::read_link(entry.path().join("cwd")).is_ok_and(|cwd| cwd == Path::new(&directory)))
            .count()
    };
    assert_eq!(of("work"), 0);
    assert!(of("other") > 0);
}

#[tokio::test]
#[cfg_attr(not(cgroups), ignore = "control groups cannot be made here")]
async fn memory_of_every_kind_is_bounded() {
    let stage = Stage::set(As::Here, "required").await;
    let small = "for i in $(seq 60); do bash -c 'x=$(head -c 50M /dev/zero | tr \"\\0\" x); sleep 1000' & done; wait -n; kill -KILL 0";
    // The last ends with the first of them that the kernel takes; `timeout` gives them a process group of their own.
    // The first is larger than OpenCode, so it is what the kernel takes, and the run goes on. The second is too, but a
    // process that is killed gives its page tables back last, and the kernel may not wait for that.
    std::fs::write(stage.world.file("work/anonymous.sh"), "head -c 4G /dev/zero | tail -c 4G > /dev/null").unwrap();
    std::fs::write(stage.world.file("work/tables.sh"), program("page-tables")).unwrap();
    let script = Script::new()
        .tool("bash", patient("bash anonymous.sh 2>&1"))
        .tool("bash", patient("bash tables.sh 2>&1"))
        .text("done");
    let body = json!({ "workdir": "work", "limits": { "memory_bytes": GIB } });
    let id = stage.sidecar.submit_with(&script, body).await;
    let events = stage.sidecar.follow(&id).await;
    let first = events.iter().find(|event| event["type"] == "tool_result").unwrap();
    assert_eq!(first["data"]["exit_code"], 137, "{events:#?}");
    let kills = events.iter().filter(|event| event["data"]["code"] == "oom_kill");
    let kills: u64 = kills.map(|event| event["data"]["count"].as_u64().unwrap()).sum();
    // The one that ends the run is told by its reason.
    let least = match end(&events) {
        "completed" => 2,
        "oom_killed" => 1,
        other => panic!("{other}: {events:#?}"),
    };
    assert!(kills >= least, "{kills}: {events:#?}");
    nothing_is_left(&stage);

    for (what, hog) in [
        ("a tmpfs", program("memory-files")),
        ("many small processes", format!("timeout 100 bash -c '{}'", small.replace('\'', r"'\''"))),
    ] {
        let events = run(&stage, &hog, json!({ "memory_bytes": GIB })).await;
        match end(&events) {
            "completed" => assert!(has(&events, "log", "oom_kill"), "{what}: {events:#?}"),
            reason => assert_eq!(reason, "oom_killed", "{what}: {events:#?}"),
        }
    }
    stage.strike().await;
}

#[tokio::test]
#[cfg_attr(not(cgroups), ignore = "control groups cannot be made here")]
async fn processes_and_time_are_bounded_and_all_of_them_end() {
    let stage = Stage::set(As::Here, "required").await;
    // Four of them, and one CPU for all. Then a bomb, which goes on until its limit is felt, and after that for as long
    // as the run does.
    let spin = "spin() { timeout 3 sh -c 'while :; do :; done'; }; spin & spin & spin & spin & wait";
    std::fs::write(stage.world.file("work/spin.sh"), spin).unwrap();
    let bomb = "bomb() { bomb | bomb & }; bomb > /dev/null 2>&1\nuntil [ -e felt ]; do :; done\n";
    std::fs::write(stage.world.file("work/hog.sh"), bomb).unwrap();
    let script =
        Script::new().tool("bash", patient("bash spin.sh 2>&1")).tool("bash", patient("bash hog.sh 2>&1")).text("done");
    let body = json!({ "workdir": "work", "limits": { "pids": 300, "cpu_millis": 1000 } });
    let id = stage.sidecar.submit_with(&script, body).await;
    let mut stream = stage.sidecar.stream(&id, 0).await;
    let is_felt = |event: &Value| event["data"]["code"] == "fork_refused" || event["type"] == "complete";
    stream.until("a refused fork, or the end of it", is_felt).await;
    std::fs::write(stage.world.file("work/felt"), "").unwrap();
    let events = stage.sidecar.follow(&id).await;
    match end(&events) {
        "completed" => assert!(has(&events, "log", "fork_refused"), "{events:#?}"),
        reason => assert_eq!(reason, "pids_exhausted", "{events:#?}"),
    }
    nothing_is_left(&stage);
    let record = stage.sidecar.get(&format!("/tasks/{id}")).await;
    let at = |name: &str| chrono::DateTime::parse_from_rfc3339(record[name].as_str().unwrap()).unwrap();
    let took = (at("completed_at") - at("started_at")).as_seconds_f64();
    let used = record["usage"]["cpu_seconds"].as_f64().unwrap();
    assert!(used > 3.0 && used <= took * 1.1 + 0.5, "{used} s of CPU in {took} s");

    // Daemons of nobody, deaf to all that can be ignored, which leave the group, and cells that fork faster than they
    // are killed: none outlives a run that is cancelled.
    let daemons = "
        daemon() { (setsid bash -c 'trap \"\" TERM HUP INT QUIT USR1 USR2 PIPE ALRM
            for d in /sys/fs/cgroup /sys/fs/cgroup/*; do echo $$ > $d/cgroup.procs; done
            echo up >> daemons; while :; do sleep 1000; done' > /dev/null 2>&1 &); }
        cell() { while :; do (setsid bash -c 'sleep 0.02 &' &) ; done; }
        for i in 1 2 3 4 5; do daemon; done
        for i in 1 2 3 4; do cell > /dev/null 2>&1 & done
        until [ \"$(wc -l < daemons)\" = 5 ]; do :; done 2>/dev/null; echo all are up; sleep 1000";
    std::fs::write(stage.world.file("work/hog.sh"), daemons).unwrap();
    let script = Script::new().tool("bash", patient("bash hog.sh 2>&1")).text("never");
    let body = json!({ "workdir": "work", "limits": { "pids": 400 } });
    let id = stage.sidecar.submit_with(&script, body).await;
    let mut stream = stage.sidecar.stream(&id, 0).await;
    stream.until("the daemons", |event| event["data"].as_str().is_some_and(|text| text.contains("all are up"))).await;
    let (status, answer) = stage.sidecar.post(&format!("/tasks/{id}/cancel"), json!({})).await;
    assert!(status < 300, "{status} {answer}");
    let events = stage.sidecar.follow(&id).await;
    assert_eq!(end(&events), "cancelled", "{:#?}", events.last());
    nothing_is_left(&stage);
    stage.strike().await;
}

#[tokio::test]
async fn the_disk_is_bounded() {
    let stage = Stage::set(As::Here, "required").await;
    let large = "i=0; while [ $i -lt 10240 ]; do head -c 1M /dev/zero; i=$((i+1)); done > large";
    for (what, hog) in [("10 GB in a file", large.to_owned()), ("a million files", program("files"))] {
        let events = run(&stage, &hog, json!({ "disk_bytes": 200_000_000 })).await;
        assert_eq!(end(&events), "disk_exhausted", "{what}: {events:#?}");
        assert!(has(&events, "error", "disk_exhausted"), "{what}: {events:#?}");
    }
    let size = std::fs::metadata(stage.world.file("work/large")).unwrap().len();
    assert!(size < 5 * GIB, "{size}");
    let many = std::fs::read_dir(stage.world.file("work/many")).unwrap().count();
    assert!(many < 1_000_000, "{many}");
    stage.strike().await;
}
