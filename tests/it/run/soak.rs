//! The sidecar is killed at random instants, over and over, while tasks are submitted, resubmitted, cancelled and deleted
//! and readers follow; now and then its database is away. What anybody was told stays true.
//!
//! `SOAK_ROUNDS` says how many rounds, `SOAK_SEED` which. The seed decides what is done and when; what the machine makes
//! of it is different each time.

#![allow(clippy::unwrap_used, reason = "a test's own helpers fail like the test")]

use crate::support::follower::{Address, Ended, Follower, raw_log};
use crate::support::proxy::Proxy;
use crate::support::sidecar::{Sidecar, World, runs, soon};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use opencode_sidecar::model::ExecutionId;
use opencode_sidecar::scripted::Script;
use opencode_sidecar::store::{EventQuery, Store};
use opencode_sidecar::tasks::Tasks;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use secrecy::ExposeSecret;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;

/// How long a life lasts at most; a third of it in the mean.
const LIFE: Duration = Duration::from_millis(4500);

/// A submission, as its caller knows it.
struct Known {
    body: Value,
    /// Once an answer came.
    id: Option<String>,
    /// Somebody asked for its end.
    cancelled: bool,
    deleted: Deleted,
}

#[derive(Clone, Copy, PartialEq)]
enum Deleted {
    No,
    /// No answer came.
    Perhaps,
    Yes,
}

struct Soak {
    world: World,
    random: StdRng,
    known: BTreeMap<String, Known>,
    /// What was not taken in, since the queue was full: none of it ever runs.
    refused: Vec<String>,
    readers: Vec<tokio::task::JoinHandle<Follower>>,
    /// Where the sidecar is now; `None` while there is none.
    at: watch::Sender<Option<Address>>,
    /// No further sidecar comes.
    over: watch::Sender<bool>,
    tasks: Tasks,
}

async fn send(
    at: &Address,
    method: reqwest::Method,
    path: &str,
    key: Option<&str>,
    body: Option<&Value>,
) -> Option<(u16, Value)> {
    let mut request = at.http.request(method, format!("{}{path}", at.base)).bearer_auth(&at.secret);
    if let Some(key) = key {
        request = request.header("idempotency-key", key);
    }
    if let Some(body) = body {
        request = request.json(body);
    }
    let answer = request.send().await.ok()?;
    let status = answer.status().as_u16();
    let bytes = answer.bytes().await.ok()?;
    Some((status, serde_json::from_slice(&bytes).unwrap_or_default()))
}

/// Follows an execution over as many sidecars as it takes.
async fn reads(id: String, mut at: watch::Receiver<Option<Address>>, over: watch::Receiver<bool>) -> Follower {
    let mut reader = Follower::new(&id);
    loop {
        let Some(address) = at.borrow_and_update().clone() else {
            if at.changed().await.is_err() {
                return reader;
            }
            continue;
        };
        match reader.read(&address).await {
            Ended::Complete => return reader,
            // Deleted; or only the database has it, which is away.
            Ended::Refused(404) => return reader,
            Ended::Refused(_) if *over.borrow() => return reader,
            // Not at once again: a reader that hammers is another test.
            Ended::Refused(_) | Ended::Cut => {
                let _ = tokio::time::timeout(Duration::from_millis(300), at.changed()).await;
            }
        }
    }
}

impl Soak {
    async fn new(seed: u64) -> Self {
        Self {
            world: World::new().await,
            random: StdRng::seed_from_u64(seed),
            known: BTreeMap::new(),
            refused: Vec::new(),
            readers: Vec::new(),
            at: watch::Sender::new(None),
            over: watch::Sender::new(false),
            tasks: Tasks::new(),
        }
    }

    fn script(&mut self, key: &str) -> Script {
        let count = self.world.path(key);
        let script = Script::new().bash(&format!("echo run >> {count}; echo begun; echo oops >&2"));
        let script = match self.random.random_range(0..4) {
            0 => script,
            1 => script.bash("for n in $(seq 300); do echo line $n of many; done"),
            2 => script.bash("sleep 0.7; (setsid sleep 77100 &); echo slept"),
            _ => script.bash("yes 'a line of output that is not short at all' | head -c 300000"),
        };
        script.text("done")
    }

