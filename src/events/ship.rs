//! Takes what is in the journal to the database: in order, in batches, each as often as it takes.
//!
//! A batch may be delivered twice (the journal forgets a record only after the database has it), which the store does
//! not mind. While the database is away everything stays where it is. A reader finds there, by the index of a live
//! log, what is neither in memory any more nor in the database yet.

use super::Shared;
use super::commit::{Whose, size};
use super::live::Live;
use crate::failpoint;
use crate::journal::{Journal, Position};
use crate::model::ExecutionId;
use crate::store::{Store, Write};
use crate::tasks::Tasks;
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{oneshot, watch};
use tokio_util::sync::CancellationToken;

/// The most writes, and about the most bytes, that go to the database as one.
const BATCH: usize = 5000;
const BATCH_BYTES: usize = 8 * 1024 * 1024;
/// How much of what waits is kept in memory, in bytes; the rest is read from the journal when its turn comes.
const KEPT_BYTES: usize = 16 * 1024 * 1024;
/// The longest pause between two tries.
const MAX_PAUSE: Duration = Duration::from_secs(2);

/// The writes of a record of the journal as bytes.
pub(super) fn encode(writes: &[Write]) -> Vec<u8> {
    // Strings, numbers and maps with string keys always serialize.
    serde_json::to_vec(writes).unwrap_or_default()
}

/// And back.
pub(super) fn decode(record: &[u8]) -> io::Result<Vec<Write>> {
    serde_json::from_slice(record).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

/// A record of the journal that the database does not have.
#[derive(Debug)]
pub(super) struct Parcel {
    at: Position,
    after: Position,
    count: usize,
    bytes: usize,
    /// `None`: to be read from the journal.
    writes: Option<Vec<Write>>,
    logs: Vec<Part>,
    waiting: Vec<oneshot::Sender<bool>>,
    /// Something is deleted by it.
    deletes: bool,
}

/// What of a log is in it.
#[derive(Debug)]
struct Part {
    live: Arc<Live>,
    /// The last event; 0 where there is none.
    last: u64,
    /// Whether the log ends here.
    ends: bool,
}

impl Parcel {
    pub(super) fn new(at: Position, after: Position, owners: Vec<Whose>, writes: Vec<Write>) -> Self {
        let (mut logs, mut waiting): (Vec<Part>, _) = (Vec::new(), Vec::new());
        for (whose, write) in owners.into_iter().zip(&writes) {
            let live = match whose {
                Whose::Log(live) => live,
                Whose::Nobodys(sender) => {
                    waiting.extend(sender);
                    continue;
                }
            };
            let place = logs.iter().position(|part| part.live.id == live.id).unwrap_or_else(|| {
                logs.push(Part { live, last: 0, ends: false });
                logs.len() - 1
            });
            let part = &mut logs[place];
            match write {
                Write::Event { event, .. } => part.last = event.seq,
                Write::Change { record, .. } => part.ends |= record.status.is_final(),
                _ => {}
            }
        }
        let deletes = writes.iter().any(|write| matches!(write, Write::Delete { .. }));
        let bytes = writes.iter().map(size).sum();
        Self { at, after, count: writes.len(), bytes, writes: Some(writes), logs, waiting, deletes }
    }

    /// The same, to be read from the journal.
    pub(super) fn without_writes(self) -> Self {
        Self { writes: None, ..self }
    }
}

/// What waits for the database.
#[derive(Debug)]
pub(super) struct Outgoing {
    inner: Mutex<Inner>,
    /// Writes that were pushed, and that are delivered.
    pushed: watch::Sender<u64>,
    done: watch::Sender<u64>,
    trouble: watch::Sender<Option<String>>,
    /// The journal still holds something that was deleted.
    deleted: AtomicBool,
}

#[derive(Debug, Default)]
struct Inner {
    parcels: VecDeque<Parcel>,
    kept: usize,
}

impl Default for Outgoing {
    fn default() -> Self {
        Self {
            inner: Mutex::default(),
            pushed: watch::Sender::new(0),
            done: watch::Sender::new(0),
            trouble: watch::Sender::new(None),
            deleted: AtomicBool::new(false),
        }
    }
}

impl Outgoing {
    pub(super) fn push(&self, mut parcel: Parcel) {
        let count = parcel.count as u64;
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        if inner.kept + parcel.bytes > KEPT_BYTES {
            parcel.writes = None;
        } else if parcel.writes.is_some() {
            inner.kept += parcel.bytes;
        }
        inner.parcels.push_back(parcel);
        drop(inner);
        self.pushed.send_modify(|pushed| *pushed += count);
    }

    /// Waits until everything that was pushed before this call is delivered.
    pub(super) async fn delivered(&self) {
        let goal = *self.pushed.borrow();
        let mut done = self.done.subscribe();
        // The sender lives as long as `self`.
        let _ = done.wait_for(|done| *done >= goal).await;
    }

    /// Waits until something that was delivered has made this so.
    pub(super) async fn until(&self, is_so: impl Fn() -> bool) {
        let mut done = self.done.subscribe();
        let _ = done.wait_for(|_| is_so()).await;
    }

    /// Writes that the database does not have.
    pub(super) fn len(&self) -> usize {
        usize::try_from(*self.pushed.borrow() - *self.done.borrow()).unwrap_or(usize::MAX)
    }

    /// Why the database takes nothing, if it takes nothing.
    pub(super) fn trouble(&self) -> Option<String> {
        self.trouble.borrow().clone()
    }

    fn take(&self) -> Vec<Parcel> {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut taken, mut count, mut bytes) = (Vec::new(), 0, 0);
        while let Some(next) = inner.parcels.front() {
            if !taken.is_empty() && (count + next.count > BATCH || bytes + next.bytes > BATCH_BYTES) {
                break;
            }
            count += next.count;
            bytes += next.bytes;
            if next.writes.is_some() {
                inner.kept -= next.bytes;
            }
            taken.extend(inner.parcels.pop_front());
        }
        taken
    }
}

