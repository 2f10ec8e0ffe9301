//! One OpenCode process: started, primed, ended.

use super::confinement::{Programs, confinement, search_path};
use super::terminal::Terminals;
use super::{InUse, Measured, Shared};
use crate::broker::{Budget, Grant, Lease, Upstream};
use crate::model::task::Limits;
use crate::model::{SessionId, Usage};
use crate::opencode::OPENCODE_VERSION;
use crate::opencode::client::{Client, ClientError, Prompt};
use crate::opencode::launch::{Launch, LaunchError, Server, launch};
use crate::opencode::profile::{Directories, Endpoints, Profile, common_environment, config, environment};
use crate::sandbox::{Disk, DiskSpec};
use crate::secrets::random_token;
use futures_util::FutureExt;
use secrecy::{ExposeSecret, SecretString};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// How long OpenCode gets for each polite step of its end.
const DISPOSE: Duration = Duration::from_secs(1);
const TERM: Duration = Duration::from_millis(500);
/// How long the kill may take until it is given up, with an error.
const KILL: Duration = Duration::from_secs(10);
/// How long a warm session may take for its first, unpaid answer.
const PRIME: Duration = Duration::from_secs(60);

/// What a session is to be like.
#[derive(Clone, Debug)]
pub struct Wanted {
    pub id: SessionId,
    pub profile: Profile,
    /// The provider's key; it goes to the broker and nowhere else.
    pub api_key: SecretString,
    /// Canonical.
    pub workdir: PathBuf,
    pub limits: Limits,
    /// At most so long from exec to listening; the configured `START_TIMEOUT` where that is less.
    pub start_within: Duration,
    /// Calls the start off.
    pub stop: CancellationToken,
}

impl Wanted {
    fn budget(&self) -> Budget {
        Budget { model_calls: self.limits.model_calls, total_tokens: self.limits.total_tokens }
    }

    fn resources(&self) -> crate::sandbox::Limits {
        let Limits { memory_bytes, pids, cpu_millis, .. } = self.limits;
        crate::sandbox::Limits { memory_bytes, pids, cpu_millis }
    }

    /// Whether a session that was started for `other` does for this.
    pub(super) fn is_served_by(&self, other: &Self) -> bool {
        self.profile == other.profile
            && self.workdir == other.workdir
            && self.resources() == other.resources()
            && self.limits.disk_bytes == other.limits.disk_bytes
            && self.api_key.expose_secret() == other.api_key.expose_secret()
    }
}