    /// Somebody does something.
    async fn act(&mut self, at: &Address) {
        let choice = self.random.random_range(0..10);
        let keys: Vec<String> = self.known.keys().cloned().collect();
        let one = (!keys.is_empty()).then(|| keys[self.random.random_range(0..keys.len())].clone());
        match (choice, one) {
            (0..=4, _) | (_, None) => {
                let key = format!("k{}", keys.len() + self.refused.len());
                let on_restart = if self.random.random() { "resume" } else { "fail" };
                let prompt = self.script(&key).to_prompt("x");
                let body = json!({ "task_id": uuid::Uuid::new_v4(), "prompt": prompt, "on_restart": on_restart });
                self.known.insert(key.clone(), Known { body, id: None, cancelled: false, deleted: Deleted::No });
                self.submit(at, &key).await;
            }
            (5..=6, Some(key)) => self.submit(at, &key).await,
            (7, Some(key)) => {
                let known = self.known.get_mut(&key).unwrap();
                let Some(id) = known.id.clone() else { return };
                known.cancelled = true;
                send(at, reqwest::Method::POST, &format!("/tasks/{id}/cancel"), None, Some(&json!({}))).await;
            }
            (8, Some(key)) if self.random.random_range(0..3) == 0 => {
                let known = self.known.get_mut(&key).unwrap();
                let Some(id) = known.id.clone() else { return };
                known.deleted = Deleted::Perhaps;
                let answer = send(at, reqwest::Method::DELETE, &format!("/tasks/{id}"), None, None).await;
                if let Some((204, _)) = answer {
                    known.deleted = Deleted::Yes;
                }
            }
            (_, Some(key)) => {
                let Some(id) = self.known[&key].id.clone() else { return };
                send(at, reqwest::Method::GET, &format!("/tasks/{id}/status"), None, None).await;
            }
        }
    }

    /// For the first time or again: it stands for one execution for ever.
    async fn submit(&mut self, at: &Address, key: &str) {
        let known = self.known.get_mut(key).unwrap();
        if known.deleted != Deleted::No {
            return;
        }
        let answer = send(at, reqwest::Method::POST, "/tasks/execute", Some(key), Some(&known.body)).await;
        let Some((status, answer)) = answer else { return };
        assert!([200, 202, 429, 503].contains(&status), "{key}: {status} {answer}");
        let Some(id) = answer["execution_id"].as_str() else {
            if status == 429 {
                assert_eq!(known.id, None, "{key} is known, and was refused for the queue");
                self.known.remove(key);
                self.refused.push(key.to_owned());
            }
            return;
        };
        match &known.id {
            Some(first) => assert_eq!((first.as_str(), status), (id, 200), "{key} ran twice"),
            None => {
                known.id = Some(id.to_owned());
                let reader = reads(id.to_owned(), self.at.subscribe(), self.over.subscribe());
                self.readers.push(self.tasks.spawn("reader", reader));
            }
        }
    }

    /// One life of the sidecar.
    async fn round(&mut self, setting: &[(&str, &str)], proxy: &Proxy) {
        match self.random.random_range(0..6) {
            0 => proxy.cut(),
            1 => proxy.freeze(),
            _ => proxy.mend(),
        }
        let sidecar = self.world.start(setting).await;
        let address = Address::of(&sidecar);
        self.at.send_replace(Some(address.clone()));
        let pid = Pid::from_raw(sidecar.pid().cast_signed());
        // Most lives are short.
        let end = Instant::now() + LIFE.mul_f64(self.random.random_range(0.0_f64..1.0).powi(2));
        while Instant::now() < end {
            let pause = Duration::from_millis(self.random.random_range(1..400));
            if tokio::time::timeout_at(end, self.act(&address)).await.is_err() {
                break;
            }
            // The round's own rhythm, not a wait for anything.
            tokio::time::sleep_until((Instant::now() + pause).min(end)).await;
        }
        kill(pid, Signal::SIGKILL).unwrap();
        self.at.send_replace(None);
        sidecar.exited().await;
    }

    /// Waits until all has come to its end, for as long as that goes on.
    async fn drained(&self, sidecar: &Sidecar) {
        let mut left = usize::MAX;
        while left > 0 {
            left = soon("one more end", async {
                loop {
                    let mut now = 0;
                    for status in ["pending", "running"] {
                        let page = sidecar.get(&format!("/tasks?status={status}&limit=200")).await;
                        now += page["executions"].as_array().unwrap().len();
                    }
                    if now < left {
                        return now;
                    }
                }
            })
            .await;
        }
    }

