//! A connection that drops: every event is shown once and in order all the same, or it is said where it stopped.

#![allow(clippy::unwrap_used, reason = "a test's own helpers fail like the test")]

use super::{Caller, gated};
use crate::support::sidecar::{Sidecar, World, assert_log, soon};
use opencode_sidecar::scripted::Script;
use opencode_sidecar::tasks::Tasks;
use std::sync::{Arc, Mutex};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

/// The requests of a stream.
const STREAMS: &str = "/stream?after=";

/// Stands between a caller and a sidecar, and cuts the connections that carry some requests.
struct Proxy {
    url: String,
    /// Where the sidecar listens now.
    upstream: Arc<Mutex<String>>,
    /// Bytes that the next such requests may be answered with before they are cut; when it is empty, none is cut.
    budgets: Arc<Mutex<Vec<usize>>>,
    /// Cuts all connections and takes no new ones.
    gone: CancellationToken,
}

impl Proxy {
    async fn start(tasks: &Tasks, sidecar: &Sidecar, budgets: &[usize]) -> Self {
        Self::cutting(STREAMS, tasks, sidecar, budgets).await
    }

    /// Cuts the requests that have these words.
    async fn cutting(words: &'static str, tasks: &Tasks, sidecar: &Sidecar, budgets: &[usize]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let budgets: Arc<Mutex<Vec<usize>>> = Arc::new(Mutex::new(budgets.iter().rev().copied().collect()));
        let gone = CancellationToken::new();
        let upstream = Arc::new(Mutex::new(sidecar.address().to_owned()));
        let (address, left, all, end) = (upstream.clone(), budgets.clone(), tasks.clone(), gone.clone());
        let accepting = async move {
            loop {
                let (client, _) = listener.accept().await.unwrap();
                let address = address.lock().unwrap().clone();
                // A sidecar that is not there is one that hangs up.
                let Ok(server) = TcpStream::connect(address).await else { continue };
                let connection = carry(words, client, server, left.clone());
                let end = end.clone();
                all.spawn("connection", async move {
                    tokio::select! {
                        () = connection => {}
                        () = end.cancelled() => {}
                    }
                });
            }
        };
        let end = gone.clone();
        tasks.spawn("proxy", async move {
            tokio::select! {
                () = accepting => {}
                () = end.cancelled() => {}
            }
        });
        Self { url, upstream, budgets, gone }
    }
}

/// Carries one connection until either side ends it, or its budget is used up.
async fn carry(words: &'static str, client: TcpStream, server: TcpStream, budgets: Arc<Mutex<Vec<usize>>>) {
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    let budget = Arc::new(Mutex::new(None));
    tokio::select! {
        () = asks(words, from_client, to_server, budgets, budget.clone()) => {}
        () = answers(from_server, to_client, budget) => {}
    }
}

async fn asks(
    words: &'static str,
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    budgets: Arc<Mutex<Vec<usize>>>,
    budget: Arc<Mutex<Option<usize>>>,
) {
    let mut buffer = vec![0; 65_536];
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        // A request comes in one piece here.
        if String::from_utf8_lossy(&buffer[..count]).contains(words) {
            *budget.lock().unwrap() = budgets.lock().unwrap().pop();
        }
        if to.write_all(&buffer[..count]).await.is_err() {
            return;
        }
    }
}

async fn answers(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, budget: Arc<Mutex<Option<usize>>>) {
    let mut buffer = vec![0; 65_536];
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        let left = *budget.lock().unwrap();
        let allowed = left.map_or(count, |left| left.min(count));
        if to.write_all(&buffer[..allowed]).await.is_err() || left.is_some_and(|left| left <= count) {
            return;
        }
        *budget.lock().unwrap() = left.map(|left| left - count);
    }
}

#[tokio::test]
async fn a_stream_that_is_cut_is_shown_once_and_in_order() {
    let world = World::new().await;
    let sidecar = world.start(&[]).await;
    let tasks = Tasks::new();
    // In the middle of envelopes, of the headers, and at once.
    let proxy = Proxy::start(&tasks, &sidecar, &[1500, 0, 40, 3333]).await;
    let caller = Caller::new(&proxy.url, &sidecar.secret);
    let script = Script::new().bash("for i in $(seq 60); do echo \"line $i of them\"; sleep 0.01; done").text("Done.");
    let done = caller.run(&["exec", "--json", &script.to_prompt("Go.")]).await;
    let shown = done.assert(0).json();
    assert_log(&shown);
    assert!(proxy.budgets.lock().unwrap().is_empty(), "every cut was met");
    let lost = done.stderr.matches("The connection is lost (").count();
    assert!((2..=4).contains(&lost), "{}", done.stderr);
    assert_eq!(done.stderr.matches("The connection is back.").count(), lost, "{}", done.stderr);
    let id = sidecar.get("/tasks").await["executions"][0]["execution_id"].as_str().unwrap().to_owned();
    assert_eq!(shown, sidecar.follow(&id).await);

    // The same for a person, who sees no line twice.
    proxy.budgets.lock().unwrap().extend([2000, 700]);
    let plain = caller.run(&["attach", &id]).await;
    let numbers: Vec<_> = plain.assert(0).stdout.lines().filter(|line| line.contains(" of them")).collect();
    let want: Vec<_> = (1..=60).map(|i| format!("  │ line {i} of them")).collect();
    assert_eq!(numbers[numbers.len() - 60..], want);
    let logs = {
        proxy.budgets.lock().unwrap().extend([2000, 700]);
        caller.run(&["logs", "--follow", &id]).await
    };
    assert_eq!(logs.assert(0).stdout, (1..=60).map(|i| format!("line {i} of them\n")).collect::<String>());
    proxy.gone.cancel();
    sidecar.stop().await;
}

