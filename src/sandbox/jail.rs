//! The jail: this same binary, started again as a small single-threaded process that confines and starts one
//! program, and stays as the subreaper of everything below it.
//!
//! Its standard input is a socket to the sidecar (see `protocol`). No runtime, no thread, no log, nothing secret in
//! its memory or environment. It ends when nothing is left below it, and never before: when the program ends, when
//! it is told to kill, and when the sidecar is gone, it kills what is left until the kernel says that it has no
//! child. As a subreaper it inherits every orphan below it, so no child means no descendant: that is the proof.

use super::cgroup;
use super::confine::{self, Confined, Gate};
use super::protocol::{self, Command, Policy, Report};
use super::watch::{Io, Watcher, reaped_cpu_seconds};
use super::{Exit, Signal, roll, terminal, tree};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::prctl;
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{self, SigSet, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::stat;
use nix::unistd::{self, Pid};
use std::collections::BTreeSet;
use std::fmt::Display;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{ExitCode, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// The hidden subcommand under which the sidecar starts its jails.
pub const SUBCOMMAND: &str = "jail";

const OOM_SCORE_ADJ: &str = "/proc/self/oom_score_adj";

/// Runs the jail to its end. Call it first in `main`, before any thread exists.
pub fn run() -> ExitCode {
    let mut control = Control { unread: Vec::new(), open: true };
    let policy = match control.policy() {
        Ok(policy) => policy,
        Err(error) => {
            control.report(&Report::Failed { step: "policy".into(), error: error.to_string() });
            return ExitCode::FAILURE;
        }
    };
    let io_before = Io::own();
    match start(&policy) {
        Ok(Started { main, children, confined, gate, roll: _roll }) => {
            if let Some(confined) = confined {
                control.report(&Report::Confined(confined));
            }
            control.report(&Report::Started { pid: main.as_raw().unsigned_abs() });
            let watcher = policy.watch.map(|watch| Watcher::new(watch, io_before));
            let mut jail = Jail { main, exit: None, control, children, gate, watcher, io_before };
            jail.supervise(&policy);
            jail.end_everything(policy.group.as_ref().filter(|_| !policy.beside));
            ExitCode::SUCCESS
        }
        Err(failed) => {
            control.report(&Report::Failed { step: failed.step, error: failed.error });
            ExitCode::FAILURE
        }
    }
}

/// A step that could not be done. Nothing is started then.
struct Failed {
    step: String,
    error: String,
}

impl From<confine::Failed> for Failed {
    fn from(confine::Failed { step, error }: confine::Failed) -> Self {
        Self { step, error }
    }
}

/// What there is once the program runs.
struct Started {
    main: Pid,
    children: SignalFd,
    confined: Option<Confined>,
    gate: Option<Gate>,
    /// Held until the jail ends.
    roll: Option<fs::File>,
}

fn step<T, E: Display>(step: &'static str, result: Result<T, E>) -> Result<T, Failed> {
    result.map_err(|error| Failed { step: step.into(), error: error.to_string() })
}

/// Every step from a bare process to a running program, in order. Each is required: one that fails ends the start
/// under its name.
fn start(policy: &Policy) -> Result<Started, Failed> {
    // Whatever leaked into this process by inheritance. All that is opened from here on is closed at exec.
    step("descriptors", close_inherited())?;
    let roll = policy.roll().map(|path| step("roll", roll::join(&path, io::stdin().as_fd()))).transpose()?;
    // A session of its own: no terminal's Ctrl-C or hang-up reaches it, and what it leaves behind can be told from
    // the sidecar's own children (see `orphans`).
    step("session", unistd::setsid())?;
    step("subreaper", prctl::set_child_subreaper(true))?;
    step("rlimit_core", setrlimit(Resource::RLIMIT_CORE, 0, 0))?;
    // A child inherits mask and score, so both are set around its start: no code of ours has to run in it.
    step("signal_mask", SigSet::all().thread_unblock())?;
    step("signal_actions", heed_all_signals())?;
    let own_score = match policy.oom_score_adj {
        Some(score) => {
            let own = step("oom_score_adj", fs::read(OOM_SCORE_ADJ))?;
            step("oom_score_adj", fs::write(OOM_SCORE_ADJ, score.to_string()))?;
            Some(own)
        }
        None => None,
    };
    if let Some(umask) = policy.umask {
        // The jail makes no files itself. There is no way in which this can fail.
        stat::umask(stat::Mode::from_bits_truncate(umask));
    }
    let cwd = policy.cwd();
    if !cwd.is_dir() {
        return Err(Failed { step: "cwd".into(), error: format!("{} is not a directory", cwd.display()) });
    }
    let mut child_ended = SigSet::empty();
    child_ended.add(signal::SIGCHLD);
    let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
    let children = step("signalfd", SignalFd::with_flags(&child_ended, flags))?;
    let (main, confined, gate) = execute(policy)?;

    // From here on something runs, so nothing may end the jail. What follows is either certain or can be spared.
    if let Some(score) = own_score {
        let _ = fs::write(OOM_SCORE_ADJ, score);
    }
    // The sidecar sees the end of the program's output as soon as the program's own ends are closed.
    if let Ok(null) = fs::OpenOptions::new().write(true).open("/dev/null") {
        let _ = unistd::dup2_stdout(&null);
        let _ = unistd::dup2_stderr(&null);
    }
    // Out of reach of a debugger of the same user.
    let _ = prctl::set_dumpable(false);
    // Only now, since the program would inherit it. A child that ended before is found by the first look. Whoever
    // wants the jail to end has to ask the sidecar.
    let mut mask = child_ended;
    for blocked in [signal::SIGTERM, signal::SIGINT, signal::SIGHUP, signal::SIGQUIT] {
        mask.add(blocked);
    }
    let _ = mask.thread_block();
    Ok(Started { main, children, confined, gate, roll })
}

fn execute(policy: &Policy) -> Result<(Pid, Option<Confined>, Option<Gate>), Failed> {
    let Some(confinement) = &policy.confinement else { return Ok((execute_free(policy)?, None, None)) };
    let program = confine::Program {
        path: policy.program(),
        args: policy.args().collect(),
        env: policy.env().collect(),
        cwd: policy.cwd(),
        terminal: policy.terminal,
    };
    let doors = step("cgroup", policy.group.as_ref().map_or(Ok(Vec::new()), cgroup::Layout::doors))?;
    let (pid, confined, listener) = confine::start(confinement, policy.uid_gid, &program, doors)?;
    let gate = listener.map(|listener| {
        let user = policy.uid_gid.filter(|(uid, _)| *uid != unistd::getuid().as_raw());
        let apart = confined.has(confine::Protection::Netns);
        Gate::new(listener, confinement.network.clone(), user, policy.group.clone(), apart)
    });
    Ok((pid, Some(confined), gate))
}

#[expect(clippy::disallowed_methods, reason = "the one place that starts processes")]
fn execute_free(policy: &Policy) -> Result<Pid, Failed> {
    let program = policy.program();
    let mut command = std::process::Command::new(&program);
    command.args(policy.args()).env_clear().envs(policy.env()).current_dir(policy.cwd());
    command.stdin(Stdio::null()).stdout(Stdio::inherit()).stderr(Stdio::inherit());
    if policy.terminal {
        command.stdin(step("terminal", io::stdout().as_fd().try_clone_to_owned())?);
        take_terminal(&mut command);
    } else {
        command.process_group(0);
    }
    // Before it becomes another user, while it still may.
    let group = step("cgroup", join_group(&mut command, policy))?;
    if let Some((uid, gid)) = policy.uid_gid {
        // The standard library drops the supplementary groups with it.
        command.uid(uid).gid(gid);
    }
    let failed = |error: io::Error| Failed {
        step: "exec".into(),
        error: format!("cannot execute {}: {error}", program.display()),
    };
    let child = command.spawn().map_err(|error| match group.as_ref().and_then(refusal) {
        Some(refused) => {
            Failed { step: "cgroup".into(), error: format!("the program may not join its group: {refused}") }
        }
        None => failed(error),
    })?;
    i32::try_from(child.id()).map(Pid::from_raw).map_err(io::Error::other).map_err(failed)
}

/// Closes every descriptor but the standard three.
#[expect(unsafe_code, reason = "closes what nobody here has opened")]
fn close_inherited() -> io::Result<()> {
    // SAFETY: it is the first thing this process does, so no value in it owns any of these descriptors.
    if unsafe { libc::close_range(3, libc::c_uint::MAX, 0) } == 0 {
        return Ok(());
    }
    // Before Linux 5.9. Collected first, since the directory is a descriptor too.
    let open = fs::read_dir("/proc/self/fd")?.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    for descriptor in open.filter(|descriptor| *descriptor > 2).collect::<Vec<libc::c_int>>() {
        // SAFETY: as above; that of the directory is closed by now, and closing it again is an error without effect.
        unsafe { libc::close(descriptor) };
    }
    Ok(())
}

/// Has the child join its group before it executes anything. Gives where it says that it could not.
#[expect(unsafe_code, reason = "there is no safe way to run something in the child")]
fn join_group(command: &mut std::process::Command, policy: &Policy) -> io::Result<Option<OwnedFd>> {
    let Some(group) = &policy.group else { return Ok(None) };
    let doors = group.doors()?;
    let (refusal, says) = unistd::pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
    let join = move || {
        cgroup::join(&doors).map_err(|refused| {
            let _ = unistd::write(&says, &(refused as i32).to_ne_bytes());
            io::Error::from(refused)
        })
    };
    // SAFETY: this process has one thread, so the child may do what it could; `join` only writes to descriptors that
    // it owns.
    unsafe { command.pre_exec(join) };
    Ok(Some(refusal))
}

/// Has the child take its standard input for its terminal before it executes anything.
#[expect(unsafe_code, reason = "there is no safe way to run something in the child")]
fn take_terminal(command: &mut std::process::Command) {
    let take = || terminal::control(io::stdin()).map_err(io::Error::from);
    // SAFETY: this process has one thread, so the child may do what it could; `take` makes two calls of the kernel.
    unsafe { command.pre_exec(take) };
}

/// What kept the child from joining its group, if that is what it was.
fn refusal(group: &OwnedFd) -> Option<Errno> {
    let mut number = [0; 4];
    let count = unistd::read(group, &mut number).ok()?;
    (count == number.len()).then(|| Errno::from_raw(i32::from_ne_bytes(number)))
}

fn below_this_process() -> impl Fn(&tree::Stat) -> bool {
    let own = unistd::getpid().as_raw();
    move |stat| stat.parent == own
}

/// Undoes that signals are ignored. Whoever starts the sidecar in the background of a shell, or under `nohup`, has it
/// ignore some, and a program inherits that: a shell could not even set a trap, and the request to stop would be lost.
#[expect(unsafe_code, reason = "there is no safe way to set a signal's action")]
fn heed_all_signals() -> nix::Result<()> {
    for signal in signal::Signal::iterator() {
        // The two have no other action; std takes care of SIGPIPE, which this process itself has to ignore.
        if !matches!(signal, signal::SIGKILL | signal::SIGSTOP | signal::SIGPIPE) {
            // SAFETY: the default action runs no code of ours, and nothing in this single-threaded process relies on
            // an action that was set before.
            unsafe { signal::signal(signal, signal::SigHandler::SigDfl) }?;
        }
    }
    Ok(())
}

/// Reaps one child that has ended. `None`: there is no child at all. `Some(None)`: none has ended yet.
#[expect(unsafe_code, reason = "nix's waitpid loses a child that a real-time signal killed")]
fn reap() -> Option<Option<(i32, ExitStatus)>> {
    let mut status = 0;
    // SAFETY: `status` is a valid place for one int for the time of the call, which keeps no reference to it.
    let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG | libc::__WALL) };
    match pid {
        // The only possible error is ECHILD: there is no handler that could interrupt it, and the flags are valid.
        -1 => None,
        0 => Some(None),
        pid => Some(Some((pid, ExitStatus::from_raw(status)))),
    }
}

