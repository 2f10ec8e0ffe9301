//! Sessions that outlive their executions, and what is kept for the backend of each change of status.

use super::{NASTY, PROJECT, at, change, completed, event, execute, migrated, pending, running, submit, write};
use opencode_sidecar::model::task::{ModelChoice, Provider};
use opencode_sidecar::model::{
    EventType, ExecutionRecord, Reason, SessionEventId, SessionId, SessionRecord, Severity, Status,
};
use opencode_sidecar::store::{SessionCursor, Store, Write};
use std::num::NonZeroU32;
use uuid::Uuid;

pub(super) fn session() -> SessionRecord {
    SessionRecord {
        id: SessionId::new(),
        project_id: PROJECT.to_owned(),
        owner: Uuid::now_v7(),
        remote_id: "ses_1".to_owned(),
        model: ModelChoice { provider: Provider::Custom, temperature: Some(0.25), ..pending().task.model },
        system_prompt: Some("be brief".to_owned()),
        created_at: at(0),
        ended_at: None,
    }
}

pub(super) fn ended(record: &SessionRecord) -> SessionRecord {
    SessionRecord { ended_at: Some(at(9)), ..record.clone() }
}

pub(super) fn put(record: &SessionRecord) -> Write {
    Write::Session(Box::new(record.clone()))
}

fn place(ordinal: u32) -> NonZeroU32 {
    NonZeroU32::new(ordinal).unwrap()
}

/// An execution at a place of a session.
pub(super) fn in_session(id: SessionId, ordinal: u32) -> ExecutionRecord {
    ExecutionRecord { session_id: id, ordinal: Some(place(ordinal)), ..pending() }
}

fn failed(record: &ExecutionRecord, error: Option<&str>) -> ExecutionRecord {
    ExecutionRecord {
        status: Status::Failed,
        reason: Some(Reason::Timeout),
        completed_at: Some(at(60)),
        error: error.map(str::to_owned),
        ..record.clone()
    }
}

fn in_status(record: &ExecutionRecord, status: Status) -> ExecutionRecord {
    ExecutionRecord { status, ..running(record) }
}

async fn keeping() -> Store {
    migrated().await.0.with_callbacks()
}

/// Takes everything that waits, as one who delivers would: session, status, error.
async fn take_all(store: &Store) -> Vec<(SessionId, String, Option<String>)> {
    let mut taken = Vec::new();
    loop {
        let first = store.callbacks(PROJECT, &[], 100).await.unwrap();
        if first.is_empty() {
            assert_eq!(store.callbacks_waiting(PROJECT).await.unwrap(), 0);
            return taken;
        }
        for callback in first {
            store.callback_taken(callback.id).await.unwrap();
            taken.push((callback.session_id, callback.status, callback.error));
        }
    }
}

async fn statuses(store: &Store, id: SessionId) -> Vec<String> {
    take_all(store).await.into_iter().filter(|(session, ..)| *session == id).map(|(_, status, _)| status).collect()
}

#[tokio::test]
async fn a_session_reads_back_ends_once_and_is_not_opened_again() {
    let (store, _) = migrated().await;
    let one = session();
    assert!(store.session(PROJECT, one.id).await.unwrap().is_none());
    store.commit(&[put(&one)]).await.unwrap();
    let view = store.session(PROJECT, one.id).await.unwrap().unwrap();
    assert_eq!((view.record, view.current), (one.clone(), None));
    assert!(store.session("another project", one.id).await.unwrap().is_none());
    assert_eq!(store.open_sessions(one.owner).await.unwrap(), slice(&one));
    assert_eq!(store.open_sessions(Uuid::now_v7()).await.unwrap(), []);

    store.commit(&[put(&ended(&one))]).await.unwrap();
    let later = SessionRecord { ended_at: Some(at(99)), ..one.clone() };
    let other = SessionRecord { remote_id: "ses_2".to_owned(), ..one.clone() };
    for record in [&one, &later, &other] {
        store.commit(&[put(record)]).await.unwrap();
        assert_eq!(store.session(PROJECT, one.id).await.unwrap().unwrap().record, ended(&one));
    }
    assert_eq!(store.open_sessions(one.owner).await.unwrap(), []);
    // The id is the caller's: two projects may have the same.
    let elsewhere = SessionRecord { project_id: "another project".to_owned(), ..one.clone() };
    store.commit(&[put(&elsewhere)]).await.unwrap();
    assert_eq!(store.open_sessions(one.owner).await.unwrap(), slice(&elsewhere));
}

