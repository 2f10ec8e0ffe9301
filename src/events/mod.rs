//! The event log: one per execution, one way in, one way out.
//!
//! - In: [`Events::begin`], [`Writer::append`] and [`Writer::change`] give an event its number and queue it. The
//!   committer takes what is queued in batches to the **commit point**, the journal on local disk, and only then shows it (see `commit`):
//!   what a reader has seen survives this process. From there it is shipped to the database (see `ship`), which may
//!   be away for as long as the journal has room.
//!   Before it has a number, an event loses what secrets it has (see `redaction`).
//! - Out: [`Events::read`] by a cursor, the `seq`, from memory, the journal or the database, wherever it is. REST
//!   pages, SSE, WebSocket and every other reader use it.
//!   [`Events::head`] says how far a log goes now; it is a level and carries no event, so there is no buffer per
//!   reader, no gap between old and new, and nothing to drop.
//! - Over restarts: what an earlier life left in the journal is read at the start (`replay`); what is still needed of
//!   the part that the journal has forgotten is in the `ledger`.

mod commit;
mod ledger;
mod live;
mod redaction;
mod replay;
mod ship;

pub use ledger::{OpenTool, Standing, open_tools};
pub use live::{Head, Writer};

use crate::journal::Journal;
use crate::model::event::{Event, EventType, NewEvent, Severity};
use crate::model::idempotency::KEY_LIFE;
use crate::model::{ExecutionId, ExecutionRecord, Idempotency, SessionRecord, Submitted};
use crate::secrets::Redactor;
use crate::store::{EventQuery, Fact, Store, StoreError, Write};
use crate::tasks::Tasks;
use crate::telemetry::Metrics;
use chrono::Utc;
use ledger::Ledger;
use live::{Found, Live};
use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::watch;

/// All logs of this sidecar. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Events {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    store: Store,
    project: String,
    metrics: Metrics,
    tasks: Tasks,
    journal: Arc<Journal>,
    /// The most that the journal may hold, in bytes.
    journal_max: u64,
    /// Those that go on, and those whose end the database does not have yet.
    live: Mutex<HashMap<ExecutionId, Arc<Live>>>,
    ledger: Mutex<Ledger>,
    queue: commit::Queue,
    outgoing: ship::Outgoing,
    /// Whether what looks like a secret is kept out of the logs; the session's own key always is.
    redacts: bool,
}

/// How long a reader of the database waits for what was written before it asked.
const SETTLE: Duration = Duration::from_secs(2);

/// What an earlier life left, of which somebody has to take care.
#[derive(Debug)]
pub struct Inherited {
    /// Executions without an end, in the order of their submission.
    pub standing: Vec<Standing>,
    /// Sessions without an end.
    pub sessions: Vec<SessionRecord>,
    /// What was submitted under a key in the last 24 h, the newest first.
    pub keys: Vec<(Idempotency, Submitted)>,
    /// Whether these are all that this project's database knew of when this sidecar first asked it.
    pub keys_known: bool,
}

/// What to read of a log.
#[derive(Clone, Debug, Default)]
pub struct ReadQuery {
    /// Only events after this one.
    pub after: u64,
    /// At most so many events; 0 counts as 1.
    pub limit: u32,
    pub types: Option<Vec<EventType>>,
    pub severities: Option<Vec<Severity>>,
}

/// A piece of a log.
#[derive(Clone, Debug)]
pub struct Page {
    pub events: Vec<Event>,
    /// Where to go on: everything up to here was looked at.
    pub next_after: u64,
    /// The last event of the log at this time.
    pub last_seq: u64,
}

