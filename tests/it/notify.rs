//! The callback, with a real Postgres and a backend that fails as backends do.

#![allow(clippy::unwrap_used, reason = "a test's own helpers fail like the test")]

pub(crate) mod backend;

use crate::store::{PROJECT, change, completed, event, migrated, pending, running, submit, write};
use crate::support::postgres::connect;
use crate::support::sidecar::{PATIENCE, World, soon};
use backend::{Backend, Reply, taken};
use opencode_sidecar::model::{EventType, ExecutionRecord, Reason, SessionId, Severity, Status};
use opencode_sidecar::notify::{Notifier, Pace, Settings};
use opencode_sidecar::sandbox::Signal;
use opencode_sidecar::store::{Store, Write};
use opencode_sidecar::tasks::Tasks;
use opencode_sidecar::telemetry::Metrics;
use secrecy::SecretString;
use serde_json::{Value, json};
use sqlx::Executor;
use std::num::NonZeroU32;
use std::time::{Duration, Instant};
use tokio::sync::watch;
use uuid::Uuid;

/// Everything at once, but no call is cut: one that is slow on a busy machine must not be made twice.
const QUICK: Pace = Pace {
    call: PATIENCE,
    first_pause: Duration::from_millis(2),
    longest_pause: Duration::from_millis(20),
    look: Duration::from_millis(20),
};
/// Only what is announced is looked at, and what has failed once is not tried again within a test.
const SLOW: Pace = Pace {
    call: PATIENCE,
    first_pause: Duration::from_secs(3600),
    longest_pause: Duration::from_secs(3600),
    look: Duration::from_secs(3600),
};

/// A notifier and what it has to do with.
struct Life {
    tasks: Tasks,
    metrics: Metrics,
    notifier: Notifier,
}

fn settings(backend: &Backend, pace: Pace) -> Settings {
    let _ = rustls::crypto::ring::default_provider().install_default();
    Settings { backend: backend.url("/"), secret: None, project: PROJECT.to_owned(), owner: Uuid::now_v7(), pace }
}

impl Life {
    fn start(settings: Settings, store: &Store) -> Self {
        let (tasks, metrics) = (Tasks::new(), Metrics::new().unwrap());
        let notifier = Notifier::start(settings, store.clone(), metrics.clone(), &tasks).unwrap();
        Self { tasks, metrics, notifier }
    }

    /// In the middle of whatever it does.
    async fn end(self) {
        self.tasks.stop(PATIENCE).await.unwrap();
    }

    /// Waits until the metrics say so. They are counted after the call that they count.
    async fn measured(&self, wanted: impl Fn(&str) -> bool) {
        soon("the metrics", async {
            while !wanted(&self.metrics.render().unwrap()) {
                tokio::task::yield_now().await;
            }
        })
        .await;
    }
}

async fn keeping() -> Store {
    migrated().await.0.with_callbacks()
}

/// The first execution of a session.
fn first() -> ExecutionRecord {
    ExecutionRecord { ordinal: NonZeroU32::new(1), ..pending() }
}

fn failed(record: &ExecutionRecord, error: &str) -> ExecutionRecord {
    ExecutionRecord {
        status: Status::Failed,
        reason: Some(Reason::Timeout),
        completed_at: Some(record.created_at),
        error: Some(error.to_owned()),
        ..record.clone()
    }
}

fn waiting(record: &ExecutionRecord) -> ExecutionRecord {
    ExecutionRecord { status: Status::WaitingInput, ..running(record) }
}

/// From its submission to its running.
async fn begin(store: &Store) -> ExecutionRecord {
    let record = first();
    store.commit(&[submit(&record), change(Status::Pending, &running(&record))]).await.unwrap();
    record
}

async fn step(store: &Store, from: Status, to: &ExecutionRecord) {
    store.commit(&[change(from, to)]).await.unwrap();
}

