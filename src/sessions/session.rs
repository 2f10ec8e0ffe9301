//! One OpenCode process: started, primed, ended.

use super::confinement::{Programs, confinement, search_path};
use super::identity::Identity;
use super::terminal::Terminals;
use super::{InUse, Measured, Shared, egress, private};
use crate::broker::{Budget, Grant, Lease, Upstream};
use crate::model::task::Limits;
use crate::model::{SessionId, Usage};
use crate::opencode::OPENCODE_VERSION;
use crate::opencode::client::{Client, ClientError, Prompt};
use crate::opencode::launch::{Launch, LaunchError, Server, launch};
use crate::opencode::profile::{Directories, Endpoints, Profile, common_environment, config, environment};
use crate::sandbox::confine::Confinement;
use crate::sandbox::{Disk, DiskSpec, User};
use crate::secrets::random_token;
use futures_util::FutureExt;
use secrecy::{ExposeSecret, SecretString};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// How long OpenCode gets for each polite step of its end.
const DISPOSE: Duration = Duration::from_secs(1);
const TERM: Duration = Duration::from_millis(500);
/// How long the kill may take until it is given up, with an error.
const KILL: Duration = Duration::from_secs(10);
/// How long a warm session may take for its first, unpaid answer.
const PRIME: Duration = Duration::from_secs(60);
/// How long it may take to open to the group what a task has made.
const SHARE: Duration = Duration::from_secs(2);

/// How many of its processes and threads a session keeps for OpenCode where its commands want them all; half of them
/// where that is less. OpenCode 1.18.33 has about 25 threads on two CPUs, and some more for each further one.
const KEPT_PIDS: u64 = 100;

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
    /// At most so long from exec to listening and answering; the configured `START_TIMEOUT` where that is less.
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
        let tool_pids = pids.map(|pids| pids - (pids / 2).min(KEPT_PIDS));
        crate::sandbox::Limits { memory_bytes, pids, tool_pids, cpu_millis }
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
    #[error("every user of SESSION_UID_RANGE is in use")]
    NoUser,
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
#[derive(Debug)]
pub struct Parked {
    place: Arc<Place>,
    conversation: Option<String>,
}

impl Parked {
    /// What an earlier life of the sidecar left of a session with this conversation; `None` where that is gone.
    pub(super) fn of_earlier(shared: &Shared, id: SessionId, conversation: &str) -> Option<Self> {
        let place = Arc::new(Place::of_earlier(shared, id)?);
        Some(Self { place, conversation: Some(conversation.to_owned()) })
    }

    /// Removes it for good.
    pub fn discard(self) {
        self.place.remove();
    }
}

/// What a session has for as long as it exists, whether its process lives or not: directories, and the user that they
/// belong to and that it runs as.
#[derive(Debug)]
struct Place {
    directories: Directories,
    /// Without one it runs as the sidecar's own user. Taken out when it is given back.
    identity: Mutex<Option<Identity>>,
    user: Option<User>,
    /// Whether something may still run as its user.
    haunted: AtomicBool,
}

impl Place {
    /// Makes the directories of a new session, and gives them to a user of its own where there are such.
    fn make(shared: &Shared, wanted: &Wanted) -> Result<Self, SessionError> {
        let settings = &shared.settings;
        let failed = |error| SessionError::Launch(LaunchError::Directories(error));
        // The workspace's group is its only one: what it moves there from elsewhere is that group's too.
        let gid = std::fs::metadata(&wanted.workdir).map_err(failed)?.gid();
        let identity = match &shared.identities {
            Some(identities) => Some(identities.take(|| shared.sandbox.users()).ok_or(SessionError::NoUser)?),
            None => None,
        };
        let user = identity.as_ref().map(|identity| identity.user(gid));
        let directories = Directories::new(settings.directory.join(wanted.id.to_string()));
        let place = Self { directories, identity: Mutex::new(identity), user, haunted: AtomicBool::new(false) };
        let made = place.directories.create(&settings.executable);
        let given = made.and_then(|()| match user {
            Some(user) => private::give(place.directories.root(), user),
            None => Ok(()),
        });
        if let Err(error) = given {
            place.remove();
            return Err(failed(error));
        }
        Ok(place)
    }

    /// The directories that a session of an earlier life left; `None` where there are none, or their user is not to be had.
    fn of_earlier(shared: &Shared, id: SessionId) -> Option<Self> {
        let directories = Directories::new(shared.settings.directory.join(id.to_string()));
        let found = std::fs::symlink_metadata(directories.root()).ok().filter(std::fs::Metadata::is_dir)?;
        let (identity, user) = match &shared.identities {
            Some(identities) => {
                let identity = identities.take_back(found.uid(), || shared.sandbox.users())?;
                let user = identity.user(found.gid());
                (Some(identity), Some(user))
            }
            None => (None, None),
        };
        Some(Self { directories, identity: Mutex::new(identity), user, haunted: AtomicBool::new(false) })
    }

