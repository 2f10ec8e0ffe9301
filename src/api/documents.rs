//! The JSON that the task routes answer with.

use crate::executions::View;
use crate::model::task::{Limits, ModelChoice};
use crate::model::{ExecutionId, ExecutionRecord, Reason, SessionId, Status, Submitted, TaskId, Usage, millis};
use chrono::{DateTime, Utc};
use serde::Serialize;
use serde_json::Value;
use std::num::NonZeroU32;

/// Where to go on from a submission.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub(crate) struct Links {
    pub(crate) status: String,
    pub(crate) stream: String,
    pub(crate) cancel: String,
}

impl Links {
    pub(crate) fn of(id: ExecutionId) -> Self {
        Self {
            status: format!("/tasks/{id}/status"),
            stream: format!("/tasks/{id}/stream"),
            cancel: format!("/tasks/{id}/cancel"),
        }
    }
}

/// The answer to a submission that was taken.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub(crate) struct Accepted {
    pub(crate) execution_id: ExecutionId,
    pub(crate) task_id: TaskId,
    pub(crate) session_id: SessionId,
    pub(crate) status: Status,
    #[serde(serialize_with = "millis::serialize")]
    pub(crate) created_at: DateTime<Utc>,
    pub(crate) links: Links,
}

impl Accepted {
    pub(crate) fn of(submitted: &Submitted) -> Self {
        Self {
            execution_id: submitted.id,
            task_id: submitted.task_id,
            session_id: submitted.session_id,
            status: Status::Pending,
            created_at: submitted.created_at,
            links: Links::of(submitted.id),
        }
    }
}

/// How an execution stands.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub(crate) struct StatusDocument {
    pub(crate) execution_id: ExecutionId,
    pub(crate) task_id: TaskId,
    pub(crate) session_id: SessionId,
    pub(crate) status: Status,
    /// Set with a final status.
    pub(crate) reason: Option<Reason>,
    /// 0–100, from the agent's own to-do list; null where it keeps none.
    pub(crate) progress: Option<u8>,
    pub(crate) current_tool: Option<String>,
    /// The last event of its log.
    pub(crate) last_seq: u64,
    /// Which life of the log this is. Where it is another one than before, a loss of power, or damage of the disk, may
    /// have taken the newest events, and their numbers came back with others: read again from the start.
    #[schema(value_type = u32, minimum = 1)]
    pub(crate) epoch: NonZeroU32,
    /// 1 is next; null where it does not wait.
    pub(crate) queue_position: Option<usize>,
    #[serde(serialize_with = "millis::serialize")]
    pub(crate) created_at: DateTime<Utc>,
    #[serde(serialize_with = "millis::option::serialize")]
    pub(crate) started_at: Option<DateTime<Utc>>,
    #[serde(serialize_with = "millis::option::serialize")]
    pub(crate) completed_at: Option<DateTime<Utc>>,
    /// Wall clock without the paused time; null before it started.
    pub(crate) duration_ms: Option<u64>,
    pub(crate) paused_ms: u64,
    pub(crate) usage: Usage,
}

impl StatusDocument {
    pub(crate) fn of(view: &View) -> Self {
        let record = &view.record;
        Self {
            execution_id: record.id,
            task_id: record.task.task_id,
            session_id: record.session_id,
            status: record.status,
            reason: record.reason,
            progress: record.progress,
            current_tool: view.current_tool.clone().filter(|_| !record.status.is_final()),
            last_seq: view.last_seq,
            epoch: record.epoch,
            queue_position: view.queue_position,
            created_at: record.created_at,
            started_at: record.started_at,
            completed_at: record.completed_at,
            duration_ms: record.duration_ms(Utc::now()),
            paused_ms: record.paused_ms,
            usage: record.usage.clone(),
        }
    }

    /// Of a row of the history, which is as committed.
    pub(crate) fn of_record(record: ExecutionRecord) -> Self {
        let last_seq = record.last_seq;
        Self::of(&View { record: record.into(), current_tool: None, queue_position: None, last_seq })
    }
}

/// The model that a task ran on, without its key.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub(crate) struct ModelDocument {
    pub(crate) provider: &'static str,
    pub(crate) model: String,
    /// The pinned version, as it was asked for.
    pub(crate) model_version: Option<String>,
    pub(crate) api_endpoint: String,
    pub(crate) temperature: Option<f64>,
    pub(crate) max_tokens: Option<u32>,
    /// OpenCode's names; null means all.
    pub(crate) enabled_tools: Option<Vec<String>>,
}

impl ModelDocument {
    fn of(model: &ModelChoice) -> Self {
        Self {
            provider: model.provider.as_str(),
            model: model.model.clone(),
            model_version: model.version.clone(),
            api_endpoint: model.endpoint.clone(),
            temperature: model.temperature,
            max_tokens: model.max_tokens,
            enabled_tools: model.enabled_tools.clone(),
        }
    }
}

/// The whole record of an execution.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub(crate) struct ExecutionDocument {
    #[serde(flatten)]
    pub(crate) standing: StatusDocument,
    pub(crate) prompt: Option<String>,
    pub(crate) code: Option<String>,
    pub(crate) context: Option<String>,
    pub(crate) model_config: ModelDocument,
    pub(crate) system_prompt: Option<String>,
    pub(crate) agent: Option<String>,
    pub(crate) workdir: Option<String>,
    pub(crate) timeout_seconds: u64,
    pub(crate) limits: Limits,
    pub(crate) metadata: Option<Value>,
    /// Protections that were on while it ran, by name.
    pub(crate) protections: Vec<String>,
    /// The agent's last finished text.
    pub(crate) final_message: Option<String>,
    /// What the agent's file tools changed. What its shell commands changed is not in it.
    pub(crate) files_modified: Vec<String>,
    pub(crate) links: Links,
}

impl ExecutionDocument {
    pub(crate) fn of(view: &View) -> Self {
        let record = &view.record;
        let task = &record.task;
        Self {
            standing: StatusDocument::of(view),
            prompt: task.prompt.clone(),
            code: task.code.clone(),
            context: task.context.clone(),
            model_config: ModelDocument::of(&task.model),
            system_prompt: task.system_prompt.clone(),
            agent: task.agent.clone(),
            workdir: task.workdir.clone(),
            timeout_seconds: task.timeout_seconds,
            limits: task.limits,
            metadata: task.metadata.clone(),
            protections: record.protections.clone(),
            final_message: record.final_message.clone(),
            files_modified: record.files_modified.clone(),
            links: Links::of(record.id),
        }
    }
}

/// A page of the history, newest first.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub(crate) struct HistoryDocument {
    pub(crate) executions: Vec<StatusDocument>,
    /// For the next page; null on the last one.
    pub(crate) next_cursor: Option<String>,
}

/// One event, as every reader gets it (REST, SSE, WebSocket). `data` has one schema per type, and some types have
/// members beside it.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub(crate) struct EventDocument {
    pub(crate) seq: u64,
    pub(crate) r#type: crate::model::EventType,
    pub(crate) data: Value,
    pub(crate) severity: crate::model::Severity,
    /// RFC 3339, UTC, milliseconds.
    pub(crate) timestamp: String,
}

/// A page of a log.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub(crate) struct EventsDocument {
    #[schema(value_type = Vec<EventDocument>)]
    pub(crate) events: Vec<Box<serde_json::value::RawValue>>,
    /// Give this as `after` to go on.
    pub(crate) next_after: u64,
    pub(crate) last_seq: u64,
}
