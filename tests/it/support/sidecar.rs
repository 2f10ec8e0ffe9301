//! A real sidecar for a test: the binary under test as a process of its own, with a database, a workspace, a state
//! directory and a scripted model of its own. OpenCode, its tools, Postgres and the kernel are real.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test's own helpers fail like the test")]

use super::panics;
use super::postgres::{for_everybody, fresh_database, sandbox};
use super::tls::Authority;
use futures_util::StreamExt;
use opencode_sidecar::opencode::launch::find_command;
use opencode_sidecar::sandbox::{Exit, Process, Sandbox, Signal, Spec, User};
use opencode_sidecar::scripted::{Script, ScriptedModel};
use opencode_sidecar::sse::Parser;
use opencode_sidecar::store::DatabaseOptions;
use opencode_sidecar::tasks::Tasks;
use reqwest::{Method, Response};
use secrecy::ExposeSecret;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream};

/// The provider's key that the sidecar has; no session may ever see it.
pub(crate) const API_KEY: &str = "sk-the-real-key-0123456789abcdef";
/// Far beyond what anything here takes on a busy machine: a test that meets it is broken.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

pub(crate) type Socket = WebSocketStream<MaybeTlsStream<TcpStream>>;

/// Waits for something with the patience of a test.
pub(crate) async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(PATIENCE, future).await {
        Ok(value) => value,
        Err(_) => panic!("not within {PATIENCE:?}: {what}"),
    }
}

pub(crate) fn opencode() -> PathBuf {
    let configured = std::env::var_os("OPENCODE_COMMAND").map(PathBuf::from);
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    find_command(configured.as_deref(), std::env::var_os("PATH"), here).expect("run `make setup` first")
}

/// Whom a sidecar runs as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum As {
    /// As an ordinary user, as in a pod of the profile `restricted`.
    Nobody,
    /// As root with what the recommended pod leaves of its capabilities.
    PodRoot,
}

pub(crate) const NOBODY: User = User { uid: 65_534, gid: 65_534 };

pub(crate) struct Sidecar {
    process: Process,
    pub(crate) base: String,
    pub(crate) secret: String,
    pub(crate) http: reqwest::Client,
    tasks: Tasks,
    log: mpsc::UnboundedReceiver<String>,
}

/// The places and the model of a test, which outlive its sidecars.
pub(crate) struct World {
    pub(crate) workspace: TempDir,
    pub(crate) state: TempDir,
    pub(crate) model: ScriptedModel,
    tasks: Tasks,
    database: DatabaseOptions,
    env: BTreeMap<String, String>,
}

impl World {
    pub(crate) async fn new() -> Self {
        Self::with(fresh_database().await).await
    }

    /// With a database that is there already.
    pub(crate) async fn with(database: DatabaseOptions) -> Self {
        panics::are_said_at_once();
        let _ = rustls::crypto::ring::default_provider().install_default();
        let workspace = tempfile::Builder::new().prefix("oc-ws-").tempdir().unwrap();
        let state = tempfile::Builder::new().prefix("oc-st-").tempdir().unwrap();
        let tasks = Tasks::new();
        let model = ScriptedModel::start(&tasks, None).await.unwrap();
        let text = |value: &str| value.to_owned();
        let env = BTreeMap::from([
            (text("DATABASE_URL"), text(database.url.expose_secret())),
            (text("WORKSPACE_DIR"), workspace.path().to_str().unwrap().to_owned()),
            (text("STATE_DIR"), state.path().to_str().unwrap().to_owned()),
            (text("HOST"), text("127.0.0.1")),
            (text("PORT"), text("0")),
            (text("SANDBOX"), text("best-effort")),
            (text("OPENCODE_SHARED_SECRET"), uuid::Uuid::new_v4().to_string()),
            (text("OPENCODE_COMMAND"), opencode().to_str().unwrap().to_owned()),
            (text("OPENCODE_PROVIDER"), text("custom")),
            (text("OPENCODE_MODEL"), text("scripted-model")),
            (text("OPENCODE_API_KEY"), text(API_KEY)),
            (text("OPENCODE_API_ENDPOINT"), model.base_url()),
            (text("MODEL_ENDPOINT_ALLOW"), text("127.0.0.1")),
            (text("SESSION_PORT_RANGE"), port_range()),
            (text("SESSION_UID_RANGE"), uid_range()),
            (text("MAX_CONCURRENT_TASKS"), text("2")),
            (text("LOG_LEVEL"), std::env::var("TEST_LOG").unwrap_or_else(|_| text("info"))),
        ]);
        Self { workspace, state, model, tasks, database, env }
    }

