//! The store against a real Postgres.

#![allow(clippy::unwrap_used, reason = "a test's own helpers fail like the test")]

mod keys;
mod lease;
mod projects;
mod retention;
mod sessions;

use crate::support::postgres::{connect, fresh_database, new_role};
use chrono::{DateTime, TimeDelta, Utc};
use opencode_sidecar::model::request::OnRestart;
use opencode_sidecar::model::task::{Limits, ModelChoice, Provider};
use opencode_sidecar::model::{
    Event, EventType, ExecutionId, ExecutionRecord, Fingerprint, Idempotency, NewEvent, Reason, SessionId, Severity,
    Status, Task, TaskId, Usage,
};
use opencode_sidecar::store::{Cursor, DatabaseOptions, EventQuery, HistoryFilter, Store, StoreError, Write};
use secrecy::ExposeSecret;
use serde_json::json;
use sqlx::{AssertSqlSafe, Connection, Executor};
use std::num::NonZeroU32;
use std::slice;
use uuid::Uuid;

const NASTY: &str = "NUL \0, ESC \u{1b}[31mred\u{1b}[0m, 🦀 e\u{301}, \\u0000, \"quote\", \u{2028}\u{fffd}\r\n\t";
pub(crate) const PROJECT: &str = "project";

pub(crate) async fn migrated() -> (Store, DatabaseOptions) {
    let options = fresh_database().await;
    let store = Store::connect(&options).await.unwrap();
    store.migrate().await.unwrap();
    (store, options)
}

fn at(seconds: i64) -> DateTime<Utc> {
    DateTime::from_timestamp(1_800_000_000 + seconds, 123_456_000).unwrap()
}

pub(crate) fn pending() -> ExecutionRecord {
    ExecutionRecord {
        id: ExecutionId::new(),
        project_id: PROJECT.to_owned(),
        owner: Uuid::now_v7(),
        session_id: SessionId::new(),
        ordinal: None,
        task: Task {
            task_id: TaskId::new(),
            prompt: Some(NASTY.to_owned()),
            code: None,
            context: Some(String::new()),
            session_id: Some(SessionId::new()),
            model: ModelChoice {
                provider: Provider::Local,
                model: "m".to_owned(),
                version: Some("m-2030".to_owned()),
                endpoint: "http://127.0.0.1:1/v1".to_owned(),
                temperature: Some(0.5),
                max_tokens: Some(128_000),
                enabled_tools: Some(vec!["bash".to_owned()]),
            },
            system_prompt: Some("be brief".to_owned()),
            agent: None,
            workdir: Some("a/b".to_owned()),
            timeout_seconds: 3600,
            limits: Limits { output_bytes: u64::MAX, model_calls: 100, total_tokens: 1, ..Limits::default() },
            on_restart: OnRestart::Fail,
            metadata: Some(json!({ "z": [1, null, NASTY], "a": { "0": 1.5 }, NASTY: true })),
        },
        status: Status::Pending,
        reason: None,
        progress: None,
        last_seq: 0,
        created_at: at(0),
        started_at: None,
        completed_at: None,
        paused_ms: 0,
        epoch: NonZeroU32::new(3).unwrap(),
        generation: NonZeroU32::MIN,
        protections: vec![],
        final_message: None,
        error: None,
        files_modified: vec![],
        usage: Usage::default(),
        // The same in each: the rows of several may have one key.
        idempotency: Some(Idempotency {
            caller: "shared-secret".to_owned(),
            key: "~key~".parse().unwrap(),
            fingerprint: Fingerprint([0xfe; 32]),
        }),
    }
}

pub(crate) fn running(record: &ExecutionRecord) -> ExecutionRecord {
    ExecutionRecord { status: Status::Running, started_at: Some(at(1)), ..record.clone() }
}

