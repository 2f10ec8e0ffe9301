//! `/health` while every core is busy, and the same requests to a bare axum server under the same load.

use crate::World;
use crate::machine::cores;
use crate::sidecar::{Sidecar, directory};
use crate::table::{Row, Shown, print, target};
use axum::extract::Path;
use axum::routing::get;
use opencode_sidecar::sandbox::{Process, Spec};
use opencode_sidecar::scripted::Script;
use serde_json::Value;
use std::fs::DirEntry;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;

/// The argument that makes this program the bare server.
pub(crate) const BARE: &str = "--bare-server";
/// Requests to each side.
const REQUESTS: usize = 2000;

/// The other side: axum with three routes, in a process of its own. What it reads is relative to its working directory.
pub(crate) async fn bare() {
    let body = r#"{"status":"ok","version":"0","uptime_seconds":0}"#;
    let json = [("content-type", "application/json")];
    let content = async |Path(path): Path<PathBuf>| tokio::fs::read(path).await.unwrap();
    // It does nothing else meanwhile.
    let list = async move |Path(path): Path<PathBuf>| {
        let entries = std::fs::read_dir(path).unwrap().map(Result::unwrap);
        let entry = |entry: DirEntry| {
            let metadata = entry.metadata().unwrap();
            serde_json::json!({ "name": entry.file_name().to_str().unwrap(), "size": metadata.len() })
        };
        (json, Value::from_iter(entries.map(entry)).to_string())
    };
    let router = axum::Router::new()
        .route("/health", get(move || async move { (json, body) }))
        .route("/content/{path}", get(content))
        .route("/list/{path}", get(list));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    println!("{}", listener.local_addr().unwrap());
    axum::serve(listener, router).await.unwrap();
}

/// Starts it in that directory; gives its address too.
pub(crate) async fn start_bare(world: &World, directory: &std::path::Path) -> (Process, String) {
    let mut spec = Spec::new("bare server", std::env::current_exe().unwrap());
    spec.args = vec![BARE.into()];
    spec.cwd = directory.to_owned();
    let mut server = world.sandbox.start(spec).await.unwrap();
    let mut lines = BufReader::new(server.take_stdout().unwrap()).lines();
    let address = lines.next_line().await.unwrap().expect("the bare server's address");
    (server, address)
}

/// A connection that is kept.
struct Connection {
    stream: TcpStream,
    buffer: Vec<u8>,
}

impl Connection {
    async fn open(address: &str) -> Self {
        let stream = TcpStream::connect(address).await.unwrap();
        stream.set_nodelay(true).unwrap();
        Self { stream, buffer: Vec::new() }
    }

    async fn ask(&mut self) -> Duration {
        let started = Instant::now();
        self.stream.write_all(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n").await.unwrap();
        self.buffer.clear();
        // The body is a JSON object without another one in it.
        while self.buffer.last() != Some(&b'}') {
            assert_ne!(self.stream.read_buf(&mut self.buffer).await.unwrap(), 0, "the connection was closed");
        }
        let took = started.elapsed();
        assert!(self.buffer.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&self.buffer));
        took
    }
}

pub(crate) async fn run(world: &World) {
    let state = directory();
    let sidecar = Sidecar::start(world, state.path(), 0, None).await;
    let (server, bare) = start_bare(world, state.path()).await;
    let ours = sidecar.base.trim_start_matches("http://").to_owned();

    let quiet = measure(&ours, &bare).await;
    report("idle machine", quiet);

    let mut loops = Vec::new();
    for _ in 0..cores() {
        let mut spec = Spec::new("busy loop", "/bin/sh");
        spec.args = vec!["-c".into(), "while :; do :; done".into()];
        loops.push(world.sandbox.start(spec).await.unwrap());
    }
    let stop = CancellationToken::new();
    // Two tasks at any time: their OpenCodes start, work and end.
    let tasks = async {
        let prompt = Script::new().bash("for i in $(seq 2000); do echo line $i; done").text("Done.").to_prompt("Go.");
        tokio::join!(repeat(&sidecar, &prompt, &stop), repeat(&sidecar, &prompt, &stop))
    };
    let measuring = async {
        let loaded = measure(&ours, &bare).await;
        stop.cancel();
        loaded
    };
    let (loaded, (a, b)) = tokio::join!(measuring, tasks);
    let p99 = report(&format!("{} busy loops and 2 tasks", cores()), loaded);
    target("p99 of /health under load", p99, 50.0, " ms");
    println!("{} tasks ran meanwhile", a + b);
    for process in loops {
        process.kill(Duration::from_secs(10)).await.unwrap();
    }
    server.kill(Duration::from_secs(10)).await.unwrap();
    sidecar.stop().await;
}

async fn repeat(sidecar: &Sidecar, prompt: &str, stop: &CancellationToken) -> usize {
    let mut count = 0;
    while !stop.is_cancelled() {
        sidecar.run(prompt).await;
        count += 1;
    }
    count
}

/// Requests in turn to both, in milliseconds.
async fn measure(ours: &str, bare: &str) -> [Vec<f64>; 2] {
    let mut connections = [Connection::open(ours).await, Connection::open(bare).await];
    let mut samples = [Vec::new(), Vec::new()];
    for request in 0..REQUESTS * 2 {
        let side = request % 2;
        samples[side].push(connections[side].ask().await.as_secs_f64() * 1000.0);
        // Spread over some seconds, so that the load's own phases are all met.
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    samples
}

/// Gives the sidecar's p99.
fn report(title: &str, [ours, bare]: [Vec<f64>; 2]) -> f64 {
    let rows = [Row::new("sidecar", ours), Row::new("bare axum", bare)];
    print(title, "ms", Shown::Tail, &rows);
    println!("ratio of the medians: {:.3}", rows[0].median() / rows[1].median());
    rows[0].quantile(0.99)
}
