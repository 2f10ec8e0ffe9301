//! Writing: one transaction per batch, idempotent as a whole.
//!
//! The rows that a batch is about are locked first. What to do with each follows from the status that its row
//! shows then ([`Plan`], pure); so a batch that was committed before, or whose execution was deleted in the
//! meantime, changes nothing, and a status is replaced only where it is the expected one.

use super::row::{bigint, integer, text, texts};
use super::{Store, StoreError, callbacks, lease, sessions};
use crate::failpoint;
use crate::model::{Event, ExecutionId, ExecutionRecord, Reason, SessionRecord, Status};
use serde::{Deserialize, Serialize};
use sqlx::{Connection, PgConnection};
use std::collections::BTreeMap;
use uuid::Uuid;

/// One thing to write.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Write {
    /// A new execution. One that exists already is left as it is.
    Submit(Box<ExecutionRecord>),
    /// An event of its log. One whose `seq` is there already, or whose execution does not exist, is skipped.
    Event { execution: ExecutionId, event: Event },
    /// A change of status from `expected` to what the record says, with everything else that the record holds.
    /// Skipped where the execution does not exist or the row shows the change already.
    Change { expected: Status, record: Box<ExecutionRecord> },
    /// A session that outlives its executions, as it stands now: made where it is not there yet, and never opened again
    /// where it has ended.
    Session(Box<SessionRecord>),
    /// An execution of the project is removed with its log.
    Delete { project: String, execution: ExecutionId },
    /// What this sidecar alone has to know; the database never gets it.
    Local { execution: ExecutionId, fact: Fact },
    /// The keys that the database has are known; it never gets this either.
    KeysKnown,
    /// `progress`, `usage`, `files_modified` and `last_seq` of an execution that goes on. A final row is left as it is.
    Progress(Box<ExecutionRecord>),
}

/// What is kept of an execution on the local disk and nowhere else, for as long as it has no end.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Fact {
    /// The key of its model, sealed under the sidecar's own.
    Credentials(String),
    /// OpenCode's id of the conversation that it is about to be prompted in.
    Conversation(String),
    /// How it has ended; only its processes are still to be ended before that is told.
    Outcome(Outcome),
}

/// How a run ended, before the execution has.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    pub reason: Reason,
    /// What the user is told of a failure.
    pub failure: Option<OutcomeFailure>,
}

/// The error event of an [`Outcome`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OutcomeFailure {
    pub code: String,
    pub message: String,
    /// In seconds, where a provider named one.
    pub retry_after: Option<u64>,
}

impl Write {
    /// The execution that it belongs to; `None` for what belongs to none.
    pub fn execution(&self) -> Option<ExecutionId> {
        match self {
            Self::Submit(record) | Self::Progress(record) | Self::Change { record, .. } => Some(record.id),
            Self::Event { execution, .. } | Self::Delete { execution, .. } | Self::Local { execution, .. } => {
                Some(*execution)
            }
            Self::Session(_) | Self::KeysKnown => None,
        }
    }
}

/// What the batch says about one execution's row: its changes of status as a chain, and its last record.
struct Plan<'a> {
    /// The status that the first change expects, then what each change leads to. Empty without a change.
    chain: Vec<Status>,
    /// The last record of the batch; its fields are the ones to keep.
    record: Option<&'a ExecutionRecord>,
    /// The greatest `seq` of the batch's events and records.
    last_seq: u64,
}

/// What to do with one row.
#[derive(Debug, PartialEq)]
enum Action {
    /// Only raise `last_seq`.
    Raise,
    /// Write the record's progress.
    Progress,
    /// Write the record with its status, over this one.
    Replace(Status),
}

impl<'a> Plan<'a> {
    /// Gathers a batch by execution.
    fn of(writes: &'a [Write]) -> Result<BTreeMap<Uuid, Self>, StoreError> {
        let mut plans = BTreeMap::new();
        for write in writes {
            let (id, seq) = match write {
                Write::Submit(record) | Write::Progress(record) | Write::Change { record, .. } => {
                    (record.id, record.last_seq)
                }
                Write::Event { execution, event } => (*execution, event.seq),
                Write::Session(_) | Write::Delete { .. } | Write::Local { .. } | Write::KeysKnown => continue,
            };
            let plan: &mut Self =
                plans.entry(id.0).or_insert_with(|| Self { chain: Vec::new(), record: None, last_seq: 0 });
            plan.last_seq = plan.last_seq.max(seq);
            match write {
                Write::Submit(_) | Write::Event { .. } => {}
                Write::Session(_) | Write::Delete { .. } | Write::Local { .. } | Write::KeysKnown => {}
                Write::Progress(record) => plan.record = Some(record),
                Write::Change { expected, record } => {
                    match plan.chain.last() {
                        None => plan.chain.push(*expected),
                        Some(last) if last == expected => {}
                        Some(last) => {
                            return Err(StoreError::Conflict { execution: id, expected: *expected, found: *last });
                        }
                    }
                    plan.chain.push(record.status);
                    plan.record = Some(record);
                }
            }
        }
        Ok(plans)
    }

