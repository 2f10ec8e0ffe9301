//! The database is away, or the power was: what was told stays true.

#![allow(clippy::unwrap_used, reason = "a test's own helpers fail like the test")]

use crate::support::proxy::Proxy;
use crate::support::sidecar::{Sidecar, World, assert_log, parsed, soon};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use opencode_sidecar::model::ExecutionId;
use opencode_sidecar::scripted::Script;
use opencode_sidecar::store::{EventQuery, Store};
use reqwest::Method;
use secrecy::ExposeSecret;
use serde_json::{Value, json};
use std::fs;
use std::time::{Duration, Instant};

/// Far less than any wait for the database, and far more than an answer takes on a busy machine.
const AT_ONCE: Duration = Duration::from_secs(2);
/// How often it is asked. What waits for the database waits each time; a busy machine does not.
const TRIES: usize = 5;
/// Writes lines until there is a file `go`.
pub(super) const FLOWING: &str =
    "until [ -e go ]; do head -c 300 /dev/zero | tr '\\0' x; echo; sleep 0.05; done; echo went";

/// What happens to a database.
pub(super) trait Fault {
    /// From its beginning to its end nothing can be written.
    const LASTS: bool = true;
    /// Meanwhile what is there can be read.
    const READABLE: bool = false;

    async fn begin(&mut self);

    async fn end(&mut self);
}

/// A log, byte for byte as it was seen.
struct Seen {
    id: String,
    /// How it ended.
    status: &'static str,
    events: Vec<String>,
}

impl Seen {
    async fn of(sidecar: &Sidecar, id: String, status: &'static str) -> Self {
        let events = sidecar.follow_text(&id).await;
        assert_eq!(parsed(&events).last().unwrap()["data"]["status"], status, "{events:#?}");
        Self { id, status, events }
    }
}

/// An answer that has waited for nothing.
pub(super) async fn at_once<T, A: Future<Output = T>>(ask: impl Fn() -> A) -> T {
    let mut took = Vec::new();
    while took.len() < TRIES {
        let asked = Instant::now();
        let answer = ask().await;
        if asked.elapsed() < AT_ONCE {
            return answer;
        }
        took.push(asked.elapsed());
    }
    unreachable!("none of these is at once: {took:?}")
}

/// Waits until `/ready` says this of the database, which keeps nobody from being ready, nor from an answer.
async fn database_is(sidecar: &Sidecar, word: &str) {
    soon(word, async {
        loop {
            let ready = at_once(|| sidecar.get("/ready")).await;
            if ready["checks"]["database"]["status"] == word {
                return;
            }
        }
    })
    .await;
}

/// Tasks are taken, wait, run and are followed as ever; what only the database knows is refused, and not after a wait.
/// Once it is over the database has everything, byte for byte as it was seen.
pub(super) async fn goes_on_without<F: Fault>(world: &World, changes: &[(&str, &str)], fault: &mut F) {
    let sidecar = world.start(&[changes, &[("MAX_CONCURRENT_TASKS", "1")]].concat()).await;
    let running = sidecar.submit(&Script::new().bash(FLOWING).text("done")).await;
    sidecar.stream(&running, 0).await.until("it runs", |event| event["type"] == "stdout").await;
    // It waits behind the other one, and ends.
    let old = sidecar.submit(&Script::new().text("never")).await;
    assert_eq!(sidecar.post(&format!("/tasks/{old}/cancel"), json!({})).await.0, 200);
    let old = Seen::of(&sidecar, old, "cancelled").await;
    // From here on it is in the database alone.
    soon("the database has its end", async {
        while sidecar.get("/tasks?status=cancelled").await["executions"].as_array().unwrap().is_empty() {}
    })
    .await;

    let followed = Seen::of(&sidecar, running.clone(), "completed");
    let (followed, new) = tokio::join!(followed, during(world, &sidecar, fault, &old, &running));
    fault.end().await;
    database_is(&sidecar, "ok").await;
    let seen = [followed, old, new];
    let expected: Vec<_> = seen.iter().rev().map(|log| (&*log.id, log.status)).collect();
    soon("it is shipped", async {
        loop {
            let (_, page) = sidecar.send(Method::GET, "/tasks", None).await;
            let history = page["executions"].as_array().cloned().unwrap_or_default();
            let field = |of: &'_ Value, name: &str| of[name].as_str().unwrap().to_owned();
            let found: Vec<_> = history.iter().map(|e| (field(e, "execution_id"), field(e, "status"))).collect();
            if found.iter().map(|(id, status)| (&**id, &**status)).eq(expected.iter().copied()) {
                return;
            }
        }
    })
    .await;
    for log in &seen {
        assert_eq!(sidecar.follow_text(&log.id).await, log.events);
    }
    sidecar.stop().await;
    let store = Store::connect(&world.database()).await.unwrap();
    for log in &seen {
        assert_eq!(stored(&store, &log.id).await, log.events);
    }
}

