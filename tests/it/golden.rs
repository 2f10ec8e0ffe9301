//! What the translator makes of what OpenCode really sends.
//!
//! `tests/golden/NAME.events.jsonl` holds the events of one run of the real OpenCode as they came, without heartbeats,
//! each with the time of its arrival (`at`, milliseconds since 1970). `NAME.expected.jsonl` holds what the translator
//! makes of them: events, signals and notes in their order, and last what it knows at the end. The test replays the
//! first and compares with the second; it starts nothing.
//!
//! `UPDATE_GOLDEN=1 cargo test --test it golden` writes the second anew, to be read in the diff.
//! `UPDATE_GOLDEN=record cargo test --test it golden` records the first anew as well: from the real OpenCode
//! (OPENCODE_COMMAND, `opencode` in PATH, or the package under `sidecars/opencode-server`), its provider played by the
//! scripted model. `GOLDEN=NAME` limits both to one run. Ids and times differ with each recording; paths do not, since
//! it works in `/tmp/opencode-sidecar-golden`.

#![allow(clippy::unwrap_used, reason = "a test's own helpers fail like the test")]

mod record;
mod scenarios;

use opencode_sidecar::model::NewEvent;
use opencode_sidecar::opencode::translate::{Signal, Translator};
use opencode_sidecar::opencode::wire::RawEvent;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::path::PathBuf;

/// The directory of every recorded run.
const WORKSPACE: &str = "/tmp/opencode-sidecar-golden/ws";

/// A line of a recording.
#[derive(Debug, Deserialize, Serialize)]
struct Recorded {
    at: i64,
    #[serde(rename = "type")]
    kind: String,
    properties: Value,
}

fn path(name: &str, kind: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/{name}.{kind}.jsonl"))
}

fn event_line(event: &NewEvent) -> Value {
    let mut line = json!({ "type": event.kind.as_str(), "severity": event.severity.as_str(), "data": event.data });
    if !event.beside.is_empty() {
        line["beside"] = json!(event.beside);
    }
    line
}

fn signal_line(signal: &Signal) -> Value {
    let (word, detail) = match signal {
        Signal::Busy => ("busy", Value::Null),
        Signal::Idle => ("idle", Value::Null),
        Signal::Stopping => ("stopping", Value::Null),
        Signal::Retry { wait_ms } => ("retry", json!(wait_ms)),
        Signal::Error(error) => ("error", json!(error.name)),
        Signal::PermissionAsked { request_id } => ("permission_asked", json!(request_id)),
        Signal::QuestionAsked { request_id } => ("question_asked", json!(request_id)),
    };
    if detail.is_null() { json!({ "signal": word }) } else { json!({ "signal": word, "of": detail }) }
}

/// What the translator makes of a recording, a JSON document per line.
fn replay(recording: &str) -> Vec<String> {
    let events: Vec<Recorded> = recording.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    // The run's own session is the first one that was made.
    let root = events.iter().find(|event| event.kind == "session.created").unwrap();
    let root = root.properties["info"]["id"].as_str().unwrap();
    let mut translator = Translator::new(root, WORKSPACE);
    let mut lines = Vec::new();
    for Recorded { at, kind, properties } in events {
        let step = translator.translate(&RawEvent { kind, properties }, at);
        lines.extend(step.events.iter().map(event_line));
        lines.extend(step.shell_started.map(|(call, command)| json!({ "shell_started": call, "command": command })));
        lines.extend(step.tool_ended.map(|call| json!({ "tool_ended": call })));
        lines.extend(step.signal.as_ref().map(signal_line));
    }
    lines.extend(translator.abandon_texts().iter().map(event_line));
    let (input_tokens, output_tokens, cost) = translator.spent();
    lines.push(json!({ "at_the_end": {
        "final_text": translator.final_text(),
        "files": translator.files(),
        "progress": translator.progress(),
        "current_tool": translator.current_tool(),
        "open_tools": translator.open_tools(),
        "error": translator.pending_error().map(|error| &error.name),
        "spent": [input_tokens, output_tokens, cost],
    }}));
    lines.iter().map(Value::to_string).collect()
}

#[tokio::test]
async fn what_opencode_sends_is_translated_as_recorded() {
    let update = std::env::var("UPDATE_GOLDEN").ok();
    let only = std::env::var("GOLDEN").ok();
    let scenarios = scenarios::all();
    let chosen = scenarios.iter().filter(|scenario| only.as_deref().is_none_or(|only| only == scenario.name));
    for scenario in chosen {
        let name = scenario.name;
        if update.as_deref() == Some("record") {
            let events = record::record(scenario).await;
            let lines: Vec<_> = events.iter().map(|event| serde_json::to_string(event).unwrap() + "\n").collect();
            std::fs::write(path(name, "events"), lines.concat()).unwrap();
        }
        let recording = std::fs::read_to_string(path(name, "events")).unwrap();
        assert!(!recording.contains(record::KEY) && !recording.contains(record::PASSWORD), "{name}: holds a secret");
        let lines = replay(&recording);
        if update.is_some() {
            std::fs::write(path(name, "expected"), lines.join("\n") + "\n").unwrap();
        }
        let expected = std::fs::read_to_string(path(name, "expected")).unwrap();
        let expected: Vec<_> = expected.lines().map(str::to_owned).collect();
        // One line at a time, or the difference would be lost in the size of the whole.
        for (at, (got, expected)) in lines.iter().zip(&expected).enumerate() {
            assert_eq!(got, expected, "{name}.expected.jsonl, line {}", at + 1);
        }
        assert_eq!(lines.len(), expected.len(), "{name}.expected.jsonl: lines");
    }
    // Every file belongs to a scenario: nothing is kept that nobody looks at.
    let kinds = ["events", "expected"];
    let mut known: Vec<_> = scenarios.iter().flat_map(|s| kinds.map(|kind| path(s.name, kind))).collect();
    let directory = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let mut found: Vec<_> = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    known.sort();
    found.sort();
    assert_eq!(found, known);
}
