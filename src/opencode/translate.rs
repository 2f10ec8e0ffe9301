//! OpenCode's events into ours: a pure function over what it has seen so far.
//!
//! No I/O and no clock. The golden files under `tests/golden/` were recorded from real runs and hold it to what
//! OpenCode really sends.
//!
//! What becomes of an event of OpenCode:
//! - it has a type of ours: translated, by the functions below;
//! - it only repeats or prepares what others say (`message.updated`, `session.updated`, `session.diff`,
//!   heartbeats …), or it is not about a session of this run at all (`plugin.added`, `catalog.updated` …): no event;
//! - anything else about a session of this run, and what has another form than we know: `opencode`, word for word.
//!
//! What the model writes when it sums up the conversation is no word to the user: it is translated as `reasoning`.
//!
//! What is about a sub-agent has the sub-agent's session beside it, as `subagent`.

use super::changes::Changes;
use super::wire::{MessageInfo, NamedError, Part, RawEvent, Tokens, sentence};
use crate::model::event::{EventType, NewEvent, Severity};
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap, HashSet};

/// What an event means for the run as a whole.
#[derive(Clone, Debug, PartialEq)]
pub enum Signal {
    /// The agent works.
    Busy,
    /// The agent has nothing to do: the run may be over.
    Idle,
    /// OpenCode calls itself idle, but has not completed its answer yet. A prompt that comes now is lost.
    Stopping,
    /// The model failed and OpenCode waits before it tries again.
    Retry { wait_ms: i64 },
    /// OpenCode reports an error; whether it ends the run is seen at the next `Idle`.
    Error(NamedError),
    /// A permission is asked for, which nobody can give in this version.
    PermissionAsked { request_id: String },
    /// The agent asks a question, which nobody can answer in this version.
    QuestionAsked { request_id: String },
}

/// What came of one event.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Step {
    pub events: Vec<NewEvent>,
    pub signal: Option<Signal>,
    /// A shell command that now runs: its call and its command line.
    pub shell_started: Option<(String, String)>,
    /// The call of a tool that has ended.
    pub tool_ended: Option<String>,
}

impl Step {
    fn event(event: NewEvent) -> Self {
        Self { events: vec![event], ..Self::default() }
    }