impl Events {
    /// Reads what an earlier life left in the journal, and starts the committer and the shipper, which brings it to the
    /// database as soon as that is there. From nine tenths of `journal_max` bytes on nothing new is to be taken in. With
    /// `redacts`, what looks like a secret goes into no log.
    ///
    /// # Errors
    /// The journal cannot be read. Nothing is lost by that.
    pub async fn start(
        journal: Arc<Journal>,
        journal_max: u64,
        store: Store,
        project: String,
        metrics: Metrics,
        redacts: bool,
        tasks: &Tasks,
    ) -> io::Result<(Self, Inherited)> {
        metrics.looks_for(Redactor::kinds());
        let reader = Arc::clone(&journal);
        let left = tasks.spawn_blocking(move || replay::read(&reader)).await;
        let replay::Left { ledger, parcels, logs } = left.unwrap_or_else(|error| Err(io::Error::other(error)))?;
        let outgoing = ship::Outgoing::default();
        parcels.into_iter().for_each(|parcel| outgoing.push(parcel));
        let inherited = Inherited {
            standing: ledger.standing().into_iter().filter(|standing| !standing.record.status.is_final()).collect(),
            sessions: ledger.sessions(),
            keys: ledger
                .keys()
                .into_iter()
                .filter(|(of, ..)| *of == project)
                .map(|(_, idempotency, submitted)| (idempotency, submitted))
                .collect(),
            keys_known: ledger.keys_known && journal.is_whole(),
        };
        let shared = Arc::new(Shared {
            store,
            project,
            metrics,
            tasks: tasks.clone(),
            journal,
            journal_max,
            live: Mutex::new(logs),
            ledger: Mutex::new(ledger),
            queue: commit::Queue::default(),
            outgoing,
            redacts,
        });
        let stop = tasks.shutdown_token();
        tasks.spawn("event committer", commit::run(Arc::clone(&shared), stop.clone()));
        tasks.spawn("journal sync", commit::sync(Arc::clone(&shared), stop.clone()));
        tasks.spawn("database watch", ship::watch(shared.store.clone(), stop.clone()));
        tasks.spawn("event shipper", ship::run(Arc::clone(&shared), stop.clone()));
        Ok((Self { shared }, inherited))
    }

    /// Goes on with the log of an execution that an earlier life left in the journal; `None` where there is none.
    pub fn reopen(&self, id: ExecutionId) -> Option<Writer> {
        let live = self.shared.lock_live().get(&id).cloned()?;
        Some(Writer::new(Arc::clone(&self.shared), live))
    }

    /// Opens the log of a new execution (`record.last_seq` 0) or of one that another sidecar left in the database. The
    /// record is written with the first batch where it is new.
    pub fn open(&self, record: ExecutionRecord) -> Writer {
        let live = Arc::new(Live::new(record.clone()));
        self.shared.lock_live().insert(record.id, Arc::clone(&live));
        let writer = Writer::new(Arc::clone(&self.shared), live);
        if record.last_seq == 0 {
            writer.submit(record);
        }
        writer
    }

    /// Opens the log of a new execution with its first event, and with what only this sidecar keeps of it. All are
    /// queued as one, so that they become durable together. Returns the event's number too.
    pub fn begin(&self, record: ExecutionRecord, facts: Vec<Fact>, first: NewEvent) -> (Writer, u64) {
        let live = Arc::new(Live::new(record.clone()));
        self.shared.lock_live().insert(record.id, Arc::clone(&live));
        let writer = Writer::new(Arc::clone(&self.shared), live);
        let seq = writer.submit_with(record, facts, first);
        (writer, seq)
    }

    /// Writes a session that outlives its executions, as it stands now; after this, the database has it and whatever
    /// was queued before it. `false` where it never will.
    pub async fn put_session(&self, record: SessionRecord) -> bool {
        self.shared.queue.push_alone(Write::Session(Box::new(record))).await.unwrap_or(false)
    }

    /// Removes an execution that has ended, with its log, from the database and from the journal. It will be so, even
    /// where it is not yet so within `patience`: `false` then.
    pub async fn delete(&self, id: ExecutionId, patience: Duration) -> bool {
        let project = self.shared.project.clone();
        let deleted = self.shared.queue.push_alone(Write::Delete { project, execution: id });
        matches!(tokio::time::timeout(patience, deleted).await, Ok(Ok(true)))
    }