    /// Starts a sidecar here, with some variables changed (an empty value leaves one out).
    pub(crate) async fn start(&self, changes: &[(&str, &str)]) -> Sidecar {
        self.start_by(changes, |_| ()).await
    }

    /// The sidecar's variables, with some changed.
    pub(crate) fn environment(&self, changes: &[(&str, &str)]) -> BTreeMap<String, String> {
        let mut env = self.env.clone();
        env.extend(changes.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
        env
    }

    /// The same, started in another way: `adjust` has the last word on its process.
    pub(crate) async fn start_by(&self, changes: &[(&str, &str)], adjust: impl FnOnce(&mut Spec)) -> Sidecar {
        Sidecar::launch(self.environment(changes), adjust)
            .await
            .unwrap_or_else(|log| panic!("the sidecar did not start:\n{log}"))
    }

    /// The same, as somebody else. Needs root.
    pub(crate) async fn start_as(&self, who: As, changes: &[(&str, &str)]) -> Sidecar {
        let database = for_everybody(&self.database, &self.tasks).await;
        if who == As::Nobody {
            for place in [&self.workspace, &self.state] {
                std::os::unix::fs::chown(place.path(), Some(NOBODY.uid), Some(NOBODY.gid)).unwrap();
            }
        }
        let changes = [changes, &[("DATABASE_URL", &database)]].concat();
        let adjust = |spec: &mut Spec| match who {
            As::Nobody => spec.user = Some(NOBODY),
            As::PodRoot => {
                let left = "--bounding-set=-all,+setuid,+setgid,+chown,+kill";
                let program = std::mem::replace(&mut spec.program, "setpriv".into());
                let before = [left.into(), "--inh-caps=-all".into(), "--".into(), program.into()];
                spec.args.splice(0..0, before);
            }
        };
        self.start_by(&changes, adjust).await
    }

    /// The users that its sidecars' sessions may have.
    pub(crate) fn uids(&self) -> RangeInclusive<u32> {
        let (from, to) = self.env["SESSION_UID_RANGE"].split_once('-').unwrap();
        from.parse().unwrap()..=to.parse().unwrap()
    }

    /// The directories that sessions have of their own now.
    pub(crate) fn private_directories(&self) -> Vec<PathBuf> {
        let Ok(entries) = std::fs::read_dir(self.state.path().join("sessions")) else { return Vec::new() };
        entries.map(|entry| entry.unwrap().path()).collect()
    }

    /// Starts one that may end by itself before it listens; then gives how, and what it wrote.
    pub(crate) async fn try_start(&self, changes: &[(&str, &str)]) -> Result<Sidecar, String> {
        Sidecar::launch(self.environment(changes), |_| ()).await
    }

    /// Starts one that is expected to end by itself; gives how, and what it wrote.
    pub(crate) async fn start_in_vain(&self, changes: &[(&str, &str)]) -> String {
        match Sidecar::launch(self.environment(changes), |_| ()).await {
            Ok(_) => panic!("it started"),
            Err(log) => log,
        }
    }

    /// The model behind TLS; see [`Authority::front`].
    pub(crate) async fn tls_front(&self, authority: &Authority, protocol: &str) -> String {
        authority.front(&self.tasks, &self.model.base_url(), protocol).await
    }

    /// Where processes can be started beside the sidecar.
    pub(crate) fn sandbox(&self) -> Sandbox {
        sandbox(&self.tasks)
    }

    /// The sidecars' database.
    pub(crate) fn database(&self) -> DatabaseOptions {
        self.database.clone()
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.workspace.path().join(name)
    }

    /// The path of a workspace file as a script's tools name it.
    pub(crate) fn path(&self, name: &str) -> String {
        self.workspace.path().canonicalize().unwrap().join(name).to_str().unwrap().to_owned()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.tasks.shutdown_token().cancel();
    }
}

/// A range of ports for the sessions of one sidecar, so that tests side by side do not meet, nor two runs of them.
fn port_range() -> String {
    use std::sync::atomic::{AtomicU32, Ordering};
    static NEXT: AtomicU32 = AtomicU32::new(0);
    // Up to where the kernel's own begin.
    let block = std::process::id().wrapping_mul(61).wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed)) % 550;
    let first = 21_000 + block * 20;
    format!("{first}-{}", first + 19)
}

