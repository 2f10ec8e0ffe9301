//! `history` and `logs`: tables, filters, pages, and what a file gets.

use super::{Caller, gated};
use crate::support::sidecar::{World, soon};
use opencode_sidecar::scripted::Script;
use serde_json::{Value, json};

#[tokio::test]
async fn history_is_a_table_or_json() {
    let world = World::new().await;
    let sidecar = world.start(&[]).await;
    let caller = Caller::of(&sidecar);
    caller.run(&["history"]).await.assert_told(0, &["There is no such execution."]);
    let mut ids = Vec::new();
    for script in
        [Script::new().text("a"), Script::new().json(json!({ "status": 401 })).unwrap(), Script::new().text("c")]
    {
        let id = sidecar.submit(&script).await;
        sidecar.follow(&id).await;
        ids.push(id);
    }
    let api = sidecar.get("/tasks").await;
    let rows = api["executions"].as_array().unwrap();
    assert_eq!(caller.run(&["history", "--json"]).await.assert(0).json(), *rows);

    let table = caller.run(&["history"]).await;
    let lines: Vec<_> = table.assert(0).stdout.lines().collect();
    assert_eq!(lines.len(), 4);
    assert!(lines[0].starts_with("CREATED ") && lines[0].ends_with("SESSION"), "{}", lines[0]);
    for (line, row) in lines[1..].iter().zip(rows) {
        for name in ["execution_id", "task_id", "session_id", "status", "reason"] {
            assert!(line.contains(row[name].as_str().unwrap()), "{name} is not in {line}");
        }
        let created = row["created_at"].as_str().unwrap();
        assert!(line.starts_with(&format!("{} {}Z", &created[..10], &created[11..19])), "{line}");
    }
    assert!(lines[2].contains("failed (model_error)"), "{}", lines[2]);
    assert!(!table.stdout.contains('\u{1b}'));

    let found = async |args: &[&str]| -> Vec<Value> {
        let done = caller.run(&[&["history", "--json"], args].concat()).await;
        done.assert(0).json().into_iter().map(|row| row["execution_id"].clone()).collect()
    };
    assert_eq!(found(&["--status", "failed"]).await, [json!(ids[1])]);
    assert_eq!(found(&["--task-id", rows[0]["task_id"].as_str().unwrap()]).await, [json!(ids[2])]);
    assert_eq!(found(&["--session", rows[2]["session_id"].as_str().unwrap()]).await, [json!(ids[0])]);
    let second = rows[1]["created_at"].as_str().unwrap();
    assert_eq!(found(&["--since", second]).await, [json!(ids[2]), json!(ids[1])]);
    assert_eq!(found(&["--until", second]).await, [json!(ids[0])]);
    assert_eq!(found(&["--since", "1h", "--until", "2000-01-01"]).await, Vec::<Value>::new());
    let some = caller.run(&["history", "--limit", "2", "--json"]).await;
    assert_eq!(some.assert(0).json(), rows[..2]);
    assert!(some.stderr.contains("There are more: --limit NUMBER or --all."), "{}", some.stderr);

    // At a terminal it fits, and what finds no room is named.
    let (exit, seen) = caller.terminal(80, &["history"]).await.done().await;
    assert!(exit.success(), "{exit}");
    let plain = anstream::adapter::strip_str(&seen).to_string();
    let table: Vec<_> = plain.lines().filter(|line| line.contains("EXECUTION") || line.contains("ed (")).collect();
    assert_eq!(table.len(), 4, "{plain}");
    assert!(table.iter().all(|line| line.trim_end().chars().count() <= 80), "{plain}");
    for id in &ids {
        assert!(plain.contains(id.as_str()), "{plain}");
    }
    assert!(plain.contains("No room here for") && plain.contains("SESSION; --json has everything."), "{plain}");
    assert!(seen.contains("\u{1b}[32mcompleted") && seen.contains("\u{1b}[31mfailed"), "{seen}");
    sidecar.stop().await;
}

#[tokio::test]
async fn history_goes_through_all_pages() {
    let world = World::new().await;
    // Nothing runs here: each ends as `sandbox_unavailable`, which takes no time.
    let sidecar = world
        .start(&[("SANDBOX", "required"), ("SANDBOX_REQUIRE", "landlock_unix"), ("MAX_QUEUED_TASKS", "1000")])
        .await;
    let mut ids = Vec::new();
    for _ in 0..205 {
        ids.insert(0, sidecar.submit(&Script::new().text("x")).await);
    }
    let ended = async {
        while sidecar.get("/tasks?status=failed&limit=1").await["executions"][0]["execution_id"] != json!(ids[0]) {}
    };
    soon("the last one's end", ended).await;
    let caller = Caller::of(&sidecar);
    let listed = async |args: &[&str]| -> Vec<String> {
        let done = caller.run(&[&["history", "--json"], args].concat()).await;
        let id = |row: Value| row["execution_id"].as_str().unwrap().to_owned();
        done.assert(0).json().into_iter().map(id).collect()
    };
    assert_eq!(listed(&["--all"]).await, ids);
    assert_eq!(listed(&["--limit", "203"]).await, ids[..203]);
    assert_eq!(listed(&[]).await, ids[..20]);
    let table = caller.run(&["history", "--all"]).await;
    assert_eq!((table.assert(0).stdout.lines().count(), table.stderr.as_str()), (206, ""));
    sidecar.stop().await;
}