struct Jail {
    main: Pid,
    exit: Option<Exit>,
    control: Control,
    children: SignalFd,
    gate: Option<Gate>,
    watcher: Option<Watcher>,
    /// What this process had read and written before the start.
    io_before: Option<Io>,
}

impl Jail {
    /// Returns when everything has to end.
    fn supervise(&mut self, policy: &Policy) {
        let mut kill_at: Option<Instant> = None;
        while self.reap_all() && self.exit.is_none() {
            let left = kill_at.map(|at| at.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return;
            }
            if self.look() {
                return;
            }
            let look = self.watcher.as_ref().map(Watcher::due);
            let tell = self.gate.as_ref().and_then(|gate| gate.refused.due());
            self.wait([left, look, tell].into_iter().flatten().min(), true);
            if self.gate.as_mut().is_some_and(|gate| !gate.advance()) {
                self.tell_refused();
                self.gate = None;
            }
            if self.gate.as_ref().is_some_and(|gate| gate.refused.due().is_some_and(|due| due.is_zero())) {
                self.tell_refused();
            }
            for command in self.control.commands() {
                match command {
                    Command::Signal(signal) => self.signal(signal),
                    Command::Kill(_) => return,
                }
            }
            if !self.control.open && kill_at.is_none() {
                self.signal(policy.stop_signal);
                kill_at = Some(Instant::now() + Duration::from_millis(policy.stop_grace_ms.min(3_600_000)));
            }
        }
    }