/// Waits until nothing is left to be told.
async fn all_told(store: &Store) {
    soon("everything is told", async { while store.callbacks_waiting(PROJECT).await.unwrap() > 0 {} }).await;
}

#[tokio::test]
async fn each_change_is_told_once_in_order_and_with_the_secret() {
    let (store, backend) = (keeping().await, Backend::alive());
    let (_holder, secret) = watch::channel(SecretString::from("the-secret"));
    let secret = Some(secret);
    let settings = Settings { backend: backend.url("/base/"), secret, ..settings(&backend, SLOW) };
    let life = Life::start(settings, &store);
    let (one, other) = (begin(&store).await, begin(&store).await);
    step(&store, Status::Running, &waiting(&one)).await;
    step(&store, Status::Running, &failed(&other, "it took too long")).await;
    step(&store, Status::WaitingInput, &completed(&one)).await;
    assert_eq!(backend.told(one.session_id, 3).await, ["running", "waiting_input", "completed"]);
    let calls = backend.until("the other", |calls| taken(calls, other.session_id, "status").len() == 2).await;
    assert_eq!(
        taken(&calls, other.session_id, "status"),
        [json!({ "status": "running", "error": null }), json!({ "status": "failed", "error": "it took too long" })]
    );
    all_told(&store).await;
    life.measured(|text| text.contains("callbacks_total{outcome=\"delivered\"} 5\n")).await;
    life.measured(|text| text.contains("callbacks_waiting 0\n")).await;
    // It has seen that nothing is left; what comes now wakes it.
    let late = begin(&store).await;
    assert_eq!(backend.told(late.session_id, 1).await, ["running"]);
    life.notifier.drain(PATIENCE).await;
    let calls = backend.calls();
    for call in &calls {
        assert_eq!((&*call.method, call.authorization.as_deref()), ("PATCH", Some("Bearer the-secret")), "{call:?}");
        assert!(call.path.starts_with("/base/api/sessions/"), "{call:?}");
    }
    assert_eq!(calls.iter().filter(|call| call.path.ends_with("/status")).count(), 6);
}

#[tokio::test]
async fn whatever_fails_is_told_later_and_in_order() {
    let (store, mut backend) = (keeping().await, Backend::dead());
    let life = Life::start(settings(&backend, QUICK), &store);
    let record = begin(&store).await;
    let id = record.session_id;
    let mut expected = vec!["running"];
    // Nobody listens.
    let many = |text: &str| {
        ["0", "1"].iter().all(|few| !text.contains(&format!("callbacks_total{{outcome=\"failed\"}} {few}\n")))
    };
    life.measured(many).await;
    backend.start();
    assert_eq!(backend.told(id, 1).await, expected);
    let at = running(&record);
    for (failures, reply) in (1..).zip([
        Reply::Status(500),
        Reply::Status(503),
        Reply::Busy(0),
        Reply::Status(400),
        Reply::Status(401),
        Reply::Status(410),
        Reply::Redirect,
        Reply::Cut,
    ]) {
        backend.reply(id, reply);
        // Two at a time, so that an order can be lost.
        let next = if at.status == Status::Running { waiting(&record) } else { running(&record) };
        step(&store, at.status, &next).await;
        backend.failed(id, 2 * failures - 1).await;
        step(&store, next.status, &at).await;
        backend.failed(id, 2 * failures).await;
        backend.reply(id, Reply::Status(200));
        expected.extend([next.status.as_str(), at.status.as_str()]);
        assert_eq!(backend.told(id, expected.len()).await, expected, "{reply:?}");
    }
    // It dies in the middle of a call, is away, and is back on the same port.
    backend.reply(id, Reply::Hang);
    step(&store, at.status, &waiting(&record)).await;
    backend.until("a call that hangs", |calls| calls.last().is_some_and(|call| call.reply == Reply::Hang)).await;
    backend.die().await;
    step(&store, Status::WaitingInput, &completed(&record)).await;
    backend.reply(id, Reply::Status(200));
    backend.start();
    expected.extend(["waiting_input", "completed"]);
    assert_eq!(backend.told(id, expected.len()).await, expected);
    all_told(&store).await;
    life.notifier.drain(PATIENCE).await;
    assert_eq!(backend.told(id, 0).await, expected, "nothing was told twice");
}

