//! What goes on, told by the writes alone: executions and sessions without an end, and the keys of the last day. An end
//! counts once the database has it.
//!
//! The journal forgets what the database has. What a restart needs all the same, with the database or without, is here,
//! and goes into the journal's summary. Pure: the same writes give the same ledger, also where some of them are applied
//! again from the first of these on.

use crate::model::event::{NewEvent, Severity};
use crate::model::{
    Event, EventType, ExecutionId, ExecutionRecord, Fingerprint, Idempotency, SessionId, SessionRecord, Submitted,
};
use crate::store::{Fact, Outcome, Write};
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap, VecDeque};

/// How much of a tool's arguments is kept, in characters.
const ARGUMENTS: usize = 300;
/// How many calls of tools that have a result are remembered, the newest.
const ENDED_CALLS: usize = 256;

/// An execution whose end the database does not have.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Standing {
    /// As it stands; `last_seq` is that of its last event.
    pub record: ExecutionRecord,
    /// Calls of tools that have no result.
    pub open_tools: Vec<OpenTool>,
    /// The newest of those that have one, by their ids, in that order.
    #[serde(default)]
    pub ended_calls: VecDeque<String>,
    /// The key of its model, sealed.
    pub credentials: Option<String>,
    /// OpenCode's id of the conversation; set before it is prompted.
    pub conversation: Option<String>,
    /// How its run has ended, where it has.
    #[serde(default)]
    pub outcome: Option<Outcome>,
}

/// A call of a tool that has no result.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenTool {
    pub call_id: String,
    pub tool: String,
    /// As JSON, cut off where it is long.
    pub arguments: String,
}

impl OpenTool {
    /// Of the data of a `tool_call`; `None` where it has no id.
    pub fn of(call: &Value) -> Option<Self> {
        Some(Self {
            call_id: call["call_id"].as_str()?.to_owned(),
            tool: call["tool"].as_str().unwrap_or_default().to_owned(),
            arguments: call["args"].to_string().chars().take(ARGUMENTS).collect(),
        })
    }

    /// The result of a call that never got one.
    pub fn interrupted(&self) -> NewEvent {
        let Self { call_id, tool, .. } = self;
        let data =
            json!({ "call_id": call_id, "tool": tool, "result": null, "error": "interrupted", "duration_ms": null });
        NewEvent::new(EventType::ToolResult, data).severity(Severity::Warn)
    }
}

/// What is left of what was written.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Ledger {
    executions: BTreeMap<ExecutionId, Standing>,
    sessions: BTreeMap<SessionId, SessionRecord>,
    /// By project, caller and key, the newest of each.
    keys: HashMap<(String, String, String), (Fingerprint, Submitted)>,
    /// The database was asked for the keys that it has.
    pub(super) keys_known: bool,
}

/// A project, a key that was used in it, and for what.
pub(super) type Key = (String, Idempotency, Submitted);

/// The same as it is written: JSON has no maps of pairs.
#[derive(Serialize, Deserialize)]
struct Summary {
    executions: Vec<Standing>,
    sessions: Vec<SessionRecord>,
    keys: Vec<Key>,
    keys_known: bool,
}

impl Ledger {
    /// Takes a write in, in the order of the log.
    pub(super) fn apply(&mut self, write: &Write) {
        match write {
            Write::Submit(record) => {
                // One that was given back since is not taken again.
                let gave_back =
                    self.executions.get(&record.id).is_some_and(|standing| standing.record.idempotency.is_none());
                if let (Some(Idempotency { caller, key, fingerprint }), false) = (&record.idempotency, gave_back) {
                    let name = (record.project_id.clone(), caller.clone(), key.as_str().to_owned());
                    self.keys.insert(name, (*fingerprint, record.submitted()));
                }
                self.executions.entry(record.id).or_insert_with(|| Standing {
                    record: (**record).clone(),
                    open_tools: Vec::new(),
                    ended_calls: VecDeque::new(),
                    credentials: None,
                    conversation: None,
                    outcome: None,
                });
            }
            Write::Event { execution, event } => {
                if let Some(standing) = self.executions.get_mut(execution)
                    && event.seq > standing.record.last_seq
                {
                    standing.record.last_seq = event.seq;
                    if let Some(ended) = note_call(&mut standing.open_tools, event) {
                        standing.ended_calls.push_back(ended);
                        if standing.ended_calls.len() > ENDED_CALLS {
                            standing.ended_calls.pop_front();
                        }
                    }
                }
            }
            Write::Change { record, .. } => {
                let had_key = |standing: &Standing| standing.record.idempotency.is_some();
                if record.idempotency.is_none() && self.executions.get(&record.id).is_some_and(had_key) {
                    self.forget_key_of(record.id);
                }
                self.replace(record);
            }
            Write::Progress(record) => self.replace(record),
            Write::Session(record) => match record.ended_at {
                Some(_) => drop(self.sessions.remove(&record.id)),
                None => drop(self.sessions.insert(record.id, (**record).clone())),
            },
            Write::Delete { execution, .. } => {
                self.executions.remove(execution);
                self.forget_key_of(*execution);
            }
            Write::Local { execution, fact } => {
                if let Some(standing) = self.executions.get_mut(execution) {
                    match fact {
                        Fact::Credentials(sealed) => standing.credentials = Some(sealed.clone()),
                        Fact::Conversation(id) => standing.conversation = Some(id.clone()),
                        Fact::Outcome(outcome) => standing.outcome = Some(outcome.clone()),
                    }
                }
            }
            Write::KeysKnown => self.keys_known = true,
        }
    }

