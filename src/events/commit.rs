//! The commit point: everything queued goes in batches to the journal, and is shown to readers after that.
//!
//! One task; while a batch is on its way the next one gathers, so that many events cost one write. A submission, an
//! end, a session and a deletion are brought to the disk before they are shown; of everything else a loss of power may
//! take the last [`SYNC`]. Where the disk takes nothing the batch is tried again until it does: nothing queued is
//! dropped, and a full queue slows down the writers. From here `ship` takes it to the database.

use super::live::Live;
use super::ship::Parcel;
use super::{Shared, ship};
use crate::failpoint;
use crate::journal::Position;
use crate::model::ExecutionRecord;
use crate::model::event::Event;
use crate::store::Write;
use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{oneshot, watch};
use tokio_util::sync::CancellationToken;

/// The most writes, and about the most bytes, that one batch takes, but for what goes with the last of them. It is one
/// record, for which there has to be room on the disk, and goes to the database as one.
const BATCH: usize = 2000;
const BATCH_BYTES: usize = 1024 * 1024;
/// Queued bytes of events beyond which `append` waits.
const QUEUE_BYTES: usize = 32 * 1024 * 1024;
/// The longest pause between two tries.
const MAX_PAUSE: Duration = Duration::from_secs(2);
/// How long what was shown may take to be safe from a loss of power.
const SYNC: Duration = Duration::from_millis(50);

#[derive(Debug)]
pub(super) struct Queue {
    inner: Mutex<VecDeque<Item>>,
    /// Counts up with each push; the committer waits on it.
    pushed: watch::Sender<u64>,
    /// Counts up with each committed write; bytes that are queued.
    done: watch::Sender<(u64, usize)>,
    /// Counts up with each batch that is in the journal and not synced.
    unsynced: watch::Sender<u64>,
    trouble: Mutex<Option<String>>,
}

/// A write, with the log that it belongs to or, for one that belongs to none, with who waits for it.
#[derive(Debug)]
pub(super) struct Item {
    write: Write,
    whose: Whose,
    /// It was pushed together with the next one, and goes with it: both are durable, or neither.
    goes_on: bool,
}

#[derive(Debug)]
pub(super) enum Whose {
    Log(Arc<Live>),
    /// Told when the database has it, if somebody is to be.
    Nobodys(Option<oneshot::Sender<bool>>),
}

impl Default for Queue {
    fn default() -> Self {
        Self {
            inner: Mutex::default(),
            pushed: watch::Sender::new(0),
            done: watch::Sender::new((0, 0)),
            unsynced: watch::Sender::new(0),
            trouble: Mutex::new(None),
        }
    }
}

/// About how much room a write takes, in bytes.
pub(super) fn size(write: &Write) -> usize {
    match write {
        Write::Event { event, .. } => event.json.len(),
        _ => 0,
    }
}

impl Queue {
    /// Queues writes of a log.
    pub(super) fn push(&self, live: &Arc<Live>, writes: Vec<Write>) {
        let count = writes.len();
        let item = |(at, write)| Item { write, whose: Whose::Log(Arc::clone(live)), goes_on: at + 1 < count };
        self.extend(writes.into_iter().enumerate().map(item).collect());
    }

    /// Queues a write of no log. The receiver is told when the database has it, or that it never will.
    pub(super) fn push_alone(&self, write: Write) -> oneshot::Receiver<bool> {
        let (sender, receiver) = oneshot::channel();
        self.extend(vec![Item { write, whose: Whose::Nobodys(Some(sender)), goes_on: false }]);
        receiver
    }

    fn extend(&self, items: Vec<Item>) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let count = items.len() as u64;
        let bytes: usize = items.iter().map(|item| size(&item.write)).sum();
        inner.extend(items);
        self.done.send_modify(|(_, queued)| *queued += bytes);
        self.pushed.send_modify(|pushed| *pushed += count);
    }

    pub(super) async fn room(&self) {
        if self.done.borrow().1 < QUEUE_BYTES {
            return;
        }
        let mut done = self.done.subscribe();
        // The sender lives as long as `self`.
        let _ = done.wait_for(|(_, queued)| *queued < QUEUE_BYTES).await;
    }

    pub(super) async fn flushed(&self) {
        let goal = *self.pushed.borrow();
        let mut done = self.done.subscribe();
        let _ = done.wait_for(|(done, _)| *done >= goal).await;
    }

    pub(super) fn len(&self) -> usize {
        usize::try_from(*self.pushed.borrow() - self.done.borrow().0).unwrap_or(usize::MAX)
    }

    pub(super) fn trouble(&self) -> Option<String> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set_trouble(&self, trouble: Option<String>) {
        *self.trouble.lock().unwrap_or_else(PoisonError::into_inner) = trouble;
    }

    fn take(&self) -> Vec<Item> {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut count, mut bytes, mut goes_on) = (0, 0, false);
        while let Some(next) = inner.get(count)
            && (goes_on || (count < BATCH && bytes < BATCH_BYTES))
        {
            count += 1;
            bytes += size(&next.write);
            goes_on = next.goes_on;
        }
        inner.drain(..count).collect()
    }
}

