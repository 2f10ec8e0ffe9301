//! How a step looks on the wire: OpenAI's chat completions and Anthropic's messages, streamed and whole.

use super::script::{Break, Conversation, Cut, Step, Tokens, ToolUse, without_script};
use serde_json::{Value, json};

/// Events that no client can read.
pub(super) const GARBAGE: &str = "data: {\"choices\": [{\"del\n\ndata: oops\n\n";

/// The protocol of a request, told by its path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wire {
    OpenAi,
    Anthropic,
}

/// A part of an answer that goes out as one event or a few.
enum Piece {
    Reasoning(String),
    Text(String),
    ToolStart { index: usize, id: String, name: String },
    ToolArgs { index: usize, json: String },
}

/// An answer ready to be sent: each string is written and flushed by itself.
pub(super) struct Stream {
    pub(super) events: Vec<String>,
    /// How many of `events` are there before the first piece has gone out.
    pub(super) head: usize,
    pub(super) after: After,
}

/// What follows the last event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum After {
    End,
    Abort,
    Silence,
}

fn split(text: &str, chars: Option<usize>, words: bool) -> Vec<String> {
    match chars {
        Some(chars) => {
            let all: Vec<char> = text.chars().collect();
            all.chunks(chars.max(1)).map(|chunk| chunk.iter().collect()).collect()
        }
        None if words => text.split_inclusive(' ').map(str::to_owned).collect(),
        None => vec![text.to_owned()],
    }
}

fn halves(text: &str) -> [String; 2] {
    let middle = text.chars().count() / 2;
    [text.chars().take(middle).collect(), text.chars().skip(middle).collect()]
}

fn whole_text(step: &Step, conversation: &Conversation) -> String {
    let echo = if step.echo { without_script(&conversation.last) } else { String::new() };
    echo + step.text.as_deref().unwrap_or_default()
}

fn tool_id(conversation: &Conversation, index: usize) -> String {
    format!("call_{}_{index}", conversation.answers)
}

/// A tool's arguments as they are written.
fn arguments(tool: &ToolUse) -> String {
    tool.args.as_str().map_or_else(|| tool.args.to_string(), str::to_owned)
}

fn pieces(step: &Step, conversation: &Conversation) -> Vec<Piece> {
    let mut pieces = Vec::new();
    if let Some(reasoning) = &step.reasoning {
        pieces.extend(split(reasoning, step.chunk_chars, true).into_iter().map(Piece::Reasoning));
    }
    let text = whole_text(step, conversation);
    let text = if text.is_empty() && step.cut == Some(Cut::Text) { "Text that is cut".to_owned() } else { text };
    let mut parts = if text.is_empty() { Vec::new() } else { split(&text, step.chunk_chars, true) };
    if step.cut == Some(Cut::Text) {
        if parts.len() < 2 {
            parts = halves(&text).into();
        }
        parts.truncate(parts.len() / 2);
        pieces.extend(parts.into_iter().map(Piece::Text));
        return pieces;
    }
    pieces.extend(parts.into_iter().map(Piece::Text));
    for (index, tool) in step.tools.iter().enumerate() {
        pieces.push(Piece::ToolStart { index, id: tool_id(conversation, index), name: tool.name.clone() });
        let args = arguments(tool);
        if step.cut == Some(Cut::Tool) {
            let [first, _] = halves(&args);
            pieces.push(Piece::ToolArgs { index, json: first });
            return pieces;
        }
        pieces.extend(split(&args, step.chunk_chars, false).into_iter().map(|json| Piece::ToolArgs { index, json }));
    }
    pieces
}

/// The finish reason that the step ends with; `None` where it ends without one.
fn finish(step: &Step) -> Option<String> {
    match &step.finish {
        _ if step.no_finish => None,
        Some(finish) => finish.clone(),
        None if step.tools.is_empty() => Some("stop".to_owned()),
        None => Some("tool_calls".to_owned()),
    }
}

fn stop_reason(finish: &str) -> &str {
    match finish {
        "stop" => "end_turn",
        "tool_calls" => "tool_use",
        "length" => "max_tokens",
        "content_filter" => "refusal",
        other => other,
    }
}

