//! `exec`, `attach` and `cancel` as a script calls them: what goes where, and the exit codes.

#![allow(clippy::unwrap_used, reason = "a test's own helpers fail like the test")]

use super::{Caller, gated};
use crate::support::sidecar::{World, runs, soon};
use opencode_sidecar::sandbox::Signal;
use opencode_sidecar::scripted::Script;
use serde_json::json;

/// The log's envelopes, byte for byte.
async fn log_of(sidecar: &crate::support::sidecar::Sidecar, id: &str) -> Vec<String> {
    let request = sidecar.http.get(format!("{}/tasks/{id}/stream", sidecar.base)).bearer_auth(&sidecar.secret);
    let text = soon("the log", async { request.send().await.unwrap().text().await.unwrap() }).await;
    text.lines().filter_map(|line| line.strip_prefix("data: ")).map(str::to_owned).collect()
}

/// The id that is told at the beginning.
fn execution(stderr: &str) -> String {
    let (_, rest) = stderr.split_once("Execution ").unwrap();
    rest.split_whitespace().next().unwrap().to_owned()
}

fn said(script: &Script) -> String {
    script.to_prompt("Do what the script says.")
}

#[tokio::test]
async fn json_is_the_log_and_nothing_else() {
    let world = World::new().await;
    let sidecar = world.start(&[]).await;
    let caller = Caller::of(&sidecar);
    let script =
        Script::new().write(&world.path("a b.txt"), "ä\n").bash("printf 'x\\033[31my\\n'; echo z >&2").text("Done.");
    let done = caller.run(&["exec", "--json", &said(&script)]).await;
    done.assert(0);
    let id = execution(&done.stderr);
    let log = log_of(&sidecar, &id).await;
    assert!(log.len() > 5);
    assert_eq!(done.stdout.lines().collect::<Vec<_>>(), log);
    assert_eq!(done.stderr.lines().count(), 1, "{}", done.stderr);

    // Again from its start, and from the middle, though it has ended.
    let again = caller.run(&["attach", "--json", &id]).await;
    assert_eq!(again.assert(0).stdout.lines().collect::<Vec<_>>(), log);
    let rest = caller.run(&["attach", "--json", "--after", "3", &id]).await;
    assert_eq!(rest.assert(0).stdout.lines().collect::<Vec<_>>(), log[3..]);
    let last = log.len().to_string();
    let nothing = caller.run(&["attach", "--json", "--after", &last, &id]).await;
    nothing.assert_told(0, &["It has ended before: completed (finished)."]);
    let beyond = caller.run(&["attach", "--json", "--after", "99999", &id]).await;
    assert_eq!(beyond.assert(0).stdout.lines().collect::<Vec<_>>(), log);
    assert!(beyond.stderr.contains(&format!("the log ends with event {last}, before event 99999")));
    sidecar.stop().await;
}

#[tokio::test]
async fn plain_lines_without_a_terminal() {
    let world = World::new().await;
    let sidecar = world.start(&[]).await;
    let todo = |status: &str| json!({ "todos": [{ "content": "look", "status": status, "priority": "low" }] });
    let script = Script::new()
        .tool("todowrite", todo("in_progress"))
        .write(&world.path("sub/x.txt"), "x")
        .bash("pwd; printf '\\033[31mred\\033[0m\\n'; echo bad >&2; exit 3")
        .tool("todowrite", todo("completed"))
        .text("All done.");
    let task_id = uuid::Uuid::new_v4().to_string();
    std::fs::write(world.file("code.txt"), "the code").unwrap();
    std::fs::write(world.file("context.txt"), "the context").unwrap();
    let args = [
        "--task-id",
        &task_id,
        "--workdir",
        "sub",
        "--timeout",
        "10m",
        "--metadata",
        "{\"a\":1}",
        "--code",
        &world.path("code.txt"),
        "--context-file",
        &world.path("context.txt"),
        "--system-prompt",
        "Be short.",
        "--max-model-calls",
        "50",
    ];
    // The prompt by a pipe, and colours because they were asked for.
    let caller = Caller::of(&sidecar);
    let line = "printf '%s' \"$1\" | { shift; exec \"$0\" exec \"$@\" -; }";
    let prompt = said(&script);
    let done = caller.run_in_shell(line, &[&[prompt.as_str()], &args[..]].concat()).await;
    done.assert(0);
    let id = execution(&done.stderr);
    assert!(!done.stdout.contains('\u{1b}') && !done.stderr.contains('\u{1b}'), "{:?}", done.stdout);
    let workdir = world.path("sub");
    for line in [
        "● pending",
        "● running",
        "To do: 0 of 1 done",
        "  ▸ look",
        &format!("▶ write {workdir}/x.txt"),
        "  added x.txt",
        &format!("  │ {workdir}"),
        "  │ red",
        "  │ bad",
        "  ✓ look",
        "All done.",
        "● completed (finished)",
    ] {
        assert!(done.stdout.lines().any(|l| l.trim_end() == line), "{line:?} is not in\n{}", done.stdout);
    }
    let last = done.stdout.lines().last().unwrap();
    assert!(last.starts_with("5 calls of the model, 500 tokens in, 100 out"), "{last}");

    let record = sidecar.get(&format!("/tasks/{id}")).await;
    let want = json!({ "task_id": task_id, "workdir": "sub", "timeout_seconds": 600, "metadata": { "a": 1 },
        "code": "the code", "context": "the context", "system_prompt": "Be short.", "prompt": prompt });
    for (name, value) in want.as_object().unwrap() {
        assert_eq!(&record[name], value, "{name}");
    }
    assert_eq!(record["limits"]["model_calls"], 50);

    let colours = caller.run(&["--color", "always", "attach", &id]).await;
    assert!(colours.assert(0).stdout.contains("\u{1b}[31mred"), "{:?}", colours.stdout);
    let none = Caller::of(&sidecar).with("NO_COLOR", "1").run(&["attach", &id]).await;
    assert_eq!(none.assert(0).stdout, done.stdout);
    sidecar.stop().await;
}

