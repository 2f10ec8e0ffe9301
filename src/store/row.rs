//! Between rows and the model's records. Every conversion that can fail says so; none guesses.

use super::StoreError;
use crate::model::{
    Event, EventType, ExecutionId, ExecutionRecord, Fingerprint, Idempotency, Reason, SessionId, SessionRecord,
    Severity, Status,
};
use chrono::{DateTime, Utc};
use std::borrow::Cow;
use std::num::NonZeroU32;
use uuid::Uuid;

/// A row of `executions`, its JSON as text.
#[derive(Debug)]
pub(super) struct ExecutionRow {
    pub(super) id: Uuid,
    pub(super) project_id: String,
    pub(super) owner: Uuid,
    pub(super) session_id: Uuid,
    pub(super) ordinal: Option<i32>,
    pub(super) status: String,
    pub(super) reason: Option<String>,
    pub(super) progress: Option<i16>,
    pub(super) last_seq: i64,
    pub(super) task: String,
    pub(super) protections: Vec<String>,
    pub(super) final_message: Option<String>,
    pub(super) error: Option<String>,
    pub(super) files_modified: Vec<String>,
    pub(super) usage: String,
    pub(super) created_at: DateTime<Utc>,
    pub(super) started_at: Option<DateTime<Utc>>,
    pub(super) completed_at: Option<DateTime<Utc>>,
    pub(super) paused_ms: i64,
    pub(super) idempotency_caller: Option<String>,
    pub(super) idempotency_key: Option<String>,
    pub(super) fingerprint: Option<Vec<u8>>,
    pub(super) epoch: i32,
    pub(super) generation: i32,
}

impl TryFrom<ExecutionRow> for ExecutionRecord {
    type Error = StoreError;

    fn try_from(row: ExecutionRow) -> Result<Self, StoreError> {
        let id = row.id;
        let corrupt = |column: &str| StoreError::Corrupt(format!("execution {id}, column {column}"));
        Ok(Self {
            id: ExecutionId(id),
            project_id: row.project_id,
            owner: row.owner,
            session_id: SessionId(row.session_id),
            ordinal: row.ordinal.map(|ordinal| ordinal_of(ordinal).ok_or_else(|| corrupt("ordinal"))).transpose()?,
            task: serde_json::from_str(&row.task).map_err(|_| corrupt("task"))?,
            status: Status::parse(&row.status).ok_or_else(|| corrupt("status"))?,
            reason: match row.reason {
                Some(word) => Some(Reason::parse(&word).ok_or_else(|| corrupt("reason"))?),
                None => None,
            },
            progress: row.progress.map(u8::try_from).transpose().map_err(|_| corrupt("progress"))?,
            last_seq: u64::try_from(row.last_seq).map_err(|_| corrupt("last_seq"))?,
            created_at: row.created_at,
            started_at: row.started_at,
            completed_at: row.completed_at,
            paused_ms: u64::try_from(row.paused_ms).map_err(|_| corrupt("paused_ms"))?,
            epoch: ordinal_of(row.epoch).ok_or_else(|| corrupt("epoch"))?,
            generation: ordinal_of(row.generation).ok_or_else(|| corrupt("generation"))?,
            protections: row.protections,
            final_message: row.final_message,
            error: row.error,
            files_modified: row.files_modified,
            usage: serde_json::from_str(&row.usage).map_err(|_| corrupt("usage"))?,
            idempotency: match (row.idempotency_caller, row.idempotency_key, row.fingerprint) {
                (None, None, None) => None,
                (Some(caller), Some(key), Some(fingerprint)) => {
                    Some(idempotency_of(caller, &key, &fingerprint).map_err(corrupt)?)
                }
                _ => return Err(corrupt("idempotency_key")),
            },
        })
    }
}

/// The columns of a key; the name of the one that cannot be read.
pub(super) fn idempotency_of(caller: String, key: &str, fingerprint: &[u8]) -> Result<Idempotency, &'static str> {
    Ok(Idempotency {
        caller,
        key: key.parse().map_err(|_| "idempotency_key")?,
        fingerprint: Fingerprint(fingerprint.try_into().map_err(|_| "fingerprint")?),
    })
}

/// A row of `execution_events`, its envelope as text.
#[derive(Debug)]
pub(super) struct EventRow {
    pub(super) seq: i64,
    pub(super) kind: String,
    pub(super) severity: String,
    pub(super) ts: DateTime<Utc>,
    pub(super) envelope: String,
}

impl TryFrom<EventRow> for Event {
    type Error = StoreError;

    fn try_from(row: EventRow) -> Result<Self, StoreError> {
        let corrupt = |column: &str| StoreError::Corrupt(format!("event {}, column {column}", row.seq));
        Ok(Self {
            seq: u64::try_from(row.seq).map_err(|_| corrupt("seq"))?,
            kind: EventType::parse(&row.kind).ok_or_else(|| corrupt("type"))?,
            severity: Severity::parse(&row.severity).ok_or_else(|| corrupt("severity"))?,
            timestamp: row.ts,
            json: row.envelope.into(),
        })
    }
}

/// A row of `sessions`, its JSON as text.
#[derive(Debug)]
pub(super) struct SessionRow {
    pub(super) id: Uuid,
    pub(super) project_id: String,
    pub(super) owner: Uuid,
    pub(super) remote_id: String,
    pub(super) model: String,
    pub(super) system_prompt: Option<String>,
    pub(super) created_at: DateTime<Utc>,
    pub(super) ended_at: Option<DateTime<Utc>>,
}

impl TryFrom<SessionRow> for SessionRecord {
    type Error = StoreError;

    fn try_from(row: SessionRow) -> Result<Self, StoreError> {
        let model = serde_json::from_str(&row.model);
        Ok(Self {
            id: SessionId(row.id),
            project_id: row.project_id,
            owner: row.owner,
            remote_id: row.remote_id,
            model: model.map_err(|_| StoreError::Corrupt(format!("session {}, column model", row.id)))?,
            system_prompt: row.system_prompt,
            created_at: row.created_at,
            ended_at: row.ended_at,
        })
    }
}

/// A place among the executions of a session; `None` for a number that is none.
pub(super) fn ordinal_of(value: i32) -> Option<NonZeroU32> {
    NonZeroU32::new(u32::try_from(value).ok()?)
}

/// A place as `integer`; the largest one where it does not fit.
pub(super) fn integer(ordinal: NonZeroU32) -> i32 {
    i32::try_from(ordinal.get()).unwrap_or(i32::MAX)
}

/// Text as Postgres can hold it: `text` has no NUL, so U+FFFD stands in for it.
pub(super) fn text(value: &str) -> Cow<'_, str> {
    if value.contains('\0') { Cow::Owned(value.replace('\0', "\u{fffd}")) } else { Cow::Borrowed(value) }
}

/// A list of texts as Postgres can hold it.
pub(super) fn texts(values: &[String]) -> Vec<String> {
    values.iter().map(|value| text(value).into_owned()).collect()
}

/// A count as `bigint`; the largest one where it does not fit.
pub(super) fn bigint(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}
