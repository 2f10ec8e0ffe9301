//! From events of a log to the frames of a session's stream, as the backend and its browser read them. Pure.

use crate::model::event::Event;
use crate::model::{EventType, SessionEventId, Status, rfc3339};
use chrono::{DateTime, Utc};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use std::fmt::Write;

/// The members of an envelope that frames are made of.
#[derive(Deserialize)]
struct Envelope {
    data: Value,
    #[serde(default)]
    progress: Value,
}

/// Makes the frames of one execution, event by event.
#[derive(Debug, Default)]
pub(crate) struct Frames {
    /// The status and the progress that the last `status` frame told.
    status: Value,
    progress: Value,
}

impl Frames {
    /// The frames of an event, ready to send; none for an event that this stream does not show, and none for the last
    /// one of an execution (see [`closing`]).
    pub(crate) fn of(&mut self, id: SessionEventId, event: &Event) -> String {
        let Ok(Envelope { data, progress }) = serde_json::from_str::<Envelope>(&event.json) else {
            return String::new();
        };
        let output = |kind: &str, text: &Value| json!({ "type": kind, "text": text, "line": text });
        let (name, data) = match event.kind {
            EventType::Stdout | EventType::Stderr => ("output", output(event.kind.as_str(), &data)),
            // What the agent says comes whole, when it is said.
            EventType::Message if data["final"] == true => ("output", output("stdout", &data["text"])),
            EventType::ToolCall => ("tool_call", json!({ "tool": data["tool"], "args": data["args"] })),
            EventType::ToolResult => {
                let result = if data["error"].is_null() { &data["result"] } else { &data["error"] };
                ("tool_result", json!({ "tool": data["tool"], "result": result }))
            }
            EventType::Status => {
                self.status = data;
                if !progress.is_null() {
                    self.progress = progress;
                }
                ("status", json!({ "status": self.status, "progress": self.progress }))
            }
            EventType::Todo => {
                // A sub-agent's list has none.
                if progress.is_null() || progress == self.progress {
                    return String::new();
                }
                self.progress = progress;
                let status = if self.status.is_null() { json!(Status::Running.as_str()) } else { self.status.clone() };
                ("status", json!({ "status": status, "progress": self.progress }))
            }
            EventType::Error => {
                ("error", json!({ "error": data["code"], "message": data["message"], "fatal": data["fatal"] }))
            }
            _ => return String::new(),
        };
        frame(Some(id), name, data, event.timestamp)
    }
}

/// The frames of the end, from the log's last event: `error` for a cancelled run (a failed one has had its own),
/// `complete` without an id for one that completed, `done` with the id.
pub(crate) fn closing(id: SessionEventId, event: &Event) -> String {
    let data = serde_json::from_str::<Envelope>(&event.json).map(|envelope| envelope.data).unwrap_or_default();
    let mut text = String::new();
    if data["status"] == Status::Cancelled.as_str() {
        let error = json!({ "error": data["reason"], "message": "The run was cancelled.", "fatal": true });
        text.push_str(&frame(None, "error", error, event.timestamp));
    }
    if data["status"] == Status::Completed.as_str() {
        let complete = json!({ "final_message": data["final_message"], "files_modified": data["files_modified"] });
        text.push_str(&frame(None, "complete", complete, event.timestamp));
    }
    text.push_str(&done(id, &data["reason"], event.timestamp));
    text
}

/// Nothing follows on this connection.
pub(crate) fn done(id: SessionEventId, reason: &Value, at: DateTime<Utc>) -> String {
    frame(Some(id), "done", json!({ "reason": reason }), at)
}

/// A sign of life.
pub(crate) fn heartbeat(at: DateTime<Utc>) -> String {
    frame(None, "heartbeat", Value::Object(Map::new()), at)
}

