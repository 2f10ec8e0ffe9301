//! The command line: what the binary can be asked for.
//!
//! Those that are the sidecar (`serve`, `demo`, `migrate`, `healthcheck`) are a few lines over `app` and `demo`, and stand
//! here; `doctor` prints what the module of that name finds. Those that talk to a running one are in the modules below, over `client` and `console`: they read none of the
//! sidecar's configuration.
//!
//! - `connect`: which sidecar; `exit`: exit codes; `tell`: remarks; `values`: how arguments are written.
//! - `exec`, `attach` (with `cancel`), `history`, `logs`: the subcommands.
//! - `watch`: following a run to its end; `ask`: the question that Ctrl-C asks.

mod ask;
mod attach;
mod connect;
mod doctor;
mod exec;
mod exit;
mod history;
mod logs;
mod tell;
mod values;
mod watch;

use crate::app::{App, Database, StartError, StateDir, bind};
use crate::config::{Config, reference};
use crate::host::{executable, fail, stop_signal};
use crate::sandbox::Sandbox;
use crate::tasks::Tasks;
use crate::{demo, telemetry};
use clap::{Parser, Subcommand};
use connect::VARIABLES;
use exit::{Exit, OF_CALLS, OF_RUNS, Trouble};
use std::process::ExitCode;
use std::time::Duration;
use watch::CTRL_C;

/// Runs coding tasks in real OpenCode processes, streams what happens, and keeps the history in Postgres.
#[derive(Debug, Parser)]
#[command(version, arg_required_else_help = true)]
struct Cli {
    #[command(flatten)]
    color: colorchoice_clap::Color,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve the API until SIGTERM or SIGINT. Configured by the environment.
    #[command(after_help = environment())]
    Serve,
    /// Run one real task in a fresh workspace and show all of it.
    ///
    /// With OPENCODE_API_KEY, OPENCODE_PROVIDER and OPENCODE_MODEL on the real provider; without them on a scripted
    /// model that ships with the sidecar. OpenCode, its tools and the files are real in both cases.
    Demo {
        /// What the agent is to do; only with a real provider, since the scripted model follows its script.
        #[arg(long)]
        prompt: Option<String>,
    },
    /// Bring the database's schema up to date, and end.
    ///
    /// DATABASE_URL and DATABASE_SCHEMA say which; without a URL it is the embedded one in STATE_DIR. `serve` does the
    /// same at its start.
    Migrate,
    /// Ask a running sidecar whether it is alive, or ready; for containers without curl.
    ///
    /// Ends with 0 if so, else with 1.
    Healthcheck {
        /// Ask `/ready` (could it take a task?) instead of `/health` (is it alive?).
        #[arg(long)]
        ready: bool,
        /// Where it listens.
        #[arg(long, env = "PORT", default_value_t = 3003)]
        port: u16,
    },
    /// Say what this host offers, and what a session would be protected by here. Changes nothing.
    ///
    /// It reads the same environment as `serve`, and may be asked beside a sidecar that runs.
    #[command(after_help = doctor::EXIT_CODES)]
    Doctor {
        /// Print JSON, for scripts.
        #[arg(long)]
        json: bool,
    },
    /// Submit a task to a running sidecar, and follow it to its end.
    #[command(after_help = help(exec::EXAMPLES, &[CTRL_C, OF_RUNS]))]
    Exec(Box<exec::Exec>),
    /// Follow an execution that exists: from its start, then live. One that has ended is shown all the same.
    #[command(after_help = help(attach::ATTACH_EXAMPLES, &[CTRL_C, OF_RUNS]))]
    Attach(attach::Attach),
    /// List executions, newest first.
    #[command(after_help = help(history::EXAMPLES, &[OF_CALLS]))]
    History(history::History),
    /// Cancel an execution, and print how it ended. One that has ended stays as it is.
    #[command(after_help = help(attach::CANCEL_EXAMPLES, &[OF_CALLS]))]
    Cancel(attach::Cancel),
    /// Print what an execution's shell commands wrote, or list its events.
    #[command(after_help = help(logs::EXAMPLES, &[OF_CALLS]))]
    Logs(logs::Logs),
}

/// What stands at the end of a help.
fn help(examples: &str, more: &[&str]) -> String {
    [&[examples], more, &[VARIABLES]].concat().join("\n\n")
}

fn environment() -> String {
    let mut text = String::from("Environment:\n");
    for variable in reference() {
        let default = match variable.default {
            "" => String::new(),
            default => format!(" [{default}]"),
        };
        text.push_str(&format!("  {}{default}\n      {}\n", variable.name, variable.meaning));
    }
    text
}

