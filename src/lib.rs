//! Runs coding tasks in real OpenCode processes, streams what happens, and keeps the history in Postgres.
//!
//! # The map
//!
//! From the ground up. A module uses only what stands above it in this table; which of them exactly, is written in
//! `tests/it/tidy.rs`, which fails for any other import.
//!
//! | layer | module | what it does |
//! |---|---|---|
//! | pure | [`model`] | ids, tasks, events, the state machine of an execution |
//! | | [`sse`] | reads server-sent events |
//! | base | [`failpoint`] | places where a test may end this process; nothing in a release |
//! | | [`tasks`] | spawns, tracks and ends every concurrent piece of work |
//! | | [`secrets`] | makes random tokens, seals and opens keys, checks signed tokens, takes secrets out of texts |
//! | | [`telemetry`] | log and metrics |
//! | | [`config`] | the environment, read once |
//! | owners of I/O | [`sandbox`] | processes: the jail, their confinement, the proof that nothing is left, the shell tap |
//! | | [`workspace`] | the one door to paths that come from outside; open to its group |
//! | | [`journal`] | what has to survive this process, on local disk, before anyone has it |
//! | | [`store`] | Postgres: migrations, queries, the embedded server |
//! | services | [`events`] | the log of each execution: one way in, one way out |
//! | | [`opencode`] | starts `opencode serve`, talks to it, understands what it says |
//! | | [`broker`] | stands between a session and its model; holds the key, counts the calls; the proxy to other hosts |
//! | orchestration | [`sessions`] | one OpenCode process each, and one run in it after another |
//! | | [`executions`] | takes in, queues, runs, cancels, ends, forgets |
//! | edges | [`api`] | HTTP: requests into calls, results into answers, logs into streams |
//! | | [`client`] | the same API from its other side; knows nothing of the rest |
//! | | [`notify`] | tells the backend how its sessions stand |
//! | | [`console`] | shows a run, a log, a history at a terminal |
//! | | [`scripted`] | the scripted model for demo, tests and benchmarks; it knows nothing of the rest |
//! | wiring | [`protection`] | what sessions are protected by on this host |
//! | | [`host`] | this process: its file, the signals that end it, errors at a terminal |
//! | | [`app`] | builds every part once, and takes it down again |
//! | | [`doctor`] | what this host offers, and what a session would get; changes nothing |
//! | | [`demo`] | one real task for a person to watch: a client of an [`app`] of its own |
//! | | [`cli`] | the subcommands |
//!
//! # What holds
//!
//! Each of these says what is *not* there. A lint (`Cargo.toml`, `clippy.toml`) or `tests/it/tidy.rs` holds the ones
//! marked with ∎.
//!
//! - **Imports go downward.** No module knows who uses it. ∎
//! - **[`model`] is pure.** No runtime, no I/O, no clock: the time is an argument.
//! - **A status is decided in one place**, [`model::execution::apply`]. [`executions`] carries out its effects;
//!   [`store`] keeps what it is handed and names the status that it replaces. Nothing else makes one up, and a lost
//!   process is never a success.
//! - **A stream is a cursor over the log.** REST pages, SSE and WebSocket read it by `seq` through
//!   [`events::Events::read`]. No event is in a channel to a reader, so there is no buffer per reader and nothing to
//!   drop. What tells readers that there is more, carries none.
//! - **What a reader saw is durable.** There is no other way into the log than [`events::Writer`], and it shows an
//!   event only after the commit point.
//! - **Only [`tasks`] spawns.** There is no `tokio::spawn`, no thread and no `JoinSet` anywhere else, so nothing runs
//!   that a shutdown does not wait for. ∎
//! - **Only [`sandbox`] starts processes and holds `unsafe`.** No other module has a `Command` to run. ∎
//! - **Only [`store`] knows SQL.** No `sqlx` type leaves it. ∎
//! - **Only [`api`] decides what a caller is answered with.** Errors below it know no status codes; [`broker`],
//!   [`notify`], [`scripted`] and the client in [`opencode`] have those of the calls that they speak themselves. ∎
//! - **A session has no secret that is worth anything elsewhere.** The provider's key is in [`broker`] alone; not in
//!   the environment, the files or the arguments of a process.
//! - **No path from outside is compared as a string.** [`workspace`] resolves it beneath a directory handle.
//! - **No secret is in a `Debug`, a log line or an error.** They are `SecretString`s until the moment of use.
//! - **Only `main` decides the exit code**, apart from the jail and the tap, which end as what they ran. ∎
//!
//! # Where to look first
//!
//! | to see | look at |
//! |---|---|
//! | what a caller may send | [`model::request`], then `executions::admit` and `models`, which check it |
//! | why a submission that is sent again runs once | [`model::idempotency`], then `executions::idempotency` |
//! | how an execution changes its status | [`model::execution`] |
//! | one execution from its turn to its last event | `executions::owner`, and for what OpenCode does meanwhile `sessions::run` |
//! | how an OpenCode event becomes one of ours | [`opencode::translate`] |
//! | why a run ended as it did | [`opencode::outcome`] |
//! | what OpenCode is configured with | [`opencode::profile`] |
//! | how secrets are kept out of the log | `events::redaction`, over `secrets::redact` |
//! | where an event becomes durable | `events::commit`, and on its way to the database `events::ship` |
//! | how shell output gets here | [`sandbox::tap`], then [`sandbox::frames`] and `sessions::shell` |
//! | how a person's shell runs in a session | `sessions::terminal`, and `api::terminal` for what it says to whom |
//! | where a model may be called | [`model::destination`], then [`broker::destination`] and `broker::outward` |
//! | how processes are ended, and how that is known | `sandbox::process`, [`sandbox::jail`] |
//! | whom a session runs as, and how its files are shared | `sessions::identity`, `sessions::private`, [`sandbox::errand`] |
//! | what a session may not do | `sessions::confinement`, then [`sandbox::confine`] |
//! | what a session reaches beside its model | `broker::egress`, then `sessions::egress` for how it is told |
//! | which routes there are | [`api::openapi`], and the handlers in [`api::tasks`] and [`api::stream`] |
//! | the pages for people | `docs/`, and `api::pages`, which serves them; `tests/it/docs` holds them to the code |
//! | how the backend learns of a status | `store::callbacks`, where it is kept, and [`notify`], which tells it |
//! | who may do what | [`api::auth`]; each route names its scope beside its path; `secrets::token` for how tokens are checked |
//! | how a file is read for others | `workspace::files`, then `executions::files` and [`api::files`] |
//! | how it is known what a run changed | `opencode::changes`, then `sessions::run::changes` |
//! | what a resumed execution knows of before | `events::ledger`, then `executions::recovery` and `sessions::run::again` |
//! | which error has which status | [`api::problem`] |
//! | what the command line can do | `src/cli.rs`, then `cli::exec` and `cli::watch` |
//! | how a dropped stream goes on | [`client::follow`] |
//! | what a terminal is protected from | `console::clean` |
//! | which variables there are | [`config`], and [`config::reference`] |
//! | the tables | `migrations/` |
//! | why a project's role sees no other's rows | `migrations/0006_projects.sql`, and `store::role` for what is said of it |
//! | what the sidecar's own secrets are sealed under | `secrets::own`, over `secrets::seal` |
//! | how old executions are removed | `executions::retention`, then `store::retention` |

pub mod api;
pub mod app;
pub mod broker;
pub mod cli;
pub mod client;
pub mod config;
pub mod console;
pub mod demo;
pub mod doctor;
pub mod events;
pub mod executions;
pub mod failpoint;
pub mod host;
pub mod journal;
pub mod model;
pub mod notify;
pub mod opencode;
pub mod protection;
pub mod sandbox;
pub mod scripted;
pub mod secrets;
pub mod sessions;
pub mod sse;
pub mod store;
pub mod tasks;
pub mod telemetry;
pub mod workspace;