/// The fault begins, and everything comes to its end in it: what ran before, and what is submitted now, waits for its
/// turn and runs. Gives the latter.
async fn during<F: Fault>(world: &World, sidecar: &Sidecar, fault: &mut F, old: &Seen, running: &str) -> Seen {
    fault.begin().await;
    if F::LASTS {
        database_is(sidecar, "degraded").await;
    }
    let new = sidecar.submit(&Script::new().bash("echo new").text("fine")).await;
    assert_eq!(sidecar.status(&new).await["queue_position"], 1);
    assert_eq!(sidecar.status(running).await["status"], "running");
    fs::write(world.file("go"), "").unwrap();
    let new = Seen::of(sidecar, new, "completed").await;
    for id in [running, &new.id] {
        assert_eq!(sidecar.status(id).await["status"], "completed");
        assert!(sidecar.get(&format!("/tasks/{id}/files")).await["entries"].to_string().contains("\"go\""));
        assert_eq!(sidecar.get(&format!("/tasks/{id}/diff")).await["complete"], true);
    }
    if F::LASTS {
        let ready = sidecar.get("/ready").await;
        let [database, journal] = ["database", "journal"].map(|name| &ready["checks"][name]["status"]);
        assert_eq!((&ready["status"], database, journal), (&json!("ready"), &json!("degraded"), &json!("ok")));
        // Without what waits for it the database cannot say what there is, even where it can be read.
        let (one, log) = (format!("/tasks/{}", old.id), format!("/tasks/{}/events", old.id));
        for (path, answers) in [("/tasks", false), (&one, F::READABLE), (&log, F::READABLE)] {
            let (status, answer) = at_once(|| sidecar.send(Method::GET, path, None)).await;
            match answers {
                true => assert_eq!(status, 200, "{path}: {answer:#}"),
                false => assert_eq!((status, &answer["code"]), (503, &json!("unavailable")), "{path}: {answer:#}"),
            }
        }
    }
    new
}

/// What the database has of a log.
pub(super) async fn stored(store: &Store, id: &str) -> Vec<String> {
    let query = EventQuery { after: 0, limit: 1_000_000, types: None, severities: None };
    let stored = store.events(ExecutionId(id.parse().unwrap()), &query).await.unwrap();
    stored.iter().map(|event| event.json.to_string()).collect()
}

/// Between the sidecar and the server.
struct OnTheWay {
    proxy: Proxy,
    how: fn(&Proxy),
}

impl Fault for OnTheWay {
    async fn begin(&mut self) {
        (self.how)(&self.proxy);
    }

    async fn end(&mut self) {
        self.proxy.mend();
    }
}

async fn goes_on_while(how: fn(&Proxy)) {
    let world = World::new().await;
    let (proxy, options) = Proxy::before(world.database()).await;
    let through = [("DATABASE_URL", options.url.expose_secret())];
    goes_on_without(&world, &through, &mut OnTheWay { proxy, how }).await;
}

#[tokio::test]
async fn a_database_that_is_gone_stops_nothing() {
    goes_on_while(Proxy::cut).await;
}

#[tokio::test]
async fn a_database_that_says_nothing_stops_nothing() {
    goes_on_while(Proxy::freeze).await;
}

/// What was shown while the database was away survives the sidecar's sudden end too.
#[tokio::test]
async fn what_was_seen_during_an_outage_survives_a_sigkill() {
    let world = World::new().await;
    let (proxy, options) = Proxy::before(world.database()).await;
    let through = [("DATABASE_URL", options.url.expose_secret())];
    let sidecar = world.start(&through).await;
    proxy.cut();
    let ended = sidecar.submit(&Script::new().text("fine")).await;
    let told = sidecar.follow(&ended).await;
    let running = sidecar.submit(&Script::new().bash("echo on; sleep 88003").text("never")).await;
    let mut seen = sidecar.stream(&running, 0).await.until("output", |event| event["type"] == "stdout").await;
    kill(Pid::from_raw(sidecar.pid().cast_signed()), Signal::SIGKILL).unwrap();
    sidecar.exited().await;
    proxy.mend();
    let sidecar = world.start(&through).await;
    assert_eq!(sidecar.follow(&ended).await, told);
    let mut stream = sidecar.stream(&running, seen.len() as u64).await;
    while let Some(event) = stream.next().await {
        seen.push(event);
    }
    assert_log(&seen);
    let status = sidecar.status(&running).await;
    assert_eq!(
        (&status["status"], &status["reason"], &status["epoch"]),
        (&json!("failed"), &json!("interrupted"), &json!(1))
    );
    sidecar.stop().await;
}

/// A loss of power, as the next start sees it: the directory was open in another boot, and the journal's end is torn.
#[tokio::test]
async fn after_a_loss_of_power_the_log_goes_on_under_another_epoch() {
    let world = World::new().await;
    let sidecar = world.start(&[]).await;
    let ended = sidecar.submit(&Script::new().text("fine")).await;
    let told = sidecar.follow(&ended).await;
    let running = sidecar.submit(&Script::new().bash("echo on; sleep 88004").text("never")).await;
    sidecar.stream(&running, 0).await.until("output", |event| event["type"] == "stdout").await;
    kill(Pid::from_raw(sidecar.pid().cast_signed()), Signal::SIGKILL).unwrap();
    sidecar.exited().await;
    let journal = world.state.path().join("journal");
    fs::write(journal.join("boot"), "00000000-0000-0000-0000-000000000000\n").unwrap();
    for entry in fs::read_dir(&journal).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|suffix| suffix == "journal") {
            let file = fs::File::options().append(true).open(&path).unwrap();
            std::io::Write::write_all(&mut &file, b"\x07\x00\x00\x00torn").unwrap();
        }
    }
    let sidecar = world.start(&[]).await;
    assert_eq!(sidecar.status(&running).await["epoch"], 2);
    let events = sidecar.stream(&running, 0).await.until("the end", |event| event["type"] == "complete").await;
    assert_eq!(events[0], json!({ "type": "epoch", "epoch": 2 }));
    assert_log(&events[1..]);
    assert_eq!(sidecar.follow(&ended).await, told, "what had ended is as it was");
    assert_eq!(sidecar.status(&ended).await["epoch"], 1);
    sidecar.stop().await;
}