fn frame(id: Option<SessionEventId>, name: &str, mut data: Value, at: DateTime<Utc>) -> String {
    data["timestamp"] = json!(rfc3339(at));
    let mut text = String::new();
    // Writing to a string cannot fail. JSON has no line break in it.
    if let Some(id) = id {
        let _ = writeln!(text, "id: {id}");
    }
    let _ = write!(text, "event: {name}\ndata: {data}\n\n");
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::event::NewEvent;
    use crate::model::{Reason, Usage};
    use std::num::NonZeroU32;

    fn id(seq: u64) -> SessionEventId {
        SessionEventId { ordinal: NonZeroU32::MIN, seq }
    }

    fn at() -> DateTime<Utc> {
        DateTime::from_timestamp_millis(1_795_221_961_195).unwrap()
    }

    /// The frame of one event: its id line, its name, and its data, which has to carry the time.
    fn shown(frames: &mut Frames, event: NewEvent) -> Option<(String, Value)> {
        let text = frames.of(id(7), &event.seal(7, at()));
        if text.is_empty() {
            return None;
        }
        parsed(&text).pop().map(|(id, name, data)| {
            assert_eq!(id.as_deref(), Some("1.7"));
            (name, data)
        })
    }

    fn parsed(text: &str) -> Vec<(Option<String>, String, Value)> {
        text.split_terminator("\n\n")
            .map(|frame| {
                let field = |name: &str| frame.lines().find_map(|l| l.strip_prefix(name)).map(str::to_owned);
                let mut data: Value = serde_json::from_str(&field("data: ").unwrap()).unwrap();
                assert_eq!(data["timestamp"], "2026-11-21T00:46:01.195Z", "{frame}");
                data.as_object_mut().unwrap().remove("timestamp");
                (field("id: "), field("event: ").unwrap(), data)
            })
            .collect()
    }

    #[test]
    fn each_event_has_the_frame_of_the_contract() {
        let new = |kind, data| NewEvent::new(kind, data);
        let todo = || NewEvent::new(EventType::Todo, json!({ "items": [] }));
        let cases = [
            (new(EventType::Stdout, json!("a\n")), "output", json!({ "type": "stdout", "text": "a\n", "line": "a\n" })),
            (new(EventType::Stderr, json!("b")), "output", json!({ "type": "stderr", "text": "b", "line": "b" })),
            (
                new(EventType::Message, json!({ "part_id": "p", "text": "Hi", "final": true })),
                "output",
                json!({ "type": "stdout", "text": "Hi", "line": "Hi" }),
            ),
            (
                new(EventType::ToolCall, json!({ "call_id": "c", "tool": "bash", "args": { "command": "ls" } })),
                "tool_call",
                json!({ "tool": "bash", "args": { "command": "ls" } }),
            ),
            (
                new(EventType::ToolResult, json!({ "call_id": "c", "tool": "bash", "result": "x", "duration_ms": 1 })),
                "tool_result",
                json!({ "tool": "bash", "result": "x" }),
            ),
            (
                new(EventType::ToolResult, json!({ "call_id": "c", "tool": "bash", "result": null, "error": "no" })),
                "tool_result",
                json!({ "tool": "bash", "result": "no" }),
            ),
            (NewEvent::status(Status::Running, None, None), "status", json!({ "status": "running", "progress": null })),
            (todo().with("progress", 50), "status", json!({ "status": "running", "progress": 50 })),
            (
                NewEvent::error("model_auth", "no", true, None),
                "error",
                json!({ "error": "model_auth", "message": "no", "fatal": true }),
            ),
            (
                NewEvent::status(Status::Failed, Some(Reason::ModelError), None),
                "status",
                json!({ "status": "failed", "progress": 50 }),
            ),
        ];
        let mut frames = Frames::default();
        for (event, name, data) in cases {
            assert_eq!(shown(&mut frames, event.clone()), Some((name.to_owned(), data)), "{event:?}");
        }
        for event in [
            new(EventType::Message, json!({ "part_id": "p", "delta": "H" })),
            new(EventType::Reasoning, json!({ "part_id": "p", "text": "Hm", "final": true })),
            todo().with("progress", 50),
            todo(),
            NewEvent::log(crate::model::Severity::Info, "x", "y"),
        ] {
            assert_eq!(shown(&mut frames, event), None);
        }
    }

    #[test]
    fn the_end_is_told_by_how_it_ended() {
        let end = |status, reason| {
            let event = NewEvent::complete(status, reason, Some("All done."), &["a".to_owned()], &Usage::default());
            parsed(&closing(id(9), &event.seal(9, at())))
        };
        let name = |frames: &[(Option<String>, String, Value)]| -> Vec<String> {
            frames.iter().map(|(id, name, _)| format!("{name} {}", id.as_deref().unwrap_or("-"))).collect()
        };
        let completed = end(Status::Completed, Reason::Finished);
        assert_eq!(name(&completed), ["complete -", "done 1.9"]);
        assert_eq!(completed[0].2, json!({ "final_message": "All done.", "files_modified": ["a"] }));
        assert_eq!(completed[1].2, json!({ "reason": "finished" }));
        let cancelled = end(Status::Cancelled, Reason::Cancelled);
        assert_eq!(name(&cancelled), ["error -", "done 1.9"]);
        assert_eq!(cancelled[0].2["fatal"], true);
        // Its own fatal error stands before, with an id.
        assert_eq!(name(&end(Status::Failed, Reason::Timeout)), ["done 1.9"]);
        assert_eq!(parsed(&heartbeat(at())), [(None, "heartbeat".to_owned(), json!({}))]);
    }
}
