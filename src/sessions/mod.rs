//! Sessions: one OpenCode process each, from its start to the proof that nothing of it is left.
//!
//! - `session`: starting, priming and ending one.
//! - `confinement`: what one is confined to.
//! - `egress`: what of the way out is in its environment, and in its log.
//! - `identity`: the user that one runs as.
//! - `private`: its own directory on disk.
//! - `run`: one execution in it: what is awaited, the deadlines, how it ended.
//! - `shell`: the output of its shell commands.
//! - `terminal`: shells in it that people type to.
//! - `pool`: sessions started ahead for tasks on the default model.
//!
//! A session knows nothing of queues, statuses or callers: that is `executions`.

mod confinement;
mod egress;
mod identity;
mod pool;
mod private;
mod run;
mod session;
mod shell;
mod terminal;

pub use crate::sandbox::{Exit, TerminalSize, Usage as Measured};
pub use run::{Ending, KnownCalls, Observer, Progress, Run};
pub use session::{Ended, Parked, Session, SessionError, Wanted};
pub use terminal::{MAX_TERMINALS, Terminal, TerminalError, Terminals};

use crate::broker::Broker;
use crate::model::SessionId;
use crate::opencode::launch::Ports;
use crate::sandbox::Sandbox;
use crate::sandbox::confine::{Namespace, Protection};
use crate::tasks::Tasks;
use crate::telemetry::Metrics;
use std::collections::BTreeSet;
use std::ffi::OsString;
use std::ops::RangeInclusive;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::sync::watch;

/// What sessions are started with.
#[derive(Clone, Debug)]
pub struct Settings {
    /// OpenCode's executable.
    pub command: PathBuf,
    /// Our own executable: the jail and the shell tap.
    pub executable: PathBuf,
    /// Below it each session has its directory.
    pub directory: PathBuf,
    /// Those of an earlier life that are still needed.
    pub keep: BTreeSet<SessionId>,
    /// Whether sessions are confined, as far as this host can do that.
    pub confined: bool,
    /// Where the sockets of a session are.
    pub namespace: Namespace,
    /// The users that sessions run as, each one its own; without them, the sidecar's.
    pub users: Option<RangeInclusive<u32>>,
    /// What all of them work in.
    pub workspace: PathBuf,
    /// Whether there is anything that sessions may reach beside their model.
    pub egress_open: bool,
    /// What the jail of each session has to have done, or it does not start.
    pub require: BTreeSet<Protection>,
    /// Why no session may start (a required protection is missing), for people.
    pub refused: Option<String>,
    /// From exec to listening.
    pub start_timeout: Duration,
    /// From the prompt to the first sign of work.
    pub first_event_timeout: Duration,
    /// Without any sign of life from agent, model or tools.
    pub stall_timeout: Duration,
    /// Without any sign of life from OpenCode itself, which gives one every 10 s; and the longest that it may take to take
    /// a prompt.
    pub unresponsive_timeout: Duration,
    /// The broker's own clocks; OpenCode's come after them.
    pub header_timeout: Duration,
    pub idle_timeout: Duration,
    /// Sessions started ahead.
    pub warm: usize,
}

/// How long it may take to open the workspace to its group: the sidecar takes no task meanwhile.
const OPEN_WORKSPACE: Duration = Duration::from_secs(10);

/// Counts a session as one that runs a task, for as long as this lives.
#[derive(Debug)]
struct InUse(watch::Sender<usize>);

impl InUse {
    fn new(shared: &Shared) -> Self {
        shared.in_use.send_modify(|in_use| *in_use += 1);
        Self(shared.in_use.clone())
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        self.0.send_modify(|in_use| *in_use -= 1);
    }
}

/// Starts and ends sessions. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Sessions {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    settings: Settings,
    sandbox: Sandbox,
    broker: Broker,
    ports: Ports,
    /// Where sessions have users of their own.
    identities: Option<identity::Identities>,
    tasks: Tasks,
    metrics: Metrics,
    /// Sessions that run tasks.
    in_use: watch::Sender<usize>,
    /// As OpenCode itself says it, from the first session on.
    version: OnceLock<String>,
    pool: pool::Pool,
}

