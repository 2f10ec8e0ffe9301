//! What a scripted model plays: steps, and how a script travels inside a prompt.

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

const OPEN: &str = "<script>";
const CLOSE: &str = "</script>";

/// A conversation's answers, one [`Step`] for each call of the model. The last step repeats.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Script(pub Vec<Step>);

/// A call of a tool of OpenCode's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ToolUse {
    /// OpenCode's name of the tool: `write`, `bash`, `edit`, `read`, `todowrite` …
    pub name: String,
    /// The tool's arguments, as OpenCode names them. A string goes out as it is, whether or not it is JSON.
    pub args: Value,
}

/// Tokens that an answer claims to have used.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tokens {
    pub prompt: u64,
    pub completion: u64,
    /// In US dollars, where the provider is one that says so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cost: Option<f64>,
}

/// What the body of a 200 is instead of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Garbage {
    /// A web page: no event stream at all.
    Text,
    /// An event stream whose data is not JSON.
    Sse,
}

/// Where an answer falls silent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Silence {
    /// The request is taken and never answered.
    Headers,
    /// The headers come, the body never begins.
    Body,
    /// The first piece of the body comes, then nothing more.
    Middle,
}

/// Where an answer breaks off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cut {
    /// After the headers, before the first piece.
    Start,
    /// After some text.
    Text,
    /// In the middle of the first tool call's arguments.
    Tool,
    /// After the last tool call, which is whole, and before the finish reason.
    Call,
}

/// How an answer breaks off.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Break {
    /// The connection is aborted.
    #[default]
    Abort,
    /// The body ends as if that were all.
    End,
    /// Nothing more comes.
    Silence,
    /// An event that is no JSON, then the end.
    Garbage,
    /// The provider's event for an error, with this in it, then the end: `{"type":"rate_limit_error","message":"…"}`.
    Error(Value),
}

/// One answer. Every member may be absent; those that make sense together can be combined.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Step {
    /// Text of the answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// Reasoning before the text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reasoning: Option<String>,
    /// Tool calls after the text.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tools: Vec<ToolUse>,
    /// Answers with the text of the last message of the conversation (a tool's result, or the prompt without its
    /// script), before `text`.
    #[serde(skip_serializing_if = "is_false")]
    pub echo: bool,
    /// Characters in one piece of text or of a tool's arguments. Without it text goes word by word, arguments whole.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chunk_chars: Option<usize>,
    /// Milliseconds between pieces.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub delay_ms: Option<u64>,
    /// A gate to wait at before anything is answered, at most 60 s.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gate: Option<String>,
    /// A gate to wait at after the first piece, at most 60 s.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hold: Option<String>,
    /// The finish reason in OpenAI's words; without it `stop` or `tool_calls`. `null`: the stream ends with neither
    /// a finish reason nor `[DONE]`.
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "present")]
    pub finish: Option<Option<String>>,
    /// The same as `"finish":null`.
    #[serde(skip_serializing_if = "is_false")]
    pub no_finish: bool,
    /// Tokens in the usage chunk; without it 100 and 20.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<Tokens>,

    /// Fault: answer with this status.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub status: Option<u16>,
    /// Headers that go with `status`.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub headers: BTreeMap<String, String>,
    /// The body that goes with `status`: a string as it is, anything else as JSON.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub body: Option<Value>,
    /// Fault: 200 with a body that is no answer. `true` means `"text"`, a web page; `"sse"` broken events.
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "garbage")]
    pub garbage: Option<Garbage>,
    /// Fault: fall silent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub silence: Option<Silence>,
    /// Fault: break off there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cut: Option<Cut>,
    /// In which way; without it the connection is aborted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub by: Option<Break>,
    /// Fault: close the connection without an answer.
    #[serde(skip_serializing_if = "is_false")]
    pub refuse: bool,
    /// How many calls of this step meet its faults (`status`, `garbage`, `silence`, `cut`, `refuse`, `finish:null`
    /// and `no_finish`); later ones get the rest of the step. Without it all do.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub times: Option<u32>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's skip_serializing_if calls it with a reference")]
fn is_false(value: &bool) -> bool {
    !value
}

