//! Runs as they are by default: in the sandbox, required, on the real kernel.

#![allow(clippy::unwrap_used, reason = "a test's own helpers fail like the test")]

use crate::support::sidecar::{World, text_of};
use opencode_sidecar::scripted::Script;
use serde_json::{Value, json};

/// `SANDBOX` and what it requires are left at their defaults.
const DEFAULT: (&str, &str) = ("SANDBOX", "");

fn codes<'a>(events: &'a [Value], kind: &str) -> Vec<&'a str> {
    events.iter().filter(|e| e["type"] == kind).filter_map(|e| e["data"]["code"].as_str()).collect()
}

#[tokio::test]
async fn a_whole_task_runs_in_the_sandbox_and_its_record_says_what_was_on() {
    let world = World::new().await;
    let sidecar = world.start(&[DEFAULT, ("SESSION_DISK_BYTES", "64 MiB")]).await;
    let ready = sidecar.get("/ready").await;
    assert_eq!(ready["checks"]["sandbox"]["status"], "ok", "{ready:#}");
    let out = world.state.path().join("out");
    let command = format!(
        "git init -q . && git add -A && git -c user.name=a -c user.email=a@b commit -qm x && git log --oneline | wc -l; \
         cat {0} || echo no-state; touch {1} || echo no-out; kill -0 {2} || echo no-signal; ls /root || echo no-root",
        world.state.path().join("instance").display(),
        out.display(),
        sidecar.pid(),
    );
    // OpenCode itself refuses a command line that names paths elsewhere; what a script does is the sandbox's business.
    let script = Script::new().write(&world.path("probe.sh"), &command).bash("sh probe.sh").text("done");
    let id = sidecar.submit(&script).await;
    let events = sidecar.follow(&id).await;
    let said = text_of(&events, "stdout");
    for line in ["1\n", "no-state\n", "no-out\n", "no-signal\n", "no-root\n"] {
        assert!(said.contains(line), "{line}: {said} {}", text_of(&events, "stderr"));
    }
    assert!(!out.exists());
    let record = sidecar.get(&format!("/tasks/{id}")).await;
    assert_eq!((&record["status"], &record["reason"]), (&json!("completed"), &json!("finished")), "{record:#}");
    let names: Vec<_> = record["protections"].as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect();
    for name in ["landlock_fs", "egress", "scope", "seccomp", "no_new_privs", "capabilities", "disk", "subreaper"] {
        assert!(names.contains(&name), "{names:?}");
    }
    assert!(names.iter().any(|name| ["cgroup_v2", "cgroup_v1", "watched"].contains(name)), "{names:?}");
    // What root has to give.
    assert!(!cfg!(as_root) || names.contains(&"uid") && names.contains(&"netns"), "{names:?}");
    let usage = &record["usage"];
    assert!(usage["cpu_seconds"].as_f64().unwrap() > 0.1, "{usage}");
    assert!(usage["memory_peak_bytes"].as_u64().unwrap() > 50 << 20, "{usage}");
    assert!(usage["pids"].as_u64().unwrap() > 1, "{usage}");
    assert!(usage["written_bytes"].as_u64().is_some(), "{usage}");
    sidecar.stop().await;
}

#[tokio::test]
async fn a_limit_that_nothing_holds_is_refused() {
    let world = World::new().await;
    let sidecar = world.start(&[("SANDBOX", "off")]).await;
    for name in ["memory_bytes", "pids", "cpu_millis", "disk_bytes"] {
        let body = json!({ "task_id": uuid::Uuid::new_v4(), "prompt": "x", "limits": { name: 1_000_000_000 } });
        let (status, refused) = sidecar.post("/tasks/execute", body).await;
        assert_eq!((status, &refused["details"]["field"]), (400, &json!(format!("limits.{name}"))), "{refused}");
        assert!(refused["detail"].as_str().unwrap().contains("SANDBOX=off"), "{refused}");
    }
    sidecar.stop().await;
}

#[tokio::test]
async fn a_tool_that_takes_too_much_is_ended_and_the_run_goes_on() {
    let world = World::new().await;
    let sidecar = world.start(&[DEFAULT, ("SESSION_PIDS", "400")]).await;
    if !sidecar.get("/ready").await["checks"]["sandbox"]["detail"].as_str().unwrap().contains("cgroup_v") {
        panic!("this host has no control group for the tests: the kernel's limits cannot be tried");
    }
    let hog = "head -c 3G /dev/zero | tail -c 3G | wc -c; echo after";
    let script = Script::new()
        .bash(hog)
        .bash("for i in $(seq 600); do sleep 30 & done; echo forked; kill $(jobs -p)")
        .text("done");
    let id = sidecar.submit_with(&script, json!({ "limits": { "memory_bytes": 1_200_000_000 } })).await;
    let events = sidecar.follow(&id).await;
    assert_eq!(events.last().unwrap()["data"]["status"], "completed", "{:#?}", events.last());
    assert!(text_of(&events, "stdout").contains("after\n"));
    let logs = codes(&events, "log");
    assert!(logs.contains(&"oom_kill"), "{logs:?}");
    assert!(logs.contains(&"fork_refused"), "{logs:?}");
    sidecar.stop().await;
}

#[tokio::test]
async fn a_full_disk_ends_the_run_and_its_neighbour_goes_on() {
    let world = World::new().await;
    let sidecar = world.start(&[DEFAULT]).await;
    let limits = json!({ "limits": { "disk_bytes": 50_000_000 } });
    let full = Script::new().bash("head -c 200M /dev/zero > big; sleep 60").text("never");
    let full = sidecar.submit_with(&full, limits).await;
    let neighbour = Script::new().bash("until [ -e done ]; do sleep 0.05; done").text("fine");
    let neighbour = sidecar.submit(&neighbour).await;
    let events = sidecar.follow(&full).await;
    let complete = &events.last().unwrap()["data"];
    assert_eq!((&complete["status"], &complete["reason"]), (&json!("failed"), &json!("disk_exhausted")), "{complete}");
    assert_eq!(codes(&events, "error"), ["disk_exhausted"]);
    std::fs::write(world.file("done"), "").unwrap();
    assert_eq!(sidecar.follow(&neighbour).await.last().unwrap()["data"]["status"], "completed");
    sidecar.stop().await;
}
