//! The shell tap: stands where OpenCode expects its shell, runs the real one, and sends the sidecar a copy of both
//! output streams, told apart and live. OpenCode's own copy goes through unchanged.
//!
//! OpenCode is configured with a path named `bash` that is a link to this binary. The tap is single-threaded, has no
//! runtime, and stays in OpenCode's process group together with the shell, so that an abort reaches both. Whatever
//! goes wrong between it and the sidecar, the command runs and OpenCode gets its output.

use super::Exit;
use super::frames::{Frame, Start};
use super::uplink::Uplink;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::prctl;
use nix::sys::signal::{self, SigSet, Signal as Raw};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd;
use std::env;
use std::ffi::{CStr, OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};

/// The file name under which the binary is the tap.
pub const NAME: &str = "bash";
/// What the tap is called in lists of processes, at most 15 bytes (prctl(2)).
const PROCESS_NAME: &CStr = c"output-tap";
/// Where to send the copy: `http://<ip>:<port>/<path>`. Without it there is no tap.
pub const ENV_URL: &str = "OPENCODE_SIDECAR_TAP";
/// The bearer token for it.
pub const ENV_TOKEN: &str = "OPENCODE_SIDECAR_TOKEN";
/// The real shell. [`DEFAULT_SHELL`] where it is absent.
pub const ENV_SHELL: &str = "OPENCODE_SIDECAR_SHELL";
/// The real shell unless another is named.
pub const DEFAULT_SHELL: &str = "/bin/bash";
/// What a command has no business to see.
pub const SCRUBBED: [&str; 6] =
    [ENV_URL, ENV_TOKEN, ENV_SHELL, "OPENCODE_SERVER_PASSWORD", "OPENCODE_CONFIG_CONTENT", "OPENCODE_PERMISSION"];

/// The hidden subcommand that goes on reading what background children of a command write.
pub const DRAIN_SUBCOMMAND: &str = "tap-drain";
const ENV_DRAIN_START: &str = "OPENCODE_SIDECAR_DRAIN";

/// Whether this process was started as the tap.
pub fn is_called() -> bool {
    let name = env::args_os().next();
    name.is_some_and(|name| Path::new(&name).file_name() == Some(OsStr::new(NAME))) && env::var_os(ENV_URL).is_some()
}

/// Runs the real shell with this process's arguments and ends with its exit code, as a shell says it: 128 and the number
/// of the signal that ended it. OpenCode 1.18.33 does not notice the end of a shell that a signal ended, and waits until
/// the command's time is over.
pub fn run() -> ExitCode {
    let args: Vec<OsString> = env::args_os().skip(1).collect();
    // So that a command's `pkill bash` ends what it means.
    let _ = prctl::set_name(PROCESS_NAME);
    let mut uplink = connect();
    let shell = env::var_os(ENV_SHELL).unwrap_or_else(|| DEFAULT_SHELL.into());
    let start = |pid| {
        let cwd = env::current_dir().unwrap_or_default().to_string_lossy().into_owned();
        Start { command: command_of(&args), cwd, pid, background: false, truncated: false }.fit()
    };
    let tapped = match spawn(&shell, &args) {
        Ok(tapped) => tapped,
        Err(error) => {
            let message = format!("{}: {error}\n", shell.to_string_lossy());
            uplink.frame(&Frame::Start(start(0)));
            uplink.output(true, message.as_bytes());
            uplink.frame(&Frame::Exit(Exit { code: Some(127), signal: None }));
            pass_on(io::stderr().as_fd(), message.as_bytes());
            uplink.finish();
            return ExitCode::from(127);
        }
    };
    let start = start(tapped.child.id());
    uplink.frame(&Frame::Start(start.clone()));
    tapped.follow(uplink, start)
}

/// Reads what background children of a command write until they close it, and sends it to the sidecar. Both pipes are
/// given as standard input and output.
pub fn drain() -> ExitCode {
    let mut uplink = connect();
    if let Some(start) = env::var(ENV_DRAIN_START).ok().and_then(|text| serde_json::from_str::<Start>(&text).ok()) {
        uplink.frame(&Frame::Start(Start { background: true, ..start }.fit()));
    }
    let duplicate = |fd: BorrowedFd<'_>| fd.try_clone_to_owned().ok();
    let mut pipes = Pipes::new(duplicate(io::stdin().as_fd()), duplicate(io::stdout().as_fd()));
    pipes.pass_on = false;
    while pipes.are_open() {
        pipes.wait(&uplink, None);
        uplink.advance();
        pipes.copy(&mut uplink);
    }
    uplink.finish();
    ExitCode::SUCCESS
}

