//! What the backend still has to be told: changes of status of the sessions that callers made, in their order.
//!
//! A change is written in the transaction of the status itself ([`super::Write`]), so none is lost and none is told
//! that did not happen. Whoever tells it removes it after the backend has taken it.
//!
//! The outbox is one per project: two sidecars that share both project and schema would both tell what is in it.

use super::row::ordinal_of;
use super::{Store, StoreError, Write};
use crate::model::{ExecutionRecord, SessionEventId, SessionId, Status};
use sqlx::PgConnection;
use std::collections::{BTreeMap, HashMap, HashSet};
use uuid::Uuid;

/// A change that waits to be told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Callback {
    /// Grows with each change; the order within a session.
    pub id: i64,
    pub session_id: SessionId,
    /// One of the backend's words: `pending`, `running`, `waiting_input`, `completed`, `failed`, `cancelled`.
    pub status: String,
    /// What went wrong, for people, where it failed.
    pub error: Option<String>,
}

/// The changes of one batch.
#[derive(Default)]
pub(super) struct News {
    /// Executions that wait or run, by session.
    unfinished: HashMap<Uuid, HashSet<Uuid>>,
    projects: Vec<String>,
    sessions: Vec<Uuid>,
    statuses: Vec<&'static str>,
    errors: Vec<Option<String>>,
}

/// The backend has no word for a pause: to it the session runs.
fn word(status: Status) -> &'static str {
    match status {
        Status::Paused => Status::Running.as_str(),
        other => other.as_str(),
    }
}

impl News {
    /// Reads how the sessions of a batch stand before it.
    pub(super) async fn before(connection: &mut PgConnection, writes: &[Write]) -> Result<Self, StoreError> {
        let record = |write: &Write| match write {
            Write::Submit(record) | Write::Change { record, .. } => record.ordinal.map(|_| record.session_id.0),
            _ => None,
        };
        let sessions: Vec<Uuid> = writes.iter().filter_map(record).collect();
        let mut news = Self::default();
        if sessions.is_empty() {
            return Ok(news);
        }
        let query = sqlx::query!(
            r#"SELECT session_id, id FROM executions
               WHERE session_id = ANY($1) AND ordinal IS NOT NULL AND completed_at IS NULL"#,
            &sessions
        );
        for row in query.fetch_all(connection).await? {
            news.unfinished.entry(row.session_id).or_default().insert(row.id);
        }
        Ok(news)
    }

    /// The changes of the batch in its order: a session's next execution may be submitted in the one that ends its last.
    /// `new` says of each submission and session whether it is one; `replaced`, of each row that changes, how many of
    /// its changes are none.
    pub(super) fn of(mut self, writes: &[Write], new: &[bool], mut replaced: BTreeMap<Uuid, usize>) -> Self {
        for (write, is_new) in writes.iter().zip(new) {
            match write {
                Write::Submit(record) if *is_new => self.change(record),
                Write::Session(record) if *is_new => {
                    self.push(&record.project_id, record.id, Status::Cancelled, None);
                }
                Write::Change { record, .. } => match replaced.get_mut(&record.id.0) {
                    Some(0) => self.change(record),
                    Some(before) => *before -= 1,
                    None => {}
                },
                _ => {}
            }
        }
        self
    }

    /// An execution's status. One that has a session of its own has nobody to tell; the first `pending` of a session is
    /// known to whoever made it. A prompt that waits behind another one, and the end of one that another waits behind,
    /// are no change of the session's status: it goes on.
    fn change(&mut self, record: &ExecutionRecord) {
        let Some(ordinal) = record.ordinal else { return };
        let unfinished = self.unfinished.entry(record.session_id.0).or_default();
        let goes_on = unfinished.iter().any(|id| *id != record.id.0);
        let news = match record.status {
            Status::Pending => {
                unfinished.insert(record.id.0);
                !goes_on && ordinal.get() > 1
            }
            status if status.is_final() => {
                unfinished.remove(&record.id.0);
                !goes_on
            }
            _ => true,
        };
        if news {
            let error = record.error.as_deref().filter(|_| record.status == Status::Failed);
            let error = error.map(|error| super::row::text(error).into_owned());
            self.push(&record.project_id, record.session_id, record.status, error);
        }
    }

    fn push(&mut self, project: &str, session: SessionId, status: Status, error: Option<String>) {
        self.projects.push(project.to_owned());
        self.sessions.push(session.0);
        self.statuses.push(word(status));
        self.errors.push(error);
    }

