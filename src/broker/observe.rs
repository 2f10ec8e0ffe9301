//! Reads along with an answer that passes by: how it ended, what it used, whether it was an answer at all.
//!
//! It changes nothing and keeps little: at most one event, and none of the text. It says where an event ends, so that
//! one that must not be passed on is known before any of it was.

use super::error::{ModelError, Said};
use secrecy::SecretString;
use serde_json::Value;

/// Longest event, or whole answer, that is read. A longer one is passed on unread.
const MAX_EVENT: usize = 4 * 1024 * 1024;

/// The provider's interfaces, told by the path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Api {
    Chat,
    Messages,
    Responses,
}

impl Api {
    /// Whether OpenCode's client for it knows the finish reason.
    fn knows(self, finish: &str) -> bool {
        match self {
            Self::Chat => matches!(finish, "stop" | "length" | "content_filter" | "tool_calls" | "function_call"),
            Self::Messages => matches!(
                finish,
                "end_turn"
                    | "stop_sequence"
                    | "pause_turn"
                    | "tool_use"
                    | "max_tokens"
                    | "refusal"
                    | "model_context_window_exceeded"
            ),
            // "incomplete" comes with a reason of its own.
            Self::Responses => matches!(finish, "completed" | "incomplete"),
        }
    }
}

/// The form of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// Server-sent events.
    Stream,
    /// One JSON document.
    Whole,
}

/// What was seen of one answer.
#[derive(Debug)]
pub(super) struct Observer {
    api: Api,
    form: Form,
    line: Vec<u8>,
    /// Data of the event that is being read (or of the whole answer).
    event: Vec<u8>,
    after_cr: bool,
    /// A field of the event that is being read has come.
    pending: bool,
    /// The line or event is too long and is passed over.
    skip_line: bool,
    skip_event: bool,
    skipped: bool,
    understood: u64,
    broken: u64,
    finish: Option<String>,
    done: bool,
    /// It asks for a tool.
    tools: bool,
    /// An event was read after which the answer is worth nothing. Nothing further is read.
    failed: bool,
    error: Option<Value>,
    pub(super) input_tokens: u64,
    pub(super) output_tokens: u64,
    /// In US dollars, where the provider says it beside the tokens.
    pub(super) cost: f64,
}

impl Observer {
    pub(super) fn new(api: Api, form: Form) -> Self {
        Self {
            api,
            form,
            line: Vec::new(),
            event: Vec::new(),
            after_cr: false,
            pending: false,
            skip_line: false,
            skip_event: false,
            skipped: false,
            understood: 0,
            broken: 0,
            finish: None,
            done: false,
            tools: false,
            failed: false,
            error: None,
            input_tokens: 0,
            output_tokens: 0,
            cost: 0.0,
        }
    }

    /// Reads the next bytes, split anywhere. Gives how many of them go to the end of the last whole event; all of them
    /// where the answer is no stream. Where the answer [has failed](Self::has_failed), it is the events before the one
    /// that says so.
    pub(super) fn feed(&mut self, bytes: &[u8]) -> usize {
        if self.form == Form::Whole {
            if self.event.len() + bytes.len() > MAX_EVENT {
                self.skip_event = true;
                self.skipped = true;
                self.event = Vec::new();
            }
            if !self.skip_event {
                self.event.extend_from_slice(bytes);
            }
            return bytes.len();
        }
        let (mut at, mut whole) = (0, 0);
        while at < bytes.len() && !self.failed && !self.done {
            if std::mem::take(&mut self.after_cr) && bytes[at] == b'\n' {
                at += 1;
                if !self.pending {
                    whole = at;
                }
                continue;
            }
            let Some(end) = bytes[at..].iter().position(|b| matches!(b, b'\n' | b'\r')) else {
                self.append(&bytes[at..]);
                break;
            };
            self.append(&bytes[at..at + end]);
            at += end;
            self.after_cr = bytes[at] == b'\r';
            at += 1;
            self.end_line();
            if !self.pending && !self.failed {
                whole = at;
            }
        }
        // What follows the end belongs to nothing.
        if self.done && !self.failed { bytes.len() } else { whole }
    }

