//! The sandbox with real processes: how an end is reported, and that killing leaves nothing.
//!
//! What a test starts is marked by a variable in its environment that no other process has, so that "nothing is left"
//! is asked of `/proc` and not of the code under test.

#![allow(clippy::unwrap_used, reason = "a test's own helpers fail like the test")]

mod terminal;

use crate::support::panics;
use nix::sys::signal::{Signal as Raw, kill};
use nix::unistd::Pid;
use opencode_sidecar::sandbox::{Exit, Process, RunError, Sandbox, Signal, Spec, StartError};
use opencode_sidecar::tasks::Tasks;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};

pub(crate) const DEADLINE: Duration = Duration::from_secs(30);
const MARK: &str = "SANDBOX_TEST_MARK";

/// A sandbox of its own, and who lives in it.
pub(crate) struct Bench {
    pub(crate) sandbox: Sandbox,
    pub(crate) tasks: Tasks,
    mark: String,
}

impl Bench {
    pub(crate) fn new() -> Self {
        panics::are_said_at_once();
        let tasks = Tasks::new();
        let sandbox = Sandbox::new(PathBuf::from(env!("CARGO_BIN_EXE_opencode-sidecar")), tasks.clone()).unwrap();
        Self { sandbox, tasks, mark: uuid::Uuid::new_v4().to_string() }
    }

    pub(crate) fn sh(&self, script: &str) -> Spec {
        let mut spec = Spec::new("test", "/bin/sh");
        spec.args = vec!["-c".into(), script.into()];
        spec.env = vec![("PATH".into(), "/usr/bin:/bin".into()), (MARK.into(), self.mark.clone().into())];
        spec
    }

    pub(crate) async fn start(&self, script: &str) -> Process {
        self.sandbox.start(self.sh(script)).await.unwrap()
    }

    /// Everything that lives and has this test's mark in its environment.
    pub(crate) fn living(&self) -> Vec<i32> {
        let mark = format!("{MARK}={}", self.mark);
        let entries = std::fs::read_dir("/proc").unwrap().flatten();
        let pids = entries.filter_map(|entry| entry.file_name().to_str().and_then(|name| name.parse().ok()));
        pids.filter(|pid: &i32| {
            std::fs::read(format!("/proc/{pid}/environ"))
                .is_ok_and(|environ| environ.split(|byte| *byte == 0).any(|entry| entry == mark.as_bytes()))
        })
        .collect()
    }

    pub(crate) async fn nothing_is_left(self) {
        assert_eq!(self.living(), Vec::<i32>::new());
        assert_eq!(self.sandbox.live(), 0);
        self.tasks.stop(DEADLINE).await.unwrap();
    }
}

/// The parent of a program is its jail.
pub(crate) fn jail_of(process: &Process) -> Pid {
    let status = std::fs::read_to_string(format!("/proc/{}/status", process.pid())).unwrap();
    let parent = status.lines().find_map(|line| line.strip_prefix("PPid:")).unwrap();
    Pid::from_raw(parent.trim().parse().unwrap())
}

/// Waits for the program to write a line.
pub(crate) async fn line(process: &mut Process) -> String {
    let mut line = String::new();
    BufReader::new(process.take_stdout().unwrap()).read_line(&mut line).await.unwrap();
    line
}

#[tokio::test]
async fn an_exit_code_and_a_signal_are_told_apart() {
    let bench = Bench::new();
    let process = bench.start("exit 3").await;
    assert_eq!(process.exited().await, Exit { code: Some(3), signal: None });
    assert!(process.gone().await.cpu_seconds.is_some());
    let process = bench.start("kill -KILL $$").await;
    assert_eq!(process.exited().await, Exit { code: None, signal: Some(9) });
    process.gone().await;
    // A real-time signal has no name, and ends a program all the same.
    let process = bench.start("kill -40 $$").await;
    assert_eq!(process.exited().await, Exit { code: None, signal: Some(40) });
    process.gone().await;
    bench.nothing_is_left().await;
}

