//! Reading: one execution, the history, pages of a log, what an earlier life left unfinished.

use super::row::{EventRow, ExecutionRow, bigint, idempotency_of, text};
use super::{Store, StoreError};
use crate::model::{
    Event, EventType, ExecutionId, ExecutionRecord, Fingerprint, Idempotency, IdempotencyKey, SessionId, Severity,
    Status, Submitted, TaskId,
};
use chrono::{DateTime, Utc};
use sqlx::PgConnection;

/// Which executions of a project are asked for; an absent field asks for all.
#[derive(Clone, Debug, Default)]
pub struct HistoryFilter {
    pub task_id: Option<TaskId>,
    pub session_id: Option<SessionId>,
    pub status: Option<Status>,
    /// Created at this time or later.
    pub from: Option<DateTime<Utc>>,
    /// Created before this time.
    pub to: Option<DateTime<Utc>>,
}

/// A place in the history: the last execution of a page. The next page begins right after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cursor {
    pub created_at: DateTime<Utc>,
    pub id: ExecutionId,
}

impl Cursor {
    /// The place of this execution.
    pub fn of(record: &ExecutionRecord) -> Self {
        Self { created_at: record.created_at, id: record.id }
    }
}

/// Which events of a log are asked for.
#[derive(Clone, Debug)]
pub struct EventQuery {
    /// Events with a greater `seq` than this.
    pub after: u64,
    /// At most so many events.
    pub limit: u32,
    /// Only these types; `None` for all.
    pub types: Option<Vec<EventType>>,
    /// Only these severities; `None` for all.
    pub severities: Option<Vec<Severity>>,
}

impl Store {
    /// One execution of the project; `None` where there is none.
    ///
    /// # Errors
    /// [`StoreError`]; `Corrupt` where the row cannot be read.
    pub async fn execution(&self, project: &str, id: ExecutionId) -> Result<Option<ExecutionRecord>, StoreError> {
        let query = sqlx::query_as!(
            ExecutionRow,
            r#"SELECT id, project_id, owner, session_id, ordinal, status, reason, progress, last_seq, task::text AS "task!",
                      protections, final_message, error, files_modified, usage::text AS "usage!",
                      created_at, started_at, completed_at, paused_ms, epoch, generation,
                      idempotency_caller, idempotency_key, fingerprint
               FROM executions WHERE project_id = $1 AND id = $2 AND NOT forgotten"#,
            project,
            id.0
        );
        let row = self.run(async |connection: &mut PgConnection| Ok(query.fetch_optional(connection).await?)).await?;
        row.map(ExecutionRecord::try_from).transpose()
    }

    /// A page of the project's executions, newest first by `(created_at, id)`, those after `before`.
    ///
    /// # Errors
    /// [`StoreError`]; `Corrupt` where a row cannot be read.
    pub async fn history(
        &self,
        project: &str,
        filter: &HistoryFilter,
        before: Option<Cursor>,
        limit: u32,
    ) -> Result<Vec<ExecutionRecord>, StoreError> {
        let query = sqlx::query_as!(
            ExecutionRow,
            r#"SELECT id, project_id, owner, session_id, ordinal, status, reason, progress, last_seq, task::text AS "task!",
                      protections, final_message, error, files_modified, usage::text AS "usage!",
                      created_at, started_at, completed_at, paused_ms, epoch, generation,
                      idempotency_caller, idempotency_key, fingerprint
               FROM executions
               WHERE project_id = $1 AND NOT forgotten
                 AND ($2::uuid IS NULL OR task_id = $2)
                 AND ($3::uuid IS NULL OR session_id = $3)
                 AND ($4::text IS NULL OR status = $4)
                 AND ($5::timestamptz IS NULL OR created_at >= $5)
                 AND ($6::timestamptz IS NULL OR created_at < $6)
                 AND ($7::timestamptz IS NULL OR (created_at, id) < ($7, $8::uuid))
               ORDER BY created_at DESC, id DESC
               LIMIT $9"#,
            project,
            filter.task_id.map(|id| id.0),
            filter.session_id.map(|id| id.0),
            filter.status.map(Status::as_str),
            filter.from,
            filter.to,
            before.map(|cursor| cursor.created_at),
            before.map(|cursor| cursor.id.0),
            i64::from(limit)
        );
        let rows = self.run(async |connection: &mut PgConnection| Ok(query.fetch_all(connection).await?)).await?;
        rows.into_iter().map(ExecutionRecord::try_from).collect()
    }