fn tokens(step: &Step) -> Tokens {
    step.usage.unwrap_or(Tokens { prompt: 100, completion: 20, cost: None })
}

impl Wire {
    /// The events of a streamed answer.
    pub(super) fn stream(self, step: &Step, conversation: &Conversation) -> Stream {
        let mut events = match self {
            Self::OpenAi => vec![openai(conversation, &json!({"role": "assistant", "content": ""}), None)],
            Self::Anthropic => vec![named(json!({"type": "message_start", "message": {
                "id": "msg_scripted", "type": "message", "role": "assistant", "model": conversation.model,
                "content": [], "stop_reason": null, "stop_sequence": null,
                "usage": {"input_tokens": tokens(step).prompt, "output_tokens": 1},
            }}))],
        };
        if step.cut == Some(Cut::Start) {
            events.clear();
            return self.broken(step, events, 0);
        }
        let head = events.len() + 1;
        match self {
            Self::OpenAi => openai_pieces(step, conversation, &mut events),
            Self::Anthropic => anthropic_pieces(step, conversation, &mut events),
        }
        if step.cut.is_some() {
            return self.broken(step, events, head);
        }
        if let Some(finish) = finish(step) {
            let Tokens { prompt, completion, cost } = tokens(step);
            match self {
                Self::OpenAi => {
                    events.push(openai(conversation, &json!({}), Some(&finish)));
                    let mut last = json!({
                        "id": "chatcmpl-scripted", "object": "chat.completion.chunk", "created": 1,
                        "model": conversation.model, "choices": [], "usage": {
                            "prompt_tokens": prompt, "completion_tokens": completion,
                            "total_tokens": prompt + completion,
                        },
                    });
                    if let Some(cost) = cost {
                        last["usage"]["cost"] = json!(cost);
                    }
                    events.push(data(&last));
                    events.push("data: [DONE]\n\n".to_owned());
                }
                Self::Anthropic => {
                    events.push(named(json!({"type": "message_delta",
                        "delta": {"stop_reason": stop_reason(&finish), "stop_sequence": null},
                        "usage": {"output_tokens": completion}})));
                    events.push(named(json!({"type": "message_stop"})));
                }
            }
        }
        Stream { head: head.min(events.len()), events, after: After::End }
    }

    /// An answer that breaks off after these events.
    fn broken(self, step: &Step, mut events: Vec<String>, head: usize) -> Stream {
        let after = match step.by.clone().unwrap_or_default() {
            Break::Abort => After::Abort,
            Break::End => After::End,
            Break::Silence => After::Silence,
            Break::Garbage => {
                events.push(GARBAGE.to_owned());
                After::End
            }
            Break::Error(error) => {
                events.push(match self {
                    Self::OpenAi => data(&json!({"error": error})),
                    Self::Anthropic => named(json!({"type": "error", "error": error})),
                });
                After::End
            }
        };
        Stream { head: head.min(events.len()), events, after }
    }

    /// The whole answer of a request that did not ask for a stream.
    pub(super) fn whole(self, step: &Step, conversation: &Conversation) -> Value {
        let text = whole_text(step, conversation);
        let Tokens { prompt, completion, .. } = tokens(step);
        let finish = finish(step);
        match self {
            Self::OpenAi => {
                let calls: Vec<Value> = step
                    .tools
                    .iter()
                    .enumerate()
                    .map(|(index, tool)| {
                        json!({"id": tool_id(conversation, index), "type": "function",
                            "function": {"name": tool.name, "arguments": arguments(tool)}})
                    })
                    .collect();
                let mut message = json!({"role": "assistant", "content": text});
                if let Some(reasoning) = &step.reasoning {
                    message["reasoning_content"] = json!(reasoning);
                }
                if !calls.is_empty() {
                    message["tool_calls"] = json!(calls);
                }
                json!({
                    "id": "chatcmpl-scripted", "object": "chat.completion", "created": 1, "model": conversation.model,
                    "choices": [{"index": 0, "message": message, "finish_reason": finish}],
                    "usage": {"prompt_tokens": prompt, "completion_tokens": completion,
                        "total_tokens": prompt + completion},
                })
            }
            Self::Anthropic => {
                let mut content = Vec::new();
                if !text.is_empty() {
                    content.push(json!({"type": "text", "text": text}));
                }
                for (index, tool) in step.tools.iter().enumerate() {
                    content.push(json!({"type": "tool_use", "id": tool_id(conversation, index),
                        "name": tool.name, "input": tool.args}));
                }
                json!({
                    "id": "msg_scripted", "type": "message", "role": "assistant", "model": conversation.model,
                    "content": content, "stop_reason": finish.as_deref().map(stop_reason), "stop_sequence": null,
                    "usage": {"input_tokens": prompt, "output_tokens": completion},
                })
            }
        }
    }

