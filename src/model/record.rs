//! What is kept of an execution beside its log.

use super::execution::State;
use super::{ExecutionId, Idempotency, Reason, SessionId, Status, Submitted, Task};
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use std::num::NonZeroU32;
use uuid::Uuid;

/// What an execution has used. `null` where this sidecar cannot measure it on this host; never a guess.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Usage {
    pub input_tokens: u64,
    pub output_tokens: u64,
    /// Calls that reached the broker, failed ones and retries included.
    pub model_calls: u64,
    /// In US dollars: as the provider says it in its answers (`usage.cost`), else as OpenCode computes it; 0 where neither
    /// knows a price.
    pub cost: f64,
    /// User and system time of every process of the session that has ended, in seconds.
    pub cpu_seconds: Option<f64>,
    pub memory_bytes: Option<u64>,
    pub memory_peak_bytes: Option<u64>,
    pub pids: Option<u64>,
    pub read_bytes: Option<u64>,
    pub written_bytes: Option<u64>,
}

impl Usage {
    /// The same with what was used after it, by another process: counts are added, what is measured is the later one's.
    #[must_use]
    pub fn and_then(&self, later: Self) -> Self {
        Self {
            input_tokens: self.input_tokens + later.input_tokens,
            output_tokens: self.output_tokens + later.output_tokens,
            model_calls: self.model_calls + later.model_calls,
            cost: self.cost + later.cost,
            memory_peak_bytes: self.memory_peak_bytes.max(later.memory_peak_bytes),
            ..later
        }
    }
}

/// The row of an execution: what was asked for, and how it stands.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ExecutionRecord {
    pub id: ExecutionId,
    /// The pod's project; history is read within one only.
    pub project_id: String,
    /// The sidecar instance (its state directory) that runs it.
    pub owner: Uuid,
    pub session_id: SessionId,
    /// Place among the executions of a session that outlives them; `None` where the session is its own.
    pub ordinal: Option<NonZeroU32>,
    pub task: Task,
    pub status: Status,
    pub reason: Option<Reason>,
    /// 0–100, from the agent's to-do list; `None` where it keeps none.
    pub progress: Option<u8>,
    pub last_seq: u64,
    pub created_at: DateTime<Utc>,
    pub started_at: Option<DateTime<Utc>>,
    pub completed_at: Option<DateTime<Utc>>,
    pub paused_ms: u64,
    /// Which life of its log this is, from 1. A higher one: a loss of power may have taken events that a reader saw,
    /// and other events have their numbers.
    pub epoch: NonZeroU32,
    /// Counts up with each sidecar, and each life of one, that has to do with it. A status comes from the latest alone.
    pub generation: NonZeroU32,
    /// Protections that were on while it ran, by name.
    pub protections: Vec<String>,
    pub final_message: Option<String>,
    /// What went wrong, for people, where it failed.
    pub error: Option<String>,
    pub files_modified: Vec<String>,
    pub usage: Usage,
    /// The key that it was submitted with; `None` without one, and where the submission was refused after all.
    pub idempotency: Option<Idempotency>,
}

impl ExecutionRecord {
    /// A new execution that waits for its turn, with an id and a session of its own.
    pub fn new(project_id: &str, owner: Uuid, task: Task, protections: Vec<String>, now: DateTime<Utc>) -> Self {
        Self {
            id: ExecutionId::new(),
            project_id: project_id.to_owned(),
            owner,
            session_id: SessionId::new(),
            ordinal: None,
            task,
            status: Status::Pending,
            reason: None,
            progress: None,
            last_seq: 0,
            created_at: now,
            started_at: None,
            completed_at: None,
            paused_ms: 0,
            epoch: NonZeroU32::MIN,
            generation: NonZeroU32::MIN,
            protections,
            final_message: None,
            error: None,
            files_modified: Vec::new(),
            usage: Usage::default(),
            idempotency: None,
        }
    }

    /// What the answer to its submission says of it.
    pub fn submitted(&self) -> Submitted {
        Submitted { id: self.id, task_id: self.task.task_id, session_id: self.session_id, created_at: self.created_at }
    }

    /// Time on its own clock, in milliseconds; `None` before it started.
    pub fn duration_ms(&self, now: DateTime<Utc>) -> Option<u64> {
        let started = self.started_at?;
        let whole = (self.completed_at.unwrap_or(now) - started).num_milliseconds();
        Some(u64::try_from(whole).unwrap_or(0).saturating_sub(self.paused_ms))
    }

    /// Takes over what the state machine decided.
    pub fn set_state(&mut self, state: &State, now: DateTime<Utc>) {
        self.status = state.status;
        self.reason = state.reason;
        self.started_at = state.started_at;
        self.completed_at = state.completed_at;
        self.paused_ms = u64::try_from(state.paused_time(now).num_milliseconds()).unwrap_or(0);
    }
}