#[tokio::test]
async fn the_program_gets_the_signals_it_is_sent() {
    let bench = Bench::new();
    let mut process =
        bench.start("trap 'exit 7' TERM; trap 'exit 8' INT; echo ready; while :; do sleep 0.05; done").await;
    assert_eq!(line(&mut process).await, "ready\n");
    process.signal(Signal::Int);
    assert_eq!(process.exited().await.code, Some(8));
    process.gone().await;
    bench.nothing_is_left().await;
}

/// As under `nohup`, or in the background of a shell, which has its children ignore these.
#[tokio::test]
async fn the_program_heeds_signals_that_the_sidecar_was_told_to_ignore() {
    let directory = tempfile::tempdir().unwrap();
    let wrapper = directory.path().join("deaf");
    let script =
        format!("#!/bin/sh\ntrap '' HUP INT QUIT TERM\nexec {} \"$@\"\n", env!("CARGO_BIN_EXE_opencode-sidecar"));
    // By another process: a fork of this one, for another test, would keep it open for writing when it is executed.
    let source = directory.path().join("source");
    std::fs::write(&source, script).unwrap();
    let mut bench = Bench::new();
    let install = bench.start(&format!("install -m 755 {} {}", source.display(), wrapper.display())).await;
    assert_eq!(install.exited().await.code, Some(0));
    install.gone().await;
    bench.sandbox = Sandbox::new(wrapper, bench.tasks.clone()).unwrap();
    let mut process = bench.start("trap 'exit 8' INT; echo ready; while :; do sleep 0.05; done").await;
    assert_eq!(line(&mut process).await, "ready\n");
    process.signal(Signal::Int);
    assert_eq!(process.exited().await.code, Some(8));
    process.gone().await;
    bench.nothing_is_left().await;
}

#[tokio::test]
async fn the_program_starts_with_a_clean_slate() {
    let bench = Bench::new();
    let mut spec =
        bench.sh("grep -E '^(SigBlk|SigIgn):' /proc/self/status; readlink /proc/self/fd/0; pwd; ulimit -c; env");
    spec.cwd = PathBuf::from("/usr");
    let output = bench.sandbox.run(spec, DEADLINE).await.unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("SigBlk:\t0000000000000000\n"), "{text}");
    // Only those with a name: the C library keeps 32 and 33 to itself.
    let ignored = text.lines().find_map(|line| line.strip_prefix("SigIgn:\t")).unwrap();
    assert_eq!(u64::from_str_radix(ignored, 16).unwrap() & 0x7fff_ffff, 0, "{text}");
    assert!(text.contains("\n/dev/null\n/usr\n0\n"), "{text}");
    assert!(!text.contains("CARGO"), "the environment is not inherited: {text}");
    bench.nothing_is_left().await;
}

#[tokio::test]
async fn killing_reaches_a_daemon_that_left_its_group_and_session() {
    let bench = Bench::new();
    // The inner shell is orphaned and in a session of its own before the outer one says a word.
    let script = r#"(setsid sh -c 'trap "" TERM HUP INT; echo daemon; while :; do sleep 1000; done' &) ; sleep 1000"#;
    let mut process = bench.start(script).await;
    assert_eq!(line(&mut process).await, "daemon\n");
    assert!(bench.living().len() >= 2);
    let gone = process.kill(DEADLINE).await.unwrap();
    assert!(gone.cpu_seconds.is_some(), "the jail itself has to prove it");
    assert_eq!(process.exited().await.signal, Some(9));
    bench.nothing_is_left().await;
}

#[tokio::test]
async fn what_the_program_leaves_behind_ends_with_it() {
    let bench = Bench::new();
    let process = bench.start("setsid sleep 1000 & sleep 1000 & exit 0").await;
    assert_eq!(process.exited().await, Exit { code: Some(0), signal: None });
    process.gone().await;
    bench.nothing_is_left().await;
}