fn connect() -> Uplink {
    let url = env::var(ENV_URL).unwrap_or_default();
    let token = env::var(ENV_TOKEN).unwrap_or_default();
    Uplink::connect(&url, &token)
}

/// What follows `-c`, else all arguments.
fn command_of(args: &[OsString]) -> String {
    let after = args.iter().position(|arg| arg == "-c").and_then(|at| args.get(at + 1));
    match after {
        Some(command) => command.to_string_lossy().into_owned(),
        None => args.iter().map(|arg| arg.to_string_lossy()).collect::<Vec<_>>().join(" "),
    }
}

#[expect(clippy::disallowed_methods, reason = "the one place that starts processes")]
fn spawn(shell: &OsStr, args: &[OsString]) -> io::Result<Tapped> {
    let signals = |more: &[Raw]| {
        let mut set = SigSet::empty();
        set.add(signal::SIGCHLD);
        more.iter().for_each(|signal| set.add(*signal));
        set
    };
    let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
    let ended = SignalFd::with_flags(&signals(&[]), flags)?;
    let mut command = Command::new(shell);
    command.args(args).stdout(Stdio::piped()).stderr(Stdio::piped());
    for name in SCRUBBED {
        command.env_remove(name);
    }
    step_aside(&mut command);
    let mut child = command.spawn()?;
    let pipes = Pipes::new(child.stdout.take().map(OwnedFd::from), child.stderr.take().map(OwnedFd::from));
    // Only now, since the shell would inherit it. OpenCode's signals go to the whole group: the shell does with them
    // what it does, and the tap stays for what it has to say about it, and ends as the shell ends.
    signals(&[signal::SIGTERM, signal::SIGINT, signal::SIGHUP]).thread_block()?;
    Ok(Tapped { child, ended, pipes })
}

/// The real shell and its output.
struct Tapped {
    child: Child,
    ended: SignalFd,
    pipes: Pipes,
}

impl Tapped {
    fn follow(mut self, mut uplink: Uplink, start: Start) -> ExitCode {
        let status = loop {
            // Cleared before looking, so that an end in between wakes the next wait.
            while matches!(self.ended.read_signal(), Ok(Some(_))) {}
            match self.child.try_wait() {
                Ok(None) => {}
                Ok(Some(status)) => break status,
                // Somebody else reaped it, which cannot be. Fail rather than wait for ever.
                Err(_) => break ExitStatus::from_raw(255 << 8),
            }
            self.pipes.wait(&uplink, Some(self.ended.as_fd()));
            uplink.advance();
            self.pipes.copy(&mut uplink);
        };
        self.pipes.copy_rest(&mut uplink);
        uplink.frame(&Frame::Exit(Exit { code: status.code(), signal: status.signal() }));
        uplink.finish();
        if self.pipes.are_open() {
            hand_over(self.pipes, &start);
        }
        exit_code(status)
    }
}

/// Leaves pipes that background children still hold to a process of their own. OpenCode waits until its ends of our
/// output are closed, so that process must not have them; and without any reader the children would die of SIGPIPE.
#[expect(clippy::disallowed_methods, reason = "the one place that starts processes")]
fn hand_over(pipes: Pipes, start: &Start) {
    let Ok(executable) = env::current_exe() else { return };
    let [stdout, stderr] = pipes.streams;
    let stdio = |pipe: Option<OwnedFd>| pipe.map_or_else(Stdio::null, Stdio::from);
    let mut command = Command::new(executable);
    command.arg(DRAIN_SUBCOMMAND).env_clear().current_dir("/");
    command.env(ENV_DRAIN_START, serde_json::to_string(start).unwrap_or_default());
    for name in [ENV_URL, ENV_TOKEN] {
        command.env(name, env::var_os(name).unwrap_or_default());
    }
    command.stdin(stdio(stdout)).stdout(stdio(stderr)).stderr(Stdio::null());
    let mut mask = SigSet::empty();
    mask.add(signal::SIGTERM);
    mask.add(signal::SIGINT);
    mask.add(signal::SIGHUP);
    // Nothing is left to wait for here, and an abort has to reach the new process.
    if mask.thread_unblock().is_ok() {
        let _ = command.spawn();
    }
}

/// Has the shell, and so all that the command does, be counted with the tools and be what ends first when memory runs out:
/// not the tap, which has to tell of that end.
#[expect(unsafe_code, reason = "there is no safe way to run something in the child")]
fn step_aside(command: &mut Command) {
    let aside = || {
        super::confine::step_aside();
        Ok(())
    };
    // SAFETY: this process has one thread, so the child may do what it could.
    unsafe { command.pre_exec(aside) };
}

