//! Starts confined programs and reads what they say.

#![allow(clippy::unwrap_used, reason = "a test's own helpers fail like the test")]

use super::program;
use crate::support::postgres::sandbox;
use opencode_sidecar::sandbox::confine::{Confined, Confinement};
use opencode_sidecar::sandbox::{Output, Process, Sandbox, Spec, StartError, User};
use opencode_sidecar::tasks::Tasks;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tempfile::TempDir;
use tokio::io::AsyncReadExt;

pub(super) const DEADLINE: Duration = Duration::from_secs(60);

/// A user of a session's own.
pub(super) const SESSION: User = User { uid: 54_401, gid: 54_401 };

pub(super) struct Bench {
    pub(super) sandbox: Sandbox,
    pub(super) tasks: Tasks,
    /// What the program may write in; the directory around it is everybody's to enter.
    pub(super) own: PathBuf,
    around: TempDir,
}

impl Bench {
    pub(super) fn new() -> Self {
        let tasks = Tasks::new();
        let bench = Self::at(tasks, PathBuf::new());
        let own = bench.around.path().join("own");
        std::fs::DirBuilder::new().mode(0o700).create(&own).unwrap();
        Self { own, ..bench }
    }

    /// With a place that is there already.
    pub(super) fn at(tasks: Tasks, own: PathBuf) -> Self {
        let around = tempfile::Builder::new().prefix("oc-confine-").tempdir().unwrap();
        std::fs::set_permissions(around.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        Self { sandbox: sandbox(&tasks), tasks, own, around }
    }

    /// A place beside the program's own, out of its reach.
    pub(super) fn outside(&self, name: &str) -> PathBuf {
        self.around.path().join(name)
    }

    /// The system to execute, `own` to write, no network.
    pub(super) fn confinement(&self) -> Confinement {
        let mut confinement = Confinement::default();
        confinement.files.execute =
            ["/usr", "/bin", "/lib", "/lib64", "/proc", "/etc/ld.so.cache"].map(Into::into).into();
        confinement.files.execute.push(program::executable());
        confinement.files.write = vec![self.own.clone()];
        confinement.files.devices = vec!["/dev/null".into()];
        confinement
    }

    pub(super) fn sh(&self, script: &str) -> Spec {
        let mut spec = Spec::new("confined", "/bin/sh");
        spec.args = vec!["-c".into(), script.into()];
        spec.env = vec![("PATH".into(), "/usr/bin:/bin".into()), ("LC_ALL".into(), "C".into())];
        spec.cwd = self.own.clone();
        spec.confinement = Some(self.confinement());
        spec
    }

    /// The program of `program`, doing one of its things.
    pub(super) fn program(&self, what: &str, args: &[String]) -> Spec {
        let mut spec = Spec::new("confined", program::executable());
        spec.args = program::arguments();
        spec.env = program::environment(what, args);
        spec.cwd = self.own.clone();
        spec.confinement = Some(self.confinement());
        spec
    }

    /// Gives it a user of its own.
    pub(super) fn as_user(&self, mut spec: Spec) -> Spec {
        std::os::unix::fs::chown(&self.own, Some(SESSION.uid), Some(SESSION.gid)).unwrap();
        spec.user = Some(SESSION);
        spec
    }

    /// Runs it to its end; gives what it wrote to both streams.
    pub(super) async fn run(&self, spec: Spec) -> String {
        let Output { exit, stdout, stderr } = self.sandbox.run(spec, DEADLINE).await.unwrap();
        let text = String::from_utf8(stdout).unwrap() + &String::from_utf8(stderr).unwrap();
        assert!(exit.code.is_some(), "{exit}: {text}");
        text
    }

    /// Runs the program; gives what it told.
    pub(super) async fn told(&self, spec: Spec) -> Vec<String> {
        let Output { exit, stdout, stderr } = self.sandbox.run(spec, DEADLINE).await.unwrap();
        let (stdout, stderr) = (String::from_utf8(stdout).unwrap(), String::from_utf8_lossy(&stderr));
        assert!(exit.success(), "{exit}: {stdout}{stderr}");
        program::told(&stdout)
    }

    /// What is in force for it.
    pub(super) async fn confined(&self, spec: Spec) -> Confined {
        let process = self.sandbox.start(spec).await.unwrap();
        let confined = process.confined().unwrap();
        process.kill(DEADLINE).await.unwrap();
        confined
    }

    pub(super) async fn refused(&self, spec: Spec) -> (String, String) {
        match self.sandbox.start(spec).await.unwrap_err() {
            StartError::Step { step, detail, .. } => (step, detail),
            other => unreachable!("{other:?}"),
        }
    }

    pub(super) async fn stop(self) {
        assert_eq!(self.sandbox.live(), 0);
        self.tasks.stop(DEADLINE).await.unwrap();
    }
}

/// Reads from a started program until it has told a line.
pub(super) async fn until_told(process: &mut Process, line: &str) -> tokio::process::ChildStdout {
    let mut stdout = process.take_stdout().unwrap();
    let mut text = String::new();
    while !program::told(&text).iter().any(|told| told == line) {
        let mut buffer = [0; 1024];
        let count = stdout.read(&mut buffer).await.unwrap();
        assert!(count > 0, "it ended without {line}: {text}");
        text.push_str(std::str::from_utf8(&buffer[..count]).unwrap());
    }
    stdout
}

/// Every file that a confined program of another user has to reach: a copy where all can.
pub(super) fn public_copy(of: &Path, into: &Path) -> PathBuf {
    let copy = into.join(of.file_name().unwrap());
    std::fs::copy(of, &copy).unwrap();
    std::fs::set_permissions(&copy, std::fs::Permissions::from_mode(0o755)).unwrap();
    copy
}