/// Runs until shutdown.
pub(super) async fn run(shared: Arc<Shared>, shutdown: CancellationToken) {
    let mut pushed = shared.outgoing.pushed.subscribe();
    loop {
        pushed.borrow_and_update();
        let parcels = shared.outgoing.take();
        if parcels.is_empty() {
            tokio::select! {
                changed = pushed.changed() => if changed.is_err() { return },
                () = shutdown.cancelled() => return,
            }
            continue;
        }
        if !ship(&shared, parcels, &shutdown).await {
            return;
        }
    }
}

/// Keeps an eye on the database until shutdown.
pub(super) async fn watch(store: Store, shutdown: CancellationToken) {
    tokio::select! {
        () = store.watch() => {}
        () = shutdown.cancelled() => {}
    }
}

/// Returns `false` where it was told to stop before the database had it all. It is still in the journal then.
async fn ship(shared: &Arc<Shared>, mut parcels: Vec<Parcel>, stop: &CancellationToken) -> bool {
    let mut writes = Vec::new();
    for parcel in &mut parcels {
        match parcel.writes.take() {
            Some(more) => writes.extend(more),
            None => match load(&shared.tasks, &shared.journal, parcel.at).await {
                Ok(more) => writes.extend(more),
                Err(error) => tracing::error!(%error, "a record of the journal is lost: the database never gets it"),
            },
        }
    }
    failpoint::pass("ship-begun");
    let Some(refused) = deliver(&shared.store, writes, &shared.outgoing.trouble, stop).await else { return false };
    failpoint::pass("ship-committed");
    let count: usize = parcels.iter().map(|parcel| parcel.count).sum();
    let after = parcels.last().map(|parcel| parcel.after);
    let deletes = parcels.iter().any(|parcel| parcel.deletes);
    for Parcel { logs, waiting, .. } in parcels {
        for Part { live, last, ends } in logs {
            let lost = refused.contains(&Some(live.id));
            if lost {
                live.give_up();
            } else {
                live.shipped(last);
            }
            if lost || ends {
                // From here on the store alone has it; readers that hold the head see that it has ended.
                shared.lock_live().remove(&live.id);
                shared.lock_ledger().shipped(live.id);
            }
        }
        for sender in waiting {
            // Where nobody waits any more it is written all the same.
            let _ = sender.send(!refused.contains(&None));
        }
    }
    failpoint::pass("ship-told");
    if let Some(after) = after {
        // What was deleted is to leave the disk as soon as nothing else is beside it.
        let deletes = deletes || shared.outgoing.deleted.load(Ordering::Relaxed);
        let journal = Arc::clone(&shared.journal);
        let summing = Arc::clone(shared);
        let released = shared.tasks.spawn_blocking(move || journal.release(after, deletes, || summing.summary())).await;
        let clean = released.unwrap_or_else(|error| Err(io::Error::other(error))).unwrap_or_else(|error| {
            tracing::warn!(%error, "a segment of the journal that is no more needed cannot be removed");
            false
        });
        shared.outgoing.deleted.store(deletes && !clean, Ordering::Relaxed);
    }
    // Last: whoever waits for room finds it.
    shared.outgoing.done.send_modify(|done| *done += count as u64);
    true
}

