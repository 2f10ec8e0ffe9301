//! A program that was started: its streams, its end, and the proof that nothing of it is left.
//!
//! One task per jail owns the jail's process and reads its reports; everybody else sees a watch channel. So no lock
//! is held while something is waited for, and whoever stops waiting takes nothing with him.

use super::cgroup::{Alarm, Group};
use super::confine::Confined;
use super::protocol::{self, Command, Policy, Report};
use super::resources::{Resource, ResourceEvents, Usage};
use super::terminal::{self, Terminal};
use super::watch::{Io, Sample};
use super::{Exit, Gone, Limits, RefusedConnects, Sandbox, Signal, Spec, StartError, StillAlive, jail, orphans, tree};
use nix::sys::signal::Signal as Raw;
use std::future::pending;
use std::io::{self, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as BlockingStream;
use std::process::Stdio;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::process::{Child, ChildStderr, ChildStdout};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};

/// How long to wait between two looks at what refuses to die.
const AGAIN: Duration = Duration::from_millis(5);
/// How long before a program's end a limit may have been felt to be taken for the reason of that end: as long as a
/// large process may take to die.
const RELATED: Duration = Duration::from_secs(3);

/// A started program. Dropping it ends everything below its jail, without waiting for that.
#[derive(Debug)]
pub struct Process {
    handle: ProcessHandle,
    stdout: Option<ChildStdout>,
    stderr: Option<ChildStderr>,
    terminal: Option<Terminal>,
}

/// Signals, waits for and kills a started program. Does not keep it alive.
#[derive(Clone, Debug)]
pub struct ProcessHandle {
    shared: Arc<Shared>,
    state: watch::Receiver<State>,
}

#[derive(Debug)]
struct Shared {
    name: String,
    jail: i32,
    control: BlockingStream,
    /// Its group, where it has one of its own; there while something is in it.
    group: Option<Weak<Group>>,
}

/// Levels, each set once and for all.
#[derive(Clone, Debug, Default)]
struct State {
    confined: Option<Confined>,
    started: Option<Result<u32, (String, String)>>,
    exit: Option<Exit>,
    gone: Option<Gone>,
    /// What the jail has seen. A level that changes, as is the next.
    seen: Option<Sample>,
    events: ResourceEvents,
}

/// A program cannot be frozen or thawed.
#[derive(Debug, thiserror::Error)]
pub enum FreezeError {
    /// It is in no group that could be frozen.
    #[error("this host has no way to freeze {0}")]
    Unsupported(String),
    /// The kernel refuses, or the program has ended.
    #[error("{name} cannot be frozen or thawed")]
    Refused {
        /// The program's name.
        name: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Something in it hangs inside the kernel.
    #[error("{name} is not frozen or thawed after {after:?}")]
    Late {
        /// The program's name.
        name: String,
        /// How long was waited.
        after: Duration,
    },
}

pub(super) async fn start(sandbox: &Sandbox, spec: Spec) -> Result<Process, StartError> {
    let name = spec.name.clone();
    let group = match (&spec.beside, spec.limits) {
        (Some(other), _) => {
            let joined = other.group().map_err(|source| StartError::Resources { name: name.clone(), source })?;
            joined.map(Membership::Beside)
        }
        (None, Some(limits)) => make_group(sandbox, &name, limits).await?.map(Arc::new).map(Membership::Own),
        (None, None) => None,
    };
    let process = spawn(sandbox, spec, group).map_err(|source| StartError::Jail { name: name.clone(), source })?;
    let state = process.handle.reached(|state| state.started.is_some() || state.gone.is_some()).await;
    match state.started {
        Some(Ok(_)) => Ok(process),
        Some(Err((step, detail))) => {
            process.gone().await;
            Err(StartError::Step { name, step, detail })
        }
        None => Err(StartError::Lost { name }),
    }
}

/// The group that a program runs in.
#[derive(Debug)]
enum Membership {
    Own(Arc<Group>),
    /// Another program's. Held so that it is not removed before this program has left it.
    Beside(Arc<Group>),
}

impl Membership {
    fn group(&self) -> &Arc<Group> {
        match self {
            Self::Own(group) | Self::Beside(group) => group,
        }
    }