#[tokio::test]
async fn a_session_that_the_backend_does_not_know_ends_alone() {
    let (store, backend) = (keeping().await, Backend::alive());
    let (unknown, known) = (begin(&store).await, begin(&store).await);
    backend.reply(unknown.session_id, Reply::Status(404));
    step(&store, Status::Running, &completed(&unknown)).await;
    let life = Life::start(settings(&backend, SLOW), &store);
    assert_eq!(backend.told(known.session_id, 1).await, ["running"]);
    all_told(&store).await;
    step(&store, Status::Running, &completed(&known)).await;
    assert_eq!(backend.told(known.session_id, 2).await, ["running", "completed"]);
    life.measured(|text| text.contains("callbacks_total{outcome=\"unwanted\"} 1\n")).await;
    life.notifier.drain(PATIENCE).await;
    let calls = backend.calls();
    let asked: Vec<_> = calls.iter().filter(|call| call.is_for(unknown.session_id, "status")).collect();
    assert_eq!(asked.len(), 1, "{asked:?}");
}

#[tokio::test]
async fn sessions_that_hang_or_fail_hold_no_other_up() {
    let (store, backend) = (keeping().await, Backend::alive());
    // Seven hang and many more are refused; there are places for eight.
    let mut stuck = Vec::new();
    for i in 0..100 {
        let record = begin(&store).await;
        backend.reply(record.session_id, if i < 7 { Reply::Hang } else { Reply::Status(500) });
        stuck.push(record);
    }
    let life = Life::start(settings(&backend, SLOW), &store);
    let ok = begin(&store).await;
    step(&store, Status::Running, &completed(&ok)).await;
    assert_eq!(backend.told(ok.session_id, 2).await, ["running", "completed"]);
    // Once each was tried, all but the first seven have failed; those who hang still do.
    backend.failed(stuck[99].session_id, 1).await;
    let calls = backend.calls();
    assert_eq!(calls.iter().filter(|call| call.reply == Reply::Hang).count(), 7);
    stuck.iter().for_each(|record| backend.reply(record.session_id, Reply::Status(200)));
    life.notifier.drain(PATIENCE).await;
    assert_eq!(store.callbacks_waiting(PROJECT).await.unwrap(), 0, "each has one more try at the end");
}

#[tokio::test]
async fn a_call_that_hangs_is_cut_and_made_again() {
    let (store, backend) = (keeping().await, Backend::alive());
    let record = begin(&store).await;
    backend.reply(record.session_id, Reply::Hang);
    let life = Life::start(settings(&backend, Pace { call: Duration::from_millis(100), ..QUICK }), &store);
    backend.until("three calls", |calls| calls.len() >= 3).await;
    backend.reply(record.session_id, Reply::Status(200));
    backend.told(record.session_id, 1).await;
    all_told(&store).await;
    life.end().await;
}

#[tokio::test]
async fn a_pause_is_as_long_as_the_backend_asks() {
    let (store, backend) = (keeping().await, Backend::alive());
    let (busy, broken) = (begin(&store).await, begin(&store).await);
    backend.reply(busy.session_id, Reply::Busy(3600));
    backend.reply(broken.session_id, Reply::Status(500));
    let pace = Pace { longest_pause: Duration::from_secs(3600), ..QUICK };
    let life = Life::start(settings(&backend, pace), &store);
    // Its own pauses grow from 2 ms: by then one that did not heed the backend would have been tried again.
    backend.failed(broken.session_id, 8).await;
    backend.failed(busy.session_id, 1).await;
    let calls = backend.calls();
    assert_eq!(calls.iter().filter(|call| call.is_for(busy.session_id, "status")).count(), 1);
    life.end().await;
}