/// The writes of a record.
pub(super) async fn load(tasks: &Tasks, journal: &Arc<Journal>, at: Position) -> io::Result<Vec<Write>> {
    let journal = Arc::clone(journal);
    tasks.spawn_blocking(move || decode(&journal.get(at)?)).await.unwrap_or_else(|error| Err(io::Error::other(error)))
}

/// Writes until the database has it. What belongs to those that are named it never gets, or did not take as it was meant:
/// their logs are not this sidecar's any more. `None` stands for what belongs to no execution; without an answer it was
/// told to stop.
async fn deliver(
    store: &Store,
    writes: Vec<Write>,
    trouble: &watch::Sender<Option<String>>,
    stop: &CancellationToken,
) -> Option<Vec<Option<ExecutionId>>> {
    if let Ok(taken_over) = until_taken(store, &writes, trouble, stop).await? {
        return Some(taken_over);
    }
    // One execution's writes are refused for good. The others of the batch have nothing to do with it.
    let mut groups: BTreeMap<Option<ExecutionId>, Vec<Write>> = BTreeMap::new();
    for write in writes {
        // `None` comes first: a session before its executions.
        groups.entry(write.execution()).or_default().push(write);
    }
    let mut refused = Vec::new();
    for (id, writes) in groups {
        match until_taken(store, &writes, trouble, stop).await? {
            Ok(taken_over) => refused.extend(taken_over),
            Err(Refused) => {
                tracing::error!(
                    execution = id.map(tracing::field::display),
                    "what belongs to this cannot be written and is given up"
                );
                refused.push(id);
            }
        }
    }
    Some(refused)
}

/// The database never takes it.
struct Refused;

/// Once the database has the writes: those that were taken over by another sidecar. `None` where it was told to stop.
async fn until_taken(
    store: &Store,
    writes: &[Write],
    trouble: &watch::Sender<Option<String>>,
    stop: &CancellationToken,
) -> Option<Result<Vec<Option<ExecutionId>>, Refused>> {
    let mut pause = Duration::from_millis(50);
    loop {
        match store.commit(writes).await {
            Ok(committed) => {
                trouble.send_if_modified(|trouble| trouble.take().is_some());
                return Some(Ok(committed.taken_over.into_iter().map(Some).collect()));
            }
            Err(error) if error.is_transient() => {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    waiting = writes.len(),
                    "the database does not take events; trying again"
                );
                trouble.send_replace(Some(error.to_string()));
                tokio::select! {
                    () = tokio::time::sleep(pause) => {}
                    () = stop.cancelled() => return None,
                }
                pause = (pause * 2).min(MAX_PAUSE);
            }
            Err(error) => {
                tracing::error!(error = &error as &dyn std::error::Error, "the database refuses a batch");
                return Some(Err(Refused));
            }
        }
    }
}
