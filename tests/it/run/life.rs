//! The sidecar's own life: its end, its sudden end, and its start after either.

use crate::support::sidecar::{Sidecar, World, assert_log, frame, runs, soon, text_of};
use opencode_sidecar::app::StateDir;
use opencode_sidecar::sandbox::Signal;
use opencode_sidecar::scripted::Script;
use serde_json::{Value, json};
use std::fs::File;
use std::io;
use std::sync::Mutex;

fn long(mark: &str) -> Script {
    Script::new().bash(&format!("echo on; (setsid sleep {mark} &); sleep {mark}")).text("never reached")
}

async fn is_interrupted(sidecar: &Sidecar, id: &str) {
    let record = sidecar.get(&format!("/tasks/{id}")).await;
    assert_eq!((&record["status"], &record["reason"]), (&json!("failed"), &json!("interrupted")), "{record:#}");
}

/// Reads on where a reader was: with what it saw before, the log is whole.
async fn resume(sidecar: &Sidecar, id: &str, seen: &mut Vec<Value>) {
    let after = seen.last().map_or(0, |event| event["seq"].as_u64().unwrap_or(0));
    let mut stream = sidecar.stream(id, after).await;
    while let Some(event) = stream.next().await {
        seen.push(event);
    }
    assert_log(seen);
}

#[tokio::test]
async fn sigterm_ends_everything_in_order() {
    let world = World::new().await;
    let sidecar = world.start(&[("MAX_CONCURRENT_TASKS", "1")]).await;
    let running = sidecar.submit(&long("88001")).await;
    let waiting = sidecar.submit(&Script::new().text("x")).await;
    let mut socket = sidecar.socket(&format!("/tasks/{running}/stream")).await;
    let mut seen = Vec::new();
    while seen.last().is_none_or(|e: &Value| e["type"] != "stdout") {
        seen.push(frame(&mut socket).await.unwrap());
    }
    sidecar.signal(Signal::Term);
    let code = loop {
        match frame(&mut socket).await {
            Ok(event) => seen.push(event),
            Err(code) => break code,
        }
    };
    assert_eq!(code, 1012);
    let exit = sidecar.exited().await;
    assert_eq!(exit.code, Some(0), "{exit}");
    assert!(!runs("sleep 88001"));

    // The next life knows how it ended, and the reader goes on where it was.
    let sidecar = world.start(&[]).await;
    is_interrupted(&sidecar, &running).await;
    assert_eq!(sidecar.finished(&waiting).await["status"], "completed", "its turn comes in the next life");
    resume(&sidecar, &running, &mut seen).await;
    sidecar.stop().await;
}

#[tokio::test]
async fn sigkill_leaves_no_process_and_the_next_start_tells_the_truth() {
    let world = World::new().await;
    let sidecar = world.start(&[("MAX_CONCURRENT_TASKS", "1")]).await;
    let running = sidecar.submit(&long("88002")).await;
    let waiting = sidecar.submit(&Script::new().text("x")).await;
    let mut stream = sidecar.stream(&running, 0).await;
    let mut seen = stream.until("output", |e| e["type"] == "stdout").await;
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(sidecar.pid().cast_signed()), nix::sys::signal::Signal::SIGKILL)
        .unwrap();
    sidecar.exited().await;
    // The jail is told by the end of its socket. It needs a moment; what it needs is no part of the test.
    soon("nothing of the session is left", async {
        while runs("sleep 88002") {
            tokio::task::yield_now().await;
        }
    })
    .await;

    let sidecar = world.start(&[]).await;
    is_interrupted(&sidecar, &running).await;
    assert_eq!(sidecar.finished(&waiting).await["status"], "completed", "its turn comes in the next life");
    resume(&sidecar, &running, &mut seen).await;
    assert_eq!(text_of(&seen, "stdout"), "on\n");
    assert_eq!(std::fs::read_dir(world.state.path().join("sessions")).map_or(0, Iterator::count), 0);

    // And it works again.
    let id = sidecar.submit(&Script::new().text("again")).await;
    assert_eq!(sidecar.finished(&id).await["status"], "completed");
    sidecar.stop().await;
}

