//! Terminals: shells that people type to, inside a session.
//!
//! Each is a process of its own, beside the session's OpenCode: started as that was and confined likewise, in its control
//! group, without any of its secrets but the credential for the way out. One task owns it from its start to the proof that nothing of it is left, so it ends
//! whatever becomes of the person, and none outlives the OpenCode that it stands beside.

use crate::sandbox::tap::DEFAULT_SHELL;
use crate::sandbox::{self, Exit, Process, ProcessHandle, Sandbox, Spec, StartError, TerminalSize};
use crate::tasks::Tasks;
use futures_util::FutureExt;
use std::ffi::OsString;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{oneshot, watch};
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};

/// The most terminals of a session that are open at once.
pub const MAX_TERMINALS: usize = 4;
/// How long a shell may take to end when its terminal has hung up: it writes its history then.
const HANG_UP: Duration = Duration::from_secs(1);
/// How long the kill may take until it is given up, with an error.
const KILL: Duration = Duration::from_secs(10);
/// What a terminal that shows a page in a browser can do.
const TERM: &str = "xterm-256color";

/// Why there is no terminal.
#[derive(Debug, thiserror::Error)]
pub enum TerminalError {
    #[error("{MAX_TERMINALS} terminals of the session are open")]
    TooMany,
    #[error("the process of the session ends")]
    Ending,
    #[error("the shell did not start")]
    Start(#[from] StartError),
}

/// The terminals of one OpenCode process. Cheap to clone; a clone keeps nothing alive.
#[derive(Clone, Debug)]
pub struct Terminals {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    sandbox: Sandbox,
    tasks: Tasks,
    /// The shell, but for the size of its terminal.
    spec: Spec,
    opencode: ProcessHandle,
    state: watch::Sender<State>,
    closing: CancellationToken,
}

#[derive(Clone, Copy, Debug)]
struct State {
    open: usize,
    closed: bool,
    /// Whether something of one could not be ended.
    left: bool,
    /// When somebody opened one last, typed or closed one.
    used_at: Option<Instant>,
}

impl Terminals {
    /// None yet, beside `opencode`, which `companion` is to be like; with this environment, which has no
    /// secret but the credential for the way out.
    pub(super) fn new(
        sandbox: Sandbox,
        tasks: Tasks,
        opencode: ProcessHandle,
        companion: impl FnOnce(&str, &Path) -> Spec,
        mut env: Vec<(OsString, OsString)>,
    ) -> Self {
        if !env.iter().any(|(name, _)| name == "LANG" || name == "LC_ALL") {
            // What is typed in another alphabet is to be shown as that.
            env.push(("LANG".into(), "C.UTF-8".into()));
        }
        env.push(("TERM".into(), TERM.into()));
        env.push(("SHELL".into(), DEFAULT_SHELL.into()));
        let spec = Spec { env, ..companion("terminal", Path::new(DEFAULT_SHELL)) };
        let state = watch::Sender::new(State { open: 0, closed: false, left: false, used_at: None });
        Self { inner: Arc::new(Inner { sandbox, tasks, spec, opencode, state, closing: CancellationToken::new() }) }
    }

    /// Starts a shell in a terminal.
    ///
    /// # Errors
    /// [`TerminalError`]; nothing of it is left then.
    pub async fn open(&self, size: TerminalSize) -> Result<Terminal, TerminalError> {
        let place = Place::take(&self.inner)?;
        self.inner.used();
        let (sender, opened) = oneshot::channel();
        self.inner.tasks.spawn("terminal", place.own(size, sender));
        // Only the end of the runtime takes the task away without an answer.
        opened.await.unwrap_or(Err(TerminalError::Ending))
    }

    /// Whether none can be opened any more, because OpenCode has ended or is about to.
    pub fn are_closed(&self) -> bool {
        self.inner.state.borrow().closed || self.inner.opencode.exited().now_or_never().is_some()
    }

    /// When somebody opened one last, typed or closed one; `None` where nobody has.
    pub fn used_at(&self) -> Option<Instant> {
        self.inner.state.borrow().used_at
    }