    /// How far the log of a live execution goes, and its record as committed; `None` for one whose end the database
    /// has, or that is unknown.
    pub fn head(&self, id: ExecutionId) -> Option<watch::Receiver<Head>> {
        self.shared.lock_live().get(&id).map(|live| live.subscribe())
    }

    /// The record of an execution as committed, live or ended.
    ///
    /// # Errors
    /// Where only the database knows it and cannot be asked.
    pub async fn record(&self, id: ExecutionId) -> Result<Option<Arc<ExecutionRecord>>, StoreError> {
        if let Some(head) = self.head(id) {
            let head = head.borrow();
            if head.committed {
                return Ok(Some(Arc::clone(&head.record)));
            }
            return Ok(None);
        }
        Ok(self.shared.store.execution(&self.shared.project, id).await?.map(Arc::new))
    }

    /// Reads a piece of a log that goes to `last_seq` now.
    ///
    /// # Errors
    /// Where only the database has it and cannot be asked.
    pub async fn read(&self, id: ExecutionId, last_seq: u64, query: &ReadQuery) -> Result<Page, StoreError> {
        let limit = query.limit.max(1);
        loop {
            let live = self.shared.lock_live().get(&id).cloned();
            let Some(live) = live else { return self.read_store(id, last_seq, None, query, limit).await };
            match live.find(query, limit) {
                Found::Here(page) => return Ok(page),
                Found::Shipped(upto) => return self.read_store(id, last_seq, Some(upto), query, limit).await,
                Found::Journal(at) => match ship::load(&self.shared.tasks, &self.shared.journal, at).await {
                    Ok(writes) => return Ok(page_of(id, live.subscribe().borrow().last_seq, writes, query, limit)),
                    // It was shipped in the meantime.
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    Err(error) => return Err(StoreError::Corrupt(format!("the journal: {error}"))),
                },
            }
        }
    }

    /// Out of the database, which has the log up to `upto` at least, or all of it.
    async fn read_store(
        &self,
        id: ExecutionId,
        last_seq: u64,
        upto: Option<u64>,
        query: &ReadQuery,
        limit: u32,
    ) -> Result<Page, StoreError> {
        let events = self
            .shared
            .store
            .events(
                id,
                &EventQuery {
                    after: query.after,
                    limit,
                    types: query.types.clone(),
                    severities: query.severities.clone(),
                },
            )
            .await?;
        Ok(page_of_stored(events, last_seq, upto, query.after, limit))
    }

    /// The execution is another sidecar's: its log is not this one's to go on with. Readers find it in the database.
    pub fn give_up(&self, id: ExecutionId) {
        if let Some(live) = self.shared.lock_live().remove(&id) {
            live.give_up();
        }
        self.shared.lock_ledger().shipped(id);
    }

    /// The keys that the database has are known from now on, over restarts too.
    pub fn keys_are_known(&self) {
        // Nobody waits for it: where it is lost they are asked for again.
        drop(self.shared.queue.push_alone(Write::KeysKnown));
    }

    /// Writes that wait for the commit point.
    pub fn pending(&self) -> usize {
        self.shared.queue.len()
    }

    /// Writes that are in the journal and not in the database.
    pub fn unshipped(&self) -> usize {
        self.shared.outgoing.len()
    }

    /// Why the journal takes nothing, for people; `None` where it does.
    pub fn trouble(&self) -> Option<String> {
        self.shared.queue.trouble()
    }

    /// Why the database takes nothing, for people; `None` where it does.
    pub fn outage(&self) -> Option<String> {
        self.shared.outgoing.trouble()
    }

    /// Bytes in the journal, and the most that there may be.
    pub fn journal(&self) -> (u64, u64) {
        (self.shared.journal.bytes(), self.shared.journal_max)
    }