/// Runs what the command line asks for.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Nobody to tell where even this cannot be printed.
            let _ = error.print();
            return if error.use_stderr() { ExitCode::from(2) } else { ExitCode::SUCCESS };
        }
    };
    cli.color.write_global();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail("the runtime did not start", &error),
    };
    // The TLS of the model's and the database's connections: one implementation for all of them.
    let _ = rustls::crypto::ring::default_provider().install_default();
    runtime.block_on(async {
        match cli.command {
            Command::Serve => serve().await,
            Command::Demo { prompt } => demo::run(prompt).await,
            Command::Migrate => migrate().await,
            Command::Healthcheck { ready, port } => healthcheck(ready, port).await,
            Command::Doctor { json } => doctor::run(json).await,
            Command::Exec(exec) => ended(exec.run().await),
            Command::Attach(attach) => ended(attach.run().await),
            Command::History(history) => ended(history.run().await),
            Command::Cancel(cancel) => ended(cancel.run().await),
            Command::Logs(logs) => ended(logs.run().await),
        }
    })
}

fn ended(outcome: Result<Exit, Trouble>) -> ExitCode {
    outcome.map_or_else(Trouble::report, ExitCode::from)
}

fn configuration() -> Result<Config, ExitCode> {
    let config = Config::from_env().map_err(|errors| {
        eprintln!("opencode-sidecar: {errors}");
        ExitCode::from(2)
    })?;
    telemetry::init_log(&config.log_level, config.log_format).map_err(|error| fail("the log", &error))?;
    Ok(config)
}

async fn serve() -> ExitCode {
    let config = match configuration() {
        Ok(config) => config,
        Err(code) => return code,
    };
    let executable = match executable() {
        Ok(executable) => executable,
        Err(error) => return fail("our own executable cannot be found", &error),
    };
    // What runs under our uid may otherwise read our environment and memory.
    if let Err(error) = nix::sys::prctl::set_dumpable(false) {
        tracing::warn!(%error, "this process stays readable for others of its user");
    }
    let stop = match stop_signal() {
        Ok(stop) => stop,
        Err(error) => return fail("signals cannot be awaited", &error),
    };
    let listener = match bind(&config).await {
        Ok(listener) => listener,
        Err(error) => {
            return fail(&format!("{}:{} (HOST, PORT) cannot be listened on", config.host, config.port), &error);
        }
    };
    let mut stop = Box::pin(stop);
    let app = tokio::select! {
        app = App::build(config, executable) => app,
        () = &mut stop => return ExitCode::SUCCESS,
    };
    match app {
        Ok(app) => match app.run(listener, stop).await {
            Ok(()) => ExitCode::SUCCESS,
            Err(abandoned) => fail("not everything could be ended in time", &abandoned),
        },
        Err(error) => fail("the sidecar did not start", &error),
    }
}

async fn migrate() -> ExitCode {
    let config = match configuration() {
        Ok(config) => config,
        Err(code) => return code,
    };
    let migrated = async {
        let tasks = Tasks::new();
        let executable = executable().map_err(StartError::Sandbox)?;
        let sandbox = Sandbox::new(executable, tasks.clone()).map_err(StartError::Sandbox)?;
        // The embedded server's data is this instance's alone.
        let _state = match &config.database_url {
            Some(_) => None,
            None => Some(StateDir::open(&config.state_dir)?),
        };
        Database::open(&config, &sandbox, &tasks, true).await?.close().await;
        Ok::<_, StartError>(())
    };
    match migrated.await {
        Ok(()) => {
            println!("The schema {} is up to date.", config.database_schema);
            ExitCode::SUCCESS
        }
        Err(error) => fail("the schema could not be brought up to date", &error),
    }
}

async fn healthcheck(ready: bool, port: u16) -> ExitCode {
    let url = format!("http://127.0.0.1:{port}/{}", if ready { "ready" } else { "health" });
    let client = reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(5)).build();
    let answer = match client {
        Ok(client) => client.get(&url).send().await,
        Err(error) => return fail("no HTTP client", &error),
    };
    match answer {
        Ok(answer) if answer.status().is_success() => ExitCode::SUCCESS,
        Ok(answer) => {
            let status = answer.status();
            let body = answer.text().await.unwrap_or_default();
            eprintln!("opencode-sidecar: {url} answers {status}: {}", body.chars().take(2000).collect::<String>());
            ExitCode::FAILURE
        }
        Err(error) => fail(&format!("{url} does not answer"), &error),
    }
}
