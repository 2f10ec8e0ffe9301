//! The event log: one per execution, one way in, one way out.
//!
//! - In: [`Events::begin`], [`Writer::append`] and [`Writer::change`] give an event its number and queue it. The
//!   committer takes what is queued in batches to the **commit point**, the journal on local disk, and only then shows it (see `commit`):
//!   what a reader has seen survives this process. From there it is shipped to the database (see `ship`), which may
//!   be away for as long as the journal has room.
//! - Out: [`Events::read`] by a cursor, the `seq`, from memory, the journal or the database, wherever it is. REST
//!   pages, SSE, WebSocket and every other reader use it.
//!   [`Events::head`] says how far a log goes now; it is a level and carries no event, so there is no buffer per
//!   reader, no gap between old and new, and nothing to drop.

mod commit;
mod live;
mod ship;

pub use live::{Head, Writer};
pub use ship::{LeftError, ship_left};

use crate::journal::Journal;
use crate::model::event::{Event, EventType, NewEvent, Severity};
use crate::model::{ExecutionId, ExecutionRecord, SessionRecord};
use crate::store::{EventQuery, Store, StoreError, Write};
use crate::tasks::Tasks;
use crate::telemetry::Metrics;
use live::{Live, Place};
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
    queue: commit::Queue,
    outgoing: ship::Outgoing,
}

/// How long a reader of the database waits for what was written before it asked.
const SETTLE: Duration = Duration::from_secs(2);

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
    /// Starts the committer and the shipper. What an earlier life left in the journal has been shipped by then
    /// ([`ship_left`]). From nine tenths of `journal_max` bytes on nothing new is to be taken in.
    pub fn start(
        journal: Arc<Journal>,
        journal_max: u64,
        store: Store,
        project: String,
        metrics: Metrics,
        tasks: &Tasks,
    ) -> Self {
        let shared = Arc::new(Shared {
            store,
            project,
            metrics,
            tasks: tasks.clone(),
            journal,
            journal_max,
            live: Mutex::new(HashMap::new()),
            queue: commit::Queue::default(),
            outgoing: ship::Outgoing::default(),
        });
        let stop = tasks.shutdown_token();
        tasks.spawn("event committer", commit::run(Arc::clone(&shared), stop.clone()));
        tasks.spawn("journal sync", commit::sync(Arc::clone(&shared), stop.clone()));
        tasks.spawn("database watch", ship::watch(shared.store.clone(), stop.clone()));
        tasks.spawn("event shipper", ship::run(Arc::clone(&shared), stop.clone()));
        Self { shared }
    }

    /// Opens the log of a new execution (`record.last_seq` 0) or of one that an earlier life left behind. The
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

    /// Opens the log of a new execution with its first event. The two are queued as one, so that they become durable
    /// together. Returns the event's number too.
    pub fn begin(&self, record: ExecutionRecord, first: NewEvent) -> (Writer, u64) {
        let live = Arc::new(Live::new(record.clone()));
        self.shared.lock_live().insert(record.id, Arc::clone(&live));
        let writer = Writer::new(Arc::clone(&self.shared), live);
        let seq = writer.submit_with(record, first);
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
            if let Some(page) = live.read_tail(query, limit) {
                return Ok(page);
            }
            match live.place(query.after) {
                Place::Shipped(upto) => return self.read_store(id, last_seq, Some(upto), query, limit).await,
                Place::Journal(at) => match ship::load(&self.shared.tasks, &self.shared.journal, at).await {
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
        let full = events.len() >= limit as usize;
        let last_read = events.last().map_or(query.after, |event| event.seq);
        let last_seq = last_seq.max(last_read);
        let whole = upto.map_or(last_seq, |upto| upto.max(last_read));
        let next_after = if full { last_read } else { whole.max(query.after) };
        Ok(Page { events, next_after, last_seq })
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

    fn lock_live(&self) -> std::sync::MutexGuard<'_, HashMap<ExecutionId, Arc<Live>>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