    /// The body has ended: what is left counts as an event.
    pub(super) fn end(&mut self) {
        if self.failed {
            return;
        }
        if self.form == Form::Stream && (!self.line.is_empty() || self.skip_line) {
            self.end_line();
        }
        self.end_event();
    }

    /// Whether an event said that the answer has failed, or cannot be read.
    pub(super) fn has_failed(&self) -> bool {
        self.failed
    }

    /// Whether it asks for a tool: then OpenCode goes on by itself, even where the finish reason is missing.
    pub(super) fn asks_for_tools(&self) -> bool {
        self.tools
    }

    /// What the provider said, where an event was an error.
    pub(super) fn said(&self, key: &SecretString) -> Said {
        self.error.as_ref().map(|error| Said::from_json(error, key)).unwrap_or_default()
    }

    /// Whether the answer says that nothing follows.
    pub(super) fn is_done(&self) -> bool {
        self.done
    }

    /// The finish reason in the provider's word, once it has come.
    pub(super) fn finish(&self) -> Option<&str> {
        self.finish.as_deref()
    }

    /// The judgement over an answer that has ended by itself: its finish reason (empty where an answer too long to
    /// be read ended as it should), or what was wrong.
    pub(super) fn verdict(&self, key: &SecretString) -> Result<String, ModelError> {
        if self.error.is_some() {
            return Err(ModelError::in_stream(&self.said(key)));
        }
        // OpenCode reads no further than that, so whatever follows is no help.
        if self.broken > 0 && self.understood > 0 {
            return Err(ModelError::bad_response("an event in it is no JSON"));
        }
        if let Some(finish) = &self.finish {
            // OpenCode takes an unknown reason for none, and calls again without end.
            return if self.api.knows(finish) { Ok(finish.clone()) } else { Err(ModelError::unknown_finish(finish)) };
        }
        if self.skipped && (self.done || self.form == Form::Whole) {
            return Ok(String::new());
        }
        if self.understood == 0 && !self.skipped {
            let what = if self.form == Form::Stream { "no event in it is one of a model" } else { "it is no JSON" };
            return Err(ModelError::bad_response(what));
        }
        Err(ModelError::unfinished())
    }

    /// Whether it ends well, as far as it was read.
    fn is_finished(&self) -> bool {
        self.finish.as_deref().map_or(self.skipped, |finish| self.api.knows(finish))
    }

    fn append(&mut self, bytes: &[u8]) {
        if self.skip_line || self.line.len() + bytes.len() > MAX_EVENT {
            self.skip_line = true;
            self.line = Vec::new();
        } else {
            self.line.extend_from_slice(bytes);
        }
    }

    fn end_line(&mut self) {
        let line = std::mem::take(&mut self.line);
        let skipped = std::mem::take(&mut self.skip_line);
        self.pending = skipped || !line.is_empty() && (self.pending || !line.starts_with(b":"));
        if skipped {
            self.skip_event = true;
        } else if line.is_empty() {
            self.end_event();
        } else if let Some(data) = line.strip_prefix(b"data:") {
            let data = data.strip_prefix(b" ").unwrap_or(data);
            if self.event.len() + data.len() >= MAX_EVENT {
                self.skip_event = true;
            } else if !self.skip_event {
                if !self.event.is_empty() {
                    self.event.push(b'\n');
                }
                self.event.extend_from_slice(data);
            }
        }
        // The buffer's room is kept for the next line.
        self.line = line;
        self.line.clear();
    }

    fn end_event(&mut self) {
        let event = std::mem::take(&mut self.event);
        if std::mem::take(&mut self.skip_event) {
            self.skipped = true;
            return;
        }
        if event.is_empty() {
            return;
        }
        if event.trim_ascii() == b"[DONE]" {
            self.done = true;
        } else {
            match serde_json::from_slice::<Value>(&event) {
                Ok(value) => self.understand(&value),
                Err(_) => self.broken += 1,
            }
        }
        if self.form == Form::Stream {
            self.failed = self.error.is_some() || self.broken > 0 || self.done && !self.tools && !self.is_finished();
        }
        self.event = event;
        self.event.clear();
    }

