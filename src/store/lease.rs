//! Whose an execution is: the beats of each sidecar, what is taken over from one that has stopped, and what such a one
//! brings when it comes back.
//!
//! A lease is a count that goes up; whether it has run out is for whoever watches it to say, so that no two clocks have to
//! agree and an outage of the database lets none run out. What the database does is to refuse: a status of a former owner
//! is not taken, its events are.

use super::row::{ExecutionRow, bigint};
use super::write::{Write, write_batch};
use super::{Store, StoreError};
use crate::model::event::{Event, EventType, NewEvent, Severity};
use crate::model::{ExecutionId, ExecutionRecord};
use sqlx::{Connection, PgConnection};
use std::collections::BTreeSet;
use uuid::Uuid;

/// A sidecar that has something unfinished, and how far its count is; 0 where it never counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Beats {
    pub owner: Uuid,
    pub beats: i64,
}

impl Store {
    /// Counts up for a sidecar of the project, and tells how far the others are that have something unfinished.
    ///
    /// # Errors
    /// [`StoreError`]: nobody can write, or this one cannot.
    pub async fn beat(&self, project: &str, owner: Uuid) -> Result<Vec<Beats>, StoreError> {
        let work = self.run(async |connection: &mut PgConnection| {
            sqlx::query!(
                r#"INSERT INTO owners (owner, project_id, beats, beat_at) VALUES ($1, $2, 1, now())
                   ON CONFLICT (owner) DO UPDATE SET beats = owners.beats + 1, beat_at = now()"#,
                owner,
                project
            )
            .execute(&mut *connection)
            .await?;
            let others = sqlx::query_as!(
                Beats,
                r#"SELECT u.owner AS "owner!", COALESCE(o.beats, 0) AS "beats!"
                   FROM (SELECT owner FROM executions WHERE project_id = $1 AND completed_at IS NULL
                         UNION SELECT owner FROM sessions WHERE project_id = $1 AND ended_at IS NULL) u
                   LEFT JOIN owners o ON o.owner = u.owner
                   WHERE u.owner <> $2"#,
                project,
                owner
            );
            Ok(others.fetch_all(connection).await?)
        });
        work.await
    }

    /// Removes the counts of sidecars that are long gone and have left nothing.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn forget_owners(&self, project: &str) -> Result<(), StoreError> {
        let query = sqlx::query!(
            r#"DELETE FROM owners o WHERE project_id = $1 AND beat_at < now() - interval '1 day'
                 AND NOT EXISTS (SELECT FROM executions e WHERE e.owner = o.owner AND e.completed_at IS NULL)
                 AND NOT EXISTS (SELECT FROM sessions s WHERE s.owner = o.owner AND s.ended_at IS NULL)"#,
            project
        );
        self.run(async |connection: &mut PgConnection| Ok(query.execute(connection).await.map(drop)?)).await
    }

    /// Of these executions, those that the database says are another sidecar's now.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn taken_over(&self, owner: Uuid, ids: &[ExecutionId]) -> Result<BTreeSet<ExecutionId>, StoreError> {
        let ids: Vec<Uuid> = ids.iter().map(|id| id.0).collect();
        let query = sqlx::query_scalar!("SELECT id FROM executions WHERE id = ANY($1) AND owner <> $2", &ids, owner);
        let taken = self.run(async |connection: &mut PgConnection| Ok(query.fetch_all(connection).await?)).await?;
        Ok(taken.into_iter().map(ExecutionId).collect())
    }

    /// Takes executions over from a sidecar whose count still stands where it was seen, each as `records` has them, with
    /// the writes that end them; and ends its sessions. All or nothing: `false` where it has moved, or one of them has.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn take_over(
        &self,
        project: &str,
        from: Beats,
        by: Uuid,
        records: &[ExecutionRecord],
        writes: &[Write],
    ) -> Result<bool, StoreError> {
        let ids: Vec<Uuid> = records.iter().map(|record| record.id.0).collect();
        let seqs: Vec<i64> = records.iter().map(|record| bigint(record.last_seq)).collect();
        let statuses: Vec<&str> = records.iter().map(|record| record.status.as_str()).collect();
        let work = self.run(async |connection: &mut PgConnection| {
            let mut transaction = connection.begin().await?;
            let now = sqlx::query_scalar!("SELECT beats FROM owners WHERE owner = $1 FOR UPDATE", from.owner)
                .fetch_optional(&mut *transaction)
                .await?;
            if now.unwrap_or(0) != from.beats {
                return Ok(None);
            }
            let taken = sqlx::query!(
                r#"UPDATE executions x
                   SET owner = $1, generation = x.generation + 1, epoch = x.epoch + 1, taken_over_after = x.last_seq
                   FROM UNNEST($2::uuid[], $3::bigint[], $4::text[]) AS r (id, seq, status)
                   WHERE x.id = r.id AND x.last_seq = r.seq AND x.status = r.status AND x.owner = $5"#,
                by,
                &ids,
                &seqs,
                &statuses as &[&str],
                from.owner
            )
            .execute(&mut *transaction)
            .await?;
            if taken.rows_affected() != ids.len() as u64 {
                return Ok(None);
            }
            let told = write_batch(self, &mut transaction, writes).await?.told;
            sqlx::query!(
                "UPDATE sessions SET ended_at = now() WHERE project_id = $1 AND owner = $2 AND ended_at IS NULL",
                project,
                from.owner
            )
            .execute(&mut *transaction)
            .await?;
            sqlx::query!("DELETE FROM owners WHERE owner = $1", from.owner).execute(&mut *transaction).await?;
            transaction.commit().await?;
            Ok(Some(told))
        });
        let told = work.await?;
        self.callbacks_are_written(told.unwrap_or(0));
        Ok(told.is_some())
    }

    /// Every execution of a sidecar that has no final status, in the order of their submission.
    ///
    /// # Errors
    /// [`StoreError`]; `Corrupt` where a row cannot be read.
    pub async fn unfinished(&self, project: &str, owner: Uuid) -> Result<Vec<ExecutionRecord>, StoreError> {
        let query = sqlx::query_as!(
            ExecutionRow,
            r#"SELECT id, project_id, owner, session_id, ordinal, status, reason, progress, last_seq, task::text AS "task!",
                      protections, final_message, error, files_modified, usage::text AS "usage!",
                      created_at, started_at, completed_at, paused_ms, epoch, generation,
                      idempotency_caller, idempotency_key, fingerprint
               FROM executions WHERE project_id = $1 AND owner = $2 AND completed_at IS NULL ORDER BY created_at, id"#,
            project,
            owner
        );
        let rows = self.run(async |connection: &mut PgConnection| Ok(query.fetch_all(connection).await?)).await?;
        rows.into_iter().map(ExecutionRecord::try_from).collect()
    }
}