    /// Ends all of them for good, and waits for the proof. `false` where something could not be ended.
    pub(super) async fn close(&self) -> bool {
        self.inner.state.send_modify(|state| state.closed = true);
        self.inner.closing.cancel();
        let mut state = self.inner.state.subscribe();
        // Each has its own limit of time.
        match state.wait_for(|state| state.open == 0).await {
            Ok(state) => !state.left,
            Err(_) => false,
        }
    }
}

impl Inner {
    fn used(&self) {
        self.state.send_modify(|state| state.used_at = Some(Instant::now()));
    }
}

/// One of the places for terminals, given back when it is dropped.
struct Place(Arc<Inner>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.state.send_modify(|state| state.open -= 1);
    }
}

impl Place {
    fn take(inner: &Arc<Inner>) -> Result<Self, TerminalError> {
        let mut refused = None;
        inner.state.send_modify(|state| match state {
            State { closed: true, .. } => refused = Some(TerminalError::Ending),
            State { open: MAX_TERMINALS.., .. } => refused = Some(TerminalError::TooMany),
            state => state.open += 1,
        });
        match refused {
            None => Ok(Self(Arc::clone(inner))),
            Some(refused) => Err(refused),
        }
    }

    /// Owns one, from its start to its end.
    async fn own(self, size: TerminalSize, opened: oneshot::Sender<Result<Terminal, TerminalError>>) {
        let inner = &self.0;
        let spec = Spec { terminal: Some(size), ..inner.spec.clone() };
        let mut process = match inner.sandbox.start(spec).await {
            Ok(process) => process,
            Err(error) => {
                // The place is free before anybody is told.
                drop(self);
                let _ = opened.send(Err(error.into()));
                return;
            }
        };
        let closed = CancellationToken::new();
        if let Some(io) = process.take_terminal() {
            let terminal = Terminal {
                io,
                process: process.handle(),
                inner: Arc::clone(inner),
                _closed: closed.clone().drop_guard(),
            };
            // Where nobody waits for it any more, it is dropped here, and so closed.
            let _ = opened.send(Ok(terminal));
        }
        inner.wait_for_end(&process, &closed).await;
        if let Err(left) = process.kill(KILL).await {
            tracing::error!(?left, "processes of a terminal could not be ended");
            inner.state.send_modify(|state| state.left = true);
        }
        inner.used();
    }
}

impl Inner {
    async fn wait_for_end(&self, process: &Process, closed: &CancellationToken) {
        tokio::select! {
            _ = process.exited() => {}
            _ = self.opencode.exited() => {}
            () = self.closing.cancelled() => {}
            () = closed.cancelled() => {
                // The kernel has told the shell already.
                let _ = tokio::time::timeout(HANG_UP, process.exited()).await;
            }
        }
    }
}

/// A person's side of a shell in a session. When it is dropped, the terminal hangs up, and what the shell leaves is killed.
#[derive(Debug)]
pub struct Terminal {
    io: sandbox::Terminal,
    process: ProcessHandle,
    inner: Arc<Inner>,
    _closed: DropGuard,
}

impl Terminal {
    /// What the shell and its programs have written: at least one byte, or 0 when all have ended and everything was
    /// read. Dropping the wait loses nothing; what is not read stops those who write.
    ///
    /// # Errors
    /// The kernel's.
    pub async fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        self.io.read(buffer).await
    }

    /// Types all of it, and waits for as long as nobody takes it.
    ///
    /// # Errors
    /// The shell is gone.
    pub async fn write_all(&self, bytes: &[u8]) -> io::Result<()> {
        self.inner.used();
        self.io.write_all(bytes).await
    }

    /// Makes the terminal larger or smaller.
    ///
    /// # Errors
    /// The kernel's.
    pub fn resize(&self, size: TerminalSize) -> io::Result<()> {
        self.io.resize(size)
    }

    /// Waits for the shell's end.
    pub async fn exited(&self) -> Exit {
        self.process.exited().await
    }

    /// Whether it ends, or has ended, together with the session's process.
    pub fn is_closing(&self) -> bool {
        self.inner.closing.is_cancelled()
    }
}