    fn understand(&mut self, value: &Value) {
        let kind = value["type"].as_str().unwrap_or_default();
        if value["error"].is_object() || value["error"].is_string() || kind == "error" {
            self.understood += 1;
            self.error.get_or_insert_with(|| value.clone());
            return;
        }
        match self.api {
            Api::Chat => self.understand_chat(value),
            Api::Messages => self.understand_messages(kind, value),
            Api::Responses => self.understand_responses(kind, value),
        }
    }

    fn understand_chat(&mut self, value: &Value) {
        if let Some(choices) = value["choices"].as_array() {
            self.understood += 1;
            for choice in choices {
                self.tools |= choice["delta"]["tool_calls"].as_array().is_some_and(|calls| !calls.is_empty());
                self.finished(&choice["finish_reason"]);
            }
        }
        self.used(&value["usage"]["prompt_tokens"], &value["usage"]["completion_tokens"]);
        let cost = value["usage"]["cost"].as_f64().filter(|cost| cost.is_finite());
        self.cost = self.cost.max(cost.unwrap_or(0.0));
    }

    fn understand_messages(&mut self, kind: &str, value: &Value) {
        self.tools |= value["content_block"]["type"] == "tool_use";
        let usage = match kind {
            "message_start" => &value["message"]["usage"],
            "message" => {
                self.finished(&value["stop_reason"]);
                &value["usage"]
            }
            "message_delta" => {
                self.finished(&value["delta"]["stop_reason"]);
                &value["usage"]
            }
            "message_stop" => {
                self.done = true;
                &Value::Null
            }
            "content_block_start" | "content_block_delta" | "content_block_stop" | "ping" => &Value::Null,
            _ => return,
        };
        self.understood += 1;
        let number = |name: &str| usage[name].as_u64().unwrap_or(0);
        let input = number("input_tokens") + number("cache_creation_input_tokens") + number("cache_read_input_tokens");
        self.used(&input.into(), &usage["output_tokens"]);
    }

    fn understand_responses(&mut self, kind: &str, value: &Value) {
        let response = if value["response"].is_object() { &value["response"] } else { value };
        if !kind.starts_with("response.") && value["object"] != "response" {
            return;
        }
        self.understood += 1;
        self.tools |= value["item"]["type"] == "function_call";
        match response["status"].as_str() {
            Some("completed" | "incomplete") => {
                self.finished(&response["status"]);
                self.done |= !kind.is_empty();
            }
            Some("failed") => self.error = Some(response.clone()),
            _ => {}
        }
        self.used(&response["usage"]["input_tokens"], &response["usage"]["output_tokens"]);
    }

    fn finished(&mut self, reason: &Value) {
        if let Some(reason) = reason.as_str().filter(|reason| !reason.is_empty()) {
            self.finish = Some(reason.chars().take(64).collect());
        }
    }

    /// Providers repeat a growing usage; the highest counts.
    fn used(&mut self, input: &Value, output: &Value) {
        self.input_tokens = self.input_tokens.max(input.as_u64().unwrap_or(0));
        self.output_tokens = self.output_tokens.max(output.as_u64().unwrap_or(0));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHAT: &str = "data: {\"choices\":[{\"delta\":{\"content\":\"é\"},\"finish_reason\":null}]}\n\n\
        data: {\"choices\":[{\"delta\":{},\"finish_reason\":\"stop\"}]}\n\n\
        data: {\"choices\":[],\"usage\":{\"prompt_tokens\":7,\"completion_tokens\":3}}\n\ndata: [DONE]\n\n";

    fn read(api: Api, form: Form, pieces: &[&[u8]]) -> Observer {
        let mut observer = Observer::new(api, form);
        for piece in pieces {
            observer.feed(piece);
        }
        observer.end();
        observer
    }

    fn verdict(observer: &Observer) -> Result<String, &'static str> {
        observer.verdict(&SecretString::from("")).map_err(|error| error.code)
    }

