//! The event log: one per execution, one way in, one way out.
//!
//! - In: [`Events::begin`], [`Writer::append`] and [`Writer::change`] give an event its number and queue it. The
//!   committer takes what is queued in batches to the **commit point** and only then shows it: an event is durable
//!   before any reader has it. Today the commit point is a transaction of `store` (see `commit`); a journal on local disk replaces
//!   exactly that call.
//! - Out: [`Events::read`] by a cursor, the `seq`. REST pages, SSE, WebSocket and every other reader use it.
//!   [`Events::head`] says how far a log goes now; it is a level and carries no event, so there is no buffer per
//!   reader, no gap between old and new, and nothing to drop.

mod commit;
mod live;

pub use live::{Head, Writer};

use crate::model::event::{Event, EventType, NewEvent, Severity};
use crate::model::{ExecutionId, ExecutionRecord, SessionRecord};
use crate::store::{EventQuery, Store, StoreError, Write};
use crate::tasks::Tasks;
use crate::telemetry::Metrics;
use live::Live;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
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
    live: Mutex<HashMap<ExecutionId, Arc<Live>>>,
    queue: commit::Queue,
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
    /// Starts the committer.
    pub fn start(store: Store, project: String, metrics: Metrics, tasks: &Tasks) -> Self {
        let shared = Arc::new(Shared {
            store,
            project,
            metrics,
            live: Mutex::new(HashMap::new()),
            queue: commit::Queue::default(),
        });
        tasks.spawn("event committer", commit::run(Arc::clone(&shared), tasks.shutdown_token().clone()));
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

    /// Writes a session that outlives its executions, as it stands now; after this, whatever was queued before it and
    /// itself are durable. `false` where it never can be.
    pub async fn put_session(&self, record: SessionRecord) -> bool {
        self.shared.queue.push_alone(Write::Session(Box::new(record))).await.unwrap_or(false)
    }

    /// How far the log of a live execution goes, and its record as committed; `None` for one that has ended (its
    /// record in the store is final then) or that is unknown.
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
        let live = self.shared.lock_live().get(&id).cloned();
        if let Some(page) = live.and_then(|live| live.read_tail(query, limit)) {
            return Ok(page);
        }
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
        let next_after = if full { last_read } else { last_seq.max(query.after) };
        Ok(Page { events, next_after, last_seq })
    }

    /// Writes that wait for the commit point.
    pub fn pending(&self) -> usize {
        self.shared.queue.len()
    }

    /// Whether the last try to commit failed; the reason, for people.
    pub fn trouble(&self) -> Option<String> {
        self.shared.queue.trouble()
    }

    /// Waits until everything that was queued before this call is committed.
    pub async fn flushed(&self) {
        self.shared.queue.flushed().await;
    }

    /// Executions whose log is live.
    pub fn live(&self) -> usize {
        self.shared.lock_live().len()
    }
}

impl Shared {
    fn lock_live(&self) -> std::sync::MutexGuard<'_, HashMap<ExecutionId, Arc<Live>>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
