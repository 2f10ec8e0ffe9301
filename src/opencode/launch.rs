//! Starting one `opencode serve` and knowing that it listens.
//!
//! Its port is ours to give, from a range; what counts is the line that it prints itself (OPENCODE.md "Start").
//! Both of its pipes are read for as long as it lives.

use super::profile::Directories;
use crate::sandbox::confine::{Confinement, Namespace, Protection};
use crate::sandbox::{Limits, MOST_OOM_SCORE_ADJ, Process, RefusedConnects, Sandbox, Signal, Spec, StartError, User};
use crate::tasks::Tasks;
use std::collections::VecDeque;
use std::ffi::OsString;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// How often a start is tried anew because the port was taken by somebody else.
const PORT_ATTEMPTS: usize = 3;
/// How many of the process's last lines are kept for an error's sake.
const KEPT_LINES: usize = 20;
/// The most ports that a session gets for servers that the agent starts.
const LOCAL_PORTS: usize = 4;

/// Why OpenCode did not start.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    #[error("the session's directories could not be made")]
    Directories(#[source] std::io::Error),
    #[error("OpenCode could not be started")]
    Start(#[from] StartError),
    #[error("every port of SESSION_PORT_RANGE is in use")]
    NoPort,
    #[error("OpenCode ended before it listened ({how}); its last lines: {lines}")]
    Ended { how: String, lines: String },
    #[error("the start was called off")]
    CalledOff,
    #[error("OpenCode did not listen within {} s; its last lines: {lines}", .within.as_secs())]
    Timeout { within: Duration, lines: String },
}

/// The ports that sessions listen on. A port is given to one session at a time, and the one that was given back
/// last comes last.
#[derive(Clone, Debug)]
pub struct Ports {
    table: Arc<Mutex<PortTable>>,
    local: usize,
}

#[derive(Debug)]
struct PortTable {
    free: VecDeque<u16>,
}

/// A port that nobody else gets until this is dropped.
#[derive(Debug)]
pub struct Port {
    number: u16,
    table: Arc<Mutex<PortTable>>,
}

impl Ports {
    /// All ports of the range, for so many sessions. What is beyond twice their number, and so more than sessions ever
    /// listen on, is for the servers that agents start.
    pub fn new(range: RangeInclusive<u16>, sessions: usize) -> Self {
        let local = (range.len() / sessions.max(1)).saturating_sub(2).min(LOCAL_PORTS);
        Self { table: Arc::new(Mutex::new(PortTable { free: range.collect() })), local }
    }

    /// A free port; `None` where all are given out.
    pub fn take(&self) -> Option<Port> {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        let number = table.free.pop_front()?;
        Some(Port { number, table: Arc::clone(&self.table) })
    }
}

impl Port {
    /// Its number.
    pub fn number(&self) -> u16 {
        self.number
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        table.free.push_back(self.number);
    }
}

/// A server that listens.
#[derive(Debug)]
pub struct Server {
    pub process: Process,
    pub port: Port,
    /// Those of the servers that the agent starts.
    _local: Vec<Port>,
    lines: Lines,
    /// As it was started, but for its arguments and its environment, which has secrets.
    spec: Spec,
}

impl Server {
    /// The last lines that it wrote, for an error's sake.
    pub fn last_lines(&self) -> String {
        self.lines.text()
    }

    /// Another program as this one: the same user, directory, confinement and limits, in its group. Its environment is
    /// empty.
    pub fn companion(&self, name: &str, program: &Path) -> Spec {
        let mut spec = Spec { name: name.to_owned(), program: program.to_path_buf(), ..self.spec.clone() };
        if let Some(confinement) = &mut spec.confinement {
            // The server's own port is the server's.
            confinement.network.serve.clear();
            // What the agent serves for itself is there for this one too.
            if self.process.confined().is_some_and(|confined| confined.has(Protection::Netns)) {
                confinement.network.namespace = Namespace::Of(self.process.pid());
            }
        }
        spec.beside = Some(self.process.handle());
        spec
    }
}

/// What to start.
#[derive(Clone, Debug)]
pub struct Launch {
    pub command: PathBuf,
    pub directories: Directories,
    pub workdir: PathBuf,
    pub env: Vec<(OsString, OsString)>,
    /// The user that it runs as, if not the sidecar's own; the directories are its.
    pub user: Option<User>,
    /// What it is confined to, but for its ports; not at all without it.
    pub confinement: Option<Confinement>,
    /// What it may use, with all that descends from it; neither limited nor measured without it.
    pub limits: Option<Limits>,
    /// Is told where its confinement does not let it connect to.
    pub refused: Option<RefusedConnects>,
    /// From the start to the line that says it listens.
    pub deadline: Duration,
    /// Calls the start off.
    pub stop: CancellationToken,
}

/// Starts OpenCode and waits until it listens.
///
/// # Errors
/// [`LaunchError`]; nothing of the process is left then.
pub async fn launch(sandbox: &Sandbox, tasks: &Tasks, ports: &Ports, launch: &Launch) -> Result<Server, LaunchError> {
    let mut attempt = 1;
    loop {
        match launch_once(sandbox, tasks, ports, launch).await {
            // Another program of the host sits on the port: OpenCode ends with `ServeError` then.
            Err(LaunchError::Ended { lines, .. }) if lines.contains("ServeError") && attempt < PORT_ATTEMPTS => {
                tracing::warn!(attempt, "OpenCode could not bind its port; trying the next one");
                attempt += 1;
            }
            other => return other,
        }
    }
}

async fn launch_once(sandbox: &Sandbox, tasks: &Tasks, ports: &Ports, launch: &Launch) -> Result<Server, LaunchError> {
    let port = ports.take().ok_or(LaunchError::NoPort)?;
    let mut confinement = launch.confinement.clone();
    let mut local = Vec::new();
    if let Some(confinement) = &mut confinement {
        local.extend(std::iter::from_fn(|| ports.take()).take(ports.local));
        confinement.network.serve.push(port.number);
        confinement.network.local.extend(local.iter().map(Port::number));
    }
    let spec = Spec {
        name: "opencode".to_owned(),
        program: launch.command.clone(),
        args: Vec::new(),
        env: Vec::new(),
        cwd: launch.workdir.clone(),
        user: launch.user,
        stop_signal: Signal::Term,
        stop_grace: Duration::ZERO,
        oom_score_adj: Some(oom_score_adj()),
        // The workspace is shared by its group (see `workspace`); what is the session's own has modes of its own.
        umask: Some(0o002),
        confinement,
        limits: launch.limits,
        beside: None,
        terminal: None,
        refused: launch.refused.clone(),
    };
    let args = ["serve", "--port", &port.number.to_string(), "--hostname", "127.0.0.1", "--print-logs"];
    let args = args.iter().map(OsString::from).collect();
    let mut process = sandbox.start(Spec { args, env: launch.env.clone(), ..spec.clone() }).await?;
    let lines = Lines::default();
    let (listening, mut heard) = watch::channel(None::<u16>);
    if let Some(stdout) = process.take_stdout() {
        tasks.spawn("opencode stdout", drain(stdout, lines.clone(), Some(listening)));
    }
    if let Some(stderr) = process.take_stderr() {
        tasks.spawn("opencode stderr", drain(stderr, lines.clone(), None));
    }
    let wait = async {
        tokio::select! {
            // The sender goes with the pipe; then only the process's end is left to hear of.
            port = async {
                let port = heard.wait_for(Option::is_some).await.map(|port| *port);
                match port {
                    Ok(port) => port,
                    Err(_) => std::future::pending().await,
                }
            } => Ok(port),
            exit = process.exited() => Err(Some(exit)),
            () = launch.stop.cancelled() => Err(None),
        }
    };
    let error = match tokio::time::timeout(launch.deadline, wait).await {
        Ok(Ok(Some(said))) if said == port.number => {
            return Ok(Server { process, port, _local: local, lines, spec });
        }
        Ok(Ok(said)) => LaunchError::Ended {
            how: format!("it listens on port {} and not on {}", said.unwrap_or(0), port.number),
            lines: lines.text(),
        },
        Ok(Err(None)) => LaunchError::CalledOff,
        Ok(Err(Some(exit))) => {
            // Its last words may still be in the pipe: the pipe ends with the process's last descendant.
            let _ = process.kill(Duration::from_secs(5)).await;
            let _ = tokio::time::timeout(Duration::from_secs(1), heard.wait_for(|_| false)).await;
            LaunchError::Ended { how: exit.to_string(), lines: lines.text() }
        }
        Err(_) => LaunchError::Timeout { within: launch.deadline, lines: lines.text() },
    };
    if let Err(left) = process.kill(Duration::from_secs(5)).await {
        tracing::error!(?left, "a process that did not start could not be ended");
    }
    Err(error)
}

/// When memory runs out, the kernel is to take a command of the agent's first (see [`MOST_OOM_SCORE_ADJ`]), then the
/// agent, and the sidecar last: so the agent is half way between the two.
fn oom_score_adj() -> i32 {
    let own = std::fs::read_to_string("/proc/self/oom_score_adj").ok().and_then(|text| text.trim().parse().ok());
    i32::midpoint(own.unwrap_or_default(), MOST_OOM_SCORE_ADJ)
}

/// Reads a pipe to its end, whatever happens: a full pipe would stop the process.
async fn drain(pipe: impl AsyncRead + Unpin, lines: Lines, listening: Option<watch::Sender<Option<u16>>>) {
    let mut reader = BufReader::new(pipe);
    let mut line = Vec::new();
    loop {
        line.clear();
        // A line without an end is taken in pieces.
        match tokio::io::AsyncReadExt::take(&mut reader, 64 * 1024).read_until(b'\n', &mut line).await {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        let text = String::from_utf8_lossy(&line);
        let text = text.trim_end();
        if let Some(listening) = &listening
            && let Some(port) = listening_port(text)
        {
            listening.send_replace(Some(port));
        }
        // At `debug`: OpenCode's log names files and commands of the task.
        tracing::debug!(target: "opencode", "{text}");
        lines.push(text);
    }
}

/// The port in `opencode server listening on http://127.0.0.1:4096`.
fn listening_port(line: &str) -> Option<u16> {
    line.strip_prefix("opencode server listening on http://")?.rsplit(':').next()?.trim_end_matches('/').parse().ok()
}

#[derive(Clone, Debug, Default)]
struct Lines(Arc<Mutex<VecDeque<String>>>);

impl Lines {
    fn push(&self, line: &str) {
        let mut lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if lines.len() == KEPT_LINES {
            lines.pop_front();
        }
        lines.push_back(line.chars().take(500).collect());
    }

    fn text(&self) -> String {
        let lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        lines.iter().map(String::as_str).collect::<Vec<_>>().join(" | ")
    }
}

/// Where OpenCode's executable is: `configured` (OPENCODE_COMMAND), else `opencode` in PATH, else the package that
/// was installed below `sidecars/opencode-server` of the directory `near`.
///
/// # Errors
/// A sentence that says where it was looked for.
pub fn find_command(configured: Option<&Path>, path: Option<OsString>, near: &Path) -> Result<PathBuf, String> {
    if let Some(command) = configured {
        return match executable(command) {
            true => Ok(command.to_path_buf()),
            false => Err(format!("OPENCODE_COMMAND names {}, which is no executable file", command.display())),
        };
    }
    let path = path.unwrap_or_default();
    let in_path = std::env::split_paths(&path).map(|dir| dir.join("opencode"));
    let modules = near.join("sidecars/opencode-server/node_modules");
    let arch = if cfg!(target_arch = "aarch64") { "arm64" } else { "x64" };
    let packaged = modules.join(format!("opencode-linux-{arch}/bin/opencode"));
    in_path.chain([packaged.clone()]).find(|candidate| executable(candidate)).ok_or_else(|| {
        format!(
            "no OpenCode: there is no `opencode` in PATH and no {}; set OPENCODE_COMMAND, or run `make setup`",
            packaged.display()
        )
    })
}

fn executable(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    std::fs::metadata(path).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_that_counts() {
        assert_eq!(listening_port("opencode server listening on http://127.0.0.1:4096"), Some(4096));
        assert_eq!(listening_port("timestamp=… opencode server listening on http://127.0.0.1:1"), None);
        assert_eq!(listening_port("opencode server listening on http://127.0.0.1:http"), None);
    }

    #[test]
    fn a_port_is_given_once_and_comes_back_last() {
        let ports = Ports::new(7..=9, 3);
        let (a, b, c) = (ports.take().unwrap(), ports.take().unwrap(), ports.take().unwrap());
        assert_eq!([a.number(), b.number(), c.number()], [7, 8, 9]);
        assert!(ports.take().is_none());
        drop(b);
        drop(a);
        assert_eq!(ports.take().unwrap().number(), 8);
    }

    #[test]
    fn a_missing_command_is_named() {
        let error = find_command(Some(Path::new("/nonexistent/oc")), None, Path::new("/")).unwrap_err();
        assert!(error.contains("OPENCODE_COMMAND") && error.contains("/nonexistent/oc"), "{error}");
        assert!(find_command(None, None, Path::new("/nonexistent")).unwrap_err().contains("OPENCODE_COMMAND"));
    }
}