/// Every field set.
pub(crate) fn completed(record: &ExecutionRecord) -> ExecutionRecord {
    ExecutionRecord {
        status: Status::Completed,
        reason: Some(Reason::Finished),
        progress: Some(100),
        last_seq: 7,
        started_at: Some(at(1)),
        completed_at: Some(at(60)),
        paused_ms: 1234,
        protections: vec!["landlock_fs".to_owned(), "a,b\"{}".to_owned()],
        final_message: Some("done 🦀".to_owned()),
        files_modified: vec!["src/a b.rs".to_owned(), String::new(), "NULL".to_owned()],
        usage: Usage {
            input_tokens: 1,
            output_tokens: 2,
            model_calls: 3,
            cost: 0.25,
            cpu_seconds: Some(1.5),
            memory_bytes: Some(4),
            memory_peak_bytes: Some(u64::MAX),
            pids: Some(6),
            read_bytes: None,
            written_bytes: Some(8),
        },
        ..record.clone()
    }
}

pub(crate) fn submit(record: &ExecutionRecord) -> Write {
    Write::Submit(Box::new(record.clone()))
}

pub(crate) fn change(expected: Status, record: &ExecutionRecord) -> Write {
    Write::Change { expected, record: Box::new(record.clone()) }
}

pub(crate) fn event(seq: u64, kind: EventType, severity: Severity) -> Event {
    NewEvent::new(kind, json!(NASTY)).with("call_id", NASTY).severity(severity).seal(seq, at(2))
}

pub(crate) fn write(record: &ExecutionRecord, event: &Event) -> Write {
    Write::Event { execution: record.id, event: event.clone() }
}

fn all() -> EventQuery {
    EventQuery { after: 0, limit: 1000, types: None, severities: None }
}

pub(crate) async fn row(store: &Store, record: &ExecutionRecord) -> ExecutionRecord {
    store.execution(&record.project_id, record.id).await.unwrap().unwrap()
}

#[tokio::test]
async fn a_record_comes_back_with_every_field() {
    let (store, _) = migrated().await;
    let new = pending();
    let full = completed(&pending());
    store.commit(&[submit(&new), submit(&full)]).await.unwrap();
    assert_eq!(row(&store, &new).await, new);
    assert_eq!(row(&store, &full).await, full);
    // The same by a change.
    store.commit(&[change(Status::Pending, &completed(&new))]).await.unwrap();
    assert_eq!(row(&store, &new).await, completed(&new));
    assert_eq!(store.execution("another project", new.id).await.unwrap(), None);
    assert_eq!(store.execution(PROJECT, ExecutionId::new()).await.unwrap(), None);
}

#[tokio::test]
async fn a_nul_in_the_final_message_becomes_a_replacement_character() {
    let (store, _) = migrated().await;
    let mut record = completed(&pending());
    record.final_message = Some("a\0b".to_owned());
    store.commit(&[submit(&record)]).await.unwrap();
    assert_eq!(row(&store, &record).await.final_message.as_deref(), Some("a\u{fffd}b"));
}

#[tokio::test]
async fn events_come_back_byte_for_byte() {
    let (store, _) = migrated().await;
    let record = pending();
    let mut events: Vec<Event> =
        EventType::ALL.iter().zip(1..).map(|(kind, seq)| event(seq, *kind, Severity::Info)).collect();
    // Spacing and repeated members are bytes like any others.
    events[0].json = r#"{ "seq" : 1,"b":1,  "a":2 ,"a":1e2, "data":"\u0000\ud83e\udd80" }"#.into();
    let mut batch = vec![submit(&record)];
    batch.extend(events.iter().map(|event| write(&record, event)));
    store.commit(&batch).await.unwrap();
    assert_eq!(store.events(record.id, &all()).await.unwrap(), events);
    assert_eq!(row(&store, &record).await.last_seq, events.len() as u64);
}