fn slice<T: Clone>(one: &T) -> Vec<T> {
    vec![one.clone()]
}

#[tokio::test]
async fn sessions_page_newest_first_each_with_its_latest_execution() {
    let (store, _) = migrated().await;
    let mut all: Vec<SessionRecord> = (0..5).map(|_| session()).collect();
    all[4].created_at = at(100);
    for record in &all {
        let (first, second) = (in_session(record.id, 1), in_session(record.id, 2));
        store.commit(&[put(record), submit(&completed(&first)), submit(&running(&second))]).await.unwrap();
    }
    // Neither another project's nor one that only has the same session.
    let alone = ExecutionRecord { session_id: all[0].id, ..pending() };
    let other = ExecutionRecord { project_id: "other".to_owned(), ..in_session(all[0].id, 3) };
    store.commit(&[submit(&alone), submit(&other)]).await.unwrap();

    all.sort_by_key(|record| (record.created_at, record.id.0));
    all.reverse();
    let (mut seen, mut before) = (Vec::new(), None);
    loop {
        let page = store.sessions(PROJECT, before, 2).await.unwrap();
        assert!(page.len() <= 2);
        let Some(last) = page.last() else { break };
        before = Some(SessionCursor { created_at: last.record.created_at, id: last.record.id });
        for view in page {
            let latest = view.current.unwrap();
            assert_eq!(
                (latest.session_id, latest.ordinal, latest.status),
                (view.record.id, Some(place(2)), Status::Running)
            );
            seen.push(view.record);
        }
    }
    assert_eq!(seen, all);
}

#[tokio::test]
async fn an_execution_is_found_by_its_place_and_a_place_is_taken_once() {
    let (store, _) = migrated().await;
    let id = SessionId::new();
    let (first, second) = (completed(&in_session(id, 1)), in_session(id, 2));
    store.commit(&[submit(&first), submit(&second)]).await.unwrap();
    let found = async |ordinal| store.execution_in_session(PROJECT, id, place(ordinal)).await.unwrap();
    assert_eq!(found(1).await, Some(first));
    assert_eq!(found(2).await, Some(second));
    assert_eq!(found(3).await, None);
    assert_eq!(store.execution_in_session("other", id, place(1)).await.unwrap(), None);
    let rival = in_session(id, 2);
    store.commit(&[submit(&rival)]).await.unwrap();
    assert_eq!(store.execution(PROJECT, rival.id).await.unwrap(), None);
    assert_ne!(found(2).await.unwrap().id, rival.id);
}