    /// How many of the batch's changes lead to `found`: they were committed before.
    fn place(&self, found: Status) -> usize {
        self.chain.iter().position(|status| *status == found).unwrap_or(self.chain.len())
    }

    /// What to do where the row shows `found` and goes to `last_seq`. Any status of the chain is taken: the batch, or its
    /// first part, may have been committed before. Where the row goes further than the batch, all of it was, and what
    /// came after it too: a journal is shipped from its beginning after a restart.
    fn action(&self, id: Uuid, found: Status, last_seq: u64) -> Result<Action, StoreError> {
        if last_seq > self.last_seq {
            return Ok(Action::Raise);
        }
        match (self.chain.first(), self.chain.last()) {
            (Some(_), Some(last)) if found.is_final() && found == *last => Ok(Action::Raise),
            (Some(_), Some(_)) if self.chain.contains(&found) => Ok(Action::Replace(found)),
            (Some(first), _) => Err(StoreError::Conflict { execution: ExecutionId(id), expected: *first, found }),
            (None, _) if self.record.is_some() && !found.is_final() => Ok(Action::Progress),
            (None, _) => Ok(Action::Raise),
        }
    }
}

impl Store {
    /// Writes a batch in one transaction: submissions, then events, then the rows of executions, then deletions. May be repeated
    /// after a failure whose outcome is not known. Writes for an execution that does not exist (it was deleted) are
    /// skipped. Of one that was taken over from this sidecar only the events are taken, and the answer names it. The caller
    /// bounds the batch: at most some 10,000 writes and 16 MiB.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] where a row's status is neither the expected one nor one that the batch leads to;
    /// then, as with every error, nothing of the batch is kept (unless the connection broke during the commit).
    pub async fn commit(&self, writes: &[Write]) -> Result<Committed, StoreError> {
        if writes.is_empty() {
            return Ok(Committed::default());
        }
        let work = self.insist(async |connection: &mut PgConnection| {
            let mut transaction = connection.begin().await?;
            let committed = write_batch(self, &mut transaction, writes).await?;
            failpoint::pass("ship-in-transaction");
            transaction.commit().await?;
            Ok(committed)
        });
        let committed = work.await?;
        self.set_away(false);
        self.callbacks_are_written(committed.told);
        Ok(committed)
    }
}

/// What became of a batch that was written.
#[derive(Debug, Default)]
pub struct Committed {
    /// Executions that are another sidecar's now: of them no status was taken.
    pub taken_over: Vec<ExecutionId>,
    /// Changes that the backend is to be told of.
    pub(super) told: u64,
}

/// Writes a batch within a transaction.
pub(super) async fn write_batch(
    store: &Store,
    transaction: &mut PgConnection,
    writes: &[Write],
) -> Result<Committed, StoreError> {
    let plans = Plan::of(writes)?;
    let tell = if store.callbacks { Some(callbacks::News::before(transaction, writes).await?) } else { None };
    let mut news = Vec::new();
    for write in writes {
        news.push(match write {
            Write::Submit(record) => insert(transaction, record).await?,
            Write::Session(record) => sessions::put(transaction, record).await?,
            _ => false,
        });
    }
    let mut rows = lock(transaction, plans.keys().copied().collect()).await?;
    let mut committed = Committed::default();
    for (id, row) in rows.extract_if(.., |id, row| is_lost(store, row, plans.get(id))) {
        let id = ExecutionId(id);
        tracing::warn!(execution = %id, owner = %row.owner, "an execution was taken over by another sidecar");
        let late: Vec<&Event> = writes
            .iter()
            .filter_map(|write| match write {
                Write::Event { execution, event } if *execution == id => Some(event),
                _ => None,
            })
            .collect();
        lease::insert_late(transaction, id, &late).await?;
        committed.taken_over.push(id);
    }
    insert_events(transaction, writes, &rows).await?;
    let (mut raises, mut replaced) = (Vec::new(), BTreeMap::new());
    for (id, Row { status: found, last_seq, .. }) in rows {
        let Some(plan) = plans.get(&id) else { continue };
        match (plan.action(id, found, last_seq)?, plan.record) {
            (Action::Replace(expected), Some(record)) => {
                replaced.insert(id, plan.place(expected));
                replace(transaction, expected, record, plan.last_seq).await?;
            }
            (Action::Progress, Some(record)) => progress(transaction, record, plan.last_seq).await?,
            _ => raises.push((id, plan.last_seq)),
        }
    }
    raise(transaction, raises).await?;
    // Last: an execution is deleted after its end.
    for write in writes {
        if let Write::Delete { project, execution } = write {
            delete(transaction, project, *execution).await?;
        }
    }
    if let Some(tell) = tell {
        committed.told = tell.of(writes, &news, replaced).write(transaction).await?;
    }
    Ok(committed)
}

