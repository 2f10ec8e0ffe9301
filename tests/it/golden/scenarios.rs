//! The runs that are recorded: what the model answers, and what happens to the run from outside.

use super::WORKSPACE;
use opencode_sidecar::scripted::{Script, Step, ToolUse};
use serde_json::{Value, json};

/// What is done when something is heard.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Act {
    Nothing,
    /// Aborts the run once its shell command has written something, or the model has said something.
    Abort,
    /// Refuses each permission that is asked for.
    RefusePermissions,
    /// Refuses to answer each question.
    RejectQuestions,
}

pub(super) struct Scenario {
    pub(super) name: &'static str,
    pub(super) script: Script,
    /// What the prompt itself brings, where it does; then `script` is for all that OpenCode asks beside it.
    pub(super) prompt: Option<Script>,
    /// Merged into OpenCode's configuration, member by member at the first two levels.
    pub(super) config: Value,
    pub(super) act: Act,
    /// The agent that the prompt names.
    pub(super) agent: Option<&'static str>,
}

fn file(name: &str) -> String {
    format!("{WORKSPACE}/{name}")
}

fn tool(name: &str, args: Value) -> ToolUse {
    ToolUse { name: name.to_owned(), args }
}

fn bash(command: &str) -> ToolUse {
    tool("bash", json!({ "command": command, "description": "A scripted command" }))
}

fn todos(first: &str, second: &str) -> Value {
    json!({ "todos": [
        { "content": "Write it", "status": first, "priority": "high" },
        { "content": "Try it", "status": second, "priority": "low" },
    ]})
}

fn scenario(name: &'static str, script: Script) -> Scenario {
    Scenario { name, script, prompt: None, config: json!({}), act: Act::Nothing, agent: None }
}

pub(super) fn all() -> Vec<Scenario> {
    let fault = |members: Value| Script::new().json(members).unwrap();
    vec![
        scenario(
            "text",
            Script::new().step(Step {
                reasoning: Some("First I think about it.".to_owned()),
                text: Some("Then I say it, word by word — with an ä and a \u{1f600}.".to_owned()),
                ..Step::default()
            }),
        ),
        scenario(
            "tools",
            Script::new()
                .tool("todowrite", todos("in_progress", "pending"))
                .write(&file("a.txt"), "one\ntwo\n")
                .tool("edit", json!({ "filePath": file("a.txt"), "oldString": "two", "newString": "2" }))
                .tool("read", json!({ "filePath": file("a.txt") }))
                .tool("todowrite", todos("completed", "in_progress"))
                .bash("cat a.txt; echo 'on stderr' >&2; exit 3")
                .tool("todowrite", todos("completed", "completed"))
                .text("All of it is done."),
        ),
        scenario(
            "two-tools-at-once",
            Script::new()
                .step(Step {
                    text: Some("Both at once.".to_owned()),
                    tools: vec![
                        tool("write", json!({ "filePath": file("b.txt"), "content": "b\n" })),
                        bash("for i in 1 2 3; do echo line $i; sleep 0.2; done"),
                    ],
                    ..Step::default()
                })
                .text("Done."),
        ),
        scenario(
            "tool-failures",
            Script::new()
                .tool("edit", json!({ "filePath": file("missing.txt"), "oldString": "a", "newString": "b" }))
                .tool("read", json!({ "filePath": "/etc/hostname" }))
                .tool("no_such_tool", json!({ "a": 1 }))
                .tool("write", json!({ "content": "no path" }))
                .text("Nothing of it worked."),
        ),
        scenario(
            "subagent",
            Script::new()
                .tool(
                    "task",
                    json!({
                        "description": "Look around",
                        "subagent_type": "general",
                        "prompt": Script::new()
                            .bash("echo from the sub-agent")
                            .text("The sub-agent has looked around.")
                            .to_prompt("Look around."),
                    }),
                )
                .text("The sub-agent was here."),
        ),
        scenario(
            "provider-401",
            fault(
                json!({ "status": 401, "body": { "error": { "message": "Incorrect API key provided", "type": "invalid_request_error", "code": "invalid_api_key" } } }),
            ),
        ),
        scenario(
            "provider-500-then-well",
            fault(json!({ "status": 500, "times": 1, "text": "It went well in the end." })),
        ),
        scenario(
            "provider-cut-then-well",
            // So slow that OpenCode has shown some of the first try before it is cut; its first call would be too
            // early for that, since it still loads then.
            Script::new()
                .bash("true")
                .json(json!({ "cut": "text", "times": 1, "delay_ms": 50, "reasoning": "A thought.",
                    "text": "The whole answer came at the second try, and the first half of it twice." }))
                .unwrap(),
        ),
        scenario(
            "provider-error-after-a-call",
            Script::new()
                .json(json!({ "text": "Here it goes.", "cut": "call", "times": 1, "delay_ms": 50,
                    "tools": [bash("echo once more >> done.txt; sleep 0.1")],
                    "by": { "error": { "type": "server_error", "message": "too much" } } }))
                .unwrap()
                .text("It was done twice."),
        ),
        Scenario {
            // The conversation that is summed up ends with what the command shows: the script for the summary.
            prompt: Some(
                Script::new()
                    .bash(r#"echo '<script>[{"text":"What was said so far, in short."}]</script>'"#)
                    .json(json!({ "status": 400,
                        "body": { "error": { "message": "too long", "code": "context_length_exceeded" } } }))
                    .unwrap(),
            ),
            ..scenario("too-long-then-well", Script::new().text("It fits now."))
        },
        Scenario {
            act: Act::Abort,
            ..scenario("abort", Script::new().bash("echo begun; sleep 300; echo never").text("Never said."))
        },
        Scenario {
            act: Act::Abort,
            ..scenario(
                "abort-text",
                Script::new().step(Step {
                    text: Some("This is never said to its end. ".repeat(200)),
                    delay_ms: Some(50),
                    ..Step::default()
                }),
            )
        },
        Scenario {
            config: json!({ "model": "sidecar/unknown" }),
            ..scenario("unknown-model", Script::new().text("Never said."))
        },
        Scenario { agent: Some("nobody"), ..scenario("unknown-agent", Script::new().text("Never said.")) },
        Scenario {
            config: json!({ "permission": { "bash": "ask" } }),
            act: Act::RefusePermissions,
            ..scenario("permission-refused", Script::new().bash("echo never").text("Then without it."))
        },
        Scenario {
            config: json!({ "permission": { "question": "allow" } }),
            act: Act::RejectQuestions,
            ..scenario(
                "question-rejected",
                Script::new()
                    .tool(
                        "question",
                        json!({ "questions": [{
                            "question": "Which one?",
                            "header": "Choice",
                            "options": [
                                { "label": "A", "description": "the first" },
                                { "label": "B", "description": "the second" },
                            ],
                        }]}),
                    )
                    .text("Then I choose myself."),
            )
        },
    ]
}
