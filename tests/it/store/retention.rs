//! What is old is forgotten: what, how much at once, and what anybody sees of it meanwhile.

use super::sessions::{ended, in_session, put, session};
use super::{PROJECT, all, at, change, completed, event, migrated, pending, running, submit, write};
use crate::support::postgres::connect;
use chrono::{DateTime, TimeDelta, Utc};
use opencode_sidecar::model::{EventType, ExecutionRecord, SessionRecord, Severity, Status};
use opencode_sidecar::store::{DatabaseOptions, Forgotten, HistoryFilter, Store, Write};
use sqlx::{AssertSqlSafe, Connection, Executor, Row};

/// What ended before it is old.
fn cutoff() -> DateTime<Utc> {
    at(0) - TimeDelta::days(30)
}

/// One that was made `made` seconds before the cutoff, and ended then or (negative) after it.
fn done(made: i64, ended: i64) -> ExecutionRecord {
    let before = |seconds| cutoff() - TimeDelta::seconds(seconds);
    ExecutionRecord { created_at: before(made), completed_at: Some(before(ended)), ..completed(&pending()) }
}

/// With so many events.
fn logged(record: &ExecutionRecord, events: u64) -> Vec<Write> {
    let events = (1..=events).map(|seq| write(record, &event(seq, EventType::Stdout, Severity::Info)));
    std::iter::once(submit(record)).chain(events).collect()
}

async fn left(store: &Store) -> Vec<ExecutionRecord> {
    store.history(PROJECT, &HistoryFilter::default(), None, 100).await.unwrap()
}

async fn count(options: &DatabaseOptions, table: &str) -> i64 {
    let mut connection = connect(&options.url).await;
    let query = format!("SELECT count(*) FROM opencode_sidecar.{table}");
    let row = connection.fetch_one(AssertSqlSafe(query)).await.unwrap();
    connection.close().await.unwrap();
    row.get(0)
}

/// Removes all that is out of sight.
async fn purge(store: &Store) -> Forgotten {
    let mut all = Forgotten::default();
    loop {
        let step = store.purge(PROJECT, 1000).await.unwrap();
        if step.is_empty() {
            return all;
        }
        all += step;
    }
}

#[tokio::test]
async fn what_has_ended_long_ago_goes_and_nothing_else() {
    let (store, options) = migrated().await;
    let old = done(100, 50);
    let kept = [
        // It ended, and was made, when everything is still kept.
        done(-10, -20),
        done(100, -1),
        ExecutionRecord { created_at: cutoff() - TimeDelta::days(9), ..pending() },
        ExecutionRecord { created_at: cutoff() - TimeDelta::days(10), ..running(&pending()) },
    ];
    let foreign = ExecutionRecord { project_id: "other".to_owned(), ..done(100, 50) };
    for record in kept.iter().chain([&old, &foreign]) {
        store.commit(&logged(record, 3)).await.unwrap();
    }
    store.expire(PROJECT, cutoff(), 100).await.unwrap();
    assert_eq!(purge(&store).await, Forgotten { executions: 1, events: 3, ..Forgotten::default() });
    let ids = |records: &[ExecutionRecord]| {
        let mut ids: Vec<_> = records.iter().map(|record| record.id).collect();
        ids.sort();
        ids
    };
    assert_eq!(ids(&left(&store).await), ids(&kept));
    for record in kept.iter().chain([&foreign]) {
        assert!(store.execution(&record.project_id, record.id).await.unwrap().is_some());
        assert_eq!(store.events(record.id, &all()).await.unwrap().len(), 3);
    }
    assert_eq!((count(&options, "executions").await, count(&options, "execution_events").await), (5, 15));
    assert!(store.expire(PROJECT, cutoff(), 100).await.unwrap().is_empty());
    assert!(store.purge(PROJECT, 100).await.unwrap().is_empty());
}

#[tokio::test]
async fn it_goes_in_small_steps_the_oldest_first_and_no_log_is_seen_in_part() {
    let (store, options) = migrated().await;
    let records: Vec<_> = (1..=5).map(|age| done(age * 10, age)).collect();
    for record in &records {
        store.commit(&logged(record, 10)).await.unwrap();
    }
    store.expire(PROJECT, cutoff(), 2).await.unwrap();
    assert_eq!(left(&store).await.iter().map(|record| record.id).collect::<Vec<_>>(), {
        records[..3].iter().map(|record| record.id).collect::<Vec<_>>()
    });
    // At once nobody sees them, with all their events still there.
    for record in &records[3..] {
        assert_eq!(store.execution(PROJECT, record.id).await.unwrap(), None);
    }
    assert_eq!(count(&options, "execution_events").await, 50);
    let mut steps = Vec::new();
    loop {
        let step = store.purge(PROJECT, 8).await.unwrap();
        if step.is_empty() {
            break;
        }
        steps.push((step.events, step.executions));
    }
    let (events, executions): (Vec<u64>, Vec<u64>) = steps.into_iter().unzip();
    assert_eq!(events, [8, 8, 4]);
    assert_eq!(executions.iter().sum::<u64>(), 2);
    assert_eq!((count(&options, "executions").await, count(&options, "execution_events").await), (3, 30));
    for record in &records[..3] {
        assert_eq!(store.events(record.id, &all()).await.unwrap().len(), 10);
    }
}

