//! Sessions that outlive their executions, and their executions by place.

use super::row::{ExecutionRow, SessionRow, integer, text};
use super::{Store, StoreError};
use crate::model::{ExecutionRecord, SessionId, SessionRecord};
use chrono::{DateTime, Utc};
use sqlx::PgConnection;
use std::collections::HashMap;
use std::num::NonZeroU32;
use uuid::Uuid;

/// A session with the execution that its status is that of.
#[derive(Clone, Debug)]
pub struct SessionView {
    pub record: SessionRecord,
    /// The first of its executions that goes on, else the latest one; `None` where it has not had any.
    pub current: Option<ExecutionRecord>,
    /// How many it has had.
    pub executions: u32,
}

/// A place in the list of sessions: the last one of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SessionCursor {
    pub created_at: DateTime<Utc>,
    pub id: SessionId,
}

/// Makes it, or ends it. Returns whether it ended now without ever having had an execution.
pub(super) async fn put(connection: &mut PgConnection, record: &SessionRecord) -> Result<bool, StoreError> {
    let model = serde_json::to_string(&record.model).map_err(|e| sqlx::Error::Encode(e.into()))?;
    let system_prompt = record.system_prompt.as_deref().map(text);
    let before = sqlx::query!(
        r#"INSERT INTO sessions (project_id, id, owner, remote_id, model, system_prompt, created_at, ended_at)
           VALUES ($1, $2, $3, $4, $5::text::json, $6, $7, $8)
           ON CONFLICT DO NOTHING"#,
        &*text(&record.project_id),
        record.id.0,
        record.owner,
        record.remote_id,
        model,
        system_prompt.as_deref(),
        record.created_at,
        record.ended_at
    )
    .execute(&mut *connection)
    .await?;
    let Some(ended_at) = record.ended_at.filter(|_| before.rows_affected() == 0) else { return Ok(false) };
    let ended = sqlx::query_scalar!(
        r#"UPDATE sessions s SET ended_at = $3 WHERE project_id = $1 AND id = $2 AND ended_at IS NULL
           RETURNING NOT EXISTS (SELECT FROM executions e
                                 WHERE e.project_id = s.project_id AND e.session_id = s.id
                                   AND NOT e.forgotten) AS "unused!""#,
        &*text(&record.project_id),
        record.id.0,
        ended_at
    )
    .fetch_optional(connection)
    .await?;
    Ok(ended.unwrap_or(false))
}

impl Store {
    /// A session of the project; `None` where there is none.
    ///
    /// # Errors
    /// [`StoreError`]; `Corrupt` where a row cannot be read.
    pub async fn session(&self, project: &str, id: SessionId) -> Result<Option<SessionView>, StoreError> {
        let query = sqlx::query_as!(
            SessionRow,
            r#"SELECT id, project_id, owner, remote_id, model::text AS "model!", system_prompt, created_at, ended_at
               FROM sessions WHERE project_id = $1 AND id = $2"#,
            project,
            id.0
        );
        let row = self.run(async |connection: &mut PgConnection| Ok(query.fetch_optional(connection).await?)).await?;
        Ok(self.with_current(project, row.into_iter().collect()).await?.pop())
    }

    /// A page of the project's sessions, newest first, those after `before`.
    ///
    /// # Errors
    /// [`StoreError`]; `Corrupt` where a row cannot be read.
    pub async fn sessions(
        &self,
        project: &str,
        before: Option<SessionCursor>,
        limit: u32,
    ) -> Result<Vec<SessionView>, StoreError> {
        let query = sqlx::query_as!(
            SessionRow,
            r#"SELECT id, project_id, owner, remote_id, model::text AS "model!", system_prompt, created_at, ended_at
               FROM sessions
               WHERE project_id = $1 AND ($2::timestamptz IS NULL OR (created_at, id) < ($2, $3::uuid))
               ORDER BY created_at DESC, id DESC LIMIT $4"#,
            project,
            before.map(|cursor| cursor.created_at),
            before.map(|cursor| cursor.id.0),
            i64::from(limit)
        );
        let rows = self.run(async |connection: &mut PgConnection| Ok(query.fetch_all(connection).await?)).await?;
        self.with_current(project, rows).await
    }