/// The same of the users that sessions run as.
fn uid_range() -> String {
    use std::sync::atomic::{AtomicU32, Ordering};
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let block = (std::process::id() % 1000) * 1000 + NEXT.fetch_add(1, Ordering::Relaxed) % 1000;
    let first = 1_000_000 + block * 100;
    format!("{first}-{}", first + 99)
}

impl Sidecar {
    async fn launch(setting: BTreeMap<String, String>, adjust: impl FnOnce(&mut Spec)) -> Result<Self, String> {
        let tasks = Tasks::new();
        let mut spec = subcommand("serve", setting.clone());
        adjust(&mut spec);
        let mut process = sandbox(&tasks).start(spec).await.unwrap();
        let mut lines = BufReader::new(process.take_stderr().unwrap()).lines();
        let (sender, log) = mpsc::unbounded_channel();
        let mut seen = String::new();
        let address = loop {
            let line = soon("the sidecar listens, or ends", lines.next_line()).await.unwrap();
            let Some(line) = line else {
                let exit = soon("the sidecar's end", process.exited()).await;
                return Err(format!("{seen}{exit}"));
            };
            seen.push_str(&line);
            seen.push('\n');
            let _ = sender.send(line.clone());
            let parsed: Value = serde_json::from_str(&line).unwrap_or_default();
            let fields = if parsed["fields"].is_object() { &parsed["fields"] } else { &parsed };
            if fields["message"] == "listening" {
                break fields["address"].as_str().unwrap().to_owned();
            }
        };
        tasks.spawn("log", async move {
            while let Ok(Some(line)) = lines.next_line().await {
                if std::env::var_os("TEST_LOG").is_some() {
                    eprintln!("{line}");
                }
                let _ = sender.send(line);
            }
        });
        let http = reqwest::Client::builder().no_proxy().build().unwrap();
        let secret = setting["OPENCODE_SHARED_SECRET"].clone();
        Ok(Self { process, base: format!("http://{address}"), secret, http, tasks, log })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.process.pid()
    }

    pub(crate) fn address(&self) -> &str {
        self.base.strip_prefix("http://").unwrap()
    }

    pub(crate) async fn send(&self, method: Method, path: &str, body: Option<Value>) -> (u16, Value) {
        let mut request = self.http.request(method, format!("{}{path}", self.base)).bearer_auth(&self.secret);
        if let Some(body) = body {
            request = request.json(&body);
        }
        if path == "/sessions" {
            // OpenCode starts within it.
            request = request.header("prefer", "wait=60");
        }
        answer(soon(path, request.send()).await.unwrap()).await
    }

    pub(crate) async fn get(&self, path: &str) -> Value {
        let (status, body) = self.send(Method::GET, path, None).await;
        assert_eq!(status, 200, "{path}: {body}");
        body
    }

    pub(crate) async fn post(&self, path: &str, body: Value) -> (u16, Value) {
        self.send(Method::POST, path, Some(body)).await
    }

    /// Submits a task that plays the script; more fields may be given. Gives the execution's id.
    pub(crate) async fn submit_with(&self, script: &Script, more: Value) -> String {
        let mut body =
            json!({ "task_id": uuid::Uuid::new_v4(), "prompt": script.to_prompt("Do what the script says.") });
        for (name, value) in more.as_object().unwrap() {
            body[name] = value.clone();
        }
        let (status, answer) = self.post("/tasks/execute", body).await;
        assert_eq!(status, 202, "{answer}");
        answer["execution_id"].as_str().unwrap().to_owned()
    }

    pub(crate) async fn submit(&self, script: &Script) -> String {
        self.submit_with(script, json!({})).await
    }

    pub(crate) async fn status(&self, id: &str) -> Value {
        self.get(&format!("/tasks/{id}/status")).await
    }

    /// Follows the stream to its end; gives every event.
    pub(crate) async fn follow(&self, id: &str) -> Vec<Value> {
        parsed(&self.follow_text(id).await)
    }

    /// The same, each event byte for byte as it came.
    pub(crate) async fn follow_text(&self, id: &str) -> Vec<String> {
        let events = self.stream(id, 0).await.rest().await;
        assert_log(&parsed(&events));
        events
    }

    /// Follows to the end and gives the whole record.
    pub(crate) async fn finished(&self, id: &str) -> Value {
        self.follow(id).await;
        self.get(&format!("/tasks/{id}")).await
    }

