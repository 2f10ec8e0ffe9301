//! One side: the sidecar, as a process of its own.

use crate::World;
use chrono::{DateTime, Utc};
use opencode_sidecar::model::TaskId;
use opencode_sidecar::sandbox::{Process, Signal, Spec};
use opencode_sidecar::secrets::random_token;
use opencode_sidecar::sse::Parser;
use secrecy::{ExposeSecret, SecretString};
use serde_json::{Value, json};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::sync::watch;

/// The longest wait for anything that is not measured.
const PATIENCE: Duration = Duration::from_secs(120);

/// A directory that Postgres' own user may pass through.
pub(crate) fn directory() -> TempDir {
    let directory = tempfile::Builder::new().prefix("opencode-sidecar-bench-").tempdir().unwrap();
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o711);
    std::fs::set_permissions(directory.path(), open).unwrap();
    directory
}

pub(crate) struct Sidecar {
    process: Process,
    pub(crate) base: String,
    pub(crate) secret: SecretString,
    pub(crate) http: reqwest::Client,
    /// From its start to a `/ready` that says yes.
    pub(crate) ready_after: Duration,
}

/// One event, as far as the benchmarks look at it.
pub(crate) struct Seen {
    pub(crate) kind: String,
    pub(crate) data: Value,
    pub(crate) at: DateTime<Utc>,
}

/// One task that was run to its end.
pub(crate) struct Ran {
    /// From the submission to the arrival of `complete`.
    pub(crate) total: Duration,
    pub(crate) submitted: DateTime<Utc>,
    pub(crate) completed: DateTime<Utc>,
    pub(crate) events: Vec<Seen>,
}

impl Sidecar {
    /// Starts it and waits until it is ready. Without `database` it has its embedded Postgres in `state`.
    pub(crate) async fn start(world: &World, state: &Path, warm: usize, database: Option<&SecretString>) -> Self {
        Self::start_with(world, state, warm, database, &[]).await
    }