    fn signal(signal: Signal) -> Self {
        Self { signal: Some(signal), ..Self::default() }
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum PartKind {
    Text,
    Reasoning,
}

/// A text that is being written.
#[derive(Clone, Debug)]
struct OpenText {
    part: String,
    session: String,
    kind: PartKind,
    text: String,
}

#[derive(Clone, Debug, Default)]
struct ToolCall {
    announced: bool,
    ended: bool,
}

/// Translates the events of one execution.
#[derive(Debug)]
pub struct Translator {
    root: String,
    /// The prompt's sub-agents: OpenCode sessions whose parent is the root or another one of these.
    children: HashSet<String>,
    workdir: String,
    roles: HashMap<String, String>,
    /// Messages that sum up the conversation.
    summaries: HashSet<String>,
    /// The agent's message that has begun and is not completed.
    answering: Option<String>,
    /// Texts that have begun and not ended, in the order in which they began.
    texts: Vec<OpenText>,
    finished_texts: HashSet<String>,
    tools: HashMap<String, ToolCall>,
    /// Calls that run now and their tools, in the order in which they began.
    running: Vec<(String, String)>,
    /// The calls of the answer that each session writes now, beside the session: a retry may make them again.
    of_this_answer: Vec<(String, String)>,
    spent: BTreeMap<String, (Tokens, f64)>,
    files: Vec<String>,
    changes: Changes,
    progress: Option<u8>,
    final_text: Option<String>,
    pending_error: Option<NamedError>,
}

impl Translator {
    /// For a run in OpenCode's session `root`, in the directory `workdir` (absolute; paths below it are shown
    /// relative to it).
    pub fn new(root: &str, workdir: &str) -> Self {
        Self {
            root: root.to_owned(),
            children: HashSet::new(),
            workdir: workdir.trim_end_matches('/').to_owned(),
            roles: HashMap::new(),
            summaries: HashSet::new(),
            answering: None,
            texts: Vec::new(),
            finished_texts: HashSet::new(),
            tools: HashMap::new(),
            running: Vec::new(),
            of_this_answer: Vec::new(),
            spent: BTreeMap::new(),
            files: Vec::new(),
            changes: Changes::default(),
            progress: None,
            final_text: None,
            pending_error: None,
        }
    }

    /// The tool that runs now; the one that began last where several do.
    pub fn current_tool(&self) -> Option<&str> {
        self.running.last().map(|(_, tool)| tool.as_str())
    }

    /// 0–100 from the to-do list; `None` before there is one.
    pub fn progress(&self) -> Option<u8> {
        self.progress
    }

    /// The agent's last finished text; a sub-agent's is none.
    pub fn final_text(&self) -> Option<&str> {
        self.final_text.as_deref()
    }

    /// Files that the agent's file tools changed, in the order of their first change.
    pub fn files(&self) -> &[String] {
        &self.files
    }

    /// What the run changed: the data of an event `diff`; `None` where nothing is known to be. `ended` where OpenCode was
    /// idle at the end.
    pub fn changes(&self, ended: bool) -> Option<Value> {
        self.changes.told(ended)
    }

    /// Whether an idle OpenCode has told all that it will of what was changed.
    pub fn changes_settled(&self) -> bool {
        self.changes.settled()
    }

    /// Whether a tool is running.
    pub fn tool_running(&self) -> bool {
        !self.running.is_empty()
    }

    /// The calls that were announced and have no result yet, each with its tool.
    pub fn open_tools(&self) -> Vec<(String, String)> {
        self.running.clone()
    }

    /// Ends the texts that were begun and will not be ended, because the model or the run broke off: their readers get
    /// what there was of each, as final, with `abandoned` beside it.
    pub fn abandon_texts(&mut self) -> Vec<NewEvent> {
        self.abandon(|_| true)
    }

    fn abandon(&mut self, which: impl Fn(&OpenText) -> bool) -> Vec<NewEvent> {
        let (broken, open) = std::mem::take(&mut self.texts).into_iter().partition(which);
        self.texts = open;
        let broken: Vec<OpenText> = broken;
        broken
            .into_iter()
            .map(|OpenText { part, session, kind, text }| {
                let data = json!({ "part_id": part, "text": text, "final": true });
                self.finished_texts.insert(part);
                let event = NewEvent::new(kind.event_type(), data).with("abandoned", true);
                if session == self.root { event } else { event.with("subagent", session) }
            })
            .collect()
    }

    /// An error that OpenCode reported and after which it has not gone on.
    pub fn pending_error(&self) -> Option<&NamedError> {
        self.pending_error.as_ref()
    }

    /// Input tokens, output tokens and cost so far, over all messages of the run, sub-agents included.
    pub fn spent(&self) -> (u64, u64, f64) {
        let mut total = (0.0, 0.0, 0.0);
        for (tokens, cost) in self.spent.values() {
            total.0 += tokens.input + tokens.cache.read + tokens.cache.write;
            total.1 += tokens.output + tokens.reasoning;
            total.2 += cost;
        }
        (whole(total.0), whole(total.1), total.2)
    }

    /// Translates one event. `now_ms` is the time of its arrival in milliseconds since 1970.
    pub fn translate(&mut self, event: &RawEvent, now_ms: i64) -> Step {
        let properties = &event.properties;
        if event.kind == "session.created" {
            self.adopt_child(properties);
        }
        // Changes of files name no session; the process serves one run at a time, so they are this run's.
        if event.kind == "file.watcher.updated" {
            return self.file_changed(properties).unwrap_or_else(|| verbatim(event));
        }
        let Some(session) = event.session_id() else { return Step::default() };
        let is_root = session == self.root;
        if !is_root && !self.children.contains(session) {
            return Step::default();
        }
        let subagent = (!is_root).then(|| session.to_owned());
        let step = match event.kind.as_str() {
            "message.updated" => self.message_updated(properties, session),
            "message.part.updated" => self.part_updated(properties, session),
            "message.part.delta" => self.part_delta(properties),
            "session.status" => self.status(properties, session, now_ms),
            "session.idle" if is_root && self.answering.is_some() => Some(Step::signal(Signal::Stopping)),
            "session.idle" if is_root => Some(Step::signal(Signal::Idle)),
            "session.error" => self.error(properties, is_root),
            "todo.updated" => self.todo(properties, is_root),
            "permission.asked" => permission_asked(properties),
            "question.asked" => question_asked(properties),
            "session.compacted" => Some(Step::event(NewEvent::log(
                Severity::Info,
                "context_compacted",
                "The conversation was summed up to fit the model's context.",
            ))),
            "permission.replied"
            | "question.replied"
            | "question.rejected"
            | "message.removed"
            | "message.part.removed"
            | "session.created"
            | "session.updated"
            | "session.deleted"
            | "session.diff"
            | "session.idle"
            | "file.edited" => Some(Step::default()),
            _ => None,
        };
        let mut step = step.unwrap_or_else(|| verbatim(event));
        if let Some(subagent) = subagent {
            for event in &mut step.events {
                event.beside.insert("subagent".to_owned(), json!(subagent));
            }
        }
        step
    }

    fn adopt_child(&mut self, properties: &Value) {
        let info = &properties["info"];
        let parent = info["parentID"].as_str();
        if parent.is_some_and(|p| p == self.root || self.children.contains(p))
            && let Some(id) = info["id"].as_str()
        {
            self.children.insert(id.to_owned());
        }
    }

    // Of the following, `None` means that the event has another form than we know.

    fn message_updated(&mut self, properties: &Value, session: &str) -> Option<Step> {
        let info = MessageInfo::deserialize(&properties["info"]).ok()?;
        let mut step = Step::default();
        if info.role == "assistant" {
            let is_new = !self.roles.contains_key(&info.id);
            if is_new {
                self.of_this_answer.retain(|(of, _)| of != session);
            }
            if info.summary == true {
                self.summaries.insert(info.id.clone());
            }
            if session == self.root {
                if info.time.completed.is_none() {
                    self.answering = Some(info.id.clone());
                } else if self.answering.as_ref() == Some(&info.id) {
                    self.answering = None;
                }
            }
            let spent = (info.tokens, info.cost);
            // The message says what its step has cost only after the step's last part.
            if self.spent.insert(info.id.clone(), spent).unwrap_or_default() != spent {
                step.events.push(self.usage_so_far());
            }
            // An error was not the end when a new answer of the model begins after it.
            if session == self.root && info.time.completed.is_none() && info.error.is_none() && is_new {
                step.events.extend(self.flush_error());
            }
        }
        if info.role == "user" && session == self.root {
            self.changes.prompt(&info.id, &info.summary);
        }
        self.roles.insert(info.id, info.role);
        Some(step)
    }

    fn flush_error(&mut self) -> Option<NewEvent> {
        let error = self.pending_error.take()?;
        Some(
            NewEvent::error(&super::outcome::error_code(&error.name), &error.message(), false, None)
                .severity(Severity::Warn),
        )
    }

    fn part_updated(&mut self, properties: &Value, session: &str) -> Option<Step> {
        let part = Part::deserialize(&properties["part"]).ok()?;
        if self.roles.get(&part.message_id).is_some_and(|role| role == "user") {
            return Some(Step::default());
        }
        if session == self.root {
            self.changes.step(&part);
        }
        if part.kind == "tool" {
            self.changes.tool(&part, |file| relative(&self.workdir, file).to_owned());
        }
        Some(match part.kind.as_str() {
            "text" if self.summaries.contains(&part.message_id) => self.text_part(&part, PartKind::Reasoning, session),
            "text" => self.text_part(&part, PartKind::Text, session),
            "reasoning" => self.text_part(&part, PartKind::Reasoning, session),
            "tool" => self.tool_part(&part, session),
            _ => Step::default(),
        })
    }

    fn usage_so_far(&self) -> NewEvent {
        let (input, output, cost) = self.spent();
        NewEvent::new(EventType::Usage, json!({ "input_tokens": input, "output_tokens": output, "cost": cost }))
            .severity(Severity::Debug)
    }

    fn text_part(&mut self, part: &Part, kind: PartKind, session: &str) -> Step {
        if self.finished_texts.contains(&part.id) {
            return Step::default();
        }
        if part.time.end.is_none() {
            if !self.texts.iter().any(|open| open.part == part.id) {
                let (part, session) = (part.id.clone(), session.to_owned());
                self.texts.push(OpenText { part, session, kind, text: String::new() });
            }
            return Step::default();
        }
        self.texts.retain(|open| open.part != part.id);
        self.finished_texts.insert(part.id.clone());
        let data = json!({ "part_id": part.id, "text": part.text, "final": true });
        let event = NewEvent::new(kind.event_type(), data);
        // After an error OpenCode ends what it had begun; the model has not.
        if session == self.root && self.pending_error.is_some() {
            return Step::event(event.with("abandoned", true));
        }
        if session == self.root && kind == PartKind::Text && !part.text.is_empty() {
            self.final_text = Some(part.text.clone());
        }
        Step::event(event)
    }

    fn part_delta(&mut self, properties: &Value) -> Option<Step> {
        let (part, delta) = (properties["partID"].as_str()?, properties["delta"].as_str()?);
        let open = self.texts.iter_mut().find(|open| open.part == part);
        let Some(open) = open.filter(|_| properties["field"] == "text") else {
            return Some(Step::default());
        };
        open.text.push_str(delta);
        let data = json!({ "part_id": part, "delta": delta });
        Some(Step::event(NewEvent::new(open.kind.event_type(), data)))
    }

    fn tool_part(&mut self, part: &Part, session: &str) -> Step {
        let mut step = Step::default();
        let state = &part.state;
        let ended = state.has_ended();
        let call = self.tools.entry(part.id.clone()).or_default();
        if (state.status == "running" || ended) && !call.announced {
            call.announced = true;
            step.events.push(tool_call(part));
            self.running.push((part.id.clone(), part.tool.clone()));
            self.of_this_answer.push((session.to_owned(), part.id.clone()));
            if let (false, "bash", Some(command)) = (ended, part.tool.as_str(), state.input["command"].as_str()) {
                step.shell_started = Some((part.id.clone(), command.to_owned()));
            }
        }
        if ended && !call.ended {
            call.ended = true;
            self.running.retain(|(id, _)| *id != part.id);
            step.events.push(tool_result(part));
            step.tool_ended = Some(part.id.clone());
        }
        step
    }

    fn status(&mut self, properties: &Value, session: &str, now_ms: i64) -> Option<Step> {
        let status = &properties["status"];
        Some(match status["type"].as_str()? {
            "busy" if session == self.root => Step::signal(Signal::Busy),
            "retry" => {
                let wait_ms = status["next"].as_i64().map_or(0, |next| (next - now_ms).max(0));
                let attempt = status["attempt"].as_u64().unwrap_or(0);
                let event = self.retry(attempt, wait_ms, &sentence(status["message"].as_str().unwrap_or("")), session);
                // The retry writes everything anew, in parts of its own.
                let mut events = self.abandon(|open| open.session == session);
                events.push(event);
                Step { events, signal: Some(Signal::Retry { wait_ms }), ..Step::default() }
            }
            // `session.idle` follows at once and is the one that counts.
            _ => Step::default(),
        })
    }

    /// The remark that a call of the model is made again, and that what the answer asked for so far was done.
    fn retry(&mut self, attempt: u64, wait_ms: i64, cause: &str, session: &str) -> NewEvent {
        let seconds = wait_ms as f64 / 1000.0;
        let mut message = format!("The model failed ({cause}); retry {attempt} follows in {seconds:.1} s.");
        let made: Vec<String> =
            self.of_this_answer.extract_if(.., |(of, _)| of == session).map(|(_, call)| call).collect();
        if !made.is_empty() {
            message.push_str(" The answer that broke off had begun to use tools; the next one may do the same again.");
        }
        let mut event = NewEvent::log(Severity::Warn, "model_retry", &message);
        event.data["attempt"] = json!(attempt);
        event.data["wait_ms"] = json!(wait_ms);
        if !made.is_empty() {
            event.data["calls"] = json!(made);
        }
        event
    }

    fn error(&mut self, properties: &Value, is_root: bool) -> Option<Step> {
        let error = NamedError::deserialize(&properties["error"]).ok()?;
        if !is_root {
            let code = super::outcome::error_code(&error.name);
            let event = NewEvent::error(&code, &error.message(), false, None).severity(Severity::Warn);
            return Some(Step::event(event));
        }
        // It may be said again in more words, when the run is idle already (OPENCODE.md "Traps").
        if self.pending_error.as_ref().is_some_and(|e| e.name == error.name && error.message().contains(&e.message())) {
            return Some(Step::signal(Signal::Error(error)));
        }
        let events = self.flush_error().into_iter().collect();
        self.pending_error = Some(error.clone());
        Some(Step { events, signal: Some(Signal::Error(error)), ..Step::default() })
    }

    fn todo(&mut self, properties: &Value, is_root: bool) -> Option<Step> {
        let items: Vec<Value> = properties["todos"]
            .as_array()?
            .iter()
            .map(|t| json!({ "content": t["content"], "status": t["status"], "priority": t["priority"] }))
            .collect();
        let todo = |items: &[Value]| NewEvent::new(EventType::Todo, json!({ "items": items }));
        // A sub-agent's list says nothing of the whole.
        if !is_root {
            return Some(Step::event(todo(&items)));
        }
        let counted: Vec<_> = items.iter().filter(|t| t["status"] != "cancelled").collect();
        let done = counted.iter().filter(|t| t["status"] == "completed").count();
        self.progress = match counted.len() {
            0 => None,
            all => u8::try_from(done * 100 / all).ok(),
        };
        Some(Step::event(todo(&items).with("progress", json!(self.progress))))
    }

    fn file_changed(&mut self, properties: &Value) -> Option<Step> {
        let (file, event) = (properties["file"].as_str()?, properties["event"].as_str()?);
        let change = match event {
            "add" => "added",
            "unlink" => "deleted",
            _ => "modified",
        };
        let path = relative(&self.workdir, file);
        if path == ".git" || path.starts_with(".git/") {
            return Some(Step::default());
        }
        if !self.files.iter().any(|f| f == path) {
            self.files.push(path.to_owned());
        }
        Some(Step::event(NewEvent::new(EventType::File, json!({ "path": path, "change": change }))))
    }
}

/// A path as it is shown: relative to the working directory where it is below it.
fn relative<'a>(workdir: &str, file: &'a str) -> &'a str {
    file.strip_prefix(workdir).and_then(|rest| rest.strip_prefix('/')).unwrap_or(file)
}