/// Events of a former owner that come after the execution was taken over from it. They go where they belong: after its
/// last one that is there, and before those of whoever took it over, which get new numbers for that. The log has another
/// epoch then.
pub(super) async fn insert_late(
    connection: &mut PgConnection,
    id: ExecutionId,
    events: &[&Event],
) -> Result<(), StoreError> {
    let row = sqlx::query!(
        r#"SELECT taken_over_after AS "after!" FROM executions WHERE id = $1 AND taken_over_after IS NOT NULL"#,
        id.0
    )
    .fetch_optional(&mut *connection)
    .await?;
    // Another one's from the beginning: nothing of it can be late.
    let Some(row) = row else { return Ok(()) };
    let after = u64::try_from(row.after).unwrap_or(0);
    // What was brought before is skipped: a batch may come twice.
    let late: Vec<&Event> = events.iter().copied().filter(|event| event.seq > after).collect();
    let Some(last) = late.last().map(|event| event.seq) else { return Ok(()) };
    let moved = last - after;
    let behind = sqlx::query!(
        r#"DELETE FROM execution_events WHERE execution_id = $1 AND seq > $2
           RETURNING seq, type AS kind, severity, ts, envelope::text AS "envelope!""#,
        id.0,
        bigint(after)
    )
    .fetch_all(&mut *connection)
    .await?;
    for event in late {
        let kept = as_remark(event);
        let (kind, severity) = (kept.kind.as_str(), kept.severity.as_str());
        insert(connection, id, bigint(kept.seq), kind, severity, kept.timestamp, &kept.json).await?;
    }
    for row in behind {
        let seq = row.seq.saturating_add(bigint(moved));
        // The number is the first member.
        let rest = row.envelope.split_once(',').map_or("", |(_, rest)| rest);
        let envelope = format!("{{\"seq\":{seq},{rest}");
        insert(connection, id, seq, &row.kind, &row.severity, row.ts, &envelope).await?;
    }
    sqlx::query!(
        "UPDATE executions SET taken_over_after = $2, last_seq = last_seq + $3, epoch = epoch + 1 WHERE id = $1",
        id.0,
        bigint(last),
        bigint(moved)
    )
    .execute(connection)
    .await?;
    Ok(())
}

async fn insert(
    connection: &mut PgConnection,
    id: ExecutionId,
    seq: i64,
    kind: &str,
    severity: &str,
    ts: chrono::DateTime<chrono::Utc>,
    envelope: &str,
) -> Result<(), StoreError> {
    sqlx::query!(
        r#"INSERT INTO execution_events (execution_id, seq, type, severity, ts, envelope)
           VALUES ($1, $2, $3, $4, $5, $6::text::json)"#,
        id.0,
        seq,
        kind,
        severity,
        ts,
        envelope
    )
    .execute(connection)
    .await?;
    Ok(())
}

/// A late event as it is kept: what says how the execution stands is a remark, since it does not stand so.
fn as_remark(event: &Event) -> Event {
    if !matches!(event.kind, EventType::Status | EventType::Complete) {
        return event.clone();
    }
    let said: serde_json::Value = serde_json::from_str(&event.json).unwrap_or_default();
    let message =
        "The sidecar that ran the task before said this after the task was taken over from it; it does not count.";
    let mut remark = NewEvent::log(Severity::Warn, "superseded", message);
    remark.data["type"] = event.kind.as_str().into();
    remark.data["said"] = said["data"].clone();
    remark.seal(event.seq, event.timestamp)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Status;
    use chrono::DateTime;

    #[test]
    fn a_status_that_does_not_count_is_a_remark_under_the_same_number() {
        let at = DateTime::from_timestamp_millis(1_795_221_961_195).unwrap();
        let late = NewEvent::status(Status::Completed, None, None).seal(7, at);
        let kept = as_remark(&late);
        assert_eq!((kept.seq, kept.kind, kept.timestamp), (7, EventType::Log, at));
        let envelope: serde_json::Value = serde_json::from_str(&kept.json).unwrap();
        assert_eq!((&envelope["data"]["code"], &envelope["data"]["said"]), (&"superseded".into(), &"completed".into()));
        let output = NewEvent::new(EventType::Stdout, "x".into()).seal(8, at);
        assert_eq!(as_remark(&output), output);
    }
}
