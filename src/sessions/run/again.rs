//! An execution that goes on in a conversation that an earlier life of the sidecar began.
//!
//! OpenCode writes a tool call down before it tells of it. A sidecar that ended in between has left a conversation with a
//! call in it that the log lacks: whoever reads the log has to know of it, and so has the agent, which may not make it
//! anew as if nothing had been done.

use crate::events::OpenTool;
use crate::model::event::NewEvent;
use crate::opencode::translate::{tool_call, tool_result};
use crate::opencode::wire::{Message, Part};
use std::collections::VecDeque;

/// What the log says of calls of tools.
#[derive(Clone, Debug, Default)]
pub struct KnownCalls {
    /// Those that were cut off.
    pub open_tools: Vec<OpenTool>,
    /// The ids of the newest that have a result, oldest first.
    pub ended_calls: VecDeque<String>,
}

/// What comes before the run goes on.
pub(super) struct Again {
    /// What the log lacks.
    pub(super) events: Vec<NewEvent>,
    /// What the agent is told.
    pub(super) text: String,
}

impl KnownCalls {
    /// For a conversation of these messages.
    pub(super) fn again(&self, messages: &[Message]) -> Again {
        let mut events = Vec::new();
        let mut cut_off = self.open_tools.clone();
        for part in self.unknown(messages) {
            let call = tool_call(part);
            let open = OpenTool::of(&call.data).filter(|_| !part.state.has_ended());
            events.push(call);
            events.push(open.as_ref().map_or_else(|| tool_result(part), OpenTool::interrupted));
            cut_off.extend(open);
        }
        Again { events, text: what_was_cut_off(&cut_off) }
    }

    /// The calls that the log lacks, oldest first. The log has them in the order of the conversation, so it has all that
    /// are before one that it has.
    fn unknown<'m>(&self, messages: &'m [Message]) -> Vec<&'m Part> {
        let is_known = |part: &Part| {
            self.open_tools.iter().any(|open| open.call_id == part.id) || self.ended_calls.contains(&part.id)
        };
        let newest_first = messages.iter().flat_map(|message| &message.parts).filter(|part| part.kind == "tool").rev();
        let mut unknown: Vec<_> = newest_first.take_while(|part| !is_known(part)).collect();
        unknown.reverse();
        unknown
    }
}

fn what_was_cut_off(calls: &[OpenTool]) -> String {
    let mut message = String::from(
        "The machine that you work on was interrupted and has been started again. Every process that you had started is \
         gone; the files are as they were left.",
    );
    if !calls.is_empty() {
        message.push_str(
            "\n\nThese tool calls were cut off. They have not been run again, and may have had a part of their effect:",
        );
        for OpenTool { tool, arguments, .. } in calls {
            message.push_str(&format!("\n- {tool} {arguments}"));
        }
    }
    message.push_str("\n\nLook how things stand, then go on with the task.");
    message
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn conversation(calls: &[(&str, &str)]) -> Vec<Message> {
        let tool = |(id, status): &(&str, &str)| {
            let state = json!({ "status": status, "input": { "command": id }, "output": "out" });
            json!({ "id": id, "type": "tool", "tool": "bash", "state": state })
        };
        let messages = calls.iter().map(|call| {
            let parts = [json!({ "id": "t", "type": "text", "text": "x" }), tool(call)];
            serde_json::from_value(json!({ "info": { "id": "m" }, "parts": parts })).unwrap()
        });
        messages.collect()
    }

    fn known(open: &[&str], ended: &[&str]) -> KnownCalls {
        let open = open.iter().map(|id| OpenTool::of(&json!({ "call_id": id, "tool": "bash", "args": {} })).unwrap());
        KnownCalls { open_tools: open.collect(), ended_calls: ended.iter().map(|id| (*id).to_owned()).collect() }
    }

    fn told(known: &KnownCalls, calls: &[(&str, &str)]) -> (Vec<(String, Value)>, String) {
        let Again { events, text } = known.again(&conversation(calls));
        let told = |event: NewEvent| {
            (
                format!("{} {}", event.kind.as_str(), event.data["call_id"].as_str().unwrap()),
                event.data["error"].clone(),
            )
        };
        (events.into_iter().map(told).collect(), text)
    }

    #[test]
    fn what_the_log_has_is_not_told_twice() {
        let (events, text) = told(&known(&["b"], &["a"]), &[("a", "completed"), ("b", "running")]);
        assert_eq!(events, []);
        assert!(text.contains("\n- bash {}"), "{text}");
        // Too long ago to be remembered.
        assert_eq!(told(&known(&[], &["b"]), &[("a", "completed"), ("b", "completed")]).0, []);
    }

    #[test]
    fn what_the_log_lacks_is_told_with_its_result_or_as_cut_off() {
        let calls = [("a", "completed"), ("b", "completed"), ("c", "error"), ("d", "running"), ("e", "pending")];
        let (events, text) = told(&known(&[], &["a"]), &calls);
        let interrupted = || json!("interrupted");
        let wanted = [
            ("tool_call b", Value::Null),
            ("tool_result b", Value::Null),
            ("tool_call c", Value::Null),
            ("tool_result c", Value::Null),
            ("tool_call d", Value::Null),
            ("tool_result d", interrupted()),
            ("tool_call e", Value::Null),
            ("tool_result e", interrupted()),
        ];
        assert_eq!(events, wanted.map(|(event, error)| (event.to_owned(), error)));
        assert!(text.contains(r#"- bash {"command":"d"}"#) && text.contains(r#"- bash {"command":"e"}"#), "{text}");
        assert!(!text.contains(r#""command":"c""#), "{text}");
    }
}