    /// The group, where this program's end is the end of all that is in it.
    fn own(&self) -> Option<&Arc<Group>> {
        match self {
            Self::Own(group) => Some(group),
            Self::Beside(_) => None,
        }
    }
}

async fn make_group(sandbox: &Sandbox, name: &str, limits: Limits) -> Result<Option<Group>, StartError> {
    let (resources, called) = (sandbox.resources.clone(), name.to_owned());
    let made = sandbox.tasks.spawn_blocking(move || resources.group(&called, &limits)).await;
    // Only a panic or the end of the runtime keeps it from its end.
    made.unwrap_or_else(|lost| Err(io::Error::other(lost)))
        .map_err(|source| StartError::Resources { name: name.to_owned(), source })
}

#[expect(clippy::disallowed_methods, reason = "the one place that starts processes")]
fn spawn(sandbox: &Sandbox, spec: Spec, group: Option<Membership>) -> io::Result<Process> {
    let mut policy = Policy::of(&spec);
    policy.group = group.as_ref().map(|group| group.group().layout().clone());
    policy.beside = matches!(group, Some(Membership::Beside(_)));
    // What runs in another program's group is in that one's account.
    policy.watch = spec.limits.filter(|_| !policy.beside).and_then(|limits| sandbox.resources.watch(&limits));
    if let Some(roll) = &sandbox.roll {
        policy.set_roll(roll);
    }
    let watched = policy.watch.is_some();
    let policy = protocol::line(&policy)?;
    let own = group.as_ref().and_then(Membership::own);
    let (alarm, weak) = (own.map(|group| group.alarm()), own.map(Arc::downgrade));
    let (ours, theirs) = BlockingStream::pair()?;
    ours.set_nonblocking(true)?;
    let control = ours.try_clone()?;
    let reports = UnixStream::from_std(ours)?;

    let mut command = tokio::process::Command::new(sandbox.executable.as_path());
    // The jail gets nothing of the sidecar's environment: whoever has its user can read it there.
    command.arg(jail::SUBCOMMAND).arg(&spec.name).env_clear().current_dir("/");
    command.stdin(OwnedFd::from(theirs));
    let terminal = match spec.terminal {
        Some(size) => {
            let (terminal, slave) = terminal::open(size, spec.user)?;
            command.stdout(slave.try_clone()?).stderr(slave);
            Some(terminal)
        }
        None => {
            command.stdout(Stdio::piped()).stderr(Stdio::piped());
            None
        }
    };
    let mut child = orphans::register(|| command.spawn(), Child::id)?;
    // It holds the jail's end of the socket and the program's of the terminal, whose end of file would never come.
    drop(command);

    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let jail = child.id().and_then(|pid| i32::try_from(pid).ok()).unwrap_or_default();
    let (sender, state) = watch::channel(State::default());
    sandbox.live.fetch_add(1, Ordering::AcqRel);
    let supervisor = Supervisor {
        name: spec.name.clone(),
        jail,
        child,
        state: sender,
        live: Arc::clone(&sandbox.live),
        group,
        alarm,
        watched,
        felt: Felt::default(),
        refused: spec.refused,
    };
    sandbox.tasks.spawn("jail", supervisor.run(reports, policy));
    let shared = Arc::new(Shared { name: spec.name, jail, control, group: weak });
    Ok(Process { handle: ProcessHandle { shared, state }, stdout, stderr, terminal })
}

impl Process {
    /// The id of the program, not of its jail.
    pub fn pid(&self) -> u32 {
        self.handle.pid()
    }

    /// What is in force for it, as its jail has seen it done; `None` for one that is not confined.
    pub fn confined(&self) -> Option<Confined> {
        self.handle.state.borrow().confined.clone()
    }

    /// Its standard output, once. Somebody has to read it.
    pub fn take_stdout(&mut self) -> Option<ChildStdout> {
        self.stdout.take()
    }

    /// Its standard error, once. Somebody has to read it.
    pub fn take_stderr(&mut self) -> Option<ChildStderr> {
        self.stderr.take()
    }

    /// Our side of its terminal, once; `None` where it has none. Somebody has to read it.
    pub fn take_terminal(&mut self) -> Option<Terminal> {
        self.terminal.take()
    }

    /// A handle for others.
    pub fn handle(&self) -> ProcessHandle {
        self.handle.clone()
    }

    /// See [`ProcessHandle::signal`].
    pub fn signal(&self, signal: Signal) {
        self.handle.signal(signal);
    }

    /// See [`ProcessHandle::exited`].
    pub async fn exited(&self) -> Exit {
        self.handle.exited().await
    }

    /// See [`ProcessHandle::kill`].
    ///
    /// # Errors
    /// Something still lives after `deadline`.
    pub async fn kill(&self, deadline: Duration) -> Result<Gone, StillAlive> {
        self.handle.kill(deadline).await
    }