impl PartKind {
    fn event_type(self) -> EventType {
        match self {
            Self::Text => EventType::Message,
            Self::Reasoning => EventType::Reasoning,
        }
    }
}

/// What begins a tool call.
pub fn tool_call(part: &Part) -> NewEvent {
    let data = json!({ "call_id": part.id, "tool": part.tool, "args": part.state.input });
    NewEvent::new(EventType::ToolCall, data)
}

/// What ends one that has ended.
pub fn tool_result(part: &Part) -> NewEvent {
    let state = &part.state;
    let duration = match (state.time.start, state.time.end) {
        (Some(start), Some(end)) => Some(whole(end - start)),
        _ => None,
    };
    let mut data = json!({ "call_id": part.id, "tool": part.tool, "result": state.output, "duration_ms": duration });
    let mut severity = Severity::Info;
    // What OpenCode runs in place of a tool that does not exist; it counts as done there.
    let invalid = if part.tool == "invalid" { state.input["error"].as_str() } else { None };
    if let Some(error) = state.error.as_deref().or(invalid) {
        data["error"] = json!(error);
        severity = Severity::Warn;
    }
    if let Some(exit) = state.metadata.get("exit").filter(|exit| exit.is_number()) {
        data["exit_code"] = exit.clone();
    }
    NewEvent::new(EventType::ToolResult, data).severity(severity)
}

