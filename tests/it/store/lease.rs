//! Who may write what of an execution that another sidecar has taken over.

use super::{PROJECT, all, completed, migrated, pending, row, running, submit};
use crate::support::postgres::fresh_database;
use chrono::Utc;
use opencode_sidecar::model::event::NewEvent;
use opencode_sidecar::model::{Event, EventType, ExecutionRecord, Reason, Status};
use opencode_sidecar::store::{Beats, Store, Write};
use serde_json::{Value, json};
use std::num::NonZeroU32;
use uuid::Uuid;

fn event(seq: u64, text: &str) -> Event {
    NewEvent::new(EventType::Stdout, json!(text)).seal(seq, Utc::now())
}

fn log(record: &ExecutionRecord, events: impl IntoIterator<Item = Event>) -> Vec<Write> {
    events.into_iter().map(|event| Write::Event { execution: record.id, event }).collect()
}

/// How `by` ends what `record` is.
fn ended(record: &ExecutionRecord, by: Uuid) -> (ExecutionRecord, Vec<Write>) {
    let mut ended = ExecutionRecord {
        owner: by,
        status: Status::Failed,
        reason: Some(Reason::Interrupted),
        completed_at: Some(Utc::now()),
        generation: record.generation.saturating_add(1),
        epoch: record.epoch.saturating_add(1),
        ..record.clone()
    };
    let last = NewEvent::complete(Status::Failed, Reason::Interrupted, None, &[], &ended.usage);
    ended.last_seq += 1;
    let mut writes = log(record, [last.seal(ended.last_seq, Utc::now())]);
    writes.push(Write::Change { expected: record.status, record: Box::new(ended.clone()) });
    (ended, writes)
}

#[tokio::test]
async fn a_former_owner_changes_no_status_and_its_late_events_go_before_the_end() {
    let options = fresh_database().await;
    let (a, b) = (Uuid::now_v7(), Uuid::now_v7());
    let one = Store::connect(&options).await.unwrap().as_owner(a);
    one.migrate().await.unwrap();
    let two = Store::connect(&options).await.unwrap().as_owner(b);
    let mut record = running(&ExecutionRecord { owner: a, last_seq: 0, ..pending() });
    record.last_seq = 2;
    let mut batch = vec![submit(&ExecutionRecord { last_seq: 0, ..record.clone() })];
    batch.extend(log(&record, [event(1, "one"), event(2, "two")]));
    one.commit(&batch).await.unwrap();
    assert_eq!(one.beat(PROJECT, a).await.unwrap(), []);
    let seen = two.beat(PROJECT, b).await.unwrap();
    assert_eq!(seen, [Beats { owner: a, beats: 1 }]);

    let left = two.unfinished(PROJECT, a).await.unwrap();
    assert_eq!(left.len(), 1);
    let (end, writes) = ended(&left[0], b);
    // It lives: its count has moved, or its log has.
    one.beat(PROJECT, a).await.unwrap();
    assert!(!two.take_over(PROJECT, seen[0], b, &left, &writes).await.unwrap());
    let seen = two.beat(PROJECT, b).await.unwrap();
    let older = vec![ExecutionRecord { last_seq: 1, ..left[0].clone() }];
    assert!(!two.take_over(PROJECT, seen[0], b, &older, &writes).await.unwrap());
    assert_eq!(row(&two, &record).await, left[0], "and nothing has changed");
    assert!(two.take_over(PROJECT, seen[0], b, &left, &writes).await.unwrap());
    let stored = row(&two, &record).await;
    assert_eq!((stored.status, stored.owner, stored.last_seq), (Status::Failed, b, 3));
    assert_eq!(stored.generation, end.generation);
    assert!(two.unfinished(PROJECT, a).await.unwrap().is_empty());
    assert_eq!(one.taken_over(a, &[record.id]).await.unwrap().len(), 1);

    // It comes back, and brings what it had shown; twice, as it may.
    let done = ExecutionRecord { last_seq: 5, ..completed(&record) };
    let mut late = log(&record, [event(2, "two"), event(3, "three"), event(4, "four")]);
    late.extend(log(&record, [NewEvent::status(Status::Completed, None, None).seal(5, Utc::now())]));
    late.push(Write::Change { expected: Status::Running, record: Box::new(done) });
    let other = ExecutionRecord { owner: a, ..pending() };
    late.push(submit(&other));
    for _ in 0..2 {
        assert_eq!(one.commit(&late).await.unwrap().taken_over, [record.id]);
        let stored = row(&two, &record).await;
        assert_eq!((stored.status, stored.reason, stored.last_seq), (Status::Failed, Some(Reason::Interrupted), 6));
        assert_eq!(stored.epoch, NonZeroU32::new(end.epoch.get() + 1).unwrap(), "the numbers of some have changed");
        let events = two.events(record.id, &all()).await.unwrap();
        let envelopes: Vec<Value> = events.iter().map(|event| serde_json::from_str(&event.json).unwrap()).collect();
        assert!(envelopes.iter().map(|e| e["seq"].as_u64().unwrap()).eq(1..=6));
        assert!(events.iter().map(|e| e.seq).eq(1..=6));
        let data: Vec<_> = envelopes.iter().map(|e| e["data"].clone()).collect();
        assert_eq!(data[..4], [json!("one"), json!("two"), json!("three"), json!("four")]);
        assert_eq!((&data[4]["code"], &data[4]["said"]), (&json!("superseded"), &json!("completed")));
        assert_eq!(events[5].kind, EventType::Complete);
    }
    assert_eq!(row(&two, &other).await.status, Status::Pending, "what else was in the batch is there");
}

#[tokio::test]
async fn one_that_is_gone_leaves_nothing_open_and_is_forgotten() {
    let (store, _) = migrated().await;
    let (gone, here) = (Uuid::now_v7(), Uuid::now_v7());
    // One that never counted, as of a version before there were counts.
    let record = ExecutionRecord { owner: gone, last_seq: 0, ..pending() };
    store.commit(&[submit(&record)]).await.unwrap();
    let seen = store.beat(PROJECT, here).await.unwrap();
    assert_eq!(seen, [Beats { owner: gone, beats: 0 }]);
    let left = store.unfinished(PROJECT, gone).await.unwrap();
    let (_, writes) = ended(&left[0], here);
    assert!(store.take_over(PROJECT, seen[0], here, &left, &writes).await.unwrap());
    assert!(!store.take_over(PROJECT, seen[0], here, &left, &writes).await.unwrap(), "only once");
    assert_eq!(store.beat(PROJECT, here).await.unwrap(), []);
    assert_eq!(store.beat("another project", Uuid::now_v7()).await.unwrap(), []);
    store.forget_owners(PROJECT).await.unwrap();
}