#[tokio::test]
async fn logs_are_the_shells_output_or_the_events() {
    let world = World::new().await;
    let sidecar = world.start(&[]).await;
    let caller = Caller::of(&sidecar);
    let command = "printf '\\033[31mred\\033[0m ü\\n'; printf '10%%\\r20%%\\n'; echo err >&2; printf end";
    let id = sidecar.submit(&Script::new().bash(command).text("Done.")).await;
    let events = sidecar.follow(&id).await;

    let raw = sidecar.http.get(format!("{}/tasks/{id}/output", sidecar.base)).bearer_auth(&sidecar.secret);
    let raw = raw.send().await.unwrap().text().await.unwrap();
    // Two pipes: what is written to one may be read before what was written earlier to the other.
    assert_eq!(raw.replacen("err\n", "", 1), "\u{1b}[31mred\u{1b}[0m ü\n10%\r20%\nend", "{raw:?}");
    let stripped = raw.replace("\u{1b}[31m", "").replace("\u{1b}[0m", "");
    for (args, want) in [
        (&["logs", &id] as &[&str], &stripped),
        (&["logs", "--ansi", "strip", &id], &stripped),
        (&["logs", "--ansi", "keep", &id], &raw),
        (&["logs", "--follow", &id], &stripped),
        (&["logs", "--follow", "--ansi", "keep", &id], &raw),
    ] {
        let done = caller.run(args).await;
        assert_eq!((&done.assert(0).stdout, done.stderr.as_str()), (want, ""), "{args:?}");
    }
    for args in [&["logs", &id] as &[&str], &["logs", "--follow", &id]] {
        let (exit, seen) = caller.terminal(100, args).await.done().await;
        assert!(exit.success(), "{exit}");
        assert!(seen.contains("\u{1b}[31mred") && seen.contains("10%\r\n20%\r\n"), "{seen:?}");
    }

    let list = caller.run(&["logs", "--events", &id]).await;
    let lines: Vec<_> = list.assert(0).stdout.lines().collect();
    assert_eq!(lines.len(), events.len());
    for (line, event) in lines.iter().zip(&events) {
        for name in ["timestamp", "severity", "type"] {
            assert!(line.contains(event[name].as_str().unwrap()), "{name} is not in {line}");
        }
        assert!(line.split_whitespace().nth(1) == Some(event["seq"].to_string().as_str()), "{line}");
    }
    assert_eq!(caller.run(&["logs", "--events", "--follow", &id]).await.assert(0).stdout, list.stdout);
    for args in [&["--type", "tool_call,stderr"] as &[&str], &["--severity", "info", "--type", "stderr,tool_call"]] {
        for follow in [&[] as &[&str], &["--follow"]] {
            let some = caller.run(&[&["logs", "--events", &id], args, follow].concat()).await;
            let kinds: Vec<_> = some.assert(0).stdout.lines().map(|l| l.split_whitespace().nth(3).unwrap()).collect();
            assert_eq!(kinds, ["tool_call", "stderr"], "{}", some.stdout);
        }
    }
    caller.run(&["logs", "--type", "stdout", &id]).await.assert(2);
    sidecar.stop().await;
}

#[tokio::test]
async fn logs_are_followed_live() {
    let world = World::new().await;
    let sidecar = world.start(&[]).await;
    let caller = Caller::of(&sidecar);
    let id = sidecar.submit(&Script::new().bash(&gated(&["one", "two"], "true")).text("Done.")).await;
    let mut output = caller.start(&["logs", "--follow", &id]).await;
    let mut list = caller.start(&["logs", "--events", "--follow", "--type", "stdout,complete", &id]).await;
    output.until("one").await;
    list.until("stdout      one").await;
    std::fs::write(world.file("gate-1"), "").unwrap();
    assert_eq!(output.done().await.assert(0).stdout, "one\ntwo\n");
    let list = list.done().await;
    assert!(list.assert(0).stdout.lines().last().unwrap().contains("completed (finished); 2 calls"), "{}", list.stdout);
    sidecar.stop().await;
}