    /// Removes the directories, and gives the user back if nothing of it is left.
    fn remove(&self) {
        let directory = self.directories.root();
        if self.haunted.load(Ordering::Acquire) {
            tracing::error!(directory = %directory.display(), "a session's directory stays, since something of it may still run");
        } else if let Err(error) = private::remove(directory) {
            tracing::error!(%error, directory = %directory.display(), "a session's directory could not be removed");
        } else if let Some(identity) = self.identity.lock().unwrap_or_else(PoisonError::into_inner).take() {
            identity.free();
        }
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
    place: Arc<Place>,
    /// What it is confined to, but for its ports.
    confinement: Option<Confinement>,
    /// Whether it had a task, and so may have made something that is to be shared.
    pub(super) worked: bool,
    warm: bool,
    /// OpenCode's id of the conversation that it has, once it has one.
    pub(super) conversation: Option<String>,
    /// The last message of that conversation, where the run before has ended with it.
    pub(super) last_message: Option<String>,
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
        let password = random_token().map_err(SessionError::Random)?;
        let place = match parked {
            Some(parked) => Arc::clone(&parked.place),
            None => Arc::new(Place::make(shared, &wanted)?),
        };
        let directories = &place.directories;
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
        let mut env = environment(
            directories,
            &configuration,
            password.expose_secret(),
            &lease.shell_url(),
            lease.token().expose_secret(),
            inherited,
        );
        let mut common = common_environment(directories, inherited);
        // Without a sandbox whatever is there is reached directly, so that a proxy would only take away.
        if settings.confined || settings.egress_open {
            let way_out = egress::environment(&lease.proxy_url(), settings.egress_open, inherited);
            env.extend(way_out.clone());
            common.extend(way_out);
        }
        if place.user.is_some() {
            // There is no other name for it: the system's list of users does not know it.
            let names = ["USER", "LOGNAME"].map(|name| (name.into(), "session".into()));
            env.extend(names.clone());
            common.extend(names);
        }
        let confinement = settings.confined.then(|| {
            let path = env.iter().find(|(name, _)| name == "PATH").map(|(_, path)| path.as_os_str());
            let programs =
                Programs { opencode: &settings.command, sidecar: &settings.executable, path: path.unwrap_or_default() };
            let mut confinement = confinement(programs, directories, &wanted.workdir, shared.broker.address());
            confinement.require.clone_from(&settings.require);
            confinement.network.namespace = settings.namespace;
            confinement
        });
        let within = settings.start_timeout.min(wanted.start_within);
        let start_by = Instant::now() + within;
        let to_launch = Launch {
            command: settings.command.clone(),
            directories: directories.clone(),
            workdir: wanted.workdir.clone(),
            env,
            user: place.user,
            confinement: confinement.clone(),
            limits: settings.confined.then(|| wanted.resources()),
            refused: settings.confined.then(|| egress::refused_by_sandbox(&lease)),
            deadline: within,
            stop: wanted.stop.clone(),
        };
        let server = match launch(&shared.sandbox, &shared.tasks, &shared.ports, &to_launch).await {
            Ok(server) => server,
            Err(error) => {
                if parked.is_none() {
                    place.remove();
                }
                return Err(error.into());
            }
        };
        let client = match Client::new(server.port.number(), password, &wanted.workdir.to_string_lossy()) {
            Ok(client) => client,
            Err(error) => {
                if server.process.kill(KILL).await.is_err() {
                    place.haunted.store(true, Ordering::Release);
                }
                if parked.is_none() {
                    place.remove();
                }
                return Err(SessionError::Client(error));
            }
        };
        let conversation = parked.and_then(|parked| parked.conversation.clone());
        let terminals = Terminals::new(
            shared.sandbox.clone(),
            shared.tasks.clone(),
            server.process.handle(),
            |name, program| server.companion(name, program),
            common,
        );
        let mut session = Self {
            shared: Arc::clone(shared),
            wanted,
            server,
            client,
            lease,
            place,
            confinement,
            worked: false,
            warm,
            conversation,
            last_message: None,
            in_use: None,
            disk: None,
            terminals,
        };
        let ready = async {
            if shared.version.get().is_none() {
                let version = tokio::time::timeout_at(start_by, session.client.version()).await;
                let version = version.unwrap_or(Err(ClientError::Timeout { call: "health" }));
                let version = version.map_err(SessionError::Silent)?;
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
        let ready = tokio::select! {
            ready = ready => ready,
            () = session.wanted.stop.cancelled() => Err(LaunchError::CalledOff.into()),
        };
        let ready = match ready {
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
            roots: vec![self.wanted.workdir.clone(), self.place.directories.root().to_path_buf()],
            limit: Some(limit),
            owner: None,
            process: Some(self.server.process.handle()),
            user: self.place.user,
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
        self.worked = true;
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
        self.place.remove();
        ended
    }

    /// The same, but what is on disk stays, for a later start.
    pub async fn park(self, done: bool) -> (Ended, Parked) {
        let ended = self.end_processes(done).await;
        (ended, Parked { place: self.place, conversation: self.conversation })
    }

    async fn end_processes(&self, done: bool) -> Ended {
        let (ended, closed) = tokio::join!(self.end_opencode(done), self.terminals.close());
        let nothing_left = ended.nothing_left && closed;
        if nothing_left {
            self.share().await;
        } else {
            self.place.haunted.store(true, Ordering::Release);
        }
        Ended { nothing_left, ..ended }
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

    /// Opens what it has made to the workspace's group, where it is a user of its own: other sessions are others then.
    pub async fn share(&self) {
        let (Some(user), Some(confinement)) = (self.place.user, &self.confinement) else { return };
        if !self.worked && self.terminals.used_at().is_none() {
            return;
        }
        let (session, workdir) = (self.wanted.id, &self.wanted.workdir);
        match self.shared.sandbox.share(Some(user), confinement, workdir, SHARE).await {
            Ok(shared) if shared.cut => tracing::warn!(
                %session,
                shared.changed,
                "there are too many files to open all that the session has made to the workspace's group"
            ),
            Ok(shared) => tracing::debug!(%session, shared.changed, "opened to the workspace's group"),
            Err(error) => tracing::error!(
                %session,
                error = &error as &dyn std::error::Error,
                "what the session has made could not be opened to the workspace's group"
            ),
        }
    }
}
