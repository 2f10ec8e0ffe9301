//! `model_config`: what a task asks for is what the provider gets, through the real OpenCode, in each protocol.

#![allow(clippy::unwrap_used, reason = "a test's own helpers fail like the test")]

use crate::support::sidecar::{API_KEY, Sidecar, World};
use crate::support::tls::Authority;
use opencode_sidecar::scripted::{RecordedRequest, Script};
use serde_json::{Value, json};

const SYSTEM: &str = "Speak of the lighthouse.";

/// The calls whose prompt has the mark in it, as they reached the provider.
fn calls(world: &World, mark: &str) -> Vec<(RecordedRequest, Value)> {
    let requests = world.model.requests().into_iter();
    let parsed = requests.map(|request| (request.clone(), serde_json::from_slice::<Value>(&request.body).unwrap()));
    parsed.filter(|(_, body)| body["messages"].to_string().contains(mark)).collect()
}

fn header<'a>(request: &'a RecordedRequest, name: &str) -> Option<&'a str> {
    request.headers.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
}

/// The names of the tools that a call offers, in both protocols.
fn offered(body: &Value) -> Vec<String> {
    let tools = body["tools"].as_array().into_iter().flatten();
    let mut names: Vec<_> =
        tools.map(|tool| tool["function"]["name"].as_str().or(tool["name"].as_str()).unwrap().to_owned()).collect();
    names.sort();
    names
}

/// Asserts that a run ended well and gives what its tools came to: name, error, result.
async fn results(sidecar: &Sidecar, id: &str) -> Vec<(String, Value, String)> {
    let events = sidecar.follow(id).await;
    assert_eq!(events.last().unwrap()["data"]["status"], "completed", "{events:#?}");
    let results = events.iter().filter(|event| event["type"] == "tool_result");
    results
        .map(|event| {
            let data = &event["data"];
            (data["tool"].as_str().unwrap().to_owned(), data["error"].clone(), data["result"].to_string())
        })
        .collect()
}

#[tokio::test]
async fn anthropic_with_everything_that_can_be_said() {
    let world = World::new().await;
    let sidecar = world.start(&[]).await;
    // With `edit` in the list: the agent `plan` denies it all the same. Its shell is another matter, and allowed.
    let script = Script::new()
        .json(json!({ "reasoning": "so", "text": "First a command.", "usage": { "prompt": 30, "completion": 4 },
            "tools": [{ "name": "bash", "args": { "command": "echo hi", "description": "d" } }] }))
        .unwrap()
        .write(&world.path("plan.txt"), "x")
        .json(json!({ "status": 529, "times": 1, "text": "Done.", "usage": { "prompt": 50, "completion": 6 },
            "body": { "type": "error", "error": { "type": "overloaded_error", "message": "Overloaded" } } }))
        .unwrap();
    let model_config = json!({
        "provider": "anthropic", "model": "lamp", "model_version": "20300101", "api_key": "sk-ant-1",
        "temperature": 0, "max_tokens": 128_000, "enabled_tools": ["file_ops", "terminal"],
        "api_endpoint": world.model.base_url().replace("/v1", "/deeper/v1//"),
    });
    let more = json!({ "model_config": model_config, "system_prompt": SYSTEM, "agent": "plan" });
    let id = sidecar.submit_with(&script, more).await;
    let results = results(&sidecar, &id).await;
    assert_eq!((results[0].0.as_str(), &results[0].1), ("bash", &Value::Null), "{results:?}");
    assert_eq!(results[1].0, "write");
    assert!(results[1].1.is_string() && !world.file("plan.txt").exists(), "{results:?}");

    let record = sidecar.get(&format!("/tasks/{id}")).await;
    assert_eq!(record["final_message"].as_str().unwrap().trim(), "Done.");
    // The second step has the script's own usage, the call that failed none.
    let usage = &record["usage"];
    assert_eq!(
        (&usage["input_tokens"], &usage["output_tokens"], &usage["model_calls"]),
        (&json!(180), &json!(30), &json!(4)),
        "{record:#}"
    );
    let said = &record["model_config"];
    assert_eq!((&said["model"], &said["model_version"]), (&json!("lamp"), &json!("20300101")));
    assert!(!record.to_string().contains("sk-ant-1"));

    let calls = calls(&world, "");
    assert_eq!(calls.len(), 4);
    for (request, body) in &calls {
        assert_eq!(request.path, "/deeper/v1/messages");
        assert_eq!(header(request, "anthropic-version"), Some("2023-06-01"));
        assert_eq!((&body["model"], &body["stream"]), (&json!("lamp-20300101"), &json!(true)));
        assert_eq!((&body["temperature"], &body["max_tokens"]), (&json!(0), &json!(128_000)));
        assert_eq!(offered(body), ["bash", "glob", "grep", "read"]);
        assert!(body["system"].to_string().contains(SYSTEM) && !body["messages"].to_string().contains(SYSTEM));
    }
    assert!(world.model.authorization_values().iter().all(|value| value == "sk-ant-1"), "as x-api-key, bare");
    sidecar.stop().await;
}

