//! Events: what a log holds and what every reader gets, in one envelope everywhere.
//!
//! A [`NewEvent`] has no number yet; [`NewEvent::seal`] gives it one and writes the envelope once. From then on
//! only the written bytes travel, so that REST, SSE, WebSocket and the database cannot differ.

use super::{Usage, rfc3339};
use crate::model::execution::{Reason, Status};
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::sync::Arc;

/// How grave an event is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    Debug,
    Info,
    Warn,
    Error,
}

impl Severity {
    /// Every severity, the least grave first.
    pub const ALL: &'static [Severity] = &[Self::Debug, Self::Info, Self::Warn, Self::Error];

    /// The word in the envelope.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Debug => "debug",
            Self::Info => "info",
            Self::Warn => "warn",
            Self::Error => "error",
        }
    }

    /// The severity for a word; `None` for an unknown one.
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|s| s.as_str() == word)
    }
}

macro_rules! event_types {
    ($($(#[$doc:meta])* $name:ident = $word:literal),+ $(,)?) => {
        /// The types of events; each has one schema for its `data` (CONTRACT "Events").
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, utoipa::ToSchema)]
        #[serde(rename_all = "snake_case")]
        pub enum EventType {
            $($(#[$doc])* $name),+
        }

        impl EventType {
            /// Every type, in the contract's order.
            pub const ALL: &'static [EventType] = &[$(EventType::$name),+];

            /// The word in the envelope.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$name => $word),+ }
            }
        }
    };
}

event_types! {
    /// Text that a shell command wrote to its standard output.
    Stdout = "stdout",
    /// Text that a shell command wrote to its standard error.
    Stderr = "stderr",
    /// The execution's status changed.
    Status = "status",
    /// The agent's text: deltas, then the whole part.
    Message = "message",
    /// The agent's reasoning, in the same form.
    Reasoning = "reasoning",
    /// A tool starts, with its arguments.
    ToolCall = "tool_call",
    /// A tool ended.
    ToolResult = "tool_result",
    /// A file of the workspace was changed.
    File = "file",
    /// Patches of the files that a run changed.
    Diff = "diff",
    /// The agent's to-do list.
    Todo = "todo",
    /// A permission is asked for, or was answered.
    Permission = "permission",
    /// The agent asks something, or was answered.
    Question = "question",
    /// What the run has used so far.
    Usage = "usage",
    /// The sidecar's own remarks.
    Log = "log",
    /// An error, fatal or not.
    Error = "error",
    /// The end of the execution; always its last event.
    Complete = "complete",
    /// An event of OpenCode that has no type of ours, word for word.
    Opencode = "opencode",
}

impl EventType {
    /// The type for a word of the envelope; `None` for an unknown one.
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|t| t.as_str() == word)
    }
}

/// An event that has no place in a log yet.
#[derive(Clone, Debug, PartialEq)]
pub struct NewEvent {
    pub kind: EventType,
    pub severity: Severity,
    pub data: Value,
    /// Members that stand beside `data` in the envelope, such as `call_id` or `reason`.
    pub beside: Map<String, Value>,
}

impl NewEvent {
    /// An event of severity `info` with nothing beside its data.
    pub fn new(kind: EventType, data: Value) -> Self {
        Self { kind, severity: Severity::Info, data, beside: Map::new() }
    }

    /// The same event with another severity.
    #[must_use]
    pub fn severity(mut self, severity: Severity) -> Self {
        self.severity = severity;
        self
    }

    /// The same event with one more member beside its data.
    #[must_use]
    pub fn with(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.beside.insert(name.to_owned(), value.into());
        self
    }

    /// A change of status; `progress` 0–100 where the agent keeps a to-do list.
    pub fn status(status: Status, reason: Option<Reason>, progress: Option<u8>) -> Self {
        let severity = if status == Status::Failed { Severity::Error } else { Severity::Info };
        Self::new(EventType::Status, json!(status.as_str()))
            .severity(severity)
            .with("reason", reason.map_or(Value::Null, |r| json!(r.as_str())))
            .with("progress", json!(progress))
    }

    /// A remark of the sidecar: a stable code for programs, a sentence for people.
    pub fn log(severity: Severity, code: &str, message: &str) -> Self {
        Self::new(EventType::Log, json!({ "code": code, "message": message })).severity(severity)
    }

    /// An error. `fatal` says whether it ends the run; `retry_after` is in seconds, where a provider named one.
    pub fn error(code: &str, message: &str, fatal: bool, retry_after: Option<u64>) -> Self {
        let mut data = json!({ "code": code, "message": message, "fatal": fatal });
        if let Some(seconds) = retry_after {
            data["retry_after"] = json!(seconds);
        }
        Self::new(EventType::Error, data).severity(Severity::Error)
    }

    /// The last event of an execution.
    pub fn complete(
        status: Status,
        reason: Reason,
        final_message: Option<&str>,
        files: &[String],
        usage: &Usage,
    ) -> Self {
        let severity = if status == Status::Failed { Severity::Error } else { Severity::Info };
        Self::new(
            EventType::Complete,
            json!({
                "status": status.as_str(),
                "reason": reason.as_str(),
                "final_message": final_message,
                "files_modified": files,
                "usage": usage,
            }),
        )
        .severity(severity)
    }

    /// Gives the event its number and time, and writes its envelope.
    pub fn seal(self, seq: u64, timestamp: DateTime<Utc>) -> Event {
        #[derive(Serialize)]
        struct Envelope<'a> {
            seq: u64,
            r#type: &'static str,
            data: &'a Value,
            severity: &'static str,
            timestamp: String,
            #[serde(flatten)]
            beside: &'a Map<String, Value>,
        }
        let envelope = Envelope {
            seq,
            r#type: self.kind.as_str(),
            data: &self.data,
            severity: self.severity.as_str(),
            timestamp: rfc3339(timestamp),
            beside: &self.beside,
        };
        // Strings, numbers and maps with string keys always serialize.
        let json = serde_json::to_string(&envelope).unwrap_or_default();
        Event { seq, kind: self.kind, severity: self.severity, timestamp, json: json.into() }
    }
}

/// An event with its place in a log. Cheap to clone.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// Place in the execution's log: 1, 2, 3 … without a gap.
    pub seq: u64,
    pub kind: EventType,
    pub severity: Severity,
    pub timestamp: DateTime<Utc>,
    /// The whole envelope, as every reader gets it.
    pub json: Arc<str>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_envelope_has_the_contracts_members_in_its_order() {
        let event = NewEvent::new(EventType::Stdout, json!("hi\u{1b}[0m\0"))
            .with("call_id", "c1")
            .seal(42, DateTime::from_timestamp_millis(1_795_221_961_195).unwrap());
        assert_eq!(
            &*event.json,
            r#"{"seq":42,"type":"stdout","data":"hi\u001b[0m\u0000","severity":"info","timestamp":"2026-11-21T00:46:01.195Z","call_id":"c1"}"#
        );
    }

    #[test]
    fn every_word_is_read_back() {
        for kind in EventType::ALL {
            assert_eq!(EventType::parse(kind.as_str()), Some(*kind));
            assert_eq!(serde_json::to_value(kind).unwrap(), json!(kind.as_str()));
        }
        assert_eq!(EventType::parse("heartbeat"), None);
        assert_eq!(Severity::parse("warn"), Some(Severity::Warn));
    }
}
