//! Which executions were submitted with a key.

use super::{PROJECT, at, change, completed, migrated, pending, row, submit};
use chrono::TimeDelta;
use opencode_sidecar::model::{ExecutionRecord, Status};

#[tokio::test]
async fn keys_come_back_newest_first_within_their_time_and_project() {
    let (store, _) = migrated().await;
    let aged = |hours| ExecutionRecord { created_at: at(0) - TimeDelta::hours(hours), ..pending() };
    let (newest, older, old) = (aged(0), aged(1), aged(25));
    let without = ExecutionRecord { idempotency: None, ..pending() };
    let foreign = ExecutionRecord { project_id: "other".to_owned(), ..pending() };
    let batch = [&older, &newest, &old, &without, &foreign].map(submit);
    // A batch that is committed again, and a key that several have.
    for _ in 0..2 {
        store.commit(&batch).await.unwrap();
    }
    store.commit(&[change(Status::Pending, &completed(&older))]).await.unwrap();

    let since = at(0) - TimeDelta::hours(24);
    let found = store.submitted_with_key(PROJECT, since, 10).await.unwrap();
    let of = |record: &ExecutionRecord| (record.idempotency.clone().unwrap(), record.submitted());
    assert_eq!(found, [of(&newest), of(&older)]);
    assert_eq!(store.submitted_with_key(PROJECT, since, 1).await.unwrap(), [of(&newest)]);
    assert_eq!(store.submitted_with_key("third", since, 10).await.unwrap(), []);
}

#[tokio::test]
async fn a_submission_that_is_refused_after_all_gives_its_key_back() {
    let (store, _) = migrated().await;
    let (refused, other) = (pending(), pending());
    store.commit(&[submit(&refused), submit(&other)]).await.unwrap();
    let ended = ExecutionRecord { idempotency: None, ..completed(&refused) };
    store.commit(&[change(Status::Pending, &ended)]).await.unwrap();
    assert_eq!(row(&store, &refused).await, ended);
    let found = store.submitted_with_key(PROJECT, at(-1), 10).await.unwrap();
    assert_eq!(found.into_iter().map(|(_, submitted)| submitted.id).collect::<Vec<_>>(), [other.id]);
}