#[tokio::test]
async fn a_repeated_batch_changes_nothing() {
    let (store, _) = migrated().await;
    let new = pending();
    let mut halfway = running(&new);
    halfway.progress = Some(50);
    let waiting = ExecutionRecord { status: Status::WaitingInput, ..halfway.clone() };
    let first = event(1, EventType::Stdout, Severity::Info);
    let whole = [
        submit(&new),
        write(&new, &first),
        change(Status::Pending, &running(&new)),
        Write::Progress(Box::new(halfway.clone())),
        change(Status::Running, &waiting),
        change(Status::WaitingInput, &halfway),
        change(Status::Running, &completed(&new)),
    ];
    for _ in 0..3 {
        store.commit(&whole).await.unwrap();
        assert_eq!(row(&store, &new).await, completed(&new));
        assert_eq!(store.events(new.id, &all()).await.unwrap(), slice::from_ref(&first));
    }
    // Another batch of the same writes, whose first part had been committed before.
    let other = pending();
    store.commit(&[submit(&other), change(Status::Pending, &running(&other))]).await.unwrap();
    let rest = [submit(&other), change(Status::Pending, &running(&other)), change(Status::Running, &completed(&other))];
    for _ in 0..2 {
        store.commit(&rest).await.unwrap();
        assert_eq!(row(&store, &other).await, completed(&other));
    }
}

#[tokio::test]
async fn a_seq_that_is_there_keeps_its_bytes_and_last_seq_never_falls() {
    let (store, _) = migrated().await;
    let record = pending();
    let (first, other) = (event(5, EventType::Stdout, Severity::Info), event(5, EventType::Stderr, Severity::Warn));
    store.commit(&[submit(&record), write(&record, &first)]).await.unwrap();
    store.commit(&[write(&record, &other), write(&record, &event(2, EventType::Log, Severity::Info))]).await.unwrap();
    assert_eq!(row(&store, &record).await.last_seq, 5);
    assert_eq!(store.events(record.id, &EventQuery { after: 4, ..all() }).await.unwrap(), [first]);
}

#[tokio::test]
async fn progress_is_written_while_it_runs_and_never_over_the_end() {
    let (store, _) = migrated().await;
    let new = pending();
    let mut halfway = running(&new);
    halfway.progress = Some(50);
    halfway.files_modified = vec!["a".to_owned()];
    halfway.usage.model_calls = 9;
    halfway.last_seq = 3;
    store.commit(&[submit(&new), change(Status::Pending, &running(&new))]).await.unwrap();
    store.commit(&[Write::Progress(Box::new(halfway.clone()))]).await.unwrap();
    assert_eq!(row(&store, &new).await, halfway);
    store.commit(&[change(Status::Running, &completed(&new))]).await.unwrap();
    store.commit(&[Write::Progress(Box::new(halfway))]).await.unwrap();
    assert_eq!(row(&store, &new).await, completed(&new));
}

#[tokio::test]
async fn a_change_from_another_status_is_a_conflict_and_nothing_of_the_batch_stays() {
    let (store, _) = migrated().await;
    let (one, neighbour) = (pending(), pending());
    store.commit(&[submit(&one)]).await.unwrap();
    let batch = [
        submit(&neighbour),
        write(&one, &event(1, EventType::Log, Severity::Info)),
        change(Status::Running, &completed(&one)),
    ];
    let error = store.commit(&batch).await.unwrap_err();
    assert!(
        matches!(error, StoreError::Conflict { execution, expected: Status::Running, found: Status::Pending } if execution == one.id),
        "{error:?}"
    );
    assert_eq!(row(&store, &one).await, one);
    assert_eq!(store.execution(PROJECT, neighbour.id).await.unwrap(), None);
    assert_eq!(store.events(one.id, &all()).await.unwrap(), []);
    // A final status is replaced by no other.
    store.commit(&[change(Status::Pending, &completed(&one))]).await.unwrap();
    let cancelled = ExecutionRecord { status: Status::Cancelled, reason: Some(Reason::Cancelled), ..completed(&one) };
    let error = store.commit(&[change(Status::Pending, &cancelled)]).await.unwrap_err();
    assert!(matches!(error, StoreError::Conflict { .. }) && !error.is_transient());
    // Changes that do not follow from each other are refused before the database is asked.
    let broken = [change(Status::Pending, &running(&neighbour)), change(Status::Paused, &completed(&neighbour))];
    assert!(matches!(store.commit(&broken).await, Err(StoreError::Conflict { .. })));
}

