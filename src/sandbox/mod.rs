//! The only place that starts processes, and that may hold `unsafe`.
//!
//! - `Sandbox` starts a program in a jail of its own: this same binary again, which stays as the subreaper of the
//!   program (`jail`, with what the two say to each other in `protocol`).
//! - `process`: a program that was started, and the proof that nothing of it is left.
//! - `confine`: what a program may not do.
//! - `resources`: what a program may use and has used; `cgroup` limits and counts it, and where no group can be made
//!   the jail's own `watch` does what it can.
//! - `disk`: how much a program adds to the disk, counted.
//! - `errand`: what is best done as the user of a program: by this binary, as that user, and confined like it.
//! - `orphans`: what a jail leaves behind when it is killed itself.
//! - `tree`: the process tree as `/proc` shows it.
//! - `tap`: the shell that OpenCode is given, which runs the real one and sends a copy of its output to the sidecar
//!   through an `uplink`, in `frames`.
//! - `terminal`: a pseudo-terminal for a program that a person types to.
//!
//! Killing means that nothing is left, and that there is a proof: the jail, a subreaper, has no child any more. A
//! process group or a pid alone is never taken for it. Nothing here knows OpenCode, Postgres or an execution.

mod cgroup;
pub mod confine;
mod disk;
pub mod errand;
pub mod frames;
pub mod jail;
mod orphans;
mod process;
mod protocol;
mod resources;
mod roll;
pub mod tap;
mod terminal;
mod tree;
mod uplink;
mod watch;

pub use disk::{Added, Disk, DiskSpec};
pub use process::{FreezeError, Process, ProcessHandle};
pub use resources::{Foreseen, KillMeans, Limits, Mechanism, Probe, Resource, ResourceEvents, Resources, Usage};
pub use roll::wait_for_earlier_jails;
pub use terminal::{Terminal, TerminalSize};
pub use tree::Stat;

use crate::tasks::Tasks;
use nix::sys::prctl;
use nix::sys::signal;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt};

/// How much of each stream [`Sandbox::run`] keeps; the rest is read and thrown away.
pub const MAX_CAPTURED: usize = 1024 * 1024;

/// Starts programs, each in a jail of its own. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Sandbox {
    executable: Arc<PathBuf>,
    tasks: Tasks,
    live: Arc<AtomicUsize>,
    resources: Resources,
    roll: Option<Arc<Path>>,
}

/// How often a program's limits are looked at where nothing else was asked for.
const LOOK_EVERY: Duration = Duration::from_millis(200);

impl Sandbox {
    /// `executable` is the `opencode-sidecar` binary itself, as an absolute path: it is started again as the jail.
    /// Makes this process a subreaper, so that it inherits what a jail leaves behind that is killed itself.
    ///
    /// # Errors
    /// The kernel refuses to make this process a subreaper.
    pub fn new(executable: PathBuf, tasks: Tasks) -> io::Result<Self> {
        prctl::set_child_subreaper(true)?;
        let resources = Resources::watched(LOOK_EVERY);
        Ok(Self { executable: Arc::new(executable), tasks, live: Arc::default(), resources, roll: None })
    }

    /// The same, with these to hold [`Spec::limits`]; without, they are watched.
    pub fn with_resources(mut self, resources: Resources) -> Self {
        self.resources = resources;
        self
    }

    /// The same, with a file on which each jail holds a lock for as long as it lives: see [`wait_for_earlier_jails`].
    pub fn with_roll(mut self, path: &Path) -> Self {
        self.roll = Some(path.into());
        self
    }

    /// What holds [`Spec::limits`].
    pub fn resources(&self) -> &Resources {
        &self.resources
    }

    /// Starts a program and waits until it runs. Dropping the future ends whatever it had started.
    ///
    /// # Errors
    /// The jail cannot be started, or one of its steps failed: nothing runs then.
    pub async fn start(&self, spec: Spec) -> Result<Process, StartError> {
        process::start(self, spec).await
    }

    /// Kills and reaps what was orphaned to this process by jails that were killed; returns how many processes it
    /// met, 0 if none is left. Each [`Process`] does this for its own jail; call it once more at shutdown.
    pub fn sweep_orphans(&self) -> usize {
        orphans::sweep()
    }

    /// What of a confinement this host gives: tried, not guessed. Starts two short programs.
    ///
    /// # Errors
    /// They cannot be started, or do not end.
    pub async fn offers(&self) -> Result<confine::Offers, RunError> {
        confine::ask_offers(self).await
    }

    /// The users that processes of this machine have now, as far as `/proc` shows them.
    pub fn users(&self) -> BTreeSet<u32> {
        tree::users()
    }

    /// Counts what is added beneath directories from now on, until the result is dropped. See [`DiskSpec`] for what;
    /// it returns when what is there already is counted.
    ///
    /// # Errors
    /// A directory cannot be opened.
    pub async fn watch_disk(&self, spec: DiskSpec) -> io::Result<Disk> {
        Disk::start(&self.tasks, spec).await
    }