#[tokio::test]
async fn a_jail_that_is_killed_leaves_nothing() {
    let bench = Bench::new();
    let mut process = bench.start("(setsid sh -c 'echo daemon; sleep 1000; :' &) ; sleep 1000; :").await;
    assert_eq!(line(&mut process).await, "daemon\n");
    kill(jail_of(&process), Raw::SIGKILL).unwrap();
    let gone = process.kill(DEADLINE).await.unwrap();
    assert_eq!(gone.cpu_seconds, None);
    assert_eq!(process.exited().await, Exit { code: None, signal: None });
    assert_eq!(bench.sandbox.sweep_orphans(), 0);
    bench.nothing_is_left().await;
}

#[tokio::test]
async fn a_jail_that_is_stopped_is_killed_from_outside() {
    let bench = Bench::new();
    let mut process = bench.start("(setsid sh -c 'echo daemon; sleep 1000; :' &) ; sleep 1000; :").await;
    assert_eq!(line(&mut process).await, "daemon\n");
    kill(jail_of(&process), Raw::SIGSTOP).unwrap();
    let gone = process.kill(Duration::from_secs(10)).await.unwrap();
    assert_eq!(gone.cpu_seconds, None);
    bench.nothing_is_left().await;
}

#[tokio::test]
async fn the_neighbour_of_a_killed_jail_lives_on() {
    let bench = Bench::new();
    let neighbour = Bench::new();
    let other = neighbour.start("setsid sleep 1000 & sleep 1000; :").await;
    let process = bench.start("sleep 1000; :").await;
    kill(jail_of(&process), Raw::SIGKILL).unwrap();
    process.gone().await;
    assert!(neighbour.living().len() >= 2);
    other.kill(DEADLINE).await.unwrap();
    bench.nothing_is_left().await;
    neighbour.nothing_is_left().await;
}

#[tokio::test]
async fn dropping_a_process_ends_everything() {
    let bench = Bench::new();
    let mut process =
        bench.start("(setsid sh -c 'trap \"\" TERM; echo daemon; sleep 1000; :' &) ; sleep 1000; :").await;
    assert_eq!(line(&mut process).await, "daemon\n");
    let handle = process.handle();
    drop(process);
    assert!(handle.gone().await.cpu_seconds.is_some());
    bench.nothing_is_left().await;
}

#[tokio::test]
async fn without_its_sidecar_a_program_may_still_stop_in_order() {
    let bench = Bench::new();
    let directory = tempfile::tempdir().unwrap();
    let mut spec = bench.sh("trap 'echo orderly > stopped; exit 0' INT; echo ready; while :; do sleep 0.05; done");
    spec.cwd = directory.path().to_path_buf();
    spec.stop_signal = Signal::Int;
    spec.stop_grace = DEADLINE;
    let mut process = bench.sandbox.start(spec).await.unwrap();
    assert_eq!(line(&mut process).await, "ready\n");
    let handle = process.handle();
    drop(process);
    assert_eq!(handle.exited().await.code, Some(0));
    handle.gone().await;
    assert_eq!(std::fs::read_to_string(directory.path().join("stopped")).unwrap(), "orderly\n");
    bench.nothing_is_left().await;
}

#[tokio::test]
async fn a_fork_bomb_is_overtaken() {
    let bench = Bench::new();
    // Each of the 100 cells has one child at a time and replaces it, and each child leaves an orphan of its own.
    let script = r#"
        cell() { while :; do (setsid sleep 0.2 & exec sleep 0.02); done; }
        i=0; while [ $i -lt 100 ]; do cell & i=$((i+1)); done
        echo grown; wait"#;
    let mut process = bench.start(script).await;
    assert_eq!(line(&mut process).await, "grown\n");
    assert!(bench.living().len() > 100);
    assert!(process.kill(DEADLINE).await.unwrap().cpu_seconds.is_some());
    bench.nothing_is_left().await;
}

#[tokio::test]
async fn a_program_that_is_not_there_names_the_step_and_the_path() {
    let bench = Bench::new();
    let missing = Spec::new("ghost", "/does/not/exist");
    match bench.sandbox.start(missing).await.unwrap_err() {
        StartError::Step { name, step, detail } => {
            assert_eq!((name.as_str(), step.as_str()), ("ghost", "exec"));
            assert!(detail.contains("/does/not/exist") && detail.contains("No such file"), "{detail}");
        }
        other => unreachable!("{other:?}"),
    }
    let mut nowhere = bench.sh(":");
    nowhere.cwd = PathBuf::from("/does/not/exist");
    let error = bench.sandbox.start(nowhere).await.unwrap_err();
    assert!(matches!(&error, StartError::Step { step, .. } if step == "cwd"), "{error:?}");
    bench.nothing_is_left().await;
}