    /// Server-sent events from `after` on.
    pub(crate) async fn stream(&self, id: &str, after: u64) -> Events {
        let request = self
            .http
            .get(format!("{}/tasks/{id}/stream", self.base))
            .bearer_auth(&self.secret)
            .header("accept", "text/event-stream")
            .header("last-event-id", after.to_string());
        let response = soon("the stream opens", request.send()).await.unwrap();
        assert_eq!(response.status(), 200);
        Events { response, parser: Parser::default(), waiting: Vec::new() }
    }

    /// A WebSocket with the secret in its header.
    pub(crate) async fn socket(&self, path: &str) -> Socket {
        self.socket_with(path, &[("authorization", &format!("Bearer {}", self.secret))]).await
    }

    pub(crate) async fn socket_with(&self, path: &str, headers: &[(&str, &str)]) -> Socket {
        let mut request = format!("ws://{}{path}", self.address()).into_client_request().unwrap();
        for (name, value) in headers {
            let name = reqwest::header::HeaderName::from_bytes(name.as_bytes()).unwrap();
            request.headers_mut().insert(name, value.parse().unwrap());
        }
        soon("a WebSocket", tokio_tungstenite::connect_async(request)).await.unwrap().0
    }

    /// Waits for a line of the log that has this in it.
    pub(crate) async fn logged(&mut self, text: &str) -> String {
        loop {
            let line = soon(text, self.log.recv()).await.unwrap_or_else(|| panic!("it ended before it logged {text}"));
            if line.contains(text) {
                return line;
            }
        }
    }

    /// What is in the sidecar's log since the last look, from its start on.
    pub(crate) fn log_so_far(&mut self) -> Vec<String> {
        std::iter::from_fn(|| self.log.try_recv().ok()).collect()
    }

    /// The same, to its end: once it has ended.
    pub(crate) async fn whole_log(&mut self) -> Vec<String> {
        let mut lines = Vec::new();
        while let Some(line) = self.log.recv().await {
            lines.push(line);
        }
        lines
    }

    pub(crate) fn signal(&self, signal: Signal) {
        self.process.signal(signal);
    }

    pub(crate) async fn exited(&self) -> Exit {
        soon("the sidecar's end", self.process.exited()).await
    }

    /// Ends it with SIGTERM. It must end well, and must have ended everything that it started.
    pub(crate) async fn stop(self) {
        assert_eq!(self.descendants(), Vec::<String>::new(), "an idle sidecar runs nothing");
        self.signal(Signal::Term);
        let exit = self.exited().await;
        assert_eq!(exit.code, Some(0), "{exit}");
        self.tasks.shutdown_token().cancel();
    }

    /// Waits until the database has everything that was told: what has ended is known to it alone then.
    pub(crate) async fn shipped(&self) {
        soon("it is shipped", async {
            loop {
                let ready = self.get("/ready").await;
                if ready["checks"]["journal"]["detail"].as_str().unwrap().contains(" 0 events to ship") {
                    return;
                }
            }
        })
        .await;
    }

    /// Every process below the sidecar, as `pid name`.
    pub(crate) fn descendants(&self) -> Vec<String> {
        descendants(self.pid())
    }

    /// OpenCode's processes below it.
    pub(crate) fn opencodes(&self) -> Vec<u32> {
        let named = self.descendants().into_iter().filter(|process| process.ends_with(" opencode"));
        named.map(|process| process.split(' ').next().unwrap().parse().unwrap()).collect()
    }
}

/// A subcommand of the sidecar, in this environment.
pub(crate) fn subcommand(name: &str, setting: BTreeMap<String, String>) -> Spec {
    let mut spec = Spec::new(name, env!("CARGO_BIN_EXE_opencode-sidecar"));
    spec.args = vec![name.into()];
    spec.env = vec![("PATH".into(), std::env::var_os("PATH").unwrap())];
    let set = setting.into_iter().filter(|(_, value)| !value.is_empty());
    spec.env.extend(set.map(|(variable, value)| (OsString::from(variable), OsString::from(value))));
    spec.cwd = env!("CARGO_MANIFEST_DIR").into();
    // As in a container.
    spec.umask = Some(0o022);
    spec
}