    /// A last life, in which everything comes to its end, and all that was said is looked at.
    async fn holds(mut self, setting: &[(&str, &str)], proxy: &Proxy) -> (usize, usize) {
        proxy.mend();
        let sidecar = self.world.start(setting).await;
        let address = Address::of(&sidecar);
        self.at.send_replace(Some(address.clone()));
        let keys: Vec<String> = self.known.keys().cloned().collect();
        for key in &keys {
            soon("each is known", async {
                while self.known.get(key).is_some_and(|known| known.id.is_none() && known.deleted == Deleted::No) {
                    self.submit(&address, key).await;
                }
            })
            .await;
        }
        self.drained(&sidecar).await;
        let mut events = 0;
        let mut logs = BTreeMap::new();
        for known in self.known.values() {
            let id = known.id.as_ref().unwrap();
            if known.deleted == Deleted::Yes {
                assert_eq!(sidecar.send(reqwest::Method::GET, &format!("/tasks/{id}"), None).await.0, 404, "{id}");
                continue;
            }
            let mut reader = Follower::new(id);
            let ended = soon("an end", async {
                loop {
                    let ended = reader.read(&address).await;
                    if ended != Ended::Cut && ended != Ended::Refused(503) {
                        return ended;
                    }
                }
            })
            .await;
            if ended == Ended::Refused(404) {
                assert!(known.deleted == Deleted::Perhaps, "{id} is gone");
                continue;
            }
            let complete: Value = serde_json::from_str(reader.seen.last().unwrap()).unwrap();
            let (status, reason) = (complete["data"]["status"].clone(), complete["data"]["reason"].clone());
            let fine = match reason.as_str().unwrap() {
                "finished" => status == "completed",
                "interrupted" => status == "failed",
                "cancelled" => known.cancelled || known.deleted == Deleted::Perhaps,
                _ => false,
            };
            assert!(fine, "{id}: {complete}");
            events += reader.seen.len();
            logs.insert(id.clone(), reader.seen);
        }
        for (key, known) in &self.known {
            let runs = std::fs::read_to_string(self.world.file(key)).unwrap_or_default().lines().count();
            assert!(runs <= 1, "{key} ran {runs} times: {:?}", known.id);
        }
        let ran: Vec<_> = self.refused.iter().filter(|key| self.world.file(key).exists()).collect();
        assert!(ran.is_empty(), "{ran:?} were refused, and ran");
        self.over.send_replace(true);
        for reader in self.readers {
            let reader = soon("a reader's end", reader).await.unwrap();
            if let Some(log) = logs.get(&reader.id) {
                assert!(log.starts_with(&reader.seen), "{}: what a reader saw is there, as it was", reader.id);
            }
        }
        let detail = soon("all is shipped", async {
            loop {
                let ready = sidecar.get("/ready").await;
                let detail = ready["checks"]["journal"]["detail"].as_str().unwrap().to_owned();
                if detail.contains(" 0 events to ship") {
                    return detail;
                }
            }
        })
        .await;
        let ids: Vec<String> = logs.keys().cloned().collect();
        for id in ids.iter().take(3) {
            assert_eq!(&raw_log(&sidecar, id).await, &logs[id]);
        }
        sidecar.stop().await;
        let store = Store::connect(&self.world.database()).await.unwrap();
        for (id, log) in &logs {
            let query = EventQuery { after: 0, limit: 1_000_000, types: None, severities: None };
            let stored = store.events(ExecutionId(id.parse().unwrap()), &query).await.unwrap();
            assert!(stored.iter().map(|event| &*event.json).eq(log.iter().map(String::as_str)), "{id}: {detail}");
        }
        assert!(!runs(&self.world.path("")) && !runs("sleep 77100"), "nothing of it runs");
        assert_eq!(groups_left(&self.world), Vec::<std::path::PathBuf>::new());
        (logs.len(), events)
    }
}

/// Control groups of the sidecar's sessions that are still there.
fn groups_left(world: &World) -> Vec<std::path::PathBuf> {
    let instance = std::fs::read_to_string(world.state.path().join("instance")).unwrap();
    let name = format!("opencode-sidecar-{}", instance.trim());
    let mut left = Vec::new();
    let mut look = vec![std::path::PathBuf::from("/sys/fs/cgroup")];
    while let Some(directory) = look.pop() {
        for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                if entry.file_name() == *name {
                    left.push(entry.path());
                }
                look.push(entry.path());
            }
        }
    }
    left
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |value| value.parse().unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_told_stays_true_however_often_it_is_killed() {
    let (rounds, seed) = (number("SOAK_ROUNDS", 10), number("SOAK_SEED", 20_261_121));
    let begun = Instant::now();
    let mut soak = Soak::new(seed).await;
    let (proxy, options) = Proxy::before(soak.world.database()).await;
    // Lives are short, so more is submitted than can be run: what waits has to come to its end in the last one.
    let setting = [("DATABASE_URL", options.url.expose_secret()), ("MAX_QUEUED_TASKS", "30")];
    for round in 1..=rounds {
        soak.round(&setting, &proxy).await;
        if round % 25 == 0 {
            println!("{round} rounds, {} executions, {:?}", soak.known.len(), begun.elapsed());
        }
    }
    let (executions, events) = soak.holds(&setting, &proxy).await;
    println!("seed {seed}: {rounds} rounds, {executions} executions, {events} events, {:?}", begun.elapsed());
}
