//! What a task does, and what is seen of it.

use crate::support::sidecar::{World, text_of};
use opencode_sidecar::scripted::Script;
use serde_json::{Value, json};

fn of<'a>(events: &'a [Value], kind: &str) -> Vec<&'a Value> {
    events.iter().filter(|event| event["type"] == kind).collect()
}

#[tokio::test]
async fn a_file_is_written_and_everything_is_told() {
    let world = World::new().await;
    let sidecar = world.start(&[]).await;
    let todos = |status: &str| {
        json!({ "todos": [
            { "content": "write", "status": "completed", "priority": "high" },
            { "content": "look", "status": status, "priority": "low" },
        ]})
    };
    let script = Script::new()
        .tool("todowrite", todos("in_progress"))
        .write(&world.path("hello.txt"), "Hello, file\n")
        .bash("cat hello.txt; exit 3")
        .tool("todowrite", todos("completed"))
        .text("It is written.");
    let metadata = json!({ "mine": [1, null, "ü\u{0}"] });
    let id = sidecar.submit_with(&script, json!({ "metadata": metadata, "workdir": "." })).await;
    let events = sidecar.follow(&id).await;

    assert_eq!(std::fs::read_to_string(world.file("hello.txt")).unwrap(), "Hello, file\n");
    let record = sidecar.get(&format!("/tasks/{id}")).await;
    assert_eq!((&record["status"], &record["reason"]), (&json!("completed"), &json!("finished")), "{record:#}");
    assert_eq!(record["final_message"].as_str().unwrap().trim(), "It is written.");
    assert_eq!(record["files_modified"], json!(["hello.txt"]));
    assert_eq!(record["progress"], 100);
    assert_eq!(record["metadata"], metadata);
    assert_eq!(record["usage"]["model_calls"], 5);
    assert!(record["usage"]["input_tokens"].as_u64().unwrap() >= 500, "{record:#}");
    assert!(record["usage"]["cpu_seconds"].as_f64().unwrap() > 0.0);
    assert_eq!(record["last_seq"], events.len());

    let statuses: Vec<_> = of(&events, "status").iter().map(|e| e["data"].clone()).collect();
    assert_eq!(statuses, ["pending", "running", "completed"]);
    let calls = of(&events, "tool_call");
    let tools: Vec<_> = calls.iter().map(|e| e["data"]["tool"].clone()).collect();
    assert_eq!(tools, ["todowrite", "write", "bash", "todowrite"]);
    let results = of(&events, "tool_result");
    assert_eq!(results.len(), 4);
    for (call, result) in calls.iter().zip(&results) {
        assert_eq!(call["data"]["call_id"], result["data"]["call_id"]);
        assert!(call["seq"].as_u64() < result["seq"].as_u64());
    }
    assert_eq!(results[2]["data"]["exit_code"], 3);
    assert_eq!(of(&events, "file")[0]["data"], json!({ "path": "hello.txt", "change": "added" }));
    assert_eq!(of(&events, "todo").len(), 2);
    let complete = &events.last().unwrap()["data"];
    assert_eq!(complete["files_modified"], json!(["hello.txt"]));
    assert_eq!(complete["usage"], record["usage"]);
    let message = of(&events, "message");
    let said: String = message.iter().filter_map(|e| e["data"]["delta"].as_str()).collect();
    assert_eq!(said.trim(), "It is written.");
    assert!(message.iter().any(|e| e["data"]["final"] == true));

    // The same by pages, whatever their size.
    let mut paged = Vec::new();
    let mut after = 0;
    while after < events.len() as u64 {
        let page = sidecar.get(&format!("/tasks/{id}/events?after={after}&limit=7")).await;
        paged.extend(page["events"].as_array().unwrap().clone());
        after = page["next_after"].as_u64().unwrap();
    }
    assert_eq!(paged, events);
    let some = sidecar.get(&format!("/tasks/{id}/events?type=stdout,stderr&severity=info&limit=1000")).await;
    assert!(some["events"].as_array().unwrap().iter().all(|e| e["type"] == "stdout"));
    assert_eq!(some["next_after"], events.len());

    let history = sidecar.get(&format!("/tasks?task_id={}", record["task_id"].as_str().unwrap())).await;
    assert_eq!(history["executions"][0]["execution_id"], json!(id));
    assert_eq!(history["next_cursor"], Value::Null);
    sidecar.stop().await;
}

/// A line gates the next one: each comes while the command waits for what is only done after it was seen.
#[tokio::test]
async fn shell_output_is_live_and_told_apart() {
    let world = World::new().await;
    let sidecar = world.start(&[]).await;
    let command = "echo one; until [ -e gate-1 ]; do sleep 0.02; done; echo two >&2; \
                   until [ -e gate-2 ]; do sleep 0.02; done; printf 'three, \\033[31mred\\033[0m'";
    let id = sidecar.submit(&Script::new().bash(command).text("done")).await;
    let mut stream = sidecar.stream(&id, 0).await;
    let mut events = stream.until("one", |e| e["type"] == "stdout" && e["data"] == "one\n").await;
    let call = events.iter().find(|e| e["type"] == "tool_call").expect("the call comes before its output").clone();
    assert_eq!(sidecar.status(&id).await["current_tool"], "bash");
    std::fs::write(world.file("gate-1"), "").unwrap();
    events.extend(stream.until("two", |e| e["type"] == "stderr" && e["data"] == "two\n").await);
    assert!(!events.iter().any(|e| e["type"] == "tool_result"));
    std::fs::write(world.file("gate-2"), "").unwrap();
    events.extend(stream.until("the end", |e| e["type"] == "complete").await);

    assert_eq!(text_of(&events, "stdout"), "one\nthree, \u{1b}[31mred\u{1b}[0m");
    assert_eq!(text_of(&events, "stderr"), "two\n");
    for event in events.iter().filter(|e| e["type"] == "stdout" || e["type"] == "stderr") {
        assert_eq!(event["call_id"], call["data"]["call_id"]);
    }
    let download = |ansi: &str| format!("{}/tasks/{id}/output?ansi={ansi}", sidecar.base);
    for (ansi, want) in [("keep", "one\ntwo\nthree, \u{1b}[31mred\u{1b}[0m"), ("strip", "one\ntwo\nthree, red")] {
        let got = sidecar.http.get(download(ansi)).bearer_auth(&sidecar.secret).send().await.unwrap();
        assert_eq!(got.headers()["content-type"], "text/plain; charset=utf-8");
        assert_eq!(got.text().await.unwrap(), want);
    }
    sidecar.stop().await;
}