fn verbatim(event: &RawEvent) -> Step {
    let data = json!({ "type": event.kind, "properties": event.properties });
    Step::event(NewEvent::new(EventType::Opencode, data).severity(Severity::Debug))
}

fn permission_asked(properties: &Value) -> Option<Step> {
    let id = properties["id"].as_str()?;
    let data = json!({
        "request_id": id,
        "permission": properties["permission"],
        "patterns": properties["patterns"],
        "deadline": null,
    });
    Some(Step {
        events: vec![NewEvent::new(EventType::Permission, data).severity(Severity::Warn)],
        signal: Some(Signal::PermissionAsked { request_id: id.to_owned() }),
        ..Step::default()
    })
}

fn question_asked(properties: &Value) -> Option<Step> {
    let id = properties["id"].as_str()?;
    let data = json!({ "request_id": id, "questions": properties["questions"], "deadline": null });
    Some(Step {
        events: vec![NewEvent::new(EventType::Question, data).severity(Severity::Warn)],
        signal: Some(Signal::QuestionAsked { request_id: id.to_owned() }),
        ..Step::default()
    })
}

/// OpenCode's numbers are JavaScript's; what counts things is never negative.
pub(super) fn whole(number: f64) -> u64 {
    if number.is_finite() && number > 0.0 { number as u64 } else { 0 }
}
