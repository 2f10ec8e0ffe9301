//! The embedded Postgres: a private cluster beneath `STATE_DIR`, for demo, development and tests, where no
//! `DATABASE_URL` is given.
//!
//! - `server` finds an installed Postgres; `place` keeps the directories, the password and who may reach them.
//! - It listens on a Unix socket only, and asks for a random password even there.
//! - It runs in a jail, which ends it with the sidecar, even one that is killed. The next start takes the same data up.
//! - Started as root it runs as another user, since Postgres refuses root; the data is that user's then.
//!
//! Layout: `<state_dir>/postgres/` with `lock` (held while a sidecar uses it), `password` (0600), `data/`, and `run/`
//! for the socket. Where that path is too long for a socket (107 bytes), the socket is in a directory of its own
//! beneath the system's directory for temporary files.

mod place;
mod server;

pub use server::Search;

use crate::sandbox::{Process, ProcessHandle, RunError, Sandbox, Signal, Spec, StartError, StillAlive};
use crate::tasks::Tasks;
use place::Place;
use secrecy::SecretString;
use server::Server;
use sqlx::postgres::PgConnectOptions;
use sqlx::{ConnectOptions, Connection, PgConnection};
use std::collections::VecDeque;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::task::JoinHandle;

/// How long a fast shutdown may take before the server is killed.
const STOP_GRACE: Duration = Duration::from_secs(10);
/// How long killing it may take.
const KILL_LIMIT: Duration = Duration::from_secs(5);
/// How long `initdb` may take.
const INITDB_LIMIT: Duration = Duration::from_secs(120);
/// How long the server may take to accept connections; after a crash it reads its log first.
const READY_LIMIT: Duration = Duration::from_secs(120);
/// How many of the server's last lines an error shows.
const KEPT_LINES: usize = 20;
/// The owner of the cluster.
const ROLE: &str = "opencode_sidecar";

/// A running embedded server. Dropping it ends the server too, without waiting for that.
#[derive(Debug)]
pub struct Embedded {
    place: Place,
    version: String,
    url: SecretString,
    process: Process,
}

