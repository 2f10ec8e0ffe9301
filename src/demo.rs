//! `opencode-sidecar demo`: the main job, once, for a person to watch.
//!
//! It is a client of the sidecar that it starts: it submits over HTTP, follows the stream, and reads the history. Only
//! the model may be scripted, and then everything that is printed says so.

use crate::app::{App, StartError};

use crate::config::{Config, DefaultModel, SandboxMode};
use crate::console::Printer;
use crate::host::{executable, fail, stop_signal};
use crate::model::TaskId;
use crate::model::task::Provider;
use crate::opencode::sse::Parser;
use crate::scripted::{Script, ScriptedModel, Step};
use crate::secrets::random_token;
use crate::tasks::Tasks;
use crate::telemetry;
use anstyle::{AnsiColor, Style};
use secrecy::{ExposeSecret, SecretString};
use serde_json::{Value, json};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

const HEAD: Style = AnsiColor::Cyan.on_default().bold();
const NOTE: Style = AnsiColor::Yellow.on_default();

const PROMPT: &str = "Write a small shell script greet.sh that greets the person named by its first argument, \
                      try it out, and write down in NOTES.md what you did.";

/// Why the demonstration ended early.
#[derive(Debug, thiserror::Error)]
enum DemoError {
    #[error("the sidecar did not start")]
    Start(#[from] StartError),
    #[error("a file or socket cannot be used")]
    Io(#[from] std::io::Error),
    #[error("the sidecar's API failed")]
    Http(#[from] reqwest::Error),
    #[error("the sidecar answered {status}: {body}")]
    Refused { status: u16, body: String },
    #[error("the stream is broken")]
    Stream(#[from] crate::opencode::sse::SseError),
    #[error("{0}")]
    Sentence(String),
}

/// Runs the demonstration. Ends with 0 only if the task was completed.
pub async fn run(prompt: Option<String>) -> ExitCode {
    match demonstrate(prompt).await {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => fail("the demonstration ended early", &error),
    }
}

fn head(text: &str) {
    anstream::println!("\n{HEAD}── {text}{HEAD:#}");
}

/// The task that the scripted model plays. OpenCode, the files and the commands are real.
fn script(workspace: &Path) -> Script {
    let file = |name: &str| workspace.join(name).to_string_lossy().into_owned();
    let todo = |first: &str, second: &str, third: &str| {
        json!({ "todos": [
            { "content": "Write greet.sh", "status": first, "priority": "high" },
            { "content": "Try it out", "status": second, "priority": "high" },
            { "content": "Write down what was done", "status": third, "priority": "low" },
        ]})
    };
    let say = |text: &str| Step { text: Some(text.to_owned()), delay_ms: Some(15), ..Step::default() };
    let (done, doing, open) = ("completed", "in_progress", "pending");
    Script::new()
        .step(Step {
            tools: vec![tool("todowrite", todo(doing, open, open))],
            ..say("I will write the script first, then try it out.")
        })
        .write(&file("greet.sh"), "#!/bin/sh\nset -eu\necho \"Hello, ${1:-world}!\"\n")
        .tool("todowrite", todo(done, doing, open))
        .bash(
            "chmod +x greet.sh && for name in Ada Grace Edsger; do ./greet.sh \"$name\"; sleep 0.3; done; \
             echo 'this line went to stderr' >&2; ls -l",
        )
        .write(&file("NOTES.md"), "# What was done\n\n- `greet.sh` greets the person named by its first argument.\n")
        .tool("todowrite", todo(done, done, done))
        .step(say("`greet.sh` works: it greeted three people. What was done stands in `NOTES.md`."))
}

fn tool(name: &str, args: Value) -> crate::scripted::ToolUse {
    crate::scripted::ToolUse { name: name.to_owned(), args }
}

async fn demonstrate(prompt: Option<String>) -> Result<bool, DemoError> {
    let mut config = Config::from_source(&|name| match name {
        "WORKSPACE_DIR" | "PORT" | "HOST" | "SANDBOX" | "OPENCODE_SHARED_SECRET" => None,
        "LOG_LEVEL" => std::env::var_os(name).or_else(|| Some("warn".into())),
        "LOG_FORMAT" => Some("text".into()),
        _ => std::env::var_os(name),
    })
    .map_err(|errors| DemoError::Sentence(errors.to_string()))?;
    telemetry::init_log(&config.log_level, config.log_format).map_err(|e| DemoError::Sentence(e.to_string()))?;

    // What the demonstration keeps is its history: the next one shows this one too.
    if std::env::var_os("STATE_DIR").is_none() {
        let uid = nix::unistd::getuid();
        config.state_dir = std::env::temp_dir().join(format!("opencode-sidecar-demo-{uid}"));
    }
    let workspace = std::env::temp_dir().join(format!("opencode-sidecar-workspace-{}", TaskId::new()));
    std::fs::create_dir(&workspace)?;
    let workspace = workspace.canonicalize()?;
    config.workspace_dir.clone_from(&workspace);
    let secret = random_token()?;
    config.shared_secret = Some(secret.clone());
    config.sandbox = SandboxMode::Off;
    config.host = IpAddr::V4(Ipv4Addr::LOCALHOST);
    config.port = 0;

    head("opencode-sidecar: one real task, from submission to history");
    let model_tasks = Tasks::new();
    // It plays for as long as it lives.
    let model = match &config.default_model {
        Some(model) => {
            anstream::println!("Model:     {} at the provider {}", model.model, model.provider.as_str());
            None
        }
        None => {
            if prompt.is_some() {
                return Err(DemoError::Sentence(
                    "--prompt needs a real model: set OPENCODE_API_KEY, OPENCODE_PROVIDER and OPENCODE_MODEL"
                        .to_owned(),
                ));
            }
            let model = ScriptedModel::start(&model_tasks, Some(script(&workspace))).await?;
            config.default_model = Some(DefaultModel {
                provider: Provider::Custom,
                model: "scripted-model".to_owned(),
                api_key: random_token()?,
                endpoint: url::Url::parse(&model.base_url()).map_err(|e| DemoError::Sentence(e.to_string()))?,
            });
            anstream::println!(
                "{NOTE}Model:     a SCRIPTED MODEL plays the provider (no OPENCODE_API_KEY is set).{NOTE:#}"
            );
            anstream::println!("{NOTE}           OpenCode, its tools, the files and the commands are real.{NOTE:#}");
            Some(model)
        }
    };
    anstream::println!("Workspace: {}", workspace.display());
    anstream::println!("State:     {}", config.state_dir.display());
    anstream::println!("Sandbox:   off; this version has none yet");
    anstream::println!("Starting Postgres and the sidecar …");
    let listener = TcpListener::bind(SocketAddr::new(config.host, 0)).await?;
    let address = listener.local_addr()?;
    let app = App::build(config, executable()?).await?;
    let stop = CancellationToken::new();
    let tasks = Tasks::new();
    let serving = tasks.spawn("demo sidecar", app.run(listener, stop.clone().cancelled_owned()));

    let client =
        Client { http: reqwest::Client::builder().no_proxy().build()?, base: format!("http://{address}"), secret };
    let interrupted = stop_signal()?;
    let outcome = tokio::select! {
        outcome = follow(&client, prompt.as_deref().unwrap_or(PROMPT), model.is_some(), &workspace) => outcome,
        () = interrupted => Err(DemoError::Sentence("interrupted".to_owned())),
    };
    stop.cancel();
    match serving.await {
        Ok(Ok(())) => {}
        Ok(Err(abandoned)) => return Err(DemoError::Sentence(abandoned.to_string())),
        Err(error) => return Err(DemoError::Sentence(error.to_string())),
    }
    drop(model);
    model_tasks.shutdown_token().cancel();
    anstream::println!("\nThe workspace stays at {}.", workspace.display());
    outcome
}

struct Client {
    http: reqwest::Client,
    base: String,
    secret: SecretString,
}

impl Client {
    async fn send(&self, request: reqwest::RequestBuilder) -> Result<reqwest::Response, DemoError> {
        let response = request.bearer_auth(self.secret.expose_secret()).send().await?;
        let status = response.status();
        if !status.is_success() {
            return Err(DemoError::Refused { status: status.as_u16(), body: response.text().await? });
        }
        Ok(response)
    }

    async fn get(&self, path: &str) -> Result<Value, DemoError> {
        Ok(self.send(self.http.get(format!("{}{path}", self.base))).await?.json().await?)
    }
}

async fn follow(client: &Client, prompt: &str, scripted: bool, workspace: &Path) -> Result<bool, DemoError> {
    head("POST /tasks/execute");
    anstream::println!("{prompt}");
    let body = json!({ "task_id": TaskId::new(), "prompt": prompt, "metadata": { "from": "make demo" } });
    let accepted: Value =
        client.send(client.http.post(format!("{}/tasks/execute", client.base)).json(&body)).await?.json().await?;
    let id = accepted["execution_id"].as_str().unwrap_or_default().to_owned();
    anstream::println!("202 Accepted: execution {id}");

    head(&format!("GET /tasks/{id}/stream"));
    let request = client.http.get(format!("{}/tasks/{id}/stream", client.base)).header("accept", "text/event-stream");
    let mut stream = client.send(request).await?;
    let mut printer = Printer::new(anstream::stdout());
    let mut parser = Parser::default();
    let mut complete = None;
    let mut count = 0_u64;
    while let Some(chunk) = stream.chunk().await? {
        let mut events = Vec::new();
        parser.push(&chunk, &mut events)?;
        for text in events {
            let event: Value = serde_json::from_str(&text).map_err(|e| DemoError::Sentence(e.to_string()))?;
            printer.event(&event)?;
            count += 1;
            if event["type"] == "complete" {
                complete = Some(event["data"].clone());
            }
        }
    }
    let complete = complete.ok_or_else(|| DemoError::Sentence("the stream ended without `complete`".to_owned()))?;

    head("Files in the workspace");
    for file in files(workspace)? {
        let path = workspace.join(&file);
        anstream::println!("{} ({} bytes)", file.display(), std::fs::metadata(&path)?.len());
        for line in std::fs::read_to_string(&path).unwrap_or_default().lines().take(6) {
            anstream::println!("    {line}");
        }
    }

    head("Usage");
    let usage = &complete["usage"];
    let cpu = usage["cpu_seconds"].as_f64().map(|s| format!(", {s:.1} s of CPU")).unwrap_or_default();
    anstream::println!(
        "{} calls of the {}model, {} tokens in, {} out{cpu}; {count} events",
        usage["model_calls"],
        if scripted { "scripted " } else { "" },
        usage["input_tokens"],
        usage["output_tokens"],
    );

    head("History in Postgres: GET /tasks?limit=3");
    let history = client.get("/tasks?limit=3").await?;
    for row in history["executions"].as_array().into_iter().flatten() {
        let text = |name: &str| row[name].as_str().unwrap_or("–").to_owned();
        let mark = if row["execution_id"] == json!(id) { "→" } else { " " };
        anstream::println!(
            "{mark} {}  {}  {} ({})  {} ms  {} events",
            text("created_at"),
            text("execution_id"),
            text("status"),
            text("reason"),
            row["duration_ms"],
            row["last_seq"]
        );
    }
    Ok(complete["status"] == "completed")
}

/// All files below, by their relative path.
fn files(root: &Path) -> Result<Vec<PathBuf>, std::io::Error> {
    let mut found = Vec::new();
    let mut directories = vec![PathBuf::new()];
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(root.join(&directory))? {
            let entry = entry?;
            let path = directory.join(entry.file_name());
            if entry.file_type()?.is_dir() { directories.push(path) } else { found.push(path) }
        }
    }
    found.sort();
    Ok(found)
}