impl Sessions {
    /// Removes what an earlier life left of its sessions but for those to keep, and begins to fill the warm pool (with `warm_for`, where
    /// there is a default model).
    pub fn start(
        settings: Settings,
        sandbox: Sandbox,
        broker: Broker,
        ports: Ports,
        tasks: Tasks,
        metrics: Metrics,
        warm_for: Option<Wanted>,
    ) -> Self {
        if let Err(error) = begin_anew(&settings.directory, &settings.keep) {
            tracing::warn!(%error, "directories of earlier sessions could not be removed");
        }
        let identities = settings.users.clone().map(identity::Identities::new);
        let pool = pool::Pool::new(settings.warm);
        let sessions = Self {
            shared: Arc::new(Shared {
                settings,
                sandbox,
                broker,
                ports,
                identities,
                tasks,
                metrics,
                in_use: watch::Sender::new(0),
                version: OnceLock::new(),
                pool,
            }),
        };
        if let Some(wanted) = warm_for
            && sessions.shared.settings.warm > 0
            && sessions.shared.settings.refused.is_none()
        {
            let filler = sessions.clone();
            sessions.shared.tasks.spawn("warm pool", async move { pool::fill(filler, wanted).await });
        }
        sessions
    }

    /// Opens what is the sidecar's own in the workspace to its group, where sessions are other users. It may have been put
    /// there before there was a sidecar, or by one whose sessions were of its own user. To be done before the first task.
    pub async fn open_workspace(&self) {
        let Shared { settings, sandbox, identities: Some(_), .. } = &*self.shared else { return };
        let workspace = settings.workspace.as_path();
        let confinement = confinement::workspace_only(workspace);
        match sandbox.share(None, &confinement, workspace, OPEN_WORKSPACE).await {
            Ok(opened) if opened.cut => tracing::warn!(
                opened.changed,
                "the workspace has too many files to open all of the sidecar's own to its group; sessions may not edit the rest"
            ),
            Ok(opened) => {
                tracing::debug!(opened.changed, "the sidecar's own files in the workspace are open to its group")
            }
            Err(error) => tracing::error!(
                error = &error as &dyn std::error::Error,
                "the sidecar's own files in the workspace could not be opened to its group; sessions may not edit them"
            ),
        }
    }

    /// A session for a task: the parked one taken up again, or a warm one that fits, or a new one.
    ///
    /// # Errors
    /// [`SessionError`]; nothing is left of what was begun, but a parked one is as it was.
    pub async fn acquire(&self, wanted: Wanted, parked: Option<&Parked>) -> Result<Session, SessionError> {
        if let Some(refused) = &self.shared.settings.refused {
            return Err(SessionError::Refused(refused.clone()));
        }
        let in_use = InUse::new(&self.shared);
        let warm = if parked.is_none() { self.shared.pool.claim(&wanted) } else { None };
        let mut session = match warm {
            Some(session) => session,
            None => Session::start(&self.shared, wanted, parked, false).await?,
        };
        session.in_use = Some(in_use);
        session.worked = true;
        Ok(session)
    }

    /// What an earlier life of the sidecar left of a session, to be taken up again; `None` where that is gone.
    pub fn left(&self, id: SessionId, conversation: &str) -> Option<Parked> {
        Parked::of_earlier(&self.shared, id, conversation)
    }

    /// Takes a session that has rested for its next task.
    pub fn awaken(&self, session: &mut Session, wanted: &Wanted) {
        session.claim(wanted);
        session.in_use = Some(InUse::new(&self.shared));
    }

    /// The version of OpenCode, once a session has run.
    pub fn opencode_version(&self) -> Option<&str> {
        self.shared.version.get().map(String::as_str)
    }

    /// How many warm sessions wait.
    pub fn warm(&self) -> usize {
        self.shared.pool.ready()
    }

    /// Ends the warm sessions. New ones are not started after the tasks' shutdown.
    pub async fn stop(&self) {
        for session in self.shared.pool.close() {
            session.end(true).await;
        }
    }
}

/// Makes the directory that those of the sessions are in, without any of an earlier life but those to keep. Each session
/// passes through it to its own, and cannot see the others.
fn begin_anew(directory: &Path, keep: &BTreeSet<SessionId>) -> std::io::Result<()> {
    match std::fs::create_dir(directory) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let keep: BTreeSet<_> = keep.iter().map(|id| OsString::from(id.to_string())).collect();
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        if keep.contains(&entry.file_name()) {
            continue;
        }
        if entry.file_type()?.is_dir() {
            private::remove(&entry.path())?;
        } else {
            std::fs::remove_file(entry.path())?;
        }
    }
    std::fs::set_permissions(directory, std::fs::Permissions::from_mode(0o711))
}