#[tokio::test]
async fn nothing_is_lost_or_skipped_over_restarts() {
    let (store, mut backend) = (keeping().await, Backend::alive());
    let records = [begin(&store).await, begin(&store).await, begin(&store).await];
    // One life ends while its calls hang, one while they fail, one while nobody listens.
    records.iter().for_each(|record| backend.reply(record.session_id, Reply::Hang));
    let life = Life::start(settings(&backend, QUICK), &store);
    backend.until("all hang", |calls| calls.len() == 3).await;
    life.end().await;
    for record in &records {
        step(&store, Status::Running, &waiting(record)).await;
        backend.reply(record.session_id, Reply::Status(500));
    }
    let life = Life::start(settings(&backend, QUICK), &store);
    for record in &records {
        backend.failed(record.session_id, 2).await;
    }
    life.end().await;
    backend.die().await;
    let life = Life::start(settings(&backend, QUICK), &store);
    for record in &records {
        step(&store, Status::WaitingInput, &completed(record)).await;
        backend.reply(record.session_id, Reply::Status(204));
    }
    life.end().await;
    backend.start();
    // This one knows nothing but the database.
    let life = Life::start(settings(&backend, QUICK), &store);
    for record in &records {
        assert_eq!(backend.told(record.session_id, 3).await, ["running", "waiting_input", "completed"]);
    }
    all_told(&store).await;
    life.end().await;
}

#[tokio::test]
async fn what_others_write_is_found_by_looking() {
    let (store, options) = migrated().await;
    let (store, backend) = (store.with_callbacks(), Backend::alive());
    let life = Life::start(settings(&backend, QUICK), &store);
    // Through a store of its own, so that nothing announces it.
    let other = Store::connect(&options).await.unwrap().with_callbacks();
    let record = begin(&other).await;
    assert_eq!(backend.told(record.session_id, 1).await, ["running"]);
    life.end().await;
}

#[tokio::test]
async fn a_batch_that_is_written_again_is_not_told_again() {
    let (store, backend) = (keeping().await, Backend::alive());
    let life = Life::start(settings(&backend, SLOW), &store);
    let record = first();
    let batch: [Write; 3] =
        [submit(&record), change(Status::Pending, &running(&record)), change(Status::Running, &completed(&record))];
    for _ in 0..3 {
        store.commit(&batch).await.unwrap();
        backend.told(record.session_id, 2).await;
    }
    life.notifier.drain(PATIENCE).await;
    assert_eq!(backend.told(record.session_id, 0).await, ["running", "completed"]);
}

#[tokio::test]
async fn what_was_taken_is_not_told_again_where_the_database_is_away() {
    let (store, options) = migrated().await;
    let (store, backend) = (store.with_callbacks(), Backend::alive());
    let record = begin(&store).await;
    backend.reply(record.session_id, Reply::Hang);
    let life = Life::start(settings(&backend, QUICK), &store);
    backend.until("a call", |calls| !calls.is_empty()).await;
    let mut operator = connect(&options.url).await;
    let mut killer = connect(&options.url).await;
    operator.execute("BEGIN; LOCK TABLE opencode_sidecar.callbacks").await.unwrap();
    backend.reply(record.session_id, Reply::Status(200));
    // The connection breaks under whoever wants to take it out of the outbox, twice.
    for _ in 0..2 {
        let kill = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                    WHERE datname = current_database() AND wait_event_type = 'Lock' AND query LIKE 'DELETE%'";
        soon("a delete that waits", async { while killer.fetch_optional(kill).await.unwrap().is_none() {} }).await;
    }
    operator.execute("ROLLBACK").await.unwrap();
    all_told(&store).await;
    step(&store, Status::Running, &completed(&record)).await;
    assert_eq!(backend.told(record.session_id, 2).await, ["running", "completed"]);
    life.end().await;
}