    /// See [`ProcessHandle::gone`].
    pub async fn gone(&self) -> Gone {
        self.handle.gone().await
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // The jail sees the end of its commands and ends everything. It can still report.
        let _ = self.handle.shared.control.shutdown(Shutdown::Write);
    }
}

impl ProcessHandle {
    /// The id of the program, not of its jail.
    pub fn pid(&self) -> u32 {
        match self.state.borrow().started {
            Some(Ok(pid)) => pid,
            _ => 0,
        }
    }

    pub(super) fn name(&self) -> &str {
        &self.shared.name
    }

    /// Its group; `None` where it has none of its own.
    ///
    /// # Errors
    /// It has ended.
    fn group(&self) -> io::Result<Option<Arc<Group>>> {
        let ended = || io::Error::new(io::ErrorKind::NotFound, format!("{} has ended", self.shared.name));
        match &self.shared.group {
            _ if self.state.borrow().gone.is_some() => Err(ended()),
            Some(group) => group.upgrade().map(Some).ok_or_else(ended),
            None => Ok(None),
        }
    }

    fn living_group(&self) -> Option<Arc<Group>> {
        self.shared.group.as_ref()?.upgrade()
    }

    /// The id of its jail, while it has one.
    pub(super) fn jail(&self) -> Option<i32> {
        self.state.borrow().gone.is_none().then_some(self.shared.jail)
    }

    /// Sends the program, and nothing below it, a signal. Does nothing after its end.
    pub fn signal(&self, signal: Signal) {
        self.command(&Command::Signal(signal));
    }

    /// Waits for the program's own end. What it started is killed then, which may take a moment longer: see
    /// [`ProcessHandle::gone`].
    pub async fn exited(&self) -> Exit {
        match self.reached(|state| state.exit.is_some()).await.exit {
            Some(exit) => exit,
            None => pending().await,
        }
    }

    /// Waits for the proof that nothing is left, of the program and of all that descends from it: its jail has no
    /// child any more, and its group, where it has one, holds no process.
    ///
    /// [`Gone::exhausted`] tells "the program was hit" from "something that it had started was". Watched limits end
    /// everything, so there it is known. The kernel's own OOM killer does not say whom it took, so there it is
    /// concluded: the program ended by SIGKILL, not on behalf of the jail, no more than 3 s after a kill was counted.
    /// Likewise of refused forks and a program that ended with an error of its own.
    pub async fn gone(&self) -> Gone {
        match self.reached(|state| state.gone.is_some()).await.gone {
            Some(gone) => gone,
            None => pending().await,
        }
    }

    /// Kills the program and all that descends from it, and returns with the proof that nothing is left. A jail that
    /// does not manage it within half the time is killed itself, and its descendants from here.
    ///
    /// # Errors
    /// Something still lives after `deadline`, which the kernel allows only to a process that hangs inside it.
    pub async fn kill(&self, deadline: Duration) -> Result<Gone, StillAlive> {
        self.command(&Command::Kill(true));
        if let Ok(gone) = timeout(deadline / 2, self.gone()).await {
            return Ok(gone);
        }
        // From now, so that a machine that stood still meanwhile takes nothing from it.
        let end = Instant::now() + deadline / 2;
        let Shared { name, jail, .. } = &*self.shared;
        tracing::warn!(name, jail, "the jail does not answer: killing it and all below it from outside");
        loop {
            if let Some(group) = self.living_group() {
                group.kill();
            }
            orphans::while_registered(*jail, || {
                tree::kill_all(|stat| stat.parent == *jail || stat.pid == *jail);
            });
            let now = Instant::now();
            if let Ok(gone) = timeout(AGAIN.min(end.saturating_duration_since(now)), self.gone()).await {
                return Ok(gone);
            }
            if now >= end {
                let mut left = orphans::living();
                orphans::while_registered(*jail, || left.extend(tree::living_below(*jail)));
                return Err(StillAlive { name: name.clone(), after: deadline, left });
            }
        }
    }

    /// What it has used so far; nothing without [`Spec::limits`]. What only its jail sees is as old as the jail's last
    /// look, at most about a second. After its end, the last word.
    pub fn usage(&self) -> Usage {
        let state = self.state.borrow().clone();
        if let Some(gone) = state.gone {
            return gone.usage;
        }
        let counted = self.living_group().map(|group| group.usage()).unwrap_or_default();
        counted.or(state.seen.map(Usage::from).unwrap_or_default())
    }