/// Every process below `root`, as `pid name`.
pub(crate) fn descendants(root: u32) -> Vec<String> {
    let mut parents: BTreeMap<u32, (u32, String)> = BTreeMap::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        let Ok(stat) = std::fs::read_to_string(entry.path().join("stat")) else { continue };
        let (Some(open), Some(close)) = (stat.find('('), stat.rfind(')')) else { continue };
        let mut rest = stat[close + 1..].split_whitespace();
        let (state, parent) = (rest.next().unwrap(), rest.next().unwrap().parse().unwrap());
        // A zombie runs nothing; it waits for its parent to look.
        if state != "Z" {
            parents.insert(pid, (parent, stat[open + 1..close].to_owned()));
        }
    }
    let mut found: Vec<u32> = vec![root];
    let mut at = 0;
    while let Some(&parent) = found.get(at) {
        found.extend(parents.iter().filter(|(_, (p, _))| *p == parent).map(|(pid, _)| *pid));
        at += 1;
    }
    found[1..].iter().map(|pid| format!("{pid} {}", parents[pid].1)).collect()
}

/// Whether a process with a command line that holds the word runs anywhere.
pub(crate) fn runs(word: &str) -> bool {
    std::fs::read_dir("/proc").unwrap().flatten().any(|entry| {
        let Ok(line) = std::fs::read(entry.path().join("cmdline")) else { return false };
        String::from_utf8_lossy(&line).replace('\0', " ").contains(word)
    })
}

/// The events of a whole log: numbered from 1 without a gap, ended by `complete` and nothing after it.
pub(crate) fn assert_log(events: &[Value]) {
    for (i, event) in events.iter().enumerate() {
        assert_eq!(event["seq"], i as u64 + 1, "{event}");
        assert_eq!(event["type"] == "complete", i + 1 == events.len(), "{event}");
    }
}

pub(crate) fn parsed(events: &[String]) -> Vec<Value> {
    events.iter().map(|event| serde_json::from_str(event).unwrap()).collect()
}

/// All text of one type, put together.
pub(crate) fn text_of(events: &[Value], kind: &str) -> String {
    events.iter().filter(|e| e["type"] == kind).map(|e| e["data"].as_str().unwrap()).collect()
}

pub(crate) async fn answer(response: Response) -> (u16, Value) {
    let status = response.status().as_u16();
    let body = soon("a body", response.bytes()).await.unwrap();
    (status, serde_json::from_slice(&body).unwrap_or_else(|_| json!(String::from_utf8_lossy(&body))))
}

/// A stream of server-sent events.
pub(crate) struct Events {
    response: Response,
    parser: Parser,
    waiting: Vec<String>,
}

impl Events {
    pub(crate) async fn next(&mut self) -> Option<Value> {
        self.next_text().await.map(|event| serde_json::from_str(&event).unwrap())
    }

    /// As it came.
    pub(crate) async fn next_text(&mut self) -> Option<String> {
        while self.waiting.is_empty() {
            let chunk = soon("an event", self.response.chunk()).await.unwrap()?;
            self.parser.push(&chunk, &mut self.waiting).unwrap();
        }
        Some(self.waiting.remove(0))
    }

    /// Everything until the stream ends or breaks off, as it came.
    pub(crate) async fn until_cut(&mut self) -> Vec<String> {
        let mut events = std::mem::take(&mut self.waiting);
        while let Ok(Some(chunk)) = soon("an event", self.response.chunk()).await {
            self.parser.push(&chunk, &mut events).unwrap();
        }
        events
    }

    /// Everything to the end of the stream, as it came.
    pub(crate) async fn rest(&mut self) -> Vec<String> {
        let mut events = Vec::new();
        while let Some(event) = self.next_text().await {
            events.push(event);
        }
        events
    }

    /// Events up to the one that is wanted, and that one.
    pub(crate) async fn until(&mut self, what: &str, wanted: impl Fn(&Value) -> bool) -> Vec<Value> {
        let mut events = Vec::new();
        loop {
            let event = self.next().await.unwrap_or_else(|| panic!("the stream ended before {what}: {events:#?}"));
            let found = wanted(&event);
            events.push(event);
            if found {
                return events;
            }
        }
    }
}

/// The next event or frame of a socket; `Err` with the code where it was closed.
pub(crate) async fn frame(socket: &mut Socket) -> Result<Value, u16> {
    loop {
        match soon("a frame", socket.next()).await {
            Some(Ok(Message::Text(text))) => return Ok(serde_json::from_str(&text).unwrap()),
            Some(Ok(Message::Close(close))) => return Err(close.map_or(1005, |close| close.code.into())),
            Some(Ok(_)) => {}
            Some(Err(error)) => panic!("{error}"),
            None => return Err(1006),
        }
    }
}