    fn replace(&mut self, record: &ExecutionRecord) {
        if let Some(standing) = self.executions.get_mut(&record.id) {
            let last_seq = standing.record.last_seq.max(record.last_seq);
            standing.record = ExecutionRecord { last_seq, ..record.clone() };
            if record.status.is_final() {
                // Nobody goes on with it.
                (standing.open_tools, standing.credentials) = (Vec::new(), None);
                standing.ended_calls = VecDeque::new();
            }
        }
    }

    fn forget_key_of(&mut self, id: ExecutionId) {
        self.keys.retain(|_, (_, submitted)| submitted.id != id);
    }

    /// Forgets the keys of submissions before this time.
    pub(super) fn forget_keys_before(&mut self, time: DateTime<Utc>) {
        self.keys.retain(|_, (_, submitted)| submitted.created_at >= time);
    }

    /// The database has the end of this one.
    pub(super) fn shipped(&mut self, id: ExecutionId) {
        self.executions.remove(&id);
    }

    /// Executions of which the database has no end, in the order of their submission.
    pub(super) fn standing(&self) -> Vec<Standing> {
        let mut standing: Vec<_> = self.executions.values().cloned().collect();
        standing.sort_by_key(|standing| (standing.record.created_at, standing.record.id));
        standing
    }

    /// Sessions without an end.
    pub(super) fn sessions(&self) -> Vec<SessionRecord> {
        self.sessions.values().cloned().collect()
    }

    /// What was submitted under a key, in which project; the newest first.
    pub(super) fn keys(&self) -> Vec<Key> {
        let mut keys: Vec<_> = self
            .keys
            .iter()
            .filter_map(|((project, caller, key), (fingerprint, submitted))| {
                let key = key.parse().ok()?;
                let idempotency = Idempotency { caller: caller.clone(), key, fingerprint: *fingerprint };
                Some((project.clone(), idempotency, submitted.clone()))
            })
            .collect();
        keys.sort_by_key(|(_, _, submitted)| std::cmp::Reverse((submitted.created_at, submitted.id)));
        keys
    }

    /// As bytes.
    pub(super) fn to_summary(&self) -> Vec<u8> {
        let summary = Summary {
            executions: self.standing(),
            sessions: self.sessions(),
            keys: self.keys(),
            keys_known: self.keys_known,
        };
        // Strings, numbers and maps with string keys always serialize.
        serde_json::to_vec(&summary).unwrap_or_default()
    }

    /// And back.
    pub(super) fn of_summary(bytes: &[u8]) -> serde_json::Result<Self> {
        let Summary { executions, sessions, keys, keys_known } = serde_json::from_slice(bytes)?;
        let key = |(project, of, submitted): Key| {
            ((project, of.caller, of.key.as_str().to_owned()), (of.fingerprint, submitted))
        };
        Ok(Self {
            executions: executions.into_iter().map(|standing| (standing.record.id, standing)).collect(),
            sessions: sessions.into_iter().map(|session| (session.id, session)).collect(),
            keys: keys.into_iter().map(key).collect(),
            keys_known,
        })
    }
}

/// The calls of a log, or of those of its events that tell of tools, that have no result.
pub fn open_tools(events: &[Event]) -> Vec<OpenTool> {
    let mut open = Vec::new();
    for event in events {
        note_call(&mut open, event);
    }
    open
}

/// Opens or closes a call, where the event does.
/// Gives the id of a call that has its result by this event.
fn note_call(open: &mut Vec<OpenTool>, event: &Event) -> Option<String> {
    if !matches!(event.kind, EventType::ToolCall | EventType::ToolResult) {
        return None;
    }
    let mut envelope: Value = serde_json::from_str(&event.json).ok()?;
    let data = envelope["data"].take();
    let call_id = data["call_id"].as_str()?.to_owned();
    open.retain(|open| open.call_id != call_id);
    if event.kind == EventType::ToolResult {
        return Some(call_id);
    }
    open.extend(OpenTool::of(&data));
    None
}

#[cfg(test)]
mod tests;