#[tokio::test]
async fn a_model_of_ones_own_gets_its_key_from_a_variable_or_a_file() {
    let world = World::new().await;
    // The sidecar's own key must not be needed.
    let sidecar = world
        .start(&[
            ("OPENCODE_API_KEY", ""),
            ("OPENCODE_PROVIDER", ""),
            ("OPENCODE_MODEL", ""),
            ("OPENCODE_API_ENDPOINT", ""),
        ])
        .await;
    let prompt = said(&Script::new().text("Done."));
    let endpoint = world.model.base_url();
    let model = ["--provider", "custom", "--model", "mine", "--api-endpoint", &endpoint, "--tools", "file_ops"];
    let caller = Caller::of(&sidecar).with("MY_KEY", "sk-from-a-variable").with("OPENCODE_API_KEY", "sk-the-default");
    let file = world.file("key");
    std::fs::write(&file, "sk-from-a-file\n").unwrap();
    for (args, key) in [
        (&["--api-key-env", "MY_KEY"] as &[&str], "sk-from-a-variable"),
        (&["--api-key-file", file.to_str().unwrap()], "sk-from-a-file"),
        (&[], "sk-the-default"),
    ] {
        let done = caller.run(&[&["exec"], &model[..], args, &[&prompt]].concat()).await;
        done.assert(0);
        assert!(world.model.authorization_values().iter().any(|value| value.contains(key)), "{key}");
        assert!(!done.stdout.contains("sk-") && !done.stderr.contains("sk-"));
        let record = sidecar.get(&format!("/tasks/{}", execution(&done.stderr))).await;
        assert_eq!(record["model_config"]["model"], "mine");
        assert_eq!(record["model_config"]["enabled_tools"][0], "read");
    }
    let unset = caller.run(&[&["exec"], &model[..], &["--api-key-env", "NOT_SET", &prompt]].concat()).await;
    unset.assert_told(2, &["NOT_SET"]);
    caller.run(&["exec", &prompt]).await.assert_told(6, &["model_config: is required"]);
    sidecar.stop().await;
}

#[tokio::test]
async fn each_way_to_end_has_its_exit_code() {
    let world = World::new().await;
    let sidecar = world.start(&[]).await;
    let caller = Caller::of(&sidecar);
    let long = said(&Script::new().bash("sleep 661001").text("x"));
    let two_calls = said(&Script::new().bash("true").text("x"));

    caller.run(&["exec", "--max-model-calls", "1", &two_calls]).await.assert(3);
    caller.run(&["exec", "--timeout", "3s", &long]).await.assert(5);
    // Refused, with the field and the request that the sidecar's log has.
    let refused = caller.run(&["exec", "--workdir", "../away", "x"]).await;
    refused.assert_told(6, &["workdir: must be relative", "400 invalid_field", "field workdir", "request "]);
    let session = uuid::Uuid::now_v7().to_string();
    caller.run(&["exec", "--session", &session, "x"]).await.assert_told(6, &["There is no session", "404"]);

    let nobody = uuid::Uuid::now_v7().to_string();
    for args in [
        &["attach", &nobody] as &[&str],
        &["cancel", &nobody],
        &["logs", &nobody],
        &["logs", "--events", &nobody],
        &["logs", "--follow", &nobody],
    ] {
        caller.run(args).await.assert_told(6, &["There is no execution with this id"]);
    }
    for args in [
        &["attach", "not-an-id"] as &[&str],
        &["exec"],
        &["exec", ""],
        &["exec", "--model", "m", "x"],
        &["exec", "--code", "/no/such/file", "x"],
        &["exec", "--token-file", "/no/such/file", "x"],
        &["exec", "--url", "http://me:hidden@127.0.0.1", "x"],
        &["history", "--status", "dancing"],
    ] {
        let done = caller.run(args).await;
        assert!(!done.assert(2).stderr.contains("hidden"), "{args:?}: {}", done.stderr);
        assert_eq!(done.stdout, "", "{args:?}");
    }

    let wrong = Caller::new(&sidecar.base, "not-the-secret");
    let none = Caller::new(&sidecar.base, "");
    for caller in [&wrong, &none] {
        for args in
            [&["exec", "x"] as &[&str], &["attach", &nobody], &["history"], &["cancel", &nobody], &["logs", &nobody]]
        {
            caller.run(args).await.assert_told(8, &["401", "--token-file"]);
        }
    }
    std::fs::write(world.file("token"), format!("{}\n", sidecar.secret)).unwrap();
    wrong.run(&["history", "--token-file", world.file("token").to_str().unwrap()]).await.assert(0);
    let away = Caller::new("http://127.0.0.1:1", "x");
    for args in
        [&["exec", "x"] as &[&str], &["attach", &nobody], &["history"], &["cancel", &nobody], &["logs", &nobody]]
    {
        away.run(args).await.assert_told(7, &["the sidecar cannot be reached", "Connection refused"]);
    }
    assert!(!runs("sleep 661001"));
    sidecar.stop().await;
}