    /// The protocol's error body.
    pub(super) fn error(self, message: &str) -> Value {
        match self {
            Self::OpenAi => json!({"error": {"message": message, "type": "scripted", "param": null, "code": null}}),
            Self::Anthropic => json!({"type": "error", "error": {"type": "scripted", "message": message}}),
        }
    }
}

fn data(value: &Value) -> String {
    format!("data: {value}\n\n")
}

/// An event with its type as the event's name, as Anthropic sends them.
fn named(value: Value) -> String {
    format!("event: {}\ndata: {value}\n\n", value["type"].as_str().unwrap_or_default())
}

fn openai(conversation: &Conversation, delta: &Value, finish: Option<&str>) -> String {
    data(&json!({
        "id": "chatcmpl-scripted", "object": "chat.completion.chunk", "created": 1, "model": conversation.model,
        "choices": [{"index": 0, "delta": delta, "finish_reason": finish}],
    }))
}

fn openai_pieces(step: &Step, conversation: &Conversation, events: &mut Vec<String>) {
    for piece in pieces(step, conversation) {
        let delta = match piece {
            Piece::Reasoning(text) => json!({"reasoning_content": text}),
            Piece::Text(text) => json!({"content": text}),
            Piece::ToolStart { index, id, name } => json!({"tool_calls": [
                {"index": index, "id": id, "type": "function", "function": {"name": name, "arguments": ""}}]}),
            Piece::ToolArgs { index, json } => {
                json!({"tool_calls": [{"index": index, "function": {"arguments": json}}]})
            }
        };
        events.push(openai(conversation, &delta, None));
    }
}

fn anthropic_pieces(step: &Step, conversation: &Conversation, events: &mut Vec<String>) {
    let mut open: Option<&str> = None;
    let mut index = 0;
    for piece in pieces(step, conversation) {
        let (kind, start) = match &piece {
            Piece::Reasoning(_) => ("thinking", json!({"type": "thinking", "thinking": "", "signature": ""})),
            Piece::Text(_) => ("text", json!({"type": "text", "text": ""})),
            Piece::ToolStart { id, name, .. } => {
                ("start", json!({"type": "tool_use", "id": id, "name": name, "input": {}}))
            }
            Piece::ToolArgs { .. } => ("tool", Value::Null),
        };
        if open != Some(kind) && !start.is_null() {
            if open.is_some() {
                events.push(named(json!({"type": "content_block_stop", "index": index})));
                index += 1;
            }
            events.push(named(json!({"type": "content_block_start", "index": index, "content_block": start})));
            open = Some(kind);
        }
        let delta = match piece {
            Piece::Reasoning(text) => json!({"type": "thinking_delta", "thinking": text}),
            Piece::Text(text) => json!({"type": "text_delta", "text": text}),
            Piece::ToolStart { .. } => {
                open = Some("tool");
                continue;
            }
            Piece::ToolArgs { json, .. } => json!({"type": "input_json_delta", "partial_json": json}),
        };
        events.push(named(json!({"type": "content_block_delta", "index": index, "delta": delta})));
    }
    if open.is_some() && step.cut.is_none_or(|cut| cut == Cut::Call) {
        events.push(named(json!({"type": "content_block_stop", "index": index})));
    }
}