/// Runs until shutdown, and then until the queue is empty or its task is given up.
pub(super) async fn run(shared: Arc<Shared>, shutdown: CancellationToken) {
    let mut pushed = shared.queue.pushed.subscribe();
    loop {
        pushed.borrow_and_update();
        let batch = shared.queue.take();
        if batch.is_empty() {
            tokio::select! {
                changed = pushed.changed() => if changed.is_err() { return },
                () = shutdown.cancelled() => return,
            }
            continue;
        }
        commit(&shared, batch).await;
    }
}

/// Brings what was shown to the disk, soon after. Runs until shutdown, and once more then.
pub(super) async fn sync(shared: Arc<Shared>, shutdown: CancellationToken) {
    let mut unsynced = shared.queue.unsynced.subscribe();
    loop {
        tokio::select! {
            changed = unsynced.changed() => if changed.is_err() { return },
            () = shutdown.cancelled() => {}
        }
        tokio::select! {
            () = tokio::time::sleep(SYNC) => {}
            () = shutdown.cancelled() => {}
        }
        let journal = Arc::clone(&shared.journal);
        if let Ok(Err(error)) = shared.tasks.spawn_blocking(move || journal.sync()).await {
            tracing::error!(%error, "the journal cannot be synced: a loss of power may take what was shown");
        }
        if shutdown.is_cancelled() {
            return;
        }
    }
}

async fn commit(shared: &Shared, batch: Vec<Item>) {
    let count = batch.len() as u64;
    let bytes: usize = batch.iter().map(|item| size(&item.write)).sum();
    let (owners, writes): (Vec<_>, Vec<_>) = batch.into_iter().map(|item| (item.whose, item.write)).unzip();
    let (at, after) = until_taken(shared, &writes).await;
    shared.note(&writes);
    failpoint::pass("append-noted");
    publish(&owners, &writes, at, Live::publish);
    failpoint::pass("append-shown");
    shared.outgoing.push(Parcel::new(at, after, owners, writes));
    shared.queue.done.send_modify(|(done, queued)| {
        *done += count;
        *queued -= bytes;
    });
}

/// Whether it has to be on the disk, and not only on its way there, before anyone has it.
fn is_weighty(write: &Write) -> bool {
    match write {
        Write::Submit(_) | Write::Session(_) | Write::Delete { .. } | Write::Local { .. } => true,
        Write::Change { record, .. } => record.status.is_final(),
        Write::Event { .. } | Write::Progress(_) | Write::KeysKnown => false,
    }
}

/// **The commit point.** Returns once the journal has the writes.
async fn until_taken(shared: &Shared, writes: &[Write]) -> (Position, Position) {
    let mut pause = SYNC;
    let record: Arc<[u8]> = ship::encode(writes).into();
    let weighty = writes.iter().any(is_weighty);
    loop {
        let (journal, bytes) = (Arc::clone(&shared.journal), Arc::clone(&record));
        let taken = shared.tasks.spawn_blocking(move || {
            failpoint::pass("append-begun");
            let places = journal.append(&bytes)?;
            failpoint::pass("append-written");
            if weighty {
                journal.sync()?;
                failpoint::pass("append-synced");
            }
            Ok(places)
        });
        match taken.await.unwrap_or_else(|error| Err(io::Error::other(error))) {
            Ok(places) => {
                shared.queue.set_trouble(None);
                if !weighty {
                    shared.queue.unsynced.send_modify(|count| *count += 1);
                }
                return places;
            }
            Err(error) => {
                tracing::error!(%error, waiting = writes.len(), "the journal takes nothing; trying again");
                shared.queue.set_trouble(Some(format!("the journal takes nothing: {error}")));
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(MAX_PAUSE);
            }
        }
    }
}

/// How a log is told of what belongs to it.
type Tell = fn(&Live, Vec<Event>, Option<ExecutionRecord>, Position);

/// Tells each log what of a record of the journal belongs to it.
pub(super) fn publish(owners: &[Whose], writes: &[Write], at: Position, tell: Tell) {
    #[derive(Default)]
    struct News {
        events: Vec<Event>,
        record: Option<ExecutionRecord>,
    }
    let mut news: Vec<(&Arc<Live>, News)> = Vec::new();
    for (whose, write) in owners.iter().zip(writes) {
        let Whose::Log(live) = whose else { continue };
        let place = match news.iter().position(|(other, _)| other.id == live.id) {
            Some(place) => place,
            None => {
                news.push((live, News::default()));
                news.len() - 1
            }
        };
        let entry = &mut news[place].1;
        match write {
            Write::Event { event, .. } => entry.events.push(event.clone()),
            Write::Submit(record) | Write::Change { record, .. } | Write::Progress(record) => {
                entry.record = Some((**record).clone());
            }
            Write::Session(_) | Write::Delete { .. } | Write::Local { .. } | Write::KeysKnown => {}
        }
    }
    for (live, News { events, record }) in news {
        tell(live, events, record, at);
    }
}