#[tokio::test]
async fn a_sidecar_that_does_not_come_back_is_given_up_and_the_run_goes_on() {
    let world = World::new().await;
    let sidecar = world.start(&[]).await;
    let tasks = Tasks::new();
    let proxy = Proxy::start(&tasks, &sidecar, &[]).await;
    let caller = Caller::new(&proxy.url, &sidecar.secret);
    let prompt = Script::new().bash(&gated(&["one", "two"], "true")).text("x").to_prompt("Go.");
    let mut running = caller.start(&["exec", "--reconnect-for", "1s", &prompt]).await;
    running.until("│ one").await;
    proxy.gone.cancel();
    let done = running.done().await;
    done.assert(7);
    let id = sidecar.get("/tasks").await["executions"][0]["execution_id"].as_str().unwrap().to_owned();
    for words in
        ["The connection is lost", "nothing was cancelled", "the connection did not come back within 1 s", "refused"]
    {
        assert!(done.stderr.contains(words), "{words} is not in {}", done.stderr);
    }
    let (_, again) = done.stderr.split_once(&format!("opencode-sidecar attach {id} --after ")).unwrap();
    let seq = again.split_whitespace().next().unwrap();
    std::fs::write(world.file("gate-1"), "").unwrap();
    let rest = Caller::of(&sidecar).run(&["attach", &id, "--after", seq]).await;
    assert!(rest.assert(0).stdout.contains("│ two") && !rest.stdout.contains("│ one"), "{}", rest.stdout);
    sidecar.stop().await;
}

/// The log outlives the sidecar, and so does whoever follows it.
#[tokio::test]
async fn a_restart_of_the_sidecar_is_seen_to_its_end() {
    let world = World::new().await;
    let sidecar = world.start(&[]).await;
    let tasks = Tasks::new();
    let proxy = Proxy::start(&tasks, &sidecar, &[]).await;
    let caller = Caller::new(&proxy.url, &sidecar.secret);
    let prompt = Script::new().bash(&gated(&["one"], "sleep 663001")).text("x").to_prompt("Go.");
    let mut running = caller.start(&["exec", &prompt]).await;
    running.until("│ one").await;
    sidecar.signal(opencode_sidecar::sandbox::Signal::Term);
    soon("the end", sidecar.exited()).await;
    let sidecar = world.start(&[]).await;
    *proxy.upstream.lock().unwrap() = sidecar.address().to_owned();
    let done = running.done().await;
    assert!(done.assert(3).stdout.contains("● failed (interrupted)"), "{}", done.stdout);
    proxy.gone.cancel();
    sidecar.stop().await;
}

#[tokio::test]
async fn a_submission_without_an_answer_is_sent_again_and_taken_once() {
    let world = World::new().await;
    let sidecar = world.start(&[]).await;
    let tasks = Tasks::new();
    // The sidecar has answered each time, and nothing of it, or not all, comes through.
    let proxy = Proxy::cutting("POST /tasks/execute", &tasks, &sidecar, &[0, 30]).await;
    let caller = Caller::new(&proxy.url, &sidecar.secret);
    let prompt = Script::new().text("Done.").to_prompt("Go.");
    let done = caller.run(&["exec", "--json", &prompt]).await;
    assert_log(&done.assert(0).json());
    assert!(proxy.budgets.lock().unwrap().is_empty(), "every cut was met");
    assert_eq!(done.stderr.matches("submitted again, as the same one").count(), 1, "{}", done.stderr);
    assert_eq!(sidecar.get("/tasks").await["executions"].as_array().unwrap().len(), 1);

    // It is given up in the end, and said how to find out.
    proxy.budgets.lock().unwrap().extend([0; 100]);
    let task = uuid::Uuid::new_v4().to_string();
    let done = caller.run(&["exec", "--task-id", &task, "--reconnect-for", "1s", &prompt]).await;
    done.assert(7);
    assert!(done.stderr.contains(&format!("opencode-sidecar history --task-id {task}")), "{}", done.stderr);
    let found = sidecar.get(&format!("/tasks?task_id={task}")).await["executions"].clone();
    assert_eq!(found.as_array().unwrap().len(), 1);
    sidecar.finished(found[0]["execution_id"].as_str().unwrap()).await;
    proxy.gone.cancel();
    sidecar.stop().await;
}
