//! OpenCode's own JSON, as far as we read it (1.18.33). Lenient: unknown members and event types are no error,
//! since the next OpenCode has more of both.

use serde::Deserialize;
use serde_json::{Map, Value};

/// An event of `GET /event`.
#[derive(Clone, Debug, Deserialize)]
pub struct RawEvent {
    #[serde(rename = "type")]
    pub kind: String,
    #[serde(default)]
    pub properties: Value,
}

impl RawEvent {
    /// The OpenCode session that the event is about, where it names one.
    pub fn session_id(&self) -> Option<&str> {
        self.properties
            .get("sessionID")
            .and_then(Value::as_str)
            .or_else(|| self.properties.get("info")?.get("sessionID")?.as_str())
            .or_else(|| self.properties.get("part")?.get("sessionID")?.as_str())
    }
}

/// A message's head.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct MessageInfo {
    pub id: String,
    #[serde(default)]
    pub role: String,
    #[serde(default)]
    pub finish: Option<String>,
    #[serde(default)]
    pub error: Option<NamedError>,
    #[serde(default)]
    pub time: MessageTime,
    #[serde(default)]
    pub cost: f64,
    #[serde(default)]
    pub tokens: Tokens,
    /// `true` for an assistant's message that sums up the conversation. A prompt's is an object.
    #[serde(default)]
    pub summary: Value,
}

/// Milliseconds since 1970.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
pub struct MessageTime {
    #[serde(default)]
    pub completed: Option<f64>,
}

/// Tokens of one message or step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize)]
pub struct Tokens {
    #[serde(default)]
    pub input: f64,
    #[serde(default)]
    pub output: f64,
    #[serde(default)]
    pub reasoning: f64,
    #[serde(default)]
    pub cache: CacheTokens,
}

/// Tokens that the provider read from, or wrote to, its cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize)]
pub struct CacheTokens {
    #[serde(default)]
    pub read: f64,
    #[serde(default)]
    pub write: f64,
}

/// An error by its name, such as `APIError` or `ProviderAuthError`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct NamedError {
    #[serde(default)]
    pub name: String,
    #[serde(default)]
    pub data: Value,
}

impl NamedError {
    /// The error's own sentence, at most 500 characters of it. A stack trace that follows it is nobody's business.
    pub fn message(&self) -> String {
        sentence(self.data.get("message").and_then(Value::as_str).unwrap_or(&self.name))
    }
}

/// At most 500 characters of what OpenCode says about an error. An error in the middle of an answer is told as its
/// JSON: then the message in it.
pub fn sentence(text: &str) -> String {
    let object: Option<Map<String, Value>> = serde_json::from_str(text).ok();
    let text = object.as_ref().and_then(|object| object.get("message")?.as_str()).unwrap_or(text);
    let text = text.split("\n    at ").next().unwrap_or_default();
    text.chars().take(500).collect()
}

/// One part of a message.
#[derive(Clone, Debug, Deserialize)]
pub struct Part {
    pub id: String,
    #[serde(rename = "messageID", default)]
    pub message_id: String,
    #[serde(rename = "type")]
    pub kind: String,
    #[serde(default)]
    pub text: String,
    #[serde(default)]
    pub time: PartTime,
    #[serde(default)]
    pub tool: String,
    #[serde(rename = "callID", default)]
    pub call_id: String,
    #[serde(default)]
    pub state: ToolState,
    /// Of a step: its snapshot of the work tree, where it has one.
    #[serde(default)]
    pub snapshot: Option<String>,
}

/// When a part began and ended, in milliseconds since 1970.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
pub struct PartTime {
    #[serde(default)]
    pub start: Option<f64>,
    #[serde(default)]
    pub end: Option<f64>,
}

/// Where a tool call stands.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct ToolState {
    #[serde(default)]
    pub status: String,
    #[serde(default)]
    pub input: Value,
    #[serde(default)]
    pub output: Value,
    #[serde(default)]
    pub error: Option<String>,
    #[serde(default)]
    pub metadata: Map<String, Value>,
    #[serde(default)]
    pub time: PartTime,
}

impl ToolState {
    /// Whether the tool is done, for good or ill.
    pub fn has_ended(&self) -> bool {
        matches!(self.status.as_str(), "completed" | "error")
    }
}

/// `GET /session/:id/message`.
#[derive(Clone, Debug, Deserialize)]
pub struct Message {
    pub info: MessageInfo,
    #[serde(default)]
    pub parts: Vec<Part>,
}