#[tokio::test]
async fn a_megabyte_of_output_is_complete_and_in_order() {
    let world = World::new().await;
    let sidecar = world.start(&[]).await;
    // 1,288,895 bytes in one command, and characters of two bytes for pieces to cut.
    let id = sidecar.submit(&Script::new().bash("seq -f '%.0f ä' 1 140000; echo end >&2").text("done")).await;
    let events = sidecar.follow(&id).await;
    let want: String = (1..=140_000).map(|n| format!("{n} ä\n")).collect();
    assert!(want.len() > 1_200_000);
    let got = text_of(&events, "stdout");
    assert_eq!(got.len(), want.len());
    assert!(got == want, "the text differs");
    assert_eq!(text_of(&events, "stderr"), "end\n");
    let result = events.iter().find(|e| e["type"] == "tool_result").unwrap();
    let last_output = events.iter().rfind(|e| e["type"] == "stdout").unwrap();
    assert!(last_output["seq"].as_u64() < result["seq"].as_u64(), "output comes before the result of its call");
    sidecar.stop().await;
}

#[tokio::test]
async fn two_sessions_do_not_mix() {
    let world = World::new().await;
    let sidecar = world.start(&[]).await;
    let script = |me: &str, other: &str| {
        Script::new()
            .bash(&format!(
                "touch at-{me}; until [ -e at-{other} ]; do sleep 0.02; done; for i in $(seq 200); do echo {me}; done"
            ))
            .write(&world.path(&format!("{me}.txt")), me)
            .text(me)
    };
    let (first, second) =
        (sidecar.submit(&script("anna", "berta")).await, sidecar.submit(&script("berta", "anna")).await);
    let (one, two) = tokio::join!(sidecar.follow(&first), sidecar.follow(&second));
    for (events, me, id) in [(&one, "anna", &first), (&two, "berta", &second)] {
        assert_eq!(text_of(events, "stdout"), format!("{me}\n").repeat(200));
        let record = sidecar.get(&format!("/tasks/{id}")).await;
        assert_eq!(record["status"], "completed", "{record:#}");
        assert_eq!(record["final_message"].as_str().unwrap().trim(), me);
        assert_eq!(record["files_modified"], json!([format!("{me}.txt")]));
        // The prompt names both; what the run itself said and did must not.
        let own: Vec<_> = events.iter().filter(|e| e["type"] != "tool_call" && e["type"] != "tool_result").collect();
        let other = if me == "anna" { "berta" } else { "anna" };
        assert!(!json!(own).to_string().contains(other), "{own:#?}");
    }
    sidecar.stop().await;
}

#[tokio::test]
async fn what_a_command_leaves_in_the_background_holds_nothing_up_and_ends_with_the_session() {
    let world = World::new().await;
    let sidecar = world.start(&[]).await;
    let script = Script::new()
        .bash("(until [ -e late ]; do sleep 0.02; done; echo late; sleep 654321) & echo started")
        .bash("touch late; until [ -e told ]; do sleep 0.02; done; echo next")
        .text("done");
    let id = sidecar.submit(&script).await;
    let is_late = |event: &Value| event["type"] == "stdout" && event["data"].as_str().unwrap().contains("late\n");
    sidecar.stream(&id, 0).await.until("what the background says", is_late).await;
    std::fs::write(world.file("told"), "").unwrap();
    let events = sidecar.follow(&id).await;
    assert_eq!(events.last().unwrap()["data"]["status"], "completed");
    let out = text_of(&events, "stdout");
    assert!(out.contains("started\n") && out.contains("next\n") && out.contains("late\n"), "{out}");
    assert!(!crate::support::sidecar::runs("sleep 654321"));
    sidecar.stop().await;
}

/// What ends a shell need not be itself: the kernel, when memory runs out, or the command.
#[tokio::test]
async fn a_shell_that_is_killed_has_a_result_like_another() {
    let world = World::new().await;
    let sidecar = world.start(&[]).await;
    let killed = |how| json!({ "command": format!("echo before; {how} $$"), "timeout": 900_000, "description": "x" });
    // As `pkill -KILL bash` does, but of these processes only.
    let by_name = "for each in $PPID $$; do grep -qx bash /proc/$each/comm && kill -KILL $each; done; : ";
    let script = Script::new().tool("bash", killed("kill -KILL")).tool("bash", killed("kill -TERM"));
    let script = script.tool("bash", killed(by_name)).text("Gone on.");
    let events = sidecar.follow(&sidecar.submit(&script).await).await;
    assert_eq!(events.last().unwrap()["data"]["final_message"], "Gone on.", "{events:#?}");
    let codes: Vec<_> = of(&events, "tool_result").iter().map(|event| event["data"]["exit_code"].clone()).collect();
    assert_eq!(codes, [137, 143, 137]);
    assert_eq!(text_of(&events, "stdout"), "before\nbefore\nbefore\n");
    sidecar.stop().await;
}
