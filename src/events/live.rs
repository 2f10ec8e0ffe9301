//! The log of one live execution: numbers its events, and holds its newest committed ones in memory.

use super::redaction::Cleaner;
use super::{Page, ReadQuery, Shared};
use crate::journal::Position;
use crate::model::event::{Event, NewEvent};
use crate::model::{ExecutionId, ExecutionRecord, Status};
use crate::store::{Fact, Outcome, Write};
use chrono::{DateTime, Utc};
use secrecy::SecretString;
use serde_json::json;
use std::collections::VecDeque;
use std::sync::{Arc, PoisonError};
use tokio::sync::watch;

#[cfg(all(test, feature = "shuttle"))]
use shuttle::sync::Mutex;
#[cfg(not(all(test, feature = "shuttle")))]
use std::sync::Mutex;

/// How much of a log is kept in memory for its readers; older events come from the journal or the store.
const TAIL_BYTES: usize = if cfg!(all(test, feature = "shuttle")) { 150 } else { 1024 * 1024 };
/// How much of one that has ended, and only waits for the database: there may be many of those.
const ENDED_TAIL_BYTES: usize = 64 * 1024;

/// How far a log goes, as committed. A level: readers look at it, it is not a message.
#[derive(Clone, Debug)]
pub struct Head {
    pub last_seq: u64,
    pub record: Arc<ExecutionRecord>,
    /// When its last event happened; its creation before there is any.
    pub last_at: DateTime<Utc>,
    /// Whether the execution itself is written. Before that, nobody may know of it.
    pub committed: bool,
    /// Its last event is there: nothing follows.
    pub ended: bool,
    /// The log could not be written and is given up; its execution is lost to its readers.
    pub lost: bool,
}

#[derive(Debug)]
pub(super) struct Live {
    pub(super) id: ExecutionId,
    entrance: Mutex<Entrance>,
    tail: Mutex<Tail>,
    shipping: Mutex<Shipping>,
    head: watch::Sender<Head>,
}

/// What every event passes on its way in.
#[derive(Debug)]
struct Entrance {
    /// The number of the next one.
    next: u64,
    cleaner: Cleaner,
}

/// Where the events are.
#[derive(Debug)]
struct Shipping {
    /// The database has them up to this one.
    shipped: u64,
    /// The records of the journal that hold the others, each by its first event.
    records: VecDeque<(u64, Position)>,
}

/// Where a piece of a log is to be read.
pub(super) enum Found {
    /// It was in memory.
    Here(Page),
    /// In the database, which has the log up to this event at least.
    Shipped(u64),
    /// In this record of the journal.
    Journal(Position),
}

#[derive(Debug, Default)]
struct Tail {
    events: VecDeque<Event>,
    bytes: usize,
}

impl Live {
    pub(super) fn new(record: ExecutionRecord) -> Self {
        let head = Head {
            last_seq: record.last_seq,
            committed: record.last_seq > 0,
            last_at: record.created_at,
            ended: record.status.is_final(),
            record: Arc::new(record),
            lost: false,
        };
        Self {
            id: head.record.id,
            entrance: Mutex::new(Entrance { next: head.last_seq + 1, cleaner: Cleaner::default() }),
            tail: Mutex::default(),
            shipping: Mutex::new(Shipping { shipped: head.last_seq, records: VecDeque::new() }),
            head: watch::Sender::new(head),
        }
    }

    pub(super) fn subscribe(&self) -> watch::Receiver<Head> {
        self.head.subscribe()
    }

    /// What the commit point has taken, and where, becomes visible.
    pub(super) fn publish(&self, events: Vec<Event>, record: Option<ExecutionRecord>, at: Position) {
        let last = events.last().map(|event| (event.seq, event.timestamp));
        if let Some(first) = events.first() {
            self.lock_shipping().records.push_back((first.seq, at));
        }
        let ends = record.as_ref().is_some_and(|record| record.status.is_final());
        self.keep(events, if ends { ENDED_TAIL_BYTES } else { TAIL_BYTES });
        self.show(last, record);
    }

    /// The same for what an earlier life left there. It is read from there, and not kept in memory.
    pub(super) fn found(&self, events: Vec<Event>, record: Option<ExecutionRecord>, at: Position) {
        let last = events.last().map(|event| (event.seq, event.timestamp));
        if let Some(first) = events.first() {
            let mut shipping = self.lock_shipping();
            if shipping.records.is_empty() {
                // What came before it was released, so the database has it.
                shipping.shipped = first.seq - 1;
            }
            shipping.records.push_back((first.seq, at));
        }
        self.show(last, record);
    }

