//! The server against its own document: schemathesis makes requests of it, good ones and bad ones, and holds each answer to
//! what the document says of it. No answer is a 5xx.

use crate::support::sidecar::World;
use opencode_sidecar::sandbox::Signal;
use opencode_sidecar::scripted::Script;
use serde_json::json;
use std::process::Stdio;
use std::time::Duration;
use tokio::process::Command;

/// What each ten examples of an operation may take at most.
const PATIENCE: Duration = Duration::from_secs(240);

#[tokio::test]
#[expect(clippy::disallowed_methods, reason = "a client of the test's own")]
async fn the_server_keeps_to_its_own_document() {
    let tool = std::env::var_os("OPENCODE_SIDECAR_SCHEMATHESIS");
    let tool =
        tool.expect("OPENCODE_SIDECAR_SCHEMATHESIS is what scripts/setup-schemathesis prints; make test sets it");
    let world = World::new().await;
    // Without a default model a request that was made up runs nothing: OpenCode would be started for each of them.
    let default = ["OPENCODE_PROVIDER", "OPENCODE_MODEL", "OPENCODE_API_KEY", "OPENCODE_API_ENDPOINT"];
    let sidecar = world.start(&default.map(|name| (name, ""))).await;
    let model = json!({ "provider": "custom", "model": "m", "api_endpoint": world.model.base_url() });
    let script = Script::new().bash("echo out").text("Done.");
    let execution = sidecar.submit_with(&script, json!({ "model_config": model })).await;
    sidecar.finished(&execution).await;
    let session = uuid::Uuid::new_v4().to_string();
    let body = json!({ "session_id": session, "prompt": script.to_prompt("x"), "model_config": model });
    assert_eq!(sidecar.post("/sessions", body).await.0, 201);
    let stopped = sidecar.post(&format!("/sessions/{session}/stop"), json!({})).await;
    assert_eq!(stopped.0, 200, "{}", stopped.1);
    // An execution and a session that are there, for the routes that want one.
    // What is made up is also refused for its length (413, 414, 431), which the tool does not take for a refusal by itself.
    let configuration = format!(
        "[parameters]\n\"path.execution_id\" = \"{execution}\"\n\"path.session_id\" = \"{session}\"\n\
         [checks.negative_data_rejection]\n\
         expected-statuses = [400, 401, 403, 404, 405, 406, 409, 413, 414, 415, 422, 428, 429, 431]\n"
    );
    std::fs::write(world.file("schemathesis.toml"), configuration).unwrap();
    let examples: u32 = std::env::var("SCHEMATHESIS_EXAMPLES").map_or(10, |count| count.parse().unwrap());
    let mut command = Command::new(tool);
    command
        .args(["run", &format!("{}/openapi.json", sidecar.base)])
        .args(["--header", &format!("Authorization: Bearer {}", sidecar.secret)])
        // Not all that is refused can be said in a schema: a cursor has to be one that was given out.
        .args(["--checks", "all", "--exclude-checks", "positive_data_acceptance"])
        .args([
            "--continue-on-failure",
            "--no-color",
            "--seed",
            "1",
            "--request-timeout",
            "60",
            "--max-response-time",
            "60",
        ])
        .args(["--max-examples", &examples.to_string()])
        // It keeps what it has learnt beside the code otherwise.
        .current_dir(world.workspace.path())
        .stdin(Stdio::null())
        .kill_on_drop(true);
    let ran = tokio::time::timeout(PATIENCE * examples.div_ceil(10), command.output()).await;
    let ran = ran.expect("it ends in time").unwrap();
    let said = String::from_utf8_lossy(&ran.stdout);
    assert!(ran.status.success(), "{said}\n{}", String::from_utf8_lossy(&ran.stderr));
    println!("{said}");
    // It is as well as before.
    assert_eq!(sidecar.get("/ready").await["status"], json!("ready"));
    // A session that was made up may rest in it.
    sidecar.signal(Signal::Term);
    assert_eq!(sidecar.exited().await.code, Some(0));
}