/// Why there is no session.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    #[error("{0}")]
    Refused(String),
    #[error("the session has ended")]
    HasEnded,
    #[error("the model's endpoint is no URL")]
    Endpoint(#[source] url::ParseError),
    #[error("no random bytes")]
    Random(#[source] std::io::Error),
    #[error("what it adds to the disk cannot be counted")]
    Disk(#[source] std::io::Error),
    #[error("OpenCode did not start")]
    Launch(#[from] LaunchError),
    #[error("no client for OpenCode")]
    Client(#[source] reqwest::Error),
    #[error("OpenCode started, but does not answer")]
    Silent(#[source] ClientError),
    #[error("OpenCode started, but gave no first answer within {} s", PRIME.as_secs())]
    PrimeTimeout,
}

/// How a session ended.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ended {
    /// Of all its processes.
    pub cpu_seconds: Option<f64>,
    /// The same and more, where it was measured.
    pub usage: Measured,
    /// Whether it is proven that none of them is left.
    pub nothing_left: bool,
}

impl Ended {
    /// Fills in what was used since `before`, which is nothing for a process that ran for this alone.
    pub fn account(&self, before: &Measured, usage: &mut Usage) {
        let since = |now: Option<u64>, before: Option<u64>| now.map(|now| now.saturating_sub(before.unwrap_or(0)));
        let measured = &self.usage;
        let cpu = measured.cpu_seconds.map(|now| (now - before.cpu_seconds.unwrap_or(0.0)).max(0.0));
        usage.cpu_seconds = cpu.or(self.cpu_seconds);
        usage.memory_bytes = measured.memory_bytes.or(usage.memory_bytes);
        usage.memory_peak_bytes = measured.memory_peak_bytes.or(usage.memory_peak_bytes);
        usage.pids = measured.pids_peak.or(usage.pids);
        usage.read_bytes = since(measured.read_bytes, before.read_bytes);
        usage.written_bytes = since(measured.written_bytes, before.written_bytes);
    }
}

/// What is left of a session whose processes were ended: its directories, and in them its conversation.
#[derive(Clone, Debug)]
pub struct Parked {
    directories: Directories,
    conversation: Option<String>,
}

impl Parked {
    /// Removes it for good.
    pub fn discard(self) {
        remove(&self.directories);
    }
}

/// A running OpenCode.
#[derive(Debug)]
pub struct Session {
    pub(super) shared: Arc<Shared>,
    pub(super) wanted: Wanted,
    pub(super) server: Server,
    pub(super) client: Client,
    pub(super) lease: Lease,
    directories: Directories,
    warm: bool,
    /// OpenCode's id of the conversation that it has, once it has one.
    pub(super) conversation: Option<String>,
    /// Set while it runs a task.
    pub(super) in_use: Option<InUse>,
    /// Counts what it adds to the disk, where that is limited.
    pub(super) disk: Option<Disk>,
    terminals: Terminals,
}

impl Session {
    /// Starts one, on the directories of a parked one where there is one; these stay where it fails. A `warm` one is
    /// primed: it has loaded its providers and plugins already.
    pub(super) async fn start(
        shared: &Arc<Shared>,
        wanted: Wanted,
        parked: Option<&Parked>,
        warm: bool,
    ) -> Result<Self, SessionError> {
        let settings = &shared.settings;
        let model = &wanted.profile.model;
        let endpoint = url::Url::parse(&model.endpoint).map_err(SessionError::Endpoint)?;
        let lease = shared.broker.open(Grant {
            upstream: Upstream {
                provider: model.provider,
                endpoint,
                api_key: wanted.api_key.clone(),
                model: model.name().into_owned(),
            },
            limits: wanted.budget(),
        });
        let directories = match parked {
            Some(parked) => parked.directories.clone(),
            None => {
                let directories = Directories::new(settings.directory.join(wanted.id.to_string()));
                directories.create(&settings.executable).map_err(LaunchError::Directories)?;
                directories
            }
        };
        let password = random_token().map_err(SessionError::Random)?;
        let shell = directories.shell();
        let configuration = config(
            &wanted.profile,
            &Endpoints {
                model_url: &lease.base_url(),
                token: lease.token().expose_secret(),
                shell: &shell,
                header_timeout: settings.header_timeout,
                idle_timeout: settings.idle_timeout,
            },
        );
        let inherited = |name: &str| match name {
            "PATH" if settings.confined => std::env::var_os(name).map(search_path),
            _ => std::env::var_os(name),
        };
        let env = environment(
            &directories,
            &configuration,
            password.expose_secret(),
            &lease.shell_url(),
            lease.token().expose_secret(),
            inherited,
        );
        let confinement = settings.confined.then(|| {
            let path = env.iter().find(|(name, _)| name == "PATH").map(|(_, path)| path.as_os_str());
            let programs =
                Programs { opencode: &settings.command, sidecar: &settings.executable, path: path.unwrap_or_default() };
            let mut confinement = confinement(programs, &directories, &wanted.workdir, shared.broker.address());
            confinement.require.clone_from(&settings.require);
            confinement
        });
        let to_launch = Launch {
            command: settings.command.clone(),
            directories: directories.clone(),
            workdir: wanted.workdir.clone(),
            env,
            confinement,
            limits: settings.confined.then(|| wanted.resources()),
            deadline: settings.start_timeout.min(wanted.start_within),
            stop: wanted.stop.clone(),
        };
        let server = match launch(&shared.sandbox, &shared.tasks, &shared.ports, &to_launch).await {
            Ok(server) => server,
            Err(error) => {
                if parked.is_none() {
                    remove(&directories);
                }
                return Err(error.into());
            }
        };
        let client = Client::new(server.port.number(), password, &wanted.workdir.to_string_lossy());
        let client = client.map_err(SessionError::Client)?;
        let conversation = parked.and_then(|parked| parked.conversation.clone());
        let terminals = Terminals::new(
            shared.sandbox.clone(),
            shared.tasks.clone(),
            server.process.handle(),
            |name, program| server.companion(name, program),
            common_environment(&directories, inherited),
        );
        let mut session = Self {
            shared: Arc::clone(shared),
            wanted,
            server,
            client,
            lease,
            directories,
            warm,
            conversation,
            in_use: None,
            disk: None,
            terminals,
        };
        let ready = async {
            if shared.version.get().is_none() {
                let version = session.client.version().await.map_err(SessionError::Silent)?;
                if version != OPENCODE_VERSION {
                    tracing::warn!(
                        version,
                        tested = OPENCODE_VERSION,
                        "this OpenCode was not tested with this version"
                    );
                }
                // Another session may have been quicker, with the same executable.
                let _ = shared.version.set(version);
            }
            if warm { session.prime().await } else { Ok(()) }
        };
        let ready = match ready.await {
            Ok(()) => session.count_disk().await,
            Err(error) => Err(error),
        };
        if let Err(error) = ready {
            match parked {
                Some(_) => drop(session.park(false).await),
                None => drop(session.end(false).await),
            }
            return Err(error);
        }
        Ok(session)
    }

    /// Counts what it adds to the disk from now on, where that is limited.
    async fn count_disk(&mut self) -> Result<(), SessionError> {
        let Some(limit) = self.wanted.limits.disk_bytes.filter(|_| self.shared.settings.confined) else {
            return Ok(());
        };
        let spec = DiskSpec {
            roots: vec![self.wanted.workdir.clone(), self.directories.root().to_path_buf()],
            limit: Some(limit),
            owner: None,
            process: Some(self.server.process.handle()),
        };
        self.disk = Some(self.shared.sandbox.watch_disk(spec).await.map_err(SessionError::Disk)?);
        Ok(())
    }

    /// Its id.
    pub fn id(&self) -> SessionId {
        self.wanted.id
    }

    /// Whether it was started ahead.
    pub fn is_warm(&self) -> bool {
        self.warm
    }

    /// What it is protected by, as its jail has seen it done.
    pub fn protections(&self) -> Vec<String> {
        let process = &self.server.process;
        let confined = process.confined().map(|confined| confined.protections).unwrap_or_default();
        let mut names: Vec<String> = confined.into_iter().map(|protection| protection.name().to_owned()).collect();
        if self.shared.settings.confined {
            names.push(self.shared.sandbox.resources().probe().mechanism.to_string());
        }
        if self.disk.is_some() {
            names.push("disk".to_owned());
        }
        names.push("subreaper".to_owned());
        names
    }

    /// OpenCode's process id, for tests and operators.
    pub fn pid(&self) -> u32 {
        self.server.process.pid()
    }

    /// OpenCode's id of its conversation, which is begun where it has none.
    ///
    /// # Errors
    /// Where OpenCode does not answer.
    pub async fn conversation(&mut self, title: &str) -> Result<String, ClientError> {
        if let Some(conversation) = &self.conversation {
            return Ok(conversation.clone());
        }
        let conversation = self.client.create_session(title).await?;
        self.conversation = Some(conversation.clone());
        Ok(conversation)
    }

    /// Takes it over for a task: the task's id and limits from now on.
    pub(super) fn claim(&mut self, wanted: &Wanted) {
        self.wanted.id = wanted.id;
        self.wanted.limits = wanted.limits;
        self.lease.reset(self.wanted.budget());
    }

    /// Its terminals, for as long as its process lives.
    pub fn terminals(&self) -> Terminals {
        self.terminals.clone()
    }

    /// What all its processes have used so far, where it is measured.
    pub fn usage(&self) -> Measured {
        self.server.process.handle().usage()
    }

    /// Whether its process still runs.
    pub fn is_alive(&self) -> bool {
        self.server.process.exited().now_or_never().is_none()
    }

    /// One answer in a conversation that is thrown away, given by the broker and not by the model: it makes OpenCode
    /// load everything that it loads on first use.
    async fn prime(&self) -> Result<(), SessionError> {
        self.lease.priming(true);
        let work = async {
            let mut events = self.client.events().await?;
            let conversation = self.client.create_session("warm-up").await?;
            self.client.prompt(&conversation, &Prompt { text: "ok", ..Prompt::default() }).await?;
            while let Some(event) = events.next().await? {
                if event.kind == "session.idle" && event.session_id() == Some(&conversation) {
                    break;
                }
            }
            self.client.delete_session(&conversation).await
        };
        let result = tokio::time::timeout(PRIME, work).await;
        self.lease.priming(false);
        result.map_err(|_| SessionError::PrimeTimeout)?.map_err(SessionError::Silent)
    }

    /// Ends it in the order that works (OPENCODE.md "Stop"), until it is proven that nothing is left, and removes
    /// its directories. One that is `done` has nothing to flush or to end politely, and goes at once: whoever waits
    /// for the execution's end waits for this.
    pub async fn end(self, done: bool) -> Ended {
        let ended = self.end_processes(done).await;
        remove(&self.directories);
        ended
    }

    /// The same, but what is on disk stays, for a later start.
    pub async fn park(self, done: bool) -> (Ended, Parked) {
        let ended = self.end_processes(done).await;
        (ended, Parked { directories: self.directories, conversation: self.conversation })
    }

    async fn end_processes(&self, done: bool) -> Ended {
        let (ended, closed) = tokio::join!(self.end_opencode(done), self.terminals.close());
        Ended { nothing_left: ended.nothing_left && closed, ..ended }
    }

    async fn end_opencode(&self, done: bool) -> Ended {
        let process = &self.server.process;
        if !done && self.is_alive() {
            let disposed = tokio::time::timeout(DISPOSE, self.client.dispose()).await;
            if !matches!(disposed, Ok(Ok(()))) {
                tracing::debug!("OpenCode did not dispose of its instance");
            }
            process.signal(crate::sandbox::Signal::Term);
            let _ = tokio::time::timeout(TERM, process.exited()).await;
        }
        match process.kill(KILL).await {
            Ok(gone) => Ended { cpu_seconds: gone.cpu_seconds, usage: gone.usage, nothing_left: true },
            Err(left) => {
                tracing::error!(?left, session = %self.wanted.id, "processes of a session could not be ended");
                Ended::default()
            }
        }
    }

    /// It runs no task any more, and waits for its next one.
    pub fn rest(&mut self) {
        self.in_use = None;
    }
}

fn remove(directories: &Directories) {
    if let Err(error) = std::fs::remove_dir_all(directories.root()) {
        tracing::warn!(%error, directory = %directories.root().display(), "a session's directory could not be removed");
    }
}