/// Whether an execution is another sidecar's now, or a later life's of the same one.
fn is_lost(store: &Store, row: &Row, plan: Option<&Plan<'_>>) -> bool {
    let is_late =
        |record: &ExecutionRecord| i32::try_from(record.generation.get()).unwrap_or(i32::MAX) < row.generation;
    store.owner.is_some_and(|owner| owner != row.owner) || plan.and_then(|plan| plan.record).is_some_and(is_late)
}

async fn delete(connection: &mut PgConnection, project: &str, id: ExecutionId) -> Result<(), StoreError> {
    sqlx::query!("DELETE FROM executions WHERE project_id = $1 AND id = $2", project, id.0).execute(connection).await?;
    Ok(())
}

fn json<T: Serialize>(value: &T) -> Result<String, StoreError> {
    serde_json::to_string(value).map_err(|e| sqlx::Error::Encode(e.into()).into())
}

/// `false` where it is there already.
async fn insert(connection: &mut PgConnection, record: &ExecutionRecord) -> Result<bool, StoreError> {
    let idempotency = record.idempotency.as_ref();
    let caller = idempotency.map(|of| text(&of.caller));
    let (final_message, error) = (record.final_message.as_deref().map(text), record.error.as_deref().map(text));
    let done = sqlx::query!(
        r#"INSERT INTO executions
             (id, project_id, owner, task_id, session_id, status, reason, progress, last_seq, task, protections,
              final_message, files_modified, usage, created_at, started_at, completed_at, paused_ms, ordinal, error,
              idempotency_caller, idempotency_key, fingerprint, epoch, generation)
           VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10::text::json, $11, $12, $13, $14::text::json, $15, $16, $17, $18,
                   $19, $20, $21, $22, $23, $24, $25)
           ON CONFLICT DO NOTHING"#,
        record.id.0,
        &*text(&record.project_id),
        record.owner,
        record.task.task_id.0,
        record.session_id.0,
        record.status.as_str(),
        record.reason.map(|reason| reason.as_str()),
        record.progress.map(i16::from),
        bigint(record.last_seq),
        json(&record.task)?,
        &texts(&record.protections),
        final_message.as_deref(),
        &texts(&record.files_modified),
        json(&record.usage)?,
        record.created_at,
        record.started_at,
        record.completed_at,
        bigint(record.paused_ms),
        record.ordinal.map(integer),
        error.as_deref(),
        caller.as_deref(),
        idempotency.map(|of| of.key.as_str()),
        idempotency.map(|of| &of.fingerprint.0[..]),
        integer(record.epoch),
        integer(record.generation)
    )
    .execute(connection)
    .await?;
    Ok(done.rows_affected() > 0)
}

/// What a row shows.
#[derive(Debug)]
struct Row {
    status: Status,
    last_seq: u64,
    owner: Uuid,
    generation: i32,
}

/// Locks the rows against deletion and other batches, in one order, and tells what each shows.
async fn lock(connection: &mut PgConnection, ids: Vec<Uuid>) -> Result<BTreeMap<Uuid, Row>, StoreError> {
    let query = sqlx::query!(
        "SELECT id, status, last_seq, owner, generation FROM executions WHERE id = ANY($1) ORDER BY id FOR NO KEY UPDATE",
        &ids
    );
    let rows = query.fetch_all(connection).await?;
    rows.into_iter()
        .map(|row| match Status::parse(&row.status) {
            Some(status) => {
                let last_seq = u64::try_from(row.last_seq).unwrap_or(0);
                Ok((row.id, Row { status, last_seq, owner: row.owner, generation: row.generation }))
            }
            None => Err(StoreError::Corrupt(format!("execution {}, column status", row.id))),
        })
        .collect()
}