    /// A page of an execution's log, in order. Empty where there is no such execution.
    ///
    /// # Errors
    /// [`StoreError`]; `Corrupt` where a row cannot be read.
    pub async fn events(&self, id: ExecutionId, query: &EventQuery) -> Result<Vec<Event>, StoreError> {
        let types: Option<Vec<String>> =
            query.types.as_ref().map(|types| types.iter().map(|t| t.as_str().to_owned()).collect());
        let severities: Option<Vec<String>> =
            query.severities.as_ref().map(|severities| severities.iter().map(|s| s.as_str().to_owned()).collect());
        let query = sqlx::query_as!(
            EventRow,
            r#"SELECT seq, type AS kind, severity, ts, envelope::text AS "envelope!"
               FROM execution_events
               WHERE execution_id = $1 AND seq > $2
                 AND ($3::text[] IS NULL OR type = ANY($3))
                 AND ($4::text[] IS NULL OR severity = ANY($4))
               ORDER BY seq
               LIMIT $5"#,
            id.0,
            bigint(query.after),
            types.as_deref(),
            severities.as_deref(),
            i64::from(query.limit)
        );
        let rows = self.run(async |connection: &mut PgConnection| Ok(query.fetch_all(connection).await?)).await?;
        rows.into_iter().map(Event::try_from).collect()
    }

    /// What the project has under a caller's key since a time, with its fingerprint: the newest of it; `None` for nothing.
    ///
    /// # Errors
    /// [`StoreError`]; `Corrupt` where a row cannot be read.
    pub async fn submitted_under(
        &self,
        project: &str,
        caller: &str,
        key: &IdempotencyKey,
        since: DateTime<Utc>,
    ) -> Result<Option<(Fingerprint, Submitted)>, StoreError> {
        let query = sqlx::query!(
            r#"SELECT id, task_id, session_id, created_at, fingerprint AS "fingerprint!"
               FROM executions
               WHERE project_id = $1 AND idempotency_caller = $2 AND idempotency_key = $3 AND created_at > $4
                 AND NOT forgotten
               ORDER BY created_at DESC LIMIT 1"#,
            project,
            &*text(caller),
            key.as_str(),
            since
        );
        let row = self.run(async |connection: &mut PgConnection| Ok(query.fetch_optional(connection).await?)).await?;
        row.map(|row| {
            let corrupt = |_| StoreError::Corrupt(format!("execution {}, column fingerprint", row.id));
            let submitted = Submitted {
                id: ExecutionId(row.id),
                task_id: TaskId(row.task_id),
                session_id: SessionId(row.session_id),
                created_at: row.created_at,
            };
            Ok((Fingerprint(row.fingerprint.try_into().map_err(corrupt)?), submitted))
        })
        .transpose()
    }

    /// The executions of the project that were submitted with a key after `since`, newest first, at most `limit`.
    ///
    /// # Errors
    /// [`StoreError`]; `Corrupt` where a row cannot be read.
    pub async fn submitted_with_key(
        &self,
        project: &str,
        since: DateTime<Utc>,
        limit: u32,
    ) -> Result<Vec<(Idempotency, Submitted)>, StoreError> {
        let query = sqlx::query!(
            r#"SELECT id, task_id, session_id, created_at, idempotency_caller AS "caller!", idempotency_key AS "key!",
                      fingerprint AS "fingerprint!"
               FROM executions
               WHERE project_id = $1 AND idempotency_key IS NOT NULL AND created_at > $2 AND NOT forgotten
               ORDER BY created_at DESC LIMIT $3"#,
            project,
            since,
            i64::from(limit)
        );
        let rows = self.run(async |connection: &mut PgConnection| Ok(query.fetch_all(connection).await?)).await?;
        rows.into_iter()
            .map(|row| {
                let idempotency = idempotency_of(row.caller, &row.key, &row.fingerprint)
                    .map_err(|column| StoreError::Corrupt(format!("execution {}, column {column}", row.id)))?;
                let submitted = Submitted {
                    id: ExecutionId(row.id),
                    task_id: TaskId(row.task_id),
                    session_id: SessionId(row.session_id),
                    created_at: row.created_at,
                };
                Ok((idempotency, submitted))
            })
            .collect()
    }
}