#[tokio::test]
async fn each_change_of_a_sessions_status_is_kept_in_its_order_and_words() {
    let store = keeping().await;
    let id = SessionId::new();
    let (first, second) = (in_session(id, 1), in_session(id, 2));
    let (waiting, paused) = (in_status(&first, Status::WaitingInput), in_status(&first, Status::Paused));
    store.commit(&[submit(&first)]).await.unwrap();
    assert_eq!(store.callbacks(PROJECT, &[], 9).await.unwrap(), [], "who made it knows that it is pending");
    let written = store.callbacks_written();
    store
        .commit(&[
            change(Status::Pending, &running(&first)),
            change(Status::Running, &waiting),
            change(Status::WaitingInput, &running(&first)),
            change(Status::Running, &paused),
        ])
        .await
        .unwrap();
    store.commit(&[change(Status::Paused, &completed(&first)), submit(&second)]).await.unwrap();
    assert!(written.has_changed().unwrap());
    let nasty = failed(&second, Some(NASTY));
    store.commit(&[change(Status::Pending, &running(&second)), change(Status::Running, &nasty)]).await.unwrap();
    assert_eq!(store.callbacks_waiting(PROJECT).await.unwrap(), 8);
    assert_eq!(store.callbacks_waiting("other").await.unwrap(), 0);
    let taken = take_all(&store).await;
    let told: Vec<_> = taken.iter().map(|(_, status, error)| (status.as_str(), error.as_deref())).collect();
    let kept = NASTY.replace('\0', "\u{fffd}");
    // A pause is none to the backend.
    assert_eq!(
        told,
        [
            ("running", None),
            ("waiting_input", None),
            ("running", None),
            ("running", None),
            ("completed", None),
            ("pending", None),
            ("running", None),
            ("failed", Some(&*kept)),
        ]
    );
    // What is not a session of a caller's is nobody's business, and neither is anything where nobody asked for it.
    let alone = pending();
    store.commit(&[submit(&alone), change(Status::Pending, &running(&alone))]).await.unwrap();
    assert_eq!(store.callbacks_waiting(PROJECT).await.unwrap(), 0);
    let (silent, _) = migrated().await;
    let first = in_session(id, 1);
    silent.commit(&[submit(&first), change(Status::Pending, &running(&first))]).await.unwrap();
    assert_eq!(silent.callbacks_waiting(PROJECT).await.unwrap(), 0);
}

#[tokio::test]
async fn the_order_is_that_of_the_batch_whichever_execution_is_older() {
    let store = keeping().await;
    let id = SessionId::new();
    // Ids grow with time: the second was made first.
    let (second, first) = (in_session(id, 2), in_session(id, 1));
    assert!(second.id < first.id);
    store.commit(&[submit(&first), change(Status::Pending, &running(&first))]).await.unwrap();
    store
        .commit(&[
            change(Status::Running, &failed(&first, Some("first"))),
            submit(&second),
            change(Status::Pending, &running(&second)),
            change(Status::Running, &failed(&second, None)),
        ])
        .await
        .unwrap();
    let taken = take_all(&store).await;
    let told: Vec<_> = taken.iter().map(|(_, status, error)| (status.as_str(), error.as_deref())).collect();
    assert_eq!(
        told,
        [("running", None), ("failed", Some("first")), ("pending", None), ("running", None), ("failed", None)]
    );
}

#[tokio::test]
async fn a_repeated_batch_is_kept_once_and_one_that_fails_not_at_all() {
    let store = keeping().await;
    let id = SessionId::new();
    let (first, second) = (in_session(id, 1), in_session(id, 2));
    let whole = [
        submit(&first),
        change(Status::Pending, &running(&first)),
        change(Status::Running, &completed(&first)),
        submit(&second),
        change(Status::Pending, &running(&second)),
    ];
    // Its first part had been committed before.
    store.commit(&whole[..2]).await.unwrap();
    for _ in 0..3 {
        store.commit(&whole).await.unwrap();
    }
    assert_eq!(statuses(&store, id).await, ["running", "completed", "pending", "running"]);
    let written = store.callbacks_written();
    // Later than the end, so it is no repetition.
    let later = ExecutionRecord { last_seq: 8, ..running(&first) };
    let conflict = [change(Status::Running, &completed(&second)), change(Status::Pending, &later)];
    store.commit(&conflict).await.unwrap_err();
    assert_eq!(store.callbacks_waiting(PROJECT).await.unwrap(), 0);
    assert!(!written.has_changed().unwrap());
}

#[tokio::test]
async fn a_session_that_ends_unused_is_cancelled_and_one_that_was_used_says_nothing_more() {
    let store = keeping().await;
    let (unused, used) = (session(), session());
    let first = in_session(used.id, 1);
    store.commit(&[put(&unused), put(&used), submit(&first)]).await.unwrap();
    assert_eq!(take_all(&store).await, []);
    for _ in 0..2 {
        store.commit(&[put(&ended(&unused)), put(&ended(&used))]).await.unwrap();
    }
    assert_eq!(take_all(&store).await, [(unused.id, "cancelled".to_owned(), None)]);
}

