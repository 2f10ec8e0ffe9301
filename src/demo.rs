//! `opencode-sidecar demo`: the main job, once, for a person to watch.
//!
//! It is a client of the sidecar that it starts: it submits over HTTP, follows the stream, and reads the history. Only
//! the model may be scripted, and then everything that is printed says so.

use crate::app::{App, StartError};
use crate::client::{Client, ClientError, Followed, follow};
use crate::config::{Config, DefaultModel, SandboxMode};
use crate::console::{Printer, one_line, status, usage};
use crate::host::{executable, fail, stop_signal};
use crate::model::TaskId;
use crate::model::task::Provider;
use crate::scripted::{Script, ScriptedModel, Step};
use crate::secrets::{Source, random_token};
use crate::tasks::Tasks;
use crate::telemetry;
use anstyle::{AnsiColor, Style};
use futures_util::StreamExt;
use serde_json::{Value, json};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::process::ExitCode;
use std::time::Duration;
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
    Client(#[from] ClientError),
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
    config.credentials.shared_secret = Some(Source::Given(secret.clone()));
    config.sandbox = SandboxMode::BestEffort;
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
    anstream::println!("Sandbox:   what this host gives (SANDBOX=best-effort)");
    anstream::println!("Starting Postgres and the sidecar …");
    let listener = TcpListener::bind(SocketAddr::new(config.host, 0)).await?;
    let address = listener.local_addr()?;
    let app = App::build(config, executable()?).await?;
    let stop = CancellationToken::new();
    let tasks = Tasks::new();
    let serving = tasks.spawn("demo sidecar", app.run(listener, stop.clone().cancelled_owned()));

    let client = Client::new(&format!("http://{address}"), Some(secret))?;
    let interrupted = stop_signal()?;
    let outcome = tokio::select! {
        outcome = show(&client, prompt.as_deref().unwrap_or(PROMPT), model.is_some(), &workspace) => outcome,
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

async fn show(client: &Client, prompt: &str, scripted: bool, workspace: &Path) -> Result<bool, DemoError> {
    head("POST /tasks/execute");
    anstream::println!("{prompt}");
    let task_id = TaskId::new();
    let body = json!({ "task_id": task_id, "prompt": prompt, "metadata": { "from": "make demo" } });
    let id = client.submit(body, None, &task_id.to_string()).await?.execution_id;
    anstream::println!("202 Accepted: execution {id}");

    head(&format!("GET /tasks/{id}/stream"));
    let mut printer = Printer::new(anstream::stdout());
    // It is in this very process: a connection that is lost does not come back.
    let mut events = pin!(follow(client.clone(), id, 0, Duration::ZERO));
    let mut complete = None;
    let mut count = 0_u64;
    while let Some(followed) = events.next().await {
        let Followed::Event(event) = followed? else { continue };
        count += 1;
        if event.value["type"] == "complete" {
            complete = Some(event.value["data"].clone());
        } else {
            printer.event(&event.value)?;
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
    let model = if scripted { "scripted model" } else { "model" };
    anstream::println!("{}; {count} events", usage(&complete["usage"], model));

    head("History in Postgres: GET /tasks?limit=3");
    for row in client.history(&[("limit", "3".to_owned())]).await?.executions {
        let row: Value = serde_json::from_str(row.get()).map_err(|e| DemoError::Sentence(e.to_string()))?;
        let text = |name: &str| one_line(row[name].as_str().unwrap_or("–"));
        let mark = if row["execution_id"] == json!(id) { "→" } else { " " };
        anstream::println!(
            "{mark} {}  {}  {}  {} ms  {} events",
            text("created_at"),
            text("execution_id"),
            status(&text("status"), row["reason"].as_str()),
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
