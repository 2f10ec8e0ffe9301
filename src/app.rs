//! The wiring: every part built once, in order, handed to the next; and taken down in the other order.
//!
//! [`App::build`] does everything that can fail; [`App::run`] serves on a listener until it is told to stop. No logic
//! of the domain is here.

use crate::api::auth::{Auth, AuthSettings, CredentialErrors, Unscoped};
use crate::api::files::FilesApi;
use crate::api::openapi::{Edge, Routes, assemble};
use crate::api::probes::{Checks, Probes, Readiness};
use crate::api::sessions::SessionsApi;
use crate::api::sockets::Sockets;
use crate::api::stream::StreamApi;
use crate::api::tasks::TasksApi;
use crate::broker::{Broker, BrokerConfig, BrokerError, EgressConfig};
use crate::config::{Config, SandboxMode};
use crate::events::Events;
use crate::executions::{Ceilings, Executions};
use crate::journal::Journal;
use crate::model::SessionId;
use crate::model::destination::Target;
use crate::model::task::ModelChoice;
use crate::notify::Notifier;
use crate::opencode::OPENCODE_VERSION;
use crate::opencode::launch::{Ports, find_command};
use crate::opencode::profile::Profile;
use crate::protection::Protections;
use crate::sandbox::{Resources, Sandbox, wait_for_earlier_jails};
use crate::secrets::OwnKeys;
use crate::sessions::{Sessions, Wanted};
use crate::store::{DatabaseOptions, Embedded, EmbeddedError, Store, StoreError};
use crate::tasks::Tasks;
use crate::telemetry::Metrics;
use crate::workspace::{Workspace, WorkspaceError};
use crate::{executions, notify, sessions};
use secrecy::{ExposeSecret, SecretString};
use std::fs::File;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// Connections to the database.
const CONNECTIONS: u32 = 10;
/// How often memory and number of a session's processes are looked at where no control group holds them.
const LIMITS_LOOK: Duration = Duration::from_millis(200);
/// How long what an earlier life has started may take to end; Postgres is given some seconds by its jail.
const JAILS_WAIT: Duration = Duration::from_secs(20);
/// How long the database may refuse the login at the start, or be away for `migrate`.
const DATABASE_WAIT: Duration = Duration::from_secs(60);
/// How long it may take to answer at the start, before the sidecar goes on without it.
const DATABASE_LOOK: Duration = Duration::from_secs(4);
/// The most sessions of callers that are open at once.
const MAX_OPEN: usize = 256;
/// How long the streams and connections may take to end.
const DRAIN: Duration = Duration::from_secs(2);

/// How much of the grace the backend has to be told what the shutdown itself has changed: 2 s of the default 25.
const LAST_CALLBACKS: f64 = 0.08;