#[tokio::test]
async fn history_pages_by_cursor_even_where_times_are_equal() {
    let (store, _) = migrated().await;
    let mut records: Vec<ExecutionRecord> = (0..10).map(|_| pending()).collect();
    for record in &mut records[7..] {
        record.created_at = at(100);
    }
    let batch: Vec<Write> = records.iter().map(submit).collect();
    store.commit(&batch).await.unwrap();
    store.commit(&[submit(&ExecutionRecord { project_id: "other".to_owned(), ..pending() })]).await.unwrap();

    records.sort_by_key(|record| (record.created_at, record.id));
    records.reverse();
    let (mut seen, mut before) = (Vec::new(), None);
    loop {
        let page = store.history(PROJECT, &HistoryFilter::default(), before, 3).await.unwrap();
        assert!(page.len() <= 3);
        let Some(last) = page.last() else { break };
        before = Some(Cursor::of(last));
        seen.extend(page);
    }
    assert_eq!(seen, records);
}

#[tokio::test]
async fn history_filters() {
    let (store, _) = migrated().await;
    let (mut old, new) = (pending(), pending());
    old.created_at = at(0) - TimeDelta::hours(1);
    store.commit(&[submit(&old), submit(&new), change(Status::Pending, &running(&new))]).await.unwrap();
    let (old_id, new_id) = (old.id, new.id);
    let none = HistoryFilter::default();
    let cases = [
        (none.clone(), vec![new_id, old_id]),
        (HistoryFilter { task_id: Some(old.task.task_id), ..none.clone() }, vec![old_id]),
        (HistoryFilter { session_id: Some(new.session_id), ..none.clone() }, vec![new_id]),
        (HistoryFilter { status: Some(Status::Running), ..none.clone() }, vec![new_id]),
        (HistoryFilter { status: Some(Status::Failed), ..none.clone() }, vec![]),
        (HistoryFilter { from: Some(at(0)), ..none.clone() }, vec![new_id]),
        (HistoryFilter { to: Some(at(0)), ..none.clone() }, vec![old_id]),
        (HistoryFilter { task_id: Some(old.task.task_id), status: Some(Status::Running), ..none }, vec![]),
    ];
    for (filter, expected) in cases {
        let found = store.history(PROJECT, &filter, None, 10).await.unwrap();
        assert_eq!(found.iter().map(|record| record.id).collect::<Vec<_>>(), expected, "{filter:?}");
    }
}

#[tokio::test]
async fn events_by_page_type_and_severity() {
    let (store, _) = migrated().await;
    let record = pending();
    let kinds = [EventType::Stdout, EventType::Stderr, EventType::Log];
    let severities = [Severity::Info, Severity::Warn];
    let mut batch = vec![submit(&record)];
    for seq in 1..=12_u64 {
        let index = usize::try_from(seq).unwrap();
        batch.push(write(&record, &event(seq, kinds[index % 3], severities[index % 2])));
    }
    store.commit(&batch).await.unwrap();
    let seqs = async |query: EventQuery| -> Vec<u64> {
        store.events(record.id, &query).await.unwrap().iter().map(|event| event.seq).collect()
    };
    assert_eq!(seqs(EventQuery { after: 3, limit: 4, ..all() }).await, [4, 5, 6, 7]);
    assert_eq!(seqs(EventQuery { after: 12, ..all() }).await, [0_u64; 0]);
    assert_eq!(seqs(EventQuery { after: u64::MAX, ..all() }).await, [0_u64; 0]);
    assert_eq!(seqs(EventQuery { types: Some(vec![EventType::Stdout]), ..all() }).await, [3, 6, 9, 12]);
    let two = Some(vec![EventType::Stdout, EventType::Log]);
    let warn = Some(vec![Severity::Warn]);
    assert_eq!(seqs(EventQuery { types: two, severities: warn, after: 4, ..all() }).await, [5, 9, 11]);
    assert_eq!(seqs(EventQuery { types: Some(vec![]), ..all() }).await, [0_u64; 0]);
}