    /// Whether the journal is so full that nothing new is to be taken in.
    pub fn is_full(&self) -> bool {
        let (bytes, max) = self.journal();
        bytes >= max - max / 10
    }

    /// Waits until everything that was queued before this call is in the journal and in the database.
    pub async fn flushed(&self) {
        self.shared.queue.flushed().await;
        self.shared.outgoing.delivered().await;
    }

    /// The same, but not for long: for who asks the database and wants to find what was told before.
    ///
    /// # Errors
    /// The database takes nothing now: even where it can be read, it would not say how things stand.
    pub async fn settled(&self) -> Result<(), StoreError> {
        // Either is known before the other: a commit may have hung for long when a server is found to say nothing.
        if self.outage().is_some() || self.shared.store.is_away() {
            return Err(StoreError::behind());
        }
        // Late: then the answer is that of the database, as it stands.
        let _ = tokio::time::timeout(SETTLE, self.flushed()).await;
        Ok(())
    }

    /// Executions whose log is live.
    pub fn live(&self) -> usize {
        self.shared.lock_live().len()
    }
}

/// What the database gave of a log of which it has all up to `upto` at least, or all there is.
fn page_of_stored(events: Vec<Event>, last_seq: u64, upto: Option<u64>, after: u64, limit: u32) -> Page {
    let full = events.len() >= limit as usize;
    let last_read = events.last().map_or(after, |event| event.seq);
    // A reader may ask for what is beyond the end: that makes the log no longer.
    let last_seq = events.last().map_or(last_seq, |event| last_seq.max(event.seq));
    let whole = upto.map_or(last_seq, |upto| upto.max(last_read));
    let next_after = if full { last_read } else { whole.max(after) };
    Page { events, next_after, last_seq }
}

/// What of a record of the journal a reader wants.
fn page_of(id: ExecutionId, last_seq: u64, writes: Vec<Write>, query: &ReadQuery, limit: u32) -> Page {
    let mut page = Page { events: Vec::new(), next_after: query.after, last_seq };
    for write in writes {
        let Write::Event { execution, event } = write else { continue };
        if execution != id || event.seq <= query.after {
            continue;
        }
        page.next_after = event.seq;
        if query.takes(&event) {
            page.events.push(event);
            if page.events.len() >= limit as usize {
                break;
            }
        }
    }
    page
}

impl ReadQuery {
    fn takes(&self, event: &Event) -> bool {
        self.types.as_ref().is_none_or(|types| types.contains(&event.kind))
            && self.severities.as_ref().is_none_or(|severities| severities.contains(&event.severity))
    }
}

impl Shared {
    /// Waits while very much is queued, or the journal has all that it may: what runs is slowed and never cut. Its
    /// changes of status do not wait.
    async fn room(&self) {
        self.queue.room().await;
        let has_room = || self.journal.bytes() < self.journal_max;
        if !has_room() {
            self.outgoing.until(has_room).await;
        }
    }

    /// Takes in what the journal has.
    fn note(&self, writes: &[Write]) {
        let mut ledger = self.lock_ledger();
        writes.iter().for_each(|write| ledger.apply(write));
    }

    /// What the journal is to remember where it forgets the rest.
    fn summary(&self) -> Vec<u8> {
        let mut ledger = self.lock_ledger();
        ledger.forget_keys_before(Utc::now() - KEY_LIFE);
        ledger.to_summary()
    }

    fn lock_ledger(&self) -> std::sync::MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_live(&self) -> std::sync::MutexGuard<'_, HashMap<ExecutionId, Arc<Live>>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_asks_for_what_is_beyond_the_end_makes_the_log_no_longer() {
        for upto in [None, Some(7)] {
            let page = page_of_stored(Vec::new(), 7, upto, 1_000, 10);
            assert_eq!((page.last_seq, page.next_after), (7, 1_000));
        }
    }
}
