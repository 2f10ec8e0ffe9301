//! Recording: one run of the real OpenCode, whose provider is the scripted model.

use super::scenarios::{Act, Scenario};
use super::{Recorded, WORKSPACE};
use crate::support::postgres::sandbox;
use opencode_sidecar::model::task::{ModelChoice, Provider};
use opencode_sidecar::opencode::client::{Client, EventStream, Prompt};
use opencode_sidecar::opencode::launch::{Launch, Ports, find_command, launch};
use opencode_sidecar::opencode::profile::{Directories, Endpoints, Profile, config, environment};
use opencode_sidecar::opencode::wire::RawEvent;
use opencode_sidecar::scripted::ScriptedModel;
use opencode_sidecar::tasks::Tasks;
use secrecy::SecretString;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// What stands where secrets stand: to be found in no recording.
pub(super) const KEY: &str = "the-key-of-the-recording";
pub(super) const PASSWORD: &str = "the-password-of-the-recording";

/// A run that says nothing for so long after it is idle, or has failed, has said everything.
const QUIET: Duration = Duration::from_secs(2);
/// The longest that a run may take.
const RUN: Duration = Duration::from_secs(120);

/// Everything but the workspace: what a session has of its own.
const SESSION: &str = "/tmp/opencode-sidecar-golden/session";

fn merge(config: &mut Value, changes: &Value) {
    for (name, change) in changes.as_object().unwrap() {
        match change.as_object() {
            Some(members) => members.iter().for_each(|(member, value)| config[name][member] = value.clone()),
            None => config[name] = change.clone(),
        }
    }
}

fn fresh(directory: &str) -> PathBuf {
    let _ = std::fs::remove_dir_all(directory);
    std::fs::create_dir_all(directory).unwrap();
    Path::new(directory).canonicalize().unwrap()
}

/// Records the whole stream of one run.
pub(super) async fn record(scenario: &Scenario) -> Vec<Recorded> {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let tasks = Tasks::new();
    let sandbox = sandbox(&tasks);
    let model = ScriptedModel::start(&tasks, Some(scenario.script.clone())).await.unwrap();
    let workspace = fresh(WORKSPACE);
    let directories = Directories::new(fresh(SESSION));
    directories.create(Path::new(env!("CARGO_BIN_EXE_opencode-sidecar"))).unwrap();
    let choice = ModelChoice {
        provider: Provider::Custom,
        model: "scripted".to_owned(),
        version: None,
        endpoint: model.base_url(),
        temperature: None,
        max_tokens: None,
        enabled_tools: None,
    };
    let patience = Duration::from_secs(30);
    let mut configuration = config(
        &Profile { model: choice },
        &Endpoints {
            model_url: &model.base_url(),
            token: KEY,
            // Shell output has a way of its own, past the translator.
            shell: Path::new("/bin/bash"),
            header_timeout: patience,
            idle_timeout: patience,
        },
    );
    merge(&mut configuration, &scenario.config);
    let mut env = environment(&directories, &configuration, PASSWORD, "", "", |name| std::env::var_os(name));
    // For unknown clients there is no such tool.
    env.push(("OPENCODE_ENABLE_QUESTION_TOOL".into(), "1".into()));
    let configured = std::env::var_os("OPENCODE_COMMAND").map(PathBuf::from);
    let near = Path::new(env!("CARGO_MANIFEST_DIR"));
    let to_launch = Launch {
        command: find_command(configured.as_deref(), std::env::var_os("PATH"), near).unwrap(),
        directories,
        workdir: workspace.clone(),
        env,
        user: None,
        confinement: None,
        limits: None,
        refused: None,
        deadline: Duration::from_secs(60),
        stop: CancellationToken::new(),
    };
    let server = launch(&sandbox, &tasks, &Ports::new(23_700..=23_720, 1), &to_launch).await.unwrap();
    let client = Client::new(server.port.number(), SecretString::from(PASSWORD), &workspace.to_string_lossy()).unwrap();
    let recorded = tokio::time::timeout(RUN, follow(&client, scenario)).await;
    server.process.kill(Duration::from_secs(10)).await.unwrap();
    drop(model);
    tasks.stop(Duration::from_secs(10)).await.unwrap();
    for directory in [WORKSPACE, SESSION] {
        std::fs::remove_dir_all(directory).unwrap();
    }
    recorded.unwrap()
}

async fn follow(client: &Client, scenario: &Scenario) -> Vec<Recorded> {
    let act = scenario.act;
    let mut stream = client.events().await.unwrap();
    let session = client.create_session("golden").await.unwrap();
    let text = "Play the script.";
    let text = scenario.prompt.as_ref().map_or_else(|| text.to_owned(), |script| script.to_prompt(text));
    let prompt = Prompt { text: &text, agent: scenario.agent, system: None };
    client.prompt(&session, &prompt).await.unwrap();
    let mut recorded = Vec::new();
    let mut over = false;
    let mut aborted = false;
    while let Some(event) = next(&mut stream, over).await {
        let id = event.properties["id"].as_str().unwrap_or_default();
        match (event.kind.as_str(), act) {
            ("permission.asked", Act::RefusePermissions) => client.refuse_permission(id).await.unwrap(),
            ("question.asked", Act::RejectQuestions) => client.reject_question(id).await.unwrap(),
            ("message.part.updated" | "message.part.delta", Act::Abort) if !aborted => {
                let output = event.properties["part"]["state"]["metadata"]["output"].as_str();
                if event.kind == "message.part.delta" || output.is_some_and(|output| output.contains("begun")) {
                    aborted = true;
                    client.abort(&session).await.unwrap();
                }
            }
            _ => {}
        }
        // With an unknown agent it is never busy and never idle.
        over |= matches!(event.kind.as_str(), "session.idle" | "session.error");
        let at = chrono::Utc::now().timestamp_millis();
        recorded.push(Recorded { at, kind: event.kind, properties: event.properties });
    }
    recorded
}

/// The next event that is no heartbeat; `None` where nothing follows for some time in a run that may be `over`.
async fn next(stream: &mut EventStream, over: bool) -> Option<RawEvent> {
    let next = async {
        loop {
            let event = stream.next().await.unwrap()?;
            if event.kind != "server.heartbeat" {
                return Some(event);
            }
        }
    };
    if over { tokio::time::timeout(QUIET, next).await.ok().flatten() } else { next.await }
}