#[tokio::test]
async fn sessions_are_found_by_their_first_change_and_dropped_alone() {
    let store = keeping().await;
    let ids: Vec<SessionId> = (0..3).map(|_| SessionId::new()).collect();
    // The last session's changes are the first that wait.
    for id in ids.iter().rev() {
        let record = in_session(*id, 1);
        store
            .commit(&[
                submit(&record),
                change(Status::Pending, &running(&record)),
                change(Status::Running, &completed(&record)),
            ])
            .await
            .unwrap();
    }
    let found = async |except: &[SessionId], limit| -> Vec<(SessionId, String)> {
        let found = store.callbacks(PROJECT, except, limit).await.unwrap();
        found.into_iter().map(|callback| (callback.session_id, callback.status)).collect()
    };
    let first = |id: SessionId| (id, "running".to_owned());
    assert_eq!(found(&[], 9).await, [first(ids[2]), first(ids[1]), first(ids[0])]);
    assert_eq!(found(&[], 2).await, [first(ids[2]), first(ids[1])]);
    assert_eq!(found(&[ids[2], ids[0]], 2).await, [first(ids[1])]);
    assert_eq!(store.callbacks("other", &[], 9).await.unwrap(), []);
    store.callbacks_unwanted("other", ids[2]).await.unwrap();
    store.callbacks_unwanted(PROJECT, ids[2]).await.unwrap();
    assert_eq!(found(&[], 9).await, [first(ids[1]), first(ids[0])]);
    assert_eq!(store.callbacks_waiting(PROJECT).await.unwrap(), 4);
}

#[tokio::test]
async fn the_place_of_a_session_is_where_its_reader_would_go_on() {
    let (store, options) = migrated().await;
    let owner = Uuid::now_v7();
    let mine = |record: ExecutionRecord| ExecutionRecord { owner, ..record };
    let ids: Vec<SessionId> = (0..4).map(|_| SessionId::new()).collect();
    let log = |record: &ExecutionRecord, seq| write(record, &event(seq, EventType::Log, Severity::Info));
    // One that runs while its next one waits; one that has ended; one of another sidecar; one without an event.
    let (done, runs, waits) =
        (in_session(ids[0], 1), mine(running(&in_session(ids[0], 2))), mine(in_session(ids[0], 3)));
    let (old, last) = (in_session(ids[1], 1), in_session(ids[1], 2));
    let (foreign, fresh) = (running(&in_session(ids[2], 1)), mine(in_session(ids[3], 1)));
    let mut batch: Vec<Write> = [&runs, &waits, &foreign, &fresh].into_iter().map(submit).collect();
    batch.extend([&done, &old, &last].map(|record| submit(&mine(completed(record)))));
    batch.extend([log(&runs, 4), log(&waits, 1), log(&foreign, 9)]);
    store.commit(&batch).await.unwrap();
    let places = async |owner, named: &[SessionId]| store.places(PROJECT, owner, named).await.unwrap();
    let at_place = |ordinal, seq| SessionEventId { ordinal: place(ordinal), seq };
    assert_eq!(places(Some(owner), &[]).await, [(ids[0], at_place(2, 4))]);
    let mut two = places(Some(owner), &[ids[1]]).await;
    two.sort_by_key(|(id, _)| id.0);
    assert_eq!(two, [(ids[0], at_place(2, 4)), (ids[1], at_place(2, 7))]);
    assert_eq!(places(None, &[ids[2], SessionId::new()]).await, [(ids[2], at_place(1, 9))]);
    assert_eq!(places(None, &[]).await, []);
    assert_eq!(store.places("other", Some(owner), &ids).await.unwrap(), []);
    execute(&options, "DROP TABLE opencode_sidecar.callbacks").await;
    assert_eq!(places(Some(owner), &[]).await.len(), 1, "the outbox has no part in it");
}
