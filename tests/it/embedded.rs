//! The embedded server: its data survives whatever ends it, and what stands in its way is said.

#![allow(clippy::unwrap_used, reason = "a test's own helpers fail like the test")]

use crate::support::postgres::sandbox;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, geteuid};
use opencode_sidecar::sandbox::Sandbox;
use opencode_sidecar::store::embedded::Search;
use opencode_sidecar::store::{DatabaseOptions, Embedded, EmbeddedError, Store};
use opencode_sidecar::tasks::Tasks;
use secrecy::ExposeSecret;
use sqlx::{Connection, Executor, PgConnection};
use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tempfile::TempDir;

struct Bench {
    tasks: Tasks,
    sandbox: Sandbox,
    state: TempDir,
}

impl Bench {
    fn new() -> Self {
        let state = tempfile::tempdir().unwrap();
        fs::set_permissions(state.path(), Permissions::from_mode(0o711)).unwrap();
        let tasks = Tasks::new();
        Self { sandbox: sandbox(&tasks), tasks, state }
    }

    async fn start(&self) -> Result<Embedded, EmbeddedError> {
        self.start_in(self.state.path()).await
    }

    async fn start_in(&self, state: &Path) -> Result<Embedded, EmbeddedError> {
        Embedded::start(&self.sandbox, &self.tasks, state).await
    }

    fn data(&self) -> PathBuf {
        self.state.path().join("postgres/data")
    }

    async fn nothing_is_left(self) {
        assert_eq!(self.sandbox.live(), 0);
        self.tasks.stop(Duration::from_secs(30)).await.unwrap();
    }
}

async fn connect(embedded: &Embedded) -> PgConnection {
    PgConnection::connect(embedded.url().expose_secret()).await.unwrap()
}

async fn count(embedded: &Embedded) -> i64 {
    sqlx::query_scalar("SELECT count(*) FROM kept").fetch_one(&mut connect(embedded).await).await.unwrap()
}

#[tokio::test]
async fn the_data_survives_a_stop_a_kill_and_a_lost_owner() {
    let bench = Bench::new();
    let embedded = bench.start().await.unwrap();
    assert!(embedded.version().split('.').next().unwrap().parse::<u32>().unwrap() >= 14);
    connect(&embedded).await.execute("CREATE TABLE kept (n int); INSERT INTO kept VALUES (1)").await.unwrap();
    let password = fs::read_to_string(bench.state.path().join("postgres/password")).unwrap();
    assert!(!format!("{embedded:?}").contains(&password));
    embedded.stop().await.unwrap();

    // The server itself is killed: the jail ends its backends.
    let embedded = bench.start().await.unwrap();
    assert_eq!(count(&embedded).await, 1);
    connect(&embedded).await.execute("INSERT INTO kept VALUES (2)").await.unwrap();
    let process = embedded.process();
    kill(Pid::from_raw(i32::try_from(process.pid()).unwrap()), Signal::SIGKILL).unwrap();
    process.gone().await;
    drop(embedded);

    // A stale pid file, whose number now belongs to another process.
    let pid_file = bench.data().join("postmaster.pid");
    let stale = fs::read_to_string(&pid_file).unwrap();
    let rest = stale.split_once('\n').unwrap().1;
    fs::write(&pid_file, format!("{}\n{rest}", std::process::id())).unwrap();
    let embedded = bench.start().await.unwrap();
    assert_eq!(count(&embedded).await, 2);

    // Its owner lets go without a word, as one that is killed does: the next start waits for it.
    connect(&embedded).await.execute("INSERT INTO kept VALUES (3)").await.unwrap();
    drop(embedded);
    let embedded = bench.start().await.unwrap();
    assert_eq!(count(&embedded).await, 3);
    embedded.stop().await.unwrap();
    bench.nothing_is_left().await;
}

#[tokio::test]
async fn it_can_be_reached_only_by_who_has_the_password() {
    let bench = Bench::new();
    let embedded = bench.start().await.unwrap();
    let root = bench.state.path().join("postgres");
    let mode = |path: &str| root.join(path).metadata().unwrap().mode() & 0o7777;
    assert_eq!((mode("password"), mode("run"), mode("data")), (0o600, 0o700, 0o700));
    assert_eq!(root.join("password").metadata().unwrap().uid(), geteuid().as_raw());
    assert_ne!(root.join("data").metadata().unwrap().uid(), 0);
    let mut url = url::Url::parse(embedded.url().expose_secret()).unwrap();
    url.set_password(Some("wrong")).unwrap();
    let error = PgConnection::connect(url.as_str()).await.unwrap_err();
    assert_eq!(error.as_database_error().unwrap().code().as_deref(), Some("28P01"));
    let mut connection = connect(&embedded).await;
    for (setting, value) in [("listen_addresses", ""), ("fsync", "on"), ("synchronous_commit", "on")] {
        let found: String =
            sqlx::query_scalar("SELECT current_setting($1)").bind(setting).fetch_one(&mut connection).await.unwrap();
        assert_eq!(found, value, "{setting}");
    }
    let options = DatabaseOptions { url: embedded.url(), schema: "s".to_owned(), max_connections: 2 };
    let store = Store::connect(&options).await.unwrap();
    store.migrate().await.unwrap();
    embedded.stop().await.unwrap();
    assert!(store.ping().await.unwrap_err().is_transient());
    bench.nothing_is_left().await;
}