    /// Tells what the gate refused and was not told yet.
    fn tell_refused(&mut self) {
        for (to, count) in self.gate.iter_mut().flat_map(|gate| gate.refused.take()) {
            self.control.report(&Report::Refused { to, count });
        }
    }

    /// Looks at what is to be watched, if it is time. True: a limit is reached.
    fn look(&mut self) -> bool {
        let Some(watcher) = self.watcher.as_mut().filter(|watcher| watcher.due().is_zero()) else { return false };
        let (news, exhausted) = watcher.look();
        if let Some(sample) = news {
            self.control.report(&Report::Seen(sample));
        }
        if let Some(resource) = exhausted {
            self.control.report(&Report::Exhausted(resource));
        }
        exhausted.is_some()
    }

    /// Kills all that is left, and reports when the kernel says that nothing is.
    fn end_everything(&mut self, group: Option<&cgroup::Layout>) {
        self.control.report(&Report::Killing(true));
        self.tell_refused();
        // Whoever waits for it is about to be killed.
        self.gate = None;
        let mut before = BTreeSet::new();
        while self.reap_all() {
            // All at once, where there is a group. The search finds the same and more; only it ends in a proof.
            if let Some(group) = group {
                group.kill();
            }
            let killed = tree::kill_all(below_this_process());
            // Somebody new: look again at once, that is how a fork bomb is overtaken. Nobody new: those that were
            // killed need a moment to die (a zombie's parent, a process in the kernel), and say so by SIGCHLD.
            if killed.is_subset(&before) && self.reap_all() {
                self.wait(Some(Duration::from_millis(2)), false);
            }
            before = killed;
        }
        let (cpu_seconds, io) = (reaped_cpu_seconds(), Watcher::ended(self.io_before));
        self.control.report(&Report::Empty { cpu_seconds, io });
    }

