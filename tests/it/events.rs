//! The log: one way in, one way out, no seam between memory and the database, on a real Postgres.

#![allow(clippy::unwrap_used, reason = "a test's own helpers fail like the test")]

use crate::support::postgres::fresh_database;
use crate::support::proxy::Proxy;
use crate::support::sidecar::{PATIENCE, soon};
use chrono::Utc;
use opencode_sidecar::events::{Events, Inherited, ReadQuery};
use opencode_sidecar::journal::Journal;
use opencode_sidecar::model::event::{Event, EventType, NewEvent, Severity};
use opencode_sidecar::model::task::{Limits, ModelChoice, Provider};
use opencode_sidecar::model::{ExecutionId, ExecutionRecord, Reason, Status, Task, TaskId, Usage};
use opencode_sidecar::store::Store;
use opencode_sidecar::tasks::Tasks;
use opencode_sidecar::telemetry::Metrics;
use serde_json::json;
use std::path::Path;
use std::sync::Arc;

fn record() -> ExecutionRecord {
    let model = ModelChoice::new(Provider::Local, "m", "http://127.0.0.1:1/v1");
    let limits = Limits { output_bytes: 1, model_calls: 1, total_tokens: 1, ..Limits::default() };
    let task = Task::new(TaskId::new(), "x", model, 1, limits);
    ExecutionRecord::new("p", uuid::Uuid::now_v7(), task, Vec::new(), Utc::now())
}

/// A log with a journal and a database of its own.
struct Log {
    events: Events,
    tasks: Tasks,
    store: Store,
    directory: tempfile::TempDir,
}

async fn log() -> Log {
    let store = Store::connect(&fresh_database().await).await.unwrap();
    store.migrate().await.unwrap();
    let (tasks, directory) = (Tasks::new(), tempfile::tempdir().unwrap());
    let events = start(directory.path(), &store, &tasks).await;
    Log { events, tasks, store, directory }
}

async fn start(directory: &Path, store: &Store, tasks: &Tasks) -> Events {
    start_with(directory, 1 << 30, store, tasks).await.0
}

async fn start_with(directory: &Path, most: u64, store: &Store, tasks: &Tasks) -> (Events, Inherited) {
    let journal = Arc::new(Journal::open(directory).unwrap().0);
    Events::start(journal, most, store.clone(), "p".into(), Metrics::new().unwrap(), true, tasks).await.unwrap()
}