/// Without a terminal there is nobody to ask.
#[tokio::test]
async fn a_signal_cancels_where_nobody_can_be_asked() {
    let world = World::new().await;
    let sidecar = world.start(&[]).await;
    let caller = Caller::of(&sidecar);
    let prompt = said(&Script::new().bash(&gated(&["one"], "sleep 661002")).text("x"));
    for signal in [Signal::Int, Signal::Term] {
        let mut running = caller.start(&["exec", "--json", &prompt]).await;
        running.until("\"one\\n\"").await;
        assert!(runs("sleep 661002"));
        running.signal(signal);
        let done = running.done().await;
        let end = done.assert(4).json().pop().unwrap();
        assert_eq!((&end["type"], &end["data"]["status"]), (&json!("complete"), &json!("cancelled")));
        assert!(!runs("sleep 661002"));
    }
    sidecar.stop().await;
}

#[tokio::test]
async fn a_detached_run_is_attached_to_and_cancelled() {
    let world = World::new().await;
    let sidecar = world.start(&[]).await;
    let caller = Caller::of(&sidecar);
    let prompt = said(&Script::new().bash(&gated(&["one", "two"], "sleep 661003")).text("x"));
    let detached = caller.run(&["exec", "--detach", &prompt]).await;
    let id = detached.assert(0).stdout.trim_end().to_owned();
    assert_eq!((detached.stderr.as_str(), id.len()), ("", 36));

    let mut attached = caller.start(&["attach", &id]).await;
    attached.until("│ one").await;
    std::fs::write(world.file("gate-1"), "").unwrap();
    attached.until("│ two").await;
    let cancelled = caller.run(&["cancel", "--reason", "enough of it", &id]).await;
    assert_eq!(cancelled.assert(0).stdout, "cancelled (cancelled)\n");
    assert!(!runs("sleep 661003"));
    let attached = attached.done().await;
    assert!(attached.assert(4).stdout.contains("● cancelled (cancelled)"), "{}", attached.stdout);
    // Again, and of one that ended well: nothing changes.
    assert_eq!(caller.run(&["cancel", &id]).await.assert(0).stdout, "cancelled (cancelled)\n");
    let fine = caller.run(&["exec", &said(&Script::new().text("Fine."))]).await;
    let id = execution(&fine.assert(0).stderr);
    assert_eq!(caller.run(&["cancel", &id]).await.assert(0).stdout, "completed (finished)\n");
    sidecar.stop().await;
}

/// A reader that has enough ends the command, not the run.
#[tokio::test]
async fn the_run_goes_on_when_the_output_is_closed() {
    let world = World::new().await;
    let sidecar = world.start(&[]).await;
    let caller = Caller::of(&sidecar);
    let prompt = said(&Script::new().bash(&gated(&["one", "two"], "true")).text("x"));
    let line = "{ \"$0\" exec --json \"$1\"; echo \"code $?\" >&2; } | head -n 1 >/dev/null; touch \"$2\"";
    let gate = world.path("gate-1");
    // The gate is opened when both are gone.
    let done = caller.run_in_shell(line, &[&prompt, &gate]).await;
    assert!(done.stderr.contains("code 9"), "{}", done.stderr);
    assert!(done.stderr.contains("the output is gone; the run goes on. To watch it again: opencode-sidecar attach"));
    let record = sidecar.finished(&execution(&done.stderr)).await;
    assert_eq!(record["status"], "completed", "{record:#}");
    sidecar.stop().await;
}