#[tokio::test]
async fn openai_and_local_and_their_bounds() {
    let world = World::new().await;
    let authority = Authority::new();
    let front = world.tls_front(&authority, "http/1.1").await;
    let sidecar = world.start(&[("SSL_CERT_FILE", authority.file().to_str().unwrap())]).await;
    // A sub-agent's calls carry the same.
    let inner = Script::new().bash("echo inner").text("inner done").to_prompt("The sub-agent's part.");
    let script = Script::new()
        .tool("task", json!({ "description": "d", "prompt": inner, "subagent_type": "general" }))
        .text("outer done");
    let openai = json!({
        "provider": "openai", "model": "lamp", "model_version": "lamp-2030", "api_key": "sk-1",
        "temperature": 2, "max_tokens": 1, "api_endpoint": format!("{}/", world.model.base_url()),
    });
    let openai = sidecar.submit_with(&script, json!({ "model_config": openai, "system_prompt": SYSTEM })).await;
    // Over TLS.
    let local = json!({ "provider": "local", "model": "group/lamp:free", "api_endpoint": front });
    let script = Script::new().write(&world.path("plan.txt"), "x").text("hello");
    let local = sidecar.submit_with(&script, json!({ "model_config": local, "agent": "plan" })).await;

    let found = results(&sidecar, &openai).await;
    let tools: Vec<_> = found.iter().map(|(tool, error, _)| (tool.as_str(), error.is_null())).collect();
    assert_eq!(tools, [("bash", true), ("task", true)], "{found:?}");
    assert!(found[1].2.contains("inner done"), "{found:?}");
    let found = results(&sidecar, &local).await;
    assert!(found[0].0 == "write" && found[0].1.is_string(), "the agent `plan` writes no files: {found:?}");
    assert!(!world.file("plan.txt").exists());

    let all = calls(&world, "");
    let (of_openai, of_local): (Vec<_>, Vec<_>) = all.iter().partition(|(_, body)| body["model"] == "lamp-2030");
    assert_eq!((of_openai.len(), of_local.len()), (4, 2));
    for (request, body) in of_openai {
        assert_eq!((request.path.as_str(), request.authorized), ("/v1/chat/completions", true));
        assert_eq!((&body["temperature"], &body["max_tokens"]), (&json!(2), &json!(1)));
        let system = |role: &str| {
            let messages = body["messages"].as_array().unwrap().iter();
            messages.filter(|m| m["role"] == role).any(|m| m["content"].to_string().contains(SYSTEM))
        };
        // A sub-agent has a system prompt of its own.
        let of_subagent = body["messages"][1]["content"].to_string().contains("The sub-agent's part.")
            && !body["messages"][1]["content"].to_string().contains("Do what the script says.");
        assert_eq!((system("system"), system("user")), (!of_subagent, false), "{body:#}");
    }
    // What is not asked for: no temperature, and the limit that the documentation names. And no key, no credential.
    let (request, body) = of_local[0];
    assert_eq!((&body["model"], request.authorized), (&json!("group/lamp:free"), false));
    assert_eq!((body.get("temperature"), &body["max_tokens"]), (None, &json!(8192)));
    assert_eq!(
        offered(body),
        ["bash", "edit", "glob", "grep", "read", "skill", "task", "todowrite", "webfetch", "write"],
        "all tools of this OpenCode; where there are new ones, look whether a list of tools denies them"
    );
    sidecar.stop().await;
}