/// Follows a log as every stream does: by a number, waiting for the head to move.
async fn follow(events: Events, id: ExecutionId, limit: u32) -> Vec<String> {
    let mut seen = Vec::new();
    loop {
        let after = seen.len() as u64;
        let (last_seq, ended) = match events.head(id) {
            Some(mut head) => {
                let now = head.borrow_and_update().clone();
                if now.last_seq == after && !now.ended {
                    let _ = head.changed().await;
                    continue;
                }
                (now.last_seq, now.ended)
            }
            None => (events.record(id).await.unwrap().unwrap().last_seq, true),
        };
        if last_seq == after && ended {
            return seen;
        }
        let page = events.read(id, last_seq, &ReadQuery { after, limit, ..ReadQuery::default() }).await.unwrap();
        for event in page.events {
            assert_eq!(event.seq, seen.len() as u64 + 1, "no gap, nothing twice");
            seen.push(event.json.to_string());
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_see_every_event_once_while_it_grows_out_of_memory() {
    let Log { events, tasks, directory: _directory, .. } = log().await;
    let mut readers = Vec::new();
    let mut logs = Vec::new();
    for _ in 0..2 {
        let record = record();
        let writer = events.open(record.clone());
        writer.append(NewEvent::status(Status::Pending, None, None)).await;
        for limit in [1, 100, 1000] {
            // From the moment that it is known to anyone.
            assert!(writer.committed(1).await);
            readers.push((record.id, tasks.spawn("reader", follow(events.clone(), record.id, limit))));
        }
        logs.push((record, writer));
    }
    let writers: Vec<_> = logs
        .into_iter()
        .map(|(mut record, writer)| {
            tasks.spawn("writer", async move {
                // 3 MB: three times what memory keeps.
                for n in 0..5000 {
                    let data = json!(format!("{n} {}", "x".repeat(600)));
                    let severity = if n % 10 == 0 { Severity::Warn } else { Severity::Info };
                    writer.append(NewEvent::new(EventType::Stdout, data).severity(severity)).await;
                }
                record.status = Status::Failed;
                record.reason = Some(Reason::Interrupted);
                record.completed_at = Some(Utc::now());
                let last = NewEvent::complete(Status::Failed, Reason::Interrupted, None, &[], &Usage::default());
                let seq = writer.change(Status::Pending, record, vec![last]);
                assert_eq!(seq, 5002);
                assert!(writer.committed(seq).await);
            })
        })
        .collect();
    for writer in writers {
        soon("a writer", writer).await.unwrap();
    }
    let mut whole = std::collections::HashMap::new();
    for (id, reader) in readers {
        let seen = soon("a reader", reader).await.unwrap();
        assert_eq!(seen.len(), 5002);
        let first = whole.entry(id).or_insert_with(|| seen.clone());
        assert!(*first == seen, "every reader sees the same bytes");
    }
    soon("everything is shipped", events.flushed()).await;
    assert_eq!((events.pending(), events.unshipped(), events.live()), (0, 0, 0));
    for (id, seen) in whole {
        assert!(soon("the store", follow(events.clone(), id, 777)).await == seen, "and so does who comes later");
        let query = ReadQuery { after: 0, limit: 1000, types: None, severities: Some(vec![Severity::Warn]) };
        let page = events.read(id, 5002, &query).await.unwrap();
        assert_eq!((page.events.len(), page.next_after), (500, 5002));
    }
    tasks.stop(PATIENCE).await.unwrap();
}

/// What the database refuses for good costs its own execution only.
#[tokio::test]
async fn a_log_that_cannot_be_written_is_given_up_and_its_neighbour_goes_on() {
    let Log { events, tasks, store, directory: _directory } = log().await;
    let (bad, good) = (record(), record());
    let (bad_writer, good_writer) = (events.open(bad.clone()), events.open(good.clone()));
    let first = bad_writer.append(NewEvent::status(Status::Pending, None, None)).await;
    assert!(bad_writer.committed(first).await);
    // Nobody may claim that a pending execution was paused.
    let mut wrong = bad.clone();
    wrong.status = Status::Running;
    bad_writer.change(Status::Paused, wrong, vec![NewEvent::status(Status::Running, None, None)]);
    let fine = good_writer.append(NewEvent::status(Status::Pending, None, None)).await;
    let mut head = bad_writer.head();
    assert!(soon("it is given up", head.wait_for(|head| head.lost)).await.is_ok());
    assert!(soon("the neighbour", good_writer.committed(fine)).await);
    soon("all", events.flushed()).await;
    assert_eq!(events.record(bad.id).await.unwrap().unwrap().status, Status::Pending);
    assert_eq!(store.execution("p", good.id).await.unwrap().unwrap().last_seq, fine);
    tasks.stop(PATIENCE).await.unwrap();
}

/// A database that is not there: nobody waits for it, everything is read as if it were, and it gets everything.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_the_database_is_away_everything_goes_on_and_then_it_has_all() {
    let (proxy, options) = Proxy::before(fresh_database().await).await;
    let store = Store::connect(&options).await.unwrap();
    store.migrate().await.unwrap();
    let (tasks, directory) = (Tasks::new(), tempfile::tempdir().unwrap());
    let events = start(directory.path(), &store, &tasks).await;
    let mut record = record();
    let id = record.id;
    let writer = events.open(record.clone());
    let text = |n: u64| NewEvent::new(EventType::Stdout, json!(format!("{n} {}", "x".repeat(2000))));
    for n in 0..1000 {
        writer.append(text(n)).await;
    }
    soon("the first part is shipped", events.flushed()).await;
    proxy.cut();
    for n in 1000..3000 {
        writer.append(text(n)).await;
    }
    record.status = Status::Failed;
    record.reason = Some(Reason::Interrupted);
    record.completed_at = Some(Utc::now());
    let seq = writer.change(
        Status::Pending,
        record,
        vec![NewEvent::complete(Status::Failed, Reason::Interrupted, None, &[], &Usage::default())],
    );
    assert!(soon("the end", writer.committed(seq)).await);
    // Beyond what memory keeps, and without the database: each page of a size of its own.
    let mut readers = Vec::new();
    for limit in [1, 7, 1000] {
        let events = events.clone();
        readers.push(tasks.spawn("reader", async move {
            let (mut after, mut seen) = (1000, Vec::new());
            while after < seq {
                let page = events.read(id, seq, &ReadQuery { after, limit, ..ReadQuery::default() }).await.unwrap();
                assert!(page.next_after > after && page.last_seq == seq);
                seen.extend(page.events.iter().map(|event| (event.seq, event.json.to_string())));
                after = page.next_after;
            }
            seen
        }));
    }
    let mut all = Vec::new();
    for reader in readers {
        let seen = soon("a reader", reader).await.unwrap();
        assert!(seen.iter().map(|(seq, _)| *seq).eq(1001..=seq), "no gap, nothing twice");
        all.push(seen);
    }
    assert!(all.windows(2).all(|two| two[0] == two[1]), "every reader sees the same bytes");
    assert!(events.record(id).await.unwrap().unwrap().status.is_final());
    assert!(events.unshipped() > 0 && events.pending() == 0);
    // And then it is back.
    proxy.mend();
    soon("all is shipped", events.flushed()).await;
    assert_eq!((events.unshipped(), events.live(), events.outage()), (0, 0, None));
    let stored = soon("the store", follow(events.clone(), id, 500)).await;
    assert!(stored[1000..].iter().eq(all[0].iter().map(|(_, json)| json)), "and the database has the same bytes");
    tasks.stop(PATIENCE).await.unwrap();
}

/// A life that ends with the database away: the next one brings it all there, the same bytes under the same numbers.
#[tokio::test]
async fn what_a_life_leaves_in_the_journal_the_next_one_ships() {
    let (proxy, options) = Proxy::before(fresh_database().await).await;
    let store = Store::connect(&options).await.unwrap();
    store.migrate().await.unwrap();
    let directory = tempfile::tempdir().unwrap();
    let (stays, goes) = (record(), record());
    let mut told = Vec::new();
    {
        let tasks = Tasks::new();
        let events = start(directory.path(), &store, &tasks).await;
        let (one, other) = (events.open(stays.clone()), events.open(goes.clone()));
        one.append(NewEvent::status(Status::Pending, None, None)).await;
        let seq = other.append(NewEvent::status(Status::Pending, None, None)).await;
        assert!(other.committed(seq).await);
        soon("both are shipped", events.flushed()).await;
        proxy.cut();
        for n in 0..50 {
            let seq = one.append(NewEvent::new(EventType::Stdout, json!(n))).await;
            assert!(one.committed(seq).await);
        }
        assert!(!events.delete(goes.id, std::time::Duration::from_millis(1)).await, "not yet");
        let page =
            events.read(stays.id, 51, &ReadQuery { after: 0, limit: 100, ..ReadQuery::default() }).await.unwrap();
        told.extend(page.events);
        soon("it is in the journal", async {
            while events.pending() > 0 {
                tokio::task::yield_now().await;
            }
        })
        .await;
        tasks.stop(PATIENCE).await.unwrap();
    }
    // The database is still away: that is no reason not to start, and readers are served from the journal.
    let tasks = Tasks::new();
    let (events, inherited) = start_with(directory.path(), 1 << 30, &store, &tasks).await;
    assert!(events.unshipped() > 50 && inherited.standing.len() == 1);
    assert_eq!((inherited.standing[0].record.id, inherited.standing[0].record.last_seq), (stays.id, 51));
    let head = events.head(stays.id).unwrap().borrow().clone();
    assert_eq!((head.last_seq, head.committed, head.ended), (51, true, false));
    let left = events.read(stays.id, 51, &ReadQuery { after: 20, limit: 100, ..ReadQuery::default() }).await.unwrap();
    assert_eq!(left.events[0].seq, 21);
    let next = events.reopen(stays.id).unwrap().append(NewEvent::new(EventType::Stdout, json!("on"))).await;
    assert_eq!(next, 52);
    proxy.mend();
    soon("all is shipped", events.flushed()).await;
    assert_eq!(events.unshipped(), 0);
    let page = events.read(stays.id, 51, &ReadQuery { after: 0, limit: 100, ..ReadQuery::default() }).await.unwrap();
    let json = |events: &[Event]| events.iter().map(|event| event.json.to_string()).collect::<Vec<_>>();
    assert_eq!((json(&page.events[..51]), page.events.len()), (json(&told), 52));
    assert_eq!(store.execution("p", goes.id).await.unwrap(), None, "what was deleted stays so");
    tasks.stop(PATIENCE).await.unwrap();
}

/// A deletion reaches the journal too, once nothing that is needed is beside it.
#[tokio::test]
async fn what_is_deleted_leaves_the_disk() {
    let Log { events, tasks, store, directory } = log().await;
    let written = || {
        let files = std::fs::read_dir(directory.path()).unwrap();
        files.map(|file| std::fs::read(file.unwrap().path()).unwrap_or_default()).collect::<Vec<_>>().concat()
    };
    let holds = |text: &str| written().windows(text.len()).any(|window| window == text.as_bytes());
    let mut gone = record();
    gone.task.prompt = Some("a prompt that is regretted".to_owned());
    let writer = events.open(gone.clone());
    let seq = writer.append(NewEvent::status(Status::Pending, None, None)).await;
    assert!(writer.committed(seq).await && holds("a prompt that is regretted"));
    assert!(soon("the deletion", events.delete(gone.id, std::time::Duration::from_secs(60))).await);
    assert_eq!(store.execution("p", gone.id).await.unwrap(), None);
    soon("it leaves the disk", async {
        while holds("a prompt that is regretted") {
            tokio::task::yield_now().await;
        }
    })
    .await;
    tasks.stop(PATIENCE).await.unwrap();
}

/// What runs waits for the database where the journal has all that it may; its end does not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_journal_slows_and_cuts_nothing() {
    const MOST: u64 = 1 << 20;
    let (proxy, options) = Proxy::before(fresh_database().await).await;
    let store = Store::connect(&options).await.unwrap();
    store.migrate().await.unwrap();
    let (tasks, directory) = (Tasks::new(), tempfile::tempdir().unwrap());
    let events = start_with(directory.path(), MOST, &store, &tasks).await.0;
    let (record, other) = (record(), record());
    let (id, writer, quick) = (record.id, events.open(record), events.open(other.clone()));
    writer.append(NewEvent::status(Status::Pending, None, None)).await;
    quick.append(NewEvent::status(Status::Pending, None, None)).await;
    soon("both are there", events.flushed()).await;
    assert!(!events.is_full());
    proxy.cut();
    let appended = tasks.spawn("writer", async move {
        for _ in 0..1000 {
            // One at a time, as a session makes them.
            let seq = writer.append(NewEvent::new(EventType::Stdout, json!("x".repeat(4000)))).await;
            assert!(writer.committed(seq).await);
        }
    });
    soon("it is full", async {
        while events.journal().0 < MOST {
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert!(events.is_full() && !appended.is_finished());
    let ended = ExecutionRecord {
        status: Status::Cancelled,
        reason: Some(Reason::Cancelled),
        completed_at: Some(Utc::now()),
        ..other
    };
    let last = NewEvent::complete(Status::Cancelled, Reason::Cancelled, None, &[], &Usage::default());
    let seq = quick.change(Status::Pending, ended, vec![last]);
    assert!(soon("the end of another", quick.committed(seq)).await);
    let held = events.journal().0;
    assert!(held < MOST + (64 << 10), "{held}");
    proxy.mend();
    soon("all of it", appended).await.unwrap();
    soon("it is shipped", events.flushed()).await;
    assert_eq!(store.execution("p", id).await.unwrap().unwrap().last_seq, 1001);
    assert!(!events.is_full());
    tasks.stop(PATIENCE).await.unwrap();
}