    /// How often its limits were felt by now. `None` once the program has ended.
    pub fn resource_events_now(&self) -> Option<ResourceEvents> {
        let State { exit, events, .. } = self.state.borrow().clone();
        match exit {
            Some(_) => None,
            None => Some(self.living_group().map_or(events, |group| group.events(events))),
        }
    }

    /// Waits until they were felt more often than is known already. For ever, if nothing is felt any more before its end.
    pub async fn resource_events_beyond(&self, known: ResourceEvents) -> ResourceEvents {
        self.reached(|state| state.events.exceed(known)).await.events
    }

    /// Stops everything in its group where it stands, and returns when the kernel says that nothing in it runs. A
    /// frozen program can be killed; a signal reaches it when it is thawed.
    ///
    /// # Errors
    /// [`FreezeError`]. Where it is late, it may still happen.
    pub async fn freeze(&self, deadline: Duration) -> Result<(), FreezeError> {
        self.set_frozen(true, deadline).await
    }

    /// Lets it go on.
    ///
    /// # Errors
    /// [`FreezeError`].
    pub async fn thaw(&self, deadline: Duration) -> Result<(), FreezeError> {
        self.set_frozen(false, deadline).await
    }

    /// Whether nothing of it runs or can run, as the kernel says. `None`: it cannot be frozen here, or has ended.
    pub fn is_frozen(&self) -> Option<bool> {
        self.living_group().and_then(|group| group.is_frozen())
    }

    async fn set_frozen(&self, frozen: bool, deadline: Duration) -> Result<(), FreezeError> {
        let name = || self.shared.name.clone();
        if self.state.borrow().gone.is_some() {
            return Err(FreezeError::Refused { name: name(), source: io::ErrorKind::NotFound.into() });
        }
        let group = self.living_group().filter(|group| group.has_freezer());
        let group = group.ok_or_else(|| FreezeError::Unsupported(name()))?;
        match timeout(deadline, group.freeze(frozen)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(source)) => Err(FreezeError::Refused { name: name(), source }),
            Err(_) => Err(FreezeError::Late { name: name(), after: deadline }),
        }
    }

    fn command(&self, command: &Command) {
        // A socket that is full or closed belongs to a jail that is stuck or gone, which the waits notice.
        if let Ok(line) = protocol::line(command) {
            let _ = (&self.shared.control).write_all(&line);
        }
    }

    /// Waits for a level. The sender goes away before only together with the whole runtime.
    async fn reached(&self, level: impl FnMut(&State) -> bool) -> State {
        let mut state = self.state.clone();
        // Cloned first: the guard must not be held over the other branch's wait.
        let reached = state.wait_for(level).await.map(|state| state.clone());
        match reached {
            Ok(state) => state,
            Err(_) => pending().await,
        }
    }
}

/// The owner of one jail's process.
struct Supervisor {
    name: String,
    jail: i32,
    child: Child,
    state: watch::Sender<State>,
    live: Arc<AtomicUsize>,
    group: Option<Membership>,
    alarm: Option<Alarm>,
    /// Whether the jail looks at what it uses.
    watched: bool,
    felt: Felt,
    refused: Option<RefusedConnects>,
}

/// What is known about the reason of the program's end.
#[derive(Default)]
struct Felt {
    events: ResourceEvents,
    oom_kill: Option<Instant>,
    fork_refused: Option<Instant>,
    /// Whether the jail kills, so that the program's end says nothing of itself.
    killing: bool,
    exhausted: Option<Resource>,
}

impl Felt {
    fn update(&mut self, events: ResourceEvents) {
        let now = Instant::now();
        if events.oom_kills > self.events.oom_kills {
            self.oom_kill = Some(now);
        }
        // What is refused to its tools alone does not end the program.
        let own = |events: ResourceEvents| events.forks_refused.saturating_sub(events.tool_forks_refused);
        if own(events) > own(self.events) {
            self.fork_refused = Some(now);
        }
        self.events = events;
    }

    fn ended(&mut self, exit: Exit) {
        let related = |at: Option<Instant>| at.is_some_and(|at| at.elapsed() <= RELATED);
        if self.killing || self.exhausted.is_some() {
            return;
        }
        if exit.signal == Some(Raw::SIGKILL as i32) && related(self.oom_kill) {
            self.exhausted = Some(Resource::Memory);
        } else if !exit.success() && related(self.fork_refused) {
            self.exhausted = Some(Resource::Pids);
        }
    }
}