#[tokio::test]
async fn a_binary_that_is_not_there_is_an_error() {
    let sandbox = Sandbox::new(PathBuf::from("/does/not/exist"), Tasks::new()).unwrap();
    assert!(matches!(sandbox.start(Spec::new("test", "/bin/true")).await, Err(StartError::Jail { .. })));
    // Something that is no jail, and ends without a word.
    let sandbox = Sandbox::new(PathBuf::from("/bin/true"), Tasks::new()).unwrap();
    assert!(matches!(sandbox.start(Spec::new("test", "/bin/true")).await, Err(StartError::Lost { .. })));
    assert_eq!(sandbox.live(), 0);
}

#[tokio::test]
async fn a_megabyte_arrives_complete() {
    let bench = Bench::new();
    let mut process = bench.start("head -c 1048576 /dev/zero | tr '\\0' x; echo end >&2").await;
    let (mut stdout, mut stderr) = (process.take_stdout().unwrap(), process.take_stderr().unwrap());
    let (mut out, mut err) = (Vec::new(), Vec::new());
    tokio::try_join!(stdout.read_to_end(&mut out), stderr.read_to_end(&mut err)).unwrap();
    assert!(out.len() == 1_048_576 && out.iter().all(|byte| *byte == b'x'));
    assert_eq!(err, b"end\n");
    assert_eq!(process.exited().await.code, Some(0));
    process.gone().await;
    bench.nothing_is_left().await;
}

#[tokio::test]
async fn a_helper_runs_to_its_end_or_to_its_deadline() {
    let bench = Bench::new();
    let output = bench.sandbox.run(bench.sh("echo out; echo err >&2; exit 5"), DEADLINE).await.unwrap();
    assert_eq!((output.exit.code, output.stdout, output.stderr), (Some(5), b"out\n".to_vec(), b"err\n".to_vec()));
    let late = bench.sandbox.run(bench.sh("sleep 1000; :"), Duration::from_millis(1)).await;
    assert!(matches!(late, Err(RunError::Deadline { .. })), "{late:?}");
    // The jail ends by itself; the task that watches it is waited for here.
    bench.tasks.stop(DEADLINE).await.unwrap();
    bench.nothing_is_left().await;
}

#[tokio::test]
#[cfg_attr(not(as_root), ignore = "acts as another user, which takes root")]
async fn another_user_has_no_groups_of_ours() {
    let bench = Bench::new();
    let mut spec = bench.sh("id -u; id -G; cat /proc/self/oom_score_adj; umask");
    spec.user = Some(opencode_sidecar::sandbox::User { uid: 65534, gid: 65534 });
    spec.oom_score_adj = Some(900);
    spec.umask = Some(0o027);
    let output = bench.sandbox.run(spec, DEADLINE).await.unwrap();
    assert_eq!(String::from_utf8(output.stdout).unwrap(), "65534\n65534\n900\n0027\n");
    bench.nothing_is_left().await;
}

#[tokio::test]
async fn the_jail_has_nothing_of_the_sidecars_environment() {
    let bench = Bench::new();
    let process = bench.start("sleep 1000; :").await;
    let path = Path::new("/proc").join(jail_of(&process).to_string()).join("environ");
    match std::fs::read(path) {
        Ok(environ) => assert_eq!(environ, b""),
        // Whoever is not root cannot even look.
        Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied),
    }
    process.kill(DEADLINE).await.unwrap();
    bench.nothing_is_left().await;
}

#[test]
fn the_environment_of_a_spec_is_not_printed() {
    let mut spec = Spec::new("test", "/bin/true");
    spec.env = vec![("PASSWORD".into(), "hunter2".into())];
    let text = format!("{spec:?}");
    assert!(text.contains("PASSWORD") && !text.contains("hunter2"));
}
