//! A program that was started: its streams, its end, and the proof that nothing of it is left.
//!
//! One task per jail owns the jail's process and reads its reports; everybody else sees a watch channel. So no lock
//! is held while something is waited for, and whoever stops waiting takes nothing with him.

use super::confine::Confined;
use super::protocol::{self, Command, Policy, Report};
use super::{Exit, Gone, Sandbox, Signal, Spec, StartError, StillAlive, jail, orphans, tree};
use std::future::pending;
use std::io::{self, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as BlockingStream;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::process::{Child, ChildStderr, ChildStdout};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};

/// How long to wait between two looks at what refuses to die.
const AGAIN: Duration = Duration::from_millis(5);

/// A started program. Dropping it ends everything below its jail, without waiting for that.
#[derive(Debug)]
pub struct Process {
    handle: ProcessHandle,
    stdout: Option<ChildStdout>,
    stderr: Option<ChildStderr>,
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
}

/// Levels, each set once and for all.
#[derive(Clone, Debug, Default)]
struct State {
    confined: Option<Confined>,
    started: Option<Result<u32, (String, String)>>,
    exit: Option<Exit>,
    gone: Option<Gone>,
}

pub(super) async fn start(sandbox: &Sandbox, spec: Spec) -> Result<Process, StartError> {
    let name = spec.name.clone();
    let process = spawn(sandbox, spec).map_err(|source| StartError::Jail { name: name.clone(), source })?;
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

#[expect(clippy::disallowed_methods, reason = "the one place that starts processes")]
fn spawn(sandbox: &Sandbox, spec: Spec) -> io::Result<Process> {
    let policy = protocol::line(&Policy::of(&spec))?;
    let (ours, theirs) = BlockingStream::pair()?;
    ours.set_nonblocking(true)?;
    let control = ours.try_clone()?;
    let reports = UnixStream::from_std(ours)?;

    let mut command = tokio::process::Command::new(sandbox.executable.as_path());
    // The jail gets nothing of the sidecar's environment: whoever has its user can read it there.
    command.arg(jail::SUBCOMMAND).arg(&spec.name).env_clear().current_dir("/");
    command.stdin(OwnedFd::from(theirs)).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = orphans::register(|| command.spawn(), Child::id)?;
    // It holds the jail's end of the socket, whose end of file would never come.
    drop(command);

    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let jail = child.id().and_then(|pid| i32::try_from(pid).ok()).unwrap_or_default();
    let (sender, state) = watch::channel(State::default());
    sandbox.live.fetch_add(1, Ordering::AcqRel);
    let supervisor =
        Supervisor { name: spec.name.clone(), jail, child, state: sender, live: Arc::clone(&sandbox.live) };
    sandbox.tasks.spawn("jail", supervisor.run(reports, policy));
    let shared = Arc::new(Shared { name: spec.name, jail, control });
    Ok(Process { handle: ProcessHandle { shared, state }, stdout, stderr })
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

    /// Waits for the proof that nothing is left, of the program and of all that descends from it.
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
        let end = Instant::now() + deadline;
        self.command(&Command::Kill(true));
        if let Ok(gone) = timeout(deadline / 2, self.gone()).await {
            return Ok(gone);
        }
        let Shared { name, jail, .. } = &*self.shared;
        tracing::warn!(name, jail, "the jail does not answer: killing it and all below it from outside");
        loop {
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
}

impl Supervisor {
    async fn run(mut self, mut socket: UnixStream, policy: Vec<u8>) {
        // If the jail is gone already, the first read says so.
        let _ = socket.write_all(&policy).await;
        let mut lines = BufReader::new(socket).lines();
        let mut cpu_seconds = None;
        let mut nothing_started = false;
        while let Ok(Some(line)) = lines.next_line().await {
            match serde_json::from_str(&line) {
                Ok(Report::Confined(confined)) => self.set(|state| state.confined = Some(confined)),
                Ok(Report::Started { pid }) => self.set(|state| state.started = Some(Ok(pid))),
                Ok(Report::Failed { step, error }) => {
                    nothing_started = true;
                    self.set(|state| state.started = Some(Err((step, error))));
                }
                Ok(Report::Exited(exit)) => self.set(|state| state.exit = Some(exit)),
                Ok(Report::Empty { cpu_seconds: seconds }) => cpu_seconds = Some(seconds),
                Err(error) => tracing::error!(name = self.name, %error, "a jail's report cannot be read"),
            }
        }
        let ended = self.child.wait().await;
        let proven = cpu_seconds.is_some() || nothing_started;
        orphans::forget(self.jail, proven);
        if !proven {
            tracing::warn!(name = self.name, jail = self.jail, ?ended, "a jail was killed: ending what it leaves");
            // Its children are ours since before it could be reaped, and theirs become ours as they die.
            while orphans::sweep() > 0 {
                sleep(AGAIN).await;
            }
        }
        self.live.fetch_sub(1, Ordering::AcqRel);
        self.set(|state| {
            state.exit.get_or_insert(Exit { code: None, signal: None });
            state.gone = Some(Gone { cpu_seconds });
        });
    }

    fn set(&self, change: impl FnOnce(&mut State)) {
        self.state.send_modify(change);
    }
}