/// Tells `null` from absence.
fn present<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Option<String>>, D::Error> {
    Option::<String>::deserialize(deserializer).map(Some)
}

fn garbage<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Garbage>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Form {
        Flag(bool),
        Kind(Garbage),
    }
    Ok(match Option::<Form>::deserialize(deserializer)? {
        None | Some(Form::Flag(false)) => None,
        Some(Form::Flag(true)) => Some(Garbage::Text),
        Some(Form::Kind(kind)) => Some(kind),
    })
}

impl Step {
    /// The step without its faults.
    #[must_use]
    pub fn healthy(&self) -> Self {
        Self {
            status: None,
            headers: BTreeMap::new(),
            body: None,
            garbage: None,
            silence: None,
            cut: None,
            by: None,
            refuse: false,
            no_finish: false,
            finish: self.finish.clone().filter(Option::is_some),
            ..self.clone()
        }
    }
}

impl Script {
    /// A script without steps.
    pub fn new() -> Self {
        Self::default()
    }

    /// One more step.
    #[must_use]
    pub fn step(mut self, step: Step) -> Self {
        self.0.push(step);
        self
    }

    /// A step that answers with text.
    #[must_use]
    pub fn text(self, text: &str) -> Self {
        self.step(Step { text: Some(text.to_owned()), ..Step::default() })
    }

    /// A step that calls one tool.
    #[must_use]
    pub fn tool(self, name: &str, args: Value) -> Self {
        self.step(Step { tools: vec![ToolUse { name: name.to_owned(), args }], ..Step::default() })
    }

    /// A step that writes a file.
    #[must_use]
    pub fn write(self, path: &str, content: &str) -> Self {
        self.tool("write", json!({ "filePath": path, "content": content }))
    }

    /// A step that runs a shell command.
    #[must_use]
    pub fn bash(self, command: &str) -> Self {
        self.tool("bash", json!({ "command": command, "description": "A scripted command" }))
    }

    /// A step from its JSON members, for faults: `.fault(json!({"status": 429}))`.
    ///
    /// # Errors
    /// What is wrong with the members.
    pub fn json(self, step: Value) -> Result<Self, serde_json::Error> {
        Ok(self.step(serde_json::from_value(step)?))
    }

    /// A prompt that carries the script.
    pub fn to_prompt(&self, text: &str) -> String {
        // Steps are strings, numbers and maps with string keys, which always serialize. `<` is escaped so that no
        // content can end the script early.
        let json = serde_json::to_string(self).unwrap_or_default().replace('<', "\\u003c");
        format!("{text}\n{OPEN}{json}{CLOSE}")
    }

    /// The script that a prompt carries; `None` where it carries none. The last one counts where it carries several:
    /// prompts that were not answered may come as one with the next.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn in_prompt(prompt: &str) -> Result<Option<Self>, serde_json::Error> {
        let Some((_, rest)) = prompt.rsplit_once(OPEN) else { return Ok(None) };
        let Some((script, _)) = rest.split_once(CLOSE) else { return Ok(None) };
        serde_json::from_str(script).map(Some)
    }

    /// The step for the call that follows `answers` answers.
    pub fn at(&self, answers: usize) -> Option<&Step> {
        self.0.get(answers).or(self.0.last())
    }
}

/// The prompt without the script in it.
pub(super) fn without_script(prompt: &str) -> String {
    match prompt.split_once(OPEN).map(|(before, rest)| (before, rest.split_once(CLOSE))) {
        Some((before, Some((_, after)))) => format!("{}{after}", before.trim_end_matches('\n')),
        _ => prompt.to_owned(),
    }
}

/// A conversation as far as a script needs it.
pub(super) struct Conversation {
    pub(super) model: String,
    pub(super) stream: bool,
    /// The last prompt of the user's that has a script: one without goes on with that. Without any, the last one.
    pub(super) prompt: String,
    /// How many answers followed it.
    pub(super) answers: usize,
    /// Text of the last message.
    pub(super) last: String,
}