    async fn with_current(&self, project: &str, rows: Vec<SessionRow>) -> Result<Vec<SessionView>, StoreError> {
        let ids: Vec<Uuid> = rows.iter().map(|row| row.id).collect();
        if ids.is_empty() {
            return Ok(Vec::new());
        }
        let query = sqlx::query_as!(
            ExecutionRow,
            r#"SELECT DISTINCT ON (session_id)
                      id, project_id, owner, session_id, ordinal, status, reason, progress, last_seq,
                      task::text AS "task!", protections, final_message, error, files_modified,
                      usage::text AS "usage!", created_at, started_at, completed_at, paused_ms, epoch, generation,
                      idempotency_caller, idempotency_key, fingerprint
               FROM executions
               WHERE project_id = $1 AND session_id = ANY($2) AND ordinal IS NOT NULL
               ORDER BY session_id, completed_at IS NULL DESC,
                        CASE WHEN completed_at IS NULL THEN ordinal END, ordinal DESC"#,
            project,
            &ids
        );
        let current = self.run(async |connection: &mut PgConnection| Ok(query.fetch_all(connection).await?)).await?;
        let mut current: HashMap<Uuid, ExecutionRow> = current.into_iter().map(|row| (row.session_id, row)).collect();
        let query = sqlx::query!(
            r#"SELECT session_id, max(ordinal) AS "ordinal!" FROM executions
               WHERE project_id = $1 AND session_id = ANY($2) AND ordinal IS NOT NULL GROUP BY session_id"#,
            project,
            &ids
        );
        let counts = self.run(async |connection: &mut PgConnection| Ok(query.fetch_all(connection).await?)).await?;
        let counts: HashMap<Uuid, i32> = counts.into_iter().map(|row| (row.session_id, row.ordinal)).collect();
        rows.into_iter()
            .map(|row| {
                let current = current.remove(&row.id).map(ExecutionRecord::try_from).transpose()?;
                let executions = counts.get(&row.id).and_then(|count| u32::try_from(*count).ok()).unwrap_or(0);
                Ok(SessionView { record: row.try_into()?, current, executions })
            })
            .collect()
    }

    /// The execution at this place of a session; `None` where it has not had so many.
    ///
    /// # Errors
    /// [`StoreError`]; `Corrupt` where the row cannot be read.
    pub async fn execution_in_session(
        &self,
        project: &str,
        session: SessionId,
        ordinal: NonZeroU32,
    ) -> Result<Option<ExecutionRecord>, StoreError> {
        let query = sqlx::query_as!(
            ExecutionRow,
            r#"SELECT id, project_id, owner, session_id, ordinal, status, reason, progress, last_seq,
                      task::text AS "task!", protections, final_message, error, files_modified,
                      usage::text AS "usage!", created_at, started_at, completed_at, paused_ms, epoch, generation,
                      idempotency_caller, idempotency_key, fingerprint
               FROM executions WHERE project_id = $1 AND session_id = $2 AND ordinal = $3"#,
            project,
            session.0,
            integer(ordinal)
        );
        let row = self.run(async |connection: &mut PgConnection| Ok(query.fetch_optional(connection).await?)).await?;
        row.map(ExecutionRecord::try_from).transpose()
    }

    /// The sessions of this sidecar that an earlier life left open.
    ///
    /// # Errors
    /// [`StoreError`]; `Corrupt` where a row cannot be read.
    pub async fn open_sessions(&self, owner: Uuid) -> Result<Vec<SessionRecord>, StoreError> {
        let query = sqlx::query_as!(
            SessionRow,
            r#"SELECT id, project_id, owner, remote_id, model::text AS "model!", system_prompt, created_at, ended_at
               FROM sessions WHERE owner = $1 AND ended_at IS NULL ORDER BY created_at, id"#,
            owner
        );
        let rows = self.run(async |connection: &mut PgConnection| Ok(query.fetch_all(connection).await?)).await?;
        rows.into_iter().map(SessionRecord::try_from).collect()
    }
}