/// What a journal does after a restart: it begins with what was shipped long ago.
#[tokio::test]
async fn batches_that_were_followed_by_others_change_nothing_when_they_come_again() {
    let (store, _) = migrated().await;
    let new = pending();
    let events: Vec<_> = (1..=3).map(|seq| event(seq, EventType::Status, Severity::Info)).collect();
    let at = |record: ExecutionRecord, last_seq| ExecutionRecord { last_seq, ..record };
    let batches = [
        vec![submit(&new), write(&new, &events[0])],
        vec![write(&new, &events[1]), change(Status::Pending, &at(running(&new), 2))],
        vec![write(&new, &events[2]), change(Status::Running, &at(completed(&new), 3))],
    ];
    for batch in &batches {
        store.commit(batch).await.unwrap();
    }
    let (before, log) = (row(&store, &new).await, store.events(new.id, &all()).await.unwrap());
    for batch in &batches {
        store.commit(batch).await.unwrap();
        assert_eq!(
            (row(&store, &new).await, store.events(new.id, &all()).await.unwrap()),
            (before.clone(), log.clone())
        );
    }
    assert_eq!((before.status, before.last_seq), (Status::Completed, 3));
}

#[tokio::test]
async fn unfinished_are_those_of_one_owner_without_an_end() {
    let (store, _) = migrated().await;
    let one = pending();
    let mine = |record: ExecutionRecord| ExecutionRecord { owner: one.owner, ..record };
    let (second, done) = (mine(running(&pending())), mine(completed(&pending())));
    store.commit(&[submit(&one), submit(&second), submit(&done), submit(&pending())]).await.unwrap();
    assert_eq!(store.unfinished(&one.project_id, one.owner).await.unwrap(), [one, second]);
}

#[tokio::test]
async fn what_is_deleted_stays_deleted_and_its_later_writes_hold_nothing_up() {
    let (store, _) = migrated().await;
    let (gone, stays) = (pending(), pending());
    let (first, second) = (event(1, EventType::Log, Severity::Info), event(2, EventType::Log, Severity::Info));
    store.commit(&[submit(&gone), submit(&stays), write(&gone, &first)]).await.unwrap();
    let delete = |project: &str| [Write::Delete { project: project.to_owned(), execution: gone.id }];
    store.commit(&delete("another project")).await.unwrap();
    assert_eq!(store.events(gone.id, &all()).await.unwrap(), slice::from_ref(&first));
    for _ in 0..2 {
        store.commit(&delete(PROJECT)).await.unwrap();
    }
    assert_eq!(store.events(gone.id, &all()).await.unwrap(), []);
    let batch = [
        write(&gone, &second),
        write(&stays, &first),
        change(Status::Pending, &running(&gone)),
        change(Status::Pending, &running(&stays)),
        Write::Progress(Box::new(running(&gone))),
    ];
    store.commit(&batch).await.unwrap();
    assert_eq!(store.execution(PROJECT, gone.id).await.unwrap(), None);
    assert_eq!(store.events(gone.id, &all()).await.unwrap(), []);
    assert_eq!(store.events(stays.id, &all()).await.unwrap(), [first]);
    assert_eq!(row(&store, &stays).await.status, Status::Running);
}

#[tokio::test]
async fn eight_migrate_an_empty_database_at_once() {
    let options = fresh_database().await;
    let migrate = async || {
        let store = Store::connect(&options).await.unwrap();
        store.migrate().await.unwrap();
        store
    };
    let all_at_once = futures_util::future::join_all((0..8).map(|_| migrate())).await;
    let record = pending();
    all_at_once[0].commit(&[submit(&record)]).await.unwrap();
    assert_eq!(row(&all_at_once[7], &record).await, record);
}