#[tokio::test]
async fn an_interrupted_first_start_leaves_nothing_that_matters() {
    let bench = Bench::new();
    // What a killed first start leaves: a half-made cluster beside the place, and its password.
    let leftover = bench.state.path().join("postgres/initdb-1");
    fs::create_dir_all(leftover.join("base")).unwrap();
    fs::write(bench.state.path().join("postgres/initdb-1.password"), "x").unwrap();
    let embedded = bench.start().await.unwrap();
    let left: Vec<_> = fs::read_dir(bench.state.path().join("postgres"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with("initdb-"))
        .collect();
    assert_eq!(left, [""; 0]);
    embedded.stop().await.unwrap();
    bench.nothing_is_left().await;
}

#[tokio::test]
async fn a_path_too_long_for_a_socket_is_no_obstacle() {
    let bench = Bench::new();
    let embedded = bench.start_in(&bench.state.path().join("x".repeat(120))).await.unwrap();
    connect(&embedded).await.execute("SELECT 1").await.unwrap();
    let url = url::Url::parse(embedded.url().expose_secret()).unwrap();
    let socket_dir = PathBuf::from(url.query_pairs().find(|(name, _)| name == "host").unwrap().1.into_owned());
    assert_eq!(socket_dir.metadata().unwrap().mode() & 0o7777, 0o700);
    embedded.stop().await.unwrap();
    assert!(!socket_dir.exists());
    bench.nothing_is_left().await;
}

#[tokio::test]
async fn what_stands_in_the_way_is_said() {
    let bench = Bench::new();
    let start = async |search: &Search| {
        Embedded::start_with(&bench.sandbox, &bench.tasks, bench.state.path(), search).await.unwrap_err()
    };
    let error = start(&Search { path: vec!["/nonexistent".into()], ..Search::default() }).await;
    assert!(matches!(error, EmbeddedError::NoServer { .. }), "{error:?}");
    let error = start(&Search { only: Some("/nonexistent".into()), ..Search::default() }).await;
    assert!(error.to_string().contains("/nonexistent"), "{error}");

    // Made by a version that no server here is of.
    fs::create_dir_all(bench.data()).unwrap();
    fs::write(bench.data().join("PG_VERSION"), "9.6\n").unwrap();
    if geteuid().is_root() {
        let error = start(&Search::from_env()).await;
        assert!(matches!(error, EmbeddedError::OtherOwner { .. }), "{error:?}");
        let user = ["postgres", "nobody"].iter().find_map(|name| nix::unistd::User::from_name(name).unwrap()).unwrap();
        nix::unistd::chown(&bench.data(), Some(user.uid), Some(user.gid)).unwrap();
    }
    let error = start(&Search::from_env()).await;
    assert!(matches!(&error, EmbeddedError::OtherVersion { cluster, .. } if cluster == "9.6"), "{error:?}");

    // A cluster that is damaged: the server's own words are in the error.
    let server = {
        let other = Bench::new();
        let embedded = other.start().await.unwrap();
        let major = embedded.version().split('.').next().unwrap().to_owned();
        embedded.stop().await.unwrap();
        major
    };
    fs::write(bench.data().join("PG_VERSION"), server).unwrap();
    let error = start(&Search::from_env()).await;
    assert!(matches!(error, EmbeddedError::Password(_)), "{error:?}");
    fs::write(bench.state.path().join("postgres/password"), "0".repeat(64)).unwrap();
    fs::set_permissions(bench.data(), Permissions::from_mode(0o700)).unwrap();
    let error = start(&Search::from_env()).await;
    assert!(matches!(&error, EmbeddedError::Exited { log, .. } if log.contains("postgresql.conf")), "{error:?}");

    if geteuid().is_root() {
        fs::set_permissions(bench.state.path(), Permissions::from_mode(0o700)).unwrap();
        let error = start(&Search::from_env()).await;
        assert!(
            matches!(&error, EmbeddedError::Blocked { directory, .. } if directory == bench.state.path()),
            "{error:?}"
        );
    }
    bench.nothing_is_left().await;
}