/// Why the sidecar did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("the state directory {} (STATE_DIR) cannot be used", .path.display())]
    State {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("another sidecar uses the state directory {} (STATE_DIR)", .0.display())]
    Locked(PathBuf),
    #[error("the file {} does not hold the id of an instance; it is not ours to change", .0.display())]
    Instance(PathBuf),
    #[error("the workspace (WORKSPACE_DIR) cannot be used")]
    Workspace(#[from] WorkspaceError),
    #[error("processes that an earlier sidecar on this state directory (STATE_DIR) had started have not ended yet")]
    Left,
    #[error("processes cannot be supervised here")]
    Sandbox(#[source] std::io::Error),
    #[error("{0}")]
    OpenCode(String),
    #[error("the embedded Postgres did not start (DATABASE_URL names another one)")]
    Embedded(#[from] EmbeddedError),
    #[error("the database (DATABASE_URL) cannot be used")]
    Database(#[from] StoreError),
    #[error("the journal in STATE_DIR cannot be used")]
    Journal(#[source] std::io::Error),
    #[error("the sidecar's own key {} cannot be used; without that file a new one is made, and tasks that wait lose theirs", .path.display())]
    Sealing {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("the model broker did not start")]
    Broker(#[from] BrokerError),
    #[error("the client for the backend (BACKEND_API_URL) cannot be made")]
    Notify(#[from] notify::ClientError),
    #[error("the metrics are not well-formed")]
    Metrics(#[from] prometheus::Error),
    #[error("the credentials cannot be used")]
    Credentials(#[from] CredentialErrors),
    #[error("the routes are not well-formed")]
    Routes(#[from] Unscoped),
}

/// What `run` could not do in the time that it had.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "abandoned at shutdown: {executions} executions, {writes} events not written, {processes} processes, {connections} connections, {tasks} tasks"
)]
pub struct Abandoned {
    pub executions: usize,
    pub writes: usize,
    pub processes: usize,
    pub connections: usize,
    pub tasks: usize,
}

/// The database, and what has to be stopped with it.
#[derive(Debug)]
pub struct Database {
    pub store: Store,
    embedded: Option<Embedded>,
}

impl Database {
    /// Connects, starting the embedded server where there is no `DATABASE_URL`, and migrates. Where it is `needed` it is
    /// waited for; else what is away is left to [`Store::watch`].
    ///
    /// # Errors
    /// Where there is none, it refuses the login, or it stays away and is needed.
    pub async fn open(config: &Config, sandbox: &Sandbox, tasks: &Tasks, needed: bool) -> Result<Self, StartError> {
        let embedded = match &config.database_url {
            Some(_) => None,
            None => Some(Embedded::start(sandbox, tasks, &config.state_dir).await?),
        };
        let url = match (&config.database_url, &embedded) {
            (Some(url), _) => url.clone(),
            (None, Some(embedded)) => embedded.url(),
            (None, None) => SecretString::default(),
        };
        let options = DatabaseOptions { url, schema: config.database_schema.clone(), max_connections: CONNECTIONS };
        let deadline = Instant::now() + DATABASE_WAIT;
        let mut store = Store::connect(&options).await?;
        // The embedded server is this sidecar's alone; and who migrates is nobody's pod.
        if embedded.is_none() && !needed {
            store = store.for_project(&config.project_id);
        }
        // One look alone may have met a machine that stood still.
        let mut looks_left = 1;
        loop {
            let looked = tokio::time::timeout(DATABASE_LOOK, store.ping()).await;
            let tried = match looked.unwrap_or_else(|_| Err(StoreError::timeout(DATABASE_LOOK))) {
                Ok(()) => store.migrate().await,
                Err(error) => Err(error),
            };
            let Err(error) = tried else { break };
            if matches!(error, StoreError::Unavailable(_)) && !needed {
                if looks_left > 0 {
                    looks_left -= 1;
                    continue;
                }
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "the database is not there; the journal bridges it until it is"
                );
                store.migrate_later();
                break;
            }
            if !error.is_transient() || Instant::now() >= deadline {
                return Err(error.into());
            }
            tracing::warn!(error = &error as &dyn std::error::Error, "the database is not there yet; trying again");
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        // Without anybody to take them, callbacks would pile up.
        let store = if config.backend_api_url.is_some() { store.with_callbacks() } else { store };
        Ok(Self { store, embedded })
    }

    /// Closes the connections and stops the embedded server.
    pub async fn close(self) {
        self.store.close().await;
        if let Some(embedded) = self.embedded
            && let Err(error) = embedded.stop().await
        {
            tracing::error!(error = &error as &dyn std::error::Error, "the embedded Postgres did not stop");
        }
    }
}

/// A state directory that is this process's alone, for as long as this lives.
#[derive(Debug)]
pub struct StateDir {
    /// Names this instance in the database.
    pub instance: Uuid,
    _lock: File,
}

/// How long the lock of the state directory may be another's.
const LOCK_PATIENCE: Duration = Duration::from_secs(2);

impl StateDir {
    /// Makes and locks it. Blocks, 2 s at most, where another process has it.
    ///
    /// # Errors
    /// Where it cannot be used, or another process has it.
    pub fn open(path: &Path) -> Result<Self, StartError> {
        use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
        let failed = |source| StartError::State { path: path.to_path_buf(), source };
        // Others may pass through, but not look: the embedded Postgres may run as another user.
        std::fs::DirBuilder::new().recursive(true).mode(0o711).create(path).map_err(failed)?;
        // So with one that was there: a volume may come open to the group that sessions have. Where it is not ours to
        // change, it shows when it is tried whether sessions could pass.
        if nix::unistd::geteuid().is_root() {
            let _ = std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o711));
        }
        let open = |name: &str| {
            File::options().create(true).read(true).write(true).truncate(false).mode(0o600).open(path.join(name))
        };
        let lock = open("lock").map_err(failed)?;
        let (begun, mut told) = (Instant::now(), false);
        loop {
            match lock.try_lock() {
                Ok(()) => break,
                // Of a sidecar that was killed, a child between its fork and its exec may hold it for a moment longer.
                Err(std::fs::TryLockError::WouldBlock) if begun.elapsed() < LOCK_PATIENCE => {
                    if !std::mem::replace(&mut told, true) {
                        tracing::info!(path = %path.display(), "the state directory is locked; waiting a moment for it");
                    }
                    std::thread::sleep(Duration::from_millis(10));
                }
                Err(std::fs::TryLockError::WouldBlock) => return Err(StartError::Locked(path.to_path_buf())),
                Err(std::fs::TryLockError::Error(source)) => return Err(failed(source)),
            }
        }
        let file = path.join("instance");
        let instance = match std::fs::read_to_string(&file) {
            Ok(text) => text.trim().parse().map_err(|_| StartError::Instance(file))?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let instance = Uuid::now_v7();
                // Whole or not at all: a half-written id would be another instance's.
                let new = path.join("instance.new");
                std::fs::write(&new, instance.to_string()).map_err(failed)?;
                std::fs::rename(new, file).map_err(failed)?;
                instance
            }
            Err(error) => return Err(failed(error)),
        };
        Ok(Self { instance, _lock: lock })
    }
}

/// The sidecar, ready to serve.
#[derive(Debug)]
pub struct App {
    config: Config,
    tasks: Tasks,
    sandbox: Sandbox,
    database: Database,
    journal: Arc<Journal>,
    executions: Executions,
    sessions: Sessions,
    notifier: Option<Notifier>,
    router: crate::api::Router,
    streams: CancellationToken,
    /// Released last.
    state: StateDir,
}

impl App {
    /// Builds everything. `executable` is this program's own file: the jail and the shell tap are it.
    ///
    /// # Errors
    /// [`StartError`], with its causes.
    pub async fn build(config: Config, executable: PathBuf) -> Result<Self, StartError> {
        let tasks = Tasks::new();
        let metrics = Metrics::new()?;
        let settings = AuthSettings {
            sources: config.credentials.clone(),
            project: config.project_id.clone(),
            off: config.auth_off,
            slowing: Default::default(),
        };
        let auth = Auth::new(settings, metrics.clone())?;
        auth.watch(&tasks);
        let state = StateDir::open(&config.state_dir)?;
        let roll = config.state_dir.join("jails");
        let mut sandbox =
            Sandbox::new(executable.clone(), tasks.clone()).map_err(StartError::Sandbox)?.with_roll(&roll);
        if config.sandbox != SandboxMode::Off {
            // Before anything else runs: it ends what an earlier life left in its groups.
            let instance = state.instance.to_string();
            let claimed = tasks.spawn_blocking(move || Resources::claim(&instance, LIMITS_LOOK)).await;
            sandbox = sandbox.with_resources(claimed.unwrap_or_else(|_| Resources::watched(LIMITS_LOOK)));
        }
        nothing_left(&tasks, roll).await?;
        let workspace = Workspace::open(&config.workspace_dir)?;
        if let Some(why) = workspace.unshared() {
            tracing::warn!("{why}");
        }
        let here = std::env::current_dir().unwrap_or_default();
        let command = find_command(config.opencode_command.as_deref(), std::env::var_os("PATH"), &here)
            .map_err(StartError::OpenCode)?;
        let protections = Protections::of(&config, &sandbox, &command).await;
        let mut database = Database::open(&config, &sandbox, &tasks, false).await?;
        database.store = database.store.as_owner(state.instance);
        let broker = Broker::start(
            &tasks,
            metrics.clone(),
            BrokerConfig {
                header_timeout: config.model_header_timeout,
                idle_timeout: config.model_idle_timeout,
                max_failures: config.model_max_failures,
                longest_wait: config.stall_timeout,
                egress: egress(&config),
                calls_per_minute: config.model_calls_per_minute,
                destinations: config.model_endpoints(),
                ..BrokerConfig::default()
            },
        )
        .await?;
        let journal = journal(&config, &tasks).await?;
        let started = Events::start(
            Arc::clone(&journal),
            config.journal_max_bytes,
            database.store.clone(),
            config.project_id.clone(),
            metrics.clone(),
            !config.redaction_off,
            &tasks,
        );
        let (events, inherited) = started.await.map_err(StartError::Journal)?;
        let sealing = config.state_dir.join("sealing.key");
        let sealing = OwnKeys::open(&sealing).map_err(|source| StartError::Sealing { path: sealing, source })?;
        let default_model = config.default_model.as_ref().map(|model| {
            let endpoint = model.endpoint.as_str().trim_end_matches('/');
            let choice = ModelChoice::new(model.provider, &model.model, endpoint);
            (choice, model.api_key.clone())
        });
        let warm_for = default_model.clone().map(|(model, api_key)| Wanted {
            id: SessionId::new(),
            profile: Profile { model },
            api_key,
            workdir: workspace.root().to_path_buf(),
            limits: config.limits,
            start_within: config.start_timeout,
            stop: tasks.shutdown_token().clone(),
        });
        let sessions = Sessions::start(
            sessions::Settings {
                command: command.clone(),
                executable,
                directory: config.state_dir.join("sessions"),
                keep: executions::sessions_to_keep(&inherited),
                confined: config.sandbox != SandboxMode::Off,
                refused: protections.refused.clone(),
                users: protections.users.clone(),
                namespace: protections.namespace(),
                workspace: workspace.root().to_path_buf(),
                egress_open: !config.egress_allow.is_empty(),
                require: protections.require.clone(),
                start_timeout: config.start_timeout,
                first_event_timeout: config.first_event_timeout,
                stall_timeout: config.stall_timeout,
                unresponsive_timeout: config.unresponsive_timeout,
                header_timeout: config.model_header_timeout,
                idle_timeout: config.model_idle_timeout,
                warm: config.warm_pool_size,
            },
            sandbox.clone(),
            broker,
            Ports::new(config.session_port_range.clone(), config.max_concurrent_tasks + config.warm_pool_size),
            tasks.clone(),
            metrics.clone(),
            warm_for,
        );
        sessions.open_workspace().await;
        let executions = Executions::new(
            executions::Settings {
                project: config.project_id.clone(),
                owner: state.instance,
                lease: config.lease,
                alive: config.state_dir.join("alive"),
                max_running: config.max_concurrent_tasks,
                max_queued: config.max_queued_tasks,
                ceilings: Ceilings {
                    task_timeout_seconds: config.task_timeout.as_secs(),
                    max_prompt_length: config.max_prompt_length,
                    limits: config.limits,
                    default_model,
                    endpoints: config.model_endpoints(),
                    keyring: config.keyring.clone(),
                    unheld: protections.unheld.clone(),
                    unheld_cpu: protections.unheld_cpu.clone(),
                },
                sealing: sealing.clone(),
                protections: protections.names.clone(),
                session_idle: config.session_idle_timeout,
                max_open: max_open(&config, &protections),
                retention: config.retention,
            },
            database.store.clone(),
            events,
            sessions.clone(),
            workspace.clone(),
            tasks.clone(),
            metrics.clone(),
        );
        let notifier = notifier(&config, &auth, state.instance, &database.store, &metrics, &tasks)?;
        let all_kept = executions.recover(inherited, journal.has_lost()).await;
        // What still waits is sealed under this life's key now.
        if all_kept && let Err(error) = sealing.forget_previous() {
            tracing::warn!(%error, "the sealing key of an earlier life cannot be removed");
        }
        // Only now: a start that ended before this would have the next one forget a loss of power.
        journal.begin().map_err(StartError::Journal)?;
        tasks.spawn("lease", executions.clone().hold_lease());
        tasks.spawn("idle sessions", executions.clone().look_after_sessions());
        tasks.spawn("retention", executions.clone().forget_old());
        let streams = CancellationToken::new();
        let readiness = Ready {
            mode: config.sandbox,
            protections,
            egress: config.egress_allow.len(),
            auth: auth.clone(),
            open_streams: config.sessions_stream_unauthenticated,
            embedded: database.embedded.is_some(),
            store: database.store.clone(),
            executions: executions.clone(),
            workspace,
            command,
            state_dir: config.state_dir.clone(),
            sessions: sessions.clone(),
        };
        let readiness = Readiness::new(move || {
            let readiness = readiness.clone();
            async move { readiness.checks().await }
        });
        let edge = Edge {
            auth: auth.clone(),
            probes: Probes { metrics, readiness },
            limits: Default::default(),
            metrics_auth: config.metrics_auth,
        };
        let api = TasksApi { executions: executions.clone(), auth };
        let sockets = Sockets::new(streams.clone());
        let sessions_api = SessionsApi {
            executions: executions.clone(),
            shutdown: streams.clone(),
            open_streams: config.sessions_stream_unauthenticated,
            sockets: sockets.clone(),
        };
        let routes = Routes {
            protected: crate::api::tasks::routes(api.clone())
                .merge(crate::api::files::routes(FilesApi { tasks: api.clone(), max_bytes: config.max_task_file_size }))
                .merge(crate::api::sessions::routes(sessions_api.clone())),
            streams: crate::api::stream::routes(StreamApi { tasks: api, sockets })
                .merge(crate::api::sessions::streams(sessions_api)),
        };
        let (router, _) = assemble(&edge, routes)?;
        Ok(Self { config, tasks, sandbox, database, journal, executions, sessions, notifier, router, streams, state })
    }

    /// Serves until `stop`, then ends everything in order: nothing new is taken and `/ready` says so, streams are told
    /// to come again, executions end as `interrupted` with all their processes, the log is written, the backend is told,
    /// the database is closed.
    ///
    /// # Errors
    /// [`Abandoned`], where something did not end within `SHUTDOWN_GRACE_SECONDS`.
    pub async fn run(self, listener: TcpListener, stop: impl Future<Output = ()>) -> Result<(), Abandoned> {
        let address = listener.local_addr().ok();
        let close = CancellationToken::new();
        let limits = crate::api::server::ServerLimits { drain: DRAIN, ..Default::default() };
        let serving = crate::api::server::serve_with(listener, self.router, self.tasks.clone(), close.clone(), limits);
        let serving = self.tasks.spawn("server", serving);
        tracing::info!(address = address.map(tracing::field::display), "listening");
        stop.await;

        // Each step has its share of the grace, so that one that hangs (a database that is away) leaves the others
        // theirs, and the whole does not take longer than was allowed.
        let (begun, grace) = (Instant::now(), self.config.shutdown_grace);
        let until = |share: f64| (begun + grace.mul_f64(share)).saturating_duration_since(Instant::now());
        tracing::info!(grace_seconds = grace.as_secs(), "shutting down");
        self.streams.cancel();
        let executions = self.executions.shut_down(until(0.5)).await.err().unwrap_or(0);
        let log = self.executions.events();
        let _ = tokio::time::timeout(until(0.6), log.flushed()).await;
        let (writes, unshipped) = (log.pending(), log.pending() + log.unshipped());
        if unshipped > 0 {
            tracing::warn!(unshipped, "the database is away: what it lacks stays in the journal, for the next start");
        }
        close.cancel();
        if let Some(notifier) = self.notifier {
            notifier.drain(until(0.7).min(grace.mul_f64(LAST_CALLBACKS))).await;
        }
        let connections = match tokio::time::timeout(until(0.75), serving).await {
            Ok(Ok(cut)) => cut,
            Ok(Err(_)) | Err(_) => 1,
        };
        self.tasks.shutdown_token().cancel();
        let ended = async {
            self.sessions.stop().await;
            self.database.close().await;
        };
        if tokio::time::timeout(until(0.95), ended).await.is_err() {
            tracing::error!("warm sessions or the embedded Postgres did not end in time");
        }
        self.sandbox.sweep_orphans();
        let tasks = self.tasks.stop(until(1.0)).await.err().unwrap_or(0);
        let processes = self.sandbox.live();
        // Nothing appends any more. It takes a moment, and this is the last one.
        if let Err(error) = self.journal.close() {
            tracing::error!(%error, "the journal could not be synced");
        }
        drop(self.state);
        if executions + writes + processes + connections + tasks == 0 {
            tracing::info!("stopped");
            return Ok(());
        }
        Err(Abandoned { executions, writes, processes, connections, tasks })
    }
}

/// Waits until nothing of an earlier life runs: where there are no groups to empty, the jails of it may still be at that.
async fn nothing_left(tasks: &Tasks, roll: PathBuf) -> Result<(), StartError> {
    let path = roll.clone();
    let waited = tasks.spawn_blocking(move || wait_for_earlier_jails(&path, JAILS_WAIT)).await;
    match waited.unwrap_or_else(|error| Err(std::io::Error::other(error))) {
        Ok(true) => Ok(()),
        Ok(false) => Err(StartError::Left),
        Err(source) => Err(StartError::State { path: roll, source }),
    }
}

/// Opens the journal.
async fn journal(config: &Config, tasks: &Tasks) -> Result<Arc<Journal>, StartError> {
    let directory = config.state_dir.join("journal");
    let opened = tasks.spawn_blocking(move || Journal::open(&directory)).await;
    let (journal, damage) =
        opened.unwrap_or_else(|error| Err(std::io::Error::other(error))).map_err(StartError::Journal)?;
    for crate::journal::Damage { file, bytes, in_the_middle } in damage {
        let file = file.display();
        if in_the_middle {
            tracing::error!(%file, bytes, "a part of the journal is damaged, and its events are lost");
        } else {
            tracing::warn!(%file, bytes, "the end of the journal is damaged and was cut off: a write was cut short, or the disk has changed it");
        }
    }
    Ok(Arc::new(journal))
}

/// What sessions may reach beside their model.
fn egress(config: &Config) -> EgressConfig {
    const POSTGRES: u16 = 5432;
    let allow = config.egress_allow.clone();
    if !allow.is_empty() {
        tracing::info!(%allow, "sessions reach other hosts than their model's (EGRESS_ALLOW)");
    }
    let url = config.database_url.as_ref().and_then(|url| url::Url::parse(url.expose_secret()).ok());
    let database = url.and_then(|url| {
        let port = url.port().unwrap_or(POSTGRES);
        // One that is reached by a Unix socket has no host.
        Target::parse(&format!("{}:{port}", url.host_str().filter(|host| !host.is_empty())?))
    });
    EgressConfig { allow, database, ..EgressConfig::default() }
}

/// Starts what tells the backend, where there is one.
fn notifier(
    config: &Config,
    auth: &Auth,
    owner: Uuid,
    store: &Store,
    metrics: &Metrics,
    tasks: &Tasks,
) -> Result<Option<Notifier>, notify::ClientError> {
    let Some(backend) = config.backend_api_url.clone() else { return Ok(None) };
    let settings = notify::Settings {
        backend,
        secret: auth.shared_secret(),
        project: config.project_id.clone(),
        owner,
        pace: notify::Pace::default(),
    };
    Notifier::start(settings, store.clone(), metrics.clone(), tasks).map(Some)
}

/// The most sessions of callers that may be open: no more than have users, beside those of other executions and the warm
/// ones.
fn max_open(config: &Config, protections: &Protections) -> usize {
    let others = config.max_concurrent_tasks + config.warm_pool_size;
    match protections.users {
        Some(_) => MAX_OPEN.min(config.session_uids().saturating_sub(others)),
        None => MAX_OPEN,
    }
}

/// What `/ready` looks at.
#[derive(Clone, Debug)]
struct Ready {
    mode: SandboxMode,
    protections: Protections,
    /// How many entries `EGRESS_ALLOW` has.
    egress: usize,
    auth: Auth,
    /// `SESSIONS_STREAM_UNAUTHENTICATED`
    open_streams: bool,
    embedded: bool,
    store: Store,
    executions: Executions,
    workspace: Workspace,
    command: PathBuf,
    state_dir: PathBuf,
    sessions: Sessions,
}

/// Whether a directory is on a container's own layer or in memory; `None` where the kernel does not say.
pub fn is_ephemeral(directory: &Path) -> Option<bool> {
    use nix::sys::statfs::{OVERLAYFS_SUPER_MAGIC, TMPFS_MAGIC, statfs};
    let kind = statfs(directory).ok()?.filesystem_type();
    Some(kind == OVERLAYFS_SUPER_MAGIC || kind == TMPFS_MAGIC)
}

impl Ready {
    async fn checks(&self) -> Checks {
        let mut checks = Checks::new();
        checks = match self.workspace.check_writable() {
            Ok(()) => match self.workspace.unshared() {
                None => checks.with("workspace", "ok", None),
                Some(why) => checks.with("workspace", "degraded", Some(why)),
            },
            Err(error) => checks.failing("workspace", "failed", Some(&error.to_string())),
        };
        let kind = if self.embedded { "embedded" } else { "external" };
        let log = self.executions.events();
        // As it is known: a server that says nothing would make this wait, too.
        let away = self.store.is_away().then(|| "the database does not answer".to_owned());
        checks = match log.outage().or(away) {
            None => checks.with("database", "ok", Some(kind)),
            Some(why) => checks.with("database", "degraded", Some(&format!("{why}; the journal bridges it"))),
        };
        let (bytes, most) = log.journal();
        let detail = format!("{bytes} of {most} bytes, {} events to ship", log.unshipped());
        checks = match log.trouble() {
            Some(trouble) => checks.failing("journal", "failed", Some(&trouble)),
            None if log.is_full() => checks.failing("journal", "full", Some(&detail)),
            None => checks.with("journal", "ok", Some(&detail)),
        };
        let warm = self.sessions.warm();
        checks = match self.sessions.opencode_version() {
            _ if !self.command.exists() => checks.failing("opencode", "failed", Some("the executable is gone")),
            Some(version) if version == OPENCODE_VERSION => {
                checks.with("opencode", "ok", Some(&format!("{version}, {warm} warm")))
            }
            Some(other) => checks.with(
                "opencode",
                "degraded",
                Some(&format!("{other}; tested is {OPENCODE_VERSION}, {warm} warm")),
            ),
            None => checks.with("opencode", "ok", Some("not started yet")),
        };
        let (state, mut detail) = self.protections.state(self.mode);
        if self.egress > 0 {
            // Not which: nobody has to show who they are to read this.
            detail.push_str(&format!("; EGRESS_ALLOW opens other hosts (entries: {})", self.egress));
        }
        checks = match state {
            "failed" => checks.failing("sandbox", state, Some(&detail)),
            _ => checks.with("sandbox", state, Some(&detail)),
        };
        checks = match is_ephemeral(&self.state_dir) {
            Some(false) => checks.with("state", "durable", None),
            Some(true) => {
                checks.with("state", "ephemeral", Some("STATE_DIR is on no volume: it goes with the container"))
            }
            None => checks.with("state", "unknown", None),
        };
        let (auth, detail) = self.auth.state();
        let open = "SESSIONS_STREAM_UNAUTHENTICATED: GET /sessions/{id}/stream is open to all";
        let open = (self.open_streams && self.auth.is_configured()).then(|| open.to_owned());
        let details: Vec<_> = detail.into_iter().chain(open).collect();
        checks = checks.with("auth", auth, (!details.is_empty()).then(|| details.join("; ")).as_deref());
        if self.executions.is_closing() {
            checks = checks.failing("shutdown", "failed", Some("the sidecar is shutting down"));
        }
        checks
    }
}

/// Binds the address of the configuration.
///
/// # Errors
/// Where it is taken, or not ours.
pub async fn bind(config: &Config) -> Result<TcpListener, std::io::Error> {
    TcpListener::bind(SocketAddr::new(config.host, config.port)).await
}