/// All events of the batch in one statement, those of executions that do not exist left out.
async fn insert_events(
    connection: &mut PgConnection,
    writes: &[Write],
    rows: &BTreeMap<Uuid, Row>,
) -> Result<(), StoreError> {
    let (mut ids, mut seqs, mut types, mut severities, mut times, mut envelopes) =
        (Vec::new(), Vec::new(), Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for write in writes {
        let Write::Event { execution, event } = write else { continue };
        if rows.contains_key(&execution.0) {
            ids.push(execution.0);
            seqs.push(bigint(event.seq));
            types.push(event.kind.as_str());
            severities.push(event.severity.as_str());
            times.push(event.timestamp);
            envelopes.push(&*event.json);
        }
    }
    if ids.is_empty() {
        return Ok(());
    }
    sqlx::query!(
        r#"INSERT INTO execution_events (execution_id, seq, type, severity, ts, envelope)
           SELECT e.id, e.seq, e.type, e.severity, e.ts, e.envelope::json
           FROM UNNEST($1::uuid[], $2::bigint[], $3::text[], $4::text[], $5::timestamptz[], $6::text[])
                AS e (id, seq, type, severity, ts, envelope)
           ON CONFLICT DO NOTHING"#,
        &ids,
        &seqs,
        &types as &[&str],
        &severities as &[&str],
        &times,
        &envelopes as &[&str]
    )
    .execute(connection)
    .await?;
    Ok(())
}

/// Writes everything that may change, over the status that the locked row shows.
async fn replace(
    connection: &mut PgConnection,
    expected: Status,
    record: &ExecutionRecord,
    last_seq: u64,
) -> Result<(), StoreError> {
    let (final_message, error) = (record.final_message.as_deref().map(text), record.error.as_deref().map(text));
    sqlx::query!(
        r#"UPDATE executions
           SET status = $3, reason = $4, progress = $5, last_seq = GREATEST(last_seq, $6), protections = $7,
               final_message = $8, files_modified = $9, usage = $10::text::json,
               started_at = $11, completed_at = $12, paused_ms = $13, error = $14, epoch = $16, generation = $17,
               -- A submission that was refused after all gives its key back.
               idempotency_caller = CASE WHEN $15 THEN idempotency_caller END,
               idempotency_key = CASE WHEN $15 THEN idempotency_key END,
               fingerprint = CASE WHEN $15 THEN fingerprint END
           WHERE id = $1 AND status = $2"#,
        record.id.0,
        expected.as_str(),
        record.status.as_str(),
        record.reason.map(|reason| reason.as_str()),
        record.progress.map(i16::from),
        bigint(last_seq),
        &texts(&record.protections),
        final_message.as_deref(),
        &texts(&record.files_modified),
        json(&record.usage)?,
        record.started_at,
        record.completed_at,
        bigint(record.paused_ms),
        error.as_deref(),
        record.idempotency.is_some(),
        integer(record.epoch),
        integer(record.generation)
    )
    .execute(connection)
    .await?;
    Ok(())
}

async fn progress(connection: &mut PgConnection, record: &ExecutionRecord, last_seq: u64) -> Result<(), StoreError> {
    sqlx::query!(
        r#"UPDATE executions
           SET progress = $2, last_seq = GREATEST(last_seq, $3), files_modified = $4, usage = $5::text::json,
               epoch = $6, generation = $7
           WHERE id = $1"#,
        record.id.0,
        record.progress.map(i16::from),
        bigint(last_seq),
        &texts(&record.files_modified),
        json(&record.usage)?,
        integer(record.epoch),
        integer(record.generation)
    )
    .execute(connection)
    .await?;
    Ok(())
}

/// Raises `last_seq` where the batch had events and nothing else.
async fn raise(connection: &mut PgConnection, raises: Vec<(Uuid, u64)>) -> Result<(), StoreError> {
    let (ids, seqs): (Vec<Uuid>, Vec<i64>) = raises.into_iter().map(|(id, seq)| (id, bigint(seq))).unzip();
    if ids.is_empty() {
        return Ok(());
    }
    sqlx::query!(
        r#"UPDATE executions x SET last_seq = r.seq
           FROM UNNEST($1::uuid[], $2::bigint[]) AS r (id, seq)
           WHERE x.id = r.id AND x.last_seq < r.seq"#,
        &ids,
        &seqs
    )
    .execute(connection)
    .await?;
    Ok(())
}