/// Why the embedded server does not run.
#[derive(Debug, thiserror::Error)]
pub enum EmbeddedError {
    #[error("no Postgres server found (postgres and initdb, version 14 to 18); looked in {looked}")]
    NoServer { looked: String },
    #[error("the cluster in {data} was made by Postgres {cluster}, but the server found is {found}", data = data.display())]
    OtherVersion { data: PathBuf, cluster: String, found: String },
    #[error("cannot run {program}, as user {user}", program = program.display())]
    Unusable {
        program: PathBuf,
        user: String,
        #[source]
        source: RunError,
    },
    #[error("user id {0} has no entry in the passwd database, which Postgres needs: add one, or set DATABASE_URL")]
    NoPasswdEntry(u32),
    #[error("Postgres refuses to run as root, and there is neither a user postgres nor a user nobody to run it as")]
    NoUser,
    #[error("user {user}, whom Postgres runs as, cannot pass through {directory} (mode {mode:04o})", directory = directory.display())]
    Blocked { user: String, directory: PathBuf, mode: u32 },
    #[error("{path} belongs to user id {found}, but Postgres runs as user id {expected} here", path = path.display())]
    OtherOwner { path: PathBuf, found: u32, expected: u32 },
    #[error("another sidecar, or its Postgres, still uses {}", .0.display())]
    InUse(PathBuf),
    #[error("the password of the cluster is missing or damaged: {}", .0.display())]
    Password(PathBuf),
    #[error("no directory for the socket: {} is too long", .0.display())]
    SocketPath(PathBuf),
    #[error("cannot {what} {path}", path = path.display())]
    Io {
        what: &'static str,
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("initdb failed ({exit}): {log}")]
    Init { exit: String, log: String },
    #[error("cannot start Postgres")]
    Start(#[from] StartError),
    #[error("Postgres ended while starting ({exit}); its last lines:\n{log}")]
    Exited { exit: String, log: String },
    #[error("Postgres accepted no connection for {0:?}; its last lines:\n{1}")]
    NotReady(Duration, String),
    #[error("the embedded Postgres cannot be connected to")]
    Connect(#[source] Box<sqlx::Error>),
    #[error("Postgres did not end")]
    StillAlive(#[from] StillAlive),
}

impl Embedded {
    /// Takes the cluster beneath `state_dir` up, or makes it first, and waits until it accepts connections. The server
    /// is looked for as [`Search::from_env`] says.
    ///
    /// # Errors
    /// [`EmbeddedError`], which says what to do where somebody has to. Nothing runs then.
    pub async fn start(sandbox: &Sandbox, tasks: &Tasks, state_dir: &Path) -> Result<Self, EmbeddedError> {
        Self::start_with(sandbox, tasks, state_dir, &Search::from_env()).await
    }

    /// The same with a server that is looked for elsewhere.
    ///
    /// # Errors
    /// As [`Embedded::start`].
    pub async fn start_with(
        sandbox: &Sandbox,
        tasks: &Tasks,
        state_dir: &Path,
        search: &Search,
    ) -> Result<Self, EmbeddedError> {
        let mut place = Place::open(state_dir).await?;
        let server = Server::find(sandbox, search, &place).await?;
        if !place.is_made() {
            make(sandbox, &server, &place).await?;
        }
        place.wait_until_unused().await?;
        let password = place.password()?;
        let socket_dir = place.make_socket_dir()?;
        let url = url(&socket_dir, &password);

        let mut process = sandbox.start(spec(&server, &place, &socket_dir)).await?;
        let log = Log::default();
        let drains = [
            process.take_stdout().map(|stream| log.drain(tasks, stream)),
            process.take_stderr().map(|stream| log.drain(tasks, stream)),
        ];
        let connected = ready(&url, process.handle(), &log, drains).await;
        if let Err(error) = connected {
            process.kill(KILL_LIMIT).await?;
            place.remove_socket_dir();
            return Err(error);
        }
        tracing::info!(version = server.version, data = %place.data().display(), "the embedded Postgres is ready");
        Ok(Self { place, version: server.version, url: SecretString::from(url), process })
    }

    /// The directory of the server that a start would try first. Starts nothing, so whether it is of a version that
    /// fits is not known.
    ///
    /// # Errors
    /// None is installed: where was looked for it.
    pub fn installed() -> Result<PathBuf, String> {
        let search = Search::from_env();
        search.candidates().into_iter().next().ok_or_else(|| search.looked())
    }

    /// Where it is, with its password: for [`super::DatabaseOptions`].
    pub fn url(&self) -> SecretString {
        self.url.clone()
    }

    /// The server's version, such as `15.8`.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// The server's process.
    pub fn process(&self) -> ProcessHandle {
        self.process.handle()
    }

    /// Ends the server: its clients are cut off, its data is written; after 10 s it is killed. Returns with the proof
    /// that nothing of it is left.
    ///
    /// # Errors
    /// Something of it cannot be killed.
    pub async fn stop(self) -> Result<(), EmbeddedError> {
        self.process.signal(Signal::Int);
        if tokio::time::timeout(STOP_GRACE, self.process.gone()).await.is_err() {
            tracing::warn!("the embedded Postgres does not shut down: killing it");
            self.process.kill(KILL_LIMIT).await?;
        }
        self.place.remove_socket_dir();
        Ok(())
    }
}

/// Makes the cluster in a directory beside and moves it to its place when it is whole.
async fn make(sandbox: &Sandbox, server: &Server, place: &Place) -> Result<(), EmbeddedError> {
    let draft = place.draft()?;
    let mut spec = place.spec("initdb", &server.bin.join("initdb"));
    spec.args = ["--auth=scram-sha-256", "--no-instructions", "--locale=C", "--encoding=UTF8", "--username", ROLE]
        .iter()
        .map(OsString::from)
        .collect();
    spec.args.extend(["--pgdata".into(), draft.data.clone().into_os_string()]);
    spec.args.extend(["--pwfile".into(), draft.password_file.clone().into_os_string()]);
    let program = spec.program.clone();
    let output = sandbox.run(spec, INITDB_LIMIT).await.map_err(|source| place.unusable(program, source))?;
    if !output.exit.success() {
        let log = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        return Err(EmbeddedError::Init { exit: output.exit.to_string(), log });
    }
    draft.keep(place)
}

/// The server's command line. Nothing in it is secret. It asks for little memory, and gives up no durability.
fn spec(server: &Server, place: &Place, socket_dir: &Path) -> Spec {
    let mut spec = place.spec("postgres", &server.bin.join("postgres"));
    spec.stop_signal = Signal::Int;
    spec.stop_grace = STOP_GRACE;
    spec.args = vec!["-D".into(), place.data().into()];
    let mut set = |name: &str, value: OsString| {
        let mut setting = OsString::from(format!("{name}="));
        setting.push(value);
        spec.args.extend(["-c".into(), setting]);
    };
    for (name, value) in [
        ("listen_addresses", ""),
        ("port", "5432"),
        ("unix_socket_permissions", "0700"),
        ("password_encryption", "scram-sha-256"),
        ("fsync", "on"),
        ("full_page_writes", "on"),
        ("synchronous_commit", "on"),
        ("shared_buffers", "16MB"),
        ("max_connections", "100"),
        ("max_wal_size", "256MB"),
        ("min_wal_size", "32MB"),
        // Nothing replicates from here.
        ("wal_level", "minimal"),
        ("max_wal_senders", "0"),
        ("max_logical_replication_workers", "0"),
        ("max_parallel_workers", "0"),
        ("max_parallel_workers_per_gather", "0"),
        ("autovacuum_max_workers", "1"),
        ("jit", "off"),
        ("logging_collector", "off"),
        ("log_destination", "stderr"),
        ("log_timezone", "UTC"),
        ("timezone", "UTC"),
    ] {
        set(name, value.into());
    }
    if server.major >= 18 {
        // No I/O worker processes.
        set("io_method", "sync".into());
    }
    // A list, in which a name may be quoted.
    set("unix_socket_directories", super::connect::quote(&socket_dir.to_string_lossy()).into());
    spec
}

fn url(socket_dir: &Path, password: &str) -> String {
    let mut url = format!("postgres://{ROLE}:{password}@localhost:5432/postgres?");
    let query: String = url::form_urlencoded::Serializer::new(String::new())
        .append_pair("host", &socket_dir.to_string_lossy())
        .append_pair("sslmode", "disable")
        .finish();
    url.push_str(&query);
    url
}

/// Tries to connect until it works, the server ends, or the time is over.
async fn ready(
    url: &str,
    process: ProcessHandle,
    log: &Log,
    drains: [Option<JoinHandle<()>>; 2],
) -> Result<(), EmbeddedError> {
    let options = PgConnectOptions::from_str(url)
        .map_err(|e| EmbeddedError::Connect(Box::new(e)))?
        .log_statements(tracing::log::LevelFilter::Off);
    let connected = async {
        let mut pause = Duration::from_millis(5);
        loop {
            match PgConnection::connect_with(&options).await {
                Ok(connection) => {
                    // It answered; how the goodbye goes does not matter.
                    let _ = connection.close().await;
                    return Ok(());
                }
                // Not listening yet, or reading its log after a crash (57P03).
                Err(sqlx::Error::Io(_)) => {}
                Err(sqlx::Error::Database(error)) if error.code().as_deref() == Some("57P03") => {}
                Err(error) => return Err(EmbeddedError::Connect(Box::new(error))),
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(100));
        }
    };
    tokio::select! {
        connected = tokio::time::timeout(READY_LIMIT, connected) => {
            connected.unwrap_or_else(|_| Err(EmbeddedError::NotReady(READY_LIMIT, log.text())))
        }
        exit = process.exited() => {
            process.gone().await;
            for drain in drains.into_iter().flatten() {
                // Its end is the end of the stream, which nobody holds open any more.
                let _ = drain.await;
            }
            Err(EmbeddedError::Exited { exit: exit.to_string(), log: log.text() })
        }
    }
}

/// The server's last lines.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<VecDeque<String>>>);

impl Log {
    fn drain(&self, tasks: &Tasks, stream: impl AsyncRead + Unpin + Send + 'static) -> JoinHandle<()> {
        let kept = self.clone();
        tasks.spawn("postgres log", async move {
            let mut reader = BufReader::new(stream);
            let mut line = Vec::new();
            while matches!(reader.read_until(b'\n', &mut line).await, Ok(read) if read > 0) {
                let text = String::from_utf8_lossy(&line).trim_end().to_owned();
                tracing::debug!(target: "postgres", "{text}");
                let mut lines = kept.0.lock().unwrap_or_else(PoisonError::into_inner);
                if lines.len() == KEPT_LINES {
                    lines.pop_front();
                }
                lines.push_back(text);
                drop(lines);
                line.clear();
            }
        })
    }

    fn text(&self) -> String {
        let lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        lines.iter().map(String::as_str).collect::<Vec<_>>().join("\n")
    }
}