#[tokio::test]
async fn at_the_end_what_waits_is_told_and_nobody_is_waited_for_long() {
    let (store, mut backend) = (keeping().await, Backend::alive());
    // It failed once, and would not be tried again for an hour.
    let record = begin(&store).await;
    backend.reply(record.session_id, Reply::Status(500));
    let life = Life::start(settings(&backend, SLOW), &store);
    backend.failed(record.session_id, 1).await;
    backend.reply(record.session_id, Reply::Status(200));
    step(&store, Status::Running, &failed(&record, "the sidecar was shut down")).await;
    life.notifier.drain(PATIENCE).await;
    assert_eq!(backend.told(record.session_id, 0).await, ["running", "failed"]);
    assert_eq!(store.callbacks_waiting(PROJECT).await.unwrap(), 0);

    // A backend that hangs: as long as is allowed, and no longer.
    let record = begin(&store).await;
    backend.reply(record.session_id, Reply::Hang);
    let life = Life::start(settings(&backend, SLOW), &store);
    let begun = Instant::now();
    life.notifier.drain(Duration::from_millis(300)).await;
    assert!(begun.elapsed() >= Duration::from_millis(300), "it was given the time that there was");
    assert!(begun.elapsed() < PATIENCE / 2, "{:?}", begun.elapsed());
    assert_eq!(life.tasks.running(), 0);
    // A backend that is away: at once.
    backend.die().await;
    let life = Life::start(settings(&backend, SLOW), &store);
    let begun = Instant::now();
    life.notifier.drain(PATIENCE).await;
    assert!(begun.elapsed() < PATIENCE / 2, "{:?}", begun.elapsed());
    assert_eq!(store.callbacks_waiting(PROJECT).await.unwrap(), 1);
}

/// The places that the backend has taken, in order.
fn places(calls: &[backend::Call], id: SessionId) -> Vec<Value> {
    taken(calls, id, "event-id").into_iter().map(|mut body| body["last_event_id"].take()).collect()
}

#[tokio::test]
async fn how_far_a_log_goes_is_told_while_it_grows_and_after_the_end() {
    let (store, backend) = (keeping().await, Backend::alive());
    let settings = settings(&backend, QUICK);
    let mine = |record: ExecutionRecord| ExecutionRecord { owner: settings.owner, ..record };
    let (one, unknown, foreign) = (mine(first()), mine(first()), first());
    let id = one.session_id;
    let grow = async |record: &ExecutionRecord, seq| {
        store.commit(&[write(record, &event(seq, EventType::Log, Severity::Info))]).await.unwrap();
    };
    for record in [&one, &unknown, &foreign] {
        store.commit(&[submit(record), change(Status::Pending, &running(record))]).await.unwrap();
        grow(record, 1).await;
    }
    backend.reply(unknown.session_id, Reply::Status(404));
    let life = Life::start(settings.clone(), &store);
    backend.until("the first place", |calls| places(calls, id) == ["1.1"]).await;
    grow(&unknown, 2).await;
    grow(&one, 2).await;
    backend.until("the second place", |calls| places(calls, id) == ["1.1", "1.2"]).await;
    // What fails is not told again by itself; the next place is.
    backend.reply(id, Reply::Status(500));
    grow(&one, 3).await;
    backend.until("a failure", |calls| calls.iter().any(|call| call.is_for(id, "event-id") && !call.is_taken())).await;
    backend.reply(id, Reply::Status(200));
    // 7 is the last seq of a completed one.
    step(&store, Status::Running, &mine(completed(&one))).await;
    let calls = backend.until("the last place", |calls| places(calls, id).last() == Some(&json!("1.7"))).await;
    let end = calls.iter().position(|call| call.is_for(id, "status") && call.body["status"] == "completed").unwrap();
    let last =
        calls.iter().position(|call| call.is_for(id, "event-id") && call.body["last_event_id"] == "1.7").unwrap();
    assert!(end < last, "{calls:?}");
    life.notifier.drain(PATIENCE).await;
    let calls = backend.calls();
    let asked = |id| calls.iter().filter(move |call| call.is_for(id, "event-id")).count();
    assert_eq!(asked(unknown.session_id), 1, "who does not know a session is not asked again");
    assert_eq!(asked(foreign.session_id), 0, "another sidecar's");
    // Its end, which is final, makes it be told once whoever ran it.
    let life = Life::start(settings, &store);
    step(&store, Status::Running, &completed(&foreign)).await;
    backend.until("a place after the end", |calls| places(calls, foreign.session_id) == ["1.7"]).await;
    life.end().await;
}