#[tokio::test]
async fn two_schemas_of_one_database_do_not_see_each_other() {
    let (one, options) = migrated().await;
    let other = DatabaseOptions { schema: "Other \"schema\"".to_owned(), ..options };
    let other = Store::connect(&other).await.unwrap();
    other.migrate().await.unwrap();
    let record = pending();
    one.commit(&[submit(&record)]).await.unwrap();
    assert_eq!(other.execution(PROJECT, record.id).await.unwrap(), None);
    assert_eq!(row(&one, &record).await, record);
}

async fn execute(options: &DatabaseOptions, statement: &str) {
    let mut connection = connect(&options.url).await;
    connection.execute(AssertSqlSafe(statement.to_owned())).await.unwrap();
    connection.close().await.unwrap();
}

#[tokio::test]
async fn a_schema_that_differs_or_is_newer_is_refused() {
    for (statement, word) in [
        ("UPDATE opencode_sidecar._sqlx_migrations SET checksum = '\\x00'", "another form"),
        (
            "INSERT INTO opencode_sidecar._sqlx_migrations (version, description, success, checksum, execution_time)
             VALUES (9999, 'later', true, '\\x00', 0)",
            "newer",
        ),
    ] {
        let (store, options) = migrated().await;
        execute(&options, statement).await;
        let error = store.migrate().await.unwrap_err();
        assert!(matches!(error, StoreError::Migration { .. }), "{error:?}");
        assert!(error.to_string().contains(word), "{error}");
    }
}

#[tokio::test]
async fn a_user_who_may_not_make_a_schema_is_told() {
    let (_, options) = new_role(&fresh_database().await).await;
    let error = Store::connect(&options).await.unwrap().migrate().await.unwrap_err();
    assert!(error.to_string().contains("may not make it"), "{error}");
}

#[tokio::test]
async fn a_login_that_is_refused_is_told_from_a_server_that_is_away() {
    let options = fresh_database().await;
    let mut url = url::Url::parse(options.url.expose_secret()).unwrap();
    url.set_password(Some("hunter2")).unwrap();
    let refused = DatabaseOptions { url: url.to_string().into(), ..options.clone() };
    let error = Store::connect(&refused).await.unwrap().ping().await.unwrap_err();
    assert!(matches!(error, StoreError::Refused(_)), "{error:?}");
    assert!(!format!("{error:?}").contains("hunter2"));
    let away = DatabaseOptions { url: "postgres://u:hunter2@127.0.0.1:1/d".into(), ..options.clone() };
    let error = Store::connect(&away).await.unwrap().ping().await.unwrap_err();
    assert!(matches!(error, StoreError::Unavailable(_)) && error.is_transient(), "{error:?}");
    assert!(!format!("{error:?}").contains("hunter2"));
    Store::connect(&options).await.unwrap().ping().await.unwrap();
}

#[tokio::test]
async fn a_connection_that_the_server_cut_is_made_again() {
    let (store, options) = migrated().await;
    store.ping().await.unwrap();
    execute(
        &options,
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
         WHERE datname = current_database() AND pid <> pg_backend_pid() AND application_name = 'opencode-sidecar'",
    )
    .await;
    store.ping().await.unwrap();
}

#[tokio::test]
async fn a_read_only_database_is_an_outage_and_a_damaged_row_is_not() {
    let (store, options) = migrated().await;
    let record = pending();
    store.commit(&[submit(&record)]).await.unwrap();
    execute(&options, "UPDATE opencode_sidecar.executions SET task = '{}'").await;
    let error = store.execution(PROJECT, record.id).await.unwrap_err();
    assert!(matches!(error, StoreError::Corrupt(_)) && !error.is_transient(), "{error:?}");
    execute(
        &options,
        "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET default_transaction_read_only = on', current_database()); END $$",
    )
    .await;
    let again = Store::connect(&options).await.unwrap();
    let error = again.commit(&[submit(&pending())]).await.unwrap_err();
    assert!(matches!(error, StoreError::Unavailable(_)), "{error:?}");
}
