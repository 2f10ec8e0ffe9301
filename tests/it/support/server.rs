//! A Postgres server of a test's own, for faults that hit the server: the shared one must not be harmed.

#![allow(clippy::unwrap_used, reason = "a test's own helpers fail like the test")]

use super::postgres::{new_database, sandbox};
use super::sidecar::{descendants, soon};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use opencode_sidecar::store::{DatabaseOptions, Embedded};
use opencode_sidecar::tasks::Tasks;
use secrecy::{ExposeSecret, SecretString};
use sqlx::{Connection, PgConnection};
use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use tempfile::TempDir;

/// The server with its cluster. Dropped, it is ended, and its directory is removed.
pub(crate) struct OwnServer {
    tasks: Tasks,
    url: SecretString,
    embedded: Option<Embedded>,
    state: TempDir,
}

impl OwnServer {
    pub(crate) async fn start() -> Self {
        // Not as the shared one's: what looks like that and is not in use is removed by whoever begins a test run.
        let state = tempfile::Builder::new().prefix("oc-pg-").tempdir().unwrap();
        // The server's user passes through it.
        fs::set_permissions(state.path(), Permissions::from_mode(0o711)).unwrap();
        let tasks = Tasks::new();
        let embedded = Embedded::start(&sandbox(&tasks), &tasks, state.path()).await.unwrap();
        Self { tasks, url: embedded.url(), embedded: Some(embedded), state }
    }

    /// The options for a new, empty database; `clause` goes on with `CREATE DATABASE name`.
    pub(crate) async fn database(&self, clause: &str) -> DatabaseOptions {
        new_database(&self.url, clause).await
    }

    /// A connection of its owner's to its first database.
    pub(crate) async fn admin(&self) -> PgConnection {
        PgConnection::connect(self.url.expose_secret()).await.unwrap()
    }

    /// The user whose the cluster's files are.
    pub(crate) fn uid(&self) -> u32 {
        self.state.path().join("postgres/data").metadata().unwrap().uid()
    }

    /// A directory beside the cluster, through which its user passes.
    pub(crate) fn beside(&self) -> &Path {
        self.state.path()
    }

    /// A fast shutdown: clients are cut off, the data is written.
    pub(crate) async fn stop(&mut self) {
        self.embedded.take().unwrap().stop().await.unwrap();
    }

    /// SIGKILL for all of its processes, from one moment to the next.
    pub(crate) async fn kill(&mut self) {
        let process = self.embedded.as_ref().unwrap().process();
        for pid in self.processes() {
            // One may have gone with its parent.
            let _ = kill(pid, Signal::SIGKILL);
        }
        soon("nothing of it is left", process.gone()).await;
        self.embedded = None;
    }

    /// Starts it again, at the same place.
    pub(crate) async fn start_again(&mut self) {
        let embedded = Embedded::start(&sandbox(&self.tasks), &self.tasks, self.state.path()).await.unwrap();
        assert_eq!(embedded.url().expose_secret(), self.url.expose_secret());
        self.embedded = Some(embedded);
    }

    /// None of its processes does anything, until [`OwnServer::thaw`].
    pub(crate) fn freeze(&self) {
        // Its first process first: then it makes no more.
        kill(self.processes()[0], Signal::SIGSTOP).unwrap();
        for pid in self.processes() {
            // One may just have ended.
            let _ = kill(pid, Signal::SIGSTOP);
        }
    }

    pub(crate) fn thaw(&self) {
        for pid in self.processes() {
            // One that was not frozen may just have ended.
            let _ = kill(pid, Signal::SIGCONT);
        }
    }

    /// The postmaster, and its children.
    fn processes(&self) -> Vec<Pid> {
        let postmaster = self.embedded.as_ref().unwrap().process().pid();
        let children =
            descendants(postmaster).into_iter().map(|child| child.split(' ').next().unwrap().parse().unwrap());
        std::iter::once(postmaster).chain(children).map(|pid| Pid::from_raw(pid.cast_signed())).collect()
    }
}