    /// How many of the programs started here are not yet proven to have left nothing.
    pub fn live(&self) -> usize {
        self.live.load(Ordering::Acquire)
    }

    /// Runs a short program to its end and captures its output, at most [`MAX_CAPTURED`] of each stream.
    ///
    /// # Errors
    /// It cannot be started, does not end within `deadline` (it is killed then), or its output cannot be read. How it
    /// ended is no error here: look at [`Output::exit`].
    pub async fn run(&self, spec: Spec, deadline: Duration) -> Result<Output, RunError> {
        let name = spec.name.clone();
        let work = async {
            let mut process = self.start(spec).await?;
            let (stdout, stderr) = (process.take_stdout(), process.take_stderr());
            let read = |source| RunError::Read { name: name.clone(), source };
            let (stdout, stderr) = tokio::try_join!(capture(stdout), capture(stderr)).map_err(read)?;
            let exit = process.exited().await;
            process.gone().await;
            Ok(Output { exit, stdout, stderr })
        };
        // On the deadline the future is dropped and the process with it, which ends everything below its jail.
        match tokio::time::timeout(deadline, work).await {
            Ok(result) => result,
            Err(_) => Err(RunError::Deadline { name: name.clone(), deadline }),
        }
    }
}

async fn capture(stream: Option<impl AsyncRead + Unpin>) -> io::Result<Vec<u8>> {
    let mut kept = Vec::new();
    if let Some(mut stream) = stream {
        (&mut stream).take(MAX_CAPTURED as u64).read_to_end(&mut kept).await?;
        tokio::io::copy(&mut stream, &mut tokio::io::sink()).await?;
    }
    Ok(kept)
}

/// The `oom_score_adj` of what the kernel ends first when memory runs out: the commands that a confined program runs by
/// the shell tap have it.
pub const MOST_OOM_SCORE_ADJ: i32 = 1000;

/// A program to start.
#[derive(Clone)]
pub struct Spec {
    /// What it is called in logs and errors, and in the jail's command line: nothing secret.
    pub name: String,
    /// Its path; a bare name is looked up in the `PATH` of `env`.
    pub program: PathBuf,
    /// Its arguments. Every local user can read them: nothing secret.
    pub args: Vec<OsString>,
    /// Its whole environment; nothing is inherited.
    pub env: Vec<(OsString, OsString)>,
    /// Its working directory, an absolute path that exists.
    pub cwd: PathBuf,
    /// The user that it runs as; without one, the sidecar's own. Needs root. Supplementary groups are dropped, but
    /// for those of `confinement`.
    pub user: Option<User>,
    /// What the jail sends it if the sidecar dies.
    pub stop_signal: Signal,
    /// How long it may take over that before it is killed. At most an hour.
    pub stop_grace: Duration,
    /// How readily the kernel kills it when memory runs out, -1000 to [`MOST_OOM_SCORE_ADJ`]; less than the sidecar's own needs root.
    pub oom_score_adj: Option<i32>,
    /// The permissions that files it makes lack, such as `0o022`; without one, the sidecar's own.
    pub umask: Option<u32>,
    /// What it is confined to; without it, it may do whatever its user may.
    pub confinement: Option<confine::Confinement>,
    /// What it may use together with all that descends from it, and that its use is measured. Without, neither.
    pub limits: Option<Limits>,
    /// Runs it in the control group of another program, counted and limited together with that one, and killed with
    /// it. Where that one has no group (its limits are watched), `limits` hold for this one by itself.
    pub beside: Option<ProcessHandle>,
    /// Gives it a terminal of this size as its standard input, output and error, and as the controlling terminal of a
    /// session of its own; see [`Process::take_terminal`]. Without one, its input is empty and its output are pipes.
    pub terminal: Option<TerminalSize>,
    /// Is told of the connects that its confinement refuses, where [`confine::Protection::Egress`] is in force.
    pub refused: Option<RefusedConnects>,
}

/// Takes in where a confined program wanted to connect to and was refused.
#[derive(Clone)]
pub struct RefusedConnects(Arc<dyn Fn(Option<SocketAddr>, u64) + Send + Sync>);

impl RefusedConnects {
    /// `told` gets the address and how many connects to it were refused since the last call; `None` stands for more
    /// addresses than are told apart. The first comes at once, later ones within about 100 ms. It must not wait.
    pub fn new(told: impl Fn(Option<SocketAddr>, u64) + Send + Sync + 'static) -> Self {
        Self(Arc::new(told))
    }
}

impl fmt::Debug for RefusedConnects {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RefusedConnects")
    }
}