    #[test]
    fn a_chat_split_anywhere_with_any_line_ends() {
        for text in [CHAT.to_owned(), CHAT.replace('\n', "\r\n"), CHAT.replace('\n', "\r")] {
            for at in 0..=text.len() {
                let (a, b) = text.as_bytes().split_at(at);
                let observer = read(Api::Chat, Form::Stream, &[a, b]);
                assert_eq!(verdict(&observer), Ok("stop".to_owned()), "split at {at}");
                assert_eq!((observer.input_tokens, observer.output_tokens), (7, 3));
                assert!(observer.is_done());
            }
            let bytes: Vec<&[u8]> = text.as_bytes().chunks(1).collect();
            assert_eq!(verdict(&read(Api::Chat, Form::Stream, &bytes)), Ok("stop".to_owned()));
        }
    }

    #[test]
    fn one_event_in_several_data_lines_and_comments() {
        let text = b": ping\nid: 4\ndata: {\"choices\":[{\ndata:\"finish_reason\":\"length\"}]}\n\n";
        assert_eq!(verdict(&read(Api::Chat, Form::Stream, &[text])), Ok("length".to_owned()));
    }

    #[test]
    fn what_is_no_answer() {
        for text in ["", "<html>\n\n</html>", "data: oops\n\n", "data: {\"hello\":1}\n\n", ": ping\n\n", "\u{0}\u{1}"] {
            let observer = read(Api::Chat, Form::Stream, &[text.as_bytes()]);
            assert_eq!(verdict(&observer), Err("model_bad_response"), "{text:?}");
        }
        let broken = "data: {\"choices\":[{\"delta\":{}}]}\n\ndata: {\"cho\n\n";
        assert_eq!(verdict(&read(Api::Chat, Form::Stream, &[broken.as_bytes()])), Err("model_bad_response"));
        let unfinished = "data: {\"choices\":[{\"delta\":{},\"finish_reason\":\"\"}]}\n\n";
        assert_eq!(verdict(&read(Api::Chat, Form::Stream, &[unfinished.as_bytes()])), Err("model_unfinished"));
        let unknown = "data: {\"choices\":[{\"finish_reason\":\"error\"}]}\n\ndata: [DONE]\n\n";
        assert_eq!(verdict(&read(Api::Chat, Form::Stream, &[unknown.as_bytes()])), Err("model_unfinished"));
        let failed = "data: {\"error\":{\"message\":\"slow down\",\"type\":\"rate_limit_error\"}}\n\n";
        assert_eq!(verdict(&read(Api::Chat, Form::Stream, &[failed.as_bytes()])), Err("model_rate_limited"));
    }

    #[test]
    fn a_huge_line_is_passed_over_and_costs_no_memory() {
        let mut observer = Observer::new(Api::Chat, Form::Stream);
        observer.feed(b"data: ");
        for _ in 0..10 {
            observer.feed(&vec![b'x'; 1024 * 1024]);
            assert!(observer.line.capacity() <= 2 * MAX_EVENT);
        }
        observer.feed(b"\n\n");
        observer.feed(b"data: [DONE]\n\n");
        observer.end();
        assert_eq!(verdict(&observer), Ok(String::new()));
        let mut observer = Observer::new(Api::Chat, Form::Stream);
        observer.feed(&vec![b'x'; MAX_EVENT + 1]);
        observer.feed(b"\n\n");
        observer.feed(CHAT.as_bytes());
        observer.end();
        assert_eq!(verdict(&observer), Ok("stop".to_owned()));
    }