    /// Reaps all that have ended. False: no child is left.
    fn reap_all(&mut self) -> bool {
        // Cleared before reaping, so that an end in between wakes the next wait.
        while matches!(self.children.read_signal(), Ok(Some(_))) {}
        loop {
            match reap() {
                None => return false,
                Some(None) => return true,
                Some(Some((pid, status))) if pid == self.main.as_raw() => {
                    let exit = Exit { code: status.code(), signal: status.signal() };
                    self.exit = Some(exit);
                    self.control.report(&Report::Exited(exit));
                }
                Some(Some(_)) => {}
            }
        }
    }

    fn signal(&self, signal: Signal) {
        // Not reaped yet, so the id is still the main program's.
        if self.exit.is_none() {
            let _ = kill(self.main, signal.number());
        }
    }

    /// Waits until a child ends or, with `commands`, the sidecar has something to say; for at most `limit`.
    fn wait(&self, limit: Option<Duration>, commands: bool) {
        let stdin = io::stdin();
        let mut fds = vec![PollFd::new(self.children.as_fd(), PollFlags::POLLIN)];
        if commands && self.control.open {
            fds.push(PollFd::new(stdin.as_fd(), PollFlags::POLLIN));
        }
        fds.extend(self.gate.iter().flat_map(Gate::poll_fds));
        let limit = match limit {
            None => PollTimeout::NONE,
            Some(limit) => {
                let millis = u16::try_from(limit.as_millis()).unwrap_or(u16::MAX).max(1);
                PollTimeout::from(millis)
            }
        };
        let _ = poll(&mut fds, limit);
    }
}

/// The socket to the sidecar, which is this process's standard input.
struct Control {
    unread: Vec<u8>,
    open: bool,
}

impl Control {
    fn policy(&mut self) -> io::Result<Policy> {
        loop {
            if let Some(line) = self.next_line() {
                return Ok(serde_json::from_slice(&line)?);
            }
            if !self.fill() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }

    /// What the sidecar has asked for since the last call. Does not block. Lines that are no command are ignored.
    fn commands(&mut self) -> Vec<Command> {
        let mut commands = Vec::new();
        while self.open && readable() && self.fill() {}
        while let Some(line) = self.next_line() {
            commands.extend(serde_json::from_slice(&line));
        }
        commands
    }

    /// A write that fails means that the sidecar is gone, which changes nothing about what has to be done.
    fn report(&mut self, report: &Report) {
        if let Ok(line) = protocol::line(report) {
            let mut rest = line.as_slice();
            while let Ok(count @ 1..) = unistd::write(io::stdin().as_fd(), rest) {
                rest = &rest[count..];
            }
        }
    }

    /// Reads once, blocking. False at the end, or on an error, which is the same here.
    fn fill(&mut self) -> bool {
        let mut buffer = [0; 4096];
        match unistd::read(io::stdin().as_fd(), &mut buffer) {
            Ok(count @ 1..) => {
                self.unread.extend_from_slice(&buffer[..count]);
                true
            }
            _ => {
                self.open = false;
                false
            }
        }
    }

    fn next_line(&mut self) -> Option<Vec<u8>> {
        let end = self.unread.iter().position(|byte| *byte == b'\n')?;
        let rest = self.unread.split_off(end + 1);
        Some(std::mem::replace(&mut self.unread, rest))
    }
}

fn readable() -> bool {
    let stdin = io::stdin();
    let mut fds = [PollFd::new(stdin.as_fd(), PollFlags::POLLIN)];
    matches!(poll(&mut fds, PollTimeout::ZERO), Ok(1..))
}