impl Spec {
    /// A program without arguments or environment, in `/`, killed at once if the sidecar dies.
    pub fn new(name: impl Into<String>, program: impl Into<PathBuf>) -> Self {
        Self {
            name: name.into(),
            program: program.into(),
            args: Vec::new(),
            env: Vec::new(),
            cwd: PathBuf::from("/"),
            user: None,
            stop_signal: Signal::Term,
            stop_grace: Duration::ZERO,
            oom_score_adj: None,
            umask: None,
            confinement: None,
            limits: None,
            beside: None,
            terminal: None,
            refused: None,
        }
    }
}

impl fmt::Debug for Spec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Spec")
            .field("name", &self.name)
            .field("program", &self.program)
            .field("args", &self.args)
            .field("env_names", &self.env.iter().map(|(name, _)| name).collect::<Vec<_>>())
            .field("cwd", &self.cwd)
            .field("user", &self.user)
            .field("stop_signal", &self.stop_signal)
            .field("stop_grace", &self.stop_grace)
            .field("oom_score_adj", &self.oom_score_adj)
            .field("umask", &self.umask)
            .field("confinement", &self.confinement)
            .field("limits", &self.limits)
            .field("beside", &self.beside.as_ref().map(ProcessHandle::name))
            .field("terminal", &self.terminal)
            .finish()
    }
}

/// A user to run as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct User {
    /// The user's id.
    pub uid: u32,
    /// The id of its only group.
    pub gid: u32,
}

/// The signals that a program can be sent. There is no kill among them: that is [`Process::kill`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Signal {
    /// SIGTERM.
    Term,
    /// SIGINT.
    Int,
    /// SIGHUP.
    Hup,
}

impl Signal {
    fn number(self) -> signal::Signal {
        match self {
            Self::Term => signal::SIGTERM,
            Self::Int => signal::SIGINT,
            Self::Hup => signal::SIGHUP,
        }
    }
}

/// How a program ended. Both empty: not known, because its jail was killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// The code that it returned.
    pub code: Option<i32>,
    /// The number of the signal that ended it.
    pub signal: Option<i32>,
}

impl Exit {
    /// Whether it returned 0.
    pub fn success(self) -> bool {
        self.code == Some(0)
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.code, self.signal) {
            (Some(code), _) => write!(f, "exit code {code}"),
            (None, Some(signal)) => write!(f, "signal {signal}"),
            (None, None) => f.write_str("unknown end"),
        }
    }
}

/// The proof that nothing of a program is left.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Gone {
    /// User and system time of all that ran, in seconds. Not known where the jail was killed.
    pub cpu_seconds: Option<f64>,
    /// All that it has used, if it had [`Spec::limits`].
    pub usage: Usage,
    /// How often its limits were felt.
    pub events: ResourceEvents,
    /// What ran out for the program itself, and not only for something that it had started; see
    /// [`ProcessHandle::gone`].
    pub exhausted: Option<Resource>,
}

/// How a program ended that [`Sandbox::run`] ran, and what it wrote.
#[derive(Clone, Debug)]
pub struct Output {
    /// How it ended.
    pub exit: Exit,
    /// What it wrote to its standard output.
    pub stdout: Vec<u8>,
    /// What it wrote to its standard error.
    pub stderr: Vec<u8>,
}

/// A program could not be started. Nothing of it runs.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The jail itself.
    #[error("cannot start the jail of {name}")]
    Jail {
        /// The program's name.
        name: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The control group with its limits.
    #[error("cannot limit the resources of {name}")]
    Resources {
        /// The program's name.
        name: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// One of the jail's steps.
    #[error("cannot start {name}: step {step} failed: {detail}")]
    Step {
        /// The program's name.
        name: String,
        /// The step's name: `exec`, `cwd`, `cgroup`, `subreaper` and so on.
        step: String,
        /// What the step said.
        detail: String,
    },
    /// The jail ended without a word: somebody killed it.
    #[error("the jail of {name} ended before its program ran")]
    Lost {
        /// The program's name.
        name: String,
    },
}

/// A program could not be run to its end.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// It did not start.
    #[error(transparent)]
    Start(#[from] StartError),
    /// It took too long, and was killed.
    #[error("{name} did not end within {deadline:?}")]
    Deadline {
        /// The program's name.
        name: String,
        /// How long it had.
        deadline: Duration,
    },
    /// Its output could not be read.
    #[error("cannot read the output of {name}")]
    Read {
        /// The program's name.
        name: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Something could not be killed in time. The attempt goes on: [`Process::gone`] still tells when it is done.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{name} is not gone after {after:?}; left: {}", list(.left))]
pub struct StillAlive {
    /// The program's name.
    pub name: String,
    /// How long was tried.
    pub after: Duration,
    /// What still lives. Empty: only the jail's report is missing.
    pub left: Vec<Stat>,
}

fn list(left: &[Stat]) -> String {
    left.iter().map(Stat::to_string).collect::<Vec<_>>().join(", ")
}