    /// All that was left is found: the next event follows it.
    pub(super) fn go_on(&self) {
        self.lock_entrance().next = self.head.borrow().last_seq + 1;
    }

    fn lock_entrance(&self) -> impl std::ops::DerefMut<Target = Entrance> {
        self.entrance.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn keep(&self, events: Vec<Event>, most: usize) {
        let mut tail = self.tail.lock().unwrap_or_else(PoisonError::into_inner);
        for event in events {
            tail.bytes += event.json.len();
            tail.events.push_back(event);
        }
        while tail.bytes > most
            && let Some(oldest) = tail.events.pop_front()
        {
            tail.bytes -= oldest.json.len();
        }
    }

    fn show(&self, last: Option<(u64, DateTime<Utc>)>, record: Option<ExecutionRecord>) {
        self.head.send_modify(|head| {
            head.committed = true;
            if let Some((seq, at)) = last.filter(|(seq, _)| *seq >= head.last_seq) {
                (head.last_seq, head.last_at) = (seq, at);
            }
            // A summary may be ahead of the records that are found.
            if let Some(record) = record.filter(|record| record.last_seq >= head.record.last_seq) {
                head.ended |= record.status.is_final();
                head.record = Arc::new(record);
            }
        });
    }

    /// The database has the events up to this one.
    pub(super) fn shipped(&self, last_seq: u64) {
        let mut shipping = self.lock_shipping();
        shipping.shipped = shipping.shipped.max(last_seq);
        while shipping.records.get(1).is_some_and(|(first, _)| *first <= shipping.shipped + 1) {
            shipping.records.pop_front();
        }
    }

    /// A piece of the log, or where it is now. It may have moved on when it is looked for there.
    pub(super) fn find(&self, query: &ReadQuery, limit: u32) -> Found {
        if let Some(page) = self.read_tail(query, limit) {
            return Found::Here(page);
        }
        let after = query.after;
        let shipping = self.lock_shipping();
        let at = shipping.records.partition_point(|(first, _)| *first <= after + 1);
        match at.checked_sub(1).and_then(|at| shipping.records.get(at)) {
            Some((_, position)) if after >= shipping.shipped => Found::Journal(*position),
            _ => Found::Shipped(shipping.shipped),
        }
    }

    fn lock_shipping(&self) -> impl std::ops::DerefMut<Target = Shipping> {
        self.shipping.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn give_up(&self) {
        self.head.send_modify(|head| {
            head.lost = true;
            head.ended = true;
        });
    }

    /// A piece out of memory; `None` where it begins before what memory holds.
    fn read_tail(&self, query: &ReadQuery, limit: u32) -> Option<Page> {
        let tail = self.tail.lock().unwrap_or_else(PoisonError::into_inner);
        let last_seq = self.head.borrow().last_seq;
        let first = tail.events.front().map_or(last_seq + 1, |event| event.seq);
        if query.after + 1 < first && query.after < last_seq {
            return None;
        }
        let mut page = Page { events: Vec::new(), next_after: query.after.max(last_seq), last_seq };
        let skip = usize::try_from((query.after + 1).saturating_sub(first)).unwrap_or(usize::MAX);
        for event in tail.events.iter().skip(skip).take_while(|event| event.seq <= last_seq) {
            if query.takes(event) {
                page.events.push(event.clone());
                if page.events.len() >= limit as usize {
                    page.next_after = event.seq;
                    break;
                }
            }
        }
        Some(page)
    }
}

/// The one way into the log of one execution.
#[derive(Clone, Debug)]
pub struct Writer {
    shared: Arc<Shared>,
    live: Arc<Live>,
}

impl Writer {
    pub(super) fn new(shared: Arc<Shared>, live: Arc<Live>) -> Self {
        live.lock_entrance().cleaner.look_for_shapes(shared.redacts);
        Self { shared, live }
    }

    /// This is one of the session's own secrets: it is to be in nothing that goes into the log from now on.
    pub fn hide(&self, key: &SecretString) {
        self.live.lock_entrance().cleaner.hide(key);
    }

    pub(super) fn submit(&self, record: ExecutionRecord) {
        self.enqueue(Vec::new(), |_, _| vec![Write::Submit(Box::new(record))]);
    }

    /// The record, and what is only kept here of it, before its first event.
    pub(super) fn submit_with(&self, record: ExecutionRecord, facts: Vec<Fact>, first: NewEvent) -> u64 {
        let execution = self.live.id;
        self.enqueue(vec![first], |events, _| {
            let mut writes = vec![Write::Submit(Box::new(record))];
            writes.extend(facts.into_iter().map(|fact| Write::Local { execution, fact }));
            writes.extend(events);
            writes
        })
    }

    /// Keeps OpenCode's id of the conversation for a later life of the sidecar. It is on the disk when this returns.
    pub async fn keep_conversation(&self, id: &str) {
        self.keep_fact(Fact::Conversation(id.to_owned()));
        self.shared.queue.flushed().await;
    }

    /// Keeps the key of its model, sealed anew, for a later life of the sidecar: before whatever is appended next.
    pub fn keep_credentials(&self, sealed: String) {
        self.keep_fact(Fact::Credentials(sealed));
    }

    /// Keeps how the run has ended for a later life of the sidecar, which tells it where this one does not come to that.
    pub fn keep_outcome(&self, outcome: Outcome) {
        self.keep_fact(Fact::Outcome(outcome));
    }

    fn keep_fact(&self, fact: Fact) {
        self.enqueue(Vec::new(), |_, _| vec![Write::Local { execution: self.live.id, fact }]);
    }

    /// Appends an event; waits only while very much is queued. Returns its number.
    pub async fn append(&self, event: NewEvent) -> u64 {
        self.shared.room().await;
        self.enqueue(vec![event], |events, _| events)
    }

    /// The output of a call (`None`: an unknown one) has ended: nothing of it is held back any more. Returns the last number.
    pub fn output_ends(&self, call_id: Option<&str>) -> u64 {
        self.enter(|cleaner| cleaner.output_ends(&json!(call_id)), |events, _| events)
    }

    /// Appends a change of status with its event(s), as one: `record` is how the execution stands after it.
    /// The status `expected` is what the row must show now.
    pub fn change(&self, expected: Status, record: ExecutionRecord, events: Vec<NewEvent>) -> u64 {
        self.enqueue(events, |mut writes, last_seq| {
            let record = ExecutionRecord { last_seq, ..record };
            writes.push(Write::Change { expected, record: Box::new(record) });
            writes
        })
    }

    /// Writes how the execution stands between changes of status.
    pub fn progress(&self, record: ExecutionRecord) {
        self.enqueue(Vec::new(), |mut writes, last_seq| {
            writes.push(Write::Progress(Box::new(ExecutionRecord { last_seq, ..record })));
            writes
        });
    }

    /// See [`Self::enter`].
    fn enqueue(&self, events: Vec<NewEvent>, finish: impl FnOnce(Vec<Write>, u64) -> Vec<Write>) -> u64 {
        self.enter(|cleaner| events.into_iter().flat_map(|event| cleaner.clean(event)).collect(), finish)
    }

    /// The events are cleaned, get their numbers and are queued under one lock: no two have the same number, none overtakes,
    /// and no secret that is cut in two goes by. Returns the last number.
    fn enter(
        &self,
        events: impl FnOnce(&mut Cleaner) -> Vec<NewEvent>,
        finish: impl FnOnce(Vec<Write>, u64) -> Vec<Write>,
    ) -> u64 {
        let mut entrance = self.live.lock_entrance();
        let events = events(&mut entrance.cleaner);
        let now = Utc::now();
        let mut writes = Vec::with_capacity(events.len() + 1);
        for event in events {
            self.shared.metrics.event(event.kind);
            writes.push(Write::Event { execution: self.live.id, event: event.seal(entrance.next, now) });
            entrance.next += 1;
        }
        let last = entrance.next - 1;
        let mut writes = finish(writes, last);
        writes.iter_mut().for_each(|write| entrance.cleaner.clean_write(write));
        entrance.cleaner.found().for_each(|kind| self.shared.metrics.redacted(kind));
        self.shared.queue.push(&self.live, writes);
        last
    }

    /// The log as it stands, to look at or to wait on.
    pub fn head(&self) -> watch::Receiver<Head> {
        self.live.subscribe()
    }

    /// Waits until the event `seq` is committed. `false` where the log was given up.
    pub async fn committed(&self, seq: u64) -> bool {
        let mut head = self.live.subscribe();
        match head.wait_for(|head| head.lost || (head.committed && head.last_seq >= seq)).await {
            Ok(head) => !head.lost,
            Err(_) => false,
        }
    }
}

#[cfg(all(test, feature = "shuttle"))]
mod interleavings;