/// What is not in the list is neither offered nor carried out, by whichever way it is tried; and the run goes on.
#[tokio::test]
async fn a_tool_that_is_not_enabled_is_denied() {
    let world = World::new().await;
    let sidecar = world.start(&[]).await;
    std::fs::write(world.file("here.txt"), "before\n").unwrap();
    let here = world.path("here.txt");
    let shell = |file: &str| json!({ "command": format!("touch {file}"), "description": "d" });
    let subagent = |kind: &str| {
        let inner = Script::new().tool("bash", shell(kind)).write(&world.path(kind), "x").text("inner done");
        json!({ "description": "d", "prompt": inner.to_prompt("Try."), "subagent_type": kind })
    };
    let patch = "*** Begin Patch\n*** Add File: patched.txt\n+x\n*** End Patch";
    let denied = [
        ("bash", shell("touched")),
        ("write", json!({ "filePath": world.path("written.txt"), "content": "x" })),
        ("edit", json!({ "filePath": here, "oldString": "before", "newString": "after" })),
        ("apply_patch", json!({ "patchText": patch })),
        ("webfetch", json!({ "url": format!("{}/fetched", world.model.base_url()), "format": "text" })),
        ("todowrite", json!({ "todos": [] })),
        ("skill", json!({ "name": "x" })),
        ("lsp", json!({ "operation": "hover" })),
        ("server_tool", json!({})),
        ("invalid", json!({ "tool": "x", "error": "x" })),
    ];
    let mut script = Script::new().tool("read", json!({ "filePath": here }));
    for (name, args) in &denied {
        script = script.tool(name, args.clone());
    }
    script = script.tool("task", subagent("general")).tool("task", subagent("explore")).text("still here");
    let config = |tools: Value, model: &str| {
        json!({ "model_config": { "provider": "custom", "model": model, "api_key": API_KEY,
            "api_endpoint": world.model.base_url(), "enabled_tools": tools } })
    };
    // OpenCode gives a model of this name `apply_patch` in place of `edit` and `write`.
    let id = sidecar.submit_with(&script, config(json!(["read", "task"]), "gpt-5-lamp")).await;
    let found = results(&sidecar, &id).await;
    assert_eq!((found[0].0.as_str(), &found[0].1), ("read", &Value::Null), "{found:?}");
    for ((name, _), (tool, error, _)) in denied.iter().zip(&found[1..]) {
        assert!(tool == name && error.is_string(), "{name} was not denied: {tool} {error}");
    }
    let rest: Vec<_> =
        found[1 + denied.len()..].iter().map(|(tool, error, _)| (tool.as_str(), error.is_null())).collect();
    let of_subagent = [("bash", false), ("write", false), ("task", true)];
    assert_eq!(rest, [of_subagent, of_subagent].concat(), "{found:?}");
    let names: Vec<_> = std::fs::read_dir(world.workspace.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names, ["here.txt"]);
    assert_eq!(std::fs::read_to_string(world.file("here.txt")).unwrap(), "before\n");
    let calls = calls(&world, "");
    assert!(calls.iter().all(|(request, _)| request.path == "/v1/chat/completions"), "nothing was fetched");
    // The run itself, and two sub-agents of three calls each.
    assert_eq!(calls.len(), 1 + denied.len() + 3 + 6);
    assert!(calls.iter().all(|(_, body)| offered(body) == ["read", "task"] || offered(body) == ["read"]));

    let record = sidecar.get(&format!("/tasks/{id}")).await;
    assert_eq!(record["model_config"]["enabled_tools"], json!(["read", "task"]));
    let body = json!({ "task_id": uuid::Uuid::new_v4(), "prompt": "x" });
    let mut unknown = config(json!(["read", "tusk"]), "m");
    for (name, value) in body.as_object().unwrap() {
        unknown[name] = value.clone();
    }
    let (status, problem) = sidecar.post("/tasks/execute", unknown).await;
    assert_eq!((status, &problem["details"]["field"]), (400, &json!("model_config.enabled_tools[1]")), "{problem:#}");
    sidecar.stop().await;
}
