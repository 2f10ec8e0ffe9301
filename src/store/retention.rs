//! Forgetting what is old, in two steps, each as small as the caller wants it.
//!
//! [`Store::expire`] marks executions as forgotten: one short transaction, after which nobody sees them.
//! [`Store::purge`] then removes them bit by bit. A log may have a million events: removed at once they would make a long
//! transaction, and removed bit by bit in view of readers they would be a log that begins in its middle.

use super::{Store, StoreError};
use chrono::{DateTime, Utc};
use sqlx::{Connection, PgConnection};
use uuid::Uuid;

/// Executions that one [`Store::purge`] looks at.
const PURGED_AT_ONCE: i64 = 50;

/// What was taken out of sight, or removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Forgotten {
    pub executions: u64,
    pub events: u64,
    pub sessions: u64,
    /// Changes of status that the backend never took.
    pub callbacks: u64,
}

impl Forgotten {
    /// Whether it is nothing at all.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

impl std::ops::AddAssign for Forgotten {
    fn add_assign(&mut self, other: Self) {
        self.executions += other.executions;
        self.events += other.events;
        self.sessions += other.sessions;
        self.callbacks += other.callbacks;
    }
}

impl Store {
    /// Takes out of sight what of the project ended before `before`, the oldest first: at most `limit` executions that had a
    /// session of their own, and at most `limit` sessions of callers, each with all its executions and with what the
    /// backend was still to be told of it. One that goes on is left, and all executions of a session that goes on.
    /// `executions` and `events` of what is returned are 0: they are only out of sight.
    ///
    /// # Errors
    /// [`StoreError`]; then nothing has changed.
    pub async fn expire(&self, project: &str, before: DateTime<Utc>, limit: u32) -> Result<Forgotten, StoreError> {
        let limit = i64::from(limit);
        self.run(async |connection: &mut PgConnection| {
            let mut transaction = connection.begin().await?;
            // Rows that another transaction holds have their turn later.
            sqlx::query!(
                r#"UPDATE executions SET forgotten = true
                   WHERE id = ANY (ARRAY(SELECT id FROM executions
                                         WHERE project_id = $1 AND ordinal IS NULL AND NOT forgotten
                                           AND created_at < $2 AND completed_at < $2
                                         ORDER BY created_at, id LIMIT $3 FOR UPDATE SKIP LOCKED))"#,
                project,
                before,
                limit
            )
            .execute(&mut *transaction)
            .await?;
            let sessions: Vec<Uuid> = sqlx::query_scalar!(
                r#"DELETE FROM sessions
                   WHERE project_id = $1 AND id = ANY (ARRAY(
                          SELECT s.id FROM sessions s
                          WHERE s.project_id = $1 AND s.created_at < $2 AND s.ended_at < $2
                            AND NOT EXISTS (SELECT FROM executions e
                                            WHERE e.project_id = $1 AND e.session_id = s.id AND e.ordinal IS NOT NULL
                                              AND (e.completed_at IS NULL OR e.completed_at >= $2))
                          ORDER BY s.created_at, s.id LIMIT $3 FOR UPDATE SKIP LOCKED))
                   RETURNING id"#,
                project,
                before,
                limit
            )
            .fetch_all(&mut *transaction)
            .await?;
            sqlx::query!(
                r#"UPDATE executions SET forgotten = true, ordinal = NULL
                   WHERE project_id = $1 AND session_id = ANY($2) AND ordinal IS NOT NULL"#,
                project,
                &sessions
            )
            .execute(&mut *transaction)
            .await?;
            let callbacks = sqlx::query!(
                "DELETE FROM callbacks WHERE project_id = $1 AND session_id = ANY($2)",
                project,
                &sessions
            )
            .execute(&mut *transaction)
            .await?;
            transaction.commit().await?;
            let sessions = u64::try_from(sessions.len()).unwrap_or(u64::MAX);
            Ok(Forgotten { sessions, callbacks: callbacks.rows_affected(), ..Forgotten::default() })
        })
        .await
    }

    /// Removes at most `limit` events of what the project has forgotten, from the end of each log, and the executions
    /// that have none left. Nothing is left to remove where it removes nothing.
    ///
    /// # Errors
    /// [`StoreError`]; then nothing has changed.
    pub async fn purge(&self, project: &str, limit: u32) -> Result<Forgotten, StoreError> {
        self.run(async |connection: &mut PgConnection| {
            let mut transaction = connection.begin().await?;
            let expired = sqlx::query!(
                r#"SELECT id, last_seq FROM executions WHERE project_id = $1 AND forgotten
                   LIMIT $2 FOR UPDATE SKIP LOCKED"#,
                project,
                PURGED_AT_ONCE
            )
            .fetch_all(&mut *transaction)
            .await?;
            // `last_seq` says where to go on: who looked for what is left would meet all that was removed before.
            let (mut ids, mut lasts, mut left) = (Vec::new(), Vec::new(), i64::from(limit));
            for row in expired {
                let removed = row.last_seq.min(left);
                left -= removed;
                ids.push(row.id);
                lasts.push(row.last_seq - removed);
                if left == 0 {
                    break;
                }
            }
            let events = sqlx::query!(
                r#"DELETE FROM execution_events e USING UNNEST($1::uuid[], $2::bigint[]) AS r (id, last_seq)
                   WHERE e.execution_id = r.id AND e.seq > r.last_seq"#,
                &ids,
                &lasts
            )
            .execute(&mut *transaction)
            .await?;
            let executions = sqlx::query!(
                r#"DELETE FROM executions x USING UNNEST($1::uuid[], $2::bigint[]) AS r (id, last_seq)
                   WHERE x.id = r.id AND r.last_seq = 0"#,
                &ids,
                &lasts
            )
            .execute(&mut *transaction)
            .await?;
            sqlx::query!(
                r#"UPDATE executions x SET last_seq = r.last_seq
                   FROM UNNEST($1::uuid[], $2::bigint[]) AS r (id, last_seq) WHERE x.id = r.id"#,
                &ids,
                &lasts
            )
            .execute(&mut *transaction)
            .await?;
            transaction.commit().await?;
            Ok(Forgotten {
                executions: executions.rows_affected(),
                events: events.rows_affected(),
                ..Forgotten::default()
            })
        })
        .await
    }
}