#[tokio::test]
async fn a_session_goes_with_all_that_is_its_own_once_all_of_it_is_old() {
    let (store, options) = migrated().await;
    let store = store.with_callbacks();
    let before = |seconds| cutoff() - TimeDelta::seconds(seconds);
    let made = || SessionRecord { created_at: before(1000), ..session() };
    let [gone, unused, open, young, late] = [(); 5].map(|()| made());
    let ends = [(&gone, 10), (&unused, 10), (&young, -10), (&late, 10)];
    for session in [&gone, &unused, &open, &young, &late] {
        store.commit(&[put(session)]).await.unwrap();
    }
    for (session, ended) in [(&gone, 20), (&open, 20), (&young, 20), (&late, -5)] {
        for ordinal in [1, 2] {
            let place = in_session(session.id, ordinal);
            let new = ExecutionRecord { created_at: before(900), ..place };
            let end = ExecutionRecord { completed_at: Some(before(ended)), ..completed(&new) };
            store.commit(&[logged(&new, 2), vec![change(Status::Pending, &end)]].concat()).await.unwrap();
        }
    }
    for (session, seconds) in ends {
        let end = SessionRecord { ended_at: Some(before(seconds)), ..ended(session) };
        store.commit(&[put(&end)]).await.unwrap();
    }
    let untold = store.callbacks_waiting(PROJECT).await.unwrap();

    let expired = store.expire(PROJECT, cutoff(), 100).await.unwrap();
    assert_eq!(expired.sessions, 2, "{expired:?}");
    assert!(expired.callbacks > 0);
    assert_eq!(store.callbacks_waiting(PROJECT).await.unwrap(), untold - expired.callbacks);
    for session in [&gone, &unused] {
        assert!(store.session(PROJECT, session.id).await.unwrap().is_none());
    }
    for session in [&open, &young, &late] {
        assert_eq!(store.session(PROJECT, session.id).await.unwrap().unwrap().executions, 2);
    }
    let waiting = store.callbacks(PROJECT, &[], 100).await.unwrap();
    assert!(waiting.iter().all(|callback| callback.session_id != gone.id && callback.session_id != unused.id));
    assert_eq!(purge(&store).await, Forgotten { executions: 2, events: 4, ..Forgotten::default() });
    assert_eq!((count(&options, "sessions").await, count(&options, "executions").await), (3, 6));

    // The same id may be used again, from the first place on.
    store.commit(&[put(&gone), submit(&in_session(gone.id, 1))]).await.unwrap();
    assert_eq!(store.session(PROJECT, gone.id).await.unwrap().unwrap().executions, 1);
}

#[tokio::test]
async fn what_is_out_of_sight_stays_there_whatever_is_written_to_it() {
    let (store, options) = migrated().await;
    let (old, new) = (done(100, 50), pending());
    store.commit(&logged(&old, 2)).await.unwrap();
    store.expire(PROJECT, cutoff(), 10).await.unwrap();
    // A batch that comes once more, with one that has nothing to do with it.
    store.commit(&[logged(&old, 4), logged(&new, 1)].concat()).await.unwrap();
    assert_eq!(store.execution(PROJECT, old.id).await.unwrap(), None);
    assert_eq!(left(&store).await.len(), 1);
    assert_eq!(purge(&store).await, Forgotten { executions: 1, events: 4, ..Forgotten::default() });
    assert_eq!(count(&options, "execution_events").await, 1);
}

#[tokio::test]
async fn it_waits_for_nobody() {
    let (store, options) = migrated().await;
    let (held, free) = (done(100, 50), done(90, 50));
    for record in [&held, &free] {
        store.commit(&logged(record, 1)).await.unwrap();
    }
    let mut other = connect(&options.url).await;
    let mut transaction = other.begin().await.unwrap();
    let lock = format!("SELECT FROM opencode_sidecar.executions WHERE id = '{}' FOR UPDATE", held.id);
    transaction.execute(AssertSqlSafe(lock)).await.unwrap();
    store.expire(PROJECT, cutoff(), 10).await.unwrap();
    assert_eq!(left(&store).await.len(), 1);
    transaction.commit().await.unwrap();
    store.expire(PROJECT, cutoff(), 10).await.unwrap();
    assert_eq!(left(&store).await, []);
}
