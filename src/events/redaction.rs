//! The one choke point: what goes into a log goes through here first, and no secret goes on to the journal, the database or
//! a reader. What is looked for, and how, is in `secrets::redact`.
//!
//! Text that comes in pieces (a shell's output, what the agent writes) is looked at as one: a piece may come out shorter,
//! its end with the next one, or with an event of its own before whatever ends the stream.

use crate::model::ExecutionRecord;
use crate::model::event::{EventType, NewEvent};
use crate::secrets::{Cleaned, Redactor, Scanner};
use crate::store::{Fact, Outcome, Write};
use secrecy::SecretString;
use serde_json::{Value, json};

/// Cleans what goes into the log of one execution.
#[derive(Debug, Default)]
pub(super) struct Cleaner {
    redactor: Redactor,
    streams: Vec<Stream>,
    found: Vec<&'static str>,
}

/// Text that comes in pieces.
#[derive(Debug)]
struct Stream {
    kind: EventType,
    /// Of the call, or the part of the agent's text; `null` for output of an unknown call.
    id: Value,
    scanner: Scanner,
    /// Its last event, for what is left at its end.
    like: NewEvent,
}

impl Cleaner {
    /// Whether what looks like a secret is looked for, too.
    pub(super) fn look_for_shapes(&mut self, shapes: bool) {
        self.redactor.look_for_shapes(shapes);
    }

    /// One of the session's own secrets is not to be in the log.
    pub(super) fn hide(&mut self, key: &SecretString) {
        self.redactor.hide(key);
    }

    /// The kinds of what was found since this was asked last.
    pub(super) fn found(&mut self) -> std::vec::Drain<'_, &'static str> {
        self.found.drain(..)
    }

    /// What goes into the log in this event's place: itself, with what was held back before it; nothing, where all of it is
    /// held back.
    pub(super) fn clean(&mut self, event: NewEvent) -> Vec<NewEvent> {
        let mut out = Vec::new();
        let id = match event.kind {
            EventType::Stdout | EventType::Stderr => event.beside.get("call_id").cloned().unwrap_or_default(),
            EventType::Message | EventType::Reasoning => event.data["part_id"].clone(),
            EventType::ToolResult => {
                self.finish(&mut out, |stream| stream.is_output() && stream.id == event.data["call_id"]);
                Value::Null
            }
            EventType::Status | EventType::Complete => {
                self.finish(&mut out, |_| true);
                Value::Null
            }
            _ => Value::Null,
        };
        match text_of(&event) {
            Some(piece) => {
                let stream = of(&mut self.streams, id, &event);
                let Cleaned { text, found } = stream.scanner.push(&self.redactor, piece);
                self.found.extend(found);
                let is_empty = piece.is_empty();
                if !text.is_empty() || is_empty {
                    out.push(with_text(event, text));
                }
            }
            None => {
                if matches!(event.kind, EventType::Message | EventType::Reasoning) {
                    self.finish(&mut out, |stream| stream.kind == event.kind && stream.id == id);
                }
                out.push(self.clean_whole(event));
            }
        }
        out
    }

    /// The output of a command has ended.
    pub(super) fn output_ends(&mut self, call: &Value) -> Vec<NewEvent> {
        let mut out = Vec::new();
        self.finish(&mut out, |stream| stream.is_output() && stream.id == *call);
        out
    }

    /// What is written beside the events.
    pub(super) fn clean_write(&self, write: &mut Write) {
        match write {
            Write::Submit(record) | Write::Progress(record) | Write::Change { record, .. } => self.clean_record(record),
            Write::Local { fact: Fact::Outcome(Outcome { failure: Some(failure), .. }), .. } => {
                self.clean_text(&mut failure.message);
            }
            _ => {}
        }
    }

    /// What the run has brought; what was asked for stays as it was asked.
    fn clean_record(&self, record: &mut ExecutionRecord) {
        for text in record.error.iter_mut().chain(&mut record.final_message).chain(&mut record.files_modified) {
            self.clean_text(text);
        }
    }

    fn clean_text(&self, text: &mut String) {
        // Not counted: an event has said the same.
        if let Some(cleaned) = self.redactor.clean(text) {
            *text = cleaned.text;
        }
    }

    fn clean_whole(&mut self, mut event: NewEvent) -> NewEvent {
        for value in std::iter::once(&mut event.data).chain(event.beside.values_mut()) {
            self.redactor.clean_value(value, &mut self.found);
        }
        event
    }