impl Supervisor {
    async fn run(mut self, mut socket: UnixStream, policy: Vec<u8>) {
        // If the jail is gone already, the first read says so.
        let _ = socket.write_all(&policy).await;
        let mut lines = BufReader::new(socket).lines();
        let mut end: Option<(f64, Option<Io>)> = None;
        let mut nothing_started = false;
        loop {
            let line = tokio::select! {
                line = lines.next_line() => line,
                () = rings(self.alarm.as_ref()) => {
                    self.feel();
                    continue;
                }
            };
            let Ok(Some(line)) = line else { break };
            match serde_json::from_str(&line) {
                Ok(Report::Confined(confined)) => self.set(|state| state.confined = Some(confined)),
                Ok(Report::Started { pid }) => self.set(|state| state.started = Some(Ok(pid))),
                Ok(Report::Failed { step, error }) => {
                    nothing_started = true;
                    self.set(|state| state.started = Some(Err((step, error))));
                }
                Ok(Report::Exited(exit)) => {
                    self.feel();
                    self.felt.ended(exit);
                    self.set(|state| state.exit = Some(exit));
                }
                Ok(Report::Seen(sample)) => self.set(|state| state.seen = Some(sample)),
                Ok(Report::Exhausted(resource)) => self.felt.exhausted = Some(resource),
                Ok(Report::Refused { to, count }) => {
                    if let Some(RefusedConnects(told)) = &self.refused {
                        told(to, count);
                    }
                }
                Ok(Report::Killing(_)) => self.felt.killing = true,
                Ok(Report::Empty { cpu_seconds, io }) => end = Some((cpu_seconds, io)),
                Err(error) => tracing::error!(name = self.name, %error, "a jail's report cannot be read"),
            }
        }
        let ended = self.child.wait().await;
        let proven = end.is_some() || nothing_started;
        orphans::forget(self.jail, proven);
        if !proven {
            tracing::warn!(name = self.name, jail = self.jail, ?ended, "a jail was killed: ending what it leaves");
            // Its children are ours since before it could be reaped, and theirs become ours as they die.
            while orphans::sweep() > 0 {
                sleep(AGAIN).await;
            }
        }
        if let Some(group) = self.own_group() {
            group.emptied().await;
        }
        self.feel();
        let gone = Gone {
            cpu_seconds: end.map(|(cpu_seconds, _)| cpu_seconds),
            usage: self.usage(end),
            events: self.felt.events,
            exhausted: self.felt.exhausted,
        };
        // With the last one that holds it, it is removed.
        self.group = None;
        self.live.fetch_sub(1, Ordering::AcqRel);
        self.set(|state| {
            state.exit.get_or_insert(Exit { code: None, signal: None });
            state.gone = Some(gone);
        });
    }

    /// The group that is this program's own.
    fn own_group(&self) -> Option<&Arc<Group>> {
        self.group.as_ref().and_then(Membership::own)
    }

    /// Looks how often the limits were felt.
    fn feel(&mut self) {
        if let Some(group) = self.own_group() {
            let events = group.events(self.felt.events);
            if events != self.felt.events {
                self.felt.update(events);
                self.set(|state| state.events = events);
            }
        }
    }

    /// All that was used, now that nothing is left.
    fn usage(&self, end: Option<(f64, Option<Io>)>) -> Usage {
        let counted = self.own_group().map(|group| group.usage()).unwrap_or_default();
        if !self.watched {
            return counted;
        }
        let seen = self.state.borrow().seen.unwrap_or_default();
        let seen = match end {
            // Everything was waited for by now, so the jail's own account has all of it.
            Some((cpu_seconds, io)) => Sample { cpu_seconds, io, ..seen },
            None => seen,
        };
        // What was held at the last look is held no more.
        let seen = Sample { memory_bytes: seen.memory_bytes.map(|_| 0), pids: seen.pids.map(|_| 0), ..seen };
        counted.or(seen.into())
    }

    fn set(&self, change: impl FnOnce(&mut State)) {
        self.state.send_modify(change);
    }
}

async fn rings(alarm: Option<&Alarm>) {
    match alarm {
        Some(alarm) => alarm.rings().await,
        None => pending().await,
    }
}

impl From<Sample> for Usage {
    fn from(sample: Sample) -> Self {
        Self {
            cpu_seconds: Some(sample.cpu_seconds),
            memory_bytes: sample.memory_bytes,
            memory_peak_bytes: sample.memory_peak_bytes,
            pids: sample.pids,
            pids_peak: sample.pids_peak,
            read_bytes: sample.io.map(|io| io.read),
            written_bytes: sample.io.map(|io| io.written),
        }
    }
}
