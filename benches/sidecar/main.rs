//! The benchmarks: each measures both sides in one run, and prints a table with the ratio and the target.
//!
//! `cargo bench --bench sidecar [-- NAME …]` runs those whose names contain one of the words: `task`, `health`, `idle`,
//! `stream`, `session`, `spawn`, `kill`, `ship`, `journal`, `broker`, `files`. `BENCH_ROUNDS` sets how often each
//! measurement is repeated. No number is asserted: they are for people, and depend on what else the machine does.
//!
//! The sidecar is the release build of the binary, as a process of its own, with an embedded Postgres. OpenCode is the
//! real one (OPENCODE_COMMAND, `opencode` in PATH, or the package under `sidecars/opencode-server`); its provider is
//! the scripted model, in this process. `ship`, `journal` and `broker` measure parts of the library, also in this
//! process, the first two with a Postgres beside it.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a benchmark that cannot go on ends")]

mod broker;
mod direct;
mod files;
mod health;
mod idle;
mod journal;
mod kill;
mod machine;
mod made;
mod session;
mod ship;
mod sidecar;
mod spawn;
mod stream;
mod table;
mod task;

use machine::Machine;
use opencode_sidecar::sandbox::Sandbox;
use opencode_sidecar::scripted::ScriptedModel;
use opencode_sidecar::tasks::Tasks;
use std::path::PathBuf;
use std::time::Duration;

/// The longest that one benchmark may take.
const LIMIT: Duration = Duration::from_secs(600);

/// What every benchmark works with.
struct World {
    tasks: Tasks,
    sandbox: Sandbox,
    model: ScriptedModel,
    opencode: PathBuf,
    rounds: Option<usize>,
}

impl World {
    async fn new() -> Self {
        let tasks = Tasks::new();
        let sandbox = Sandbox::new(PathBuf::from(env!("CARGO_BIN_EXE_opencode-sidecar")), tasks.clone()).unwrap();
        let model = ScriptedModel::start(&tasks, None).await.unwrap();
        let configured = std::env::var_os("OPENCODE_COMMAND").map(PathBuf::from);
        let near = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
        let opencode =
            opencode_sidecar::opencode::launch::find_command(configured.as_deref(), std::env::var_os("PATH"), &near)
                .unwrap_or_else(|error| panic!("{error}"));
        let rounds = std::env::var("BENCH_ROUNDS").ok().map(|rounds| rounds.parse().expect("BENCH_ROUNDS"));
        Self { tasks, sandbox, model, opencode, rounds }
    }

    fn rounds(&self, default: usize) -> usize {
        self.rounds.unwrap_or(default)
    }
}

fn main() {
    // Cargo adds `--bench`.
    let args: Vec<_> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let _ = rustls::crypto::ring::default_provider().install_default();
    if args.first().is_some_and(|arg| arg == health::BARE) {
        runtime.block_on(health::bare());
        return;
    }
    let chosen = |name: &str| args.is_empty() || args.iter().any(|arg| name.contains(arg.as_str()));
    runtime.block_on(async {
        let world = World::new().await;
        println!("{}", Machine::now());
        let all =
            ["task", "health", "idle", "stream", "session", "spawn", "kill", "ship", "journal", "broker", "files"];
        for name in all.into_iter().filter(|name| chosen(name)) {
            let run = async {
                match name {
                    "task" => task::run(&world).await,
                    "health" => health::run(&world).await,
                    "idle" => idle::run(&world).await,
                    "stream" => stream::run(&world).await,
                    "spawn" => spawn::run(&world).await,
                    "kill" => kill::run(&world).await,
                    "ship" => ship::run(&world).await,
                    "broker" => broker::run(&world).await,
                    "files" => files::run(&world).await,
                    "journal" => journal::run(&world).await,
                    _ => session::run(&world).await,
                }
            };
            println!("\n== {name}");
            if tokio::time::timeout(LIMIT, run).await.is_err() {
                println!("given up after {} s", LIMIT.as_secs());
            }
            println!("load now {}", machine::load());
        }
        drop(world.model);
        world.tasks.stop(Duration::from_secs(20)).await.unwrap();
        world.sandbox.sweep_orphans();
        assert_eq!(world.sandbox.live(), 0, "processes are left");
    });
}
