//! The log: one way in, one way out, no seam between memory and the database, on a real Postgres.

#![allow(clippy::unwrap_used, reason = "a test's own helpers fail like the test")]

use crate::support::postgres::fresh_database;
use crate::support::sidecar::soon;
use chrono::Utc;
use opencode_sidecar::events::{Events, ReadQuery};
use opencode_sidecar::model::event::{EventType, NewEvent, Severity};
use opencode_sidecar::model::task::{Limits, ModelChoice, Provider};
use opencode_sidecar::model::{ExecutionId, ExecutionRecord, Reason, Status, Task, TaskId, Usage};
use opencode_sidecar::store::Store;
use opencode_sidecar::tasks::Tasks;
use opencode_sidecar::telemetry::Metrics;
use serde_json::json;

fn record() -> ExecutionRecord {
    let model = ModelChoice {
        provider: Provider::Local,
        model: "m".into(),
        version: None,
        endpoint: "http://127.0.0.1:1/v1".into(),
        temperature: None,
        max_tokens: None,
        enabled_tools: None,
    };
    let limits = Limits { output_bytes: 1, model_calls: 1, total_tokens: 1, ..Limits::default() };
    let task = Task {
        task_id: TaskId::new(),
        prompt: Some("x".into()),
        code: None,
        context: None,
        session_id: None,
        model,
        system_prompt: None,
        agent: None,
        workdir: None,
        timeout_seconds: 1,
        limits,
        metadata: None,
    };
    ExecutionRecord::new("p", uuid::Uuid::now_v7(), task, Vec::new(), Utc::now())
}

async fn log() -> (Events, Tasks) {
    let store = Store::connect(&fresh_database().await).await.unwrap();
    store.migrate().await.unwrap();
    let tasks = Tasks::new();
    (Events::start(store, "p".into(), Metrics::new().unwrap(), &tasks), tasks)
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
    let (events, tasks) = log().await;
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
    assert_eq!((events.pending(), events.live()), (0, 0));
    for (id, seen) in whole {
        assert!(soon("the store", follow(events.clone(), id, 777)).await == seen, "and so does who comes later");
        let query = ReadQuery { after: 0, limit: 1000, types: None, severities: Some(vec![Severity::Warn]) };
        let page = events.read(id, 5002, &query).await.unwrap();
        assert_eq!((page.events.len(), page.next_after), (500, 5002));
    }
    tasks.stop(std::time::Duration::from_secs(10)).await.unwrap();
}

/// What the database refuses for good costs its own execution only.
#[tokio::test]
async fn a_log_that_cannot_be_written_is_given_up_and_its_neighbour_goes_on() {
    let (events, tasks) = log().await;
    let (bad, good) = (record(), record());
    let (bad_writer, good_writer) = (events.open(bad.clone()), events.open(good.clone()));
    let first = bad_writer.append(NewEvent::status(Status::Pending, None, None)).await;
    assert!(bad_writer.committed(first).await);
    // Nobody may claim that a pending execution was paused.
    let mut wrong = bad.clone();
    wrong.status = Status::Running;
    let seq = bad_writer.change(Status::Paused, wrong, vec![NewEvent::status(Status::Running, None, None)]);
    let fine = good_writer.append(NewEvent::status(Status::Pending, None, None)).await;
    assert!(!soon("it is given up", bad_writer.committed(seq)).await);
    assert!(soon("the neighbour", good_writer.committed(fine)).await);
    assert_eq!(events.record(bad.id).await.unwrap().unwrap().status, Status::Pending);
    tasks.stop(std::time::Duration::from_secs(10)).await.unwrap();
}