fn exit_code(status: ExitStatus) -> ExitCode {
    let code = status.code().or_else(|| status.signal().map(|number| 128 + number));
    ExitCode::from(code.and_then(|code| u8::try_from(code).ok()).unwrap_or(u8::MAX))
}

/// The reading ends of standard output and standard error. None: closed.
struct Pipes {
    streams: [Option<OwnedFd>; 2],
    /// Whether this process's own output gets what is read.
    pass_on: bool,
    buffer: Vec<u8>,
}

impl Pipes {
    fn new(stdout: Option<OwnedFd>, stderr: Option<OwnedFd>) -> Self {
        let streams = [stdout, stderr];
        for stream in streams.iter().flatten() {
            // Nobody but us reads from it, so nobody is surprised.
            let _ = fcntl(stream, FcntlArg::F_SETFL(OFlag::O_NONBLOCK));
        }
        Self { streams, pass_on: true, buffer: vec![0; super::frames::MAX_PAYLOAD] }
    }

    fn are_open(&self) -> bool {
        self.streams.iter().any(Option::is_some)
    }

    /// Waits until there is something to read and room for it, the uplink can go on, or `also` is readable.
    fn wait(&self, uplink: &Uplink, also: Option<BorrowedFd<'_>>) {
        let readable = |fd| PollFd::new(fd, PollFlags::POLLIN);
        let mut fds: Vec<PollFd<'_>> = also.into_iter().map(readable).chain(uplink.poll_fd()).collect();
        if uplink.has_room() {
            fds.extend(self.streams.iter().flatten().map(|stream| readable(stream.as_fd())));
        }
        let _ = poll(&mut fds, uplink.poll_timeout());
    }

    /// Copies once from each pipe what is there, as far as the uplink has room.
    fn copy(&mut self, uplink: &mut Uplink) {
        for stderr in [false, true] {
            if uplink.has_room() {
                self.copy_one(stderr, uplink);
            }
        }
    }

    /// Copies what the shell had written when it ended, and perhaps a little more: no pipe holds more than its size,
    /// while a background child may write for ever.
    fn copy_rest(&mut self, uplink: &mut Uplink) {
        for stderr in [false, true] {
            let size = self.streams[usize::from(stderr)].as_ref().and_then(|fd| fcntl(fd, FcntlArg::F_GETPIPE_SZ).ok());
            let mut left = size.and_then(|size| usize::try_from(size).ok()).unwrap_or(0);
            loop {
                while !uplink.has_room() {
                    let _ = poll(&mut uplink.poll_fd().into_iter().collect::<Vec<_>>(), uplink.poll_timeout());
                    uplink.advance();
                }
                let count = self.copy_one(stderr, uplink);
                // The read that finds nothing, or the end, is needed too: it tells whether the pipe is still held.
                if count == 0 || left == 0 {
                    break;
                }
                left = left.saturating_sub(count);
            }
        }
    }

    /// Returns how much it copied: 0 also where the pipe is closed by this.
    fn copy_one(&mut self, stderr: bool, uplink: &mut Uplink) -> usize {
        let stream = &mut self.streams[usize::from(stderr)];
        let Some(pipe) = stream else { return 0 };
        let count = match unistd::read(pipe.as_fd(), &mut self.buffer) {
            Ok(count @ 1..) => count,
            Err(Errno::EAGAIN | Errno::EINTR) => return 0,
            _ => {
                *stream = None;
                return 0;
            }
        };
        let bytes = &self.buffer[..count];
        uplink.output(stderr, bytes);
        if self.pass_on {
            let taken =
                if stderr { pass_on(io::stderr().as_fd(), bytes) } else { pass_on(io::stdout().as_fd(), bytes) };
            if !taken {
                // OpenCode has closed its end: the writer shall learn it as it would without us, by SIGPIPE.
                *stream = None;
            }
        }
        count
    }
}

/// Writes all of it, waiting for the reader as the shell itself would. False: nobody reads it any more.
fn pass_on(to: BorrowedFd<'_>, mut bytes: &[u8]) -> bool {
    while !bytes.is_empty() {
        match unistd::write(to, bytes) {
            Ok(count) => bytes = &bytes[count..],
            Err(Errno::EINTR) => {}
            // The other side made it so; it may be shared, so it is left so.
            Err(Errno::EAGAIN) => {
                let _ = poll(&mut [PollFd::new(to, PollFlags::POLLOUT)], PollTimeout::NONE);
            }
            Err(_) => return false,
        }
    }
    true
}
