//! Executions and events that nothing ran for, of the sizes that real ones have.

use chrono::Utc;
use opencode_sidecar::model::event::{EventType, NewEvent};
use opencode_sidecar::model::task::{Limits, ModelChoice, Provider};
use opencode_sidecar::model::{ExecutionRecord, Task, TaskId};
use serde_json::json;

/// A new execution that waits for its turn.
pub(crate) fn record() -> ExecutionRecord {
    let model = ModelChoice::new(Provider::Local, "scripted", "http://127.0.0.1:1/v1");
    let limits = Limits { output_bytes: 1 << 30, model_calls: 100, total_tokens: 1 << 30, ..Limits::default() };
    let task = Task::new(TaskId::new(), "Go.", model, 3600, limits);
    ExecutionRecord::new("bench", uuid::Uuid::now_v7(), task, Vec::new(), Utc::now())
}

/// One of a run: pieces of text, lines of output, now and then a call of a tool. Its envelope has 150 to 400 bytes.
pub(crate) fn event(number: usize) -> NewEvent {
    let id = format!("prt_{number:024x}");
    match number % 10 {
        0..=4 => NewEvent::new(EventType::Message, json!({ "part_id": id, "delta": "some words \"of text\" " })),
        5..=8 => {
            let line = format!("test store::a_line_of_{number}_that_a_build_says ... \u{1b}[32mok\u{1b}[0m\n");
            NewEvent::new(EventType::Stdout, json!(line.repeat(1 + number % 3))).with("call_id", id)
        }
        _ => {
            let command = "cargo test --locked --test it -- store:: 2>&1 | grep -a -e ok -e FAILED | head -n 50";
            let args = json!({ "command": command, "description": "Runs the tests of the store, and shows the end" });
            NewEvent::new(EventType::ToolCall, json!({ "tool": "bash", "args": args })).with("call_id", id)
        }
    }
}