/// The real binary: what it left behind when it was killed is ended by the next start, and the backend hears of it.
#[tokio::test]
async fn a_sidecar_tells_the_backend_and_ends_in_time_without_it() {
    let world = World::new().await;
    let mut backend = Backend::alive();
    let url = backend.url("/go/");
    // Long, so that what is told at the end has its time on a slow machine.
    let env = [("BACKEND_API_URL", url.as_str()), ("SHUTDOWN_GRACE_SECONDS", "250")];
    let sidecar = world.start(&env).await;
    let secret = sidecar.secret.clone();
    sidecar.stop().await;

    let instance = std::fs::read_to_string(world.state.path().join("instance")).unwrap();
    let left = |project: &str| ExecutionRecord {
        owner: instance.trim().parse().unwrap(),
        project_id: project.to_owned(),
        ..first()
    };
    let record = left("default");
    let store = Store::connect(&world.database()).await.unwrap().with_callbacks();
    let log = write(&record, &event(1, EventType::Log, Severity::Info));
    store.commit(&[submit(&record), log, change(Status::Pending, &running(&record))]).await.unwrap();
    let sidecar = world.start(&env).await;
    let id = record.session_id;
    assert_eq!(backend.told(id, 2).await, ["running", "failed"]);
    let calls = backend.until("the last place", |calls| !places(calls, id).is_empty()).await;
    for call in &calls {
        assert_eq!(call.authorization.as_deref(), Some(&*format!("Bearer {secret}")));
        assert!(call.path.starts_with("/go/api/sessions/"), "{call:?}");
    }
    soon("the metrics", async {
        let metrics = || async { sidecar.http.get(format!("{}/metrics", sidecar.base)).send().await?.text().await };
        while !metrics().await.unwrap().contains("opencode_sidecar_callbacks_total{outcome=\"delivered\"} 2\n") {}
    })
    .await;

    // It hangs, and a change waits: the sidecar still ends well, and leaves it to the next one. What nobody announced
    // it finds and tells before it ends.
    let (record, default) = (left("default"), "default");
    backend.reply(record.session_id, Reply::Hang);
    store.commit(&[submit(&record), change(Status::Pending, &running(&record))]).await.unwrap();
    backend.until("a call", |calls| calls.iter().any(|call| call.is_for(record.session_id, "status"))).await;
    let quiet = left(default);
    store.commit(&[submit(&quiet), change(Status::Pending, &running(&quiet))]).await.unwrap();
    let begun = Instant::now();
    sidecar.signal(Signal::Term);
    let exit = sidecar.exited().await;
    assert_eq!(exit.code, Some(0), "{exit}");
    assert!(begun.elapsed() < PATIENCE, "{:?}", begun.elapsed());
    assert_eq!(taken(&backend.calls(), quiet.session_id, "status").len(), 1);
    backend.die().await;
    assert_eq!(store.callbacks_waiting(default).await.unwrap(), 1);
    let sidecar = world.start(&env).await;
    soon("how they ended waits too", async { while store.callbacks_waiting(default).await.unwrap() < 3 {} }).await;
    sidecar.stop().await;
    assert_eq!(store.callbacks_waiting(default).await.unwrap(), 3);
}