    #[test]
    fn it_says_where_events_end() {
        let mut observer = Observer::new(Api::Chat, Form::Stream);
        let event = "data: {\"choices\":[]}\n\n";
        for (bytes, whole) in [
            (": ping\n".to_owned(), 7),
            (format!("{event}{event}data: {{\"cho"), 2 * event.len()),
            ("ices\":[]}\n".to_owned(), 0),
            ("\r".to_owned(), 1),
            ("\n".to_owned(), 1),
            (format!("event: x\n: ping\n{event}"), 16 + event.len()),
            (format!("{event}data: {{\"error\":\"no\"}}\n\n{event}"), event.len()),
            (event.to_owned(), 0),
        ] {
            assert_eq!(observer.feed(bytes.as_bytes()), whole, "{bytes:?}");
        }
        assert!(observer.has_failed());
        assert_eq!(verdict(&observer), Err("model_unavailable"));
    }

    #[test]
    fn what_follows_a_broken_event_is_no_help_and_a_tool_is_its_own_finish() {
        let start = "data: {\"choices\":[{\"delta\":{}}]}\n\n";
        let end = "data: {\"choices\":[{\"delta\":{},\"finish_reason\":\"stop\"}]}\n\ndata: [DONE]\n\n";
        let broken = format!("{start}data: oops\n\n{end}");
        assert_eq!(verdict(&read(Api::Chat, Form::Stream, &[broken.as_bytes()])), Err("model_bad_response"));
        let unknown = end.replace("stop", "weird");
        let observer = read(Api::Chat, Form::Stream, &[start.as_bytes(), unknown.as_bytes()]);
        assert!(observer.has_failed() && !observer.asks_for_tools());
        let tool = "data: {\"choices\":[{\"delta\":{\"tool_calls\":[{}]}}]}\n\n";
        let observer = read(Api::Chat, Form::Stream, &[start.as_bytes(), tool.as_bytes(), unknown.as_bytes()]);
        assert!(!observer.has_failed() && observer.asks_for_tools());
        assert_eq!(verdict(&observer), Err("model_unfinished"));
    }

    #[test]
    fn anthropic_and_responses() {
        let text = "event: message_start\ndata: {\"type\":\"message_start\",\"message\":{\"usage\":{\"input_tokens\":5,\"cache_read_input_tokens\":2,\"output_tokens\":1}}}\n\n\
            data: {\"type\":\"ping\"}\n\n\
            data: {\"type\":\"message_delta\",\"delta\":{\"stop_reason\":\"end_turn\"},\"usage\":{\"output_tokens\":9}}\n\n\
            data: {\"type\":\"message_stop\"}\n\n";
        let observer = read(Api::Messages, Form::Stream, &[text.as_bytes()]);
        assert_eq!(verdict(&observer), Ok("end_turn".to_owned()));
        assert_eq!((observer.input_tokens, observer.output_tokens, observer.is_done()), (7, 9, true));
        let text = "data: {\"type\":\"response.output_text.delta\",\"delta\":\"x\"}\n\n\
            data: {\"type\":\"response.completed\",\"response\":{\"status\":\"completed\",\"error\":null,\"usage\":{\"input_tokens\":4,\"output_tokens\":2}}}\n\n";
        let observer = read(Api::Responses, Form::Stream, &[text.as_bytes()]);
        assert_eq!(verdict(&observer), Ok("completed".to_owned()));
        assert_eq!((observer.input_tokens, observer.output_tokens), (4, 2));
    }

    #[test]
    fn whole_answers() {
        let text =
            br#"{"choices":[{"finish_reason":"stop","message":{}}],"usage":{"prompt_tokens":1,"completion_tokens":2}}"#;
        let observer = read(Api::Chat, Form::Whole, &[&text[..9], &text[9..]]);
        assert_eq!(verdict(&observer), Ok("stop".to_owned()));
        assert_eq!((observer.input_tokens, observer.output_tokens), (1, 2));
        assert_eq!(verdict(&read(Api::Chat, Form::Whole, &[b"nope"])), Err("model_bad_response"));
        let text = br#"{"type":"message","stop_reason":"tool_use","usage":{"input_tokens":1,"output_tokens":2}}"#;
        assert_eq!(verdict(&read(Api::Messages, Form::Whole, &[text])), Ok("tool_use".to_owned()));
    }
}
