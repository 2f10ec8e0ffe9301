//! The commit point: everything queued goes in batches to where it is durable, and is shown to readers after that.
//!
//! One task; while a batch is on its way the next one gathers, so that many events cost one transaction. Where the
//! database cannot be reached the batch is tried again until it can: nothing queued is dropped, and a full queue
//! slows down the writers.

use super::Shared;
use super::live::Live;
use crate::model::event::Event;
use crate::model::{ExecutionId, ExecutionRecord};
use crate::store::Write;
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{oneshot, watch};
use tokio_util::sync::CancellationToken;

/// The most writes that one batch takes.
const BATCH: usize = 2000;
/// Queued bytes of events beyond which `append` waits.
const QUEUE_BYTES: usize = 32 * 1024 * 1024;
/// The longest pause between two tries.
const MAX_PAUSE: Duration = Duration::from_secs(2);

#[derive(Debug)]
pub(super) struct Queue {
    inner: Mutex<Inner>,
    /// Counts up with each push; the committer waits on it.
    pushed: watch::Sender<u64>,
    /// Counts up with each committed write; bytes that are queued.
    done: watch::Sender<(u64, usize)>,
    trouble: Mutex<Option<String>>,
}

/// A write, with the log that it belongs to or, for one that belongs to none, with who waits for it.
#[derive(Debug)]
pub(super) struct Item {
    write: Write,
    whose: Whose,
}

#[derive(Debug)]
enum Whose {
    Log(Arc<Live>),
    Nobodys(oneshot::Sender<bool>),
}

#[derive(Debug, Default)]
struct Inner {
    writes: VecDeque<Item>,
}

impl Default for Queue {
    fn default() -> Self {
        Self {
            inner: Mutex::default(),
            pushed: watch::Sender::new(0),
            done: watch::Sender::new((0, 0)),
            trouble: Mutex::new(None),
        }
    }
}

fn size(write: &Write) -> usize {
    match write {
        Write::Event { event, .. } => event.json.len(),
        _ => 0,
    }
}

impl Queue {
    /// Queues writes of a log.
    pub(super) fn push(&self, live: &Arc<Live>, writes: Vec<Write>) {
        self.extend(writes.into_iter().map(|write| Item { write, whose: Whose::Log(Arc::clone(live)) }).collect());
    }

    /// Queues a write of no log. The receiver is told whether it was taken.
    pub(super) fn push_alone(&self, write: Write) -> oneshot::Receiver<bool> {
        let (sender, receiver) = oneshot::channel();
        self.extend(vec![Item { write, whose: Whose::Nobodys(sender) }]);
        receiver
    }

    fn extend(&self, items: Vec<Item>) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let count = items.len() as u64;
        let bytes: usize = items.iter().map(|item| size(&item.write)).sum();
        inner.writes.extend(items);
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
        let count = inner.writes.len().min(BATCH);
        inner.writes.drain(..count).collect()
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

async fn commit(shared: &Shared, batch: Vec<Item>) {
    let count = batch.len() as u64;
    let bytes: usize = batch.iter().map(|item| size(&item.write)).sum();
    let (owners, writes): (Vec<_>, Vec<_>) = batch.into_iter().map(|item| (item.whose, item.write)).unzip();
    if until_taken(shared, &writes).await {
        publish(shared, owners.into_iter().zip(writes));
    } else {
        // One execution's writes are refused for good. The others of the batch have nothing to do with it.
        let mut groups: BTreeMap<Option<ExecutionId>, (Vec<Whose>, Vec<Write>)> = BTreeMap::new();
        for (whose, write) in owners.into_iter().zip(writes) {
            // `None` comes first: a session before its executions.
            let id = match &whose {
                Whose::Log(live) => Some(live.id),
                Whose::Nobodys(_) => None,
            };
            let group = groups.entry(id).or_default();
            group.0.push(whose);
            group.1.push(write);
        }
        for (id, (owners, writes)) in groups {
            if until_taken(shared, &writes).await {
                publish(shared, owners.into_iter().zip(writes));
                continue;
            }
            tracing::error!(
                execution = id.map(tracing::field::display),
                "what belongs to this cannot be written and is given up"
            );
            for whose in owners {
                match whose {
                    Whose::Log(live) => {
                        live.give_up();
                        shared.lock_live().remove(&live.id);
                    }
                    Whose::Nobodys(done) => drop(done.send(false)),
                }
            }
        }
    }
    shared.queue.done.send_modify(|(done, queued)| {
        *done += count;
        *queued -= bytes;
    });
}

/// **The commit point.** `true` once the writes are durable, `false` where they never can be.
async fn until_taken(shared: &Shared, writes: &[Write]) -> bool {
    let mut pause = Duration::from_millis(50);
    loop {
        match shared.store.commit(writes).await {
            Ok(()) => {
                shared.queue.set_trouble(None);
                return true;
            }
            Err(error) if error.is_transient() => {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    waiting = writes.len(),
                    "the database does not take events; trying again"
                );
                shared.queue.set_trouble(Some(error.to_string()));
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(MAX_PAUSE);
            }
            Err(error) => {
                tracing::error!(error = &error as &dyn std::error::Error, "the database refuses a batch");
                return false;
            }
        }
    }
}

fn publish(shared: &Shared, batch: impl Iterator<Item = (Whose, Write)>) {
    #[derive(Default)]
    struct News {
        events: Vec<Event>,
        record: Option<ExecutionRecord>,
    }
    let mut news: Vec<(Arc<Live>, News)> = Vec::new();
    for (whose, write) in batch {
        let live = match whose {
            Whose::Log(live) => live,
            Whose::Nobodys(done) => {
                // Where nobody waits any more it is written all the same.
                let _ = done.send(true);
                continue;
            }
        };
        let at = match news.iter().position(|(other, _)| other.id == live.id) {
            Some(at) => at,
            None => {
                news.push((live, News::default()));
                news.len() - 1
            }
        };
        let entry = &mut news[at].1;
        match write {
            Write::Event { event, .. } => entry.events.push(event),
            Write::Submit(record) | Write::Change { record, .. } | Write::Progress(record) => {
                entry.record = Some(*record);
            }
            Write::Session(_) => {}
        }
    }
    for (live, News { events, record }) in news {
        if live.publish(events, record) {
            // From here on the store alone has it; readers that hold the head see that it has ended.
            shared.lock_live().remove(&live.id);
        }
    }
}
