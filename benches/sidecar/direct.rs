//! The other side: `opencode serve` alone, configured as the sidecar configures it, with its provider's base URL
//! straight at the model.

use crate::World;
use opencode_sidecar::model::task::{ModelChoice, Provider};
use opencode_sidecar::opencode::client::{Client, Prompt};
use opencode_sidecar::opencode::launch::{Launch, Ports, Server, launch};
use opencode_sidecar::opencode::profile::{Directories, Endpoints, Profile, config, environment};
use opencode_sidecar::scripted::Script;
use secrecy::SecretString;
use std::path::Path;
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;

/// How one prompt went.
pub(crate) struct Straight {
    /// From the prompt to the end of the run.
    pub(crate) total: Duration,
    /// From the prompt to the agent's first word or call.
    pub(crate) first: Duration,
}

pub(crate) struct Direct {
    server: Server,
    client: Client,
}

impl Direct {
    /// Starts and primes it, in directories below `directory`.
    pub(crate) async fn start(world: &World, directory: &Path) -> Self {
        let workspace = directory.join("workspace");
        std::fs::create_dir(&workspace).unwrap();
        let workspace = workspace.canonicalize().unwrap();
        let directories = Directories::new(directory.join("session"));
        directories.create(Path::new(env!("CARGO_BIN_EXE_opencode-sidecar"))).unwrap();
        let model = ModelChoice {
            provider: Provider::Custom,
            model: "scripted".to_owned(),
            version: None,
            endpoint: world.model.base_url(),
            temperature: None,
            max_tokens: None,
            enabled_tools: None,
        };
        let patience = Duration::from_secs(60);
        let endpoints = Endpoints {
            model_url: &world.model.base_url(),
            token: "none",
            shell: Path::new("/bin/bash"),
            header_timeout: patience,
            idle_timeout: patience,
        };
        let configuration = config(&Profile { model }, &endpoints);
        let env = environment(&directories, &configuration, "none", "", "", |name| std::env::var_os(name));
        let to_launch = Launch {
            command: world.opencode.clone(),
            directories,
            workdir: workspace.clone(),
            env,
            user: None,
            confinement: None,
            limits: None,
            refused: None,
            deadline: patience,
            stop: CancellationToken::new(),
        };
        let server = launch(&world.sandbox, &world.tasks, &Ports::new(21_000..=21_020, 1), &to_launch).await.unwrap();
        let client =
            Client::new(server.port.number(), SecretString::from("none"), &workspace.to_string_lossy()).unwrap();
        let direct = Self { server, client };
        direct.run(&Script::new().text("ok").to_prompt("Warm up.")).await;
        direct
    }

    /// Runs a prompt in a conversation of its own, which is made before the clock starts.
    pub(crate) async fn run(&self, prompt: &str) -> Straight {
        let session = self.conversation().await;
        self.run_in(&session, prompt).await
    }

    pub(crate) async fn conversation(&self) -> String {
        self.client.create_session("bench").await.unwrap()
    }

    /// Runs a prompt in a conversation that there is.
    pub(crate) async fn run_in(&self, session: &str, prompt: &str) -> Straight {
        let mut events = self.client.events().await.unwrap();
        let started = Instant::now();
        self.client.prompt(session, &Prompt { text: prompt, ..Prompt::default() }).await.unwrap();
        let mut first = None;
        loop {
            let event = events.next().await.unwrap().expect("the event stream goes on");
            if event.kind == "message.part.delta" || event.properties["part"]["type"] == "tool" {
                first.get_or_insert_with(|| started.elapsed());
            }
            if event.kind == "session.idle" && event.session_id() == Some(session) {
                let total = started.elapsed();
                return Straight { total, first: first.unwrap_or(total) };
            }
            assert_ne!(event.kind, "session.error", "{}", event.properties);
        }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.server.process.pid()
    }

    pub(crate) async fn stop(self) {
        self.server.process.kill(Duration::from_secs(10)).await.unwrap();
    }
}