impl Conversation {
    /// Reads the body of a chat completion or of a message request; both hold `messages` with a role and content.
    pub(super) fn read(body: &Map<String, Value>) -> Self {
        let empty = Vec::new();
        let messages = body.get("messages").and_then(Value::as_array).unwrap_or(&empty);
        // Anthropic sends tool results as a user's message; those are no prompt.
        let is_prompt = |m: &Value| m["role"] == "user" && !text_of(&m["content"], false).is_empty();
        let has_script = |m: &Value| is_prompt(m) && text_of(&m["content"], false).contains(OPEN);
        let at = messages.iter().rposition(has_script).or_else(|| messages.iter().rposition(is_prompt));
        Self {
            model: body.get("model").and_then(Value::as_str).unwrap_or_default().to_owned(),
            stream: body.get("stream").and_then(Value::as_bool).unwrap_or(false),
            prompt: at.map(|at| text_of(&messages[at]["content"], false)).unwrap_or_default(),
            answers: messages[at.unwrap_or(0)..].iter().filter(|m| m["role"] == "assistant").count(),
            last: messages.last().map(|m| text_of(&m["content"], true)).unwrap_or_default(),
        }
    }
}

/// The text in a message's content: a string, or a list of parts.
fn text_of(content: &Value, results: bool) -> String {
    match content {
        Value::String(text) => text.clone(),
        Value::Array(parts) => parts
            .iter()
            .map(|part| match part["type"].as_str() {
                Some("tool_result") if results => text_of(&part["content"], true),
                Some("text") => part["text"].as_str().unwrap_or_default().to_owned(),
                _ => String::new(),
            })
            .collect(),
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_script_survives_its_way_through_a_prompt() {
        let script = Script::new()
            .write("a.txt", "a </script> inside")
            .bash("echo hi")
            .json(json!({"finish": null, "times": 2}))
            .unwrap()
            .text("done");
        let prompt = script.to_prompt("Please write a file.");
        assert_eq!(Script::in_prompt(&prompt).unwrap(), Some(script));
        assert_eq!(without_script(&prompt), "Please write a file.");
        assert_eq!(Script::in_prompt("nothing here").unwrap(), None);
        let two = format!("{prompt}{}", Script::new().text("next").to_prompt("Go on."));
        assert_eq!(Script::in_prompt(&two).unwrap(), Some(Script::new().text("next")));
    }

    #[test]
    fn an_unknown_member_is_refused() {
        assert!(Script::in_prompt(r#"<script>[{"txet":"typo"}]</script>"#).is_err());
    }

    #[test]
    fn the_last_step_repeats_and_no_step_is_none() {
        let script = Script::new().text("a").text("b");
        assert_eq!(script.at(7), script.at(1));
        assert_eq!(Script::new().at(0), None);
    }

    #[test]
    fn the_step_is_counted_from_the_last_prompt_and_a_tool_result_is_none() {
        let body = json!({"model": "m", "stream": true, "messages": [
            {"role": "user", "content": "first"}, {"role": "assistant", "content": "x"},
            {"role": "user", "content": [{"type": "text", "text": "second"}]},
            {"role": "assistant", "content": [{"type": "tool_use"}]},
            {"role": "user", "content": [{"type": "tool_result", "content": "42"}]},
        ]});
        let conversation = Conversation::read(body.as_object().unwrap());
        assert_eq!((conversation.prompt.as_str(), conversation.answers), ("second", 1));
        assert_eq!(conversation.last, "42");
    }

    #[test]
    fn a_prompt_without_a_script_goes_on_with_the_one_before() {
        let prompt = Script::new().text("one").text("two").to_prompt("x");
        let body = json!({"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": "one"},
            {"role": "user", "content": "go on"}]});
        let conversation = Conversation::read(body.as_object().unwrap());
        assert_eq!((conversation.prompt, conversation.answers), (prompt, 1));
    }

    #[test]
    fn healthy_keeps_everything_but_the_faults() {
        let step: Step = serde_json::from_value(json!({"text": "t", "status": 500, "cut": "text", "by": {"error": {}},
            "finish": null, "garbage": true, "silence": "body", "refuse": true, "times": 1}))
        .unwrap();
        let healthy = step.healthy();
        assert_eq!(healthy, Step { text: Some("t".into()), times: Some(1), ..Step::default() });
    }
}