    /// Returns how many there are.
    pub(super) async fn write(self, connection: &mut PgConnection) -> Result<u64, StoreError> {
        if self.sessions.is_empty() {
            return Ok(0);
        }
        let done = sqlx::query!(
            r#"INSERT INTO callbacks (project_id, session_id, status, error)
               SELECT project_id, session_id, status, error
               FROM UNNEST($1::text[], $2::uuid[], $3::text[], $4::text[]) WITH ORDINALITY
                    AS n (project_id, session_id, status, error, place)
               ORDER BY place"#,
            &self.projects,
            &self.sessions,
            &self.statuses as &[&str],
            &self.errors as &[Option<String>]
        )
        .execute(connection)
        .await?;
        Ok(done.rows_affected())
    }
}

impl Store {
    /// The first change that waits of each session but the `except`, the one that has waited longest first.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn callbacks(
        &self,
        project: &str,
        except: &[SessionId],
        limit: u32,
    ) -> Result<Vec<Callback>, StoreError> {
        let except: Vec<Uuid> = except.iter().map(|session| session.0).collect();
        let query = sqlx::query!(
            r#"SELECT id, session_id, status, error
               FROM (SELECT DISTINCT ON (session_id) id, session_id, status, error
                     FROM callbacks WHERE project_id = $1 AND session_id <> ALL ($2) ORDER BY session_id, id) AS first
               ORDER BY id LIMIT $3"#,
            project,
            &except,
            i64::from(limit)
        );
        let rows = self.run(async |connection: &mut PgConnection| Ok(query.fetch_all(connection).await?)).await?;
        let callback = |id, session, status, error| Callback { id, session_id: SessionId(session), status, error };
        Ok(rows.into_iter().map(|row| callback(row.id, row.session_id, row.status, row.error)).collect())
    }

    /// How many changes wait.
    ///
    /// # Errors
    /// [`StoreError`]
    pub async fn callbacks_waiting(&self, project: &str) -> Result<u64, StoreError> {
        let query = sqlx::query_scalar!(r#"SELECT count(*) AS "count!" FROM callbacks WHERE project_id = $1"#, project);
        let count = self.run(async |connection: &mut PgConnection| Ok(query.fetch_one(connection).await?)).await?;
        Ok(u64::try_from(count).unwrap_or(0))
    }

    /// The backend has taken this one.
    ///
    /// # Errors
    /// [`StoreError`]; then it is told again.
    pub async fn callback_taken(&self, id: i64) -> Result<(), StoreError> {
        let query = sqlx::query!("DELETE FROM callbacks WHERE id = $1", id);
        self.run(async |connection: &mut PgConnection| Ok(query.execute(connection).await?)).await?;
        Ok(())
    }

    /// The backend does not know the session: nothing that waits is of use to it.
    ///
    /// # Errors
    /// [`StoreError`]; then it is told again.
    pub async fn callbacks_unwanted(&self, project: &str, session: SessionId) -> Result<(), StoreError> {
        let query = sqlx::query!("DELETE FROM callbacks WHERE project_id = $1 AND session_id = $2", project, session.0);
        self.run(async |connection: &mut PgConnection| Ok(query.execute(connection).await?)).await?;
        Ok(())
    }

    /// How far the logs go of the sessions that have an unfinished execution of this owner, and of those that are named:
    /// each at its first unfinished execution, or else at its latest. A session without any event has no place.
    ///
    /// # Errors
    /// [`StoreError`]; `Corrupt` where a row cannot be read.
    pub async fn places(
        &self,
        project: &str,
        owner: Option<Uuid>,
        named: &[SessionId],
    ) -> Result<Vec<(SessionId, SessionEventId)>, StoreError> {
        let named: Vec<Uuid> = named.iter().map(|session| session.0).collect();
        let query = sqlx::query!(
            r#"SELECT DISTINCT ON (session_id) session_id, ordinal AS "ordinal!", last_seq
               FROM executions
               WHERE project_id = $1 AND ordinal IS NOT NULL AND last_seq > 0
                 AND session_id IN (SELECT session_id FROM executions WHERE owner = $2 AND completed_at IS NULL
                                    UNION SELECT UNNEST($3::uuid[]))
               ORDER BY session_id, completed_at IS NOT NULL,
                        CASE WHEN completed_at IS NULL THEN ordinal ELSE -ordinal END"#,
            project,
            owner,
            &named
        );
        let rows = self.run(async |connection: &mut PgConnection| Ok(query.fetch_all(connection).await?)).await?;
        rows.into_iter()
            .map(|row| {
                let corrupt = |column: &str| {
                    StoreError::Corrupt(format!("an execution of session {}, column {column}", row.session_id))
                };
                let ordinal = ordinal_of(row.ordinal).ok_or_else(|| corrupt("ordinal"))?;
                let seq = u64::try_from(row.last_seq).map_err(|_| corrupt("last_seq"))?;
                Ok((SessionId(row.session_id), SessionEventId { ordinal, seq }))
            })
            .collect()
    }
}
