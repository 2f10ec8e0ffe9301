//! What the journal adds to an event's way to a reader, at some 500 events a second: from `Writer::append` until one who
//! waits on the head has read the event by `Events::read`. Beside it, at the same time, the same events through a log
//! that is made of the same parts (queue, committer, tail, head) and writes nothing down.
//!
//! The journal is on the disk that the program is on, and a Postgres takes what is in it meanwhile.

use crate::World;
use crate::made::{event, record};
use crate::sidecar::directory;
use crate::table::{Row, Shown, print, target};
use chrono::Utc;
use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use opencode_sidecar::events::{Events, Head, ReadQuery};
use opencode_sidecar::journal::Journal;
use opencode_sidecar::model::event::{Event, NewEvent, Severity};
use opencode_sidecar::store::{DatabaseOptions, Embedded, Store};
use opencode_sidecar::tasks::Tasks;
use opencode_sidecar::telemetry::Metrics;
use std::collections::VecDeque;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tokio::time::MissedTickBehavior;

/// Of each side, in each round.
const EVENTS: usize = 5000;
/// Between two events, which go to the sides in turn: 500 a second to each.
const PACE: Duration = Duration::from_millis(1);
/// The most that a reader asks for.
const LIMIT: u32 = 100;

/// A log without a journal: one way in, a committer, one way out.
#[derive(Debug, Default)]
struct Bare {
    next: Mutex<u64>,
    queue: Mutex<VecDeque<Event>>,
    pushed: watch::Sender<u64>,
    tail: Mutex<Vec<Event>>,
    head: watch::Sender<u64>,
}

impl Bare {
    fn append(&self, event: NewEvent) {
        let mut next = self.next.lock().unwrap();
        *next += 1;
        let event = event.seal(*next, Utc::now());
        self.queue.lock().unwrap().push_back(event);
        self.pushed.send_modify(|pushed| *pushed += 1);
    }

    /// Shows what is queued, until all is shown.
    async fn commit(self: Arc<Self>) {
        let mut pushed = self.pushed.subscribe();
        let mut shown = 0;
        while shown < EVENTS as u64 {
            pushed.borrow_and_update();
            let batch: Vec<_> = self.queue.lock().unwrap().drain(..).collect();
            let Some(last) = batch.last().map(|event| event.seq) else {
                pushed.changed().await.unwrap();
                continue;
            };
            self.tail.lock().unwrap().extend(batch);
            self.head.send_modify(|head| *head = last);
            shown = last;
        }
    }

    fn read(&self, after: usize) -> Vec<Event> {
        let tail = self.tail.lock().unwrap();
        tail[after..].iter().take(LIMIT as usize).cloned().collect()
    }

    /// When each event was read.
    async fn follow(self: Arc<Self>) -> Vec<Instant> {
        let (mut head, mut read) = (self.head.subscribe(), Vec::with_capacity(EVENTS));
        while read.len() < EVENTS {
            head.wait_for(|last| *last > read.len() as u64).await.unwrap();
            let events = self.read(read.len());
            note(&mut read, &events);
        }
        read
    }
}

/// The same of a real log, from its second event on.
async fn follow(events: Events, mut head: watch::Receiver<Head>) -> Vec<Instant> {
    let (id, mut read) = (head.borrow().record.id, Vec::with_capacity(EVENTS + 1));
    while read.len() <= EVENTS {
        let after = read.len() as u64;
        let last_seq = head.wait_for(|head| head.last_seq > after).await.unwrap().last_seq;
        let query = ReadQuery { after, limit: LIMIT, ..ReadQuery::default() };
        let page = events.read(id, last_seq, &query).await.unwrap();
        note(&mut read, &page.events);
    }
    read.split_off(1)
}

fn note(read: &mut Vec<Instant>, events: &[Event]) {
    let now = Instant::now();
    for event in events {
        read.push(now);
        assert_eq!(event.seq, read.len() as u64, "no gap, nothing twice");
    }
}

/// In milliseconds.
fn delays(sent: &[Instant], read: &[Instant]) -> Vec<f64> {
    assert_eq!((sent.len(), read.len()), (EVENTS, EVENTS));
    sent.iter().zip(read).map(|(sent, read)| (*read - *sent).as_secs_f64() * 1000.0).collect()
}

/// The delays of one round: through the journal, and without.
async fn round(events: &Events, tasks: &Tasks) -> [Vec<f64>; 2] {
    let (writer, first) = events.begin(record(), Vec::new(), NewEvent::log(Severity::Info, "begun", "It begins."));
    assert!(writer.committed(first).await);
    let bare = Arc::new(Bare::default());
    tasks.spawn("bare committer", Arc::clone(&bare).commit());
    let through = tasks.spawn("reader", follow(events.clone(), writer.head()));
    let without = tasks.spawn("bare reader", Arc::clone(&bare).follow());
    let sending = tasks.spawn("sender", async move {
        let mut sent = [Vec::with_capacity(EVENTS), Vec::with_capacity(EVENTS)];
        let mut pace = tokio::time::interval(PACE);
        pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
        for number in 0..EVENTS * 2 {
            pace.tick().await;
            let event = event(number / 2);
            sent[number % 2].push(Instant::now());
            if number % 2 == 0 {
                writer.append(event).await;
            } else {
                bare.append(event);
            }
        }
        sent
    });
    let [ours, theirs] = sending.await.unwrap();
    [delays(&ours, &through.await.unwrap()), delays(&theirs, &without.await.unwrap())]
}

pub(crate) async fn run(world: &World) {
    let (state, tasks) = (directory(), Tasks::new());
    let postgres = Embedded::start(&world.sandbox, &world.tasks, state.path()).await.unwrap();
    let options = DatabaseOptions { url: postgres.url(), schema: "bench".to_owned(), max_connections: 4 };
    let store = Store::connect(&options).await.unwrap();
    store.migrate().await.unwrap();
    let place = tempfile::tempdir_in(Path::new(env!("CARGO_TARGET_TMPDIR"))).unwrap();
    assert_ne!(statfs(place.path()).unwrap().filesystem_type(), TMPFS_MAGIC, "no disk is beneath the journal");
    let journal = Arc::new(Journal::open(place.path()).unwrap().0);
    let metrics = Metrics::new().unwrap();
    let started =
        Events::start(Arc::clone(&journal), 1 << 30, store.clone(), "bench".to_owned(), metrics, true, &tasks);
    let events = started.await.unwrap().0;
    let (mut through, mut without, mut added) = (Vec::new(), Vec::new(), Vec::new());
    let started = Instant::now();
    let rounds = world.rounds(5);
    for _ in 0..rounds {
        let sides = round(&events, &tasks).await;
        let [ours, theirs] = sides.each_ref().map(|side| Row::new("", side.clone()).median());
        added.push(ours - theirs);
        let [ours, theirs] = sides;
        through.extend(ours);
        without.extend(theirs);
    }
    println!("{:.0} events a second to each", (EVENTS * rounds) as f64 / started.elapsed().as_secs_f64());
    let rows = [Row::new("through the journal", through), Row::new("the same without", without)];
    print("from `append` to a reader", "ms", Shown::Tail, &rows);
    print("p50 more, round by round", "ms", Shown::Spread, &[Row::new("the journal adds", added)]);
    target("p50 that the journal adds", rows[0].median() - rows[1].median(), 0.2, " ms");
    events.flushed().await;
    tasks.stop(Duration::from_secs(20)).await.unwrap();
    journal.close().unwrap();
    store.close().await;
    postgres.stop().await.unwrap();
}