    /// Ends streams; what they held back is told before whatever ends them.
    fn finish(&mut self, out: &mut Vec<NewEvent>, which: impl Fn(&Stream) -> bool) {
        for mut stream in self.streams.extract_if(.., |stream| which(stream)).collect::<Vec<_>>() {
            let Cleaned { text, found } = stream.scanner.finish(&self.redactor);
            self.found.extend(found);
            if !text.is_empty() {
                out.push(with_text(stream.like, text));
            }
        }
    }
}

impl Stream {
    fn is_output(&self) -> bool {
        matches!(self.kind, EventType::Stdout | EventType::Stderr)
    }
}

/// The stream that the event belongs to.
fn of<'a>(streams: &'a mut Vec<Stream>, id: Value, event: &NewEvent) -> &'a mut Stream {
    let known = streams.iter().position(|stream| stream.kind == event.kind && stream.id == id);
    let at = known.unwrap_or(streams.len());
    if known.is_none() {
        let like = with_text(event.clone(), String::new());
        streams.push(Stream { kind: event.kind, id, scanner: Scanner::default(), like });
    }
    &mut streams[at]
}

/// The piece of text that an event of a stream brings; `None` for an event that is whole.
fn text_of(event: &NewEvent) -> Option<&str> {
    let text = match event.kind {
        EventType::Stdout | EventType::Stderr => &event.data,
        EventType::Message | EventType::Reasoning => &event.data["delta"],
        _ => return None,
    };
    text.as_str()
}

fn with_text(mut event: NewEvent, text: String) -> NewEvent {
    match event.kind {
        EventType::Message | EventType::Reasoning => event.data["delta"] = json!(text),
        _ => event.data = json!(text),
    }
    event
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::event::Severity;

    const KEY: &str = "the-session-key-0123";

    fn cleaner() -> Cleaner {
        let mut cleaner = Cleaner::default();
        cleaner.look_for_shapes(true);
        cleaner.hide(&SecretString::from(KEY));
        cleaner
    }

    fn output(call: &str, text: &str) -> NewEvent {
        NewEvent::new(EventType::Stdout, json!(text)).with("call_id", call)
    }

    fn delta(part: &str, text: &str) -> NewEvent {
        NewEvent::new(EventType::Message, json!({ "part_id": part, "delta": text }))
    }

    #[test]
    fn what_is_held_back_comes_with_the_next_piece_or_before_the_end() {
        let mut cleaner = cleaner();
        let told = |events: Vec<NewEvent>| events.into_iter().map(|event| event.data).collect::<Vec<_>>();
        assert_eq!(told(cleaner.clean(output("a", "x the-"))), ["x "]);
        // Another call's output has nothing to do with it.
        assert_eq!(told(cleaner.clean(output("b", "session-key"))), ["session-key"]);
        assert!(cleaner.clean(output("a", "session-key-")).is_empty());
        assert_eq!(told(cleaner.clean(output("a", "0123 y the-s"))), ["[redacted: the session's key] y "]);
        let result = NewEvent::new(EventType::ToolResult, json!({ "call_id": "a", "result": KEY }));
        let events = cleaner.clean(result);
        assert_eq!(events[0], output("a", "the-s"));
        assert_eq!(events[1].data["result"], "[redacted: the session's key]");
        assert_eq!(cleaner.found().count(), 2);

        let whole =
            NewEvent::new(EventType::Message, json!({ "part_id": "p", "text": format!("see {KEY}"), "final": true }));
        assert_eq!(told(cleaner.clean(delta("p", "see the-session"))), [json!({ "part_id": "p", "delta": "see " })]);
        assert_eq!(
            told(cleaner.clean(whole)),
            [
                json!({ "part_id": "p", "delta": "the-session" }),
                json!({ "part_id": "p", "text": "see [redacted: the session's key]", "final": true }),
            ]
        );
        assert!(told(cleaner.clean(output("c", "the-"))).is_empty());
        assert_eq!(told(cleaner.output_ends(&json!("c"))), ["the-"]);
        assert!(told(cleaner.clean(output("c", "the-"))).is_empty());
        let last = cleaner.clean(NewEvent::log(Severity::Info, "x", KEY).with("note", KEY));
        assert!(!format!("{last:?}").contains(KEY));
        let end = NewEvent::new(EventType::Status, json!("completed"));
        assert_eq!(told(cleaner.clean(end)), ["the-", "completed"]);
        assert!(cleaner.streams.is_empty());
    }

    #[test]
    fn events_without_secrets_are_as_they_were() {
        let mut cleaner = cleaner();
        for event in [
            output("a", ""),
            output("a", "plain \u{1b}[0m ü\0"),
            delta("p", "words"),
            NewEvent::new(EventType::Todo, json!({ "items": [{ "content": "x" }] })),
        ] {
            assert_eq!(cleaner.clean(event.clone()), [event]);
        }
        assert_eq!(cleaner.found().count(), 0);
    }
}