#[tokio::test]
async fn what_cannot_start_says_why() {
    let world = World::new().await;
    let sidecar = world.start(&[]).await;
    let log = world.start_in_vain(&[]).await;
    assert!(log.contains("another sidecar uses the state directory"), "{log}");
    sidecar.stop().await;

    let log = world.start_in_vain(&[("PORT", "http"), ("SANDBOX", "maybe"), ("JWT_SECRET", "s3cret-value")]).await;
    for name in ["PORT", "SANDBOX", "JWT_SECRET"] {
        assert!(log.contains(name), "{name} is not named: {log}");
    }
    assert!(!log.contains("s3cret-value") && !log.contains("maybe"), "{log}");
    let log = world.start_in_vain(&[("OPENCODE_COMMAND", "/nonexistent/opencode")]).await;
    assert!(log.contains("OPENCODE_COMMAND"), "{log}");
}

/// As by a child of a sidecar that was killed, which is about to become another program.
#[test]
fn a_state_directory_that_is_about_to_be_free_is_waited_for() {
    /// Gives the lock back once its owner's rival says anything.
    struct Until(Option<File>);
    impl io::Write for Until {
        fn write(&mut self, line: &[u8]) -> io::Result<usize> {
            drop(self.0.take());
            Ok(line.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let directory = tempfile::tempdir().unwrap();
    let lock = File::create(directory.path().join("lock")).unwrap();
    lock.lock().unwrap();
    let log = tracing_subscriber::fmt().with_writer(Mutex::new(Until(Some(lock)))).finish();
    let opened = tracing::subscriber::with_default(log, || StateDir::open(directory.path()));
    assert!(opened.is_ok(), "{:?}", opened.err());
}

#[tokio::test]
async fn a_required_sandbox_that_is_not_there_fails_closed() {
    let world = World::new().await;
    let sidecar = world.start(&[("SANDBOX", ""), ("SANDBOX_REQUIRE", "landlock_fs,landlock_unix")]).await;
    let response = sidecar.http.get(format!("{}/ready", sidecar.base)).send().await.unwrap();
    assert_eq!(response.status(), 503);
    let ready: Value = response.json().await.unwrap();
    assert_eq!(ready["checks"]["sandbox"]["status"], "failed", "{ready:#}");
    assert!(
        ready["checks"]["sandbox"]["detail"]
            .as_str()
            .unwrap()
            .contains("does not give landlock_unix (SANDBOX_REQUIRE)")
    );
    let record = sidecar.finished(&sidecar.submit(&Script::new().text("x")).await).await;
    assert_eq!((&record["status"], &record["reason"]), (&json!("failed"), &json!("sandbox_unavailable")));
    assert_eq!(world.model.calls(), 0);
    sidecar.stop().await;
}

#[tokio::test]
async fn a_warm_session_takes_the_task() {
    let world = World::new().await;
    let sidecar = world.start(&[("WARM_POOL_SIZE", "1")]).await;
    soon("a warm session", async {
        loop {
            let ready = sidecar.get("/ready").await;
            if ready["checks"]["opencode"]["detail"].as_str().is_some_and(|d| d.ends_with("1 warm")) {
                return;
            }
        }
    })
    .await;
    assert_eq!(world.model.calls(), 0, "warming up costs the provider nothing");
    let id = sidecar.submit(&Script::new().bash("echo warm").text("done")).await;
    let events = sidecar.follow(&id).await;
    assert_eq!(events.last().unwrap()["data"]["status"], "completed");
    assert_eq!(events.last().unwrap()["data"]["usage"]["model_calls"], 2);
    let started = events.iter().find(|e| e["data"]["code"] == "session_started").unwrap();
    assert_eq!(started["data"]["warm"], true);
    sidecar.signal(Signal::Term);
    assert_eq!(sidecar.exited().await.code, Some(0));
}

/// Without DATABASE_URL the sidecar brings its own Postgres, which survives its sudden end.
#[tokio::test]
async fn the_embedded_database_keeps_the_history() {
    let world = World::new().await;
    std::fs::set_permissions(world.state.path(), std::os::unix::fs::PermissionsExt::from_mode(0o711)).unwrap();
    let sidecar = world.start(&[("DATABASE_URL", "")]).await;
    let id = sidecar.submit(&Script::new().text("kept")).await;
    let events = sidecar.follow(&id).await;
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(sidecar.pid().cast_signed()), nix::sys::signal::Signal::SIGKILL)
        .unwrap();
    sidecar.exited().await;
    let sidecar = world.start(&[("DATABASE_URL", "")]).await;
    assert_eq!(sidecar.follow(&id).await, events);
    sidecar.signal(Signal::Term);
    assert_eq!(sidecar.exited().await.code, Some(0));
}