    /// The same with more variables.
    pub(crate) async fn start_with(
        world: &World,
        state: &Path,
        warm: usize,
        database: Option<&SecretString>,
        more: &[(&str, &str)],
    ) -> Self {
        let secret = random_token().unwrap();
        let workspace = state.join("workspace");
        let mut spec = Spec::new("sidecar", PathBuf::from(env!("CARGO_BIN_EXE_opencode-sidecar")));
        spec.args = vec!["serve".into()];
        let set: Vec<(&str, OsString)> = vec![
            ("PATH", std::env::var_os("PATH").unwrap_or_default()),
            ("HOST", "127.0.0.1".into()),
            ("PORT", "0".into()),
            ("STATE_DIR", state.join("state").into()),
            ("WORKSPACE_DIR", workspace.into()),
            ("LOG_LEVEL", "warn,opencode_sidecar::app=info".into()),
            ("SANDBOX", "off".into()),
            ("OPENCODE_SHARED_SECRET", secret.expose_secret().into()),
            ("OPENCODE_COMMAND", world.opencode.clone().into()),
            ("OPENCODE_PROVIDER", "custom".into()),
            ("OPENCODE_MODEL", "scripted".into()),
            ("OPENCODE_API_KEY", "none".into()),
            ("OPENCODE_API_ENDPOINT", world.model.base_url().into()),
            ("WARM_POOL_SIZE", warm.to_string().into()),
        ];
        spec.env = set.into_iter().map(|(name, value)| (name.into(), value)).collect();
        spec.env.extend(more.iter().map(|(name, value)| (name.into(), value.into())));
        for name in ["OPENCODE_SIDECAR_POSTGRES_BIN", "MALLOC_ARENA_MAX"] {
            spec.env.extend(std::env::var_os(name).map(|value| (name.into(), value)));
        }
        spec.env.extend(database.map(|url| ("DATABASE_URL".into(), url.expose_secret().into())));
        // If this benchmark dies, it still stops its Postgres.
        spec.stop_grace = Duration::from_secs(20);
        let started = Instant::now();
        let mut process = world.sandbox.start(spec).await.unwrap();
        let (sender, mut address) = watch::channel(None::<String>);
        let log = process.take_stderr().unwrap();
        world.tasks.spawn("the sidecar's log", async move {
            let mut lines = BufReader::new(log).lines();
            while let Ok(Some(line)) = lines.next_line().await {
                let entry: Value = serde_json::from_str(&line).unwrap_or_default();
                let said = entry.pointer("/fields/address").or(entry.get("address"));
                match said.and_then(Value::as_str) {
                    Some(said) => drop(sender.send_replace(Some(said.to_owned()))),
                    None if line.contains("\"WARN\"") || line.contains("\"INFO\"") => {}
                    None => eprintln!("sidecar: {line}"),
                }
            }
        });
        let heard = tokio::time::timeout(PATIENCE, address.wait_for(Option::is_some)).await;
        let address = heard.expect("the sidecar listens").expect("the sidecar lives").clone().unwrap();
        let base = format!("http://{address}");
        let http = reqwest::Client::builder().no_proxy().build().unwrap();
        let mut sidecar = Self { process, base, secret, http, ready_after: Duration::ZERO };
        while !sidecar.ready().await.0 {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        sidecar.ready_after = started.elapsed();
        sidecar
    }

    pub(crate) fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Whether it is ready, and how many warm sessions it has.
    async fn ready(&self) -> (bool, usize) {
        let answer = self.http.get(format!("{}/ready", self.base)).send().await.unwrap();
        let ready = answer.status().is_success();
        let body: Value = answer.json().await.unwrap();
        let detail = body["checks"]["opencode"]["detail"].as_str().unwrap_or_default();
        let warm = detail.split(", ").find_map(|part| part.strip_suffix(" warm")?.parse().ok());
        (ready, warm.unwrap_or(0))
    }

    /// Waits until there are so many warm sessions.
    pub(crate) async fn warm(&self, count: usize) {
        let wait = async {
            while self.ready().await.1 < count {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        tokio::time::timeout(PATIENCE, wait).await.expect("a warm session");
    }

    pub(crate) fn get(&self, path: &str) -> reqwest::RequestBuilder {
        self.http.get(format!("{}{path}", self.base)).bearer_auth(self.secret.expose_secret())
    }

    /// Hands in a task; gives the execution's id.
    pub(crate) async fn submit(&self, prompt: &str) -> String {
        let body = json!({ "task_id": TaskId::new(), "prompt": prompt });
        let request = self.http.post(format!("{}/tasks/execute", self.base)).json(&body);
        let answer = request.bearer_auth(self.secret.expose_secret()).send().await.unwrap();
        let status = answer.status();
        let body: Value = answer.json().await.unwrap();
        assert_eq!(status.as_u16(), 202, "{body}");
        body["execution_id"].as_str().unwrap().to_owned()
    }

    /// Waits until an execution has completed.
    pub(crate) async fn ended(&self, id: &str) {
        let wait = async {
            let status = self.get(&format!("/tasks/{id}/status"));
            while status.try_clone().unwrap().send().await.unwrap().json::<Value>().await.unwrap()["status"]
                != "completed"
            {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        tokio::time::timeout(PATIENCE, wait).await.expect("the task completes");
    }

    /// Runs a task and reads its stream (SSE) to the end.
    pub(crate) async fn run(&self, prompt: &str) -> Ran {
        let (started, submitted) = (Instant::now(), Utc::now());
        let id = self.submit(prompt).await;
        let request = self.get(&format!("/tasks/{id}/stream")).header("accept", "text/event-stream");
        let mut stream = request.send().await.unwrap();
        let mut parser = Parser::default();
        let mut texts = Vec::new();
        // Read now, understood later: the understanding is not the sidecar's time.
        let total = 'read: loop {
            let chunk = stream.chunk().await.unwrap().expect("the stream goes on until `complete`");
            let before = texts.len();
            parser.push(&chunk, &mut texts).unwrap();
            if texts[before..].iter().any(|text| text.contains("\"type\":\"complete\"")) {
                break 'read started.elapsed();
            }
        };
        let completed = Utc::now();
        let events: Vec<Seen> = texts.iter().map(|text| seen(text)).collect();
        let last = events.last().unwrap();
        assert_eq!(last.data["status"], "completed", "{}", texts.join("\n"));
        Ran { total, submitted, completed, events }
    }

    /// Ends it, as Kubernetes would.
    pub(crate) async fn stop(self) {
        self.process.signal(Signal::Term);
        if tokio::time::timeout(Duration::from_secs(40), self.process.exited()).await.is_err() {
            println!("the sidecar did not stop");
        }
        self.process.kill(Duration::from_secs(10)).await.unwrap();
    }
}

pub(crate) fn seen(text: &str) -> Seen {
    let mut event: Value = serde_json::from_str(text).unwrap();
    let at = event["timestamp"].as_str().and_then(|at| at.parse().ok()).unwrap();
    Seen { kind: event["type"].as_str().unwrap().to_owned(), data: event["data"].take(), at }
}
